"""`cembed serve` by itself: every route, refusals, limits, and what a kill leaves behind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import gethostname
from typing import Any, cast
from urllib.parse import quote

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from serving import SAMPLE, Answer, Server, load_sample, sample_pages

from cembed.options import PageVectors, Reading, settings_of
from cembed.runtime import Bundle, Embedder, Index, NewPage, maxsim
from cembed.runtime.errors import CembedError
from cembed.runtime.index.new_pages import page_content
from cembed.runtime.pages.documents import PageReader, require_pages
from cembed.serve.errors import RefusalError
from cembed.serve.fetching import Fetcher
from cembed.serve.frames import MAX_ARRAYS, MAX_HEADER, NonsenseError, sizes, unpack
from cembed.serve.pool import LostError, Worker
from cembed.serve.settings import MIB
from cembed.serve.worker import read_page

QUERY = "notice about the pension seminar with emma foster"
PAGE = sample_pages(1)[0].read_bytes()
ROUNDS = 100 if os.environ.get("CEMBED_CRASH") == "long" else 4


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return load_sample()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With six pages of the sample in its index."""
    folder = tmp_path_factory.mktemp("serve")
    with Server(folder / "log", index=folder / "shelf", name="sample") as started:
        for path in sample_pages(6):
            assert started.post(f"/pages?name={path.name}", path.read_bytes()).status == 200
        yield started


@pytest.fixture(scope="module")
def shown() -> list[NDArray[np.uint8]]:
    """Those pages as the library reads them."""
    with PageReader() as reader:
        return [page.image for page in require_pages(reader.read(sample_pages(6)))]


def uri(data: bytes = PAGE) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def floats(text: str, *shape: int) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(shape or -1)


def pdf(*pages: Image.Image) -> bytes:
    file = io.BytesIO()
    pages[0].save(file, "PDF", save_all=True, append_images=pages[1:])
    return file.getvalue()


# What is computed is what the library computes.


def test_bytes_of_a_page_and_a_query_are_the_librarys(server: Server, embedder: Embedder, shown: list[Any]) -> None:
    page, query = embedder.embed_images(shown[:1])[0], embedder.embed_queries([QUERY])[0]
    answer = server.post("/embed", PAGE)
    assert answer.status == 200
    assert answer.body == page.tobytes()
    assert (answer.headers["cembed-rows"], answer.headers["cembed-dim"]) == (str(len(page)), "256")
    assert server.post("/embed", QUERY).body == query.tobytes()
    few = embedder.embed_images(shown[:1], 4, dim=64)[0]
    assert server.post("/embed?num_vectors=4&dim=64&dtype=f16", PAGE).body == few.astype("<f2").tobytes()


def test_every_page_of_a_pdf_or_one(server: Server, embedder: Embedder, tmp_path: Path) -> None:
    file = tmp_path / "two.pdf"
    file.write_bytes(pdf(*(Image.open(path).convert("RGB") for path in sample_pages(2))))
    with PageReader() as reader:
        expected = [embedder.embed_image(page.image) for page in require_pages(reader.read([file]))]
    assert server.post("/embed", file.read_bytes()).body == b"".join(rows.tobytes() for rows in expected)
    assert server.post("/embed?page=2", file.read_bytes()).body == expected[1].tobytes()


def test_openai_embeddings(server: Server, embedder: Embedder, shown: list[Any]) -> None:
    query, page = embedder.embed_queries([QUERY])[0], embedder.embed_images(shown[:1])[0]
    asked: dict[str, Any] = {"model": "sample", "input": [QUERY, uri()], "return_multivector": True}
    first, second = server.post("/v1/embeddings", asked).json["data"]
    assert np.array_equal(np.array(first["embedding"], np.float32), query)
    assert np.array_equal(np.array(second["embedding"], np.float32), page)
    coded = server.post("/v1/embeddings", {**asked, "encoding_format": "base64"}).json
    assert [data["index"] for data in coded["data"]] == [0, 1]
    assert np.array_equal(floats(coded["data"][1]["embedding"], *coded["data"][1]["shape"]), page)
    assert coded["model"] == "sample"
    message = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": uri()}}, {"type": "text", "text": ""}],
    }
    said = server.post(
        "/v1/embeddings", {"messages": [message], "encoding_format": "base64", "return_multivector": True}
    )
    assert np.array_equal(floats(said.json["data"][0]["embedding"], *page.shape), page)
    jina = {"input": [{"text": QUERY}, {"image": uri()}], "return_multivector": True, "task": "retrieval.query"}
    assert np.array_equal(np.array(server.post("/v1/embeddings", jina).json["data"][0]["embedding"], np.float32), query)
    small = server.post("/v1/embeddings", {**asked, "input": QUERY, "dimensions": 32, "model": "sample-query"}).json
    expected = embedder.embed_queries([QUERY], dim=32)[0]
    assert np.array_equal(np.array(small["data"][0]["embedding"], np.float32), expected)


def test_pooling_gives_all_vectors(server: Server, embedder: Embedder) -> None:
    found = server.post("/pooling", {"input": QUERY, "task": "token_embed"}).json
    assert found["data"][0]["object"] == "pooling"
    assert np.array_equal(np.array(found["data"][0]["data"], np.float32), embedder.embed_queries([QUERY])[0])


def test_rerank_and_score_are_maxsim(server: Server, embedder: Embedder, shown: list[Any]) -> None:
    pages = embedder.embed_images(shown)
    expected = maxsim(embedder.embed_queries([QUERY]), pages)[0]
    documents = [uri(path.read_bytes()) for path in sample_pages(6)]
    for route in ("/rerank", "/v1/rerank", "/v2/rerank"):
        found = server.post(route, {"query": QUERY, "documents": documents, "top_n": 4}).json["results"]
        assert [result["index"] for result in found] == np.argsort(-expected)[:4].tolist()
        assert [result["relevance_score"] for result in found] == sorted(map(float, expected), reverse=True)[:4]
    for names in ({"queries": QUERY, "documents": documents[:2]}, {"text_1": QUERY, "text_2": documents[:2]}):
        scores = server.post("/score", names).json["data"]
        assert [score["score"] for score in scores] == expected[:2].tolist()
    pairs = {"queries": [QUERY, QUERY], "documents": [{"content": [{"type": "image_url", "image_url": uri()}]}, "1"]}
    one, stored = server.post("/v1/score", pairs).json["data"]
    assert one["score"] == expected[0]
    assert stored["score"] == pytest.approx(expected[1], abs=0.01)  # the index keeps half floats


def test_pages_of_the_index_are_ranked_by_their_ids(server: Server) -> None:
    found = server.get(f"/search?q={QUERY.replace(' ', '+')}&top=6").json
    ids = [page["id"] for page in found["pages"]]
    scores = {page["id"]: page["score"] for page in found["pages"]}
    ranked = server.post("/rerank", {"query": QUERY, "documents": sorted(ids)}).json["results"]
    assert [sorted(ids)[result["index"]] for result in ranked] == ids
    assert [result["relevance_score"] for result in ranked] == pytest.approx([scores[i] for i in ids], rel=1e-3)
    assert ranked[0]["document"] == {"text": ids[0]}


def test_kserve(server: Server, embedder: Embedder, shown: list[Any]) -> None:
    assert server.get("/v2/health/ready").json == {"ready": True}
    assert server.get("/v2/models/sample/ready").status == 200
    about = server.get("/v2/models/sample").json
    assert [tensor["name"] for tensor in about["inputs"]] == ["text", "image"]
    query, page = embedder.embed_queries([QUERY])[0], embedder.embed_images(shown[:1])[0]
    asked = {"id": "7", "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [QUERY]}]}
    found = server.post("/v2/models/sample/infer", asked).json
    assert found["id"] == "7"
    assert found["outputs"][0]["shape"] == list(query.shape)
    assert np.array_equal(np.array(found["outputs"][0]["data"], np.float32).reshape(query.shape), query)
    body = len(PAGE).to_bytes(4, "little") + PAGE
    header = json.dumps(
        {
            "inputs": [
                {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(body)}}
            ],
            "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in ("vectors", "rows")],
        }
    ).encode()
    answer = server.post(
        "/v2/models/sample/infer", header + body, **{"Inference-Header-Content-Length": str(len(header))}
    )
    size = int(answer.headers["inference-header-content-length"])
    assert [output["shape"] for output in json.loads(answer.body[:size])["outputs"]] == [list(page.shape), [1]]
    assert answer.body[size:] == page.tobytes() + np.array([len(page)], "<i8").tobytes()


# The index.


def test_pages_are_added_found_and_shown(server: Server) -> None:
    found = server.get(f"/search?q={QUERY.replace(' ', '+')}").json
    assert found["total"] == 6
    best = found["pages"][0]
    assert best["source"] in {path.name for path in sample_pages(6)}
    about = server.get(f"/pages/{best['id']}").json
    assert about["vectors"] == 32
    assert about["source"] == best["source"]
    picture = server.get(f"/pages/{best['id']}/thumbnail")
    assert picture.headers["content-type"] == "image/jpeg"
    with Image.open(io.BytesIO(picture.body)) as opened:
        assert max(opened.size) <= 1280
    like = server.post("/search?top=1", (sample_pages(3)[2]).read_bytes()).json
    assert like["pages"][0]["source"] == sample_pages(3)[2].name


def test_where_a_page_matched(server: Server) -> None:
    best = server.get(f"/search?q={QUERY.replace(' ', '+')}&top=1").json["pages"][0]
    found = server.get(f"/pages/{best['id']}/explain?q={QUERY.replace(' ', '+')}").json
    heat = np.array(found["heat"])
    assert heat.ndim == 2
    assert (heat.min(), heat.max()) == (0, 1)
    left, top, right, bottom = found["hottest"]
    assert 0 <= left < right <= 1
    assert 0 <= top < bottom <= 1
    assert found["score"] == pytest.approx(best["score"], rel=0.05)  # of the picture that is kept


def test_a_file_is_replaced_by_one_with_its_name(tmp_path: Path) -> None:
    first, second, third = (Image.open(path).convert("RGB") for path in sample_pages(3))
    with Server(tmp_path / "log", index=tmp_path / "shelf", worker={"prepack": False}) as server:
        lines = server.post(
            "/pages?name=a.pdf&metadata=%7B%22year%22:2024%7D", pdf(first, second), Accept="application/x-ndjson"
        )
        told = [json.loads(line) for line in lines.body.splitlines()]
        assert [(page["number"], page["pages"]) for page in told] == [(1, 2), (2, 2)]
        assert server.get("/search?q=x&where=year%3D2024").json["total"] == 2
        assert server.get("/search?q=x&where=year%3D2025").json["pages"] == []
        again = server.post("/pages?name=b.pdf", pdf(first, second)).json  # takes the vectors that are there
        assert again["added"] == 2
        assert server.post("/pages?name=a.pdf", pdf(third)).json["added"] == 1
        found = server.get("/search?q=x").json
        assert sorted((page["source"], page["page"]) for page in found["pages"]) == [
            ("a.pdf", 1),
            ("b.pdf", 1),
            ("b.pdf", 2),
        ]
        nameless = server.post("/pages", PAGE).json
        assert server.get(f"/pages/{nameless['pages'][0]['id']}").json["source"] == nameless["source"]
        assert server.post("/pages?name=bad.pdf", b"%PDF-1.4 no").status == 422
    with Index.open(tmp_path / "shelf") as index:
        assert len(index) == 4


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A file, of which tmp_path / "shelf" has a page with its whole path."""
    file = tmp_path / "private" / "scan.jpg"
    file.parent.mkdir()
    file.write_bytes(PAGE)
    command = [sys.executable, "-m", "cembed", "index", "add", tmp_path / "shelf", file.parent, "--bundle", SAMPLE]
    subprocess.run(command, check=True)
    return file


def usual_settings() -> str:
    """What vectors of pages depend on, without any option."""
    return settings_of(PageVectors(), Reading(dpi=144.0), Bundle(SAMPLE).manifest.image.skip_blank)


def reading(folder: Path) -> Server:
    """A server that shows the index in a folder, with the settings of the command line."""
    more: dict[str, Any] = {"read_only": True, "page_settings": usual_settings(), "worker": {"prepack": False}}
    return Server(folder / "log", index=folder / "shelf", **more)


def add_to(shelf: Path, *pages: NewPage) -> None:
    with Index.open(shelf, write=True) as index:
        index.add(pages, bundle=load_sample().bundle.hash)


def test_files_that_the_command_line_added_are_shown_without_their_place(tmp_path: Path, private: Path) -> None:
    with reading(tmp_path) as server:
        page = server.get("/search?q=x").json["pages"][0]
        assert page["source"] == "scan.jpg"
        assert server.get(f"/pages/{page['id']}/thumbnail").body[:2] == b"\xff\xd8"
        private.unlink()
        assert server.get(f"/pages/{page['id']}/thumbnail").status == 200  # it was kept
        assert server.post("/pages", PAGE).status == 403
        vectors = load_sample().embed_query("x")
        add_to(tmp_path / "shelf", NewPage("x", vectors, "/etc/hostname"))  # another process may add
        time.sleep(1.1)
        later = server.get("/search?q=x").json
        assert later["total"] == 2
        assert later["pages"][0]["source"] == "hostname"
        assert server.get(f"/pages/{later['pages'][0]['id']}/thumbnail").status == 404
        log = server.log.read_text()
    assert "error" not in log


def test_folders_of_this_machine_cannot_be_guessed(tmp_path: Path, private: Path) -> None:
    """Patterns are of what is shown, filters of what clients gave, ids with a path are nobody's."""
    vectors = load_sample().embed_query("x")
    add_to(tmp_path / "shelf", *(NewPage(f"{i}", vectors, f"/scan/{i}.pdf") for i in range(9)))
    with reading(tmp_path) as server:

        def found(pattern: str, top: int = 10) -> int:
            return len(server.get(f"/search?q=x&top={top}&source={quote(pattern)}").json["pages"])

        assert [found(pattern) for pattern in ("scan*", "*.jpg", "*", "[s]can.jpg", "1.pdf")] == [1, 1, 10, 1, 1]
        assert found("scan*", 1) == 1  # though nine others fit better, by their folder
        guesses = ["/*", f"{private.parent}*", str(private), "*/scan.jpg", "*private*", "[/s][ct]*.pdf"]
        assert [found(pattern) for pattern in guesses] == [0] * len(guesses)
        assert server.get(f"/search?q=x&where=cembed:folder%3D{private.parent}").status == 400
        for name in (f"{private}#1", f"{private}#2"):
            assert server.get(f"/pages/{quote(name, '')}").status == 404
            assert server.post("/rerank", {"query": "x", "documents": [name]}).status == 404


def test_a_picture_is_made_only_of_what_was_indexed(tmp_path: Path, private: Path) -> None:
    """Not where a link leads since, nor of any file that a stranger's index names."""
    other = tmp_path / "other.jpg"
    other.write_bytes(sample_pages(2)[1].read_bytes())
    content = page_content(hashlib.sha256(PAGE).digest(), 1, usual_settings())
    add_to(
        tmp_path / "shelf",
        NewPage("another", None, str(other), content=content),
        NewPage("none", load_sample().embed_query("x"), str(other)),
    )
    with reading(tmp_path) as server:
        pages = server.get("/search?q=x").json["pages"]
        (scan,) = (page["id"] for page in pages if page["source"] == "scan.jpg")
        private.rename(tmp_path / "away.jpg")
        for target, status in ((other, 404), (tmp_path / "none", 404), (Path("/dev/zero"), 404), (tmp_path, 404)):
            private.symlink_to(target)
            assert server.get(f"/pages/{scan}/thumbnail").status == status
            private.unlink()
        for page in pages:
            if page["id"] != scan:
                assert server.get(f"/pages/{page['id']}/thumbnail").status == 404
                assert server.get(f"/pages/{page['id']}/explain?q=x").status == 404
        private.symlink_to(tmp_path / "away.jpg")  # what it leads to is what was indexed
        assert server.get(f"/pages/{scan}/thumbnail").body[:2] == b"\xff\xd8"


def test_what_is_wrong_with_the_index_is_said_without_its_place(tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    with Server(tmp_path / "log", index=shelf, worker={"prepack": False}) as server:
        assert server.post("/pages", PAGE).status == 200
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1 << 17, -1))  # as a disk that is full
        answers = [server.post("/pages", path.read_bytes()) for path in sample_pages(20)]
        refused = next(answer for answer in answers if answer.status != 200)
        assert (refused.status, refused.message) == (503, "the index cannot be written now; the server's log says why")
        assert re.search(f"the index cannot be written now: .*{shelf}", server.log.read_text())
    for file in (path for path in shelf.rglob("*.f16") if path.stat().st_size):
        file.write_bytes(bytes(file.stat().st_size))
    with Server(tmp_path / "log", index=shelf, worker={"prepack": False}) as server:
        refused = server.get("/search?q=x")
        assert (refused.status, refused.message) == (500, "the index cannot be searched; the server's log says why")
        assert re.search(f"the index cannot be searched: .*{shelf}", server.log.read_text())


def test_where_the_decoding_process_is_is_told_to_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def page(self, path: str, number: int) -> None:
            raise CembedError(f"check that {sys.executable} works")

    reading, _ = read_page(Broken(), "x", 1)  # type: ignore[arg-type]
    assert reading == {"fault": "the decoding process does not start; the server's log says why"}
    assert sys.executable in capsys.readouterr().err


def test_a_client_cannot_name_a_file_of_this_machine(server: Server) -> None:
    """A page that was sent has no file here, whatever its name says."""
    added = server.post("/pages?name=%2Fetc%2Fpasswd", PAGE).json
    assert added["source"] == "etc/passwd"
    serial = added["pages"][0]["id"]
    for kept in (Path(server.log.parent) / "shelf.pictures").rglob(f"{serial}.jpg"):
        kept.unlink()
    assert server.get(f"/pages/{serial}/thumbnail").status == 404


# Bad input.

MULTI = {"return_multivector": True}
INFER = "/v2/models/sample/infer"


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/embeddings", {"input": "x"}, 400, "return_multivector"),
        ("/v1/embeddings", {"input": [[1, 2]]}, 400, "token ids"),
        ("/v1/embeddings", {"input": []}, 400, ""),
        ("/v1/embeddings", {}, 400, "input or messages"),
        ("/v1/embeddings", {"input": 7}, 400, "input"),
        ("/v1/embeddings", {"input": "x", "model": "gpt"}, 404, "'sample'"),
        ("/v1/embeddings", {"input": "x", "input_type": "passage"}, 400, "pictures of pages"),
        ("/v1/embeddings", {"input": "x", "input_type": "poem"}, 400, "not known"),
        ("/v1/embeddings", {"input": "x", "dimensions": 0}, 400, "dimensions"),
        ("/v1/embeddings", {"input": "x", "dimensions": 9999, **MULTI}, 400, "have 256"),
        ("/v1/embeddings", {"input": ["x"] * 2049, **MULTI}, 400, "2048"),
        ("/v1/embeddings", {"input": "data:image/png;base64,!!", **MULTI}, 400, "not base64"),
        ("/v1/embeddings", {"input": "data:image/png,abc", **MULTI}, 400, "base64"),
        ("/v1/embeddings", {"input": {"image": "http://localhost/a.png"}, **MULTI}, 400, "fetches no URLs"),
        ("/v1/embeddings", {"input": uri(b"GIF89a rest"), **MULTI}, 422, ""),
        ("/v1/embeddings", {"messages": [{"role": "system", "content": "x"}], **MULTI}, 400, "neither"),
        ("/v1/embeddings", b'{"input": "\\ud800", "return_multivector": true}', 400, "half of a character"),
        ("/v1/embeddings", {"input": "x" * 70_000, **MULTI}, 400, "at most 65536"),
        ("/v1/embeddings", b"{", 400, ""),
        ("/v1/embeddings", b'{"input": NaN}', 400, "input"),
        ("/v1/embeddings", b"\xff\xfe", 400, ""),
        ("/v1/embeddings", b"[" * 5000, 400, ""),
        ("/pooling", {"input": "x", "num_vectors": 10**6}, 422, "the model has 4096"),
        ("/rerank", {"query": "x", "documents": []}, 400, "documents"),
        ("/rerank", {"query": "x", "documents": ["nowhere.pdf#1"]}, 404, "no page"),
        ("/rerank", {"query": "x", "documents": ["0"], "top_n": 0}, 400, "top_n"),
        ("/score", {"queries": ["a", "b"], "documents": ["0"]}, 400, "as many"),
        ("/v2/rerank", {"query": "x", "documents": ["nowhere"]}, 404, "no page"),
        ("/v2/embed", {"input_type": "search_query", "texts": ["x"]}, 400, "more than one vector"),
        ("/v2/embed", {"texts": ["x"]}, 400, "input_type"),
        (INFER, {"inputs": []}, 400, "inputs"),
        ("/v2/models/other/infer", {"inputs": []}, 404, "no model"),
        (INFER, {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["x"]}]}, 400, "shape"),
        (INFER, {"inputs": [{"name": "text", "shape": [10**99], "datatype": "BYTES", "data": ["x"]}]}, 400, "less"),
        (INFER, {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32"}]}, 400, "text and image"),
        ("/embed", b"", 400, "empty"),
        ("/embed", b"not a picture", 422, "PNG"),
        ("/embed?dim=0", PAGE, 400, "dim"),
        ("/embed?page=9", PAGE, 422, ""),
        ("/pages?metadata=[]", PAGE, 400, "JSON object"),
        ("/pages?name=a%0Ab", PAGE, 400, "printable"),
        ("/pages?name=/../private/scan.png", PAGE, 400, ".."),
        ("/pages?name=a%5C..%5Cscan.png", PAGE, 400, ".."),
        ("/search?top=0", PAGE, 400, "top"),
        ("/search?where=x", PAGE, 400, "KEY=VALUE"),
        ("/nowhere", b"", 404, ""),
    ],
)
def test_bad_input_is_one_line_in_the_shape_of_its_api(
    server: Server, path: str, body: Any, status: int, says: str
) -> None:
    answer = server.post(path, body, **({"Content-Type": "application/json"} if path.startswith("/v1") else {}))
    assert answer.status == status, answer.body
    assert says in answer.message
    if path.startswith(("/v2/rerank", "/v2/embed")):
        assert isinstance(answer.json["message"], str)
    elif path.startswith("/v2"):
        assert isinstance(answer.json["error"], str)
    else:
        assert set(answer.json["error"]) == {"message", "type", "param", "code"}


def test_unknown_fields_are_ignored_and_methods_refused(server: Server) -> None:
    asked = {"input": QUERY, "return_multivector": True, "user": "me", "late_chunking": False}
    assert server.post("/v1/embeddings", asked).status == 200
    refused = server.get("/v1/embeddings")
    assert (refused.status, refused.headers["allow"]) == (405, "POST")
    assert server.get("/pages/none/thumbnail").status == 404
    assert server.get("/static/../settings.py").status == 404


def test_pages_of_other_sites_are_refused(server: Server) -> None:
    assert server.get("/search?q=x", Host="evil.example").status == 421
    assert server.post("/embed", QUERY, Origin="http://evil.example").status == 403
    assert server.get("/search?q=x", **{"Sec-Fetch-Site": "cross-site"}).status == 403
    assert server.get("/", **{"Sec-Fetch-Site": "cross-site"}).status == 200  # a link to it
    assert server.post("/embed", QUERY, Origin=server.url).status == 200
    page = server.get("/")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"


def test_names_that_others_may_lead_here_are_refused_without_a_token(tmp_path: Path) -> None:
    """Whoever owns a name may give it this machine's address, so that pages of it ask here as their own origin."""
    open_to_all: dict[str, Any] = {"host": "0.0.0.0", "allow_hosts": ["pages.example"], "worker": {"prepack": False}}
    with Server(tmp_path / "log", **open_to_all) as server:
        refused = server.post("/embed", QUERY, Host="evil.example")
        assert (refused.status, "--allow-host" in refused.message) == (421, True)
        assert server.get("/search?q=x", Host="evil.example:8080", Origin="http://evil.example:8080").status == 421
        for name in ("127.0.0.1", "192.168.1.7:8080", "[fe80::1]:80", "localhost", "pages.example", gethostname()):
            assert server.get("/health/live", Host=name).status == 200
    with Server(tmp_path / "log", token="a-token-of-tests", **open_to_all) as server:
        assert server.get("/metrics", Host="any.example", **TOKEN).status == 200


def test_what_is_written_down(server: Server) -> None:
    """A line for each request, without what was searched for; counters by route."""
    server.get("/search?q=secret-words", **{"X-Request-Id": "abc-1"})
    answer = server.get("/search?q=x", **{"X-Request-Id": "not\tgood"})
    assert answer.headers["x-request-id"] != "not\tgood"
    lines = server.log.read_text().splitlines()
    line = next(json.loads(line) for line in lines if "abc-1" in line)
    assert line["route"] == "/search"
    assert line["status"] == 200
    assert "secret" not in server.log.read_text()
    metrics = server.get("/metrics").body.decode()
    assert 'cembed_request_seconds_count{route="/search",status="200"}' in metrics
    assert "cembed_queue_depth 0.0" in metrics
    assert f'bundle="{load_sample().bundle.hash}"' in metrics


# Limits.


def test_a_body_beyond_the_limit_is_refused_before_it_is_sent(server: Server) -> None:
    with contextlib.closing(server.connect(10)) as connection:
        connection.putrequest("POST", "/embed")
        connection.putheader("Content-Length", str(65 * MIB))
        connection.endheaders()
        assert connection.getresponse().status == 413


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of little patience, with a token."""
    folder = tmp_path_factory.mktemp("strict")
    limits = {"queue": 2, "body_time": 1.0, "header_time": 1, "body": MIB, "bodies": 2 * MIB, "wait": 20.0}
    with Server(folder / "log", token="a-token-of-tests", limits=limits) as started:
        yield started


TOKEN = {"Authorization": "Bearer a-token-of-tests"}


def test_a_token_is_asked_for(strict: Server) -> None:
    refused = strict.post("/embed", QUERY)
    assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert strict.post("/embed", QUERY, Authorization="Bearer wrong").status == 401
    assert strict.get("/metrics").status == 401
    assert strict.post("/embed", QUERY, **TOKEN).status == 200
    assert [strict.get(path).status for path in ("/", "/health/live", "/health/ready", "/static/page.js")] == [200] * 4
    assert strict.get("/search?q=x", **TOKEN).message.startswith("this server has no index")


def test_more_than_can_wait_is_refused_at_once(strict: Server) -> None:
    big = io.BytesIO()
    Image.effect_noise((900, 1200), 60).convert("RGB").save(big, "JPEG", quality=60)

    def one(_: int) -> Answer:
        return strict.post("/embed", big.getvalue(), **TOKEN)

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(one, range(24)))
    counts = {status: sum(answer.status == status for answer in answers) for status in (200, 429)}
    assert sum(counts.values()) == 24
    assert counts[200] >= 4
    assert counts[429] >= 1
    refused = next(answer for answer in answers if answer.status == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json["error"]["type"] == "rate_limit_error"
    assert strict.get("/health/ready").status == 200


def raw(server: Server, *parts: bytes, pause: float = 0.0) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        answer = b""
        while data := connection.recv(65536):
            answer += data
            if b"\r\n\r\n" in answer and b"}" in answer:
                break
        return answer


def unfinished(server: Server, path: str, size: int, body: bytes = b"x", **headers: str) -> tuple[socket.socket, bytes]:
    """A connection with a request of whose body only this is sent, and the line of its answer."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {size}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    connection = socket.create_connection(("127.0.0.1", server.port), 8)
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection, connection.recv(1 << 16).splitlines()[0]


def test_slow_senders_are_sent_away(strict: Server) -> None:
    start = time.monotonic()
    assert raw(strict, b"POST /embed HTTP/1.1\r\nHost: localhost\r\n") == b""  # no end of its lines
    token = b"Authorization: Bearer a-token-of-tests\r\n"
    half = b"POST /embed HTTP/1.1\r\nHost: localhost\r\n" + token + b"Content-Length: 100\r\n\r\nhalf"
    assert b" 408 " in raw(strict, half).splitlines()[0]
    assert time.monotonic() - start < 8
    endless = b"POST /embed HTTP/1.1\r\nHost: localhost\r\n" + token + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"80000\r\n" + b"x" * 0x80000 + b"\r\n"
    assert b" 413 " in raw(strict, endless, *[chunk] * 3).splitlines()[0]


def test_endless_lines_of_a_request_end_the_connection(strict: Server) -> None:
    lines = [b"X-%d: " % number + b"a" * 1000 + b"\r\n" for number in range(400)]
    with pytest.raises(OSError, match=r"reset|pipe"):  # it is closed while they are being sent
        raw(strict, b"GET / HTTP/1.1\r\nHost: localhost\r\n", *lines, *[b"X: y\r\n" * 100] * 100, pause=0.001)


def test_a_body_that_is_compressed_is_refused(strict: Server) -> None:
    for kind in ("gzip", "br", "identity, gzip"):
        assert strict.post("/embed", b"x", **TOKEN, **{"Content-Encoding": kind}).status == 415
    assert strict.post("/embed", QUERY, **TOKEN, **{"Content-Encoding": "identity"}).status == 200


def test_bodies_have_a_limit_together(strict: Server) -> None:
    """Of 2 MiB; what was held of them is given back, however they ended."""
    most = b"x" * (MIB - 1)
    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            begun = [pool.submit(unfinished, strict, "/embed", MIB, most, **TOKEN) for _ in range(4)]
        assert {answer.result()[1].split()[1] for answer in begun} == {b"408", b"429"}
        for answer in begun:
            answer.result()[0].close()
    assert [strict.post("/embed", most, **TOKEN).status for _ in range(4)] == [422] * 4


def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    with Server(tmp_path / "log", limits={"answer": 1.0}, worker={"prepack": False}) as server:
        (worker,) = children(server.process.pid)
        os.kill(worker, signal.SIGSTOP)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(server.post, "/embed", QUERY)
            time.sleep(0.5)
            second = pool.submit(server.post, "/embed", QUERY)
            assert (first.result().status, second.result().status) == (504, 200)
        assert children(server.process.pid) != [worker]


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"[]", b""),
        (b"no JSON", b""),
        (b"{}", b""),
        (b'{"arrays": 1}', b""),
        (b'{"arrays": {"a": 1}}', b""),
        (b'{"arrays": {"a": ["float64", [1]]}}', bytes(8)),
        (b'{"arrays": {"a": [[], [1]]}}', bytes(4)),
        (b'{"arrays": {"a": ["float32", [2]]}}', bytes(4)),
        (b'{"arrays": {"a": ["float32", [1]]}}', bytes(8)),
        (b'{"arrays": {"a": ["float32", [-1]]}}', bytes(4)),
        (b'{"arrays": {"a": ["float32", [-1, -1]]}}', bytes(4)),
        (b'{"arrays": {"a": ["float32", [1.5]]}}', bytes(4)),
        (b'{"arrays": {"a": ["float32", ["1"]]}}', bytes(4)),
        (b'{"arrays": {"a": ["float32", 1]}}', bytes(4)),
        (b'{"arrays": {"a": ["float32", [1000000000000, 1000000000000]]}}', bytes(4)),
        (b'{"arrays": {"a": ["uint8", [4]], "b": ["uint8", [-4]]}}', b""),
        (b"[" * 100_000, b""),
    ],
)
def test_what_a_worker_cannot_have_meant_is_nonsense(header: bytes, body: bytes) -> None:
    with pytest.raises(NonsenseError):
        unpack(header, body)


@pytest.mark.parametrize(("header", "arrays"), [(MAX_HEADER + 1, 0), (0, MAX_ARRAYS + 1), (2**32 - 1, 2**64 - 1)])
def test_frames_that_are_too_large_are_nonsense(header: int, arrays: int) -> None:
    assert sizes(MAX_HEADER.to_bytes(4, "little") + MAX_ARRAYS.to_bytes(8, "little")) == (MAX_HEADER, MAX_ARRAYS)
    with pytest.raises(NonsenseError):
        sizes(header.to_bytes(4, "little") + arrays.to_bytes(8, "little"))


def test_work_of_clients_that_left_is_dropped(strict: Server) -> None:
    body = QUERY.encode()
    start = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a-token-of-tests\r\n"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", strict.port)) as connection:
            connection.sendall(start + b"Content-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(PAGE) + PAGE)
    with socket.create_connection(("127.0.0.1", strict.port)) as connection:
        connection.sendall(start + b"Content-Length: %d\r\n\r\n" % (2 * len(body)) + body)
    time.sleep(0.5)
    assert strict.post("/embed", QUERY, **TOKEN).status == 200
    metrics = strict.get("/metrics", **TOKEN).body.decode()
    assert "cembed_in_flight 0.0" in metrics
    left = next(line for line in metrics.splitlines() if line.startswith("cembed_left_total"))
    assert float(left.split()[1]) >= 1


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def test_a_worker_that_dies_is_replaced(strict: Server) -> None:
    for worker in children(strict.process.pid):
        os.kill(worker, signal.SIGKILL)
    statuses = []
    for _ in range(5):
        statuses.append(strict.post("/embed", QUERY, **TOKEN).status)
        time.sleep(0.1)
    assert statuses[-1] == 200
    assert set(statuses) <= {200, 503}


def test_workers_are_started_until_they_can_be(tmp_path: Path) -> None:
    """Nobody has to start the server again, once what kept them from it is over."""
    bundle = Path(shutil.copytree(SAMPLE, tmp_path / "bundle"))
    with Server(tmp_path / "log", bundle) as server:
        bundle.rename(tmp_path / "away")
        (worker,) = children(server.process.pid)
        os.kill(worker, signal.SIGKILL)
        end = time.monotonic() + 120
        while (answer := server.post("/embed", QUERY)).status == 200:
            assert time.monotonic() < end
        assert answer.status == 503
        (tmp_path / "away").rename(bundle)
        while (answer := server.post("/embed", QUERY)).status != 200:
            assert answer.status == 503
            assert time.monotonic() < end, server.log.read_text()
            time.sleep(0.2)
    assert server.log.read_text().count("a worker cannot be started: ") >= 1


def test_sigterm_waits_for_what_was_begun(tmp_path: Path) -> None:
    with Server(tmp_path / "log", worker={"prepack": False}) as server, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.post, "/embed", PAGE) for _ in range(8)]
        time.sleep(0.15)
        server.process.send_signal(signal.SIGTERM)
        statuses = [answer.result().status for answer in asked if not isinstance(answer.exception(), OSError)]
        workers = children(server.process.pid)
        server.process.wait(30)
    assert statuses
    assert set(statuses) == {200}
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]


def test_every_page_that_was_answered_is_there_after_a_kill(tmp_path: Path) -> None:
    """Kill -9 while pages are added, again and again."""
    answered = set[str]()
    for turn in range(ROUNDS):
        with Server(tmp_path / "log", index=tmp_path / "shelf", worker={"prepack": False}) as server:
            if turn:
                assert server.get("/search?q=x&top=1").json["total"] >= len(answered)

            def add(number: int, turn: int = turn, server: Server = server) -> str | None:
                name = f"{turn}-{number}.jpg"
                page = Image.open(sample_pages(1)[0]).convert("RGB")
                page.putpixel((number, turn), (1, 2, 3))
                file = io.BytesIO()
                page.save(file, "PNG")
                with contextlib.suppress(OSError, ValueError):
                    return name if server.post(f"/pages?name={name}", file.getvalue()).status == 200 else None
                return None

            with ThreadPoolExecutor(3) as pool:
                names = [pool.submit(add, number) for number in range(60)]
                if turn == 0:
                    names[0].result(60)  # however slow the machine is
                time.sleep(0.3 + 0.1 * (turn % 7))
                server.process.kill()
                answered |= {name for name in (done.result() for done in names) if name}
    assert answered
    with Index.open(tmp_path / "shelf") as index:
        assert answered <= {page.source for page in index.find()}


def test_two_workers_share_their_weights(tmp_path: Path, shown: list[Any]) -> None:
    """They are mapped, and give the vectors of an embedder whose weights are."""
    with Server(tmp_path / "log", workers=2, worker={"prepack": None}) as server, ThreadPoolExecutor(8) as pool:
        workers = children(server.process.pid)
        assert len(workers) == 2
        answers = list(pool.map(lambda _: server.post("/embed", PAGE), range(12)))
        assert {answer.status for answer in answers} == {200}
        assert len({answer.body for answer in answers}) == 1
        vectors = np.frombuffer(answers[0].body, "<f4").reshape(-1, 256)
        mapped = Embedder.load(SAMPLE, prepack=None)
        assert (vectors * mapped.embed_images(shown[:1])[0]).sum(axis=1).min() > 0.9999
        for worker in workers:
            maps = Path(f"/proc/{worker}/maps").read_text()
            assert "/text.data" in maps
            assert "/vision.data" in maps
        os.kill(workers[0], signal.SIGKILL)  # the other one goes on meanwhile
        assert server.post("/embed", QUERY).status == 200


def test_spans_where_opentelemetry_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its middleware is put around all of the server."""
    from types import ModuleType

    from cembed.serve import app

    package = ModuleType("opentelemetry.instrumentation.asgi")
    package.OpenTelemetryMiddleware = lambda inner: ("traced", inner)  # type: ignore[attr-defined]
    for name in ("opentelemetry", "opentelemetry.instrumentation"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert app.traced("server") == ("traced", "server")  # type: ignore[comparison-overlap, arg-type]
    monkeypatch.setitem(sys.modules, package.__name__, None)
    assert app.traced("server") == "server"  # type: ignore[comparison-overlap, arg-type]


# What is refused before there is a server.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "--token-file"),
        (["--token-file", "short"], "at least 16"),
        (["--token-file", "none"], "cannot be read"),
        (["--read-only"], "--index"),
        (["--index", "elsewhere", "--read-only"], "elsewhere"),
        (["--num-vectors", "4", "--dim", "9999"], "dim"),
        (["--port", "PORT"], "cannot listen"),
    ],
)
def test_what_cannot_be_served_is_one_line(tmp_path: Path, server: Server, arguments: list[str], says: str) -> None:
    (tmp_path / "short").write_text("abc")
    given = [str(server.port) if argument == "PORT" else argument for argument in arguments]
    port = [] if "--port" in given else ["--port", "0"]
    command = [sys.executable, "-m", "cembed", "serve", str(SAMPLE), *port, *given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def fetch(url: str, limit: int = MIB, seconds: float = 5.0, hosts: tuple[str, ...] = ("127.0.0.1",)) -> bytes:
    """As the server does it."""
    fetcher = Fetcher(hosts, limit, seconds)
    (file,) = asyncio.run(fetcher([fetcher.url(url, "input")], lambda size: None))
    return file.data


def test_urls_are_fetched_from_named_hosts_only(server: Server) -> None:
    picture = fetch(f"{server.url}/pages/0/thumbnail")
    assert picture == server.get("/pages/0/thumbnail").body
    for url in (
        server.url.replace("127.0.0.1", "localhost"),
        "http://[",
        f"{server.url}/nowhere",
        "http://127.0.0.1:1/",
        "http://127.0.0.1:99999/",
        f"http://x:80@127.0.0.1:{server.port}/",
        f"{server.url}/a b",
        f"{server.url}/a\r\nX: y",
        f"{server.url}/\u00e9",
    ):
        with pytest.raises(RefusalError) as refused:
            fetch(url)
        assert refused.value.status == 400
    with pytest.raises(RefusalError, match="more than 10 bytes"):
        fetch(f"{server.url}/pages/0/thumbnail", 10)


@contextlib.contextmanager
def site(answer: bytes, drip: bytes = b"", pause: float = 0.1) -> Iterator[tuple[str, list[bytes]]]:
    """A URL of 127.0.0.1 with this answer, after which `drip` comes for ever; and the requests that were seen."""
    seen = list[bytes]()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            seen.append(self.request.recv(1 << 16))
            with contextlib.suppress(OSError):
                self.request.sendall(answer)
                while drip:
                    self.request.sendall(drip)
                    time.sleep(pause)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}/page.jpg", seen
        listening.shutdown()


OK = b"HTTP/1.1 200 OK\r\n"


def test_a_redirect_is_not_followed_and_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = "HTTP/1.1 302 Found\r\nLocation: {}\r\n\r\n"
    with site(OK + b"\r\nno") as (other, seen), site(moved.format(other).encode()) as (url, asked):
        with pytest.raises(RefusalError, match="status 302"):
            fetch(url)
        assert (len(asked), seen) == (1, [])
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
            monkeypatch.setenv(name, url)
        assert fetch(other) == b"no"
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (OK + b"Content-Length: 3\r\n\r\nabc", b"abc"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", b"abc"),
        (OK + b"\r\nabc", b"abc"),
        (OK + b"Content-Length: 4\r\n\r\nabc", None),
        (OK + b"\r\n", None),
        (b"no HTTP", None),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", None),
        (b"", None),
    ],
)
def test_answers_of_urls(answer: bytes, body: bytes | None) -> None:
    with site(answer) as (url, _):
        if body is not None:
            assert fetch(url) == body
        else:
            with pytest.raises(RefusalError, match="gave no picture"):
                fetch(url)


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_url_that_drips_is_given_up(start: bytes) -> None:
    """In its lines as in its body."""
    with site(start, b"x") as (url, seen):
        begun = time.monotonic()
        with pytest.raises(RefusalError, match="longer than 1 s"):
            fetch(url, seconds=1.0)
        assert time.monotonic() - begun < 10
        assert len(seen) == 1


def test_the_server_answers_while_urls_drip(tmp_path: Path) -> None:
    limits = {"inputs": 40, "body": MIB, "bodies": 2 * MIB, "fetch": 3.0}
    with (
        site(OK + b"\r\n", b"x") as (url, seen),
        site(OK + b"\r\n", b"x" * (1 << 16), 0.0) as (flood, _),
        Server(tmp_path / "log", url_hosts=["127.0.0.1"], limits=limits, worker={"prepack": False}) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        documents = [pool.submit(server.post, "/rerank", {"query": "x", "documents": [url] * 40}) for _ in range(2)]
        refused = [answer.result() for answer in documents]
        assert {(answer.status, answer.message) for answer in refused} == {(400, "41 inputs: send 40 at most")}
        assert seen == []  # there are too many
        asked = pool.submit(server.post, "/rerank", {"query": "x", "documents": [url] * 20})
        while len(seen) < 8:
            time.sleep(0.05)
        assert server.get("/health/live").status == 200
        assert not asked.done()
        large = server.post("/pooling", {"input": [flood] * 3, "input_type": "document"})
        assert (large.status, "more than" in large.message) == (400, True)
        odd = server.post("/pooling", {"input": url.replace("127", "x:80@127"), "input_type": "document"})
        assert (odd.status, "user" in odd.message) == (400, True)
        answer = asked.result()
        assert (answer.status, "longer than 3 s" in answer.message) == (400, True)
        assert "Traceback" not in server.log.read_text()


def closed(connection: socket.socket) -> bool:
    """Whether the server ends it before the time of the socket is over; what it sends is passed over."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    ("size", "headers", "status"), [(MIB, {}, b"401"), (2 * MIB, TOKEN, b"413"), (10, {**TOKEN, "X": "y"}, b"408")]
)
def test_a_connection_ends_whose_body_nobody_waits_for(
    strict: Server, size: int, headers: dict[str, str], status: bytes
) -> None:
    connection, line = unfinished(strict, "/embed", size, **headers)
    with connection:
        assert status in line
        connection.sendall(b"x")
        assert closed(connection)


def test_a_connection_ends_that_was_refused_before_its_body(tmp_path: Path) -> None:
    """By the short way, where no more requests may wait: a worker that is stopped holds those that do."""
    limits = {"queue": 1, "header_time": 1, "body_time": 2.0}
    with Server(tmp_path / "log", limits=limits, worker={"prepack": False}) as server, ThreadPoolExecutor(40) as pool:
        (worker,) = children(server.process.pid)
        os.kill(worker, signal.SIGSTOP)
        waiting = [pool.submit(server.post, "/embed", QUERY) for _ in range(33)]
        end = time.monotonic() + 30
        line = b""
        while b" 429 " not in line:
            assert time.monotonic() < end
            connection, line = unfinished(server, "/embed", MIB)
            with connection:
                connection.sendall(b"x")
                assert closed(connection)
        again = server.connect(10)
        for _ in range(3):  # who sends all of a body may go on
            again.request("POST", "/embed", b"x" * (200 << 10))
            answer = again.getresponse()
            assert (answer.status, bool(answer.read())) == (429, True)
        os.kill(worker, signal.SIGCONT)
        assert {answer.result().status for answer in waiting} == {200}


def test_a_connection_ends_whose_answers_are_not_read(tmp_path: Path) -> None:
    limits = {"body_time": 1.0, "header_time": 1}
    with Server(tmp_path / "log", limits=limits, worker={"prepack": False}) as server:
        files = Path(f"/proc/{server.process.pid}/fd")
        before = len(list(files.iterdir()))
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.settimeout(1)
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    connection.sendall(b"GET /static/page.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    time.sleep(0.003)
            end = time.monotonic() + 30
            while len(list(files.iterdir())) > before:
                assert time.monotonic() < end
                time.sleep(0.1)


def test_a_job_for_a_worker_whose_pipe_was_closed_is_lost_not_a_failure() -> None:
    """As uvloop says it, between the end of a process and the news of it."""

    class Closed:
        returncode = None

        def __init__(self) -> None:
            self.stdin = self

        def write(self, data: bytes) -> None:
            raise RuntimeError("unable to perform operation on <WriteUnixTransport closed=True>; the handler is closed")

        def kill(self) -> None:
            raise ProcessLookupError

    async def lost() -> bool:
        worker = Worker(cast("Any", None))
        worker._process = cast("Any", Closed())
        worker._reader = asyncio.create_task(asyncio.sleep(60))
        with pytest.raises(LostError):
            await worker.submit({"text": "x"})
        return not worker.alive and worker.load == 0

    assert asyncio.run(lost())

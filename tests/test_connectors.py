"""Pages go into engines that run here, are found there as MaxSim finds them, and come back as they were."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from serving import PAGES, ROOT, SAMPLE, load_sample
from test_cli import Outcome, cembed

from cembed.runtime import VectorFile, maxsim
from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.index.new_pages import NewPage, page_content
from cembed.runtime.scoring.storage import STORAGE
from cembed.scale.connectors import TARGETS
from cembed.scale.connectors.into_index import IntoIndex
from cembed.scale.connectors.pgvector import FUNCTION
from cembed.scale.connectors.points import Point
from cembed.scale.connectors.sources import IndexRows, PartRows, rows_of_index
from cembed.scale.connectors.target import MIB, Place, Target, TargetRows, connect
from cembed.scale.connectors.upload import Upload
from cembed.scale.parts import Parts, open_store
from cembed.scale.rows import Row, RowSchema
from cembed.signals import Stopped

sys.path.insert(0, str(ROOT / "bench"))
import engines

FLOATS = ("f32", "f16")
LEVELS = next(name for name, storage in STORAGE.items() if storage.has_scale)
SIGNS = next(name for name, storage in STORAGE.items() if storage.signs)
ENGINES = ("qdrant", "edge", "lance", "pgvector")
NOWHERE = "http://127.0.0.1:1"
RUN = r"<!-- run by tests/test_connectors.py: (\w+) -->\n```\w+\n(.*?)```"
Made = Callable[..., Target]


# A page of the samples, and engines.


@pytest.fixture(scope="module")
def sample() -> VectorFile:
    return VectorFile.load(ROOT / "samples" / "pages" / "sample.npz")


def fill(path: Path, file: VectorFile, storage: str) -> IndexRows:
    """An index of the sample pages, with everything that is told of a page."""
    with Index.create(path, dim=file.vectors.shape[1], bundle=file.bundle, storage=[storage]) as index:
        index.add((new_page(i, place, vectors) for i, (place, vectors) in enumerate(of(file))), bundle=file.bundle)
    return IndexRows(Index.open(path))


def of(file: VectorFile) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    return zip(file.paths, file.documents(), strict=True)


def new_page(i: int, path: str, vectors: np.ndarray[Any, Any]) -> NewPage:
    return NewPage(
        id=f"{path}#1" if i % 7 else f"of its own {i}",
        vectors=vectors,
        source=path,
        page=1,
        metadata={"year": 1990 + i, "by": {"name": "Zoë", "tags": [1, 2.5, None, True]}} if i % 2 else {},
        content=page_content(i.to_bytes(32, "big"), 1, "[]"),
        warning="a picture is missing" if i % 5 == 0 else None,
        folder="/scans" if i % 3 else None,
    )


@pytest.fixture(scope="module")
def pages(sample: VectorFile, tmp_path_factory: pytest.TempPathFactory) -> IndexRows:
    return fill(tmp_path_factory.mktemp("index") / "f32", sample, "f32")


@pytest.fixture(scope="module")
def queries() -> list[np.ndarray[Any, Any]]:
    lines = (PAGES.parent / "queries.jsonl").read_text().splitlines()[:8]
    return load_sample().embed_queries([json.loads(line)["text"] for line in lines])


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The connection string of a PostgreSQL that runs here."""
    for name in ("pg0", "psycopg"):
        pytest.importorskip(name)
    with contextlib.ExitStack() as stack:
        try:
            dsn = stack.enter_context(engines.postgres())
        except (RuntimeError, OSError) as error:
            pytest.skip(str(error))
        yield dsn


@pytest.fixture
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Made]:
    """Makes targets of an engine, each time at the same place."""
    with contextlib.ExitStack() as stack:

        def make(name: str, schema: RowSchema, collection: str = "pages", batch_bytes: int = 32 * MIB) -> Target:
            pytest.importorskip(
                {"edge": "qdrant_edge", "qdrant": "qdrant_client", "lance": "lancedb"}.get(name, "numpy")
            )
            where = request.getfixturevalue("postgres") if name == "pgvector" else str(tmp_path / name)
            place = Place(where, schema, f"{collection}_{tmp_path.name}", batch_bytes)
            made = engines.edge(place) if name == "edge" else connect(name, place)
            return stack.enter_context(contextlib.closing(made))

        yield make


def stored(pages: IndexRows, storage: str) -> RowSchema:
    return replace(pages.schema, storage=storage)


def send(source: Any, target: Target) -> Upload:
    run = Upload(source, target)
    run.run(lambda _: None, lambda _: None)
    return run


def by_id(rows: Iterator[Row]) -> dict[str, tuple[Any, ...]]:
    """All that a row tells, by the id of the page."""
    return {
        row.page_id: (
            row.vectors.tobytes() if row.vectors is not None else None,
            row.path,
            row.page,
            row.sha256,
            row.warning,
            row.folder,
            dict(row.metadata or {}),
        )
        for row in rows
    }


# What engines find.


@pytest.mark.parametrize("storage", FLOATS)
@pytest.mark.parametrize("name", ENGINES)
def test_the_best_ten_are_those_of_maxsim(
    pages: IndexRows, queries: list[Any], engine: Made, name: str, storage: str
) -> None:
    target = engine(name, stored(pages, storage))
    run = send(pages, target)
    assert (run.sent, run.there, run.verified, target.count()) == (60, 0, 20, 60)
    points = [target.point(row) for row in pages.rows()]
    exact = maxsim(queries, [point.vectors for point in points])
    for query, scores in zip(queries, exact, strict=True):
        best = np.argsort(-scores, kind="stable")[:10]
        found = target.search(query, 10)
        assert found is not None
        assert list(found) == [points[i].id for i in best]
        assert list(found.values()) == pytest.approx(scores[best].tolist(), abs=target.tolerance * len(query))


@pytest.mark.parametrize("name", ["qdrant", "edge"])
def test_levels_find_nearly_the_same(pages: IndexRows, queries: list[Any], engine: Made, name: str) -> None:
    target = engine(name, stored(pages, LEVELS))
    assert send(pages, target).verified == 20
    points = [target.point(row) for row in pages.rows()]
    exact = maxsim(queries, [row.vectors for row in pages.rows()])
    best = [{points[i].id for i in np.argsort(-scores)[:10]} for scores in exact]
    found = [set(target.search(query, 10) or {}) for query in queries]
    assert np.mean([len(a & b) for a, b in zip(best, found, strict=True)]) >= 9
    back = {row.page_id: row.vectors for row in target.rows()}
    assert all((back[point.row.page_id] == point.vectors).all() for point in points)


# There and back.


@pytest.mark.parametrize("storage", FLOATS)
@pytest.mark.parametrize("name", [*ENGINES, "parquet"])
def test_pages_come_back_as_they_were(
    sample: VectorFile, engine: Made, tmp_path: Path, name: str, storage: str
) -> None:
    source = fill(tmp_path / "index", sample, storage)
    if name == "parquet":
        target = connect(name, Place(str(tmp_path / "rows.parquet"), source.schema))
    else:
        target = engine(name, source.schema)
    send(source, target)
    back = PartRows.open(str(tmp_path / "rows.parquet")) if name == "parquet" else TargetRows(target)
    with Index.create(tmp_path / "back", dim=256, bundle=sample.bundle, storage=[storage]) as index:
        added = IntoIndex(back, index).run(back.survey(), lambda: None)
        again = IntoIndex(back, index).run(back.survey(), lambda: None)
    assert (added.added, added.skipped, again.added, again.changed, again.skipped) == (60, 0, 0, 0, 60)
    there = IndexRows(Index.open(tmp_path / "back"))
    assert by_id(there.rows()) == by_id(source.rows())


def test_rows_of_an_index(pages: IndexRows, tmp_path: Path, sample: VectorFile) -> None:
    schema, rows = rows_of_index(pages.index)
    assert (schema.dim, schema.bundle, schema.storage, schema.of_index) == (256, sample.bundle, "f32", True)
    assert by_id(rows) == by_id(pages.rows())
    assert pages.survey().pages == 60
    with Index.create(tmp_path / "signs", dim=256, bundle="b", storage=[SIGNS]) as index:
        assert rows_of_index(index)[0].storage == "f32"
        assert IndexRows(index).survey().pages == 0
        index.add([NewPage("a", sample.documents()[0]), NewPage("b", sample.documents()[1][:3])], bundle="b")
        first, second = IndexRows(index).rows()
        assert IndexRows(index).survey().largest_page == "a"
    assert first.sha256 != second.sha256  # without a content, that of the vectors
    assert len(bytes.fromhex(first.sha256)) == 16


# Runs that go on.


class EndedError(Exception):
    pass


def ended_early(target: Target, after: int) -> Target:
    """A target that fails when it is sent one batch more."""
    sent, sending = [0], target.send

    def send(points: Any) -> None:
        if sent[0] == after:
            raise EndedError
        sent[0] += 1
        sending(points)

    target.send = send  # type: ignore[method-assign]
    return target


@pytest.mark.parametrize("name", ENGINES)
def test_an_upload_that_was_ended_goes_on(pages: IndexRows, engine: Made, name: str) -> None:
    target = ended_early(engine(name, pages.schema, batch_bytes=MIB // 2), after=2)
    first = Upload(pages, target)
    with pytest.raises(EndedError):
        first.run(lambda _: None, lambda _: None)
    assert 0 < first.sent == target.count() < 60
    del target.__dict__["send"]
    second = send(pages, target)
    assert (second.there, second.sent, target.count()) == (first.sent, 60 - first.sent, 60)
    assert (send(pages, target).there, target.count()) == (60, 60)


def test_a_signal_leaves_whole_batches(pages: IndexRows, engine: Made) -> None:
    target = engine("lance", pages.schema, batch_bytes=MIB // 4)

    def stop(pages: int) -> None:
        raise Stopped(signal.SIGINT)

    run = Upload(pages, target)
    with pytest.raises(Stopped):
        run.run(lambda _: None, stop)
    assert run.sent == target.count()
    assert 0 < run.sent < 60
    assert send(pages, target).there == run.sent


@pytest.mark.parametrize("name", ENGINES)
def test_a_page_that_changed_takes_the_place_of_the_old_one(
    sample: VectorFile, engine: Made, tmp_path: Path, name: str
) -> None:
    source = fill(tmp_path / "index", sample, "f32")
    target = engine(name, source.schema)
    send(source, target)
    documents = sample.documents()
    new = [new_page(1, sample.paths[1], documents[40]), new_page(2, sample.paths[2], documents[2])]
    new[0], new[1] = replace(new[0], content=b"another"), replace(new[1], metadata={"year": 2026})
    with Index.open(tmp_path / "index", write=True) as index:
        index.add(new, bundle=sample.bundle)
    source.index.refresh()
    run = send(source, target)
    assert (run.sent, run.there, target.count()) == (2, 58, 60)
    assert by_id(target.rows()) == by_id(source.rows())


def test_the_last_row_of_a_page_counts(sample: VectorFile, tmp_path: Path) -> None:
    """Also where it is what the page was once before."""
    place, vectors = str(tmp_path / "rows.parquet"), sample.documents()[0]
    with Index.create(tmp_path / "index", dim=256, bundle="b", storage=["f32"]) as index:
        for sent, year in ((1, 2024), (1, 2025), (0, 2025), (1, 2024)):
            index.add([NewPage("a", vectors, "a", metadata={"year": year}, content=b"c")], bundle="b")
            run = send(IndexRows(index), connect("parquet", Place(place, IndexRows(index).schema)))
            assert (run.sent, run.there) == (sent, 1 - sent)
    rows = PartRows.open(place)
    assert rows.survey().replaced.tolist() == [0, 1]
    with Index.create(tmp_path / "back", dim=256, bundle="b") as index:
        IntoIndex(rows, index).run(rows.survey(), lambda: None)
        assert index.info("a").metadata == {"year": 2024}


# What is refused, before anything is sent.


def large_page(tmp_path: Path, rows: int) -> IndexRows:
    vectors = np.zeros((rows, 256), np.float32)
    vectors[:, 0] = 1
    with Index.create(tmp_path / "large", dim=256, bundle="b", storage=["f16"]) as index:
        index.add([NewPage("small", vectors[:2]), NewPage("large.pdf#1", vectors)], bundle="b")
    return IndexRows(Index.open(tmp_path / "large"))


@pytest.mark.parametrize(
    ("rows", "batch", "message"),
    [
        (4097, 64, r"page large.pdf#1 has 4097 vectors of 256, 1,048,832 numbers: Qdrant takes at most 1,048,576"),
        (1000, 4, r"page large.pdf#1 has 1000 vectors of 256, up to 6 MiB in a request, and --batch allows 4"),
    ],
)
def test_points_that_are_too_large(tmp_path: Path, engine: Made, rows: int, batch: int, message: str) -> None:
    source = large_page(tmp_path, rows)
    target = engine("qdrant", source.schema, batch_bytes=batch * MIB)
    with pytest.raises(CembedError, match=message):
        send(source, target)
    assert not target._client.collection_exists(target.place.collection)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "edge"])
def test_what_is_there_must_fit(pages: IndexRows, sample: VectorFile, engine: Made, name: str) -> None:
    def look(schema: RowSchema) -> None:
        with contextlib.closing(engine(name, schema)) as target:
            target.open(pages.survey())

    with contextlib.closing(engine(name, pages.schema)) as target:
        send(pages, target)
    with pytest.raises(CembedError, match=r"collection 'pages_.*' with vectors.*256.* have .*128.* choose another"):
        look(replace(pages.schema, dim=128))
    with pytest.raises(CembedError, match=r"with .*(float16|halffloat|halfvec)"):
        look(stored(pages, "f16"))
    with pytest.raises(CembedError, match=f"with pages of bundle {sample.bundle}, these pages have another"):
        look(replace(pages.schema, bundle="another"))
    look(pages.schema)


def test_lengths_that_are_not_one(tmp_path: Path, sample: VectorFile, engine: Made) -> None:
    with Index.create(tmp_path / "long", dim=256, bundle="b", storage=["f32"]) as index:
        index.add([NewPage("long", sample.documents()[0] * 2)], bundle="b")
    source = IndexRows(Index.open(tmp_path / "long"))
    for name, storage in (("lance", "f32"), ("qdrant", LEVELS), ("vespa-json", LEVELS)):
        with pytest.raises(CembedError, match=r"page long has a vector of length 2\.000: .* compares directions only"):
            send(source, engine(name, replace(source.schema, storage=storage)))


def test_an_engine_that_scores_otherwise(pages: IndexRows, engine: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    target = engine("qdrant", pages.schema)
    monkeypatch.setattr(target, "exact", lambda query, points: np.zeros(len(points)))
    with pytest.raises(CembedError, match=r"Qdrant gives page .* a score of .* MaxSim is 0\.000000"):
        send(pages, target)


# Requests of Qdrant's client.


@dataclass
class Requests:
    """What a server was asked."""

    url: str
    sizes: list[int]
    keys: set[str | None]


@pytest.fixture
def server() -> Iterator[Requests]:
    """Answers as Qdrant does, and keeps nothing."""
    seen = Requests("", [], set())

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.keys.add(self.headers.get("api-key"))
            result: Any = True
            if self.path.endswith("/exists"):
                result = {"exists": False}
            elif "/points" in self.path:
                seen.sizes += [len(body)] if self.command == "PUT" else []
                last = self.path.split("?")[0].rpartition("/")[2]
                result = {"count": {"count": 60}, "query": {"points": []}}.get(last, {"status": "completed"})
            text = json.dumps({"result": result, "status": "ok", "time": 0}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST = answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    seen.url = f"http://127.0.0.1:{listening.server_port}"
    thread = Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield seen
    listening.shutdown()
    listening.server_close()


def test_requests_keep_their_limit(pages: IndexRows, server: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("qdrant_client")
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    with pytest.warns(UserWarning, match="insecure"):
        target = connect("qdrant", Place(server.url, pages.schema, batch_bytes=2 * MIB))
    with contextlib.closing(target), pytest.raises(CembedError, match="a score of nan"):
        send(pages, target)
    assert max(server.sizes) <= 2 * MIB
    assert max(server.sizes) > MIB
    assert len(server.sizes) >= 6
    assert server.keys == {"secret"}


# What the document says.


@pytest.mark.parametrize("name", ["qdrant", "lance", "pgvector"])
def test_the_python_of_the_document_runs(
    pages: IndexRows, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip({"qdrant": "qdrant_client", "lance": "lancedb"}.get(name, "psycopg"))
    monkeypatch.chdir(tmp_path)
    dsn = request.getfixturevalue("postgres") if name == "pgvector" else None
    with contextlib.closing(connect(name, Place(dsn or name, pages.schema))) as target:
        send(pages, target)
    blocks = dict(re.findall(RUN, (ROOT / "docs" / "connectors.md").read_text(), re.DOTALL))
    embedder = load_sample()
    names: dict[str, Any] = {"embedder": embedder, "dsn": dsn}
    exec(blocks[name], names)
    scores = maxsim([embedder.embed_query("warranty period")], [row.vectors for row in pages.rows()])[0]
    ids = [row.page_id for row in pages.rows()]
    best = np.argsort(-scores, kind="stable")[:10]
    assert [page for page, _ in names["found"]] == [ids[i] for i in best]
    assert [score for _, score in names["found"]] == pytest.approx(scores[best].tolist(), abs=1e-4)
    if name == "lance":
        exec(blocks["back"], names)
        assert names["added"].added == 60
        assert by_id(IndexRows(Index.open("again")).rows()) == by_id(pages.rows())
    if name == "pgvector":
        assert blocks["function"] == FUNCTION.format(cell="vector").lstrip("\n")


@pytest.mark.parametrize("name", ["qdrant", "lance", "pgvector", "vespa-json"])
def test_nothing_to_read_back(pages: IndexRows, engine: Made, tmp_path: Path, name: str) -> None:
    place = engine(name, pages.schema).place
    missing = replace(place, collection="missing", place=str(tmp_path / "there") if name == "qdrant" else place.place)
    with pytest.raises(CembedError, match=r"has no 'missing'|cannot be read back"), TargetRows.open(name, missing):
        pass


# Files for engines that are not here.


def test_lines_for_vespa(pages: IndexRows, tmp_path: Path) -> None:
    send(pages, connect("vespa-json", Place(str(tmp_path), pages.schema, batch_bytes=MIB)))
    files = sorted(tmp_path.glob("pages-*.jsonl"))
    assert len(files) > 6
    assert max(file.stat().st_size for file in files) <= MIB
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    schema = (tmp_path / "pages.sd").read_text()
    assert "field embedding type tensor<float>(patch{}, v[256])" in schema
    assert schema.count("{") == schema.count("}")
    declared = set(re.findall(r"field (\w+) type", schema))
    for row, put in zip(pages.rows(), found, strict=True):
        assert put.keys() == {"put", "fields"}
        assert re.fullmatch(r"id:pages:pages::[0-9a-f-]{36}", put["put"])
        assert put["fields"].keys() <= declared
        blocks = put["fields"]["embedding"]["blocks"]
        assert list(blocks) == [str(i) for i in range(32)]
        assert (np.array(list(blocks.values()), np.float32) == row.vectors).all()
        assert json.loads(put["fields"]["metadata"]) == row.metadata
    assert len({put["put"] for put in found}) == 60


def test_lines_for_elasticsearch(pages: IndexRows, tmp_path: Path) -> None:
    for _ in range(2):  # the second time in the place of the first
        send(pages, connect("elastic-json", Place(str(tmp_path), stored(pages, LEVELS), batch_bytes=MIB)))
    mapping = json.loads((tmp_path / "pages.mapping.json").read_text())["mappings"]["properties"]
    assert mapping["embedding"] == {"type": "rank_vectors", "element_type": "byte", "dims": 256}
    lines = [json.loads(line) for file in sorted(tmp_path.glob("*.jsonl")) for line in file.read_text().splitlines()]
    assert len(lines) == 120
    for row, action, source in zip(pages.rows(), lines[::2], lines[1::2], strict=True):
        assert action.keys() == {"index"}
        assert action["index"].keys() == {"_index", "_id"}
        assert source.keys() <= mapping.keys()
        assert row.vectors is not None
        assert abs(np.array(source["embedding"]) / 127 - row.vectors).max() <= 0.5 / 127 + 1e-6
        assert source["path"] == row.path


# The command line.


@pytest.fixture
def shelf(tmp_path: Path, sample: VectorFile) -> Path:
    fill(tmp_path / "shelf", sample, "f16")
    return tmp_path / "shelf"


def upload(source: object, to: str, out: object, *more: object) -> Outcome:
    return cembed("upload", source, "--to", to, "--out", out, *more)


def test_an_index_becomes_parts_and_an_index_again(shelf: Path, tmp_path: Path) -> None:
    rows, back = tmp_path / "rows.parquet", tmp_path / "back"
    for told in ("60 pages sent, 0 were there", "0 pages sent, 60 were there"):
        outcome = cembed("index", "export", shelf, "--to", "parquet", "--out", rows)
        assert (outcome.status, outcome.err, outcome.out) == (0, "", f"{rows}: {told}\n")
    for told in ("60 pages added, 0 were there", "0 pages added, 60 were there"):
        outcome = cembed("index", "add", back, "--from-parquet", rows, "--storage", "f16", "--bundle", SAMPLE)
        assert (outcome.status, outcome.err) == (0, "")
        assert outcome.out.startswith(f"{back}: {told}; 60 pages, ")
    assert by_id(IndexRows(Index.open(back)).rows()) == by_id(IndexRows(Index.open(shelf)).rows())
    outcome = cembed("index", "add", back, "--from-parquet", rows, "--metadata", "by=us")
    assert "0 pages added, 0 were there, 60 with other metadata" in outcome.out
    assert all(page.metadata["by"] == "us" for page in Index.open(back).pages())


def test_rows_of_embed_become_pages(sample: VectorFile, tmp_path: Path) -> None:
    """Of a file that was changed between two runs the last rows count; rows with errors are named."""
    rows, (first, second, third) = tmp_path / "rows.lance", sample.documents()[:3]
    pytest.importorskip("lance")
    with Parts(open_store(rows), RowSchema(256, sample.bundle, "[1]")) as parts:
        for row in (
            Row("a.pdf", 1, "aa" * 32, first),
            Row("b.pdf", None, "", error="it is empty"),
            Row("a.pdf", 1, "bb" * 32, second, warning="a font is missing"),
            Row("c.pdf", 2, "cc" * 32, third),
            Row("a.pdf", 2, "bb" * 32, error="damaged"),
        ):
            parts.add(row)
    index = tmp_path / "index"
    for told in ("2 pages added, 0 were there", "0 pages added, 2 were there"):
        outcome = cembed("index", "add", index, "--from-parquet", rows, "--storage", "f32")
        assert outcome.status == 3
        assert told in outcome.out
        assert outcome.err.splitlines() == ["not added: b.pdf: it is empty", "not added: a.pdf, page 2: damaged"]
    with Index.open(index, write=True) as opened:
        assert opened.knows("a.pdf#1", page_content(b"\xbb" * 32, 1, "[1]"))
        assert (opened.vectors("a.pdf#1") == second).all()
        assert opened.info("a.pdf#1").warning == "a font is missing"
        told = replace(next(iter(opened.pages())), metadata={"year": 1}, folder="/scans")
        opened.add([told], bundle=sample.bundle)
    assert "0 pages added, 2 were there" in cembed("index", "add", index, "--from-parquet", rows).out
    assert Index.open(index).info("a.pdf#1").metadata == {"year": 1}  # what only the index knows stays
    outcome = upload(rows, "lance", tmp_path / "lance")
    assert outcome.status == 3
    assert outcome.err.splitlines()[0] == "not sent: b.pdf: it is empty"
    assert "2 pages sent, 0 were there; 2 pages queried back" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.pdf", "--from-parquet", "rows.parquet"], "has vectors already: leave out PATH a.pdf, or --from-parquet"),
        ([], "there is nothing to add: give PATH, documents to embed, or --from-parquet ROWS"),
        (["a.pdf"], "give --bundle, or --from-parquet in place of PATH"),
        (["--from-parquet", "rows.csv"], "rows.csv: rows are written to a folder named *.parquet or *.lance"),
        (["--from-parquet", "rows.parquet"], "rows.parquet has no rows: give a folder that"),
    ],
)
def test_what_is_added_must_be_clear(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in cembed("index", "add", tmp_path / "index", *arguments).error
    assert not (tmp_path / "index").exists()


def test_rows_of_another_bundle(shelf: Path, tmp_path: Path) -> None:
    with Parts(open_store(tmp_path / "rows.parquet"), RowSchema(256, "other", "")) as parts:
        parts.add(Row("a.pdf", 1, "aa" * 32, np.ones((1, 256), np.float32)))
    error = cembed("index", "add", shelf, "--from-parquet", tmp_path / "rows.parquet").error
    assert "has vectors of bundle" in error
    error = cembed(
        "index", "add", tmp_path / "new", "--from-parquet", tmp_path / "rows.parquet", "--bundle", SAMPLE
    ).error
    assert f"has vectors of bundle other, {SAMPLE} is another: leave out --bundle" in error
    assert len(Index.open(shelf)) == 60


@pytest.mark.parametrize(
    ("to", "more", "message"),
    [
        ("milvus", ["--out", "x"], f"unknown target 'milvus': cembed has {', '.join(TARGETS)}"),
        ("qdrant", [], "qdrant needs a place: give --out URL or folder"),
        ("pgvector", [], "pgvector needs a connection: give --out postgresql://…, or set CEMBED_POSTGRES"),
        ("qdrant", ["--out", NOWHERE], f"Qdrant at {NOWHERE}: "),
        ("qdrant", ["--out", "http://[::1"], "Qdrant at http://[::1: "),
        (
            "pgvector",
            ["--out", "postgresql://me:secret@127.0.0.1:1/x"],
            "PostgreSQL at postgresql://me:…@127.0.0.1:1/x: ",
        ),
        (
            "pgvector",
            ["--out", "host=127.0.0.1 port=1 password=secret"],
            "PostgreSQL at host=127.0.0.1 port=1 password=…: ",
        ),
        ("pgvector", ["--out", "nonsense"], "PostgreSQL at nonsense: missing"),
        (
            "lance",
            ["--out", "x", "--storage", LEVELS],
            f"LanceDB cannot keep {LEVELS}: give --storage with one of f32, f16",
        ),
        (
            "pgvector",
            ["--out", "x", "--storage", LEVELS],
            f"PostgreSQL cannot keep {LEVELS}: give --storage with one of",
        ),
        ("parquet", ["--out", "x", "--storage", SIGNS], f"rows cannot be stored as {SIGNS}"),
        ("parquet", ["--out", "x"], "x: rows are written to a folder named"),
        ("vespa-json", ["--out", "x", "--collection", "my-pages"], "Vespa has no schema called 'my-pages'"),
        ("elastic-json", ["--out", "x", "--collection", "Pages"], "Elasticsearch has no index called 'Pages'"),
    ],
)
def test_mistakes_are_one_line(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CEMBED_POSTGRES", raising=False)
    error = cembed("index", "export", shelf, "--to", to, *more).error
    assert message in error
    assert "secret" not in error
    assert not (tmp_path / "x").exists()


def test_ctrl_c_says_how_far_it_came(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lancedb")
    from cembed.scale.connectors import lance

    sending, out = lance.Connector.send, tmp_path / "vectors"

    def send_and_stop(target: Target, points: Any) -> None:
        sending(target, points)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(lance.Connector, "send", send_and_stop)
        outcome = cembed("index", "export", shelf, "--to", "lance", "--out", out, "--batch", 1)
    assert outcome.status == 130
    found = re.fullmatch(r"interrupted: (\d+) pages sent, 0 were there; the same command goes on\n", outcome.err)
    assert found is not None, outcome.err
    assert 0 < int(found[1]) < 60
    outcome = cembed("index", "export", shelf, "--to", "lance", "--out", out, "--batch", 1)
    assert outcome.out.startswith(
        f"{out}: {60 - int(found[1])} pages sent, {found[1]} were there; 20 pages queried back"
    )


@pytest.mark.parametrize(
    ("to", "package", "extra"),
    [("qdrant", "qdrant_client", "qdrant"), ("lance", "lancedb", "lance"), ("pgvector", "psycopg", "postgres")],
)
def test_a_missing_package(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, to: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = cembed("index", "export", shelf, "--to", to, "--out", tmp_path / "x").error
    assert f"pip install 'cembed[{extra}]'" in error


def test_points_are_the_same_every_time(pages: IndexRows) -> None:
    def made(row: Row) -> Point:
        assert row.vectors is not None
        return Point(row, pages.schema, row.vectors)

    first, again = ([made(row) for row in pages.rows()] for _ in range(2))
    assert [(point.id, point.version) for point in first] == [(point.id, point.version) for point in again]
    changed = [
        replace(row, **more)
        for row in [next(pages.rows())]
        for more in ({"warning": "w"}, {"metadata": {"a": 1}}, {"sha256": "00" * 16})
    ]
    assert len({made(row).version for row in [next(pages.rows()), *changed]}) == 4
    assert {made(row).id for row in changed} == {first[0].id}

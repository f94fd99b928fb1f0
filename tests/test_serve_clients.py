"""Clients as they are released ask the server: samples/clients, schemathesis, Triton's backend."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from serving import ROOT, SAMPLE, Server, load_sample, sample_pages

from cembed.runtime import Bundle, Embedder, maxsim
from cembed.runtime.pages.documents import PageReader, require_pages
from cembed.runtime.writer import write_self_test

CLIENTS = ROOT / "samples" / "clients"
QUERY = "notice about the pension seminar with emma foster"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("clients")
    with Server(folder / "log", index=folder / "shelf", name="sample") as started:
        yield started


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample bundle, with one vector for each input."""
    bundle = tmp_path_factory.mktemp("single") / "bundle"
    shutil.copytree(SAMPLE, bundle)
    manifest = Bundle(bundle).manifest
    one = {side: replace(getattr(manifest, side), num_vectors=1, nested_budgets=()) for side in ("document", "query")}
    write_self_test(bundle, replace(manifest, **one))
    return bundle


@pytest.fixture(scope="module")
def single_server(single: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("single-server") / "log", single) as started:
        yield started


def run(script: str, *arguments: object, package: str | None = None, cwd: Path | None = None) -> str:
    if package is not None and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    program = ["sh"] if script.endswith(".sh") else [sys.executable]
    telemetry = {"HAYSTACK_TELEMETRY_ENABLED": "False", "DO_NOT_TRACK": "1", "OPENAI_API_KEY": "none"}
    command = [*program, str(CLIENTS / script), *map(str, arguments)]
    environment = {**os.environ, **telemetry}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def embedded(count: int) -> list[Any]:
    with PageReader() as reader:
        return [load_sample().embed_image(page.image) for page in require_pages(reader.read(sample_pages(count)))]


def test_openai(server: Server) -> None:
    said = run("openai_client.py", server.url, sample_pages(1)[0], QUERY, package="openai")
    query, page = load_sample().embed_query(QUERY), embedded(1)[0]
    assert said == f"query {query.shape}, page {page.shape}, MaxSim {maxsim([query], [page])[0, 0]:.4f}\n"


def test_cohere(server: Server) -> None:
    pages = sample_pages(4)
    said = run("cohere_client.py", server.url, QUERY, *pages, package="cohere").splitlines()
    scores = maxsim([load_sample().embed_query(QUERY)], embedded(4))[0]
    assert said == [f"{pages[i]} {scores[i]:.4f}" for i in np.argsort(-scores)]


def test_triton(server: Server) -> None:
    said = run("triton_client.py", server.url, sample_pages(1)[0], "sample", package="tritonclient")
    page = embedded(1)[0]
    assert said == f"vectors {page.shape}, rows [{len(page)}], first {page[0, 0]:.6f}\n"


def test_curl(server: Server, tmp_path: Path) -> None:
    said = run("curl.sh", server.url, sample_pages(1)[0], QUERY, cwd=tmp_path).splitlines()
    assert (tmp_path / "page.f32").read_bytes() == embedded(1)[0].tobytes()
    assert (tmp_path / "query.f32").read_bytes() == load_sample().embed_query(QUERY).tobytes()
    assert '"added":1' in said[0]
    assert sample_pages(1)[0].name in said[1]


@pytest.mark.parametrize(
    ("script", "package"),
    [
        ("langchain_client.py", "langchain_openai"),
        ("llama_index_client.py", "llama_index"),
        ("haystack_client.py", "haystack"),
    ],
)
def test_clients_of_one_vector(single: Path, single_server: Server, script: str, package: str) -> None:
    vector = Embedder.load(single).embed_query(QUERY)[0]
    assert run(script, single_server.url, QUERY, package=package) == f"dim {len(vector)}, first {vector[0]:.6f}\n"


def test_cohere_embeds_where_the_bundle_pools(single: Path, single_server: Server) -> None:
    asked = {"input_type": "search_query", "texts": [QUERY], "embedding_types": ["float", "base64"]}
    found = single_server.post("/v2/embed", asked).json
    vector = Embedder.load(single).embed_query(QUERY)[0]
    assert np.array_equal(np.array(found["embeddings"]["float"][0], np.float32), vector)
    assert found["response_type"] == "embeddings_by_type"


def test_schemathesis_finds_nothing(server: Server, tmp_path: Path) -> None:
    """Except that content may be wrong though its schema holds: a string that is no picture."""
    if find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed")
    program = Path(sys.executable).with_name("schemathesis")
    command = [str(program), "run", f"{server.url}/openapi.json", "--exclude-checks", "positive_data_acceptance"]
    limits = ["--max-examples", "15", "--seed", "1", "--phases", "examples,coverage,fuzzing", "--no-color"]
    done = subprocess.run([*command, *limits], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-6000:]


class FakeTriton:
    """What Triton's `triton_python_backend_utils` has, as far as the model asks for it."""

    class TritonError(Exception):
        pass

    class Tensor:
        def __init__(self, name: str, values: Any) -> None:
            self.name, self.values = name, values

        def as_numpy(self) -> Any:
            return self.values

    class InferenceResponse:
        def __init__(self, output_tensors: Any = (), error: Any = None) -> None:
            self.tensors, self.error = {tensor.name: tensor.values for tensor in output_tensors}, error

    @staticmethod
    def get_input_tensor_by_name(request: Mapping[str, Any], name: str) -> Any:
        return FakeTriton.Tensor(name, request[name]) if name in request else None


def test_a_repository_for_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [
        sys.executable,
        "-m",
        "cembed",
        "export-triton",
        str(SAMPLE),
        str(tmp_path / "models"),
        "--name",
        "pages",
    ]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "exists" in again.stderr
    model = tmp_path / "models" / "pages"
    config = (model / "config.pbtxt").read_text()
    assert 'name: "pages"' in config
    assert "dims: [ -1, 256 ]" in config
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", FakeTriton)  # type: ignore[arg-type]
    scope: dict[str, Any] = {}
    exec((model / "1" / "model.py").read_text(), scope)
    backend = scope["TritonPythonModel"]()
    backend.initialize({"model_repository": str(model), "model_version": "1", "model_config": '{"name": "pages"}'})
    try:
        image = np.array([sample_pages(1)[0].read_bytes()], object)
        good, bad, none = backend.execute(
            [{"text": np.array([QUERY.encode()], object), "image": image}, {"image": np.array([b"x"], object)}, {}]
        )
    finally:
        backend.finalize()
    query, page = load_sample().embed_query(QUERY), embedded(1)[0]
    assert np.array_equal(good.tensors["vectors"], np.concatenate([query, page]))
    assert good.tensors["rows"].tolist() == [len(query), len(page)]
    assert "PNG" in str(bad.error)
    assert "give text" in str(none.error)
    assert SimpleNamespace(**good.tensors).rows.dtype == np.int64

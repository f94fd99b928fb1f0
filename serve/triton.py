"""A bundle as a model of NVIDIA's Triton: a repository for its Python backend, with the tensors of `kserve_api`.

It has been run with a stand-in for Triton's own module only.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.embed.embedder import Embedder
from cembed.runtime.errors import CembedError
from cembed.runtime.pages.documents import PageError, PageReader
from cembed.runtime.writer import directory

MODEL = '''"""Written by `cembed export-triton`: Triton's Python backend runs it, where cembed is installed."""

from cembed.serve.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
CONFIG = """name: "{name}"
backend: "python"
max_batch_size: 0
input [
  {{ name: "text" data_type: TYPE_STRING dims: [ -1 ] optional: true }},
  {{ name: "image" data_type: TYPE_STRING dims: [ -1 ] optional: true }}
]
output [
  {{ name: "vectors" data_type: TYPE_FP32 dims: [ -1, {dim} ] }},
  {{ name: "rows" data_type: TYPE_INT64 dims: [ -1 ] }}
]
instance_group [ {{ count: {instances} kind: KIND_CPU }} ]
"""


def write_repository(bundle: Path, out: Path, name: str, instances: int, trusted: Path | None = None) -> Path:
    """A model repository with one model, the bundle copied into it. Gives the model's folder.

    Raises CembedError: no bundle, a damaged one, or the model is there already.
    """
    opened = Bundle(bundle, trusted=trusted)
    for file in opened.manifest.files:
        opened.path(file)  # compares its hash
    model = out / name
    if model.exists():
        raise CembedError(f"{model} exists: choose another repository or --name, or remove it")
    with directory(model) as partial:
        version = partial / "1"
        version.mkdir()
        (version / "model.py").write_text(MODEL)
        shutil.copytree(bundle, version / "bundle")
        config = CONFIG.format(name=name, dim=vector_dim(opened), instances=instances)
        (partial / "config.pbtxt").write_text(config)
    return model


def vector_dim(bundle: Bundle) -> int:
    return bundle.manifest.document.vector_dim(bundle.manifest.dim)


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """`args` are Triton's: where the model is, and on what it runs."""
        import triton_python_backend_utils as triton  # of Triton's own process

        self._triton = triton
        self._embedder = Embedder.load(Path(args["model_repository"]) / args["model_version"] / "bundle")
        self._embedder.prepare("document")
        self._embedder.prepare("query")
        self._reader = PageReader().__enter__()
        self._name = json.loads(args["model_config"])["name"]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request: its vectors, or a line that says what is wrong with it."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            many = [self._embedder.embed_query(as_text(value)) for value in self._values(request, "text")]
            many += [self._page(value) for value in self._values(request, "image")]
            if not many:
                raise CembedError("give text, image or both")
        except CembedError as error:
            return self._triton.InferenceResponse(error=self._triton.TritonError(str(error)))
        rows = np.array([len(vectors) for vectors in many], np.int64)
        tensors = [self._triton.Tensor("vectors", np.concatenate(many)), self._triton.Tensor("rows", rows)]
        return self._triton.InferenceResponse(output_tensors=tensors)

    def _values(self, request: Any, name: str) -> list[bytes]:
        tensor = self._triton.get_input_tensor_by_name(request, name)
        return [] if tensor is None else [bytes(value) for value in tensor.as_numpy().reshape(-1)]

    def _page(self, data: bytes) -> Vectors:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            page, _ = self._reader.page(file.name, 1)
        if isinstance(page, PageError):
            raise CembedError(page.reason)
        return self._embedder.embed_image(page.image)

    def finalize(self) -> None:
        self._reader.__exit__()


def as_text(value: bytes) -> str:
    """Raises CembedError: not UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise CembedError("text is not UTF-8") from None

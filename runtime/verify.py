"""Is this bundle what was exported, and does it compute here what it computed then?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cembed.runtime.bundle import Bundle
from cembed.runtime.embedder import Budget, Embedder
from cembed.runtime.errors import CembedError, Check
from cembed.runtime.manifest import Graph
from cembed.runtime.session import EngineSettings, OrtSession

_ONNX_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


def verify(bundle: Bundle) -> Iterator[Check]:
    """Every check in turn: the hash of each file, the inputs and outputs of each graph, the self-test."""
    for name in bundle.manifest.files:
        yield _attempt(f"sha256 of {name}", partial(_hash, bundle, name))
    for name, graph in bundle.manifest.graphs.items():
        yield _attempt(f"inputs and outputs of {name}", partial(_signature, bundle, name, graph))
    yield _attempt("self-test", partial(_self_test, bundle))


def _attempt(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except CembedError as error:
        return Check(name, False, str(error))


def _hash(bundle: Bundle, name: str) -> str:
    bundle.path(name)
    return f"{bundle.manifest.files[name].size:,} bytes"


def _signature(bundle: Bundle, name: str, graph: Graph) -> str:
    session = OrtSession(bundle.graph_path(name), EngineSettings(prepack=False))
    stated = {t.name: (t.dtype, t.shape) for t in (*graph.inputs, *graph.outputs)}
    found = {n: (_ONNX_TYPES.get(kind, kind), shape) for n, (kind, shape) in session.signature().items()}
    if stated != found:
        different = sorted(n for n in stated.keys() | found.keys() if stated.get(n) != found.get(n))
        raise CembedError(f"the graph and the manifest disagree on {', '.join(different)}")
    return ", ".join(stated)


def _self_test(bundle: Bundle) -> str:
    test = bundle.manifest.self_test
    embedder = Embedder(bundle, EngineSettings(prepack=False))
    try:
        expected = load_file(bundle.path(test.vectors))
        with Image.open(bundle.path(test.image)) as page:
            actual = [("document", embedder.embed_image(page)), ("query", embedder.embed_query(test.text))]
    except (SafetensorError, OSError) as error:
        raise CembedError(f"the self-test files cannot be read: {error}") from error
    if bundle.manifest.query.num_vectors is not None:
        actual.append(("query", embedder.embed_query(test.text, Budget(decode="loop"))))
    worst = 0.0
    for side, vectors in actual:
        if side not in expected or expected[side].shape != vectors.shape:
            raise CembedError(f"the stored {side} vectors have another shape than {vectors.shape}")
        worst = float(np.maximum(worst, np.abs(expected[side] - vectors).max()))
    if not worst <= test.tolerance:  # NaN is not
        raise CembedError(f"the vectors are off by {worst:.1e}, allowed is {test.tolerance:.0e}")
    return f"largest difference {worst:.1e}"

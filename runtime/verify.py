"""Is this bundle what was exported, and does it compute here what it computed then?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.manifest import Graph, Tensor
from cembed.runtime.bundle.manifest_file import upgrade
from cembed.runtime.bundle.tensor_files import read_safetensors
from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.embed.embedder import FULL, Budget, Embedder
from cembed.runtime.engines.operators import EXACT, same_everywhere
from cembed.runtime.engines.processor import adds_bytes_in_16_bits
from cembed.runtime.engines.session import CPU, EngineSettings, OrtSession
from cembed.runtime.errors import CembedError, Check
from cembed.runtime.pages.documents import PageError, PageReader
from cembed.runtime.pages.images import Pixels

MIN_COSINE = 0.95
"""With the vectors of the self-test, where other digits are expected: of a model that computes the same thing."""
MAX_VECTORS = 1 << 30
"""Bytes of the self-test's vectors."""
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


def verify_and_upgrade(bundle: Bundle) -> Iterator[Check]:
    """`verify`, and if all is well, a manifest of schema 1 becomes one of schema 2 with its digest."""
    well = True
    for check in verify(bundle):
        well = well and check.passed
        yield check
    if well:
        yield _attempt("upgrade", lambda: upgrade(bundle.root))
    else:
        yield Check("upgrade", False, "nothing was written, as a check failed")


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
    stated = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
    found = session.signature()
    different = {n for n in stated.keys() & found.keys() if not _is_stated(stated[n], *found[n])}
    if different := different | (stated.keys() ^ found.keys()):
        raise CembedError(f"the graph and the manifest disagree on {', '.join(sorted(different))}")
    return ", ".join(stated)


def _is_stated(stated: Tensor, kind: str, shape: tuple[int | str, ...]) -> bool:
    """Some releases of ONNX Runtime (1.25 to 1.31) give a number where they found that an axis with a name has it."""
    axes = zip(stated.shape, shape, strict=False)
    same = all(named == axis or (isinstance(named, str) and isinstance(axis, int)) for named, axis in axes)
    return _ONNX_TYPES.get(kind, kind) == stated.dtype and len(stated.shape) == len(shape) and same


def _self_test(bundle: Bundle) -> str:
    tolerance, quantisation = bundle.manifest.self_test.tolerance, bundle.manifest.quantisation
    worst, cosine = _self_test_by(bundle, CPU)
    rounding = ""
    if worst > tolerance and quantisation and quantisation.rows and cosine >= MIN_COSINE and adds_bytes_in_16_bits():
        rounding = f"; this processor has no VNNI and rounds activations to seven bits: lowest cosine {cosine:.4f}"
        if (exact := same_everywhere()) == CPU:
            return f"largest difference {worst:.1e}{rounding}"
        rounding += f" (difference by {EXACT})"
        worst, _ = _self_test_by(bundle, exact)
    if worst <= tolerance:
        return f"largest difference {worst:.1e}{rounding}"
    raise CembedError(f"the vectors are off by {worst:.1e}, allowed is {tolerance:.0e}")  # NaN too


def _self_test_by(bundle: Bundle, providers: tuple[str, ...]) -> tuple[float, float]:
    embedder = Embedder(bundle, EngineSettings(providers, prepack=False))
    loop = [Budget(decode="loop")] if bundle.manifest.query.num_vectors is not None else []
    return self_test(embedder, (FULL, *loop))


def self_test(
    embedder: Embedder, budgets: Sequence[Budget] = (FULL,), require_sandbox: bool = False
) -> tuple[float, float]:
    """The largest difference from the vectors of the bundle's self-test, and the lowest cosine of a vector: of its page
    and its query, by each of `budgets`, which change nothing but how a query is decoded.

    `require_sandbox` is for the page, as in `PageReader`.

    Raises CembedError: the self-test is damaged.
    """
    text = embedder.manifest.self_test.text
    page = embedder.embed_image(read_page(embedder.bundle, require_sandbox))
    actual = [("document", page), *(("query", embedder.embed_query(text, budget)) for budget in budgets)]
    expected = _read_vectors(embedder.bundle, dict(actual))
    worst, cosine = 0.0, 1.0
    for side, vectors in actual:
        worst = float(np.maximum(worst, np.abs(expected[side] - vectors).max()))
        cosine = float(np.minimum(cosine, (expected[side] * vectors).sum(axis=1).min()))
    return worst, cosine


def read_page(bundle: Bundle, require_sandbox: bool = False) -> Pixels:
    """The self-test page, by the process that reads documents: whoever made the bundle made the picture."""
    path = bundle.path(bundle.manifest.self_test.image)
    with PageReader(require_sandbox=require_sandbox) as reader:
        page = next(iter(reader.read([path])))
    if isinstance(page, PageError):
        raise CembedError(f"the self-test page {path} cannot be read: {page.reason}")
    return page.image


def _read_vectors(bundle: Bundle, actual: dict[str, Vectors]) -> dict[str, Vectors]:
    """The vectors of the bundle, of the shapes that were made here."""
    path = bundle.path(bundle.manifest.self_test.vectors)
    shapes = {side: ("float32", vectors.shape) for side, vectors in actual.items()}
    return read_safetensors(path, shapes, MAX_VECTORS)[0]

"""The OpenVINO engine against ONNX Runtime's, on the same bundles."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, BundleMaker, golden
from PIL import Image

from cembed.export.plan import ExportOptions
from cembed.quantize.plan import QuantiseOptions
from cembed.quantize.quantizer import quantise
from cembed.runtime import Embedder
from cembed.runtime.errors import CembedError

openvino = pytest.importorskip("openvino", reason="needs OpenVINO: pip install '.[openvino]'")
QUERIES = ["total of the invoice", "Rückgabe bis zum 3. Mai", "a"]
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def standard(exported: Callable[[ExportOptions], Path], tmp_path_factory: pytest.TempPathFactory) -> BundleMaker:
    """The bundle of a golden checkpoint in standard operators of opset 20; `name w8a8` and so on is quantised."""
    root = tmp_path_factory.mktemp("standard")

    def make(name: str) -> Path:
        checkpoint, *weights = name.split()
        path = root / name.replace(" ", "-")
        if not weights:
            return exported(replace(golden(name), target="onnx", opset=20))
        if not path.exists():
            quantise(make(checkpoint), QuantiseOptions(weights[0], accept_loss=True), path)
        return path

    return make


def page() -> Image.Image:
    return Image.open(next((GOLDEN / "causalqwen2_5").glob("*.png"))).convert("RGB")


@pytest.mark.parametrize(
    "name", ["causalqwen2_5", "causalpali", "causalqwen2_5 int8", "causalqwen2_5 int4", "causalqwen2_5 w8a8"]
)
def test_same_vectors_as_onnx_runtime(standard: BundleMaker, name: str) -> None:
    ours = Embedder.load(standard(name), providers=["openvino"])
    reference = Embedder.load(standard(name), prepack=False)  # packed, int8 weights meet rounded activations
    # Where activations are quantised, a last bit may tip one to its next level.
    tolerance = 0.05 if name.endswith("w8a8") else 2e-5
    np.testing.assert_allclose(ours.embed_images([page()])[0], reference.embed_images([page()])[0], atol=tolerance)
    for found, expected in zip(ours.embed_queries(QUERIES), reference.embed_queries(QUERIES), strict=True):
        np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize("name", ["causalqwen2_5", "causalpali"])
def test_loop_equals_single_pass_and_grows(standard: BundleMaker, name: str) -> None:
    embedder = Embedder.load(standard(name), providers=["openvino"])
    single = embedder.embed_queries(QUERIES, 6, decode="single-pass")
    for found, expected in zip(embedder.embed_queries(QUERIES, 6, decode="loop"), single, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
    state, other = (embedder.start_query(text, 6) for text in QUERIES[:2])
    state.extend(2)
    other.extend(3)  # their caches are apart
    np.testing.assert_allclose(state.extend(6), single[0], atol=2e-5)


def test_threads_share_a_session(standard: BundleMaker) -> None:
    embedder = Embedder.load(standard("causalqwen2_5"), providers=["openvino"], threads=1)
    texts = [f"page {number}" for number in range(24)]
    serial = embedder.embed_queries(texts)
    with ThreadPoolExecutor(8) as pool:
        for found, expected in zip(pool.map(lambda t: embedder.embed_queries([t])[0], texts), serial, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_bfloat16_is_near_or_refused(standard: BundleMaker) -> None:
    path = standard("causalqwen2_5")
    if not HAS_BF16:
        with pytest.raises(CembedError, match="no bfloat16 arithmetic"):
            Embedder.load(path, providers=["openvino-bf16"])
        return
    found, expected = (
        Embedder.load(path, providers=[p]).embed_images([page()])[0] for p in ("openvino-bf16", "openvino")
    )
    assert not np.array_equal(found, expected)
    assert (found * expected).sum(axis=1).min() > 0.99


def test_a_bundle_for_another_engine_is_refused_or_falls_back(causal_bundle: Path) -> None:
    with pytest.raises(CembedError, match="for onnxruntime: OpenVINO reads bundles exported with --target onnx"):
        Embedder.load(causal_bundle, providers=["openvino"])
    with pytest.warns(RuntimeWarning, match="going on with CPUExecutionProvider"):
        embedder = Embedder.load(causal_bundle, providers=["openvino", "CPUExecutionProvider"])
    assert np.isfinite(embedder.embed_queries(["x"])[0]).all()


def test_an_opset_it_does_not_read(tensorrt_bundle_of: BundleMaker) -> None:
    embedder = Embedder.load(tensorrt_bundle_of("causalqwen2_5"), providers=["openvino"])
    with pytest.raises(CembedError, match=r"text_step.onnx: .*TensorScatter.*--opset 20"):
        embedder.embed_queries(["x"], decode="loop")


def test_openvino_is_not_there(causal_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(CembedError, match=r"pip install 'cembed\[openvino\]'"):
        Embedder.load(causal_bundle, providers=["openvino"])

"""cembed's own operators: against the definition, on whole bundles, in Python and C; or refused, with the reason."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import libcembed
import numpy as np
import pytest
import row_products
from conftest import BundleMaker, golden
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image
from safetensors.numpy import load_file
from serving import SAMPLE

from cembed.export.plan import ExportOptions
from cembed.runtime import CembedError, Embedder, compiled
from cembed.runtime.engines import operators, processor
from cembed.runtime.engines.operators import BF16, EXACT
from cembed.runtime.engines.quiet import ort

Floats = NDArray[np.float32]
CPU = "CPUExecutionProvider"
FULL = ("causalpali", "colqwen2", "colqwen3", "colqwen3_5", "colidefics3", "colmodernvbert")  # attend to whole images
CAUSAL_TEXT = ("colqwen2", "colqwen3", "colqwen3_5", "colidefics3")  # whose text graphs have another operator


def able() -> bool:
    try:
        return bool(operators.operators())
    except CembedError:
        return False


needs_bf16 = pytest.mark.skipif(not able(), reason="no AVX-512 BF16")


def attention(heads: int, num_inputs: int = 3, **attributes: Any) -> bytes:
    names = "qkvbm"[:num_inputs]
    node = helper.make_node(
        "MultiHeadAttention", [*names], ["o"], domain="com.microsoft", num_heads=heads, **attributes
    )
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def session(model: bytes, threads: int = 2) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(operators.operators()))
    return ort.InferenceSession(model, options, providers=[CPU])


def run(inputs: dict[str, Floats], heads: int, threads: int = 2, **attributes: Any) -> Floats:
    output: Floats = session(attention(heads, **attributes), threads).run(None, inputs)[0]
    return output


def inputs_of(batch: int, queries: int, keys: int, heads: int, dim: int, seed: int = 0) -> dict[str, Floats]:
    rng = np.random.default_rng(seed)
    rows = {"q": queries, "k": keys, "v": keys}
    return {name: rng.standard_normal((batch, n, heads * dim), np.float32) for name, n in rows.items()}


def definition(inputs: dict[str, Floats], heads: int, scale: float | None = None) -> NDArray[np.float64]:
    q, k, v = (x.astype(np.float64).reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for x in inputs.values())
    scores = q @ k.swapaxes(2, 3) * (scale or q.shape[-1] ** -0.5)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = (weights / weights.sum(axis=-1, keepdims=True)) @ v
    return out.swapaxes(1, 2).reshape(inputs["q"].shape)


def rounded(x: Floats) -> Floats:
    """To the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


# The kernel


@needs_bf16
@pytest.mark.parametrize("dim", [1, 2, 5, 16, 33, 64, 72, 80, 96, 128, 200, 256])
@pytest.mark.parametrize(
    ("batch", "queries", "keys"),
    [(1, 1, 1), (1, 1, 300), (2, 5, 6), (1, 60, 128), (3, 61, 129), (1, 129, 64), (1, 400, 517)],
)
def test_equals_the_definition(batch: int, queries: int, keys: int, dim: int) -> None:
    """Up to what bfloat16 rounds: queries, keys and values to 2^-9 of themselves, and weights once more."""
    inputs = inputs_of(batch, queries, keys, 3, dim)
    found = run(inputs, 3)
    largest = np.abs(inputs["v"]).max()
    np.testing.assert_allclose(found, definition(inputs, 3), rtol=0, atol=2e-2 * largest)
    exact = {name: rounded(x) for name, x in inputs.items()}
    exact["q"] = rounded(exact["q"] * np.float32(dim**-0.5 * 1.44269504)) / np.float32(dim**-0.5 * 1.44269504)
    np.testing.assert_allclose(found, definition(exact, 3), rtol=0, atol=3e-3 * largest)


@needs_bf16
def test_scale_is_that_of_the_node() -> None:
    inputs = inputs_of(1, 70, 70, 2, 32)
    np.testing.assert_allclose(run(inputs, 2, scale=0.5), definition(inputs, 2, 0.5), rtol=0, atol=5e-2)
    assert np.abs(run(inputs, 2, scale=0.5) - run(inputs, 2)).max() > 0.1


@needs_bf16
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_nothing_depends_on_batch_mates_or_threads(threads: int) -> None:
    inputs = inputs_of(4, 130, 200, 5, 40)
    whole = run(inputs, 5, threads)
    for i in range(4):
        alone = run({name: x[i : i + 1] for name, x in inputs.items()}, 5, 1)
        np.testing.assert_array_equal(whole[i], alone[0])
    for count in (1, 59, 60, 61):  # nor on the other queries
        fewer = run({**inputs, "q": np.ascontiguousarray(inputs["q"][:, :count])}, 5, threads)
        np.testing.assert_array_equal(whole[:, :count], fewer)


@needs_bf16
def test_large_scores_neither_overflow_nor_vanish() -> None:
    inputs = inputs_of(1, 64, 500, 1, 64)
    inputs["q"] *= 1e4
    best = (inputs["q"] @ inputs["k"].swapaxes(1, 2))[0].argmax(axis=1)
    found = run(inputs, 1)
    close = np.abs(found[0] - inputs["v"][0, best]).max(axis=1) < 2e-2
    assert close.mean() > 0.9  # the others have two keys as near as rounding is coarse
    inputs["q"][:] = -1e4
    inputs["k"][:] = np.abs(inputs["k"])  # all scores far below zero, and zeros fill the last block up
    np.testing.assert_allclose(run(inputs, 1), definition(inputs, 1), rtol=0, atol=2.0)
    assert np.isfinite(run(inputs, 1)).all()


@needs_bf16
def test_equal_keys_give_the_mean() -> None:
    inputs = inputs_of(1, 3, 333, 1, 48)
    inputs["k"][:] = inputs["k"][:, :1]
    mean = rounded(inputs["v"]).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(run(inputs, 1), np.repeat(mean, 3, axis=1), rtol=0, atol=1e-5)


@needs_bf16
def test_what_is_no_number_stays_where_it_is() -> None:
    inputs = inputs_of(1, 130, 200, 2, 16)
    inputs["q"][0, 70, :16] = np.nan
    found = run(inputs, 2)
    assert np.isnan(found[0, 70, :16]).all()
    assert np.isnan(found).sum() == 16
    inputs = inputs_of(1, 130, 200, 2, 16)
    inputs["k"][0, 150, 16:] = np.inf
    assert np.isnan(run(inputs, 2)[..., 16:]).any()
    assert np.isfinite(run(inputs, 2)[..., :16]).all()


@needs_bf16
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": np.zeros((1, 4, 16), np.float32)}, "of one width"),
        ({"v": np.zeros((1, 5, 8), np.float32)}, "of one width"),
        ({"k": np.zeros((1, 0, 8), np.float32), "v": np.zeros((1, 0, 8), np.float32)}, "of one width"),
        ({"k": np.zeros((2, 4, 8), np.float32), "v": np.zeros((2, 4, 8), np.float32)}, "of one width"),
        ({"q": np.zeros((3, 8), np.float32)}, "three axes"),
        ({name: np.zeros((1, 4, 516), np.float32) for name in "qkv"}, "256 at most"),
        ({name: np.zeros((1, 4, 9), np.float32) for name in "qkv"}, "of one width"),
    ],
)
def test_other_inputs_are_refused(change: dict[str, Floats], words: str) -> None:
    with pytest.raises(Exception, match=words):
        run({name: np.zeros((1, 4, 8), np.float32) for name in "qkv"} | change, 2)


@needs_bf16
def test_other_attention_is_refused() -> None:
    with pytest.raises(Exception, match="causal"):
        session(attention(2, unidirectional=1))
    with pytest.raises(Exception, match="num_heads"):
        session(attention(0))
    with pytest.raises(Exception, match="input size 4"):
        session(attention(2, num_inputs=4))


@needs_bf16
def test_no_queries_give_nothing() -> None:
    assert run(inputs_of(1, 0, 5, 2, 8), 2).shape == (1, 0, 16)


# Products of bytes

needs_bytes = pytest.mark.skipif(operators.byte_products() is None, reason="not for this processor: no AVX2, or more")


@needs_bytes
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 6, 7, 192, 199])  # of two, in one product
@pytest.mark.parametrize(("inner", "columns"), row_products.SIZES)
def test_sums_of_bytes_are_exact(rows: int, inner: int, columns: int) -> None:
    row_products.check_byte_products(rows, inner, columns)


@needs_bytes
@pytest.mark.parametrize("threads", [1, 3])
def test_sums_of_bytes_are_exact_in_any_number_of_threads(threads: int) -> None:
    row_products.check_byte_products(600, 700, 300, threads)


@needs_bytes
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b": np.zeros((5, 16), np.int8)}, r"needs \[..., I\] and \[I, O\]"),
        ({"b": np.zeros((1, 4, 16), np.int8)}, r"needs \[..., I\] and \[I, O\]"),
        ({"a": np.zeros((), np.uint8)}, r"needs \[..., I\] and \[I, O\]"),
        ({"a": np.zeros((1, 65537), np.uint8), "b": np.zeros((65537, 16), np.int8)}, "adds 1 to 65,536"),
        ({"a": np.zeros((3, 0), np.uint8), "b": np.zeros((0, 16), np.int8)}, "adds 1 to 65,536"),
        ({"scales": np.zeros(15, np.float32)}, "for each column"),
        ({"scales": np.zeros((1, 16), np.float32)}, "for each column"),
        ({"scale": np.zeros(3, np.float32)}, "one zero point and one scale"),
        ({"zero": np.zeros(0, np.uint8)}, "one zero point and one scale"),
    ],
)
def test_other_products_of_bytes_are_refused(change: dict[str, NDArray[Any]], words: str) -> None:
    inputs = {
        "a": np.zeros((3, 4), np.uint8),
        "b": np.zeros((4, 16), np.int8),
        "scale": np.zeros((), np.float32),
        "scales": np.zeros(16, np.float32),
        "zero": np.zeros((), np.uint8),
    }
    session = row_products.session([row_products.FLOATS], row_products.TYPES, row_products.FLOAT, own=True)
    with pytest.raises(Exception, match=words):
        session.run(None, inputs | change)


@needs_bytes
def test_weights_have_no_zero_point() -> None:
    node = helper.make_node("MatMulInteger", [*"abzw"], ["y"])
    types = dict(zip("abzw", [TensorProto.UINT8, TensorProto.INT8] * 2, strict=True))
    session = row_products.session([node], types, TensorProto.INT32, own=True)
    inputs = {"a": np.ones((2, 3), np.uint8), "b": np.ones((3, 2), np.int8), "z": np.array(0, np.uint8)}
    assert (session.run(None, inputs | {"w": np.zeros(2, np.int8)})[0] == 3).all()
    with pytest.raises(Exception, match="no zero point for weights but 0"):
        session.run(None, inputs | {"w": np.array([0, 1], np.int8)})


# The providers


def test_exact_sums_in_both_languages(library: libcembed.Library) -> None:
    """Of the sample's self-test; nothing depends on what is beside a page."""
    try:
        embedder = Embedder.load(SAMPLE, providers=[EXACT], threads=2)
    except CembedError as error:
        pytest.skip(str(error))
    opened = library.open(SAMPLE, provider=EXACT.encode(), threads=2)
    expected = embedder.embed_images(PAGES)
    for image, vectors in zip(PAGES, expected, strict=True):
        np.testing.assert_allclose(opened.embed_image(image), vectors, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(embedder.embed_images(PAGES[1:])[0], expected[1])
    right = load_file(SAMPLE / "self_test.safetensors")["query"]
    np.testing.assert_allclose(opened.embed_query(embedder.manifest.self_test.text), right, rtol=0, atol=1e-6)
    opened.close()


def test_a_processor_without_exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "byte_products", lambda: None)
    monkeypatch.setattr(processor, "adds_bytes_in_16_bits", lambda: True)
    with pytest.raises(CembedError, match="nothing for this processor"):
        Embedder.load(SAMPLE, providers=[EXACT])
    monkeypatch.setattr(processor, "adds_bytes_in_16_bits", lambda: False)
    Embedder.load(SAMPLE, providers=[EXACT])


def page(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


PAGES = (page(300, 200), page(90, 500))


@needs_bf16
@pytest.mark.parametrize("name", FULL)
def test_vectors_are_near(bundle_of: BundleMaker, name: str) -> None:
    ours, right = (Embedder.load(bundle_of(name), providers=[p], threads=2) for p in (BF16, CPU))
    for found, expected in zip(ours.embed_images(PAGES), right.embed_images(PAGES), strict=True):
        assert not np.array_equal(found, expected)
        assert (found * expected).sum(axis=1).min() > 0.995
    np.testing.assert_array_equal(ours.embed_images(PAGES)[1], ours.embed_images(PAGES[1:])[0])
    found, expected = (embedder.embed_queries(["one"])[0] for embedder in (ours, right))
    assert (found * expected).sum(axis=1).min() > 0.999
    assert np.array_equal(found, expected) == (name in CAUSAL_TEXT)


@needs_bf16
@pytest.mark.parametrize("name", ["colqwen2", "colqwen3"])
def test_the_c_library_gives_the_same(library: libcembed.Library, bundle_of: BundleMaker, name: str) -> None:
    opened = library.open(bundle_of(name), provider=BF16.encode(), threads=2)
    expected = Embedder.load(bundle_of(name), providers=[BF16], threads=2).embed_images(PAGES)
    for image, vectors in zip(PAGES, expected, strict=True):
        np.testing.assert_allclose(opened.embed_image(image), vectors, rtol=0, atol=1e-6)
    opened.close()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"target": "onnx", "opset": 20}, "runs bundles of --target onnxruntime"),
        ({"dtype": "fp16"}, "compute in float32"),
    ],
)
def test_bundles_without_such_attention_are_refused(
    exported: Callable[[ExportOptions], Path], library: libcembed.Library, changed: dict[str, Any], words: str
) -> None:
    bundle = exported(replace(golden("colqwen2"), **changed))
    with pytest.raises(CembedError, match=words):
        Embedder.load(bundle, providers=[BF16])
    with pytest.raises(libcembed.CallError, match=words):
        library.open(bundle, provider=BF16.encode())
    with pytest.warns(RuntimeWarning, match=f"{words}.*going on with {CPU}"):
        Embedder.load(bundle, providers=[BF16, CPU])


def test_a_library_that_is_not_there(bundle_of: BundleMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(operators, "__file__", str(tmp_path / "operators.py"))
    with pytest.raises(CembedError, match=r"was not built.*compiler"):
        Embedder.load(bundle_of("colqwen2"), providers=[BF16])
    (tmp_path / f"liboperators{compiled.EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF")
    with pytest.raises(CembedError, match="cannot be loaded"):
        Embedder.load(bundle_of("colqwen2"), providers=[BF16])


@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="needs qemu-user")
def test_a_processor_without_bfloat16() -> None:
    code = "from cembed.runtime.engines.operators import operators\noperators()"
    done = subprocess.run(
        ["qemu-x86_64", "-cpu", "Haswell", sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "this processor has no bfloat16 arithmetic (AVX-512 BF16)" in done.stderr, done.stderr


def test_the_library_tells() -> None:
    names = [Path(operators.__file__).with_name(f"liboperators{s}") for s in compiled.EXTENSION_SUFFIXES]
    (built,) = [name for name in names if name.exists()]
    flags = Path("/proc/cpuinfo").read_text().split()
    library, more = ctypes.CDLL(str(built)), {"avx512bw", "avx_vnni"}
    assert bool(library.multiplies_bfloat16()) == ("avx512_bf16" in flags)
    assert bool(library.multiplies_bytes()) == ("avx2" in flags and more.isdisjoint(flags))

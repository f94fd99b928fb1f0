"""Products by row as ONNX Runtime and as whole numbers give them; as a program, what this processor makes of them.

Apart from the tests so that an emulator, which is slow, need not import them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cembed.quantize.rows import NARROW, WIDE, product_by_row
from cembed.quantize.weights import SCHEMES
from cembed.runtime.engines.operators import byte_products
from cembed.runtime.engines.quiet import ort

Floats = NDArray[np.float32]
RANDOM = np.random.default_rng(3)
X: Floats = RANDOM.standard_normal((2, 5, 96)).astype(np.float32)
X[0, 1], X[0, 2, 7], X[0, 3], X[1] = 0, 500, 1, X[1] * 1e-4
WEIGHT: Floats = RANDOM.standard_normal((96, 40)).astype(np.float32)
WEIGHT[:, 0] = 1
FLOAT = TensorProto.FLOAT
TYPES = {"a": TensorProto.UINT8, "b": TensorProto.INT8, "scale": FLOAT, "scales": FLOAT, "zero": TensorProto.UINT8}
FLOATS = helper.make_node("MatMulIntegerToFloat", [*TYPES], ["y"], domain="com.microsoft")
WITH_BIAS = helper.make_node("MatMulIntegerToFloat", [*TYPES, "", "bias"], ["y"], domain="com.microsoft")
INTEGERS = helper.make_node("MatMulInteger", ["a", "b", "zero"], ["y"])
SIZES = ((1, 1), (2, 16), (3, 17), (64, 64), (511, 80), (512, 32), (513, 33), (1025, 1040), (70, 2100))
"""What is added and how many columns: ends of vectors, of tiles, of blocks and of what is packed at once."""


def session(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, int],
    output: int,
    *,
    stored: Iterable[onnx.TensorProto] = (),
    own: bool = False,
    threads: int = 0,
) -> ort.InferenceSession:
    """A session of one graph, with `own` as onnxruntime-exact opens it; inputs and output by type."""
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("y", output, None)],
        list(stored),
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    if own and (library := byte_products()):
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def row_product(x: Floats, weight: Floats, overflows: bool = False, own: bool = False) -> Floats:
    """What a graph of one product by row gives: x [..., I], weight [I, O]; also where it finds that sums overflow."""
    found = SCHEMES["int8"].quantise(weight)
    nodes, constants = product_by_row(helper.make_node("MatMul", ["x", "w"], ["y"], "product"), "levels", "scales")
    stored = [numpy_helper.from_array(a, n) for a, n in ((found.levels, "levels"), (found.scales, "scales"))]
    if overflows:
        stored.append(numpy_helper.from_array(np.asarray(np.int32(0)), "row.sum"))
    named = {tensor.name: tensor for tensor in (*constants, *stored)}
    found_session = session(nodes, {"x": FLOAT}, FLOAT, stored=named.values(), own=own)
    return np.asarray(found_session.run(None, {"x": x})[0])


def whole_numbers(x: Floats, weight: Floats, top: int) -> Floats:
    """The same by the definition, with levels up to `top`."""
    found = SCHEMES["int8"].quantise(weight)
    largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-12))
    levels = np.rint(x * (np.float32(top) / largest)).astype(np.int64)
    product = (levels @ found.levels.astype(np.int64)).astype(np.float32)
    return np.asarray(product * found.scales * (largest / np.float32(top)), np.float32)


def overflows(own: bool = False) -> bool:
    """Whether two products of bytes are added in 16 bits here, x86 without VNNI, so that activations have 7 bits."""
    wide = whole_numbers(X, WEIGHT, 127)
    return not np.allclose(row_product(X, WEIGHT, own=own), wide, rtol=1e-5, atol=1e-7 * float(np.abs(wide).max()))


def check_byte_products(rows: int, inner: int, columns: int, threads: int = 0) -> None:
    """Both operators on random bytes, extremes among them, are bit for bit what the definition says."""
    rng = np.random.default_rng(rows * inner + columns)
    a = rng.choice(np.array([0, 255, *range(256)], np.uint8), (2, rows, inner))
    b = rng.choice(np.array([-128, 127, *range(-128, 128)], np.int8), (inner, columns))
    scale, scales = np.array(0.37, np.float32), rng.random(columns, np.float32)
    zero = np.array(rng.choice([0, 64, 128, 255]), np.uint8)
    sums = (a.astype(np.int64) - int(zero)) @ b.astype(np.int64)
    inputs = {"a": a, "b": b, "scale": scale, "scales": scales, "zero": zero}
    expected = sums.astype(np.float32) * (scale * scales)
    floats = session([FLOATS], TYPES, FLOAT, own=True, threads=threads).run(None, inputs)[0]
    np.testing.assert_array_equal(floats, expected)
    bias = rng.standard_normal(columns, np.float32)
    floats = session([WITH_BIAS], {**TYPES, "bias": FLOAT}, FLOAT, own=True, threads=threads).run(
        None, {**inputs, "bias": bias}
    )[0]
    np.testing.assert_array_equal(floats, expected + bias)
    some = {name: inputs[name] for name in ("a", "b", "zero")}
    integers = session([INTEGERS], {name: TYPES[name] for name in some}, TensorProto.INT32, own=True, threads=threads)
    np.testing.assert_array_equal(integers.run(None, some)[0], sums)


def levels(own: bool) -> int:
    """How many levels on either side of zero this processor gives activations."""
    given = row_product(X, WEIGHT, own=own)
    near = [np.abs(given - whole_numbers(X, WEIGHT, top)).max() for top in (WIDE, NARROW)]
    assert min(near) < 1e-5 * np.abs(given).max()
    return (WIDE, NARROW)[int(np.argmin(near))]


if __name__ == "__main__":  # by an emulator of an older processor
    for size in SIZES:
        check_byte_products(13, *size)
    print(levels(own=False), levels(own=True))

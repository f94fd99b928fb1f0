"""Products by row as ONNX Runtime and as whole numbers give them; as a program, what this processor makes of them.

Apart from the tests so that an emulator, which is slow, need not import them.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from cembed.quantize.rows import NARROW, product_by_row
from cembed.quantize.weights import SCHEMES
from cembed.runtime.engines.quiet import ort

Floats = NDArray[np.float32]
RANDOM = np.random.default_rng(3)
X: Floats = RANDOM.standard_normal((2, 5, 96)).astype(np.float32)
X[0, 1], X[0, 2, 7], X[0, 3], X[1] = 0, 500, 1, X[1] * 1e-4
WEIGHT: Floats = RANDOM.standard_normal((96, 40)).astype(np.float32)
WEIGHT[:, 0] = 1


def row_product(x: Floats, weight: Floats, overflows: bool = False) -> Floats:
    """What a graph of one product by row gives: x [..., I], weight [I, O]; also where it finds that sums overflow."""
    found = SCHEMES["int8"].quantise(weight)
    nodes, constants = product_by_row(helper.make_node("MatMul", ["x", "w"], ["y"], "product"), "levels", "scales")
    stored = [numpy_helper.from_array(a, n) for a, n in ((found.levels, "levels"), (found.scales, "scales"))]
    if overflows:
        stored.append(numpy_helper.from_array(np.asarray(np.int32(0)), "row.sum"))
    named = {tensor.name: tensor for tensor in (*constants, *stored)}
    ends = [[helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * x.ndim)] for name in ("x", "y")]
    graph = helper.make_graph(nodes, "row", *ends, list(named.values()))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def whole_numbers(x: Floats, weight: Floats, top: int) -> Floats:
    """The same by the definition, with levels up to `top`."""
    found = SCHEMES["int8"].quantise(weight)
    largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-12))
    levels = np.rint(x * (np.float32(top) / largest)).astype(np.int64)
    product = (levels @ found.levels.astype(np.int64)).astype(np.float32)
    return np.asarray(product * found.scales * (largest / np.float32(top)), np.float32)


def overflows() -> bool:
    """Whether this processor adds two products of bytes in 16 bits: x86 without VNNI. Activations have 7 bits then."""
    wide = whole_numbers(X, WEIGHT, 127)
    return not np.allclose(row_product(X, WEIGHT), wide, rtol=1e-5, atol=1e-7 * float(np.abs(wide).max()))


if __name__ == "__main__":
    narrow = whole_numbers(X, WEIGHT, NARROW)
    is_right = np.allclose(row_product(X, WEIGHT), narrow, rtol=1e-5, atol=1e-7 * float(np.abs(narrow).max()))
    print(NARROW, "right" if is_right else "wrong")

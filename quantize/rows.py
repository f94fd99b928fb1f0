"""Products of activations with int8 weights in integers: a range for each row of them.

A row's range depends on nothing else, so whatever is computed beside it cannot matter, and nothing need be calibrated
(the per-token scales of LLM.int8(), arXiv 2208.07339, section 2). For ONNX Runtime.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FUSED = ("MatMulIntegerToFloat", "com.microsoft")
WIDE, NARROW = 127, 63
"""The largest level of an activation, and that where two products of unsigned with signed bytes are added in 16 bits,
which overflow otherwise: on x86 without VNNI."""
PROBE = 64


def product_by_row(node: onnx.NodeProto, levels: str, scales: str) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """A MatMul with the weight in int8 `levels` [I, O] and `scales` [O]: the nodes and constants that this takes.

    Of what several products read, nodes have the same names.
    """
    x, y = node.input[0], node.output[0]
    product = f"{y}.product"
    inputs = [f"{x}.row_levels", levels, "row.one", scales, "row.zero_point"]
    nodes = [
        *PROBING,
        *quantise_rows(x),
        helper.make_node(FUSED[0], inputs, [product], f"{node.name}.levels", domain=FUSED[1]),
        helper.make_node("Mul", [product, f"{x}.row_scales"], [y], node.name),
    ]
    return nodes, constants()


def quantise_rows(x: str) -> list[onnx.NodeProto]:
    """From `x` [..., I] to `x.row_levels`, uint8, and `x.row_scales` [..., 1]."""
    steps = (
        ("Abs", [x], "sizes"),
        ("ReduceMax", [f"{x}.row_sizes", "row.axis"], "most"),
        ("Max", [f"{x}.row_most", "row.least"], "largest"),
        ("Div", [f"{x}.row_largest", "row.top"], "scales"),
        ("Div", ["row.top", f"{x}.row_largest"], "factors"),
        ("Mul", [x, f"{x}.row_factors"], "scaled"),
        ("QuantizeLinear", [f"{x}.row_scaled", "row.one", "row.zero_point"], "levels"),
    )
    return [helper.make_node(kind, inputs, [f"{x}.row_{name}"], f"{x}.row_{name}") for kind, inputs, name in steps]


@cache
def constants() -> list[TensorProto]:
    values = {
        "row.one": np.float32(1),
        "row.axis": np.array([-1], np.int64),
        "row.least": np.float32(1e-12),
        "row.wide": np.float32(WIDE),
        "row.wide_zero": np.uint8(WIDE + 1),
        "row.narrow": np.float32(NARROW),
        "row.narrow_zero": np.uint8(NARROW + 1),
        "row.bytes": np.full((2, PROBE), 255, np.uint8),
        "row.signed_bytes": np.full((PROBE, 1), 127, np.int8),
        "row.sum": np.int32(255 * 127 * PROBE),
    }
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


PROBING = [
    helper.make_node("MatMulInteger", ["row.bytes", "row.signed_bytes"], ["row.sums"], "row.sums"),
    helper.make_node("ReduceMin", ["row.sums"], ["row.found"], "row.found", keepdims=0),
    helper.make_node("Equal", ["row.found", "row.sum"], ["row.is_wide"], "row.is_wide"),
    helper.make_node("Where", ["row.is_wide", "row.wide", "row.narrow"], ["row.top"], "row.top"),
    helper.make_node(
        "Where", ["row.is_wide", "row.wide_zero", "row.narrow_zero"], ["row.zero_point"], "row.zero_point"
    ),
]
"""From what a product of the largest bytes gives on this processor: `row.top` and `row.zero_point`. Computed once, when
the graph is loaded."""

"""What the graphs of a bundle may hold: tables, for Python and the C library alike (`tests/native/manifest_schema.py`).

`tests/exports.py --list` gives the operators that the exporters and the quantiser emit; tests/test_hostile_bundles.py
compares them with `OPERATORS`.
"""

from __future__ import annotations

from collections.abc import Mapping

MAX_GRAPH = 1 << 26  # bytes of an ONNX file; weights are elsewhere. 10^5 nodes take 15 MB
MAX_NODES = 1 << 18
MAX_TENSORS = 1 << 18  # initializers of a graph
MAX_BODIES = 2  # graphs within each other
MAX_ATTRIBUTE = 1 << 14  # bytes of an attribute that is no body
MAX_AXES = 8
MAX_AXIS = 1 << 28
MAX_SIZED = 1 << 24  # elements of what constants alone give the size of
MAX_NUMBERS = 64  # elements of a constant that may be a shape
UNKNOWN_AXIS = 1 << 16  # what an axis counts as whose length the file does not say
FOLDED_SHARE, FOLDED_MORE = 4, 1 << 20  # elements that may be computed from constants: of those stored, and beside them

BLOCK = 32  # inputs that have a scale of their own in a weight of MatMulNBits, two of them a byte

DOMAINS = ("", "com.microsoft")
OPERATORS = (
    "Abs",
    "Add",
    "And",
    "Attention",
    "AveragePool",
    "Cast",
    "Ceil",
    "Clip",
    "Concat",
    "Constant",
    "ConstantOfShape",
    "Conv",
    "Cos",
    "CumSum",
    "DequantizeLinear",
    "Div",
    "Equal",
    "Erf",
    "Exp",
    "Expand",
    "Flatten",
    "Floor",
    "Gather",
    "GatherElements",
    "GatherND",
    "Gelu",
    "Gemm",
    "Greater",
    "GreaterOrEqual",
    "Identity",
    "IsInf",
    "IsNaN",
    "LayerNormalization",
    "Less",
    "LessOrEqual",
    "Log",
    "MatMul",
    "MatMulInteger",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Neg",
    "Not",
    "Or",
    "Pad",
    "Pow",
    "QuantizeLinear",
    "RMSNormalization",
    "Range",
    "Reciprocal",
    "ReduceL2",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "Relu",
    "Reshape",
    "Resize",
    "RotaryEmbedding",
    "Round",
    "Scan",
    "ScatterElements",
    "Shape",
    "Sigmoid",
    "Sign",
    "Sin",
    "Size",
    "Slice",
    "Softmax",
    "Softplus",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Sum",
    "Tanh",
    "TensorScatter",
    "Tile",
    "Transpose",
    "Trilu",
    "Unsqueeze",
    "Where",
    "com.microsoft:GroupQueryAttention",
    "com.microsoft:LinearAttention",
    "com.microsoft:MatMulIntegerToFloat",
    "com.microsoft:MatMulNBits",
    "com.microsoft:MultiHeadAttention",
)

FIELDS: Mapping[str, Mapping[int, str]] = {
    "Model": {1: "n", 2: "t", 3: "t", 4: "t", 5: "n", 6: "t", 7: "Graph", 8: "Opset*", 14: "t*"},
    "Graph": {1: "Node*", 2: "t", 5: "Tensor*", 10: "t", 11: "Value*", 12: "Value*", 13: "Value*", 16: "t*"},
    "Node": {1: "t*", 2: "t*", 3: "t", 4: "t", 5: "Attribute*", 6: "t", 7: "t", 9: "t*"},
    "Attribute": {1: "t", 2: "f", 3: "n", 4: "t", 5: "Tensor", 6: "Graph", 7: "a*", 8: "a*", 13: "t", 20: "n"},
    "Tensor": {1: "a*", 2: "n", 4: "a*", 5: "a*", 7: "a*", 8: "t", 9: "t", 12: "t", 13: "Entry*", 14: "n"},
    "Entry": {1: "t", 2: "t"},
    "Opset": {1: "t", 2: "n"},
    "Value": {1: "t", 2: "Type", 3: "t"},
    "Type": {1: "TensorType"},
    "TensorType": {1: "n", 2: "Shape"},
    "Shape": {1: "Dim*"},
    "Dim": {1: "n", 2: "t"},
}
"""Every field that an export has, by message and number: `n` is a number, `f` one of 4 bytes, `t` is bytes, `a` are
numbers one by one or side by side, else a message; without `*` it is there once at most. No functions, nothing of
training, no sparse tensors, no attributes that hold several tensors or graphs."""

BITS = {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 16: 16, 21: 4, 22: 4}
"""Bits of an element, by ONNX's number of its type."""
TYPES = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10}
"""ONNX's numbers of what graphs take and give."""

SAME, PRODUCT, SUM, SIZED = "same", "product", "sum", "sized"
GROWTH: Mapping[str, str] = {
    **dict.fromkeys(
        ("Abs", "Cast", "Ceil", "Clip", "Cos", "DequantizeLinear", "Erf", "Exp", "Flatten", "Floor",
         "Identity", "IsInf", "IsNaN", "Log", "Neg", "Not", "QuantizeLinear", "Reciprocal", "ReduceL2",
         "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape", "Round",
         "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Tanh",
         "Transpose", "Trilu", "Unsqueeze"),
        SAME,
    ),
    **dict.fromkeys(
        ("Add", "And", "Div", "Equal", "Gather", "GatherElements", "Greater", "GreaterOrEqual", "Less",
         "LessOrEqual", "MatMul", "MatMulInteger", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "Sub",
         "Sum", "Where"),
        PRODUCT,
    ),
    "Concat": SUM,
    **dict.fromkeys(("ConstantOfShape", "Expand", "Range", "Tile"), SIZED),
}  # fmt: skip
"""How many elements an operator gives of constants alone: as its first input, at most all inputs' multiplied or added,
or what numbers among them say. Others have no constants alone."""

KEEPS = ("Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze", "Max", "Min")
"""What gives no number that is not among its inputs, so that a shape's numbers pass."""

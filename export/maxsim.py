"""MaxSim as a graph, to score pages inside of an engine: from standard operators, or by the TensorRT plugin.

standard()
    query    float32 or float16 [Q, D]
    pages    the same [P, K, D], filled up after their last vector
    lengths  int64 [P], vectors of each page
    → scores float32 [P]

plugin(), for runtime/native/tensorrt
    query    float16 [Q, D]
    pages    float16 [N, D], rows of all pages one after the other, or int8 levels with zero point 0
    offsets  int64 [P + 1], first row of each page, and N
    scales   float32 [P], with levels only
    → scores float32 [P]

A page without vectors scores minus infinity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18  # the first with axes as an input of ReduceMax; TensorRT 10.3 takes 20 at most
DOMAIN = "cembed"  # the plugin's namespace; its name is the node's op_type
_SCORES = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["num_pages"])


def standard(dim: int, *, half: bool = False) -> onnx.ModelProto:
    """A matrix of all similarities in between: P * K * Q numbers, in float32 from there on."""
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info("query", kind, ["query_vectors", dim]),
        helper.make_tensor_value_info("pages", kind, ["num_pages", "num_vectors", dim]),
        helper.make_tensor_value_info("lengths", TensorProto.INT64, ["num_pages"]),
    ]
    constants = {
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "axis_1": np.array([1], np.int64),
        "axis_2": np.array([2], np.int64),
        "nothing": np.array(-np.inf, np.float32),
    }
    nodes = [
        helper.make_node("Transpose", ["query"], ["query_columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["pages", "query_columns"], ["products"]),  # [P, K, Q]
        helper.make_node("Cast", ["products"], ["similarity"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["pages"], ["page_shape"], start=1, end=2),
        helper.make_node("Squeeze", ["page_shape"], ["longest"]),
        helper.make_node("Range", ["zero", "longest", "one"], ["positions"]),  # [K]
        helper.make_node("Unsqueeze", ["lengths", "axis_1"], ["ends"]),  # [P, 1]
        helper.make_node("Less", ["positions", "ends"], ["inside"]),
        helper.make_node("Unsqueeze", ["inside", "axis_2"], ["taking_part"]),  # [P, K, 1]
        helper.make_node("Where", ["taking_part", "similarity", "nothing"], ["masked"]),
        helper.make_node("ReduceMax", ["masked", "axis_1"], ["best"], keepdims=0),  # [P, Q]
        helper.make_node("ReduceSum", ["best", "axis_1"], ["scores"], keepdims=0),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "maxsim", inputs, [_SCORES], tensors)
    return _model(graph, [helper.make_opsetid("", OPSET)])


def plugin(dim: int, *, levels: bool = False) -> onnx.ModelProto:
    """One node; the similarities are nowhere. A dim that is a multiple of 8, with levels of 16."""
    kind = TensorProto.INT8 if levels else TensorProto.FLOAT16
    inputs = [
        helper.make_tensor_value_info("query", TensorProto.FLOAT16, ["query_vectors", dim]),
        helper.make_tensor_value_info("pages", kind, ["num_vectors", dim]),
        helper.make_tensor_value_info("offsets", TensorProto.INT64, ["num_offsets"]),
    ]
    if levels:
        inputs.append(helper.make_tensor_value_info("scales", TensorProto.FLOAT, ["num_pages"]))
    names = [value.name for value in inputs]
    node = helper.make_node(
        "MaxSim", names, ["scores"], domain=DOMAIN, plugin_version="1", plugin_namespace=DOMAIN
    )  # parsers look at the attributes, newer ones at the domain, too
    graph = helper.make_graph([node], "maxsim", inputs, [_SCORES])
    return _model(graph, [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)])


def _model(graph: onnx.GraphProto, opsets: Sequence[onnx.OperatorSetIdProto]) -> onnx.ModelProto:
    model = helper.make_model(graph, opset_imports=opsets, producer_name="cembed", ir_version=9)
    onnx.checker.check_model(model)
    return model

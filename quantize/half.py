"""fp16 graphs from fp32 ones, with what would overflow left in float32.

A segment is the nodes from one weight of a graph to the next, in the graph's order, named after the weight; `text` and
`text_step` have the same ones. A segment that reads or gives values beyond LARGEST while the float bundle embeds the
calibration set is an island: it computes in float32, casts on its shores.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cembed.quantize.activations import Watcher
from cembed.quantize.graph import DataFile, SourceGraph
from cembed.runtime.bundle.graph_tensors import grows, is_past, is_present

LARGEST = float(np.finfo(np.float16).max) / 2  # of the values seen: others may be twice as large
START = "inputs"  # the segment before the first weight
_POSITIONS = ("position_weights", "patch_fractions")  # what positions are computed from, which stay in float32
_RECURRENT = (".in_proj_a.weight", ".in_proj_b.weight", ".conv1d.weight")  # what rounding would add up in


def segments(source: SourceGraph) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Each node with the name of its segment."""
    segment = START
    for node in source.model.graph.node:
        named = [name for name in node.input if name in source.initializers and name.endswith((".weight", ".bias"))]
        segment = next((name for name in named if name.endswith(".weight")), segment)
        yield node, segment


def data_nodes(source: SourceGraph) -> set[str]:
    """The outputs of nodes that data flows through: the others compute positions, which stay in float32."""
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    inputs = [tensor for tensor in source.model.graph.input if tensor.type.tensor_type.elem_type in floats]
    reached = {tensor.name for tensor in inputs if tensor.name not in _POSITIONS}
    for node in source.model.graph.node:
        if reached & set(node.input):
            reached |= set(node.output)
    return reached


def float_values(source: SourceGraph) -> set[str]:
    """The float32 tensors that nodes and inputs give."""
    graph = source.model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}


class OverflowScan(Watcher):
    """Keeps the largest size of every float32 tensor of a graph."""

    def __init__(self, source: SourceGraph, threads: int | None) -> None:
        self._source, flowing = source, data_nodes(source) & float_values(source)
        names = [name for node in source.model.graph.node for name in node.output if name in flowing]
        added = [
            node
            for name in names
            for node in (
                helper.make_node("Abs", [name], [f"{name}.size"]),
                helper.make_node("ReduceMax", [f"{name}.size"], [f"{name}.largest"], keepdims=0),
            )
        ]
        super().__init__(source, added, (f"{name}.largest" for name in names), threads)
        self.largest = dict.fromkeys(names, 0.0)

    def see(self, values: Mapping[str, NDArray[Any]]) -> None:
        for name in self.largest:
            seen = float(np.nan_to_num(values[f"{name}.largest"], nan=np.inf))
            self.largest[name] = max(self.largest[name], seen)

    def islands(self) -> set[str]:
        """The segments that read or give a value beyond LARGEST, and those that recur."""
        return {
            segment
            for node, segment in segments(self._source)
            if segment.endswith(_RECURRENT)
            or any(self.largest.get(name, 0.0) > LARGEST for name in (*node.input, *node.output))
        }


class Halver:
    """Writes a graph in float16 but for its islands; its inputs, outputs and states stay, KV caches are half."""

    def __init__(self, source: SourceGraph, islands: Collection[str], data: DataFile) -> None:
        self._source, self._data = source, data
        flowing = data_nodes(source)
        self._floats = float_values(source) | {
            n for n, t in source.initializers.items() if t.data_type == TensorProto.FLOAT
        }
        self._half_nodes = {
            node.name
            for node, segment in segments(source)
            if segment not in islands and flowing & set(node.output) and node.op_type != "Cast"
            if all(map(grows, filter(is_past, node.input)))
        }
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._given: dict[str, bool] = {}  # whether a float tensor is half, by its name in the source
        self._casts: set[str] = set()

    def graph(self) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self._source.model)
        self._inputs(model)
        for node in model.graph.node:
            half = node.name in self._half_nodes
            for index, name in enumerate(node.input):
                node.input[index] = self._read(name, half)
            self._given |= {name: half for name in node.output if name in self._floats}
            self._nodes.append(node)
        self._outputs(model)
        for value in model.graph.value_info:  # kept: ONNX Runtime does not find all shapes of Attention by itself
            if self._given.get(value.name, False):
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
        del model.graph.node[:], model.graph.initializer[:]
        model.graph.node.extend(self._nodes)
        model.graph.initializer.extend(self._initializers.values())
        return model

    def _inputs(self, model: onnx.ModelProto) -> None:
        """A KV cache is as half as the node that reads it."""
        readers = {name: node.name for node in model.graph.node for name in node.input}
        for value in model.graph.input:
            half = is_past(value.name) and readers.get(value.name) in self._half_nodes
            self._given[value.name] = half
            if half:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16

    def _outputs(self, model: onnx.ModelProto) -> None:
        """Caches as they are, everything else as float32 under its own name."""
        for value in model.graph.output:
            if not self._given.get(value.name, False):
                continue
            if is_present(value.name):
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
            else:
                inner = f"{value.name}.inner"
                for node in self._nodes:
                    for names in (node.input, node.output):
                        names[:] = [inner if name == value.name else name for name in names]
                self._nodes.append(
                    helper.make_node("Cast", [inner], [value.name], f"{inner}.cast", to=TensorProto.FLOAT)
                )

    def _read(self, name: str, half: bool) -> str:
        """The name of a tensor in the type a node computes in."""
        if name in self._source.initializers:
            return self._store(name, half and name in self._floats)
        if name not in self._floats or self._given[name] == half:
            return name
        cast = f"{name}.{'half' if half else 'single'}"
        if cast not in self._casts:
            self._casts.add(cast)
            kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            self._nodes.append(helper.make_node("Cast", [name], [cast], f"{cast}.cast", to=kind))
        return cast

    def _store(self, name: str, half: bool) -> str:
        """The name of a stored tensor in one of the types; those in the data file are shared by graphs."""
        tensor, stored = self._source.initializers[name], f"{name}.half" if half else name
        if stored not in self._initializers:
            external = tensor.data_location == TensorProto.EXTERNAL
            self._initializers[stored] = self._copy(tensor, stored, half) if external else halved(tensor, stored, half)
        return stored

    def _copy(self, tensor: TensorProto, stored: str, half: bool) -> TensorProto:
        found = self._data.find(stored)
        if found is not None:
            return found
        if not half:
            return self._data.add(stored, tensor.data_type, tensor.dims, self._source.raw(tensor.name))
        values = self._source.load(tensor.name).astype(np.float16)
        return self._data.add(stored, TensorProto.FLOAT16, tensor.dims, values)


def halved(tensor: TensorProto, stored: str, half: bool) -> TensorProto:
    """A tensor of the graph itself."""
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), stored) if half else tensor

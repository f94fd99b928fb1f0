"""Rewriting a graph's MatMul nodes to quantised weights, in standard ONNX operators, one tensor in memory at a time.

A MatMul with a stored weight [I, O] becomes DequantizeLinear → MatMul. ONNX Runtime fuses the two into one kernel,
TensorRT reads the same file. Graphs that share a data file go on sharing it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cembed.quantize.weights import Floats, Quantised, Scheme, pack_nibbles

OPSET = 21  # DequantizeLinear with blocks and INT4
_PAGE = 4096  # tensors start at pages, so that they can be mapped
_INLINE = 1024  # bytes up to which a tensor stays in the graph
_QUANTISED = ("DequantizeLinear", "QuantizeLinear", "MatMulNBits")
_NUMPY = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


class DataFile:
    """Appends tensors to a data file, each name once."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, path.open("wb")
        self._written: dict[str, TensorProto] = {}

    def find(self, name: str) -> TensorProto | None:
        return self._written.get(name)

    def add(self, name: str, kind: int, dims: Iterable[int], raw: NDArray[Any]) -> TensorProto:
        """A tensor of an ONNX type; small ones are kept in the graph."""
        tensor = TensorProto(name=name, data_type=kind, dims=dims)
        if raw.nbytes <= _INLINE:
            tensor.raw_data = raw.tobytes()
        else:
            start = -(-self._file.tell() // _PAGE) * _PAGE
            self._file.write(b"\0" * (start - self._file.tell()))
            self._file.write(np.ascontiguousarray(raw).data)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", self.path.name), ("offset", start), ("length", raw.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
        self._written[name] = tensor
        return tensor

    def close(self) -> None:
        self._file.close()


class SourceGraph:
    """A graph of a bundle and its weights, which stay on disk until they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = onnx.load(str(path), load_external_data=False)
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.opset = next(entry.version for entry in self.model.opset_import if not entry.domain)

    def weights(self) -> Iterator[tuple[onnx.NodeProto, str]]:
        """Each MatMul with a stored weight [I, O], and its name; one that is stored as bfloat16 is widened before."""
        widened = {node.output[0]: node.input[0] for node in self.model.graph.node if node.op_type == "Cast"}
        for node in self.model.graph.node:
            if node.op_type == "MatMul":
                name = widened.get(node.input[1], node.input[1])
                if name in self.initializers and len(self.initializers[name].dims) == 2:
                    yield node, name

    def is_quantised(self) -> bool:
        return any(node.op_type in _QUANTISED for node in self.model.graph.node)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, mapped."""
        tensor = self.initializers[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return np.frombuffer(numpy_helper.to_array(tensor).tobytes(), np.uint8)
        entry = {item.key: item.value for item in tensor.external_data}
        path, shape = self.path.with_name(entry["location"]), (int(entry["length"]),)
        return np.memmap(path, np.uint8, "r", int(entry.get("offset", 0)), shape)

    def load(self, name: str) -> Floats:
        """A weight as float32."""
        tensor, raw = self.initializers[name], self.raw(name)
        if tensor.data_type == TensorProto.BFLOAT16:
            values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.asarray(raw.view(_NUMPY[tensor.data_type]), np.float32)
        weight: Floats = values.reshape(tuple(tensor.dims))
        return weight


def rewrite(source: SourceGraph, schemes: Mapping[str, Scheme], data: DataFile) -> onnx.ModelProto:
    """The graph with the weights named in `schemes` quantised; all its tensors go to `data`."""
    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    targets = {node.name: name for node, name in source.weights() if name in schemes}
    nodes: list[onnx.NodeProto] = []
    made: dict[str, TensorProto] = {}
    for node in model.graph.node:
        if node.name in targets:
            weight = targets[node.name]
            if weight not in made:
                tensors = store(weight, schemes[weight], source, data)
                nodes.append(dequantise(weight, tensors, schemes[weight].block))
                made |= {weight: tensors[0], **{tensor.name: tensor for tensor in tensors}}
            node.input[1] = restored_name(weight)
        nodes.append(node)
    nodes = drop_unread(nodes, {output.name for output in model.graph.output})
    read = {name for node in nodes for name in node.input}
    kept = [copy(name, source, data) for name in source.initializers if name in read]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend([*kept, *{tensor.name: tensor for tensor in made.values()}.values()])
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = max(entry.version, OPSET)
    return model


def restored_name(weight: str) -> str:
    return f"{weight}.restored"


def store(name: str, scheme: Scheme, source: SourceGraph, data: DataFile) -> list[TensorProto]:
    """Levels and scales of a weight; quantised once where graphs share it."""
    found = [data.find(f"{name}.levels"), data.find(f"{name}.scales")]
    if found[0] is not None and found[1] is not None:
        return [found[0], found[1]]
    quantised = scheme.quantise(source.load(name))
    return [write_levels(name, quantised, scheme, data), write_scales(name, quantised, source, data)]


def write_levels(name: str, quantised: Quantised, scheme: Scheme, data: DataFile) -> TensorProto:
    kind, raw = (TensorProto.INT4, pack_nibbles) if scheme.bits == 4 else (TensorProto.INT8, np.ascontiguousarray)
    return data.add(f"{name}.levels", kind, quantised.levels.shape, raw(quantised.levels))


def write_scales(name: str, quantised: Quantised, source: SourceGraph, data: DataFile) -> TensorProto:
    """In the type of the arithmetic: DequantizeLinear gives what its scales are."""
    half = source.initializers[name].data_type == TensorProto.FLOAT16
    kind, scales = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    return data.add(f"{name}.scales", kind, quantised.scales.shape, quantised.scales.astype(scales))


def dequantise(name: str, tensors: list[TensorProto], block: int) -> onnx.NodeProto:
    levels, scales = (tensor.name for tensor in tensors)
    where = {"axis": 0, "block_size": block} if block else {"axis": 1}
    return helper.make_node("DequantizeLinear", [levels, scales], [restored_name(name)], f"{name}.dequantise", **where)


def copy(name: str, source: SourceGraph, data: DataFile) -> TensorProto:
    """A tensor as it is."""
    tensor = source.initializers[name]
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    return data.find(name) or data.add(name, tensor.data_type, tensor.dims, source.raw(name))


def drop_unread(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """Without the nodes whose results nothing reads."""
    while True:
        read = outputs | {name for node in nodes for name in node.input}
        kept = [node for node in nodes if read & set(node.output)]
        if len(kept) == len(nodes):
            return kept
        nodes = kept

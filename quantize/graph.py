"""Rewriting a graph's MatMul nodes to quantised weights, in standard ONNX operators, one tensor in memory at a time.

A MatMul with a stored weight [I, O] becomes DequantizeLinear → MatMul. ONNX Runtime fuses the two into one kernel,
TensorRT reads the same file. For ONNX Runtime alone are `fuse_biases`, the products of `rows.py`, and
`product_by_block`, whose weights lie as its kernel reads them: none has to be turned round while a graph is opened.
Graphs that share a data file go on sharing it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cembed.quantize.rows import FUSED, product_by_row
from cembed.quantize.weights import BLOCK, ByteRange, Floats, Quantised, Scheme, pack_blocks, pack_nibbles

OPSETS = (19, 21)  # DequantizeLinear in half; with blocks and INT4
_PAGE = 4096  # tensors start at pages, so that they can be mapped
_INLINE = 256  # bytes up to which a tensor stays in the graph
_BY_BLOCK = "MatMulNBits"
_QUANTISED = ("DequantizeLinear", "QuantizeLinear", _BY_BLOCK)
_BYTES_TO_MULTIPLY = 4  # its name for activations in eight bits, with a scale for each block
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
            align = _PAGE if raw.nbytes >= _PAGE else 64
            start = -(-self._file.tell() // align) * align
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

    def is_vector(self, name: str) -> bool:
        """Whether it is a stored tensor of one axis."""
        return name in self.initializers and len(self.initializers[name].dims) == 1

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


@dataclass(frozen=True)
class Recipe:
    """What is done to a graph's tensors, by name: the scheme of a weight, the range of what it is multiplied with,
    what its rows [I] are multiplied with, what the columns or elements [O] of a tensor are divided by, inputs [N, I] of
    a weight to round it for, and whether the graph is for ONNX Runtime alone."""

    schemes: Mapping[str, Scheme]
    ranges: Mapping[str, ByteRange] = field(default_factory=dict)
    rows: Mapping[str, Floats] = field(default_factory=dict)
    columns: Mapping[str, Floats] = field(default_factory=dict)
    inputs: Mapping[str, Callable[[], Floats]] = field(default_factory=dict)
    fuse: bool = False

    def by_row(self, weight: str) -> bool:
        """Whether what a weight is multiplied with is quantised row by row."""
        return self.fuse and self.schemes[weight].rows

    def by_block(self, weight: str) -> bool:
        """Whether a weight is stored as ONNX Runtime multiplies blocks of it."""
        return self.fuse and bool(self.schemes[weight].block)

    def apply(self, name: str, tensor: Floats) -> Floats:
        """A tensor with its rows multiplied and its columns divided."""
        tensor = tensor * self.rows[name][:, None] if name in self.rows else tensor
        return tensor / self.columns[name] if name in self.columns else tensor


def rewrite(source: SourceGraph, recipe: Recipe, data: DataFile, move: bool = True) -> onnx.ModelProto:
    """The graph by its recipe; all its tensors go to `data`, or if they do not move, the new ones."""
    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    nodes, made = quantised_nodes(model, source, recipe, data)
    nodes = fuse_biases(nodes, source) if recipe.fuse else nodes
    nodes = drop_unread(nodes, {output.name for output in model.graph.output})
    read = {name for node in nodes for name in node.input}
    untouched = [name for name in source.initializers if name in read]
    kept = [copy(name, recipe, source, data) if move else source.initializers[name] for name in untouched]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend([*kept, *made])
    require_operators(model, OPSETS[any(scheme.block for scheme in recipe.schemes.values())])
    return model


def quantised_nodes(
    model: onnx.ModelProto, source: SourceGraph, recipe: Recipe, data: DataFile
) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """The model's nodes, before each quantised MatMul those that restore its inputs; and the tensors that these read.
    What several of them need is there once."""
    targets = {node.name: name for node, name in source.weights() if name in recipe.schemes}
    nodes: dict[str, onnx.NodeProto] = {}
    made: dict[str, TensorProto] = {}
    for node in model.graph.node:
        added, tensors = (
            quantised(node, targets[node.name], recipe, source, data) if node.name in targets else ([node], [])
        )
        nodes |= {each.name: each for each in added}
        made |= {tensor.name: tensor for tensor in tensors}
    return list(nodes.values()), list(made.values())


def quantised(
    node: onnx.NodeProto, weight: str, recipe: Recipe, source: SourceGraph, data: DataFile
) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """A MatMul that reads its weight, and by the recipe what that is multiplied with, from levels: the nodes and the
    tensors that this takes."""
    tensors = store(weight, recipe, source, data)
    if recipe.by_row(weight):
        nodes, levels = product_by_row(node, *(tensor.name for tensor in tensors))
        return nodes, [*levels, *tensors]
    if recipe.by_block(weight):
        return [product_by_block(node, tensors)], tensors
    restored = dequantise(weight, tensors, recipe.schemes[weight].block)
    node.input[1] = restored.output[0]
    if weight not in recipe.ranges:
        return [restored, node], tensors
    through, levels = pass_through_bytes(node.input[0], recipe.ranges[weight])
    node.input[0] = through[-1].output[0]
    return [*through, restored, node], [*levels, *tensors]


def product_by_block(node: onnx.NodeProto, tensors: list[TensorProto]) -> onnx.NodeProto:
    levels, scales = tensors
    outputs, blocks, _ = levels.dims
    sizes = {"K": blocks * BLOCK, "N": outputs, "block_size": BLOCK}
    inputs = [node.input[0], levels.name, scales.name]
    return helper.make_node(
        _BY_BLOCK, inputs, node.output, node.name, domain=FUSED[1], bits=4, accuracy_level=_BYTES_TO_MULTIPLY, **sizes
    )


def pass_through_bytes(tensor: str, found: ByteRange) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """QuantizeLinear and DequantizeLinear of an activation; weights that share it share them."""
    scale = TensorProto(name=f"{tensor}.scale", data_type=TensorProto.FLOAT, float_data=[found.scale])
    kind = TensorProto.INT8 if found.low < 0 else TensorProto.UINT8
    zero = TensorProto(name=f"{tensor}.zero_point", data_type=kind, int32_data=[found.zero_point])
    levels, restored = f"{tensor}.levels", f"{tensor}.restored"
    names = [scale.name, zero.name]
    nodes = [
        helper.make_node("QuantizeLinear", [tensor, *names], [levels], f"{tensor}.quantise"),
        helper.make_node("DequantizeLinear", [levels, *names], [restored], f"{tensor}.dequantise"),
    ]
    return nodes, [scale, zero]


def fuse_biases(nodes: list[onnx.NodeProto], source: SourceGraph) -> list[onnx.NodeProto]:
    """Products of bytes with the biases that are added after them, in one operator of ONNX Runtime.

    It finds that operator by itself where no bias follows, but has no place for the bias then: a pass over the output
    more, 7 % of a page.
    """
    makers = {output: node for node in nodes for output in node.output}
    readers = Counter(name for node in nodes for name in node.input)
    return [fused(node, makers, readers, source) or node for node in nodes]


def fused(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], readers: Mapping[str, int], source: SourceGraph
) -> onnx.NodeProto | None:
    """The one operator for an Add of a bias to a product of bytes that nothing else reads; None for other nodes."""
    product = product_of(node, makers) if node.op_type == "Add" else None
    biases = [name for name in node.input if source.is_vector(name)]
    if product is None or not biases or readers[product.output[0]] != 1:
        return None
    (levels, scale, zero), (weight, scales) = (makers[name].input for name in product.input)
    inputs = [levels, weight, scale, scales, zero, "", *biases]
    return helper.make_node(FUSED[0], inputs, node.output, product.name, domain=FUSED[1])


def product_of(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The MatMul of two restored tensors that a node reads."""
    for product in (makers[name] for name in node.input if name in makers):
        kinds = [makers[name].op_type for name in product.input if name in makers]
        if product.op_type == "MatMul" and kinds == ["DequantizeLinear"] * 2:
            return product
    return None


def require_operators(model: onnx.ModelProto, opset: int) -> None:
    """Lets a model have the operators of `opset`, and of ONNX Runtime's own domain if it uses them."""
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = max(entry.version, opset)
    known = {entry.domain for entry in model.opset_import}
    for domain in sorted({node.domain for node in model.graph.node} & {FUSED[1]} - known):
        model.opset_import.append(helper.make_opsetid(domain, 1))


def store(name: str, recipe: Recipe, source: SourceGraph, data: DataFile) -> list[TensorProto]:
    """Levels and scales of a weight; quantised once where graphs share it."""
    found = [data.find(f"{name}.levels"), data.find(f"{name}.scales")]
    if found[0] is not None and found[1] is not None:
        return [found[0], found[1]]
    scheme = recipe.schemes[name]
    inputs = recipe.inputs[name]() if name in recipe.inputs else None
    quantised = scheme.quantise(recipe.apply(name, source.load(name)), inputs)
    if recipe.by_block(name):
        raw = pack_blocks(quantised.levels)
        levels = data.add(f"{name}.levels", TensorProto.UINT8, raw.shape, raw)
        return [levels, write_scales(name, quantised.scales.T, source, data)]
    return [write_levels(name, quantised, scheme, data), write_scales(name, quantised.scales, source, data)]


def write_levels(name: str, quantised: Quantised, scheme: Scheme, data: DataFile) -> TensorProto:
    kind, raw = (TensorProto.INT4, pack_nibbles) if scheme.bits == 4 else (TensorProto.INT8, np.ascontiguousarray)
    return data.add(f"{name}.levels", kind, quantised.levels.shape, raw(quantised.levels))


def write_scales(name: str, scales: Floats, source: SourceGraph, data: DataFile) -> TensorProto:
    """In the type of the arithmetic: DequantizeLinear gives what its scales are."""
    half = source.initializers[name].data_type == TensorProto.FLOAT16
    kind, stored = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    return data.add(f"{name}.scales", kind, scales.shape, scales.astype(stored))


def dequantise(name: str, tensors: list[TensorProto], block: int) -> onnx.NodeProto:
    levels, scales = (tensor.name for tensor in tensors)
    where = {"axis": 0, "block_size": block} if block else {"axis": 1}
    return helper.make_node("DequantizeLinear", [levels, scales], [f"{name}.restored"], f"{name}.dequantise", **where)


def copy(name: str, recipe: Recipe, source: SourceGraph, data: DataFile) -> TensorProto:
    """A tensor as it is, or divided as the recipe says."""
    tensor = source.initializers[name]
    if name in recipe.columns or name in recipe.rows:
        moved = recipe.apply(name, source.load(name))
        return data.find(name) or data.add(name, TensorProto.FLOAT, tensor.dims, moved)
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

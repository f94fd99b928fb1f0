"""Tracing a module to ONNX without its weights, and writing the weights beside it one tensor at a time."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import nn

from cembed.export.choices import TARGETS, require_choice
from cembed.export.layers import (
    Arithmetic,
    Decomposed,
    Dialect,
    Linear,
    OnnxRuntime,
    PatchEmbedding,
    Scattering,
    Standard,
)
from cembed.runtime.bundle.graph_tensors import is_past
from cembed.runtime.bundle.manifest import Graph, Tensor
from cembed.runtime.errors import CembedError

OPSETS = range(18, 26)  # torch 2.13 writes broken graphs above
TENSORRT_OPSETS = (*range(18, 21), 24, 25)  # TensorRT from 10.1 on, and from 10.15 on, which has attention and caches
_PAGE = 4096  # tensors start at pages, so that they can be mapped
EXAMPLE_SIZES = {
    "batch_size": 2,
    "sequence_length": 80,
    "num_vectors": 5,
    "num_patches": 96,
    "num_windows": 3,
    "capacity": 96,
}


def choose_dialect(target: str, opset: int) -> Dialect:
    """The operators to write for `--target` and `--opset`; those of ONNX Runtime come with opset 24 and later.

    Raises CembedError: an unknown target, an opset that cannot be written or that the target does not read.
    """
    require_choice("target", target, TARGETS)
    if opset not in OPSETS:
        raise CembedError(f"opset {opset} is not supported: {OPSETS.start} to {OPSETS.stop - 1} are")
    if target == "tensorrt" and opset not in TENSORRT_OPSETS:
        raise CembedError(f"opset {opset} is not for TensorRT: 24 needs 10.15 or later, 20 is for 10.3 (JetPack 6)")
    if opset < 23:
        return Decomposed()
    if opset < 24:
        return Standard()
    return OnnxRuntime() if target == "onnxruntime" else Scattering()


@dataclass(frozen=True)
class GraphSpec:
    """A module to trace: how it is built for a dialect, its inputs and outputs by name.

    The module takes its inputs by name, and those that are state as one mapping, `past`. The weights go to the data
    file called `data`.
    """

    name: str
    build: Callable[[Dialect], nn.Module]
    prefix: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    data: str

    @property
    def graph(self) -> Graph:
        """As the manifest will have it."""
        return Graph(f"{self.name}.onnx", (self.data,), self.inputs, self.outputs)

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values`, one for each input, as the module's forward takes them."""
        past = {name: value for name, value in values.items() if is_past(name)}
        return {n: v for n, v in values.items() if n not in past} | ({"past": past} if past else {})


def empty_module(spec: GraphSpec, dialect: Dialect, arithmetic: Arithmetic) -> nn.Module:
    """The module with parameters of the right types and no values (call it under a device or fake tensors)."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(arithmetic.compute)
    try:
        module = spec.build(dialect).eval()
    finally:
        torch.set_default_dtype(default)
    for owner in module.modules():
        if isinstance(owner, Linear) and not isinstance(owner, PatchEmbedding):  # its weight is a sum, and small
            empty = torch.empty(owner.weight.shape, dtype=arithmetic.storage)
            owner.weight = nn.Parameter(empty, requires_grad=False)
    return module


def example_inputs(inputs: Sequence[Tensor]) -> dict[str, torch.Tensor]:
    def sizes(tensor: Tensor) -> list[int]:
        return [EXAMPLE_SIZES[axis] if isinstance(axis, str) else axis for axis in tensor.shape]

    return {tensor.name: torch.zeros(sizes(tensor), dtype=getattr(torch, tensor.dtype)) for tensor in inputs}


def trace(spec: GraphSpec, dialect: Dialect, arithmetic: Arithmetic, opset: int) -> ir.Model:
    """The graph of `spec`, its parameters as initializers without data, named as in the module."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    dynamic = torch.export.Dim.DYNAMIC
    axes = {t.name: {i: dynamic for i, a in enumerate(t.shape) if isinstance(a, str)} for t in spec.inputs}
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        program = torch.onnx.export(
            empty_module(spec, dialect, arithmetic),
            kwargs=spec.arguments(example_inputs(spec.inputs)),
            dynamo=True,
            opset_version=opset,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=spec.arguments(axes),
            verbose=False,
            optimize=False,
        )
    if program is None:
        raise CembedError(f"torch gave no graph for {spec.name}")
    return program.model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the exporter's notes on packages that cembed does not need."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def seldom_collecting() -> Iterator[None]:
    """Garbage is looked for less often: a trace makes millions of objects that stay, and took 14 % longer."""
    previous = gc.get_threshold()
    gc.set_threshold(100_000, *previous[1:])
    try:
        yield
    finally:
        gc.set_threshold(*previous)


class WeightFile:
    """Appends tensors to a data file, each once, and says where they are."""

    def __init__(self, path: Path) -> None:
        self._file, self.path = path.open("wb"), path
        self._written: dict[str, ir.ExternalTensor] = {}

    def tensor(self, name: str, load: Callable[[str], torch.Tensor]) -> ir.ExternalTensor:
        if name not in self._written:
            self._written[name] = self.append(name, load(name))
            self._file.flush()
        return self._written[name]

    def append(self, name: str, tensor: torch.Tensor) -> ir.ExternalTensor:
        start = -(-self._file.tell() // _PAGE) * _PAGE if tensor.nbytes >= _PAGE else -(-self._file.tell() // 64) * 64
        self._file.write(b"\0" * (start - self._file.tell()))
        self._file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        dtype = ir.DataType[ONNX_TYPES[tensor.dtype]]
        shape = ir.Shape(tensor.shape)
        return ir.ExternalTensor(
            self.path.name, start, tensor.nbytes, dtype, shape=shape, name=name, base_dir=self.path.parent
        )

    def close(self) -> None:
        self._file.close()


ONNX_TYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}


def write_graph(model: ir.Model, spec: GraphSpec, data: WeightFile, load: Callable[[str], torch.Tensor]) -> Graph:
    """Writes the weights, loading one at a time, then the optimised graph NAME.onnx that refers to them."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None or isinstance(getattr(value.const_value, "raw", None), torch.nn.Parameter):
            value.const_value = data.tensor(name, load)
    with quiet():
        onnxscript.optimizer.optimize_ir(model)
    _drop_provenance(model)
    for value, tensor in zip([*model.graph.inputs, *model.graph.outputs], [*spec.inputs, *spec.outputs], strict=True):
        value.shape = ir.Shape(tensor.shape)
    ir.save(model, data.path.parent / f"{spec.name}.onnx")
    return spec.graph


def _drop_provenance(model: ir.Model) -> None:
    """Stack traces and module names of the exporting machine do not belong into a bundle, and were half of a graph."""
    model.metadata_props.clear()
    for graph in (model.graph, *model.graph.subgraphs()):
        graph.metadata_props.clear()
        values: list[Any] = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            values.extend(node.outputs)
        for value in values:
            value.metadata_props.clear()

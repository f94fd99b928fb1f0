"""W8A8: ranges of activations, seen while a float bundle embeds a calibration set, and their balance with weights.

Letters: I inputs of a MatMul, O outputs, N positions. Activations go by the name of the weight that they meet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cembed.quantize.graph import SourceGraph
from cembed.quantize.weights import ByteRange, Floats
from cembed.runtime.engines.quiet import ort
from cembed.runtime.engines.session import StepSession
from cembed.runtime.errors import CembedError

BALANCE = 0.5  # share of the outliers that goes to the weights: alpha of SmoothQuant
PERCENTILE = 99.999
_RANGED = 2048  # rows that a range is chosen on
_HALF = float(np.finfo(np.float16).max)
_CLIPS = np.linspace(0.4, 1.0, 25)
_NORMS = ("RMSNormalization", "LayerNormalization")


@dataclass
class Observed:
    """What was seen of one tensor: each channel's extremes [I], and `share` rows of each input as float16."""

    low: Floats
    high: Floats
    share: int
    kept: list[NDArray[np.float16]] = field(default_factory=list)

    @classmethod
    def start(cls, channels: int, share: int) -> Observed:
        return cls(np.zeros(channels, np.float32), np.zeros(channels, np.float32), share)

    def add(self, values: Floats) -> None:
        """`values` [N, I]."""
        self.low, self.high = np.minimum(self.low, values.min(axis=0)), np.maximum(self.high, values.max(axis=0))
        some = values[np.linspace(0, len(values) - 1, min(self.share, len(values))).astype(int)]
        self.kept.append(some.clip(-_HALF, _HALF).astype(np.float16))

    def rows(self, divisors: Floats | float = 1.0) -> Floats:
        """The rows that were kept, divided by `divisors` [I]."""
        rows: Floats = np.concatenate(self.kept).astype(np.float32) / divisors
        return rows

    @property
    def largest(self) -> Floats:
        """Each channel's largest size [I]."""
        return np.maximum(-self.low, self.high)

    def range(self, method: str, divisors: Floats | float = 1.0, symmetric: bool = False) -> ByteRange:
        """The range of the tensor divided by `divisors` [I]: `minmax`, `percentile` of the rows, or the least error."""
        low, high = float((self.low / divisors).min()), float((self.high / divisors).max())
        if method == "minmax":
            return ByteRange.of(low, high, symmetric)
        values = self.rows(divisors)
        values = values[:: -(-len(values) // _RANGED)]
        if method == "percentile":
            low, high = np.percentile(values, (100 - PERCENTILE, PERCENTILE)).tolist()
            return ByteRange.of(low, high, symmetric)
        return min((ByteRange.of(clip * low, clip * high, symmetric) for clip in _CLIPS), key=lambda r: r.error(values))


class Watcher(ABC):
    """A session of a graph that was changed in memory to give inner tensors as well; opened at its first run."""

    def __init__(
        self, source: SourceGraph, added: Iterable[onnx.NodeProto], watched: Iterable[str], threads: int | None
    ):
        self._model, self._folder, self._threads = onnx.ModelProto(), source.path.parent.resolve(), threads
        self._model.CopyFrom(source.model)
        self._model.graph.node.extend(added)
        self._watched = list(watched)
        self._model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._watched)
        self._session: ort.InferenceSession | None = None

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        self._session = self._session or self._open()
        output, *values = self._session.run(None, dict(feeds))
        self.see(dict(zip(self._watched, values[len(values) - len(self._watched) :], strict=True)))
        return np.asarray(output)

    @abstractmethod
    def see(self, values: Mapping[str, NDArray[Any]]) -> None:
        """The watched tensors of a run."""

    def bind(self, cache: Mapping[str, NDArray[Any]]) -> StepSession:
        raise CembedError("inner tensors are seen in the single pass only")

    def close(self) -> None:
        """Frees the memory of the session."""
        self._session = None

    def _open(self) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads or 0
        options.log_severity_level = 3
        # Weights lie beside the original graph, and stay mapped.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        options.add_session_config_entry("session.disable_prepacking", "1")
        return ort.InferenceSession(self._model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Observer(Watcher):
    """Keeps what the quantised MatMuls of a graph are fed."""

    def __init__(self, source: SourceGraph, weights: Sequence[str], share: int, threads: int | None) -> None:
        self._readers: dict[str, list[str]] = {}
        for node, name in source.weights():
            if name in weights:
                self._readers.setdefault(node.input[0], []).append(name)
        super().__init__(source, (), self._readers, threads)
        self._share = share
        self.seen: dict[str, Observed] = {}

    def see(self, values: Mapping[str, NDArray[Any]]) -> None:
        for tensor, names in self._readers.items():
            flat = values[tensor].reshape(-1, values[tensor].shape[-1])
            found = self.seen.get(names[0]) or Observed.start(flat.shape[1], self._share)
            found.add(flat)
            self.seen |= dict.fromkeys(names, found)


@dataclass(frozen=True)
class Balance:
    """Divisors [I] of activations, by the weights whose rows make up for it, and by the tensors that are divided."""

    rows: Mapping[str, Floats]
    columns: Mapping[str, Floats]


def balance(source: SourceGraph, seen: Mapping[str, Observed]) -> Balance:
    """Moves outliers of activations into the weights after them (SmoothQuant, arXiv 2211.10438, section 4).

    Possible where a norm, or the ungated half of a gated MLP, makes the activation for stored weights alone.
    """
    rows: dict[str, Floats] = {}
    columns: dict[str, Floats] = {}
    for tensor, weights in groups(source, seen).items():
        floats = [name for node, name in source.weights() if node.input[0] == tensor and name not in weights]
        folds = producers(source, tensor, [*weights, *floats])
        if not folds:
            continue
        heaviest = np.max([np.abs(source.load(name)).max(axis=1) for name in weights], axis=0)
        divisors = np.maximum(seen[weights[0]].largest, 1e-5) ** BALANCE / np.maximum(heaviest, 1e-5) ** (1 - BALANCE)
        divisors = np.clip(divisors / np.exp(np.log(divisors).mean()), 0.05, 20).astype(np.float32)
        rows |= dict.fromkeys([*weights, *floats], divisors)
        columns |= dict.fromkeys(folds, divisors)
    return Balance(rows, columns)


def groups(source: SourceGraph, seen: Mapping[str, Observed]) -> dict[str, list[str]]:
    """Activation tensor → the quantised weights that meet it."""
    found: dict[str, list[str]] = {}
    for node, name in source.weights():
        if name in seen:
            found.setdefault(node.input[0], []).append(name)
    return found


def producers(source: SourceGraph, tensor: str, weights: Sequence[str]) -> list[str]:
    """The stored tensors whose division divides `tensor`; empty if there are none, or others would be divided too."""
    nodes = source.model.graph.node
    makers = {output: node for node in nodes for output in node.output}
    readers = Counter(name for node in nodes for name in set(node.input))
    if readers[tensor] != len(weights) or tensor not in makers:
        return []
    found = divisible(source, makers, makers[tensor])
    return [] if any(readers[name] != 1 for name in found) else found


def divisible(source: SourceGraph, makers: Mapping[str, onnx.NodeProto], maker: onnx.NodeProto) -> list[str]:
    """The stored tensors of a norm, or of the linear layers that a gate multiplies; other nodes have none."""
    if maker.op_type in _NORMS:
        return list(maker.input[1:])
    operands = maker.input if maker.op_type == "Mul" else ()
    return [name for operand in operands for name in linear_tensors(source, makers, operand)]


def linear_tensors(source: SourceGraph, makers: Mapping[str, onnx.NodeProto], tensor: str) -> list[str]:
    """Weight and bias of the linear layer whose output `tensor` is, if it is one."""
    node = makers.get(tensor)
    bias: list[str] = []
    if node is not None and node.op_type == "Add":
        bias = [name for name in node.input if name in source.initializers]
        node = next((makers[name] for name in node.input if name in makers), None)
    named = {matmul.name: name for matmul, name in source.weights()}
    return [named[node.name], *bias] if node is not None and node.name in named else []

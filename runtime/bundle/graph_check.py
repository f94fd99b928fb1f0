"""An ONNX file looked through before an engine sees it: `graph_rules` says what it may hold.

Only what cembed's exporters emit: their operators, no functions, no loops but Scan, tensors that have the bytes their
axes ask, inputs and outputs as the manifest has them. And nothing that grows out of constants alone: an engine computes
that while it opens the file, whatever it takes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from cembed.runtime.bundle import graph_rules as rules
from cembed.runtime.bundle.manifest import Graph, Tensor
from cembed.runtime.errors import CembedError
from cembed.runtime.plain_files import read_plain

_WIRES: Mapping[str, frozenset[int]] = {"n": frozenset({0}), "f": frozenset({5}), "a": frozenset({0, 2, 5})}
_BYTES = frozenset({2})
_KNOWN = {
    message: {
        number: (kind.rstrip("*"), _WIRES.get(kind[0], _BYTES), kind[-1] == "*") for number, kind in fields.items()
    }
    for message, fields in rules.FIELDS.items()
}
_OPERATORS = {
    (name.rpartition(":")[0].encode(), name.rpartition(":")[2].encode()): name.rpartition(":")[2]
    for name in rules.OPERATORS
}
_SHAPES = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Pad": 1}
"""Which input has the numbers that say how large the output is."""
_MORE = "cembed exports no such graph: export the bundle again, and if that helps not, see tests/exports.py"

Place = tuple[int, int]
Axes = tuple[int | None, ...]


class _RefusedError(Exception):
    pass


class Known(NamedTuple):
    """What is known of a value: how many elements it has at most where it comes of constants alone, and what its
    elements are at most where it may be a shape; what only a run shows counts as 1."""

    elements: int
    numbers: tuple[int, ...] = ()
    constant: bool = True


class _Scope(NamedTuple):
    """What a graph's nodes see: what is known of values, the axes of tensors, and where those of others are said."""

    known: dict[bytes, Known]
    axes: dict[bytes, Axes]
    places: dict[bytes, Place]


def check_graph(path: Path, graph: Graph, sizes: Mapping[str, int]) -> None:
    """Raises CembedError if the ONNX file of `graph`, whose data files have `sizes`, holds what no export holds."""
    try:
        check_model(read_plain(path, rules.MAX_GRAPH), graph, sizes)
    except _RefusedError as error:
        raise CembedError(f"{path} is no graph of a bundle: {error}") from error


def check_model(data: bytes, graph: Graph, sizes: Mapping[str, int]) -> None:
    try:
        _Check(data, sizes).model(graph)
    except (IndexError, struct.error) as error:
        raise _RefusedError("it is cut off") from error


class _Check:
    def __init__(self, data: bytes, sizes: Mapping[str, int]) -> None:
        self._data, self._sizes = data, sizes
        self._nodes = self._tensors = self._stored = self._folded = 0

    def model(self, graph: Graph) -> None:
        found = self._read("Model", (0, len(self._data)))
        for place in found.get(8, ()):
            opset = self._read("Opset", place)
            domain = self._text(opset, 1)
            if domain.decode("ascii", "replace") not in rules.DOMAINS:
                raise _RefusedError(f"it has operators of {domain[:80]!r}: {_MORE}")
        if 7 not in found:
            raise _RefusedError("there is no graph in it")
        top = self._read("Graph", found[7][0])
        self._signature("inputs", graph.inputs, top.get(11, ()))
        self._signature("outputs", graph.outputs, top.get(12, ()))
        self._graph(top, {}, 1)
        if self._folded > rules.FOLDED_SHARE * self._stored + rules.FOLDED_MORE:
            raise _RefusedError(
                f"it makes {self._folded} elements of constants alone, and {self._stored} are stored: {_MORE}"
            )

    # The wire format

    def _read(self, message: str, place: Place) -> dict[int, list[Any]]:
        """The fields of a message by number: places of bytes, and numbers."""
        known, data, found = _KNOWN[message], self._data, dict[int, list[Any]]()
        at, end = place
        while at < end:
            tag = data[at]
            at += 1
            if tag > 127:
                tag, at = self._varint(at - 1)
            about, wire = known.get(tag >> 3), tag & 7
            if about is None or wire not in about[1]:
                raise _RefusedError(f"field {tag >> 3} of a {message}, of wire type {wire}: {_MORE}")
            value: Any
            if wire == 2:
                size = data[at]
                at += 1
                if size > 127:
                    size, at = self._varint(at - 1)
                value = (at, at + size)
                at += size
            elif wire == 0:
                value, at = self._varint(at)
            else:
                value, at = (at, at + 4), at + 4
            if (held := found.get(tag >> 3)) is None:
                found[tag >> 3] = [value]
            elif about[2]:
                held.append(value)
            else:
                raise _RefusedError(f"field {tag >> 3} of a {message} is there twice")
        if at != end:
            raise _RefusedError(f"it is cut off after byte {end}")
        return found

    def _varint(self, at: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & (1 << 64) - 1, at
        raise _RefusedError(f"it is damaged before byte {at}")

    def _text(self, found: Mapping[int, list[Any]], number: int) -> bytes:
        values = found.get(number)
        return self._data[values[0][0] : values[0][1]] if values else b""

    def _numbers(self, values: Iterable[Any]) -> list[int]:
        """Numbers that stand one by one or side by side, as signed ones."""
        found: list[int] = []
        for value in values:
            if isinstance(value, int):
                found.append(value)
                continue
            at, end = value
            while at < end:
                number, at = self._varint(at)
                found.append(number)
        return [number - (1 << 64) if number >> 63 else number for number in found]

    # Inputs, outputs and what is said of values between

    def _value(self, place: Place) -> tuple[bytes, int, Axes | None]:
        """Name, type and axes; those that have no number are None."""
        found = self._read("Value", place)
        kind = self._read("Type", found[2][0]) if 2 in found else {}
        tensor = self._read("TensorType", kind[1][0]) if 1 in kind else {}
        shape = self._read("Shape", tensor[2][0]).get(1, []) if 2 in tensor else None
        axes = None if shape is None else tuple(self._axis(dim) for dim in shape)
        return self._text(found, 1), tensor.get(1, [0])[0], axes

    def _axis(self, place: Place) -> int | None:
        length: int | None = self._read("Dim", place).get(1, [None])[0]
        if length is not None and length > rules.MAX_AXIS:
            raise _RefusedError(f"it has an axis of {length}: {rules.MAX_AXIS} is the most")
        return length

    def _signature(self, what: str, stated: Sequence[Tensor], places: Sequence[Place]) -> None:
        """The inputs or outputs are the manifest's: names, types, and axes that are numbers."""
        found = {name.decode("utf-8", "replace"): (kind, axes) for name, kind, axes in map(self._value, places)}
        if len(places) != len(found) or found.keys() != {tensor.name for tensor in stated}:
            names = ", ".join(f"{name:.40}" for name in sorted(found.keys() ^ {tensor.name for tensor in stated})[:8])
            raise _RefusedError(f"its {what} are others than the manifest's: {names or 'one is there twice'}")
        for tensor in stated:
            axes = tuple(axis if isinstance(axis, int) else None for axis in tensor.shape)
            if found[tensor.name] != (rules.TYPES[tensor.dtype], axes):
                raise _RefusedError(f"its {what} have {tensor.name} of another type or shape than the manifest")

    # Graphs

    def _graph(self, found: Mapping[int, list[Any]], outer: Mapping[bytes, Known], depth: int) -> None:
        if depth > rules.MAX_BODIES:
            raise _RefusedError(f"it has graphs within each other, more than {rules.MAX_BODIES}: {_MORE}")
        self._count(len(found.get(1, ())), len(found.get(5, ())))
        scope = _Scope(dict(outer), {}, {})
        for number in (11, 12, 13):
            scope.places.update((self._name(place), place) for place in found.get(number, ()))
        for place in found.get(5, ()):
            name, about, shape = self._tensor(place)
            scope.known[name], scope.axes[name] = about, shape
        for place in found.get(1, ()):
            self._node(place, scope, depth)

    def _name(self, place: Place) -> bytes:
        """Of a value, of which nothing else is read if it has a name and a type, as nearly all have."""
        data, (at, end) = self._data, place
        if end - at > 4 and data[at] == 10 and data[at + 1] < 128:
            after = at + 2 + data[at + 1]
            if after + 1 < end and data[after] == 18 and data[after + 1] < 128 and after + 2 + data[after + 1] == end:
                return data[at + 2 : after]
        return self._text(self._read("Value", place), 1)

    def _count(self, nodes: int, tensors: int) -> None:
        self._nodes, self._tensors = self._nodes + nodes, self._tensors + tensors
        if self._nodes > rules.MAX_NODES or self._tensors > rules.MAX_TENSORS:
            given = f"{self._nodes} nodes and {self._tensors} tensors"
            raise _RefusedError(f"it has {given}: {rules.MAX_NODES} and {rules.MAX_TENSORS} are the most")

    def _node(self, place: Place, scope: _Scope, depth: int) -> None:
        found, data = self._read("Node", place), self._data
        name = _OPERATORS.get((self._text(found, 7), self._text(found, 4)))
        if name is None:
            given = b":".join(filter(None, (self._text(found, 7), self._text(found, 4))))
            raise _RefusedError(f"it has the operator {given[:80].decode('ascii', 'replace')!r}: {_MORE}")
        inputs = [data[a:b] for a, b in found.get(1, ())]
        outputs = [data[a:b] for a, b in found.get(2, ())]
        if name == "MatMulNBits":
            self._blocks(found.get(5, ()), inputs, scope)
        value = None
        for attribute in found.get(5, ()):
            value = self._attribute(attribute, scope.known, depth) or value
        about = self._result(name, inputs, scope, value)
        if about is not None:
            scope.known.update(dict.fromkeys(outputs, about))
            self._folded += about.elements * len(outputs) if about.constant else 0

    def _blocks(self, attributes: Iterable[Place], inputs: Sequence[bytes], scope: _Scope) -> None:
        """Raises unless a product's sizes are those of its weight: an engine reads as much as they say."""
        read = [self._read("Attribute", place) for place in attributes]
        said = {self._text(one, 1): one.get(3, [-1])[0] for one in read}
        outputs, blocks = said.pop(b"N", 0), said.get(b"K", 0) // rules.BLOCK
        stored = [scope.axes.get(name) for name in inputs[1:]]
        known = {b"K": blocks * rules.BLOCK, b"bits": 4, b"block_size": rules.BLOCK, b"accuracy_level": 4}
        sized = said == known and len(read) == len(known) + 1
        if not sized or stored != [(outputs, blocks, rules.BLOCK // 2), (outputs, blocks)] or not blocks:
            raise _RefusedError(f"a MatMulNBits has not the sizes of its weight: {_MORE}")

    def _attribute(self, place: Place, known: Mapping[bytes, Known], depth: int) -> Known | None:
        """What is known of the tensor of an attribute, if it has one."""
        found = self._read("Attribute", place)
        if 6 in found:
            self._graph(self._read("Graph", found[6][0]), known, depth + 1)
        elif place[1] - place[0] > rules.MAX_ATTRIBUTE:
            raise _RefusedError(f"an attribute has {place[1] - place[0]} bytes: {rules.MAX_ATTRIBUTE} are the most")
        return self._tensor(found[5][0])[1] if 5 in found else None

    # Tensors

    def _tensor(self, place: Place) -> tuple[bytes, Known, tuple[int, ...]]:
        found = self._read("Tensor", place)
        shape, kind = tuple(self._numbers(found.get(1, ()))), found.get(2, [0])[0]
        wide = len(shape) > rules.MAX_AXES or any(not 0 <= axis <= rules.MAX_AXIS for axis in shape)
        elements = prod(shape)
        if wide or kind not in rules.BITS or (not elements and len(shape) > 1):
            raise _RefusedError(f"a tensor of type {kind} has the shape {list(shape[:9])}: {_MORE}")
        self._check_bytes(found, kind, elements)
        self._stored += elements
        return self._text(found, 8), Known(elements, self._shape_numbers(found, kind, elements)), shape

    def _check_bytes(self, found: Mapping[int, list[Any]], kind: int, elements: int) -> None:
        """Raises unless there are as many bytes as the elements take, no matter where."""
        needed, typed = -(-elements * rules.BITS[kind] // 8), sum(number in found for number in (4, 5, 7))
        entries = {self._text(entry, 1): self._text(entry, 2) for entry in self._entries(found)}
        if typed + (9 in found) + bool(entries) > 1:
            raise _RefusedError("a tensor has its data in several places")
        if typed:
            numbers = next(found[number] for number in (4, 5, 7) if number in found)
            there = needed if self._count_typed(found, numbers) == elements else -1
        elif entries:
            if b"location" not in entries:
                raise _RefusedError("a tensor's data is in no file")
            size, offset = self._sizes[entries[b"location"].decode()], int(entries.get(b"offset", b"0"))
            there = int(entries.get(b"length", b"0")) or min(size - offset, needed)
        else:
            there = sum(end - at for at, end in found.get(9, ()))
        if there != needed:
            raise _RefusedError(f"a tensor of {elements} elements has other bytes than these take, {needed}")

    def _entries(self, found: Mapping[int, list[Any]]) -> Iterable[dict[int, list[Any]]]:
        return [self._read("Entry", place) for place in found.get(13, ())]

    def _count_typed(self, found: Mapping[int, list[Any]], values: Sequence[Any]) -> int:
        if 4 in found:
            return sum((end - at) // 4 for at, end in values)
        return len(self._numbers(values))

    def _shape_numbers(self, found: Mapping[int, list[Any]], kind: int, elements: int) -> tuple[int, ...]:
        """The elements of what may be a shape: few whole numbers that are in the file."""
        code = {6: "i", 7: "q"}.get(kind)
        if code is None or elements > rules.MAX_NUMBERS:
            return ()
        if 9 in found:
            return struct.unpack(f"<{elements}{code}", self._text(found, 9))
        if 13 in found:
            raise _RefusedError("a shape is in a data file")
        return tuple(self._numbers(found.get(5, found.get(7, ()))))

    # What comes of constants

    def _result(self, name: str, inputs: Sequence[bytes], scope: _Scope, value: Known | None) -> Known | None:
        """What is known of what a node gives, if anything."""
        known = scope.known
        if name == "Constant":
            if value is None:
                raise _RefusedError("a Constant has no tensor")
            return value
        if name == "Shape":
            return _shape_of(self._axes_of(inputs[0], scope), known.get(inputs[0]))
        about = [known.get(given) for given in inputs if given]
        parts = [part for part in about if part is not None]
        alone = len(parts) == len(about) and all(part.constant for part in parts)
        if not parts and not alone:
            return None
        if name in _SHAPES or name == "Range":
            return self._sized(name, inputs, known, alone)
        numbers = _numbers_of(name, parts, len(about) - len(parts))
        if not alone:
            return Known(0, numbers, constant=False) if numbers else None
        return Known(_elements(name, [part.elements for part in parts]), numbers)

    def _axes_of(self, name: bytes, scope: _Scope) -> Axes | None:
        if name in scope.axes:
            return scope.axes[name]
        return self._value(scope.places[name])[2] if name in scope.places else None

    def _sized(self, name: str, inputs: Sequence[bytes], known: Mapping[bytes, Known], alone: bool) -> Known | None:
        """What has the size that numbers say: they are bounded."""
        about = [known.get(given) for given in inputs]
        if name == "Range":
            numbers = [number for part in about if part for number in part.numbers]
            size = sum(abs(number) for number in numbers)
            if alone and len(numbers) != 3:
                raise _RefusedError("a Range of constants has no whole numbers")
        else:
            shape = about[_SHAPES[name]] if len(about) > _SHAPES[name] else None
            size = prod(max(1, abs(number)) for number in shape.numbers) if shape else 1
            if shape and not shape.numbers and shape.elements > 0:
                raise _RefusedError(f"{name} has a shape of {shape.elements} numbers that are not in the file")
            first = about[0]
            size *= max(1, first.elements) if name in ("Tile", "Pad") and first and first.constant else 1
        if size > rules.MAX_SIZED:
            raise _RefusedError(f"{name} makes {size} elements by constants: {rules.MAX_SIZED} are the most")
        return Known(size) if alone else None


def _shape_of(axes: Axes | None, about: Known | None) -> Known:
    """Of Shape; its attributes start and end leave out some."""
    if axes is None:
        most = rules.UNKNOWN_AXIS if about is None else max(rules.UNKNOWN_AXIS, about.elements)
        return Known(0, (most,), constant=False)
    return Known(len(axes), tuple(1 if axis is None else axis for axis in axes) or (1,), constant=False)


def _numbers_of(name: str, parts: Sequence[Known], unknown: int) -> tuple[int, ...]:
    """What the elements of a shape that is made of others are at most."""
    of = [part.numbers for part in parts if part.numbers]
    if not of:
        return ()
    most = [max(map(abs, numbers)) for numbers in of]
    if name == "Concat":
        joined = tuple(number for numbers in of for number in numbers)
        return joined[: rules.MAX_NUMBERS] if len(joined) <= rules.MAX_NUMBERS else (prod(most),)
    if name == "Gather":
        return (most[0],) * max(1, min(parts[-1].elements, rules.MAX_NUMBERS)) if parts[0].numbers else ()
    if name in rules.KEEPS and name not in ("Max", "Min"):
        return parts[0].numbers
    length = max(map(len, of))
    if name == "Mul":
        return (prod(most),) * length
    if name in ("Add", "Sub"):
        return (sum(most),) * length
    return (max(most),) * length if name in ("Max", "Min", "Where", "Div", "Neg", "Abs") else ()


def _elements(name: str, counts: Sequence[int]) -> int:
    """How many elements an operator gives of constants with so many. Raises: none has constants alone."""
    growth = rules.GROWTH.get(name)
    if growth is None or not counts:
        raise _RefusedError(f"it has a {name} of constants alone: {_MORE}")
    if growth == rules.SAME:
        return counts[0]
    return sum(counts) if growth == rules.SUM else prod(max(1, count) for count in counts)

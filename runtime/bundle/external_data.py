"""Where the tensors of an ONNX file keep their data: looked up before an engine follows it.

An engine opens the file that a tensor names, and some open any file of the machine. So every tensor is found here,
wherever the format has one: in graphs, in the bodies of If, Loop and Scan, in attributes, sparse ones, functions, and
what training left. Only the wire format of protocol buffers is read; unknown fields are passed over.
"""

from __future__ import annotations

import mmap
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from pathlib import Path

from cembed.runtime.errors import CembedError
from cembed.runtime.plain_files import open_plain

MESSAGES: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph!", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor!", 6: "Graph!", 10: "Tensor", 11: "Graph", 22: "Sparse!", 23: "Sparse"},
    "Sparse": {1: "Tensor!", 2: "Tensor!"},
    "Training": {1: "Graph!", 2: "Graph!"},
    "Function": {7: "Node", 11: "Attribute"},
    "Tensor": {13: "Entry"},
    "Entry": {1: "Text!", 2: "Text!"},
}
"""Fields of ONNX's messages that lead to a tensor's file, by number; `!` marks one that is there once at most.

Engines merge a message that comes twice, and would see a tensor that neither half shows.
"""

MAX_ONNX = (1 << 31) - 1  # bytes of a message
MAX_DEPTH = 100  # of messages within each other, as in engines
KEYS = ("location", "offset", "length", "checksum")
FORBIDDEN = "EPContext"  # a node that names a file of compiled code for an engine to open
_WORD = KEYS[0].encode()
_FIXED = {1: 8, 5: 4}  # bytes of a field, by wire type
_TEXT = 2  # the wire type of texts and messages

Field = tuple[int, int, int]
"""Number, and where the content is: from the second to the third."""


class _RefusedError(Exception):
    pass


def check_external_data(path: Path, sizes: Mapping[str, int]) -> None:
    """Looks at every tensor of an ONNX file whose data is elsewhere; `sizes` has the bytes of each file it may be in.

    Raises CembedError: data in a file that is not among them, or not within it; no ONNX file.
    """
    with open_plain(path, MAX_ONNX) as (file, size):
        try:
            if not size:
                raise _RefusedError("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Walk(data, sizes).walk("Model", (0, 0, size), 0)
        except _RefusedError as error:
            raise CembedError(f"{path} is no ONNX file to open: {error}") from error


class _Walk:
    """One pass over a file. A message without the word `location` in it names no file, and is passed over."""

    def __init__(self, data: mmap.mmap, sizes: Mapping[str, int]) -> None:
        self._data, self._sizes = data, sizes
        self._words = [found.start() for found in re.finditer(_WORD, data)]
        if data.find(FORBIDDEN.encode()) >= 0:
            raise _RefusedError(f"it has {FORBIDDEN}, which opens other files")

    def walk(self, message: str, place: Field, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise _RefusedError(f"its messages are nested more than {MAX_DEPTH} deep")
        inner = list(self._inner(message, place))
        if message == "Tensor":
            self._check([self._entry(found) for _, found in inner])
            return
        for name, found in inner:
            if self._has_word(found):
                self.walk(name, found, depth + 1)

    def _inner(self, message: str, place: Field) -> Iterator[tuple[str, Field]]:
        """The messages within one that `MESSAGES` knows."""
        known, seen = MESSAGES[message], set[int]()
        for found in fields(self._data, place):
            name = known.get(found[0])
            if name is not None:
                if name[-1] == "!" and found[0] in seen:
                    raise _RefusedError(f"field {found[0]} of a {message} is there twice")
                seen.add(found[0])
                yield name.rstrip("!"), found

    def _has_word(self, place: Field) -> bool:
        first = bisect_left(self._words, place[1])
        return first < len(self._words) and self._words[first] < place[2]

    def _entry(self, place: Field) -> tuple[str, str]:
        """Key and value."""
        texts = {found[0]: self._data[found[1] : found[2]] for _, found in self._inner("Entry", place)}
        return texts.get(1, b"").decode("ascii", "replace"), texts.get(2, b"").decode("ascii", "replace")

    def _check(self, entries: list[tuple[str, str]]) -> None:
        found = dict(entries)
        if not entries:
            return
        if len(found) != len(entries) or not found.keys() <= set(KEYS):
            raise _RefusedError(f"a tensor's data has the keys {', '.join(f'{key!r:.80}' for key, _ in entries[:8])}")
        location = found.get("location", "")
        if location not in self._sizes:
            known = ", ".join(self._sizes) or "none"
            raise _RefusedError(f"a tensor's data is in {location!r:.200}, the graph's data files are {known}")
        size, offset = self._sizes[location], number(found.get("offset", "0"))
        if offset > size or number(found.get("length", "0")) > size - offset:
            raise _RefusedError(f"a tensor's data is outside of {location}, which has {size} bytes")


def number(text: str) -> int:
    """
    >>> number("4096")
    4096
    """
    if re.fullmatch(r"[0-9]{1,18}", text, re.ASCII) is None:
        raise _RefusedError(f"a tensor's data has the offset or length {text!r:.80}")
    return int(text)


def fields(data: mmap.mmap, place: Field) -> Iterator[Field]:
    """The texts and messages within a message; numbers are passed over."""
    _, at, end = place
    while at < end:
        tag, at = varint(data, at, end)
        if not 8 <= tag < 1 << 32:
            raise _RefusedError(f"it is damaged before byte {at}")
        kind = tag & 7
        if kind == _TEXT:
            size, at = varint(data, at, end)
            if size > end - at:
                raise _RefusedError(f"it is cut off after byte {at}")
            yield tag >> 3, at, at + size
            at += size
        elif kind in _FIXED:
            at += _FIXED[kind]
        elif kind == 0:
            _, at = varint(data, at, end)
        else:
            raise _RefusedError(f"it is damaged before byte {at}")
    if at != end:
        raise _RefusedError(f"it is cut off after byte {end}")


def varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        if shift == 63 and byte > 1:
            break
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise _RefusedError(f"it is damaged before byte {at}")

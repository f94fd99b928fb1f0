"""The objects of a PDF file. PDFium draws, but has no calls for the dictionaries that say how a picture is coded.

Objects are found by going through the file once: no table of a damaged file has to be believed. Of several with a
number the last one counts. The file must not be encrypted.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import re
from collections.abc import Iterator
from typing import Any

from cembed.runtime.pages.pdf.filters import Filter, decode, filter_of
from cembed.runtime.pages.pdf.values import SKIP, SPACE, Reference, Stream, read_value

_STREAM = re.compile(SKIP + rb"stream(?:\r\n|\n|\r)?")
# What is looked at while the file is gone through; the bodies of streams are passed over.
_MARK = re.compile(rb"obj|stream(?:\r\n|\n|\r)|trailer")
_NUMBER = re.compile(rb"(\d{1,10})" + SPACE + rb"+\d{1,5}" + SPACE + rb"+\Z")
_LENGTH = re.compile(rb"/Length" + SPACE + rb"+(\d{1,12})(?!" + SPACE + rb"*\d)")
_END = re.compile(SPACE + rb"*endstream")
_INHERITED = ("Resources", "MediaBox", "CropBox", "Rotate")
_DEPTH = 50
_KEPT, _UNPACKED = 4096, 64  # objects and object streams that are kept
_NEAR = 4096  # bytes of an object
_MOST_OBJECTS = 1 << 23
_MOST = 64 << 20  # bytes of a decoded stream


class Objects:
    """The objects of a file by their numbers. Nothing is raised for what is missing or damaged: it is None."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self._data = data
        self._places: dict[int, tuple[int, int]] = {}  # of a value: in the file, or in the stream of this number
        self._values: dict[int, Any] = {}
        self._unpacked: dict[int, bytes] = {}
        self._root = 0
        self._encryption: Any = None
        self._leaves: list[dict[str, Any]] = []
        self._go_through()
        self._values.clear()  # something later in the file may have replaced what was read on the way
        self._unpacked.clear()
        catalog = self.get(Reference(self._root))
        self.catalog: dict[str, Any] = catalog if isinstance(catalog, dict) else {}
        self._more_leaves = self._walk(self.catalog.get("Pages"), {}, frozenset())

    def _go_through(self) -> None:
        """Notes where the objects are."""
        at = number = start = 0
        while found := _MARK.search(self._data, at):
            before, at = found.start(), found.end()
            if self._data[max(before - 3, 0) : before] == b"end":
                continue
            if found[0] == b"obj":
                number, start = self._note(before, at) or (number, start)
            elif found[0] == b"trailer":
                self._trailer(at)
            else:
                at = self._past_stream(number, start, at)

    def _note(self, before: int, start: int) -> tuple[int, int] | None:
        if (found := _NUMBER.search(self._data[max(before - 24, 0) : before])) is None:
            return None
        number = int(found[1])
        if number < _MOST_OBJECTS:
            self._places[number] = (start, 0)
        return number, start

    def _past_stream(self, number: int, start: int, body: int) -> int:
        about = self._data[start:body]
        if b"/ObjStm" in about:
            self._unpack(number)
        elif b"/XRef" in about:
            self._trailer(start)
        return self._end_of_stream(about, body)

    def _trailer(self, start: int) -> None:
        with contextlib.suppress(ValueError):
            about = read_value(self._data, start)[0]
            if isinstance(about, dict) and isinstance(root := about.get("Root"), Reference):
                self._root = root.number
                self._encryption = about.get("Encrypt")

    def _end_of_stream(self, about: bytes, start: int) -> int:
        if length := _LENGTH.search(about):
            end = start + int(length[1])
            if _END.match(self._data, end):
                return end
        end = self._data.find(b"endstream", start)
        return len(self._data) if end < 0 else end

    def _unpack(self, number: int) -> None:
        """Notes the places of what an object stream holds."""
        if isinstance(stream := self.get(Reference(number)), Stream):
            first = self.number(stream.about, "First")
            head = self.content(stream, first)[:first].split()
            with contextlib.suppress(ValueError):
                offsets = [int(offset) + first for offset in head[1::2]]
                self._places.update(zip(map(int, head[::2]), zip(offsets, itertools.repeat(number)), strict=False))

    @property
    def encryption(self) -> str | None:
        """The name of the security handler, "unknown" if it cannot be read, None if the file is not encrypted."""
        return str(self.entry(self._encryption, "Filter") or "unknown") if self._encryption else None

    def rewritten(self) -> bytes:
        """A file of the same objects with a table of where they are, as far as they can be read; no streams of objects.

        Raises LookupError if there is no catalog.
        """
        root = self._root or self._catalog_number()
        body, places = bytearray(b"%PDF-1.7\n"), {}
        for number in sorted(self._places):
            if text := self._text(number):
                places[number] = len(body)
                body += b"%d 0 obj\n%s\nendobj\n" % (number, text)
        start = len(body)
        lines = (b"%d 1\n%010d 00000 n \n" % (number, place) for number, place in places.items())
        body += b"xref\n0 1\n0000000000 65535 f \n%s" % b"".join(lines)
        body += b"trailer\n<< /Size %d /Root %d 0 R >>\n" % (max(places, default=0) + 1, root)
        body += b"startxref\n%d\n%%%%EOF\n" % start
        return bytes(body)

    def _catalog_number(self) -> int:
        for number in sorted(self._places, reverse=True):
            if self.entry(self.get(Reference(number)), "Type") == "Catalog":
                return number
        raise LookupError("there is no catalog")

    def _text(self, number: int) -> bytes:
        """An object as it is written, empty if it cannot be read or is of no use without its table."""
        place, within = self._places[number]
        value = self.get(Reference(number))
        if value is None or self.entry(value, "Type") in ("ObjStm", "XRef"):
            return b""
        source = self._unpacked_stream(within) if within else self._data
        about = source[place : read_value(source, place)[1]]
        return b"%s\nstream\n%s\nendstream" % (about, value.raw) if isinstance(value, Stream) else about

    def get(self, value: Any) -> Any:
        """What a reference leads to, or the value itself."""
        for _ in range(20):
            if not isinstance(value, Reference):
                return value
            value = self._object(value.number)
        return None

    def entry(self, about: Any, key: str) -> Any:
        """The value of a key, None if `about` is no dictionary."""
        about = self.get(about)
        about = about.about if isinstance(about, Stream) else about
        return self.get(about.get(key)) if isinstance(about, dict) else None

    def number(self, about: Any, key: str, default: int = 0) -> int:
        value = self.entry(about, key)
        return int(value) if isinstance(value, (int, float)) else default

    def dictionary(self, about: Any, key: str) -> dict[str, Any]:
        value = self.entry(about, key)
        return value if isinstance(value, dict) else {}

    def _object(self, number: int) -> Any:
        if number not in self._values:
            if len(self._values) > _KEPT:
                self._values.clear()
            self._values[number] = None  # what leads to itself ends here
            with contextlib.suppress(ValueError):
                self._values[number] = self._read(number)
        return self._values[number]

    def _read(self, number: int) -> Any:
        place, within = self._places.get(number, (-1, 0))
        if place < 0:
            return None
        if within:
            return read_value(self._unpacked_stream(within), place)[0]
        value, end = read_value(self._data, place)
        if isinstance(value, dict) and (found := _STREAM.match(self._data, end)):
            return Stream(value, self._raw(value, found.end()), number)
        return value

    def _raw(self, about: dict[str, Any], start: int) -> memoryview:
        end = start + self.number(about, "Length", -1)
        if end < start or not _END.match(self._data, end):
            end = self._data.find(b"endstream", start)
            end = len(self._data) if end < 0 else end
        return memoryview(self._data)[start:end]

    def _unpacked_stream(self, number: int) -> bytes:
        if number not in self._unpacked:
            if len(self._unpacked) > _UNPACKED:
                self._unpacked.clear()
            stream = self.get(Reference(number))
            self._unpacked[number] = self.content(stream) if isinstance(stream, Stream) else b""
        return self._unpacked[number]

    def mentions(self, value: Any, word: bytes) -> bool:
        """Whether `word` may be in an object: a quick look at what is not worth being read."""
        place, within = self._places.get(value.number, (-1, 0)) if isinstance(value, Reference) else (0, 0)
        if within:
            return self._unpacked_stream(within).find(word, place, place + _NEAR) >= 0
        return place == 0 or (place > 0 and self._data.find(word, place, place + _NEAR) >= 0)

    def filters(self, stream: Stream) -> list[Filter]:
        names, parameters = self.entry(stream, "Filter"), self.entry(stream, "DecodeParms")
        names = names if isinstance(names, list) else [names] if names else []
        parameters = parameters if isinstance(parameters, list) else [parameters]
        pairs = itertools.zip_longest(names, parameters[: len(names)])
        return [filter_of(str(self.get(name)), self.get(about)) for name, about in pairs]

    def content(self, stream: Stream, most: int = _MOST) -> bytes:
        """What a stream holds, as far as it can be decoded."""
        return self.decoded(stream, most)[0]

    def decoded(self, stream: Stream, most: int = _MOST) -> tuple[bytes, str | None]:
        data, fault = stream.raw, None
        for what in self.filters(stream):
            try:
                step = decode(data, what, most)
            except LookupError:
                return b"", f"{what.name} cannot be read"
            data, fault = step.data, fault or (step.fault and f"{what.name}: {step.fault}")
        return bytes(data), fault

    def page(self, number: int) -> dict[str, Any]:
        """The dictionary of a page, counted from 1, with what it inherits; empty if it cannot be found."""
        while len(self._leaves) < number and (leaf := next(self._more_leaves, None)) is not None:
            self._leaves.append(leaf)
        return self._leaves[number - 1] if number <= len(self._leaves) else {}

    def _walk(self, node: Any, inherited: dict[str, Any], above: frozenset[int]) -> Iterator[dict[str, Any]]:
        number, node = node.number if isinstance(node, Reference) else 0, self.get(node)
        if not isinstance(node, dict) or number in above or len(above) > _DEPTH:
            return
        inherited = {**inherited, **{key: node[key] for key in _INHERITED if key in node}}
        if (kids := self.entry(node, "Kids")) is None:
            yield {**inherited, **node}
        for kid in kids if isinstance(kids, list) else []:
            yield from self._walk(kid, inherited, above | {number})

"""Values of PDF files: names, numbers, dictionaries, as they are written."""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

SPACE, REGULAR = rb"[\0\t\n\f\r ]", rb"[^\0\t\n\f\r ()<>\[\]{}/%]"
SKIP = rb"(?:[\0\t\n\f\r ]|%[^\r\n]*[\r\n])*"
_TOKEN = re.compile(SKIP + rb"(<<|>>|[\[\](){}]|<[^<>]*>|/" + REGULAR + rb"*|" + REGULAR + rb"+)")
_REFERENCE = re.compile(SKIP + rb"(\d{1,10})" + SPACE + rb"+\d{1,5}" + SPACE + rb"+R(?!" + REGULAR + rb")")
_BRACKET = re.compile(rb"[()]|\\.", re.S)
_ESCAPE = re.compile(rb"#([0-9A-Fa-f]{2})")
_DEPTH = 50


class Name(str):
    """A PDF name, without its slash."""

    __slots__ = ()


class Reference(NamedTuple):
    number: int


@dataclass(frozen=True, eq=False)
class Stream:
    """A dictionary and the bytes that go with it, as they are in the file; `number` is 0 for a picture in a content."""

    about: dict[str, Any]
    raw: bytes | memoryview
    number: int = 0


class Reader:
    """Reads values from `data`, from the byte `at`. Raises ValueError for what is none."""

    def __init__(self, data: bytes | mmap.mmap, at: int = 0) -> None:
        self._data, self.at = data, at

    def between(self, start: int) -> bytes:
        """What was read since `start`."""
        return self._data[start : self.at]

    def value(self, depth: int = 0) -> Any:
        if found := _REFERENCE.match(self._data, self.at):
            self.at = found.end()
            return Reference(int(found[1]))
        token = self._token()
        if token == b"<<":
            items = self._items(b">>", depth)
            return {str(key): value for key, value in zip(items[::2], items[1::2], strict=False)}
        if token == b"[":
            return self._items(b"]", depth)
        return self._string() if token == b"(" else _scalar(token)

    def _token(self) -> bytes:
        if (found := _TOKEN.match(self._data, self.at)) is None:
            raise ValueError(f"no value at byte {self.at}")
        self.at = found.end()
        return found[1]

    def _items(self, close: bytes, depth: int) -> list[Any]:
        if depth > _DEPTH:
            raise ValueError("too deep")
        items: list[Any] = []
        while True:
            before = self.at
            if self._token() == close:
                return items
            self.at = before
            items.append(self.value(depth + 1))

    def _string(self) -> bytes:
        start, depth = self.at, 1
        while depth and (found := _BRACKET.search(self._data, self.at)):
            self.at = found.end()
            depth += {b"(": 1, b")": -1}.get(found[0], 0)
        return self._data[start : self.at - 1]


def name_of(written: bytes) -> Name:
    return Name(_ESCAPE.sub(lambda code: bytes.fromhex(code[1].decode()), written).decode("latin-1"))


def _scalar(token: bytes) -> Any:
    if token[:1] == b"/":
        return name_of(token[1:])
    if token[:1] == b"<":
        digits = re.sub(rb"[^0-9A-Fa-f]", b"", token)
        return bytes.fromhex((digits + b"0" * (len(digits) % 2)).decode())
    if token in (b"true", b"false", b"null"):
        return {b"true": True, b"false": False, b"null": None}[token]
    return float(token) if b"." in token else int(token)

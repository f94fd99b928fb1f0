"""Values of PDF files: names, numbers, dictionaries, as they are written."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

SPACE, REGULAR = rb"[\0\t\n\f\r ]", rb"[^\0\t\n\f\r ()<>\[\]{}/%]"
SKIP = rb"(?:[\0\t\n\f\r ]|%[^\r\n]*[\r\n])*"
_INNER = rb"[^()\\]|\\."
_STRING = rb"\((?:" + _INNER + rb"|\((?:" + _INNER + rb"|\((?:" + _INNER + rb")*\))*\))*\)"  # with two more inside
# Groups: what opens, closes, a reference, a name, a word, a string, one in hexadecimal digits.
_TOKEN = re.compile(
    SKIP + rb"(?:(<<|\[)|(>>|\])|(\d{1,10})" + SPACE + rb"+\d{1,5}" + SPACE + rb"+R(?!" + REGULAR + rb")|"
    rb"/(" + REGULAR + rb"*)|(" + REGULAR + rb"+)|(" + _STRING + rb")|<([^<>]*)>)",
    re.S,
)
_OPENS, _CLOSES, _REFERENCE, _NAME, _WORD, _TEXT, _HEX = range(1, 8)
_ESCAPE = re.compile(rb"#([0-9A-Fa-f]{2})")
_WORDS = {b"true": True, b"false": False, b"null": None}
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


def read_value(data: bytes | mmap.mmap, at: int) -> tuple[Any, int]:
    """The value that starts at byte `at`, and where it ends. Raises ValueError for what is none."""
    found = _TOKEN.match(data, at)
    if found is None or found.lastindex == _CLOSES:
        raise ValueError(f"no value at byte {at}")
    if found.lastindex != _OPENS:
        return _simple(found), found.end()
    return _container(found, _TOKEN.finditer(data, found.end()), found.end(), 0)


def _container(
    opened: re.Match[bytes], tokens: Iterator[re.Match[bytes]], end: int, depth: int
) -> tuple[dict[str, Any] | list[Any], int]:
    """A dictionary or an array, from the tokens after its bracket; each has to start where the last one ended."""
    items: list[Any] = []
    for found in tokens:
        if found.start() != end or depth > _DEPTH:
            break
        end, kind = found.end(), found.lastindex
        if kind == _CLOSES:
            return (dict(zip(map(str, items[::2]), items[1::2], strict=False)) if opened[1] == b"<<" else items), end
        if kind == _OPENS:
            value, end = _container(found, tokens, end, depth + 1)
            items.append(value)
        else:
            items.append(_simple(found))
    raise ValueError(f"no value before byte {end}")


def _simple(found: re.Match[bytes]) -> Any:
    kind = found.lastindex
    text = found[kind or 0]
    if kind == _NAME:
        return name_of(text)
    if kind == _REFERENCE:
        return Reference(int(text))
    if kind == _WORD:
        return _WORDS[text] if text in _WORDS else float(text) if b"." in text else int(text)
    if kind == _HEX:
        digits = re.sub(rb"[^0-9A-Fa-f]", b"", text)
        return bytes.fromhex((digits + b"0" * (len(digits) % 2)).decode())
    return text[1:-1]


def name_of(written: bytes) -> Name:
    if b"#" in written:
        written = _ESCAPE.sub(lambda code: bytes.fromhex(code[1].decode()), written)
    return Name(written.decode("latin-1"))

"""The filters of PDF streams that are no pictures by themselves, and whether what they decode is whole."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cembed.runtime.pages.pdf import codes as pdf_codes

_STEP = 1 << 14  # bytes inflated at once: they make 16 MB at most
_SPACES = b"\0\t\n\f\r "
SHORT = "its data end early"
_SHORT_NAMES = {
    "A85": "ASCII85Decode",
    "AHx": "ASCIIHexDecode",
    "CCF": "CCITTFaxDecode",
    "DCT": "DCTDecode",
    "Fl": "FlateDecode",
    "LZW": "LZWDecode",
    "RL": "RunLengthDecode",
}


@dataclass(frozen=True)
class Filter:
    """A filter by its long name, and its /DecodeParms."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def number(self, key: str, default: int) -> int:
        value = self.parameters.get(key)
        return int(value) if isinstance(value, (int, float)) else default


@dataclass(frozen=True)
class Decoded:
    """How many bytes there are, the bytes if they were asked for, and what is wrong with them."""

    count: int
    data: bytes
    fault: str | None = None


def filter_of(name: str, parameters: Any) -> Filter:
    return Filter(_SHORT_NAMES.get(name, name), parameters if isinstance(parameters, dict) else {})


def known(what: Filter) -> bool:
    return what.name in _DECODERS


def decode(data: bytes | memoryview, what: Filter, most: int, keep: bool = True) -> Decoded:
    """Decodes up to about `most` bytes, which is a fault if there are more, or up to the first damage.

    Raises LookupError for a filter that is not known here.
    """
    return _DECODERS[what.name](data, what, most, keep)


def _flate(data: bytes | memoryview, _: Filter, most: int, keep: bool) -> Decoded:
    engine, out, count, fault = zlib.decompressobj(), bytearray(), 0, None
    for start in range(0, len(data), _STEP):
        try:
            piece = engine.decompress(data[start : start + _STEP])
        except zlib.error as error:
            fault = "its checksum is wrong" if "check" in str(error) else "its data are damaged"
            break
        count += len(piece)
        if keep:
            out += piece
        if engine.eof:
            break
        if count > most:
            fault = SHORT
            break
    else:
        fault = None if _is_complete(engine, data) else SHORT
    return Decoded(count, bytes(out), fault)


def _is_complete(engine: Any, data: bytes | memoryview) -> bool:
    """Whether data without their end are all there: flushed and left so, or only the checksum is missing."""
    if bytes(data[-6:]).rstrip(b"\r\n").endswith(b"\0\0\xff\xff"):
        return True
    try:
        engine.decompress(bytes(4))
    except zlib.error as error:
        return "data check" in str(error)
    return bool(engine.eof)


def _lzw(data: bytes | memoryview, what: Filter, most: int, keep: bool) -> Decoded:
    out = np.empty(most, np.uint8) if keep else None
    early = what.number("EarlyChange", 1)
    return _from_library(pdf_codes.decode_lzw(data, out, most, early), out)


def _runs(data: bytes | memoryview, _: Filter, most: int, keep: bool) -> Decoded:
    out = np.empty(most, np.uint8) if keep else None
    return _from_library(pdf_codes.decode_runs(data, out, most), out)


def _from_library(found: tuple[int, bool], out: npt.NDArray[np.uint8] | None) -> Decoded:
    count, whole = found
    data = b"" if out is None else out[:count].tobytes()
    fault = None if whole else SHORT
    return Decoded(count, data, fault)


def _ascii85(data: bytes | memoryview, _: Filter, most: int, keep: bool) -> Decoded:
    text = bytes(data).translate(None, _SPACES).replace(b"z", b"!!!!!")
    end = re.search(rb"[^!-u]", text)
    fault = "its data are damaged" if end and end[0] != b"~" else None
    text = text[: end.start()] if end else text
    spare = -len(text) % 5
    digits = np.frombuffer(text + b"u" * spare, np.uint8).reshape(-1, 5).astype(np.uint64) - 33
    words = digits @ np.array([85**4, 85**3, 85**2, 85, 1], np.uint64)
    if (words >> np.uint64(32)).any():
        fault = "its data are damaged"
    out = words.astype(">u4").tobytes()
    return _kept(out[: len(out) - spare], fault)


def _hex(data: bytes | memoryview, _: Filter, most: int, keep: bool) -> Decoded:
    text = bytes(data).translate(None, _SPACES)
    end = re.search(rb"[^0-9A-Fa-f]", text)
    fault = "its data are damaged" if end and end[0] != b">" else None
    digits = text[: end.start()] if end else text
    return _kept(bytes.fromhex((digits + b"0" * (len(digits) % 2)).decode()), fault)


def _same(data: bytes | memoryview, _: Filter, most: int, keep: bool) -> Decoded:
    return _kept(bytes(data), None)


def _kept(data: bytes, fault: str | None) -> Decoded:
    return Decoded(len(data), data, fault)


_DECODERS: dict[str, Callable[[bytes | memoryview, Filter, int, bool], Decoded]] = {
    "FlateDecode": _flate,
    "LZWDecode": _lzw,
    "RunLengthDecode": _runs,
    "ASCII85Decode": _ascii85,
    "ASCIIHexDecode": _hex,
    "Crypt": _same,
}

"""What the content of a page or a form names, and the pictures inside of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from cembed.runtime.pages.pdf.values import REGULAR, SPACE, Stream, name_of, read_value

_USE = re.compile(
    rb"/(" + REGULAR + rb"+)" + SPACE + rb"+(?:[-+.\d]+" + SPACE + rb"+)?(Do|gs|scn|SCN|Tf)(?!" + REGULAR + rb")"
)
_KINDS = {b"Do": "XObject", b"gs": "ExtGState", b"scn": "Pattern", b"SCN": "Pattern", b"Tf": "Font"}
_INLINE = re.compile(rb"BI(" + SPACE + rb".{0,4000}?)" + SPACE + rb"ID" + SPACE, re.S)
_INLINE_END = re.compile(SPACE + rb"EI(?!" + REGULAR + rb")")
_LONG_KEYS = {
    "BPC": "BitsPerComponent", "CS": "ColorSpace", "D": "Decode", "DP": "DecodeParms", "F": "Filter",
    "H": "Height", "I": "Interpolate", "IM": "ImageMask", "W": "Width",
}  # fmt: skip
_COMPONENTS = {"G": 1, "DeviceGray": 1, "RGB": 3, "DeviceRGB": 3, "CMYK": 4, "DeviceCMYK": 4}


@dataclass(frozen=True)
class Content:
    """`used` are kinds of resources and names; `fault` is what is wrong with the content itself."""

    used: frozenset[tuple[str, str]]
    inline: tuple[Stream, ...]
    fault: str | None = None


def content_of(data: bytes, fault: str | None = None) -> Content:
    inline, rest, at, search = [], [], 0, 0
    while start := _INLINE.search(data, search):
        search = start.start() + 2
        about = _about(start[1])
        if about is None or not _starts_word(data, start.start()):
            continue
        end = _end(about, data, start.end())
        inline.append(Stream(about, data[start.end() : end]))
        rest.append(data[at : start.start()])
        at = search = end
    rest.append(data[at:])
    used = {(_KINDS[operator], name_of(name)) for name, operator in _USE.findall(b" ".join(rest))}
    return Content(frozenset(used), tuple(inline), fault)


def _starts_word(data: bytes, at: int) -> bool:
    return at == 0 or data[at - 1 : at] in b"\0\t\n\f\r ()<>[]{}/%"


def _about(text: bytes) -> dict[str, Any] | None:
    """The dictionary of a picture in a content, with its keys written out; None for what is no such thing."""
    try:
        about = read_value(b"<<" + text + b">>", 0)[0]
    except ValueError:
        return None
    about = {_LONG_KEYS.get(key, key): value for key, value in about.items()}
    return about if all(isinstance(about.get(key), int) for key in ("Width", "Height")) else None


def _end(about: dict[str, Any], data: bytes, start: int) -> int:
    """Where the data of a picture end. Without a filter, EI may be among its pixels."""
    least = start
    if not about.get("Filter"):
        mask, space = about.get("ImageMask") is True, about.get("ColorSpace")
        bits = 1 if mask else about.get("BitsPerComponent")
        each = 1 if mask or isinstance(space, list) else _COMPONENTS.get(str(space), 0)
        least += (about["Width"] * (bits if isinstance(bits, int) else 0) * each + 7) // 8 * about["Height"]
    found = _INLINE_END.search(data, max(start, least - 1))
    return max(least, found.start()) if found else len(data)

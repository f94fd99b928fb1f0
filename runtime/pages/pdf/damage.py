"""Whether a picture of a PDF is whole. PDFium draws what it can decode of it, and does not say what it could not.

Faults are a few words for a person. A DoubtError is raised where only PDFium can tell.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile

from cembed.runtime.pages.pdf import codes as pdf_codes
from cembed.runtime.pages.pdf.codes import Fax, Report
from cembed.runtime.pages.pdf.filters import SHORT, Filter, decode, known

_TIMES, _LEAST = 4, 1 << 20  # as many bytes as the pixels need are decoded, or so many, to come to a checksum
_MOST = 256 << 20  # bytes of a coded picture, after the filters around it


class DoubtError(Exception):
    """The picture is of a kind that cannot be looked through here."""


@dataclass(frozen=True, eq=False)
class Picture:
    """`bits` and `components` are 0 where they are not known; `shared` are JBIG2Globals."""

    width: int
    height: int
    bits: int
    components: int
    filters: tuple[Filter, ...]
    raw: bytes | memoryview
    shared: bytes = b""

    @property
    def coded(self) -> str:
        """The last filter."""
        return self.filters[-1].name if self.filters else ""

    @property
    def row(self) -> int:
        """Bytes of a row of pixels, 0 if unknown."""
        return (self.width * self.bits * self.components + 7) // 8


def fault_of(picture: Picture) -> str | None:
    """What is wrong with a picture, None if it is whole. Raises DoubtError."""
    if picture.width < 1 or picture.height < 1:
        return "it has no size"
    for what in picture.filters:
        if what.name not in _CODED and not known(what):
            return f"{what.name} is no known filter"
    try:
        return _first_fault(picture)
    except LookupError as error:
        raise DoubtError(str(error)) from None


def _first_fault(picture: Picture) -> str | None:
    data, early = picture.raw, None
    *before, last = picture.filters or (Filter("Crypt"),)
    for what in before:
        if what.name in _CODED:
            raise DoubtError("a filter after the one of a picture")
        step = decode(data, what, _MOST)
        data, early = step.data, early or (step.fault and f"{what.name}: {step.fault}")
    fault = _CODED.get(last.name, _pixels)(picture, last, data)
    if fault is None and early and not early.endswith(SHORT):
        return early
    return fault and f"{last.name}: {fault}"


def _pixels(picture: Picture, last: Filter, data: bytes | memoryview) -> str | None:
    """Pixels as they are, or with a filter that is no picture's."""
    needed = picture.row * picture.height
    found = decode(data, last, max(_TIMES * needed, _MOST if not needed else _LEAST), keep=False)
    count = _without_predictor(last, found.count)
    if not needed or found.fault not in (None, SHORT):
        return found.fault
    if count < needed:
        return f"{SHORT} ({100 * count // needed} % are there)"
    if found.fault and count > needed:  # a checksum that is missing after the last pixel does no harm
        return "its data are damaged"
    unchecked = last.name in ("LZWDecode", "RunLengthDecode")
    return "its data go on after its last pixel" if unchecked and count > needed + picture.row else None


def _without_predictor(last: Filter, count: int) -> int:
    if last.number("Predictor", 1) < 10:
        return count
    bits = last.number("Columns", 1) * last.number("Colors", 1) * last.number("BitsPerComponent", 8)
    row = (bits + 7) // 8
    return count // (row + 1) * row + max(0, count % (row + 1) - 1)


def _jpeg(picture: Picture, _: Filter, data: bytes | memoryview) -> str | None:
    found = pdf_codes.walk_jpeg(data)
    if found.fault != pdf_codes.WHOLE:
        return _fault_in(found, "part")
    if (found.width, found.height) != (picture.width, picture.height):
        raise DoubtError("of another size than it says")
    if picture.components and found.components != picture.components:
        raise DoubtError("of other colours than it says")
    return None


def _fax(picture: Picture, last: Filter, data: bytes | memoryview) -> str | None:
    fax = Fax(
        k=last.number("K", 0),
        columns=last.number("Columns", 1728),
        rows=picture.height,
        aligned=bool(last.parameters.get("EncodedByteAlign", False)),
        block=bool(last.parameters.get("EndOfBlock", True)),
    )
    found = pdf_codes.walk_fax(data, fax)
    if found.fault == pdf_codes.WHOLE and fax.columns != picture.width:
        raise DoubtError("of another width than it says")
    return _fault_in(found, "row")


def _fault_in(found: Report, unit: str) -> str | None:
    if found.fault == pdf_codes.UNKNOWN:
        raise DoubtError("of a kind that is not walked")
    place = f"in {unit} {found.done + 1} of {found.all}"
    return {
        pdf_codes.WHOLE: None,
        pdf_codes.HEADER: "no such picture, or its tables are damaged",
        pdf_codes.SHORT: f"{SHORT}, {place}",
        pdf_codes.CODE: f"a code that makes no sense {place}",
        pdf_codes.LEFT_OVER: "its data go on after its last pixel",
        pdf_codes.MISSING: "what it shares with others (JBIG2Globals) is missing",
    }[found.fault]


def _jpeg2000(picture: Picture, _: Filter, data: bytes | memoryview) -> str | None:
    codestream = _codestream(bytes(data))
    if fault := _tile_fault(codestream):
        return fault
    if _is_broken(data, _reduction(picture, _levels(codestream))) and _is_broken(data, 0):  # Pillow may fail to reduce
        return "its data are damaged"
    raise DoubtError("PDFium may ask for a smaller one than there is")


def _reduction(picture: Picture, levels: int) -> int:
    """How often a picture is halved to try it: its lengths are followed all the same, and the details take long.

    Pillow rounds sizes, where others round up, and fails where that differs.
    """
    sizes = (picture.width, picture.height)
    for n in range(levels, 0, -1):
        if all((size + 2**n // 2) // 2**n == -(-size // 2**n) for size in sizes):
            return n
    return 0


def _is_broken(data: bytes | memoryview, reduction: int) -> bool:
    try:
        with Jpeg2KImageFile(io.BytesIO(data)) as image:
            image.reduce = reduction
            image.load()
    except OSError as error:
        if "broken" in str(error) or "truncated" in str(error):
            return True
        raise DoubtError(str(error)) from None
    except (SyntaxError, ValueError, MemoryError, Image.DecompressionBombError) as error:
        raise DoubtError(str(error)) from None
    return False


def _codestream(data: bytes) -> bytes:
    """JPEG 2000 without the boxes of a JP2 file; empty if there is none."""
    if data[:4] == b"\xff\x4f\xff\x51":
        return data
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        head = 16 if length == 1 else 8
        length = int.from_bytes(data[at + 8 : at + 16], "big") if length == 1 else length
        if kind == b"jp2c":
            return data[at + head :]
        if length < head:
            break
        at += length
    return b""


_NO_PICTURE = "no such picture, or its head is damaged"


def _tile_fault(data: bytes) -> str | None:
    """Whether all parts of all tiles are there, by the lengths they say."""
    at = data.find(b"\xff\x90")
    if data[:4] != b"\xff\x4f\xff\x51" or at < 0 or len(data) < 40:
        return _NO_PICTURE
    tiles, fault = _walk_tiles(data, at)
    width, height, _, _, wide, high, tile_left, tile_top = struct.unpack_from(">8I", data, 8)
    if fault or not wide or not high:
        return fault or _NO_PICTURE
    count = math.ceil((width - tile_left) / wide) * math.ceil((height - tile_top) / high)
    return None if len(tiles) >= count else f"{SHORT} ({len(tiles)} of {count} tiles are there)"


def _walk_tiles(data: bytes, at: int) -> tuple[set[int], str | None]:
    """The numbers of the tiles that have parts, which follow each other from `at` on, and what is wrong with them."""
    tiles = set[int]()
    while data[at : at + 2] == b"\xff\x90" and at + 12 <= len(data):
        tile, length = struct.unpack_from(">HI", data, at + 4)
        tiles.add(tile)
        if 0 < length < 14:
            return tiles, "its data are damaged"
        if at + length > len(data):
            return tiles, f"{SHORT} ({100 * at // len(data)} % are whole)"
        at = at + length if length else len(data)  # 0: up to the end
    return tiles, None


def _levels(data: bytes) -> int:
    """How often the size can be halved: of the first COD marker."""
    at = 2
    while data[at : at + 2] != b"\xff\x52":
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if at >= len(data):
            return 0
    return data[at + 9]


def _jbig2(picture: Picture, _: Filter, data: bytes | memoryview) -> str | None:
    found = pdf_codes.walk_jbig2(picture.shared, data)
    if found.fault == pdf_codes.WHOLE and (found.width != picture.width or found.height not in (-1, picture.height)):
        raise DoubtError("of another size than it says")
    return _fault_in(found, "part")


_CODED: dict[str, Callable[[Picture, Filter, bytes | memoryview], str | None]] = {
    "DCTDecode": _jpeg,
    "CCITTFaxDecode": _fax,
    "JPXDecode": _jpeg2000,
    "JBIG2Decode": _jbig2,
}

"""JPEG streams: whether all of a picture is there. In the decoding process only.

libjpeg fills what is missing with grey and says nothing that Pillow would hand on. So a stream without its end, or one
that ends in that grey, is decoded twice with different noise after it: pixels that differ were not in the stream.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

from cembed.runtime.pages.images import Drawn, partly, reduction, to_rgb

END = b"\xff\xd9"
COARSE = "the file is truncated: the page is coarser than it was, or incomplete"
_BEGIN, _SCAN, _PROGRESSIVE = 0xD8, 0xDA, 0xC2
_EXIF, _ADOBE, _ADOBE_LENGTH = 0xE1, 0xEE, 14
_METADATA = (*range(0xE0, 0xF0), 0xFE)
_GREY = frozenset((127, 128))  # the second is of inverted CMYK
_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)
_SURPLUS = 32  # bytes
_RESTARTS = [bytes([0xFF, 0xD0 + number]) for number in range(8)] * 16


def ended(data: bytes) -> bool:
    """Whether a stream has its end marker; zeros after it are padding."""
    return data.rstrip(b"\0").endswith(END)


def continued(data: bytes, which: int) -> bytes:
    """A stream that goes on with noise, of one of two kinds, where it ended."""
    random = np.random.default_rng(which).integers(1, 255, (len(_RESTARTS), 64), dtype=np.uint8)  # it holds no marker
    noise = b"".join(bytes(piece) + restart for piece, restart in zip(random, _RESTARTS, strict=True))
    pixels = data.rstrip(b"\0").removesuffix(END) if ended(data) else data
    return pixels.rstrip(b"\xff") + random.tobytes() + noise + END


def grey_ends(image: Image.Image, rows: list[int]) -> list[bool]:
    """Whether the last pixel of each of some rows is what libjpeg puts in the place of what is missing."""
    column = image.crop((image.width - 1, 0, image.width, image.height)).tobytes()
    samples = len(column) // image.height
    return [_GREY.issuperset(column[row * samples : (row + 1) * samples]) for row in rows]


def grey_end(image: Image.Image) -> bool:
    return grey_ends(image, [image.height - 1]) == [True]


def alike(one: Image.Image, two: Image.Image) -> int:
    """How many rows from the top two images of one size have in common."""
    left, right = (np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, -1) for image in (one, two))
    differing = (left != right).any(1)
    return int(differing.argmax()) if differing.any() else len(differing)


def segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each marker and what its segment holds."""
    place = 0
    while found := _MARKER.search(data, place):
        marker, place = found[1][0], found.end()
        if marker != _BEGIN:
            length = int.from_bytes(data[place : place + 2], "big")
            yield marker, data[place + 2 : place + length]
            place += length


def lacks_scans(data: bytes) -> bool:
    """Whether a progressive picture stops before its last refinement."""
    bits: dict[tuple[int, int], int] = {}
    for marker, content in segments(data):
        if marker == _PROGRESSIVE and len(content) > 5:
            bits |= {(component, order): 1 for component in content[6 : 6 + 3 * content[5] : 3] for order in range(64)}
        elif marker == _SCAN and len(content) > 3:
            first, last, precision = content[-3:]
            chosen = content[1 : 1 + 2 * content[0] : 2]
            bits |= {(name, order): precision & 15 for name in chosen for order in range(first, min(last, 63) + 1)}
    return any(bits.values())


def opened(source: BinaryIO | bytes, limit: int) -> Image.Image:
    """A JPEG, loaded; one of more than `limit` pixels is reduced while it is decoded, by up to 8."""
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=("JPEG",))
    width, height = image.size
    scale = next((step for step in (1, 2, 4) if -(-width // step) * -(-height // step) <= limit), 8)
    image.draft(image.mode, (max(1, width // scale), max(1, height // scale)))
    image.load()
    return image


def _opened_bare(data: bytes, limit: int) -> Image.Image:
    """A JPEG, without its metadata if that is what is wrong with it."""
    try:
        return opened(data, limit)
    except MemoryError:
        raise
    except Exception:
        bare = without_metadata(data, (_EXIF, _ADOBE))
    try:
        return opened(bare, limit)
    except MemoryError:
        raise
    except Exception:
        return opened(without_metadata(data, (_ADOBE,)), limit)


def without_metadata(data: bytes, kept: tuple[int, ...]) -> bytes:
    """The stream without application data and comments, but `kept` ones."""
    out, place = data[:2], 2
    while (found := _MARKER.match(data, place)) and found[1][0] != _SCAN:
        marker, length = found[1][0], int.from_bytes(data[found.end() : found.end() + 2], "big")
        end = found.end() + length
        short = marker == _ADOBE and length < _ADOBE_LENGTH
        if marker not in _METADATA or (marker in kept and not short):
            out += data[place:end]
        place = end
    return out + data[place:]


def read(data: bytes, limit: int) -> Drawn:
    """A page of a JPEG that may end too early. Raises RefusedError where much is missing."""
    if ended(data):
        image = _opened_bare(data, limit)
        if not grey_end(image):
            return finished(image, limit, COARSE if lacks_scans(data) else None)
    data = _without_filling(data, limit)
    one, good = _read_twice(data, limit)
    scans = sum(marker == _SCAN for marker, _ in segments(data))
    if good == one.height:
        return finished(one, limit, COARSE if lacks_scans(data) else None)
    if scans > 1:
        return finished(_opened_bare(data + END, limit), limit, COARSE)
    warning = partly(1 - good / one.height, "the file is truncated")
    image = one.convert("RGB")
    image.paste("white", (0, good, *image.size))
    return finished(image, limit, warning)


def _read_twice(data: bytes, limit: int) -> tuple[Image.Image, int]:
    """The picture, and how many of its rows do not depend on what follows `data`."""
    one, two = (_opened_bare(continued(data, which), limit) for which in (0, 1))
    return one, alike(one, two)


def _without_filling(data: bytes, limit: int) -> bytes:
    """Cuts off the zeros of a download that was not finished; blank paper may be stored as zeros, too."""
    bare = data.rstrip(b"\0")
    if len(data) - len(bare) < 2 * _SURPLUS:
        return data
    ends_there, ends_before = (
        good == image.height for image, good in (_read_twice(data, limit), _read_twice(data[:-_SURPLUS], limit))
    )
    return data if ends_there and not ends_before else bare


def finished(image: Image.Image, limit: int, warning: str | None) -> Drawn:
    scale = reduction(*image.size, limit)
    return Drawn(np.array(to_rgb(image.reduce(scale) if scale > 1 else image), order="C"), warning)

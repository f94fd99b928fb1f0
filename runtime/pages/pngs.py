"""PNG files chunk by chunk: what pixels need, and whether that is sound. In the decoding process only."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

_MARK = b"\x89PNG\r\n\x1a\n"
_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_USED = (b"tRNS", b"eXIf")


@dataclass(frozen=True)
class _Chunk:
    """`place` is where it is, with its length and its checksum, which is `sound` or not."""

    kind: bytes
    place: slice
    sound: bool


def _chunks(data: bytes) -> Iterator[_Chunk]:
    view, place = memoryview(data), len(_MARK)
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        checksum = zlib.crc32(view[place + 4 : end - 4]).to_bytes(4, "big")
        yield _Chunk(data[place + 4 : place + 8], slice(place, end), data[end - 4 : end] == checksum)
        place = end


def needed(data: bytes) -> bytes:
    """The file without metadata, and without transparency whose checksum is wrong."""
    kept = (chunk for chunk in _chunks(data) if chunk.kind in _PIXELS or (chunk.kind in _USED and chunk.sound))
    return _MARK + b"".join(data[chunk.place] for chunk in kept)


def doubt(data: bytes) -> str | None:
    """What is wrong with a file that was read, if anything that shows is."""
    for chunk in _chunks(data):
        if not chunk.sound and chunk.kind in (*_PIXELS, b"tRNS"):
            return f"damaged, what is here may be wrong: the checksum of {chunk.kind.decode()} does not fit"
    return None

"""Strips and tiles of a TIFF frame, decoded to bytes.

Pillow's libtiff undoes the compression and nothing else. Segments are handed to it as a small TIFF of their own, whose
tags tell of 8-bit grey as wide as a row has bytes; so what the frame's tags make of the bytes is decided here, and
the same with every Pillow.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import IO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from cembed.runtime.pages import jpegs
from cembed.runtime.pages.images import Pixels
from cembed.runtime.pages.tiff.layout import FAX, Compression, Layout, Photometric, Tag, refusal

Rows: TypeAlias = npt.NDArray[np.bool_]
Numbers: TypeAlias = npt.NDArray[np.generic]

_FAX_NAMES = {2: "tiff_ccitt", 3: "group3", 4: "group4"}  # as Pillow calls them
_JPEG_PHOTOMETRICS = {1: 1, 2: 1, 3: 2, 4: 5}  # by samples: with these they are left as they are
_CODEC_TAGS = (Tag.JPEGTables, Tag.T4Options, Tag.T6Options)
_YCBCR_TAGS = (Tag.JPEGTables, Tag.Predictor, Tag.YCbCrCoefficients, Tag.YCbCrSubSampling, Tag.ReferenceBlackWhite)
_TYPES = {1: 7, 2: 3, 4: 4}  # by bytes of a value
_SAID_BYTES = 1 << 12
_NO_MEMORY = "-9"  # how Pillow says that libtiff found none
_REVERSED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)[:, ::-1], axis=1)[:, 0]
_END_OF_FAX_BLOCK = 0x001001


@dataclass(frozen=True, eq=False)
class Stored:
    """Decoded segments, one above the other; `absent` marks rows that could not be decoded."""

    content: Image.Image | Pixels
    absent: Rows

    def rows(self, first: int, last: int) -> Pixels:
        """Bytes [last - first, bytes of a row]."""
        if not isinstance(self.content, Image.Image):
            return self.content[first:last]
        whole = (first, last) == (0, self.content.height)
        part = self.content if whole else self.content.crop((0, first, self.content.width, last))
        return np.frombuffer(part.tobytes(), np.uint8).reshape(last - first, -1)


@dataclass
class SegmentReader:
    """Decodes the segments of one frame; `notes` says, by segment, what was wrong with it."""

    layout: Layout
    notes: dict[int, str] = field(default_factory=dict)

    def read(self, plane: int, first: int, last: int) -> Stored:
        """Rows `first` to `last` of segments, in one plane. Raises RefusedError: not with this libtiff."""
        segments = self.layout.segments
        start = plane * segments.across * segments.down
        numbers = range(start + first * segments.across, start + last * segments.across)
        heights = [self.layout.rows((number - start) // segments.across) for number in numbers]
        if self.layout.compression == Compression.NONE and not self.layout.made_rgb:
            return self._plain(numbers, heights)
        parts = [self._data(number) for number in numbers]
        together = self._decode(parts, heights)
        if together.good == sum(heights) and together.image is not None and together.note is None:
            return Stored(together.image, np.zeros(sum(heights), bool))
        return self._one_by_one(numbers, parts, heights)

    def _plain(self, numbers: Sequence[int], heights: list[int]) -> Stored:
        content = np.zeros((sum(heights), self.layout.row_bytes), np.uint8)
        absent, top = np.zeros(len(content), bool), 0
        for number, height in zip(numbers, heights, strict=True):
            data = self._data(number, height * self.layout.row_bytes)
            content[top : top + height].reshape(-1)[: len(data)] = np.frombuffer(data, np.uint8)
            good = len(data) // self.layout.row_bytes
            if good < height:
                absent[top + good : top + height] = True
                self.notes[number] = "the file is truncated"
            top += height
        return Stored(content, absent)

    def _data(self, number: int, whole: int | None = None) -> bytes:
        """The bytes of a segment; `whole` is how many there must be, if that is known."""
        file, offsets = self.layout.frame.file, self.layout.segments.offsets
        if number >= len(offsets):
            return b""
        count = self._count(number, whole)
        data = file.read(offsets[number], count if whole is None else min(count, whole))
        reversed_bits = self.layout.fill_order == 2 and self.layout.compression != Compression.JPEG
        return _REVERSED[np.frombuffer(data, np.uint8)].tobytes() if reversed_bits else data

    def _count(self, number: int, whole: int | None) -> int:
        """How many bytes a segment is said to have; without a count it goes on to the next one."""
        offsets, counts = self.layout.segments.offsets, self.layout.segments.counts
        start, only = offsets[number], len(offsets) == 1
        if whole is not None and (counts is None or only):  # writers are sloppy about the only strip's count
            return whole
        if counts is None or (only and not counts[0]):
            return min((other for other in offsets if other > start), default=self.layout.frame.file.size) - start
        return counts[number] if number < len(counts) else 0

    def _one_by_one(self, numbers: Sequence[int], parts: list[bytes], heights: list[int]) -> Stored:
        pieces = [self._decode([part], [height]) for part, height in zip(parts, heights, strict=True)]
        total, top = sum(heights), 0
        absent = np.ones(total, bool)
        found = [piece.image for piece in pieces if piece.image is not None]
        content: Image.Image | Pixels = np.zeros((total, self.layout.row_bytes), np.uint8)
        if found:
            content = Image.new(found[0].mode, (found[0].width, total))
        for number, piece, height in zip(numbers, pieces, heights, strict=True):
            if piece.note is not None:
                self.notes[number] = piece.note
            if piece.image is not None and isinstance(content, Image.Image):
                content.paste(piece.image, (0, top))
                absent[top : top + piece.good] = False
            top += height
        return Stored(content, absent)

    def _decode(self, parts: list[bytes], heights: list[int]) -> _Piece:
        """Segments that are marked as complete are; others are decoded with two different continuations."""
        doubtful = [not _ended(self.layout, part) for part in parts]
        if not any(doubtful):
            piece = self._attempt(parts, heights)
            doubtful = _grey_ends(piece, heights) if self.layout.compression == Compression.JPEG else []
            if not any(doubtful):
                return piece
        return self._decode_twice(parts, heights, doubtful)

    def _decode_twice(self, parts: list[bytes], heights: list[int], doubtful: list[bool]) -> _Piece:
        one, two = (self._attempt(self._continued(parts, heights, doubtful, other), heights) for other in (0, 1))
        if one.image is None or two.image is None:
            return one if one.image is None else two
        good = jpegs.alike(one.image, two.image)
        note = "its data is truncated" if good < sum(heights) else None
        return _Piece(one.image, good, one.note or note or two.note)

    def _continued(self, parts: list[bytes], heights: list[int], doubtful: list[bool], which: int) -> list[bytes]:
        whole = zip(parts, heights, doubtful, strict=True)
        return [_continued(self.layout, part, height, which) if doubt else part for part, height, doubt in whole]

    def _attempt(self, parts: list[bytes], heights: list[int]) -> _Piece:
        with overheard() as said:
            try:
                image = Image.open(io.BytesIO(_wrapped(self.layout, parts, heights)), formats=("TIFF",))
                image.load()
            except (OSError, ValueError, OverflowError, SyntaxError) as error:
                if str(error).endswith(_NO_MEMORY):
                    raise MemoryError from None
                image = None
        if "not configured" in said.text:
            raise refusal(self.layout.frame, "Pillow's libtiff was built without this compression")
        note = said.text.splitlines()[0] if said.text else None
        if image is None:
            return _Piece(None, 0, note or "it cannot be decoded")
        return _Piece(image, sum(heights), note)


@dataclass(frozen=True, eq=False)
class _Piece:
    """`good` rows from the top can be trusted; `note` says what is wrong."""

    image: Image.Image | None
    good: int
    note: str | None


def _ended(layout: Layout, data: bytes) -> bool:
    """Whether a segment ends as its compression says; libtiff itself notices where the lossless ones do not."""
    if layout.compression == Compression.JPEG:
        return jpegs.ended(data)
    if layout.compression not in FAX:
        return True
    tail = data.rstrip(b"\0")[-4:]
    number = int.from_bytes(tail, "big")
    ones_last = number // (number & -number or 1)
    return layout.compression == Compression.CCITT_G4 and ones_last & 0xFFFFFF == _END_OF_FAX_BLOCK


def _grey_ends(piece: _Piece, heights: list[int]) -> list[bool]:
    return [] if piece.image is None else jpegs.grey_ends(piece.image, [end - 1 for end in accumulate(heights)])


def _continued(layout: Layout, data: bytes, height: int, which: int) -> bytes:
    if layout.compression == Compression.JPEG:
        return jpegs.continued(data, which)
    options = layout.frame.number(Tag.T4Options, 0)
    rows = _fax_rows(layout.compression, options, layout.segments.width, height, which)
    return data + (rows[2:] if which and layout.compression == Compression.CCITT_G3 else rows)  # no end of line first


@functools.lru_cache(16)
def _fax_rows(compression: int, options: int, width: int, height: int, value: int) -> bytes:
    file = io.BytesIO()
    blank = Image.new("1", (width, height), value)
    extra = {int(Tag.T4Options): options, int(Tag.RowsPerStrip): height}
    blank.save(file, "TIFF", compression=_FAX_NAMES[compression], tiffinfo=extra)
    data = file.getvalue()
    tags = TiffImagePlugin.TiffImageFile(io.BytesIO(data)).tag_v2
    (start,), (length,) = tags[int(Tag.StripOffsets)], tags[int(Tag.StripByteCounts)]
    return data[start : start + length]


def _wrapped(layout: Layout, parts: list[bytes], heights: list[int]) -> bytes:
    """A TIFF of one frame that has `parts` for strips."""
    starts = np.cumsum([8, *map(len, parts)])
    tags: dict[int, Numbers] = {
        Tag.Compression: _shorts(layout.compression),
        Tag.StripOffsets: starts[:-1].astype("<u4"),
        Tag.StripByteCounts: np.diff(starts).astype("<u4"),
        Tag.ImageLength: np.array([sum(heights)], "<u4"),
        Tag.RowsPerStrip: np.array([heights[0]], "<u4"),
        **_disguise(layout),
    }
    directory = starts[-1] + starts[-1] % 2
    body = b"".join(parts) + b"\0" * int(starts[-1] % 2)
    return struct.pack("<2sHI", b"II", 42, directory) + body + _directory(tags, int(directory))


def _disguise(layout: Layout) -> dict[int, Numbers]:
    """The tags with which libtiff gives back bytes of the frame as they are, or YCbCr as RGB."""
    width, samples, bits, photometric = layout.row_bytes, 1, 8, int(Photometric.BLACK_IS_ZERO)
    if layout.made_rgb:
        width, samples, photometric = layout.segments.width, layout.samples, layout.photometric
    elif layout.compression == Compression.JPEG:
        width, samples = layout.segments.width, layout.plane_samples
        photometric = _JPEG_PHOTOMETRICS[samples]
    elif layout.compression in FAX:
        width, bits = layout.segments.width, 1
    tags: dict[int, Numbers] = {
        Tag.ImageWidth: np.array([width], "<u4"),
        Tag.BitsPerSample: _shorts(*[bits] * samples),
        Tag.SamplesPerPixel: _shorts(samples),
        Tag.PhotometricInterpretation: _shorts(photometric),
        **({Tag.ExtraSamples: _shorts(2)} if samples == 2 else {}),
    }
    kept = {tag: layout.frame.values(tag) for tag in (_YCBCR_TAGS if layout.made_rgb else _CODEC_TAGS)}
    return tags | {
        tag: values.astype(values.dtype.newbyteorder("<")) for tag, values in kept.items() if values is not None
    }


def _shorts(*values: int) -> Numbers:
    return np.array(values, "<u2")


def _directory(tags: dict[int, Numbers], start: int) -> bytes:
    """A directory that will be at `start`; the type of a tag is that of its array."""
    entries, more = b"", b""
    place = start + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        kind = 5 if values.ndim > 1 else _TYPES[values.dtype.itemsize]
        data = values.tobytes()
        if len(data) > 4:
            data, more = struct.pack("<I", place + len(more)), more + data + b"\0" * (len(data) % 2)
        entries += struct.pack("<HHI4s", tag, kind, len(values), data)
    return struct.pack("<H", len(tags)) + entries + bytes(4) + more


@dataclass
class _Said:
    text: str = ""


@contextlib.contextmanager
def overheard() -> Iterator[_Said]:
    """What is printed on standard error meanwhile: libtiff's only way to say that it goes on in spite of damage."""
    said, old = _Said(), os.dup(2)
    with _ear() as ear:
        os.dup2(ear.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(old, 2)
            os.close(old)
            ear.seek(0)
            said.text = ear.read(_SAID_BYTES).decode("ascii", "replace")


def _ear() -> IO[bytes]:
    return os.fdopen(os.memfd_create("said"), "r+b") if sys.platform == "linux" else tempfile.TemporaryFile()

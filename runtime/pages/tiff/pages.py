"""Pages of TIFF files; in the decoding process only.

The tags decide what bytes mean (`tiff_layout`, `tiff_pixels`), Pillow's libtiff only undoes compression
(`tiff_codecs`). Frames are read band by band, so that large ones can be reduced meanwhile.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from PIL import Image

from cembed.runtime.pages.files import File
from cembed.runtime.pages.images import (
    Drawn,
    Pixels,
    RefusedError,
    Settings,
    partly,
    reduction,
    span_of,
    to_rgb,
    too_many_pixels,
)
from cembed.runtime.pages.tiff.codecs import Rows, SegmentReader, overheard
from cembed.runtime.pages.tiff.layout import Compression, Layout, Tag, layout_of
from cembed.runtime.pages.tiff.pixels import Samples, painter, unpacked
from cembed.runtime.pages.tiff.tags import Directory, TiffFile

_BAND_BYTES = 4 << 20
# What brings a page upright, by Orientation: whether rows and columns change places, then the steps along each.
_TURNS = {2: (False, 1, -1), 3: (False, -1, -1), 4: (False, -1, 1), 5: (True, 1, 1), 6: (True, 1, -1),
          7: (True, -1, -1), 8: (True, -1, 1)}  # fmt: skip


class Tiff:
    doubt: str | None = None

    def __init__(self, file: File, settings: Settings) -> None:
        self._limit = settings.max_pixels
        self._frames = TiffFile(file.stream()).pages()
        self.pages = len(self._frames)
        if not self.pages:
            raise RefusedError("damaged: a TIFF file without a frame")

    def page(self, number: int) -> Drawn:
        frame = self._frames[number - 1]
        if frame is None:
            raise RefusedError("damaged: the chain of frames is torn here, and pages that follow cannot be found")
        if frame.number(Tag.Compression, 1) == Compression.OLD_JPEG:
            return _old_jpeg(frame, self._limit)
        return _read(layout_of(frame), self._limit)


def _read(layout: Layout, limit: int) -> Drawn:
    reader = SegmentReader(layout)
    if layout.alpha is not None and layout.frame.values(Tag.ExtraSamples) is None and _all_transparent(reader):
        layout = replace(layout, alpha=None)
        reader = SegmentReader(layout)
    painting = painter(layout, _span(reader))
    canvas = _Canvas(layout.width, layout.height, reduction(layout.width, layout.height, limit))
    missing = 0.0
    for band in _bands(reader, painting.samples):
        out = canvas.room(len(band.samples))
        painting.paint(band.samples, out)
        for column in np.flatnonzero(band.absent.any(0)):
            start = column * layout.segments.width
            out[band.absent[:, column], start : start + layout.segments.width] = 255
        canvas.advance(out)
        missing += float(band.absent.mean()) * len(out) / layout.height
    return Drawn(_upright(canvas.pixels, layout.orientation), _warning(reader, missing))


def _warning(reader: SegmentReader, missing: float) -> str | None:
    note = re.sub(r"^tempfile.tif: | of strip \d+|, strip \d+", "", next(iter(reader.notes.values()), ""))
    if missing:
        return partly(missing, note)
    return f"damaged, what is here may be wrong: {note}" if note else None


def _all_transparent(reader: SegmentReader) -> bool:
    """Whether alpha is zero everywhere, which is never meant."""
    layout = reader.layout
    return not any(
        band.samples[..., layout.alpha].any() for band in _bands(reader, lambda rows: unpacked(layout, rows))
    )


def _span(reader: SegmentReader) -> tuple[float, float]:
    """The values of black and white, for which deep ones are read twice."""
    layout = reader.layout
    low, high = np.inf, -np.inf
    if layout.kind == "u" and layout.bits <= 16:
        return span_of(0, 0, layout.kind, layout.bits)
    for band in _bands(reader, lambda rows: unpacked(layout, rows)):
        values = band.samples[..., : layout.colours][~band.absent.any(1)]
        finite = values[np.isfinite(values)]
        if not reader.notes and finite.size < values.size:
            reader.notes[-1] = "some of its values are NaN or infinite"
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return span_of(low, high, layout.kind, layout.bits) if low <= high else (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class _Band:
    """Samples [rows, width, samples] of a frame; rows that are `absent` are marked for each column of tiles."""

    samples: Samples
    absent: Rows


def _bands(reader: SegmentReader, decode: Callable[[Pixels], Samples]) -> Iterator[_Band]:
    layout, segments = reader.layout, reader.layout.segments
    line = layout.planes * layout.row_bytes * segments.across
    step = max(1, _BAND_BYTES // (line * segments.height))
    for first in range(0, segments.down, step):
        last = min(first + step, segments.down)
        stored = [reader.read(plane, first, last) for plane in range(layout.planes)]
        rows = len(stored[0].absent)
        pieces = [0, rows] if segments.tiled else [*range(0, rows, max(1, _BAND_BYTES // line)), rows]
        for start, end in pairwise(pieces):
            planes = [_side_by_side(layout, decode(part.rows(start, end))) for part in stored]
            samples = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
            absent = np.logical_or.reduce([_side_by_side(layout, part.absent[start:end, None]) for part in stored])
            remaining = layout.height - first * segments.height - start
            yield _Band(samples[:remaining, : layout.width], absent[:remaining])


def _side_by_side(layout: Layout, stacked: Samples) -> Samples:
    """Tiles [tiles * rows, columns, ...] that lie one above the other, each in its place."""
    segments = layout.segments
    if not segments.tiled:
        return stacked
    apart = stacked.reshape(-1, segments.across, segments.height, *stacked.shape[1:])
    joined = apart.swapaxes(1, 2)
    return joined.reshape(-1, segments.across * stacked.shape[1], *stacked.shape[2:])


class _Canvas:
    """A page that is painted from top to bottom, each `scale` x `scale` pixels of it averaged to one."""

    def __init__(self, width: int, height: int, scale: int) -> None:
        self._width, self._left, self._scale, self._top = width, height, scale, 0
        self._waiting = np.empty((0, width, 3), np.uint8)
        self.pixels = np.empty((-(-height // scale), -(-width // scale), 3), np.uint8)

    def room(self, rows: int) -> Pixels:
        """Where the next `rows` are to be painted."""
        if self._scale == 1:
            return self.pixels[self._top : self._top + rows]
        return np.empty((rows, self._width, 3), np.uint8)

    def advance(self, painted: Pixels) -> None:
        self._left -= len(painted)
        if self._scale == 1:
            self._top += len(painted)
            return
        waiting = np.concatenate([self._waiting, painted])
        ready = len(waiting) // self._scale * self._scale if self._left else len(waiting)
        if ready:
            reduced = np.asarray(Image.fromarray(waiting[:ready]).reduce(self._scale))
            self.pixels[self._top : self._top + len(reduced)] = reduced
            self._top += len(reduced)
        self._waiting = waiting[ready:]


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    swapped, down, along = _TURNS.get(orientation, (False, 1, 1))
    turned = pixels.swapaxes(0, 1) if swapped else pixels
    return np.ascontiguousarray(turned[::down, ::along])


def _old_jpeg(frame: Directory, limit: int) -> Drawn:
    """JPEG as TIFF 6.0 had it, in tags and places of all sorts: libtiff gets the file as it is."""
    width, height = frame.number(Tag.ImageWidth, 0), frame.number(Tag.ImageLength, 0)
    if width * height > limit:
        raise too_many_pixels(width, height, limit, "a TIFF file in JPEG of the old style")
    with overheard() as said:
        page = np.array(to_rgb(Image.open(io.BytesIO(frame.alone()), formats=("TIFF",))), order="C")
    return Drawn(page, f"damaged, what is here may be wrong: {said.text.splitlines()[0]}" if said.text else None)

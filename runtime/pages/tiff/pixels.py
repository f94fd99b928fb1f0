"""What the decoded bytes of a TIFF frame look like: samples of any depth to 8-bit RGB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cembed.runtime.pages.images import Pixels, to_levels
from cembed.runtime.pages.tiff.layout import LAB, Layout, Photometric, Tag, refusal

_PILLOW_MODES: dict[int, str] = {Photometric.CMYK: "CMYK", Photometric.YCBCR: "YCbCr"}

Samples = npt.NDArray[Any]


def unpacked(layout: Layout, rows: Pixels) -> Samples:
    """Samples [rows, width of a segment, samples of a plane] of rows of bytes; predictors are undone."""
    if layout.made_rgb:
        return rows.reshape(len(rows), layout.segments.width, 3)
    count = layout.segments.width * layout.plane_samples
    if layout.bits in (8, 16, 32, 64):
        values = _whole_bytes(layout, rows)
    else:
        values = _odd_bits(rows, layout.bits, count, layout.kind == "i", layout.frame.file.order)
    return values.reshape(len(rows), layout.segments.width, layout.plane_samples)


def _whole_bytes(layout: Layout, rows: Pixels) -> Samples:
    size = layout.bits // 8
    if layout.predictor == 3:
        planes = _summed(rows, layout.plane_samples).reshape(len(rows), size, -1)  # bytes of equal weight together
        return np.ascontiguousarray(planes.transpose(0, 2, 1)).view(f">f{size}")[..., 0]
    if layout.predictor == 2:
        rows = _summed(rows.view(f"{layout.frame.file.order}u{size}"), layout.plane_samples).view(np.uint8)
        return rows.view(f"{layout.kind}{size}")
    return rows.view(f"{layout.frame.file.order}{layout.kind}{size}")


def _summed(differences: Samples, samples: int) -> Samples:
    """Running sums along rows, of each sample by itself, in the type's own arithmetic."""
    native = differences.astype(differences.dtype.newbyteorder("="), copy=False)
    apart = native.reshape(len(native), -1, samples)
    return np.add.accumulate(apart, axis=1, dtype=native.dtype).reshape(native.shape)


def _odd_bits(rows: Pixels, bits: int, count: int, signed: bool, order: str) -> Samples:
    """Values of `bits` bits one after the other; rows begin with a byte. Whole bytes have the file's order."""
    apart = np.unpackbits(rows, axis=1, count=count * bits).reshape(len(rows), count, bits)
    if bits % 8 == 0 and order == "<":
        apart = apart.reshape(len(rows), count, bits // 8, 8)[:, :, ::-1].reshape(apart.shape)
    size = 1 if bits <= 8 else 2 if bits <= 16 else 4
    padded = np.zeros((len(rows), count, 8 * size), np.uint8)
    padded[..., -bits:] = apart
    values: Samples = np.packbits(padded, axis=-1).view(f">u{size}")[..., 0]
    return np.where(values >> (bits - 1), values.astype(np.int64) - (1 << bits), values) if signed else values


@dataclass(frozen=True, eq=False)
class Painter:
    """Makes RGB of the samples of a frame. `span` are the values of black and white; `table` holds a level for each
    value, or three, of all pixels of a byte where they are smaller than that.
    """

    layout: Layout
    span: tuple[float, float]
    table: Pixels | None

    def samples(self, rows: Pixels) -> Samples:
        """Samples [rows, width, samples] of rows of bytes, or colours at once."""
        if self.table is None or not self.layout.tabled:
            return unpacked(self.layout, rows)
        return self.table.take(rows, axis=0).reshape(len(rows), -1, 3)[:, : self.layout.segments.width]

    def paint(self, samples: Samples, out: Pixels) -> None:
        """Samples [rows, width, samples] as RGB into `out` [rows, width, 3]."""
        layout = self.layout
        photometric = layout.photometric
        colours = samples[..., : layout.colours]
        if layout.made_rgb or layout.tabled:
            out[...] = samples
        elif photometric == Photometric.PALETTE:
            assert self.table is not None
            out[...] = _looked_up(self.table, colours[..., 0])
        elif photometric in LAB:
            out[...] = _lab(colours, layout.bits, photometric)
        elif photometric in _PILLOW_MODES:
            out[...] = _converted(_PILLOW_MODES[photometric], self._levels(colours))
        else:
            levels = self._levels(colours)
            if layout.colours == 3:
                out[...] = levels
            else:
                for channel in range(3):  # faster than to stretch the last axis
                    out[..., channel] = levels[..., 0]
        if layout.alpha is not None:
            self._lay_on_white(out, samples[..., layout.alpha])

    def _levels(self, values: Samples) -> Pixels:
        if self.table is not None:
            return self.table.take(values)
        levels = values if values.dtype == np.uint8 else to_levels(values, self.span)
        return ~levels if self.layout.photometric == Photometric.WHITE_IS_ZERO else levels

    def _lay_on_white(self, out: Pixels, alpha: Samples) -> None:
        layout = self.layout
        full = 1.0 if layout.kind == "f" else 2.0 ** (layout.bits - (layout.kind == "i")) - 1
        share = to_levels(alpha, (0.0, full))[..., None].astype(np.uint16)
        if layout.associated:
            out[...] = np.minimum(out + (255 - share), 255)
        else:
            out[...] = (out * share + 255 * (255 - share) + 127) // 255


def painter(layout: Layout, span: tuple[float, float]) -> Painter:
    """Raises RefusedError: a palette that is missing or too short."""
    table = None
    if layout.photometric == Photometric.PALETTE:
        table = _palette(layout)
    elif layout.kind == "u" and layout.bits <= 16 and layout.bits != 8:
        table = to_levels(np.arange(1 << layout.bits)[:, None], span)[:, 0]
        table = ~table if layout.photometric == Photometric.WHITE_IS_ZERO else table
    if table is not None and layout.tabled:
        pixels = _odd_bits(np.arange(256, dtype=np.uint8)[:, None], layout.bits, 8 // layout.bits, False, ">")
        table = np.broadcast_to(table.reshape(len(table), -1), (len(table), 3))[pixels].reshape(256, -1)
    return Painter(layout, span, table)


def _palette(layout: Layout) -> Pixels:
    """Colours [values, 3]. Writers that put 8-bit values into the map, which has 16 bits, are common."""
    values, size = layout.frame.values(Tag.ColorMap), 1 << layout.bits
    if values is None or values.size < 3 * size:
        raise refusal(layout.frame, f"damaged: a ColorMap of {0 if values is None else values.size} values")
    colours = values[: 3 * size].reshape(3, size).T.astype(np.uint16)
    return (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)


def _looked_up(table: Pixels, values: Samples) -> Pixels:
    if values.dtype != np.uint8:
        return table.take(values, axis=0)
    image = Image.frombytes("P", values.shape[::-1], values.tobytes())  # twice as fast
    image.putpalette(table.tobytes())
    return np.asarray(image.convert("RGB"))


def _lab(colours: Samples, bits: int, photometric: int) -> Pixels:
    levels = (colours >> (bits - 8)).astype(np.uint8)
    if photometric == Photometric.ICC_LAB:
        levels[..., 1:] ^= 0x80  # a and b are unsigned there
    return _converted("LAB", levels)


def _converted(mode: str, levels: Pixels) -> Pixels:
    height, width, _ = levels.shape
    return np.asarray(Image.frombytes(mode, (width, height), levels.tobytes()).convert("RGB"))

"""TIFF frames of every combination of tags, with the colours that they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import tiffs
from PIL import Image
from tiffs import BLACK, CMYK, ICC_LAB, JPEG, LAB, PALETTE, RGB, WHITE, YCBCR, Frame

WIDTH, HEIGHT = 45, 35
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """What is read may differ from `right` [height, width, 3] by `tolerance` on average, in a pixel by 8 times that."""

    name: str
    frame: Frame
    right: Array
    tolerance: float = 0.7
    order: str = "<"
    big: bool = False

    @property
    def content(self) -> bytes:
        return tiffs.tiff(self.frame, order=self.order, big=self.big)


def picture() -> Array:
    """Floats of 0 to 1, [height, width, 5]: smooth colours, black and white, and an opacity."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / np.array([HEIGHT, WIDTH]).reshape(2, 1, 1)
    colours = np.stack([x, y, 1 - x, (x + y) / 2, 1 - y / 2], axis=2)
    colours[4:9, 5:20], colours[12:16, 25:40] = 0, 1
    return colours


def quantised(values: Array, bits: int, kind: str) -> tuple[Array, Array]:
    """Values of 0 to 1 as samples of all of the range, and the levels 0 to 255 that these stand for."""
    if kind == "f":
        samples = values.astype(f"f{bits // 8}")
        return samples, samples.astype(float) * 255
    full = 2 ** (bits - (kind == "i")) - 1
    size = 1 if bits <= 8 else 2 if bits <= 16 else 4
    samples = np.rint(values * full).astype(np.int64)
    return samples.astype(f"{kind}{size}"), samples * (255 / full)


def grey(bits: int, kind: str = "u") -> Iterator[tuple[Frame, Array]]:
    samples, levels = quantised(picture()[..., 3:4], bits, kind)
    yield Frame(samples, bits), levels.repeat(3, 2)
    yield Frame(samples, bits, WHITE), 255 - levels.repeat(3, 2)


def negative(bits: int) -> Iterator[tuple[Frame, Array]]:
    values = picture()[..., 3:4]
    samples = (np.rint(values * (2**bits - 1)) - 2 ** (bits - 1)).astype(f"i{bits // 8}")
    yield Frame(samples, bits), 255 * values.repeat(3, 2)


def coloured(bits: int, kind: str = "u") -> Iterator[tuple[Frame, Array]]:
    samples, levels = quantised(picture()[..., :3], bits, kind)
    yield Frame(samples, bits, RGB), levels
    if kind == "u":
        yield Frame(samples, bits, RGB, planar=True), levels


def with_alpha(bits: int, photometric: int, kind: str = "u") -> Iterator[tuple[Frame, Array]]:
    chosen = picture()[..., [3, 4] if photometric in (BLACK, WHITE) else [0, 1, 2, 4]]
    for meaning, planar in product((0, 1, 2), (False, True)):
        colours, alpha = chosen[..., :-1], chosen[..., -1:]
        stored = np.concatenate([colours * alpha if meaning == 1 else colours, alpha], axis=2)
        samples, levels = quantised(stored, bits, kind)
        seen, share = levels[..., :-1], levels[..., -1:] / 255
        right = (seen, seen + 255 * (1 - share), seen * share + 255 * (1 - share))[meaning]
        frame = Frame(samples, bits, photometric, planar=planar, tags={338: ("H", [meaning])})
        yield frame, np.broadcast_to(right, (*right.shape[:2], 3))


def inked(bits: int) -> Iterator[tuple[Frame, Array]]:
    samples, levels = quantised(picture()[..., :4], bits, "u")
    inks = Image.frombytes("CMYK", (WIDTH, HEIGHT), np.rint(levels).astype(np.uint8).tobytes())
    for planar in (False, True):
        yield Frame(samples, bits, CMYK, planar=planar), np.asarray(inks.convert("RGB")).astype(float)


def in_palette(bits: int, wide: bool) -> Iterator[tuple[Frame, Array]]:
    """`wide`: the map's values have 16 bits, as they should."""
    samples, _ = quantised(picture()[..., 3:4], bits, "u")
    colours = np.random.default_rng(bits).integers(0, 256, (3, 1 << bits))
    colours[:, :2] = 255, 0
    values = (colours * 257 if wide else colours).reshape(-1).tolist()
    yield Frame(samples, bits, PALETTE, tags={320: ("H", values)}), colours.T[samples[..., 0]].astype(float)


def with_luma(subsampled: bool) -> Iterator[tuple[Frame, Array]]:
    values = np.rint(picture()[..., :3] * 200 + 20)
    if subsampled:
        values[..., 1:] = values[::2, ::2, 1:].repeat(2, 0).repeat(2, 1)[:HEIGHT, :WIDTH]
    y, cb, cr = values[..., 0], values[..., 1] - 128, values[..., 2] - 128
    right = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=2).clip(0, 255)
    fractions = {532: ("R", [0, 1, 255, 1, 128, 1, 255, 1, 128, 1, 255, 1])}
    frame = Frame(values.astype(np.uint8), 8, YCBCR, rows=12, subsampled=subsampled)
    yield frame, right
    yield replace(frame, tags=dict(fractions)), right


def perceived(bits: int, photometric: int) -> Iterator[tuple[Frame, Array]]:
    values = picture()[..., :3] * [250, 100, 100] + [2, 70, 70]  # colours that RGB has
    levels = values.round().astype(np.uint8)
    signed = levels ^ np.array([0, 128, 128], np.uint8)
    right = Image.frombytes("LAB", (WIDTH, HEIGHT), signed.tobytes()).convert("RGB")
    stored = (signed if photometric == LAB else levels).astype(np.uint16)
    samples = stored.astype(np.uint8) if bits == 8 else stored << 8
    for planar in (False, True):
        yield Frame(samples, bits, photometric, planar=planar), np.asarray(right).astype(float)


def kinds() -> Iterator[tuple[Frame, Array]]:
    """Every kind of pixels, uncompressed."""
    for bits in (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 24, 32):
        yield from grey(bits)
        yield from coloured(bits)
    for bits, kind in ((8, "i"), (16, "i"), (32, "i"), (16, "f"), (32, "f"), (64, "f")):
        yield from grey(bits, kind)
        yield from coloured(bits, kind)
    for bits in (8, 16, 32):
        yield from negative(bits)
    for bits, wide in product((1, 2, 4, 8), (True, False)):
        yield from in_palette(bits, wide)
    yield from in_palette(12, True)
    for bits, kind, photometric in ((8, "u", BLACK), (8, "u", RGB), (16, "u", BLACK), (16, "u", RGB), (32, "f", RGB)):
        yield from with_alpha(bits, photometric, kind)
    for bits in (8, 16):
        yield from inked(bits)
        for photometric in (LAB, ICC_LAB):
            yield from perceived(bits, photometric)
    for subsampled in (False, True):
        yield from with_luma(subsampled)


def stored(frame: Frame) -> Iterator[Frame]:
    """The frame in every compression, with the predictors and orders of bits that go with it."""
    whole = frame.bits in (8, 16, 32, 64) and frame.photometric != YCBCR
    predictors = [1, *([2] if whole else []), *([3] if frame.samples.dtype.kind == "f" else [])]
    for compression in tiffs.CODECS:
        for predictor in predictors if compression in (tiffs.LZW, tiffs.DEFLATE, tiffs.LZMA) else [1]:
            yield replace(frame, compression=compression, predictor=predictor)
    if frame.bits == 1 and frame.samples.shape[2] == 1:
        yield from (replace(frame, compression=compression) for compression in tiffs.FAX)
        for options in (1, 4, 5):
            yield replace(frame, compression=tiffs.G3, tags=frame.tags | {292: ("I", [options])})


def jpegs() -> Iterator[tuple[Frame, Array]]:
    plain = [*grey(8), *coloured(8), *inked(8)]
    for (frame, right), tables in product(plain, (False, True)):
        yield replace(frame, compression=JPEG, tables=tables, rows=16), right
    ((frame, right), *_) = coloured(8)
    for subsampled, tables in product((False, True), (False, True)):
        luma = replace(frame, photometric=YCBCR, compression=JPEG, subsampled=subsampled, tables=tables, rows=16)
        yield luma, right


def cases() -> Iterator[Case]:
    """Kinds x compressions x strips or tiles x byte orders x TIFF or BigTIFF x orders of bits."""
    everything = [(each, right, 0.7) for frame, right in kinds() for each in stored(frame)]
    everything += [(frame, right, 16.0 if frame.subsampled else 4.0) for frame, right in jpegs()]
    for number, ((frame, right, tolerance), tile, order) in enumerate(product(everything, (None, (16, 32)), "<>")):
        if tile and frame.compression in tiffs.FAX:
            tile = (32, 16)
        fill = 2 if number % 3 == 0 and frame.compression != JPEG else 1
        placed = replace(frame, tile=tile, fill_order=fill)
        yield Case(_name(placed, order, number), placed, right, tolerance, order, big=number % 5 == 0)


def _name(frame: Frame, order: str, number: int) -> str:
    kind = f"{frame.samples.dtype.kind}{frame.bits}x{frame.samples.shape[2]}-photometric{frame.photometric}"
    how = f"compression{frame.compression}-predictor{frame.predictor}-{'planar' if frame.planar else 'chunky'}"
    where = f"{'tiles' if frame.tile else 'strips'}-{'II' if order == '<' else 'MM'}-fill{frame.fill_order}"
    return f"{number:04}-{kind}-{how}-{where}"

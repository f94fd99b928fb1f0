"""Images of every kind as RGB."""

from __future__ import annotations

import contextlib
import math
import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from cembed.runtime.errors import CembedError

Pixels: TypeAlias = npt.NDArray[np.uint8]

_STEPS = {"L;2": 85, "L;4": 17}  # of grey, by Pillow's name for PNG's 2 and 4 bits
_MOST_MISSING = 0.1  # of a page that is worth embedding
_PIECE = 1 << 20  # values


@dataclass(frozen=True)
class Settings:
    """How pages are read; see `documents.PageReader`."""

    dpi: float
    max_pixels: int
    memory_limit: int | None


@dataclass(frozen=True, eq=False)
class Drawn:
    """A page that was read, RGB uint8 [height, width, 3]; `warning` is one line about what may be missing of it."""

    image: Pixels
    warning: str | None = None


class RefusedError(Exception):
    """Input that is left alone, for the reason given."""


def too_many_pixels(width: int, height: int, limit: int, what: str) -> RefusedError:
    return RefusedError(
        f"{width} x {height} pixels are over the limit of {limit}, and {what} cannot be reduced while it is read: "
        "set a higher one (--max-pixels)"
    )


def partly(share: float, why: str) -> str:
    """The warning for a page of which a `share` is missing, and white. Raises RefusedError if that is over a tenth."""
    percent = f"{max(0.1, 100 * share):.1f} % of the page is missing"
    if share > _MOST_MISSING:
        raise RefusedError(f"damaged: {percent}: {why}")
    return f"{percent}, and white here: {why}"


def to_rgb(image: Image.Image | npt.NDArray[np.uint8]) -> Image.Image:
    """An image of any mode, or uint8 [height, width, 3], as RGB, upright.

    The EXIF orientation is applied, transparency is put on white, deep greys are brought to 8 bits.
    Raises CembedError for an array of another shape or type, or what is no image.
    """
    if isinstance(image, np.ndarray):
        return _of_array(image)
    if not isinstance(image, Image.Image):
        raise CembedError(f"an image is a PIL.Image or a uint8 array, not {type(image).__name__}")
    image = _upright(_keyed(image))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = _grey(values)
        grey[values == image.info.get("transparency", np.nan)] = 255
        image = Image.fromarray(grey)
    elif image.has_transparency_data:
        image = _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _of_array(image: npt.NDArray[np.uint8]) -> Image.Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise CembedError(f"an image array of {image.dtype} {list(image.shape)}: give uint8 [height, width, 3]")
    return Image.fromarray(image)


def _keyed(image: Image.Image) -> Image.Image:
    """Gives PNG's transparent colour in the 8 bits of the pixels: Pillow leaves it in the bits of the file."""
    key = image.info.get("transparency")
    stored = image.tile[0][3] if isinstance(image, PngImagePlugin.PngImageFile) and image.tile else None
    if isinstance(key, int) and stored in _STEPS:
        key *= _STEPS[stored]
    elif isinstance(key, tuple) and stored == "RGB;16B":
        key = tuple(value >> 8 for value in key)
    else:
        return image
    image = image.copy()
    image.info["transparency"] = key
    return image


def _on_white(image: Image.Image) -> Image.Image:
    try:
        opaque = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    except (TypeError, ValueError):  # what is said of transparency makes no sense
        image = image.copy()
        del image.info["transparency"]
        return image
    alpha = opaque.getchannel("A")
    if image.format == "BMP" and not alpha.getbbox():  # programs that know no alpha leave its byte at 0
        return opaque
    paper = Image.new("RGB", opaque.size, "white")
    paper.paste(opaque, mask=alpha)
    return paper


def reduction(width: int, height: int, limit: int) -> int:
    """By how much both sides must be divided, rounding up, for `limit` pixels at most."""
    scale = 1
    while -(-width // scale) * -(-height // scale) > limit:
        scale += 1 + scale // 16
    return scale


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(KeyError, SyntaxError, TypeError, ValueError, struct.error):  # unreadable EXIF
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image


def _grey(values: npt.NDArray[Any]) -> Pixels:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return to_levels(values, span_of(low, high, values.dtype.kind, 8 * values.dtype.itemsize))


def span_of(low: float, high: float, kind: str, bits: int) -> tuple[float, float]:
    """The values that are black and white where samples of a numpy `kind` and of `bits` reach from `low` to `high`.

    Up to 16 bits without a sign have all of their range. Others are taken for what holds them: 1 (floats), 255, 65535,
    or the range of the type. What is below 0 without a sign for it, or uses less than a sixteenth of that, is spread
    from its least to its greatest value.

    >>> [span_of(0, high, "u", 32) for high in (99, 65000, 70000, 3e9)]
    [(0.0, 255.0), (0.0, 65535.0), (0, 70000), (0.0, 4294967295.0)]
    """
    if kind == "u" and bits <= 16:
        return 0.0, 2.0**bits - 1
    greatest = 65535.0 if kind == "f" else 2.0 ** (bits - (kind == "i")) - 1
    if low < 0:
        whole = kind == "i" and 16 * max(high, -low) >= greatest
        return (-greatest - 1, greatest) if whole else (low, high)
    steps = [step for step in ((1.0, 255.0, 65535.0) if kind == "f" else (255.0, 65535.0)) if step < greatest]
    return _span_above(low, high, [*steps, greatest])


def _span_above(low: float, high: float, steps: list[float]) -> tuple[float, float]:
    """From 0 to the first of `steps` that holds `high`, unless a small part of it would be used."""
    full = next((step for step in steps if high <= step), math.inf)
    return (0.0, full) if full == steps[0] or 16 * high >= full else (low, high)


def to_levels(values: npt.NDArray[Any], span: tuple[float, float]) -> Pixels:
    """Values [height, ...] as 0..255, where `span` is black and white; NaN is black.

    >>> to_levels(np.array([[0, 128, 129, 65535]]), (0, 65535)).tolist()
    [[0, 0, 1, 255]]
    >>> to_levels(np.array([[-1.0, 0.0, 1.0, np.nan]]), (-1, 1)).tolist()
    [[0, 128, 255, 0]]
    """
    low, high = span
    levels = np.empty(values.shape, np.uint8)
    step = max(1, len(values) * _PIECE // max(1, values.size))
    for start in range(0, len(values), step):  # piece by piece, as float64 of the whole would be 800 MB
        piece = np.nan_to_num(values[start : start + step].astype(np.float64), nan=low)
        levels[start : start + step] = np.rint(((piece - low) * (255 / (high - low or 1.0))).clip(0, 255))
    return levels

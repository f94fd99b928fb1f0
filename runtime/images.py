"""Images of every kind as RGB."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from cembed.runtime.errors import CembedError

Pixels: TypeAlias = npt.NDArray[np.uint8]


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


def to_rgb(image: Image.Image | npt.NDArray[np.uint8]) -> Image.Image:
    """An image of any mode, or uint8 [height, width, 3], as RGB, upright.

    The EXIF orientation is applied, transparency is put on white, deep greys are brought to 8 bits.
    Raises CembedError for an array of another shape or type, or what is no image.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise CembedError(f"an image array of {image.dtype} {list(image.shape)}: give uint8 [height, width, 3]")
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise CembedError(f"an image is a PIL.Image or a uint8 array, not {type(image).__name__}")
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_grey(np.asarray(image)))
    elif image.has_transparency_data:
        image, paper = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        paper.paste(image, mask=image.getchannel("A"))
        image = paper
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(KeyError, SyntaxError, TypeError, ValueError, struct.error):  # unreadable EXIF
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image


def _grey(values: npt.NDArray[Any]) -> Pixels:
    """Brings grey values [height, width] wider than a byte to 0..255.

    The full range is 65535 for integers and 1 for floats; with values outside it, from their least to their greatest.

    >>> _grey(np.array([[0, 128, 129, 65535]], np.uint16)), _grey(np.array([[-1.0, 0.0, 1.0, np.nan]]))
    (array([[  0,   0,   1, 255]], dtype=uint8), array([[  0, 128, 255,   0]], dtype=uint8))
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    full = 1.0 if values.dtype.kind == "f" else 65535.0
    if low >= 0 and high <= full:
        low, high = 0.0, full
    grey = np.empty(values.shape, np.uint8)
    for row, line in zip(grey, values, strict=True):  # row by row, as float64 of the whole would be 800 MB
        scaled = (np.nan_to_num(line.astype(np.float64), nan=low) - low) * (255 / (high - low or 1.0))
        row[:] = np.rint(scaled.clip(0, 255))
    return grey

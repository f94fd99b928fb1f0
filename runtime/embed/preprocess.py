"""From an image to `pixel_values`: the numbers of the Pillow-based processors of transformers, in numpy and Pillow.

Letters: P patches, C pixels of a patch (3 * patch_size**2).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cembed.runtime.bundle.image_processing import MAX_ASPECT_RATIO, ImageProcessing
from cembed.runtime.embed.positions import Grid
from cembed.runtime.embed.tiles import cut_tiles, stretch, tile_sizes
from cembed.runtime.errors import CembedError


def smart_resize(height: int, width: int, spec: ImageProcessing) -> tuple[int, int]:
    """Size in pixels, multiples of `spec.factor` within the pixel limits, nearest to the aspect ratio given.

    Raises CembedError for an aspect ratio over 200, as the Qwen2-VL processor does.

    >>> spec = ImageProcessing("smart", 14, 2, 3136, 75264, 1.0, (0, 0, 0), (1, 1, 1))
    >>> smart_resize(560, 420, spec)
    (308, 224)
    >>> smart_resize(1, 1, spec)
    (56, 56)
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise CembedError(
            f"an image of {width} x {height} pixels: sides may differ by {MAX_ASPECT_RATIO} times at most"
        )
    factor = spec.factor
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > spec.max_pixels:
        scale = math.sqrt(height * width / spec.max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < spec.min_pixels:
        scale = math.sqrt(spec.min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def resized_size(height: int, width: int, spec: ImageProcessing) -> tuple[int, int]:
    if spec.resize == "smart":
        return smart_resize(height, width, spec)
    if spec.tiles is not None:
        return tile_sizes(height, width, spec, spec.tiles)[1]
    side = math.isqrt(spec.max_pixels)
    return side, side


@lru_cache(maxsize=8)
def _normalised_levels(spec: ImageProcessing) -> NDArray[np.float32]:
    """The float32 value [3, 256] of every 8-bit level of each channel: rescaled, then normalised."""
    levels = (np.arange(256) * spec.rescale_factor).astype(np.float32)
    mean, std = np.array(spec.mean, np.float32)[:, None], np.array(spec.std, np.float32)[:, None]
    return (levels - mean) / std


def preprocess(image: Image.Image, spec: ImageProcessing) -> tuple[NDArray[np.float32], Grid]:
    """`pixel_values` float32 [P, C] and the grid of an RGB image.

    Patches come in merge groups, row by row; within a patch the order is channel, row, column. Tiles come one after the
    other, the whole page last, which the grid does not count. Temporal copies of a still image are left out: their
    weights were summed at export.
    """
    page = resize(image, spec)
    return page_patches(page, spec), grid_of(page, spec)


def resize(image: Image.Image, spec: ImageProcessing) -> Image.Image:
    """An RGB image in the size of whole visual tokens, or of whole tiles."""
    if spec.tiles is not None:
        return stretch(image, spec, spec.tiles)
    height, width = resized_size(image.height, image.width, spec)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def grid_of(page: Image.Image, spec: ImageProcessing) -> Grid:
    """Of a resized page, without the whole page after tiles."""
    return page.height // spec.patch_size, page.width // spec.patch_size


def page_patches(
    page: Image.Image, spec: ImageProcessing, read: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """`pixel_values` float32 [P, C] of a resized page, and of the whole page after tiles.

    `read` says of which visual tokens or tiles [rows, columns], by default all.
    """
    if spec.tiles is None:
        return patches(np.asarray(page), spec, read)
    return np.concatenate([patches(part, spec) for part in cut_tiles(page, spec.tiles.side, read)])


def patches(
    pixels: NDArray[np.uint8], spec: ImageProcessing, read: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """The values [P, C] of pixels [height, width, 3], of the visual tokens [rows, columns] that are `read`."""
    patch, merge = spec.patch_size, spec.merge_size
    rows, columns = (side // spec.factor for side in pixels.shape[:2])
    blocks = pixels.reshape(rows, merge, patch, columns, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    blocks = (blocks if read is None else blocks[read]).reshape(-1, 3, patch * patch)
    levels = _normalised_levels(spec)
    values = np.empty(blocks.shape, np.float32)
    for channel in range(3):
        np.take(levels[channel], blocks[:, channel], out=values[:, channel])
    return values.reshape(len(values), -1)

"""What the vision graph is fed of a page: one row for each input that a bundle may declare.

Letters: P patches, C pixels of a patch, B images of one page (tiles; 1 without them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.manifest import Tensor
from cembed.runtime.embed.positions import Grid, patch_fractions, patch_positions, window_index, window_restore

Pixels = NDArray[np.float32]
Feed = Callable[[Pixels, Grid, ImageProcessing], NDArray[Any]]


def images(pixels: Pixels, image: ImageProcessing) -> Pixels:
    """`pixels` as [B, P / B, C]."""
    return pixels.reshape(-1, image.input_patches or len(pixels), pixels.shape[1])


FEEDS: Mapping[str, Feed] = {
    "pixel_values": lambda pixels, _, image: images(pixels, image),
    "patch_positions": lambda _, grid, image: patch_positions(grid, image.merge_size),
    "patch_fractions": lambda _, grid, image: patch_fractions(grid, image.merge_size),
    "window_index": lambda _, grid, image: window_index(grid, image),
    "window_restore": lambda pixels, grid, image: window_restore(window_index(grid, image), len(pixels)),
}
"""By input, from a page's patches [P, C], its grid, and how pages are prepared."""


def vision_feeds(
    inputs: Iterable[Tensor], pixels: Pixels, grid: Grid, image: ImageProcessing
) -> dict[str, NDArray[Any]]:
    """The arrays of a vision graph's `inputs`, whose names a manifest's contract has checked."""
    return {tensor.name: FEEDS[tensor.name](pixels, grid, image) for tensor in inputs}

"""What the vision graph is fed, in one place: a new input is one row of `FEEDS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.manifest import ImageProcessing, Tensor
from cembed.runtime.embed.positions import Grid, patch_fractions, patch_positions, window_index, window_restore
from cembed.runtime.engines.session import Array

Pixels = NDArray[np.float32]
Feed = Callable[[Pixels, Grid, ImageProcessing], Array]

FEEDS: dict[str, Feed] = {
    "pixel_values": lambda pixels, grid, image: pixels[None],
    "patch_positions": lambda pixels, grid, image: patch_positions(grid, image.merge_size),
    "patch_fractions": lambda pixels, grid, image: patch_fractions(grid, image.merge_size),
    "window_index": lambda pixels, grid, image: window_index(grid, image),
    "window_restore": lambda pixels, grid, image: window_restore(window_index(grid, image), len(pixels)),
}
"""Each input by name, from `pixel_values` [P, C], their grid, and how images are prepared."""


def vision_feeds(inputs: Iterable[Tensor], pixels: Pixels, grid: Grid, image: ImageProcessing) -> dict[str, Array]:
    """The inputs that a vision graph declares, for one image."""
    return {tensor.name: FEEDS[tensor.name](pixels, grid, image) for tensor in inputs}

"""What the vision graph is fed of a page: one row for each input that a bundle may declare.

Letters: P patches, C pixels of a patch, B images of one page (tiles; 1 without them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.manifest import Tensor
from cembed.runtime.embed.positions import (
    Grid,
    IntArray,
    patch_fractions,
    patch_positions,
    window_index,
    window_restore,
    windows_read,
)

Pixels = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Patches:
    """A page's patches [P, C], those that are read; the grid of all, how pages are prepared, and which visual tokens or
    tiles [rows, columns] are read, None for all."""

    pixels: Pixels
    grid: Grid
    image: ImageProcessing
    read: Mask | None = None

    def images(self) -> Pixels:
        """The pixels as [B, P / B, C]."""
        patches = self.image.input_patches if self.image.tiles else len(self.pixels)
        return self.pixels.reshape(-1, patches or 1, self.pixels.shape[1])

    def of_read(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Those of the rows of all patches that are of patches that are read."""
        return rows if self.read is None else rows[self._is_read(self.read)]

    def windows(self) -> IntArray:
        windows = window_index(self.grid, self.image)
        return windows if self.read is None else windows_read(windows, self._is_read(self.read))

    def _is_read(self, read: Mask) -> Mask:
        return np.repeat(read.reshape(-1), self.image.merge_size**2)


FEEDS: Mapping[str, Callable[[Patches], NDArray[Any]]] = {
    "pixel_values": Patches.images,
    "patch_positions": lambda page: page.of_read(patch_positions(page.grid, page.image.merge_size)),
    "patch_fractions": lambda page: page.of_read(patch_fractions(page.grid, page.image.merge_size)),
    "window_index": Patches.windows,
    "window_restore": lambda page: window_restore(page.windows(), len(page.pixels)),
}
"""By input."""


def vision_feeds(
    inputs: Iterable[Tensor], pixels: Pixels, grid: Grid, image: ImageProcessing, read: Mask | None = None
) -> dict[str, NDArray[Any]]:
    """The arrays of a vision graph's `inputs`, whose names a manifest's contract has checked; see `Patches`."""
    page = Patches(pixels, grid, image, read)
    return {tensor.name: FEEDS[tensor.name](page) for tensor in inputs}

"""Rotary positions and window indices, computed on the host: pure numpy, the same for every engine.

Letters: S sequence positions, P patches, V visual tokens, W windows, L patches of a full window.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.manifest import Positions, SlotPositions

IntArray = NDArray[np.int64]
Grid = tuple[int, int]
"""Height and width of an image in patches."""


def prompt_positions(is_image: NDArray[np.bool_], grid: Grid | None, spec: Positions, merge_size: int) -> IntArray:
    """Positions [axes, S] of a prompt whose image tokens, if any, are one run of `grid` (M-RoPE, arXiv 2409.12191 2.1).

    Text moves all three axes by one; a visual token has its row and column; the text after it goes on after the
    largest position so far.

    >>> text = np.zeros(3, bool)
    >>> prompt_positions(text, None, Positions(axes=1, first=1), 1)
    array([[1, 2, 3]])
    >>> page = np.array([False, True, True, True, True, True, True, False])
    >>> prompt_positions(page, (4, 6), Positions(axes=3, first=0), 2)
    array([[0, 1, 1, 1, 1, 1, 1, 4],
           [0, 1, 1, 1, 2, 2, 2, 4],
           [0, 1, 2, 3, 1, 2, 3, 4]])
    """
    length = len(is_image)
    positions = np.tile(np.arange(length, dtype=np.int64), (spec.axes, 1))
    if grid is not None and spec.axes == 3:
        start = int(np.argmax(is_image))
        rows, columns = grid[0] // merge_size, grid[1] // merge_size
        end = start + rows * columns
        positions[0, start:end] = start
        positions[1, start:end] = start + np.repeat(np.arange(rows), columns)
        positions[2, start:end] = start + np.tile(np.arange(columns), rows)
        positions[:, end:] = start + max(rows, columns) + np.arange(length - end)
    return positions + spec.first


def slot_positions(prompt: IntArray, num_slots: int, policy: SlotPositions) -> IntArray:
    """Positions [axes, num_slots] of the latent slots after a prompt's positions [axes, S].

    `zero`: every slot is at position 0, as in the released CausalQwen2.5; `continue`: they go on after the prompt.

    >>> slot_positions(np.array([[1, 2, 3]]), 2, "continue")
    array([[4, 5]])
    >>> slot_positions(np.array([[1, 2, 3]]), 2, "zero")
    array([[0, 0]])
    """
    steps = np.arange(1, num_slots + 1, dtype=np.int64)
    first = prompt.max() + steps if policy == "continue" else np.zeros_like(steps)
    return np.tile(first, (prompt.shape[0], 1))


def cells_read(grid: Grid, read: NDArray[np.bool_] | None = None) -> IntArray:
    """Top, left, bottom and right [V, 4] of the cells of a grid of rows and columns that are `read`, row by row.

    >>> cells_read((2, 2), np.array([[True, False], [True, True]])).tolist()
    [[0, 0, 1, 1], [1, 0, 2, 1], [1, 1, 2, 2]]
    """
    corners = np.argwhere(np.ones(grid, bool) if read is None else read)
    return np.concatenate([corners, corners + 1], axis=1)


def patch_positions(grid: Grid, merge_size: int) -> IntArray:
    """Row and column [P, 2] of each patch, in the order of `pixel_values`: merge groups row by row.

    >>> patch_positions((2, 4), 2).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    """
    rows, columns = np.indices(grid, dtype=np.int64)
    return np.stack([_merge_order(rows, merge_size), _merge_order(columns, merge_size)], axis=1)


def patch_fractions(grid: Grid, merge_size: int) -> NDArray[np.float32]:
    """Row and column [P, 2] of each patch as shares of the way to the last ones, in the order of `pixel_values`.

    >>> (3 * patch_fractions((2, 4), 2)[:6, 1]).tolist()
    [0.0, 1.0, 0.0, 1.0, 2.0, 3.0]
    """
    last = np.maximum(np.array(grid) - 1, 1).astype(np.float32)
    fractions: NDArray[np.float32] = patch_positions(grid, merge_size).astype(np.float32) / last
    return fractions


def _merge_order(plane: IntArray, merge_size: int) -> IntArray:
    rows, columns = plane.shape[0] // merge_size, plane.shape[1] // merge_size
    return plane.reshape(rows, merge_size, columns, merge_size).transpose(0, 2, 1, 3).reshape(-1)


def window_index(grid: Grid, image: ImageProcessing) -> IntArray:
    """Patches [W, L] that attend to each other (Qwen2.5-VL, arXiv 2502.13923 2.1.1); -1 fills windows at the edges.

    >>> spec = ImageProcessing("smart", 14, 2, 784, 784, 1.0, (0, 0, 0), (1, 1, 1), window_size=56)
    >>> window_index((2, 6), spec).shape
    (2, 16)
    >>> [row[row >= 0].tolist() for row in window_index((2, 6), spec)]
    [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11]]
    """
    group = image.merge_size**2
    side = image.window_size // image.factor  # merge groups along a window
    rows, columns = grid[0] // image.merge_size, grid[1] // image.merge_size
    padded = np.full((-(-rows // side) * side, -(-columns // side) * side), -1, dtype=np.int64)
    padded[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    groups = padded.reshape(-1, side, padded.shape[1] // side, side).transpose(0, 2, 1, 3).reshape(-1, side * side)
    patches = groups[:, :, None] * group + np.arange(group)
    return np.where(groups[:, :, None] < 0, -1, patches).reshape(len(groups), -1)


def windows_read(windows: IntArray, read: NDArray[np.bool_]) -> IntArray:
    """Windows [W, L] of the patches of which `read` [P] says that they are, counted anew; windows without any go.

    >>> windows_read(np.array([[0, 1], [2, 3], [4, -1]]), np.array([False, True, False, False, True]))
    array([[-1,  0],
           [ 1, -1]])
    """
    numbers = np.where(read, np.cumsum(read) - 1, -1)
    left = np.where(windows < 0, -1, numbers[windows])
    return left[(left >= 0).any(axis=1)]


def window_restore(windows: IntArray, num_patches: int) -> IntArray:
    """Where in the flattened windows [W * L] each patch [P] stands.

    >>> window_restore(np.array([[1, 0, -1], [2, -1, -1]]), 3)
    array([1, 0, 3])
    """
    flat = windows.reshape(-1)
    restore = np.empty(num_patches, dtype=np.int64)
    restore[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    return restore

"""Pages as square tiles, and the whole page in one more: sizes as the Idefics3 processor of transformers computes them.

A size is height and width in pixels, a grid rows and columns of tiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cembed.runtime.bundle.image_processing import ImageProcessing, Tiles

Size = tuple[int, int]


def tile_sizes(height: int, width: int, spec: ImageProcessing, tiles: Tiles) -> tuple[Size, Size]:
    """The two sizes that a page is resized to, one after the other; the second one is whole tiles.

    The longer edge becomes `longest_edge`, or as many whole tiles as leave all of them within `spec.max_pixels`.

    >>> tiles = Tiles(512, 2048, "", "", "", "")
    >>> spec = ImageProcessing("tiles", 16, 4, 512**2, 17 * 512**2, 1.0, (0, 0, 0), (1, 1, 1), tiles=tiles)
    >>> tile_sizes(1100, 850, spec, tiles)
    ((2048, 1582), (2048, 2048))
    >>> tile_sizes(1100, 850, spec.limited(10 * 64), tiles)
    ((1536, 1186), (1536, 1536))
    >>> tile_sizes(1100, 850, spec.limited(64), tiles)
    ((512, 396), (512, 512))
    """
    edge, side = tiles.longest_edge, tiles.side
    while True:
        first = keep_ratio(height, width, edge)
        second = whole_tiles(*first, side)
        if edge <= side or tiles.count(second[0] // side, second[1] // side) * side**2 <= spec.max_pixels:
            return first, second
        edge = (edge - 1) // side * side


def keep_ratio(height: int, width: int, edge: int) -> Size:
    """A size whose longer edge is `edge` and whose shorter one is even, in float64 as transformers has it."""
    ratio = width / height
    if width >= height:
        shorter = int(edge / ratio)
        return max(shorter + shorter % 2, 1), edge
    shorter = int(edge * ratio)
    return edge, max(shorter + shorter % 2, 1)


def whole_tiles(height: int, width: int, side: int) -> Size:
    """Multiples of `side`: the longer edge rounded up, the shorter one stretched with it and then rounded up."""
    ratio = width / height
    if width >= height:
        longer = -(-width // side) * side
        return -(-int(longer / ratio) // side) * side, longer
    longer = -(-height // side) * side
    return longer, -(-int(longer * ratio) // side) * side


def stretch(image: Image.Image, spec: ImageProcessing, tiles: Tiles) -> Image.Image:
    """An RGB image in the size of whole tiles."""
    page = image
    for height, width in tile_sizes(image.height, image.width, spec, tiles):
        page = page.resize((width, height), Image.Resampling.LANCZOS)
    return page


def cut_tiles(page: Image.Image, side: int, read: NDArray[np.bool_] | None = None) -> list[NDArray[np.uint8]]:
    """Tiles [side, side, 3] of an RGB image of whole ones, row by row, then the whole of it.

    `read` says which tiles [rows, columns] are to be there, by default all.
    """
    parts = [np.asarray(part) for part in crops(page, side)]
    if len(parts) == 1:
        return parts
    if read is not None:
        parts = [part for part, is_read in zip(parts, read.reshape(-1), strict=True) if is_read]
    return [*parts, np.asarray(page.resize((side, side), Image.Resampling.LANCZOS))]


def tile_cells(grid: Size, across: int, read: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """Top, left, bottom and right [V, 4] of what the tokens of `cut_tiles` show of a grid of rows and columns of tokens
    over the page, of which a tile is `across` wide and high. A token of the whole page shows several.

    >>> tile_cells((2, 4), 2, np.array([[True, False]])).tolist()
    [[0, 0, 1, 1], [0, 1, 1, 2], [1, 0, 2, 1], [1, 1, 2, 2], [0, 0, 1, 2], [0, 2, 1, 4], [1, 0, 2, 2], [1, 2, 2, 4]]
    """
    in_tile = np.indices((across, across)).reshape(2, -1).T
    tiles = np.array((grid[0] // across, grid[1] // across))
    corners = np.argwhere(np.ones(tiles, bool) if read is None else read)
    alone = len(corners) == 0 or tiles.prod() == 1
    first = np.zeros((0, 2), np.int64) if alone else (across * corners[:, None] + in_tile).reshape(-1, 2)
    return np.concatenate(
        [np.concatenate([first, first + 1], axis=1), np.concatenate([in_tile * tiles, (in_tile + 1) * tiles], axis=1)]
    )


def crops(page: Image.Image, side: int) -> Iterator[Image.Image]:
    for top in range(0, page.height, side):
        for left in range(0, page.width, side):
            yield page.crop((left, top, left + side, top + side))

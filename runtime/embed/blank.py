"""Blank paper: which parts of a page need not be read.

The idea, to leave patches of background out before the vision tower, is PixelPrune's (arXiv 2604.00886); the criterion
is our own. It is made of sums of 8-bit levels, so it gives the same in every language, and looks at one page alone.

A part is a square of pixels that becomes one visual token. Letters: R rows and C columns of parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.image_processing import ImageProcessing

Mask = NDArray[np.bool_]

PARTS = 48  # of the shorter side of a page, where it is asked whether all of it is blank
EDGE = 16  # a page is blank if all of it is but this part of each side: shadows, holes, staples
FAINTEST = 6  # levels by which writing makes pixels deviate, beside what noise does in the page's calmest tenth
NOISIEST = 16  # levels of deviation in the calmest tenth: over that, nothing tells noise from faint writing
COLOUR = 24  # levels that the mean of a blank part may be away from the paper's colour
LEAST = 16  # parts that are read of any page that has as many


@dataclass(frozen=True, eq=False)
class Sums:
    """Of the levels in each part, int64 [R, C, 3], of their squares, int64 [R, C, 3], and the pixels of a part."""

    levels: NDArray[np.int64]
    squares: NDArray[np.int64]
    pixels: int

    @classmethod
    def of(cls, pixels: NDArray[np.uint8], side: int) -> Sums:
        """Of parts of `side` pixels in pixels [R * side, C * side, 3]."""
        rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
        lines = pixels.reshape(rows, side, columns * side * 3).astype(np.uint16)
        shape = (rows, columns, side, 3)
        levels = lines.sum(axis=1, dtype=np.int32).reshape(shape).sum(axis=2, dtype=np.int64)
        squares = (lines * lines).sum(axis=1, dtype=np.uint32).reshape(shape).sum(axis=2, dtype=np.int64)
        return cls(levels, squares, side * side)

    def variances(self) -> NDArray[np.int64]:
        """Of the levels in each part [R, C], in the channel where it is largest, times `pixels` squared.

        >>> Sums.of(np.array([[[1, 2, 3], [1, 4, 3]], [[1, 2, 3], [1, 4, 3]]], np.uint8), 2).variances()
        array([[16]])
        """
        variances: NDArray[np.int64] = (self.pixels * self.squares - self.levels**2).max(axis=2)
        return variances


def blank_parts(sums: Sums) -> Mask:
    """Parts [R, C] of nothing but paper: as calm as the calmest tenth, and of the colour of two thirds of those.

    None are where the calmest tenth is noisy, or has no colour in common: there is no paper. Variances of noise and
    writing add up, so what is too faint to be found is the same on a noisy page and on a clean one.
    """
    variances, level = sums.variances(), sums.pixels**2
    calmest = np.sort(variances, axis=None)[variances.size // 10]
    calm: Mask = variances <= calmest + FAINTEST**2 * level
    levels = np.sort(sums.levels[calm], axis=0)
    paper = levels[(len(levels) - 1) // 2]
    blank: Mask = calm & (np.abs(sums.levels - paper) <= COLOUR * sums.pixels).all(axis=2)
    there_is_paper = calmest <= NOISIEST**2 * level and 3 * np.count_nonzero(blank) > 2 * np.count_nonzero(calm)
    return blank if there_is_paper else np.zeros(blank.shape, bool)


def parts_to_read(pixels: NDArray[np.uint8], image: ImageProcessing) -> Mask:
    """What is read of a page's pixels [height, width, 3] in the size that `image` asks for.

    Visual tokens [rows, columns]: those that are not blank, and their neighbours to the left and right; the first and
    the last one, from which positions are counted; and LEAST of a page that is all but blank. Where the page comes in
    tiles, these [rows, columns]: those with such a token in them, and there may be none.
    """
    found = with_neighbours(~blank_parts(Sums.of(pixels, image.factor)))
    if image.tiles is None:
        return enough(found)
    side = image.tiles.side // image.factor
    rows, columns = found.shape[0] // side, found.shape[1] // side
    tiles = np.asarray(found.reshape(rows, side, columns, side).any(axis=(1, 3)), bool)
    return tiles if tiles.size > 1 else np.ones(tiles.shape, bool)


def is_blank(page: NDArray[np.uint8]) -> bool:
    """Whether there is nothing on a page [height, width, 3] but at its edges.

    >>> is_blank(np.full((300, 200, 3), 240, np.uint8))
    True
    """
    side = max(2, min(page.shape[:2]) // PARTS)
    rows, columns = page.shape[0] // side, page.shape[1] // side
    if min(rows, columns) < 2 * EDGE:  # a stamp, not a page
        return False
    blank = blank_parts(Sums.of(np.ascontiguousarray(page[: rows * side, : columns * side]), side))
    top, left = rows // EDGE, columns // EDGE
    return bool(blank[top : rows - top, left : columns - left].all())


def with_neighbours(content: Mask) -> Mask:
    """
    >>> with_neighbours(np.array([[True, False, False, False, True]])).astype(int)
    array([[1, 1, 0, 1, 1]])
    """
    read = content.copy()
    read[:, 1:] |= content[:, :-1]
    read[:, :-1] |= content[:, 1:]
    return read


def enough(found: Mask) -> Mask:
    """With the first and the last part; with LEAST that are spread over the page, where that is not so many.

    >>> np.flatnonzero(enough(np.zeros((1, 31), bool))).tolist()
    [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30]
    """
    read = found.reshape(-1).copy()
    read[[0, -1]] = True
    if np.count_nonzero(read) < LEAST:
        read[np.arange(LEAST) * (read.size - 1) // (LEAST - 1)] = True
    return read.reshape(found.shape)

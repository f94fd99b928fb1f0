"""How a bundle's pages are prepared, as frozen dataclasses of its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from cembed.runtime.bundle.schema import Range
from cembed.runtime.errors import CembedError

MAX_ASPECT_RATIO = 200  # of an image that is resized smartly, as the Qwen2-VL processor has it
MAX_TILES = 1 << 10  # of a page; Idefics3 itself makes 145

PatchSize = Annotated[int, Range(1, 256)]
MergeSize = Annotated[int, Range(1, 16)]
Pixels = Annotated[int, Range(1, 1 << 28)]
WindowSize = Annotated[int, Range(0, 4096)]
Edge = Annotated[int, Range(1, 4096)]
Positive = Annotated[float, Range(1e-6, 1e3)]
Level = Annotated[float, Range(-1e3, 1e3)]


@dataclass(frozen=True)
class Tiles:
    """How a page becomes square tiles of `side` pixels, row by row, and the whole page in one more (Idefics3,
    arXiv 2408.12637).

    Its longer edge becomes `longest_edge` before it is stretched to whole tiles; a page of one tile is only that. In
    the prompt `{image}` stands for `tile` once for each, with `{row}` and `{column}` counted from 1, `row_end` after
    each row, and `page`; for `alone` if there is but one.
    """

    side: Edge
    longest_edge: Edge
    tile: str
    row_end: str
    page: str
    alone: str

    @staticmethod
    def count(rows: int, columns: int) -> int:
        """Tiles of a page, the whole page counted.

        >>> Tiles.count(4, 3), Tiles.count(1, 1)
        (13, 1)
        """
        return 1 if rows == columns == 1 else rows * columns + 1

    def grids(self, most: int) -> list[tuple[int, int]]:
        """Rows and columns of pages of up to `most` tiles."""
        steps = range(1, -(-self.longest_edge // self.side) + 1)
        return [(rows, columns) for rows in steps for columns in steps if self.count(rows, columns) <= most]

    def fill(self, rows: int, columns: int, read: Sequence[Sequence[bool]] | None = None) -> str:
        """What stands for `{image}` in the prompt of a page, with `{image}` once for each tile.

        Of the tiles [rows, columns] only those that are `read` are there; None is all. If there is none, the whole page
        stands alone; a row without any has no end.

        >>> tiles = Tiles(32, 64, "<{row}{column}>", "|", "page", "alone")
        >>> tiles.fill(2, 2), tiles.fill(2, 2, [[False, False], [False, True]]), tiles.fill(1, 2, [[False, False]])
        ('<11><12>|<21><22>|page', '<22>|page', 'alone')
        """
        cells = [
            [
                self.tile.replace("{row}", str(row + 1)).replace("{column}", str(column + 1))
                for column in range(columns)
                if read is None or read[row][column]
            ]
            for row in range(rows)
        ]
        if rows == columns == 1 or not any(cells):
            return self.alone
        return "".join("".join(row) + self.row_end for row in cells if row) + self.page


@dataclass(frozen=True)
class ImageProcessing:
    """From an RGB image to `pixel_values`.

    `smart` resizing keeps the aspect ratio within `min_pixels`..`max_pixels` in steps of `patch_size * merge_size`
    (Qwen2-VL, arXiv 2409.12191); `fixed` always gives `max_pixels`, square (SigLIP); `tiles` are those of `tiles`, and
    the pixels are counted in all of them. A window of the vision tower is `window_size` pixels wide; 0 means that there
    are none. With `skip_blank` only what is not blank paper is read, unless the caller says otherwise.
    """

    resize: Literal["smart", "fixed", "tiles"]
    patch_size: PatchSize
    merge_size: MergeSize
    min_pixels: Pixels
    max_pixels: Pixels
    rescale_factor: Positive
    mean: tuple[Level, Level, Level]
    std: tuple[Positive, Positive, Positive]
    window_size: WindowSize = 0
    tiles: Tiles | None = None
    skip_blank: bool = False

    @property
    def factor(self) -> int:
        """Side of the square of pixels that becomes one visual token."""
        return self.patch_size * self.merge_size

    @property
    def max_visual_tokens(self) -> int:
        return self.max_pixels // self.factor**2

    @property
    def input_patches(self) -> int | None:
        """Patches of one image of the vision graph; None where that depends on the page."""
        if self.resize == "smart":
            return None
        return (self.tiles.side**2 if self.tiles else self.max_pixels) // self.patch_size**2

    def limited(self, tokens: int | None, most: int | None = None) -> ImageProcessing:
        """With at most `tokens` visual tokens a page; None leaves it as it is.

        Raises CembedError: pages of one size only, more than `most`, fewer than the smallest page takes.
        """
        if tokens is None:
            return self
        if self.resize == "fixed":
            raise CembedError(f"max_visual_tokens is {tokens}: pages always take {self.max_visual_tokens} here")
        if most is None and self.tiles is not None:
            most = self.max_visual_tokens  # more tiles would need a larger page
        smallest = -(-self.min_pixels // self.factor**2)
        if tokens < smallest or (most is not None and tokens > most):
            raise CembedError(
                f"max_visual_tokens is {tokens}: the smallest page takes {smallest}"
                + ("" if most is None else f", the largest {most}")
            )
        return replace(self, max_pixels=tokens * self.factor**2)

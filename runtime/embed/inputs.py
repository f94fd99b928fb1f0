"""From a page or a query to what the decoder is fed.

Letters: S positions of the prompt, H hidden, P patches, V visual tokens, A position axes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.graph_tensors import EMBEDS, row_tensors, row_width
from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.manifest import Manifest, Tensor
from cembed.runtime.bundle.prompts import Prompter, load_tokenizer, page_prompt
from cembed.runtime.embed.blank import parts_to_read
from cembed.runtime.embed.pooling import require_finite
from cembed.runtime.embed.positions import Grid, IntArray, cells_read, prompt_positions
from cembed.runtime.embed.preprocess import grid_of, page_patches, resize
from cembed.runtime.embed.tiles import tile_cells
from cembed.runtime.embed.vision_feeds import Mask, vision_feeds
from cembed.runtime.engines.session import Array, Session
from cembed.runtime.errors import CembedError
from cembed.runtime.pages.images import to_rgb

ImageLike = Image.Image | NDArray[np.uint8]


@dataclass(frozen=True)
class Prompt:
    """What the decoder is fed: rows [S, width] by the names of its inputs, at positions [A, S]."""

    rows: Mapping[str, Array]
    positions: IntArray

    def __len__(self) -> int:
        return int(self.positions.shape[1])

    def followed_by(self, slots: Prompt) -> Prompt:
        rows = {name: np.concatenate([rows, slots.rows[name]]) for name, rows in self.rows.items()}
        return Prompt(rows, np.concatenate([self.positions, slots.positions], axis=1))

    def part(self, start: int, end: int) -> Prompt:
        """What is fed at start..end."""
        return Prompt({name: rows[start:end] for name, rows in self.rows.items()}, self.positions[:, start:end])

    def feeds(self) -> dict[str, Array]:
        """Inputs of a text graph, for a batch of one."""
        return {name: rows[None] for name, rows in self.rows.items()} | {"position_ids": self.positions[:, None]}


@dataclass(frozen=True, eq=False)
class PagePrompt:
    """A page's prompt, and what its visual tokens show.

    Token v is at `places[v]` in the prompt, and shows `cells[v]` (top, left, bottom, right) of a `grid` of rows and
    columns over the page; `picture` is the page in the size that was read, `cell` pixels for each row and column.
    """

    prompt: Prompt
    places: IntArray  # V
    cells: IntArray  # V 4
    grid: Grid
    picture: Image.Image

    @property
    def cell(self) -> int:
        return self.picture.height // self.grid[0]


def text_rows(inputs: Sequence[Tensor], embeds: Array) -> dict[str, Array]:
    """Rows [n, width] of text tokens and of slots by name: nothing but embeddings [n, H] is not zero."""
    others = {t.name: np.zeros((len(embeds), row_width(t)), np.float32) for t in inputs if t.name != EMBEDS}
    return {EMBEDS: embeds, **others}


@dataclass
class TokensRead:
    """How many visual tokens of pages were read so far, and how many the pages have."""

    read: int = 0
    of: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, read: int, of: int) -> None:
        with self._lock:
            self.read, self.of = self.read + read, self.of + of


@dataclass(frozen=True)
class PageOptions:
    """How pages are read: None is as the bundle says; see `Embedder.load`."""

    max_visual_tokens: int | None = None
    skip_blank: bool | None = None

    def image(self, manifest: Manifest) -> ImageProcessing:
        """Raises CembedError: what the bundle cannot do."""
        image = manifest.image.limited(self.max_visual_tokens, manifest.image.max_visual_tokens)
        if self.skip_blank and not manifest.reads_parts:
            raise CembedError(
                "skip_blank: pages of this bundle are read whole, as the places of patches are inside of its vision "
                "graph; export it again, or leave skip_blank out"
            )
        return image if self.skip_blank is None else replace(image, skip_blank=self.skip_blank)


class InputBuilder:
    """Fills the prompts of a bundle; `session` gives a graph's session, and is asked for the vision graph only."""

    def __init__(self, bundle: Bundle, pages: PageOptions, session: Callable[[str], Session]) -> None:
        self.manifest = bundle.manifest
        self.image = pages.image(self.manifest)
        self.tokens_read = TokensRead()
        self.prompter = Prompter(load_tokenizer(bundle.path(self.manifest.tokenizer)), self.manifest.image_token_id)
        self.tokens = bundle.table(self.manifest.token_embeddings)
        self.rows = row_tensors(
            next(self.manifest.graphs[g] for g in ("text", "text_step") if g in self.manifest.graphs)
        )
        self._session = session
        self._try_tokenizer(bundle)

    def _try_tokenizer(self, bundle: Bundle) -> None:
        """Raises CembedError for one that fails whatever it is given, before there is a page."""
        try:
            self.prompter.document(self.manifest.document.prompt, 1)
            self.prompter.query(self.manifest.query.prompt, "é")
        except CembedError as error:
            raise CembedError(f"{bundle.root / self.manifest.tokenizer}: {error}") from error

    def document(self, image: ImageLike) -> Prompt:
        return self.page(image).prompt

    def page(self, image: ImageLike) -> PagePrompt:
        """The prompt of `document`, and where in it the page is."""
        page = resize(to_rgb(image), self.image)
        grid, read = grid_of(page, self.image), self._parts_to_read(page)
        ids, positions = self._page_prompt(grid, read)
        is_image = ids == self.manifest.image_token_id
        images = int(is_image.sum()) // self._tokens_of_image(grid) if self.image.tiles else 1
        check_page(self.manifest, len(ids), images)
        filled = Prompt(text_rows(self.rows, self.tokens[ids]), positions)
        features = self._image_features(page_patches(page, self.image, read), grid, read)
        for tensor, columns in zip(self.rows, self._split(features), strict=True):
            filled.rows[tensor.name][is_image] = columns
        self.tokens_read.add(len(features), self._tokens(grid))
        cells = grid[0] // self.image.merge_size, grid[1] // self.image.merge_size
        return PagePrompt(filled, np.flatnonzero(is_image), self._cells(cells, read), cells, page)

    def kept(self, image: ImageLike) -> Mask:
        """Which visual tokens of a page are read, or which tiles where it comes in tiles, bool [rows, columns]."""
        page = resize(to_rgb(image), self.image)
        read, side = self._parts_to_read(page), self.image.tiles.side if self.image.tiles else self.image.factor
        return np.ones((page.height // side, page.width // side), bool) if read is None else read

    def _parts_to_read(self, page: Image.Image) -> Mask | None:
        return parts_to_read(np.asarray(page), self.image) if self.image.skip_blank else None

    def _cells(self, grid: Grid, read: Mask | None) -> IntArray:
        """Top, left, bottom and right [V, 4] of what each visual token shows of a grid over the page."""
        tiles = self.image.tiles
        return cells_read(grid, read) if tiles is None else tile_cells(grid, tiles.side // self.image.factor, read)

    def query(self, text: str) -> Prompt:
        ids = self.prompter.query(self.manifest.query.prompt, text)
        check_length(self.manifest, len(ids))
        return Prompt(text_rows(self.rows, self.tokens[ids]), self._positions(ids, None))

    def slots(self, embeds: Array, positions: IntArray) -> Prompt:
        """Slots that are fed `embeds` [n, H] at positions [A, n]."""
        return Prompt(text_rows(self.rows, embeds), positions)

    def _page_prompt(self, grid: Grid, read: Mask | None) -> tuple[IntArray, IntArray]:
        """`input_ids` [S] of a page, and their positions [A, S]: those that they have where all of it is read."""
        tiled = self.image.tiles is not None
        prompt = page_prompt(self.manifest.document.prompt, self.image, grid, read if tiled else None)
        ids = self.prompter.document(prompt, self._tokens_of_image(grid))
        is_image = ids == self.manifest.image_token_id
        if np.count_nonzero(is_image) != prompt.count("{image}") * self._tokens_of_image(grid):
            raise CembedError("the bundle's document prompt has image tokens beside {image}")
        positions = self._positions(ids, grid)
        if read is None or tiled:
            return ids, positions
        stay = ~is_image
        stay[is_image] = read.reshape(-1)
        return ids[stay], positions[:, stay]

    def _positions(self, ids: IntArray, grid: Grid | None) -> IntArray:
        is_image = ids == self.manifest.image_token_id
        return prompt_positions(is_image, grid, self.manifest.positions, self.image.merge_size)

    def _tokens_of_image(self, grid: Grid) -> int:
        """Visual tokens of a page, or of one tile, of which all is read."""
        return (self.image.input_patches or grid[0] * grid[1]) // self.image.merge_size**2

    def _tokens(self, grid: Grid) -> int:
        """Visual tokens of a page of which all is read."""
        tokens, tiles = self._tokens_of_image(grid), self.image.tiles
        side = tiles.side // self.image.patch_size if tiles else 1
        return tokens * (tiles.count(grid[0] // side, grid[1] // side) if tiles else 1)

    def _split(self, features: Array) -> list[Array]:
        """Features [V, all widths] as one array for each kind of row."""
        return np.split(features, np.cumsum([row_width(tensor) for tensor in self.rows])[:-1], axis=1)

    def _image_features(self, pixel_values: NDArray[np.float32], grid: Grid, read: Mask | None) -> Array:
        """Features [V, all widths] of one page, from the inputs that the vision graph declares.

        Tiles are run one by one: the processor's caches hold what is between the layers, and the features are the same.
        """
        feeds = vision_feeds(self.manifest.graphs["vision"].inputs, pixel_values, grid, self.image, read)
        session = self._session("vision")
        outputs = [session.run({**feeds, "pixel_values": image[None]}) for image in feeds["pixel_values"]]
        features = np.concatenate([output.reshape(-1, output.shape[-1]) for output in outputs])
        expected = (len(pixel_values) // self.image.merge_size**2, sum(map(row_width, self.rows)))
        if features.shape != expected:
            raise CembedError(f"the vision graph gave {list(features.shape)}, by the manifest it is {list(expected)}")
        require_finite(features, "graph vision, of this image,")
        return features


def check_page(manifest: Manifest, length: int, images: int) -> None:
    """Raises CembedError for the prompt of a page that is longer than the model's context."""
    if length > manifest.max_sequence_length and images > 1:
        raise CembedError(
            f"the page takes {length} positions in {images} tiles, the model has {manifest.max_sequence_length}: lower "
            "max_visual_tokens"
        )
    check_length(manifest, length)


def check_length(manifest: Manifest, length: int) -> None:
    if length > manifest.max_sequence_length:
        raise CembedError(f"the input takes {length} positions, the model has {manifest.max_sequence_length}")

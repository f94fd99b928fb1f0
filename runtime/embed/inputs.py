"""From a page or a query to what the decoder is fed.

Letters: S positions of the prompt, H hidden, P patches, V visual tokens, A position axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.graph_tensors import EMBEDS, row_tensors, row_width
from cembed.runtime.bundle.manifest import Manifest, Tensor
from cembed.runtime.bundle.prompts import Prompter, load_tokenizer, page_prompt
from cembed.runtime.embed.pooling import require_finite
from cembed.runtime.embed.positions import Grid, IntArray, prompt_positions
from cembed.runtime.embed.preprocess import preprocess
from cembed.runtime.embed.vision_feeds import vision_feeds
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

    def feeds(self) -> dict[str, Array]:
        """Inputs of a text graph, for a batch of one."""
        return {name: rows[None] for name, rows in self.rows.items()} | {"position_ids": self.positions[:, None]}


def text_rows(inputs: Sequence[Tensor], embeds: Array) -> dict[str, Array]:
    """Rows [n, width] of text tokens and of slots by name: nothing but embeddings [n, H] is not zero."""
    others = {t.name: np.zeros((len(embeds), row_width(t)), np.float32) for t in inputs if t.name != EMBEDS}
    return {EMBEDS: embeds, **others}


class InputBuilder:
    """Fills the prompts of a bundle; `session` gives a graph's session, and is asked for the vision graph only."""

    def __init__(self, bundle: Bundle, max_visual_tokens: int | None, session: Callable[[str], Session]) -> None:
        self.manifest = bundle.manifest
        self.image = self.manifest.image.limited(max_visual_tokens, self.manifest.image.max_visual_tokens)
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
        pixel_values, grid = preprocess(to_rgb(image), self.image)
        num_visual_tokens = len(pixel_values) // self.image.merge_size**2
        images = len(pixel_values) // (self.image.input_patches or len(pixel_values))
        prompt = page_prompt(self.manifest.document.prompt, self.image, grid)
        ids = self.prompter.document(prompt, num_visual_tokens // images)
        check_page(self.manifest, len(ids), images)
        if np.count_nonzero(ids == self.manifest.image_token_id) != num_visual_tokens:
            raise CembedError("the bundle's document prompt has image tokens beside {image}")
        filled = self._prompt(ids, grid)
        features = self._image_features(pixel_values, grid)
        for tensor, columns in zip(self.rows, self._split(features), strict=True):
            filled.rows[tensor.name][ids == self.manifest.image_token_id] = columns
        return filled

    def query(self, text: str) -> Prompt:
        ids = self.prompter.query(self.manifest.query.prompt, text)
        check_length(self.manifest, len(ids))
        return self._prompt(ids, None)

    def slots(self, embeds: Array, positions: IntArray) -> Prompt:
        """Slots that are fed `embeds` [n, H] at positions [A, n]."""
        return Prompt(text_rows(self.rows, embeds), positions)

    def _prompt(self, ids: IntArray, grid: Grid | None) -> Prompt:
        is_image = ids == self.manifest.image_token_id
        positions = prompt_positions(is_image, grid, self.manifest.positions, self.image.merge_size)
        return Prompt(text_rows(self.rows, self.tokens[ids]), positions)

    def _split(self, features: Array) -> list[Array]:
        """Features [V, all widths] as one array for each kind of row."""
        return np.split(features, np.cumsum([row_width(tensor) for tensor in self.rows])[:-1], axis=1)

    def _image_features(self, pixel_values: NDArray[np.float32], grid: Grid) -> Array:
        """Features [V, all widths] of one page, from the inputs that the vision graph declares."""
        feeds = vision_feeds(self.manifest.graphs["vision"].inputs, pixel_values, grid, self.image)
        output: Array = self._session("vision").run(feeds)
        features = output.reshape(-1, output.shape[-1])
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

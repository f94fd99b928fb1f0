"""From pages and queries to vectors.

Letters: S prompt and slots, K vectors, H hidden, P patches, A position axes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cembed.runtime.bundle import Bundle
from cembed.runtime.errors import CembedError
from cembed.runtime.images import to_rgb
from cembed.runtime.manifest import Side
from cembed.runtime.positions import (
    Grid,
    patch_positions,
    prompt_positions,
    slot_positions,
    window_index,
    window_restore,
)
from cembed.runtime.preprocess import preprocess
from cembed.runtime.prompts import Prompter, load_tokenizer
from cembed.runtime.session import Array, EngineSettings, OrtSession, Session, check_providers

Vectors = NDArray[np.float32]
ImageLike = Image.Image | NDArray[np.uint8]
CPU = EngineSettings().providers


class Embedder:
    """Embeds with one bundle. Every page and query runs alone, so batch mates cannot change its vectors.

    Methods may be called from several threads. Graphs are loaded when first needed: queries never load the vision one.
    """

    def __init__(self, bundle: Bundle, engine: EngineSettings, max_visual_tokens: int | None = None) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._engine = engine
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._table = bundle.token_embeddings()
        tokenizer = load_tokenizer(bundle.path(self.manifest.tokenizer))
        self.prompter = Prompter(tokenizer, self.manifest.image_token_id)
        self.image = self.manifest.image
        if max_visual_tokens is not None:
            self.image = self._limit(max_visual_tokens)

    def _limit(self, tokens: int) -> Any:
        image = self.manifest.image
        if image.resize == "fixed":
            raise CembedError(f"{self.manifest.backbone} pages always take {image.max_visual_tokens} visual tokens")
        smallest = -(-image.min_pixels // image.factor**2)
        if not smallest <= tokens <= image.max_visual_tokens:
            raise CembedError(
                f"max_visual_tokens is {tokens}: this bundle takes {smallest} to {image.max_visual_tokens}"
            )
        return replace(image, max_pixels=tokens * image.factor**2)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        providers: Sequence[str] = CPU,
        threads: int | None = None,
        prepack: bool = True,
        max_visual_tokens: int | None = None,
        verify: bool = True,
    ) -> Embedder:
        """Open a bundle.

        `providers` are ONNX Runtime execution providers in order of preference; `threads` is per operator, None for all
        cores; `prepack=False` leaves the weights memory-mapped, which opens at once and is a little slower per page;
        `max_visual_tokens` lowers the bundle's own limit, for speed; `verify=False` skips the sha256 of files.
        Raises CembedError: no bundle, a damaged one, a provider that is not available.
        """
        check_providers(providers)
        return cls(Bundle(path, verify=verify), EngineSettings(tuple(providers), threads, prepack), max_visual_tokens)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.manifest.dim

    def embed_images(self, images: Iterable[ImageLike], num_vectors: int | None = None) -> list[Vectors]:
        """Vectors float32 [num_vectors, dim] of each page, L2-normalised.

        `images` may be a generator: one page at a time is held. `num_vectors` is the budget, by default the bundle's
        full one: n vectors are the first n of the full budget and cost no more than n.
        Raises CembedError: no image, a budget the bundle does not have, NaN from the model.
        """
        return [self.embed_image(image, num_vectors) for image in items(images, "images")]

    def embed_queries(self, texts: Iterable[str], num_vectors: int | None = None) -> list[Vectors]:
        """Vectors float32 [num_vectors, dim] of each query, L2-normalised; errors as in `embed_images`."""
        return [self.embed_query(text, num_vectors) for text in items(texts, "queries")]

    def embed_image(self, image: ImageLike, num_vectors: int | None = None) -> Vectors:
        """One page of `embed_images`."""
        budget = self.budget(self.manifest.document, num_vectors)
        pixel_values, grid = preprocess(to_rgb(image), self.image)
        ids = self.prompter.document(self.manifest.document.prompt, len(pixel_values) // self.image.merge_size**2)
        return self._embed(self.manifest.document, ids, budget, grid, self._image_features(pixel_values, grid))

    def embed_query(self, text: str, num_vectors: int | None = None) -> Vectors:
        """One query of `embed_queries`."""
        budget = self.budget(self.manifest.query, num_vectors)
        return self._embed(self.manifest.query, self.prompter.query(self.manifest.query.prompt, text), budget)

    def budget(self, side: Side, num_vectors: int | None) -> int | None:
        """The number of vectors to make; None means all positions."""
        full = side.num_vectors
        if num_vectors is None or num_vectors == full:
            return full
        if full is None:
            raise CembedError("this bundle makes one vector for every token: num_vectors cannot be chosen")
        if not 1 <= num_vectors <= full:
            raise CembedError(f"num_vectors is {num_vectors}: this bundle makes 1 to {full}")
        return num_vectors

    def session(self, name: str) -> Session:
        """The session of a graph, loaded on first use."""
        with self._lock:
            if name not in self._sessions:
                self._sessions[name] = OrtSession(self.bundle.graph_path(name), self._engine)
            return self._sessions[name]

    def _image_features(self, pixel_values: NDArray[np.float32], grid: Grid) -> Array:
        """Features [V, H] of one image, from the inputs that the vision graph declares."""
        wanted = {tensor.name for tensor in self.manifest.graphs["vision"].inputs}
        feeds: dict[str, Array] = {"pixel_values": pixel_values[None]}
        if "patch_positions" in wanted:
            feeds["patch_positions"] = patch_positions(grid, self.image.merge_size)
        if "window_index" in wanted:
            feeds["window_index"] = window_index(grid, self.image)
            feeds["window_restore"] = window_restore(feeds["window_index"], len(pixel_values))
        features: Array = self.session("vision").run(feeds)[0]
        return features

    def _embed(
        self,
        side: Side,
        ids: NDArray[np.int64],
        budget: int | None,
        grid: Grid | None = None,
        features: Array | None = None,
    ) -> Vectors:
        is_image = ids == self.manifest.image_token_id
        positions = prompt_positions(is_image, grid, self.manifest.positions, self.image.merge_size)
        num_slots = budget - 1 if budget else 0
        length = len(ids) + num_slots
        if length > self.manifest.max_sequence_length:
            raise CembedError(f"the input takes {length} positions, the model has {self.manifest.max_sequence_length}")
        slots = np.full(num_slots, side.latent_token_id or 0, dtype=np.int64)
        embeds = self._table[np.concatenate([ids, slots])].astype(np.float32)  # S H
        if features is not None:
            embeds[np.flatnonzero(is_image)] = features
        feeds = {
            "inputs_embeds": embeds[None],
            "position_ids": np.concatenate(
                [positions, slot_positions(positions, num_slots, side.slot_positions)], axis=1
            )[:, None],
            "slot_indices": np.arange(len(ids) - 1 if budget else 0, length)[None],
        }
        if any(tensor.name == "prompt_length" for tensor in self.manifest.graphs["text"].inputs):
            feeds["prompt_length"] = np.array([len(ids)])
        return normalise(self.session("text").run(feeds)[0])


def normalise(states: Array) -> Vectors:
    """Rows of length one. Raises CembedError for NaN, infinity or a row of zeros: none may be stored as a vector."""
    norms = np.linalg.norm(states, axis=-1, keepdims=True)
    if not np.isfinite(norms).all() or not norms.all():
        raise CembedError("the model gave NaN, infinity or zeros: the checkpoint or its precision (fp16?) is at fault")
    vectors: Vectors = (states / norms).astype(np.float32)
    return vectors


def items(values: Iterable[Any], what: str) -> Iterable[Any]:
    """`values`, unless it is one item where a list of them was meant."""
    if isinstance(values, (str, bytes, Image.Image)):
        raise CembedError(f"{what} must be a list or another iterable: put the one you have into brackets")
    return values

"""Batches for training: pages as patches, what is legible under each visual token, and a question about each page.

Letters: B pages, P patches (window by window), V visual tokens (in the same order), C cells of a visual token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.prompts import load_tokenizer
from cembed.runtime.embed.blank import Sums, blank_parts, enough, parts_to_read

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pages"))
from canvas import PUNCTUATION, Word
from generate import Page, Part, make_page
from layouts import LANDSCAPE, PORTRAIT, SLIP, SQUARE, Size

IMAGE = ImageProcessing(
    resize="smart",
    patch_size=14,
    merge_size=2,
    min_pixels=3136,
    max_pixels=PORTRAIT[0] * PORTRAIT[1],
    rescale_factor=1 / 255,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    window_size=112,
)
SIDE = IMAGE.factor  # of a visual token, in pixels
CELLS = (2, 4)  # rows and columns of cells in a visual token: a cell is half a patch, about one character wide
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:-"
BLANK, OTHER = 0, len(CHARACTERS) + 1
MAX_PIECES = 4  # tokens of words that may end in one visual token
MAX_PAGE_TOKENS = 128
MAX_KEY_TOKENS = 12
QUESTIONS = 3  # about each page of a batch: they cost little beside the page
NONE = -100  # what cross-entropy ignores
SIZES: tuple[tuple[Size, float], ...] = ((PORTRAIT, 0.45), (LANDSCAPE, 0.25), (SQUARE, 0.2), (SLIP, 0.1))

WHOLE = 0.25  # share of pages that are read whole where the others have holes
MARGIN = 0.5  # share of pages with holes that keep the neighbours of what is on them, as the runtime does

Holes = Literal["none", "mixed", "runtime"]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass
class Example:
    patches: NDArray[np.uint8]  # [P, 588]
    read: Mask  # [V]: the visual tokens that are not left out
    cells: Ints  # [V, C]
    pieces: Ints  # [V, MAX_PIECES] tokens of the words that end here
    tokens: Ints  # [MAX_PAGE_TOKENS] all tokens of the page, each once
    questions: list[str]  # QUESTIONS of them
    keys: Ints  # [QUESTIONS, MAX_KEY_TOKENS] tokens of the words asked for


@dataclass
class Batch:
    """The examples of one page size, stacked; `questions` page by page, QUESTIONS of each, and `keys` of each."""

    size: Size
    patches: NDArray[np.uint8]
    read: Mask
    cells: Ints
    pieces: Ints
    tokens: Ints
    keys: Ints
    questions: list[str]


@cache
def window_order(size: Size) -> Ints:
    """The visual tokens [V] in windows of 4 x 4; page sizes are multiples of a window."""
    columns, rows = size[0] // SIDE, size[1] // SIDE
    tokens = np.arange(rows * columns).reshape(rows // 4, 4, columns // 4, 4)
    return tokens.transpose(0, 2, 1, 3).reshape(-1)


def patches_in_windows(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels [P, 3 * 14 * 14] in windows, then merge groups: `pixel_values` before normalisation."""
    pixels = np.asarray(image.convert("RGB"))
    rows, columns = pixels.shape[0] // SIDE, pixels.shape[1] // SIDE
    blocks = pixels.reshape(rows, 2, 14, columns, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return blocks.reshape(rows * columns, 4, -1)[window_order(image.size)].reshape(rows * columns * 4, -1)


def parts_read(image: Image.Image, holes: Holes, random: Random) -> Mask:
    """Visual tokens [V] of a page that are read: all, or those that are not blank, with their neighbours as the runtime
    has them; where `holes` are `mixed`, some pages are whole and some have no neighbours."""
    pixels = np.asarray(image.convert("RGB"))
    if holes == "none" or (holes == "mixed" and random.random() < WHOLE):
        return np.ones(pixels.shape[0] // SIDE * (pixels.shape[1] // SIDE), bool)
    if holes == "runtime" or random.random() < MARGIN:
        return parts_to_read(pixels, IMAGE).reshape(-1)
    return enough(~blank_parts(Sums.of(pixels, SIDE))).reshape(-1)


class Reader:
    """What can be read on a page, in the tokens of one tokenizer; letters are compared in lower case."""

    def __init__(self, tokenizer: Path) -> None:
        self.tokenizer = load_tokenizer(tokenizer)
        self._cache: dict[str, list[tuple[int, int]]] = {}

    def tokens(self, word: str) -> list[tuple[int, int]]:
        """Tokens of a word, as they are written after a space, each with the end of its characters in the word."""
        if word not in self._cache:
            encoding = self.tokenizer.encode(" " + word, add_special_tokens=False)
            self._cache[word] = [(i, end - 1) for i, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)]
        return self._cache[word]

    def read(self, page: Page, question: Random, holes: Holes = "none") -> Example:
        columns, rows = page.image.size[0] // SIDE, page.image.size[1] // SIDE
        cells = np.full((rows * columns, CELLS[0] * CELLS[1]), BLANK, dtype=np.int64)
        pieces: list[list[int]] = [[] for _ in range(rows * columns)]
        for word in page.words:
            self.mark(word, cells, pieces, columns, rows)
        order = window_order(page.image.size)
        found = {token for ends in pieces for token in ends}
        asked = question.sample(page.questions * QUESTIONS, k=len(page.questions) * QUESTIONS)
        asked = list(dict.fromkeys(asked)) + asked  # each once, before any comes again
        asked = asked[:QUESTIONS]
        keys = [{token for key in one.keys for token, _ in self.tokens(key.strip(PUNCTUATION))} for one in asked]
        read = parts_read(page.image, holes, question)[order]
        cells = np.where(read[:, None], cells[order], NONE)
        return Example(
            patches_in_windows(page.image),
            read,
            cells,
            np.stack([padded(ends, MAX_PIECES) for ends in pieces])[order],
            padded(sorted(found), MAX_PAGE_TOKENS),
            [one.text for one in asked],
            np.stack([padded(sorted(tokens), MAX_KEY_TOKENS) for tokens in keys]),
        )

    def mark(self, word: Word, cells: Ints, pieces: list[list[int]], columns: int, rows: int) -> None:
        spots = []
        for mark in word.characters:
            column, row = int(mark.x // SIDE), int(mark.y // SIDE)
            inside = 0 <= column < columns and 0 <= row < rows
            spots.append(row * columns + column if inside else None)
            if inside:
                cell = int(mark.y % SIDE / SIDE * CELLS[0]) * CELLS[1] + int(mark.x % SIDE / SIDE * CELLS[1])
                cells[row * columns + column, cell] = CHARACTERS.find(mark.text.lower()) + 1 or OTHER
        text = word.text.lower()
        stripped = text.strip(PUNCTUATION)
        start = text.find(stripped)
        for token, end in self.tokens(stripped) if stripped else ():
            spot = spots[min(start + end - 1, len(spots) - 1)]
            if spot is not None:
                pieces[spot].append(token)


def padded(values: list[int], length: int) -> Ints:
    row = np.full(length, NONE, dtype=np.int64)
    row[: len(values)] = values[:length]
    return row


def batches(tokenizer: Path, part: Part, size: int, seed: str, holes: Holes = "none") -> Iterator[Batch]:
    """Endless batches, with `holes` for blank paper.

    No page is ever shown twice: with each shown three times, reading did not carry over.
    """
    reader, random = Reader(tokenizer), Random(seed)
    drawn = 0
    while True:
        page_size = random.choices([s for s, _ in SIZES], [w for _, w in SIZES])[0]
        pages = [make_page(f"{seed}-{drawn + n}", "train", part, page_size) for n in range(size)]
        drawn += size
        yield stack(page_size, [reader.read(page, random, holes) for page in pages])


def stack(size: Size, examples: list[Example]) -> Batch:
    columns = {
        name: np.stack([getattr(e, name) for e in examples])
        for name in ("patches", "read", "cells", "pieces", "tokens")
    }
    keys = np.concatenate([example.keys for example in examples])
    return Batch(size, questions=[text for example in examples for text in example.questions], keys=keys, **columns)


def prefetched(tokenizer: Path, part: Part, size: int, seed: str, holes: Holes = "none") -> Iterator[Batch]:
    """`batches` from a process of its own."""
    context = get_context("spawn")
    queue: Queue[Batch] = context.Queue(4)
    worker = context.Process(target=fill, args=(queue, tokenizer, part, size, seed, holes), daemon=True)
    worker.start()
    try:
        while worker.is_alive():
            yield queue.get(timeout=300)
        raise RuntimeError(f"drawing pages ended with code {worker.exitcode}")
    finally:
        worker.kill()


def fill(queue: Queue[Batch], tokenizer: Path, part: Part, size: int, seed: str, holes: Holes) -> None:
    for batch in batches(tokenizer, part, size, seed, holes):
        queue.put(batch)

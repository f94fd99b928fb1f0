"""Where a page matches a query: heat over the grid of its visual tokens.

Bundles that make a vector for every token say it by their similarities (`by_similarity`). Where a page's vectors are
those of slots, or one, parts of the page are hidden, and heat is how far the score falls (`by_hiding`): occlusion, as
Zeiler and Fergus did it (arXiv 1311.2901). A part is hidden in the keys and values of the prompt, so that nothing but
what follows the image is run again (`CachedPage`), or in the prompt itself (`ChangedPage`).

Letters: Q vectors of the query, K of the page, V visual tokens, D length of a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.embed.blank import Sums, blank_parts
from cembed.runtime.embed.heat import draw_heat, hottest_box
from cembed.runtime.embed.inputs import ImageLike, PagePrompt, Prompt
from cembed.runtime.embed.kv_cache import StaticKVCache
from cembed.runtime.embed.latent import Loop, Output, prefill
from cembed.runtime.embed.pooling import FloatArray
from cembed.runtime.embed.positions import IntArray, slot_positions
from cembed.runtime.engines.session import Array
from cembed.runtime.errors import CembedError
from cembed.runtime.pages.images import to_rgb

Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]
"""Top, left, bottom and right, in cells of the grid."""

FIRST_PARTS = 4  # of a page, each hidden once
FEWEST, MOST = 6, 24  # passes
CHEAP = 2 << 30  # bytes of weights that all passes together may read in any case: some tenths of a second
OVERHEAD = 16  # positions of a page for which a pass costs beside its own: 28 in int8 took the time of 40 to 57
BLANK = 0.05  # what there is to read on blank paper, where it is 1 elsewhere
ROUNDING = 1e-4  # by which similarities fall without a reason


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where a page matches a query.

    `score` is MaxSim of query and page. `heat` is float32 [rows, columns] over the page: 0 has nothing to do with the
    query, 1 is the most there is; all of it is 0 where nothing matched. `hottest` is a box x0, y0, x1, y1 in shares of
    the page's width and height, all 0 where nothing matched. `runs` is how often the text graph, or the part of it that
    follows the image, was run.
    """

    score: float
    heat: NDArray[np.float32]
    hottest: tuple[float, float, float, float]
    runs: int

    def picture(self, image: ImageLike) -> Image.Image:
        """The page with the heat over it, and the hottest box outlined. Raises CembedError: no image."""
        return draw_heat(to_rgb(image), self.heat, self.hottest)


def explanation(similarities: Vectors, heat: FloatArray, runs: int) -> Explanation:
    """From what `max_sims` gives, and heat [rows, columns] of any scale."""
    most = heat.max()
    scaled = (heat / most if most > 0 else np.zeros(heat.shape)).astype(np.float32)
    return Explanation(float(similarities.sum()), scaled, hottest_box(scaled), runs)


def max_sims(query: Vectors, vectors: Vectors) -> Vectors:
    """The similarity [Q] of each vector of the query to the nearest vector of the page: MaxSim is their sum."""
    similarities: Vectors = (query @ vectors.T).max(axis=1)
    return similarities


def check_query(query: Vectors, dim: int) -> Vectors:
    """Raises CembedError: they are not the vectors of a query, of this length."""
    if query.dtype != np.float32 or query.ndim != 2 or query.shape[1] != dim or not len(query):
        raise CembedError(f"the vectors of a query are float32 [n, {dim}] here, not {query.dtype} {list(query.shape)}")
    if not np.isfinite(query).all():
        raise CembedError("the vectors of the query have NaN or infinity in them")
    return query


# A vector for every token ---------------------------------------------------------------------------------------------


def by_similarity(page: PagePrompt, query: Vectors, vectors: Vectors, tokens: FloatArray) -> Explanation:
    """From the page's `vectors` [K, D], which give the score, and those of its visual tokens [V, D], which give heat.

    ColPali (arXiv 2407.01449) shows a map of similarities for each word of a query. One for all of them: a vector of
    the query heats the tokens that are more like it than halfway from the mean to the nearest, by what is above that,
    since in MaxSim none but the nearest counts. It counts as much as its nearest token stands out from the mean: what
    all of the page is like, as prompts and padding are, says nothing about places.
    """
    similarities = query @ tokens.T  # Q V
    mean, top = similarities.mean(axis=1, keepdims=True), similarities.max(axis=1, keepdims=True)
    heat = ((top - mean) * np.maximum(similarities - (mean + top) / 2, 0)).sum(axis=0)
    return explanation(max_sims(query, vectors), over_cells(page, heat), 1)


def over_cells(page: PagePrompt, values: FloatArray) -> FloatArray:
    """Values [V] of the visual tokens as [rows, columns]: a cell has the largest of those that show it, or 0."""
    found = np.zeros(page.grid)
    for (top, left, bottom, right), value in zip(page.cells, values, strict=True):
        part = found[top:bottom, left:right]
        np.maximum(part, value, out=part)
    return found


# Hidden parts ---------------------------------------------------------------------------------------------------------


class Reading(Protocol):
    """A page that is read again and again, each time in a pass of so many positions; `runs` counts runs of graphs."""

    @property
    def positions(self) -> int: ...
    @property
    def runs(self) -> int: ...
    def whole(self) -> Vectors:
        """The page's vectors [K, D]."""

    def without(self, hidden: IntArray) -> Vectors:
        """The vectors where the prompt's positions `hidden`, ascending, cannot be seen."""


class CachedPage:
    """A page whose prompt was run up to its last visual token; a pass is what follows.

    The keys and values of what is hidden are taken out of the cache. What other visual tokens made of them before stays
    there: heat is on those that are looked at by what follows.
    """

    def __init__(self, loop: Loop, cache: StaticKVCache, page: PagePrompt, num_vectors: int) -> None:
        self._loop, self._cache, self._count, self.runs = loop, cache, num_vectors, 0
        self._step = loop.step.bind(cache.buffers)
        self._end = min(int(page.places[-1]) + 1, len(page.prompt) - 1)  # at least one position follows
        positions = slot_positions(page.prompt.positions, loop.side.num_slots(num_vectors), loop.side.slot_positions)
        run = self._run_slots if loop.side.slots == "feedback" else self._run
        prompt, states = run(page.prompt, positions)
        self._step.pull()
        cache.length, self._rest = self._end, prompt.part(self._end, len(prompt))
        self._whole = loop.finish(states)

    @property
    def positions(self) -> int:
        return len(self._rest)

    def whole(self) -> Vectors:
        return self._whole

    def without(self, hidden: IntArray) -> Vectors:
        with self._cache.without(hidden[hidden < self._end]):
            self._step.push()
            return self._loop.finish(self._prefill(self._rest, self._count).state)

    def _prefill(self, prompt: Prompt, count: int) -> Output:
        self.runs += 1
        return prefill(self._step, self._cache, prompt, count)

    def _run(self, prompt: Prompt, positions: IntArray) -> tuple[Prompt, Array]:
        """Runs a prompt with its slots at `positions`: both, and the states [K, D]."""
        if rows := [self._loop.row(slot) for slot in range(positions.shape[1])]:
            prompt = prompt.followed_by(self._loop.slot(np.stack(rows), positions))
        return prompt, self._prefill(prompt, self._count).state

    def _run_slots(self, prompt: Prompt, positions: IntArray) -> tuple[Prompt, Array]:
        """`_run` where each slot is fed what the one before gave; in passes they are fed the same again."""
        outputs = [self._prefill(prompt, 1)]
        for slot in range(positions.shape[1]):
            slots = self._loop.slot(outputs[-1].hidden, positions[:, slot : slot + 1])
            outputs.append(self._prefill(slots, 1))
            prompt = prompt.followed_by(slots)
        return prompt, np.concatenate([output.state for output in outputs])


class ChangedPage:
    """A page that is read anew, with the mean of its visual tokens in place of those that are hidden.

    For what has no cache, or states of fixed size in it, and for prompts that attend both ways.
    """

    def __init__(self, embed: Callable[[Prompt], Vectors], page: PagePrompt) -> None:
        self._embed, self._prompt, self.runs = embed, page.prompt, 0
        self._means = {name: rows[page.places].mean(axis=0) for name, rows in page.prompt.rows.items()}

    @property
    def positions(self) -> int:
        return len(self._prompt)

    def whole(self) -> Vectors:
        self.runs += 1
        return self._embed(self._prompt)

    def without(self, hidden: IntArray) -> Vectors:
        self.runs += 1
        changed = {name: rows.copy() for name, rows in self._prompt.rows.items()}
        for name, rows in changed.items():
            rows[hidden] = self._means[name]
        return self._embed(Prompt(changed, self._prompt.positions))


def affordable(prompt: int, positions: int, weights: int) -> int:
    """How many passes of so many positions: what half of the prompt's own costs, or reads CHEAP bytes where the
    `weights` take so many bytes; within FEWEST and MOST.

    >>> affordable(738, 28, 330 << 20), affordable(2048, 28, 330 << 20), affordable(170, 38, 5 << 20)
    (8, 23, 24)
    """
    return min(max(prompt // (2 * (positions + OVERHEAD)), CHEAP // weights, FEWEST), MOST)


def by_hiding(page: PagePrompt, query: Vectors, reading: Reading, passes: int) -> Explanation:
    """Heat is how far the score falls where a part of the page is hidden, for each cell of the part.

    What a vector of the query gains counts for nothing. Raises CembedError: too few passes.
    """
    if passes < FIRST_PARTS:
        raise CembedError(f"passes is {passes}: give {FIRST_PARTS} or more")
    whole = max_sims(query, reading.whole())

    def fall(box: Box) -> float:
        lost = whole - max_sims(query, reading.without(page.places[shows(page.cells, box)]))
        return float(lost[lost > ROUNDING].sum())

    read = over_cells(page, np.ones(len(page.places)))
    heat = np.zeros(page.grid)
    for box, fallen in search(read * writing(page), fall, passes).items():
        heat[cells_of(box)] = read[cells_of(box)] * (fallen / read[cells_of(box)].sum())
    return explanation(whole, heat, reading.runs)


def shows(cells: IntArray, box: Box) -> Mask:
    """Which visual tokens show some of a box.

    >>> shows(np.array([[0, 0, 1, 1], [0, 1, 1, 2], [0, 0, 2, 2]]), (0, 1, 1, 4))
    array([False,  True,  True])
    """
    top, left, bottom, right = cells.T
    found: Mask = (top < box[2]) & (bottom > box[0]) & (left < box[3]) & (right > box[1])
    return found


def writing(page: PagePrompt) -> FloatArray:
    """What there is to read in each cell [rows, columns]: 1, or BLANK on blank paper."""
    blank = blank_parts(Sums.of(np.asarray(page.picture), page.cell))
    return np.where(blank, BLANK, 1.0)


def search(weights: FloatArray, fall: Callable[[Box], float], passes: int) -> dict[Box, float]:
    """Boxes that hold all cells [rows, columns] with weights above 0, and how far the score falls without each.

    The box with the largest fall is cut in two. That of the heavier half is measured; the other has the rest, until it
    is the largest itself and measured too.
    """
    falls = {box: fall(box) for box in first_boxes(weights)}
    measured = set(falls)
    for _ in range(passes - len(falls)):
        left = [
            box for box, fallen in falls.items() if fallen > 0 and not (box in measured and is_single(weights, box))
        ]
        if not left:
            break
        box = max(left, key=lambda box: falls[box])
        if box in measured:
            parent, (box, other) = box, halves(weights, box)
            falls[box], falls[other] = fall(box), falls.pop(parent)
            falls[other] = max(falls[other] - falls[box], 0.0)
        else:
            falls[box] = fall(box)
        measured.add(box)
    return falls


def first_boxes(weights: FloatArray) -> list[Box]:
    """FIRST_PARTS of a page, of about the same weight; fewer of a page of fewer cells."""
    boxes = [trimmed(weights, (0, 0, *weights.shape))]
    while len(boxes) < FIRST_PARTS:
        box = max(boxes, key=lambda box: 0.0 if is_single(weights, box) else weights[cells_of(box)].sum())
        if is_single(weights, box):
            break
        boxes.remove(box)
        boxes += halves(weights, box)
    return boxes


def halves(weights: FloatArray, box: Box) -> tuple[Box, Box]:
    """A box of several cells as two of about the same weight, the heavier one first; across, as lines of text run,
    unless it is more than twice as wide as high.

    >>> halves(np.array([[1.0, 1], [1, 0], [1, 1]]), (0, 0, 3, 2))
    ((1, 0, 3, 2), (0, 0, 1, 2))
    >>> halves(np.array([[1.0, 1, 0, 5]]), (0, 0, 1, 4))
    ((0, 3, 1, 4), (0, 0, 1, 2))
    """
    top, left, bottom, right = box
    part = weights[cells_of(box)]
    across = part.shape[0] > 1 and 2 * part.shape[0] >= part.shape[1]
    sums = np.cumsum(part.sum(axis=1 if across else 0))
    cut = 1 + int(np.argmin(np.abs(sums[:-1] - sums[-1] / 2)))
    middle = (top + cut, left) if across else (top, left + cut)
    found = (top, left, middle[0] if across else bottom, right if across else middle[1]), (*middle, bottom, right)
    first, second = (trimmed(weights, half) for half in found)
    heavier = weights[cells_of(first)].sum() >= weights[cells_of(second)].sum()
    return (first, second) if heavier else (second, first)


def trimmed(weights: FloatArray, box: Box) -> Box:
    """A box without rows and columns at its sides that weigh nothing."""
    found = weights[cells_of(box)] > 0
    rows, columns = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
    top, left = box[0] + int(rows[0]), box[1] + int(columns[0])
    return top, left, box[0] + int(rows[-1]) + 1, box[1] + int(columns[-1]) + 1


def is_single(weights: FloatArray, box: Box) -> bool:
    """Whether a box is trimmed to one cell."""
    return bool(weights[cells_of(box)].size == 1)


def cells_of(box: Box) -> tuple[slice, slice]:
    return slice(box[0], box[2]), slice(box[1], box[3])

"""A trial of MaxSim on this machine: synthetic pages, rounds in which every contender runs once, a check in float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.scoring.kernels import Pages, exact_scores
from cembed.runtime.scoring.maxsim import maxsim
from cembed.runtime.scoring.storage import STORAGE, storage_of

Floats = NDArray[np.floating[Any]]
Run = Callable[[], Floats]
CACHE_ROWS = 65536  # rows of a product that numpy keeps at once
TIMED_PRODUCTS, MOST_CALLS = 500_000_000, 100  # smaller work is timed several times in a row
CHECKED = 500  # pages that are compared with float64
JUDGED = 20
TOPICS = 50


@dataclass(frozen=True)
class Shape:
    query_rows: int
    dim: int
    pages: int
    rows: int

    def products(self) -> int:
        return self.query_rows * self.dim * self.pages * self.rows

    def calls(self) -> int:
        """How many make one timing."""
        return max(1, min(MOST_CALLS, TIMED_PRODUCTS // self.products()))


@dataclass(frozen=True, eq=False)
class Case:
    """Pages [N, K, D] of unit vectors, which share a direction in a page and a topic, and queries [JUDGED, Q, D] that
    each resemble a page."""

    shape: Shape
    queries: Floats
    documents: Floats

    @classmethod
    def draw(cls, shape: Shape) -> Case:
        generator = np.random.default_rng(0)
        centres = generator.standard_normal((shape.pages, 1, shape.dim), dtype=np.float32)
        centres += generator.standard_normal((TOPICS, 1, shape.dim), dtype=np.float32)[np.arange(shape.pages) % TOPICS]
        documents = generator.standard_normal((shape.pages, shape.rows, shape.dim), dtype=np.float32)
        documents += centres
        documents /= np.linalg.norm(documents, axis=2, keepdims=True)
        chosen = generator.integers(shape.pages, size=JUDGED)
        queries = documents[chosen][:, generator.integers(shape.rows, size=shape.query_rows)]
        noise = generator.standard_normal(queries.shape, dtype=np.float32) / np.float32(np.sqrt(shape.dim))
        queries = queries + 2 * noise
        return cls(shape, queries / np.linalg.norm(queries, axis=2, keepdims=True), documents)

    @property
    def query(self) -> Floats:
        query: Floats = self.queries[0]
        return query

    def stored(self, storage: str) -> Pages:
        encoded = [STORAGE[storage].encode(page) for page in self.documents]
        data = np.concatenate([page for page, _ in encoded])
        size = len(data) // len(encoded)
        scales = np.array([scale for _, scale in encoded], np.float32)
        starts = np.arange(len(encoded), dtype=np.int64) * size
        return Pages(storage, self.shape.dim, data, starts, np.full(len(encoded), self.shape.rows, np.int32), scales)


def our_way(query: Floats, documents: Sequence[Floats] | Floats | Pages, threads: int) -> Run:
    """The call that users make."""
    return lambda: maxsim([query], documents, threads=threads)[0]


def numpy_ways(case: Case) -> list[Run]:
    """Products of matrices and their maxima, as one would write them for one array [N, K, D]."""
    query, documents = case.query, case.documents
    count, rows, dim = documents.shape
    flat, step = documents.reshape(-1, dim), max(1, CACHE_ROWS // rows) * rows

    def in_parts() -> Floats:
        parts = [query @ flat[first : first + step].T for first in range(0, len(flat), step)]
        return np.concatenate([part.reshape(len(part), -1, rows).max(axis=2).sum(axis=0) for part in parts])

    return [
        in_parts,
        lambda: (flat @ query.T).reshape(count, rows, -1).max(axis=1).sum(axis=1),
        lambda: (documents @ query.T).max(axis=1).sum(axis=1),
    ]


def fastest(ways: Sequence[Run]) -> Run:
    """Of the second run of each."""
    times = [[_seconds(way) for _ in range(2)][1] for way in ways]
    return ways[int(np.argmin(times))]


def time_round(runs: Mapping[str, Run], number: int, times: Mapping[str, list[float]], calls: int = 1) -> None:
    """Appends the milliseconds of every contender, another one first in each round: the mean of `calls` in a row."""
    names = list(runs)
    for name in names[number % len(names) :] + names[: number % len(names)]:
        times[name].append(_seconds(runs[name], calls) * 1000)


def _seconds(run: Run, calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


@dataclass(frozen=True)
class Timing:
    """Of one storage type: bytes read, median milliseconds of maxsim(), how many times faster than numpy with float32
    in the median round, and the largest error relative to the scores' mean size."""

    storage: str
    bytes: int
    ms: float
    times_numpy: float
    error: float


def try_out(shape: Shape, storage: Sequence[str], threads: int, rounds: int) -> list[Timing]:
    """f32 is a list of arrays, the other types are stored pages. Raises CembedError: an unknown storage type, a dim
    that it cannot have."""
    for name in storage:
        storage_of(name)
    case = Case.draw(shape)
    pages = {name: case.stored(name) for name in storage}
    runs: dict[str, Run] = {"numpy": fastest(numpy_ways(case))}
    for name, stored in pages.items():
        runs[name] = our_way(case.query, list(case.documents) if name == "f32" else stored, threads)
    times = timed(runs, shape.calls(), rounds)
    return [timing_of(name, stored, case.query, runs[name], times) for name, stored in pages.items()]


def timed(runs: Mapping[str, Run], calls: int, rounds: int) -> dict[str, list[float]]:
    """The milliseconds of every contender in each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        time_round(runs, number, times, calls)
    return times


def timing_of(storage: str, pages: Pages, query: Floats, run: Run, times: Mapping[str, list[float]]) -> Timing:
    ratio = median(np.divide(times["numpy"], times[storage]).tolist())
    return Timing(storage, len(pages.data), median(times[storage]), ratio, error_of(query, pages, run()))


def error_of(query: Floats, pages: Pages, scores: Floats) -> float:
    """The largest difference to float64, of some pages, relative to the mean size of their scores."""
    which = np.linspace(0, len(pages) - 1, min(CHECKED, len(pages))).astype(np.int64)
    exact = exact_scores(query, pages, which)
    return float(np.abs(scores[which] - exact).max() / np.abs(exact).mean())

"""What a large corpus takes, from what a few of its pages took here: hours, disk, memory, money."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import numpy as np

from cembed.runtime.embed.embedder import Budget, Embedder
from cembed.runtime.errors import CembedError
from cembed.runtime.page_vectors import EmbeddedPage, embed_pages
from cembed.runtime.pages.documents import PageReader
from cembed.runtime.plain_files import hash_file
from cembed.runtime.scoring.storage import STORAGE
from cembed.scale.embed import WorkerOptions

WARM = 2
"""Pages that are not counted: the first ones open graphs and fill caches."""
OVERHEAD = 0.0023
"""Seconds a page of giving it out and writing its row, on one core: measured by `bench/scale.py`."""
ROW_BYTES = 180
"""Of a row beside its vectors: path, hashes, settings; texts are compressed."""
LOG_BYTES = 120
"""Of a page in an index beside its vectors."""


@dataclass(frozen=True)
class Measured:
    """Means of `pages` that were embedded by processes of one thread, one for each core: seconds each, of reading and
    embedding, and vectors each."""

    pages: int
    read_seconds: float
    embed_seconds: float
    vectors: float
    dim: int
    failed: int

    @property
    def seconds(self) -> float:
        """Of one process for a page."""
        return self.read_seconds + self.embed_seconds + OVERHEAD

    def page_bytes(self, storage: str) -> float:
        """Of a page's vectors in a storage type."""
        kept = STORAGE[storage]
        return self.vectors * kept.vector_bytes(self.dim) + kept.page_bytes


@dataclass(frozen=True)
class Plan:
    """`pages` on nodes of `cores`, of which `share` does useful work, in processes of so many `threads`."""

    measured: Measured
    pages: int
    cores: int
    share: float = 0.95
    threads: int = 1

    @property
    def core_hours(self) -> float:
        return self.pages * self.measured.seconds * self.threads / 3600 / self.share

    def hours(self, nodes: int) -> float:
        """Until all pages are embedded."""
        return self.core_hours / (nodes * self.cores)

    @property
    def node_hours(self) -> float:
        return self.core_hours / self.cores

    def rows_bytes(self, storage: str) -> float:
        """Of Parquet or Lance, in which vectors are not compressed: they are noise to every compression."""
        return self.pages * (self.measured.page_bytes(storage) + ROW_BYTES)

    def index_bytes(self, storage: Sequence[str]) -> Mapping[str, float]:
        """On disk for each storage type of an index, and for its log."""
        sizes = {name: self.pages * self.measured.page_bytes(name) for name in storage}
        return {**sizes, "log": float(self.pages * LOG_BYTES)}


def measure(embedder: Embedder, files: Iterable[Path], reader: PageReader, budget: Budget, pages: int) -> Measured:
    """Reads and embeds so many pages, one of each of `files`, after a few that are not counted.

    One after the other with one thread, as processes of a cluster do. Raises CembedError: none can be read.
    """
    times, vectors, failed, dim = list[tuple[float, float]](), list[int](), 0, embedder.dim
    embedder.prepare("document", budget)
    with reader:
        for i, file in enumerate(files):
            start = time.perf_counter()
            with contextlib.suppress(CembedError):
                hash_file(str(file))
            page, _ = reader.page(file, 1 + i % max(1, reader.pages_of(file)))
            between = time.perf_counter()
            made = next(iter(embed_pages(embedder, [page], budget)))
            if not isinstance(made, EmbeddedPage):
                failed += 1
                continue
            times.append((between - start, time.perf_counter() - between))
            vectors.append(len(made.vectors))
            dim = made.vectors.shape[1]
            if len(times) == pages + WARM:
                break
    if not times:
        raise CembedError("none of these pages could be embedded: give others to measure with")
    counted = times[min(WARM, len(times) - 1) :]
    read, embedded = (mean(column) for column in zip(*counted, strict=True))
    return Measured(len(counted), read, embedded, mean(vectors), dim, failed)


def measure_together(options: WorkerOptions, files: Sequence[Path], pages: int, processes: int) -> Measured:
    """`measure` in so many processes at a time, as on a node: they share its memory and caches, and slow each other.

    Raises CembedError: none can be read.
    """
    shares = [files[i::processes] for i in range(min(processes, len(files)))]
    with ProcessPoolExecutor(len(shares), get_context("spawn")) as pool:
        found = list(pool.map(partial(_measure, options, -(-pages // len(shares))), shares))
    count = sum(each.pages for each in found)

    def average(name: str) -> float:
        return float(sum(getattr(each, name) * each.pages for each in found) / count)

    failed = sum(each.failed for each in found)
    read, embedded, vectors = (average(name) for name in ("read_seconds", "embed_seconds", "vectors"))
    return Measured(count, read, embedded, vectors, found[0].dim, failed)


def _measure(options: WorkerOptions, pages: int, files: Sequence[Path]) -> Measured:
    return measure(options.load(), files, options.reader(), options.budget, pages)


def spread(files: Sequence[Path], count: int) -> list[Path]:
    """So many of the files, evenly: the first ones of a folder are often alike.

    >>> [path.name for path in spread([Path(str(i)) for i in range(10)], 4)]
    ['0', '3', '6', '9']
    """
    places = np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)
    return [files[i] for i in places]

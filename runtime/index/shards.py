"""Many indexes searched as one: each in a process, their best pages merged.

A page's score depends on nothing but the page and the query, so the best of all shards are among the best of each;
equal ones come in the order of the shards, and in each in that in which they were added.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.index.search import Found, Stage, StageReport
from cembed.runtime.index.views import PageInfo

T = TypeVar("T")


@dataclass(frozen=True)
class About:
    """What all shards must have in common, and how many pages one has."""

    bundle: str
    dim: int
    tiers: tuple[str, ...]
    pages: int


class Shards:
    """Indexes at `paths`, opened by `processes`, at most one for each; by default as many as there are cores.

    Use it in a `with` block, and in a script behind `if __name__ == "__main__"`: its processes import the script.
    Methods may be called from several threads. Raises CembedError: no index, a damaged one, or they do not belong
    together.
    """

    def __init__(self, paths: Iterable[str | Path], processes: int | None = None) -> None:
        self.folders = tuple(os.path.abspath(path) for path in paths)
        if not self.folders:
            raise CembedError("there are no shards: give at least one index")
        cores = len(os.sched_getaffinity(0))
        count = min(processes or cores, len(self.folders))
        self._threads = max(1, cores // count)
        self._pools = [ProcessPoolExecutor(1, get_context("spawn")) for _ in range(count)]
        try:
            self._about = self._each(_about)
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        first = self._about[0]
        for folder, about in zip(self.folders, self._about, strict=True):
            if (about.bundle, about.dim) != (first.bundle, first.dim):
                raise CembedError(f"{folder} has vectors of another bundle or dim than {self.folders[0]}")

    def _each(self, work: Callable[[str], T]) -> list[T]:
        """What `work` gives for each shard, whose process is always the same. Raises CembedError: one has died."""
        futures: list[Future[T]] = [
            self._pools[i % len(self._pools)].submit(work, folder) for i, folder in enumerate(self.folders)
        ]
        try:
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise CembedError("a process that searched a shard has ended: open the shards again") from None

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    @property
    def bundle(self) -> str:
        return self._about[0].bundle

    @property
    def dim(self) -> int:
        return self._about[0].dim

    @property
    def tiers(self) -> tuple[str, ...]:
        """Storage types that all shards have, the most exact first."""
        return tuple(tier for tier in self._about[0].tiers if all(tier in about.tiers for about in self._about))

    def __len__(self) -> int:
        """Pages that were there when the shards were opened."""
        return sum(about.pages for about in self._about)

    def search(
        self,
        query: Vectors,
        top: int = 10,
        *,
        where: Mapping[str, Any] | None = None,
        source: str | None = None,
        candidates: int | None = None,
        plan: Sequence[Stage] | None = None,
        threads: int | None = None,
    ) -> Found:
        """As `Index.search`; a hit's `index` is its shard, and of large shards each keeps `candidates` of its own."""
        given = {"where": where, "source": source, "candidates": candidates, "plan": plan}
        found = self._each(partial(_search, query, top, threads or self._threads, given))
        hits = [
            replace(hit, index=folder) for folder, part in zip(self.folders, found, strict=True) for hit in part.hits
        ]
        best = sorted(hits, key=lambda hit: -hit.score)[:top]  # it keeps the order of equal ones
        return Found(tuple(best), merged([part.stages for part in found]))

    def info(self, page: str, folder: str) -> PageInfo:
        """`Index.info` of a page of the shard at `folder`."""
        at = self.folders.index(folder)
        return self._pools[at % len(self._pools)].submit(_info, page, folder).result()


def merged(stages: Sequence[Sequence[StageReport]]) -> tuple[StageReport, ...]:
    """The stages of all shards: their pages and bytes together, the slowest one's time; by type, the last one last."""
    tiers = list(dict.fromkeys(report.tier for reports in stages for report in reports))
    of = {tier: [report for reports in stages for report in reports if report.tier == tier] for tier in tiers}
    return tuple(
        StageReport(
            tier,
            sum(report.pages for report in of[tier]),
            sum(report.kept for report in of[tier]),
            max(report.ms for report in of[tier]),
            sum(report.bytes for report in of[tier]),
        )
        for tier in tiers
    )


_opened: dict[str, Index] = {}
"""In a process of `Shards`: the indexes that it searches."""


def _index(folder: str) -> Index:
    if folder not in _opened:
        _opened[folder] = Index.open(folder)
    return _opened[folder]


def _about(folder: str) -> About:
    index = _index(folder)
    return About(index.bundle, index.dim, index.tiers, len(index))


def _search(query: Vectors, top: int, threads: int, given: Mapping[str, Any], folder: str) -> Found:
    return _index(folder).search(query, top, threads=threads, **given)


def _info(page: str, folder: str) -> PageInfo:
    return _index(folder).info(page)

"""A search of an index: cheap scores of many pages first, exact ones of the few that are left.

Each stage scores the pages the stage before it kept, in one tier: `bits` on all, `u8` on some hundreds, the most exact
tier on the last. Where the most exact tier is small it alone is read.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError
from cembed.runtime.finite import finite
from cembed.runtime.index.columns import page_sizes
from cembed.runtime.index.metadata import parse_metadata
from cembed.runtime.index.records import Commit
from cembed.runtime.index.views import View
from cembed.runtime.scoring import kernels
from cembed.runtime.scoring.storage import STORAGE

EXACT_BYTES = 64 << 20  # an exact tier of this size is scanned about as fast as stages would be
CANDIDATES, CANDIDATES_EACH = 1000, 20  # pages the first stage keeps, and for each page that is asked for
LAST_CANDIDATES, LAST_EACH, LAST_SHARE = 100, 5, 10  # the same of later ones; at least a tenth of the first's

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Stage:
    """Score in a tier, and keep the best so many."""

    tier: str
    keep: int


@dataclass(frozen=True)
class StageReport:
    """What a stage did: pages scored, pages kept, milliseconds, bytes of vectors read."""

    tier: str
    pages: int
    kept: int
    ms: float
    bytes: int


@dataclass(frozen=True)
class Hit:
    """A page that was found; the score is that of the last stage. `warning`, `folder` and `serial` as in PageInfo;
    `index` is where its shard is, among several."""

    score: float
    id: str
    source: str
    page: int
    metadata: Mapping[str, Any]
    warning: str | None = None
    folder: str | None = None
    serial: int = 0
    index: str | None = None


@dataclass(frozen=True)
class Found:
    """Pages, best first, of equal ones the one added first; and how they were found."""

    hits: tuple[Hit, ...]
    stages: tuple[StageReport, ...]


def make_plan(tiers: Sequence[str], exact_bytes: int, top: int, candidates: int | None = None) -> tuple[Stage, ...]:
    """The stages for an index with `tiers`, the most exact first, which takes `exact_bytes`.

    >>> [(stage.tier, stage.keep) for stage in make_plan(["f16", "u8", "bits"], 1 << 30, 10)]
    [('bits', 1000), ('u8', 100), ('f16', 10)]
    >>> [(stage.tier, stage.keep) for stage in make_plan(["f16", "u8", "bits"], 1 << 20, 10)]
    [('f16', 10)]
    """
    exact = Stage(tiers[0], top)
    if exact_bytes <= EXACT_BYTES and candidates is None:
        return (exact,)
    first = max(CANDIDATES, CANDIDATES_EACH * top) if candidates is None else max(candidates, top)
    last = min(first, max(LAST_CANDIDATES, LAST_EACH * top, first // LAST_SHARE))
    coarse = [tier for tier in reversed(tiers[1:]) if STORAGE[tier].screens]
    keeps = [first, *[last] * len(coarse)][: len(coarse)]
    return (*(Stage(tier, keep) for tier, keep in zip(coarse, keeps, strict=True)), exact)


def check_query(query: NDArray[Any], dim: int) -> Vectors:
    """The query in float32. Raises CembedError: no vectors of this dim, NaN or infinity."""
    if np.ndim(query) != 2 or len(query) == 0 or query.shape[1] != dim:
        raise CembedError(f"the query has shape {np.shape(query)}: this index takes [num_vectors, {dim}]")
    return finite("the query", query)


def check_plan(plan: Sequence[Stage], tiers: Sequence[str]) -> None:
    """Raises CembedError: a tier that the index does not have, nothing to keep."""
    if not plan or any(stage.keep < 1 for stage in plan):
        raise CembedError("a plan has one stage or more, and each keeps one page or more")
    if missing := [stage.tier for stage in plan if stage.tier not in tiers]:
        raise CembedError(f"this index does not store {missing[0]}: it has {', '.join(tiers)}")


def run_plan(
    views: Sequence[View], query: Vectors, plan: Sequence[Stage], which: Sequence[Numbers | None], threads: int | None
) -> Found:
    """The pages of `which` (None: all) in each view that the stages of `plan` leave. Raises CembedError: damage."""
    kept: Sequence[Numbers | None] = which
    reports: list[StageReport] = []
    for stage in plan:
        kept, ranked, report = run_stage(views, query, stage, kept, threads)
        for view in views if reports else ():
            view.maps[stage.tier].release()  # pages here and there, each of which the system rounds up to 64 kB
        reports.append(report)
    hits = [to_hit(views[at], int(page), float(score)) for at, page, score in zip(*ranked, strict=True)]
    return Found(tuple(hits), tuple(reports))


def run_stage(
    views: Sequence[View], query: Vectors, stage: Stage, which: Sequence[Numbers | None], threads: int | None
) -> tuple[list[Numbers], tuple[Numbers, Numbers, NDArray[np.float32]], StageReport]:
    """For each view the pages kept, in order; all of them ranked, as views, pages and scores; and the report."""
    start, pages, size = time.perf_counter(), 0, 0
    parts: list[tuple[Numbers, Numbers, NDArray[np.float32]]] = []
    for at, (view, chosen) in enumerate(zip(views, which, strict=True)):
        pages += len(view) if chosen is None else len(chosen)
        size += int(
            page_sizes(stage.tier, view.columns.rows[slice(None) if chosen is None else chosen], view.dim).sum()
        )
        numbers, scores = kernels.top(query, view.pages(stage.tier, chosen), stage.keep, chosen, threads)
        parts.append((np.full(len(numbers), at, np.int64), numbers, scores))
    places, numbers, scores = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    if not np.isfinite(scores).all():
        worst = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise CembedError(f"the vectors of {views[places[worst]].info(int(numbers[worst])).id!r} are no finite numbers")
    best = np.lexsort((numbers, places, -scores))[: stage.keep]
    places, numbers, scores = places[best], numbers[best], scores[best]
    kept = [np.sort(numbers[places == at]) for at in range(len(views))]
    elapsed = (time.perf_counter() - start) * 1000
    return kept, (places, numbers, scores), StageReport(stage.tier, pages, len(best), elapsed, size)


def to_hit(view: View, page: int, score: float) -> Hit:
    info = view.info(page)
    return Hit(
        score=score,
        id=info.id,
        source=info.source,
        page=info.page,
        metadata=info.metadata,
        warning=info.warning,
        folder=info.folder,
        serial=info.serial,
    )


def choose(view: View, where: Mapping[str, Any] | None, source: str | None) -> Numbers | None:
    """Live pages whose metadata has all of `where`, and whose source fits the pattern `source`; None for all pages."""
    if not where and source is None:
        return view.live
    chosen = np.zeros(len(view), np.bool_)
    for commit, pages in view.commits():
        with view.segment.malformed():
            chosen[pages] = _fits(commit, where or {}, source)
    return np.flatnonzero(chosen & view.alive)


def _fits(commit: Commit, where: Mapping[str, Any], source: str | None) -> NDArray[np.bool_]:
    """Of each page of a record; every text is looked at once."""
    sources = [source is None or fnmatch.fnmatchcase(text, source) for text in commit.sources]
    metadata = [where.items() <= parse_metadata(commit, i).items() for i in range(len(commit.metadata))]
    chosen: NDArray[np.bool_] = np.array(sources)[commit.source] & np.array(metadata)[commit.metadatum]
    return chosen

"""The half of an index that reads: what is there, searches, and what other processes have added."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError
from cembed.runtime.index import search as searching
from cembed.runtime.index.files import Current, read_current
from cembed.runtime.index.known_pages import KnownPages, Told
from cembed.runtime.index.metadata import Notes, parse_metadata, sources_of
from cembed.runtime.index.new_pages import NewPage
from cembed.runtime.index.records import Commit
from cembed.runtime.index.search import Found, Stage
from cembed.runtime.index.segments import Segment
from cembed.runtime.index.views import PageInfo, View
from cembed.runtime.scoring.storage import STORAGE

ATTEMPTS = 5
RELEASED_AT_ONCE = 1024


@dataclass(frozen=True)
class Stats:
    """Pages, and removed ones; vectors of the former; bytes of each tier and of the logs, of all of them a page;
    `warnings` counts the pages that have one."""

    pages: int
    removed: int
    vectors: int
    dim: int
    bundle: str
    segments: int
    records: int
    bytes: Mapping[str, int]
    bytes_per_page: float
    warnings: int


@dataclass(frozen=True)
class Source:
    """What an index has of a source: page numbers in rising order, and where it starts if it is relative and known."""

    numbers: Sequence[int]
    folder: str | None


class IndexReader:
    """An index as it was when it was opened, or last refreshed. `notes` says what a killed writer had left behind."""

    def __init__(self, folder: Path, damaged: bool) -> None:
        """`damaged` allows damage. Raises CembedError: no index, or damage."""
        self.folder, self.notes = folder, list[str]()
        self._damaged = damaged
        self._lock = threading.RLock()
        self._segments: list[Segment] = []
        self._views: list[View] | None = None
        self._known: KnownPages | None = None
        self._load()

    def _load(self) -> None:
        """Reads CURRENT and its segments; again, if a compaction took them away meanwhile."""
        for attempt in range(ATTEMPTS):
            current = read_current(self.folder)
            try:
                segments = self._open_segments(current)
                break
            except CembedError:
                if attempt == ATTEMPTS - 1 or read_current(self.folder) == current:
                    raise
        self._current, self._segments = current, segments
        self._views = self._known = None

    def _open_segments(self, current: Current) -> list[Segment]:
        same = bool(self._segments) and self._current.index == current.index
        known = {segment.number: segment for segment in self._segments} if same else {}
        segments = [known.get(number) or Segment(self.folder, current, number) for number in current.segments]
        for segment in segments:
            if segment.number in known:
                segment.grow()
            if not self._damaged:
                segment.require_whole(segment is segments[-1])
        return segments

    @property
    def dim(self) -> int:
        return self._current.dim

    @property
    def tiers(self) -> tuple[str, ...]:
        """Storage types, the most exact first."""
        return self._current.tiers

    @property
    def bundle(self) -> str:
        return self._current.bundle

    @property
    def identity(self) -> str:
        """A random text that no other index has, one at the same place neither."""
        return self._current.index

    def __len__(self) -> int:
        """Pages that are there."""
        return sum(int(view.alive.sum()) for view in self._snapshot())

    def refresh(self) -> None:
        """Takes in what the writer has done since. Raises CembedError: damage."""
        with self._lock:
            self._load()

    def _snapshot(self) -> list[View]:
        views = self._views
        if views is not None:
            return views  # while another thread adds
        with self._lock:
            if self._views is None:
                removed = [part for segment in self._segments for part in segment.removed]
                serials = np.unique(np.concatenate([np.empty(0, np.int64), *removed]))
                self._views = [View.of(segment, serials) for segment in self._segments]
            return self._views

    def check_bundle(self, bundle: str) -> None:
        """Raises CembedError: vectors of this bundle are others than those in the index."""
        if bundle != self.bundle:
            raise CembedError(
                f"{self.folder} has vectors of bundle {self.bundle[:12]}, these are of {bundle[:12]}: "
                "use the same bundle, or make another index"
            )

    def _known_pages(self) -> KnownPages:
        if self._known is None:
            self._known = KnownPages(self._snapshot(), self._told)
        return self._known

    def _told(self, serial: int) -> Told:
        """What is said of a page; nothing, where its record is still to come."""
        for segment in reversed(self._segments):
            if (found := segment.record(serial)) is not None:
                commit, i = found
                metadata = commit.metadata[commit.metadatum[i]]
                return Told(commit.sources[commit.source[i]], int(commit.numbers[i]), metadata)
        return Told("", -1, "")

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
        """The pages that fit vectors float32 [Q, D] best, by MaxSim in the most exact tier.

        `where` keeps pages whose metadata has all of its keys with equal values, `source` those whose source fits the
        pattern (`*`, `?`, `[…]`), before anything is ranked. Large indexes are searched in stages, see `make_plan`:
        `candidates` pages go from the first to the second, `plan` gives all stages; the result says what was done.
        Raises CembedError: no numbers, another dim, a tier that is not there, damaged pages.
        """
        views = self._snapshot()
        query = searching.check_query(query, self.dim)
        if top < 1 or (candidates is not None and candidates < 1):
            raise CembedError(f"top is {top} and candidates {candidates}: 1 or more are needed")
        which = [searching.choose(view, where, source) for view in views]
        pages = sum(len(view) if chosen is None else len(chosen) for view, chosen in zip(views, which, strict=True))
        if plan is None:
            size = sum(view.columns.rows.sum(dtype=np.int64) for view in views) * pages // max(1, sum(map(len, views)))
            exact = int(size) * STORAGE[self.tiers[0]].vector_bytes(self.dim)
            plan = searching.make_plan(self.tiers, exact, top, candidates)
        searching.check_plan(plan, self.tiers)
        return searching.run_plan(views, query, plan, which, threads)

    def find(self, *, where: Mapping[str, Any] | None = None, source: str | None = None) -> list[PageInfo]:
        """Pages in the order they were added; filters as in `search`."""
        found = []
        for view in self._snapshot():
            chosen = searching.choose(view, where, source)
            found += [view.info(page) for page in (range(len(view)) if chosen is None else chosen.tolist())]
        return found

    def vectors(self, page: str) -> Vectors:
        """What the most exact tier keeps of the page with this id, float32 [K, D]. Raises CembedError."""
        view, place = self._find_page(page)
        return view.vectors(place)

    def info(self, page: str) -> PageInfo:
        """What is told of the page with this id. Raises CembedError: there is none, or its record is damaged."""
        view, place = self._find_page(page)
        return view.info(place)

    def serial_info(self, serial: int) -> PageInfo:
        """`info` for the page with this serial, as a Hit has it. Raises CembedError as `info` does."""
        for view in self._snapshot():
            if (place := view.columns.find(serial)) is not None and view.alive[place]:
                return view.info(place)
        raise CembedError(f"{self.folder} has no page with the serial {serial}")

    def _find_page(self, page: str) -> tuple[View, int]:
        with self._lock:
            serial = self._known_pages().serial(page)
            for view in self._snapshot():
                if serial is not None and (place := view.columns.find(serial)) is not None:
                    return view, place
        raise CembedError(f"{self.folder} has no page {page!r}")

    def pages(self) -> Iterator[NewPage]:
        """All pages in the order they were added, as `add` takes them, with what the most exact tier keeps of each.

        A part of the index is in memory at a time. Raises CembedError: damaged.
        """
        for view in self._snapshot():
            for commit, places in view.commits():
                for i in np.flatnonzero(view.alive[places]).tolist():
                    yield _page_of(view, commit, i, places.start + i)
                    if not i % RELEASED_AT_ONCE:
                        view.release()

    def largest(self) -> PageInfo | None:
        """The page with the most vectors; None if there are no pages. Raises CembedError: its record is damaged."""
        found = [view.info(place) for view in self._snapshot() if (place := view.largest()) is not None]
        return max(found, key=lambda page: page.vectors, default=None)

    def sources(self) -> dict[str, Source]:
        """The sources of all pages. Raises CembedError: the log is damaged."""
        numbers: dict[str, list[int]] = {}
        folders: dict[str, str | None] = {}
        for view in self._snapshot():
            for commit, pages in view.commits():
                with view.segment.malformed():
                    for text, found, folder in sources_of(commit, view.alive[pages]):
                        numbers.setdefault(text, []).extend(found)
                        folders[text] = folder
        return {text: Source(sorted(found), folders[text]) for text, found in numbers.items()}

    def __contains__(self, page: object) -> bool:
        """Whether a page has this id."""
        with self._lock:
            return isinstance(page, str) and self._known_pages().serial(page) is not None

    def knows(self, page: str, content: bytes) -> bool:
        """Whether the page with this id has this content hash: `add` would skip it, or change what is told of it."""
        with self._lock:
            return self._known_pages().has(page, content)

    def content_of(self, page: str) -> bytes | None:
        """The content hash, filled up with zeros, of the page with this id; None if there is none."""
        with self._lock:
            return self._known_pages().content(page)

    def has_content(self, content: bytes) -> bool:
        """Whether there are vectors of this content hash: `add` takes a page that has it without vectors."""
        with self._lock:
            return self._known_pages().vectors_of(content) is not None

    def warning_of(self, content: bytes) -> str | None:
        """The warning that goes with the vectors of a content hash."""
        with self._lock:
            return self._known_pages().warning_of(content)

    def stats(self) -> Stats:
        """Counts and sizes."""
        views = self._snapshot()
        sizes = [view.segment.sizes() for view in views]
        total = {name: sum(size[name] for size in sizes) for name in ("log", *self.tiers)}
        pages = sum(int(view.alive.sum()) for view in views)
        vectors = sum(int(view.columns.rows[view.alive].sum(dtype=np.int64)) for view in views)
        records = sum(view.segment.records for view in views)
        removed = sum(map(len, views)) - pages
        per_page = sum(total.values()) / max(1, pages)
        warnings = sum(int(view.columns.warned[view.alive].sum()) for view in views)
        return Stats(
            pages=pages,
            removed=removed,
            vectors=vectors,
            dim=self.dim,
            bundle=self.bundle,
            segments=len(views),
            records=records,
            bytes=total,
            bytes_per_page=per_page,
            warnings=warnings,
        )


def _page_of(view: View, commit: Commit, place: int, page: int) -> NewPage:
    """A page with its vectors, by its place in what the log says of it and its number among those of the view."""
    with view.segment.malformed():
        notes = Notes.of(parse_metadata(commit, int(commit.metadatum[place])))
    content = commit.contents[place].tobytes()
    return NewPage(
        id=commit.ids[place],
        vectors=view.vectors(page),
        source=commit.sources[commit.source[place]],
        page=int(commit.numbers[place]),
        metadata=notes.metadata,
        content=content if any(content) else b"",
        warning=notes.warning,
        folder=notes.folder,
    )

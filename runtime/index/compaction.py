"""Compaction: segments with removed pages, or with many small records, are written anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cembed.runtime.disk import Disk
from cembed.runtime.errors import CembedError
from cembed.runtime.index.columns import REPAIR
from cembed.runtime.index.files import Current
from cembed.runtime.index.new_pages import BATCH_BYTES, BATCH_PAGES
from cembed.runtime.index.records import Commit
from cembed.runtime.index.segments import Segment
from cembed.runtime.index.views import View
from cembed.runtime.index.writer import SegmentWriter, StoredPage, add_segment

Key = tuple[int, ...]  # of bytes that several pages share
_Copy = tuple[StoredPage, Key | None]

_FEW_PAGES = 64  # in a record on average, and the log is worth writing anew


@dataclass(frozen=True)
class Compacted:
    """Pages that are left, ids of those dropped because they are damaged, bytes of all files before and after."""

    pages: int
    dropped: tuple[str, ...]
    bytes_before: int
    bytes_after: int


def compact_segments(
    disk: Disk, folder: Path, current: Current, views: Sequence[View], segment_bytes: int, drop_damaged: bool
) -> tuple[Current, tuple[str, ...]]:
    """The index as it shall be, its new segments written and on disk, and the pages that were dropped.

    Segments that are as good as new stay. The order of pages stays too. Raises CembedError: damage; OSError.
    """
    output, dropped = _Output(disk, folder, replace(current, segments=()), segment_bytes), list[str]()
    latest = _latest(views) if drop_damaged else None
    try:
        for view in views:
            if latest is None and _is_fine(view):
                output.keep(view.segment.number)
            else:
                output.copy(_pages(view, latest, dropped))
        return output.finish(), tuple(dropped)
    except BaseException:
        output.abandon()
        raise


def _is_fine(view: View) -> bool:
    many = view.segment.records > 1 and len(view) < _FEW_PAGES * view.segment.records
    return bool(view.alive.all()) and not many


def _latest(views: Sequence[View]) -> Mapping[str, int]:
    """The last page of each id: where records are lost, one that had been replaced is back."""
    latest: dict[str, int] = {}
    for view in views:
        for commit, places, _ in _live(view):
            latest.update((commit.ids[place], int(commit.serials[place])) for place in places)
    return latest


def _live(view: View) -> Iterator[tuple[Commit, list[int], int]]:
    """Some records as one, the places in it of pages that are there, and the number of its first page."""
    for commit, pages in view.commits():
        yield commit, np.flatnonzero(view.alive[pages]).tolist(), pages.start


def _pages(view: View, latest: Mapping[str, int] | None, dropped: list[str]) -> Iterator[_Copy]:
    """The pages to keep; damaged ones go to `dropped` where `latest` is given. Raises CembedError: damage."""
    shared = _shared(view)
    for commit, places, first in _live(view):
        for place in places:
            if latest is not None and latest[commit.ids[place]] != commit.serials[place]:
                continue
            which = np.array([first + place])
            broken = [tier for tier in view.maps if list(view.damaged(tier, which))]
            if not broken:
                yield _stored_page(view, commit, place, first + place), shared.get(first + place)
            elif latest is None:
                raise CembedError(f"{view.describe(broken[0], first + place)}: {REPAIR}")
            else:
                dropped.append(commit.ids[place])


def _shared(view: View) -> Mapping[int, Key]:
    """Of the live pages that share their bytes with others: what is the same for those that do."""
    starts, rows, live = view.columns.starts, view.columns.rows, np.flatnonzero(view.alive)
    _, which, counts = np.unique(starts[0, live], return_inverse=True, return_counts=True)
    pages = live[counts[which] > 1].tolist()
    return {page: (view.segment.number, int(rows[page]), *starts[:, page].tolist()) for page in pages}


def _stored_page(view: View, commit: Commit, place: int, page: int) -> StoredPage:
    serial = int(commit.serials[place])
    return StoredPage(
        serial=serial,
        id=commit.ids[place],
        source=commit.sources[commit.source[place]],
        number=int(commit.numbers[place]),
        metadata=commit.metadata[commit.metadatum[place]],
        content=commit.contents[place].tobytes(),
        vectors=view.stored(page),
        of=serial,
    )


class _Output:
    """New segments, and old ones that stay, in order."""

    def __init__(self, disk: Disk, folder: Path, current: Current, segment_bytes: int) -> None:
        self._disk, self._folder, self._current, self._segment_bytes = disk, folder, current, segment_bytes
        self._writer: SegmentWriter | None = None
        self._written: dict[Key, int] = {}  # the first page in the segment that has the bytes

    def copy(self, pages: Iterable[_Copy]) -> None:
        batch, weight = list[_Copy](), 0
        for page, key in pages:
            batch.append((page, key))
            texts = 4 * (len(page.id) + len(page.source) + len(page.metadata))  # bytes, at most
            weight += sum(map(len, page.vectors.stored.values())) + texts
            if len(batch) == BATCH_PAGES or weight >= BATCH_BYTES:
                self._append(batch)
                batch, weight = [], 0
        if batch:
            self._append(batch)

    def _append(self, batch: Sequence[_Copy]) -> None:
        if self._writer is not None and self._writer.segment.size >= self._segment_bytes:
            self._end()
        if self._writer is None:
            self._current = add_segment(self._disk, self._folder, self._current)
            self._writer = SegmentWriter(self._disk, Segment(self._folder, self._current, self._current.segments[-1]))
        self._writer.append([self._once(page, key) for page, key in batch])

    def _once(self, page: StoredPage, key: Key | None) -> StoredPage:
        """The page, to be written unless its bytes are in the segment."""
        return page if key is None else replace(page, of=self._written.setdefault(key, page.serial))

    def keep(self, number: int) -> None:
        self._end()
        self._current = replace(self._current, segments=(*self._current.segments, number))

    def _end(self) -> None:
        writer, self._writer = self._writer, None
        self._written.clear()
        if writer is not None:
            writer.close()

    def finish(self) -> Current:
        self._end()
        if not self._current.segments:
            self._current = add_segment(self._disk, self._folder, self._current)
        return self._current

    def abandon(self) -> None:
        """Lets go of the files; nothing names them."""
        if self._writer is not None:
            self._writer.release()

"""A segment of an index as its log tells it: what was committed, and whether the log and the files are whole."""

from __future__ import annotations

import bisect
import contextlib
import mmap
import os
import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.errors import CembedError
from cembed.runtime.index.columns import REPAIR, Columns, StoredVectors, TierMap, page_sizes, place_pages
from cembed.runtime.index.files import Current, open_regular, segment_path
from cembed.runtime.index.metadata import warnings_of
from cembed.runtime.index.records import (
    CLOSE,
    MAX_NUMBER,
    PLACED,
    Commit,
    Gap,
    Record,
    decode_commits,
    read_log,
    read_record,
    seed_of,
)
from cembed.runtime.index.texts import MalformedError

MAX_ROWS = 1 << 20
MOST_PARTS = 256
RETRY_SECONDS = 0.05
Numbers = NDArray[np.int64]

_HELD_BYTES = 32 << 20  # of records that are decoded together


class Segment:
    """Reads one segment, and what is appended to it later. Nothing is written here.

    `log_end`, `sequence` and `ends` are where the next record and the next page of each tier go; `clean_end` is after
    the last CLOSE; `torn` counts the bytes after `log_end` that are no record; `damage` has a line for each place that
    is neither. Raises CembedError: a file is missing, or no plain file.
    """

    def __init__(self, folder: Path, current: Current, number: int) -> None:
        self.folder, self.number, self.dim = folder, number, current.dim
        self.seed = seed_of(current.index, number)
        self._log = self._open("log")
        self._data = {tier: self._open(tier) for tier in current.tiers}
        self.log_end = self.sequence = self.clean_end = self.torn = self.records = 0
        self.ends = dict.fromkeys(current.tiers, 0)
        self.damage: list[str] = []
        self.removed: list[NDArray[np.int64]] = []
        self.count, self.last_serial = 0, -1
        self._chunks, self._lasts = [Columns.empty(len(current.tiers))], [-1]  # and the last serial of each
        self._maps = {tier: TierMap(np.empty(0, np.uint8)) for tier in current.tiers}
        self._checked = {tier: np.zeros(0, np.bool_) for tier in current.tiers}
        self._last_commit: tuple[int, Commit] | None = None
        self.grow()

    def _open(self, suffix: str) -> int:
        path = self._path(suffix)
        try:
            handle = open_regular(path)
        except OSError as error:
            raise CembedError(f"{path} is missing or no plain file ({error.strerror}): take it from a copy") from error
        weakref.finalize(self, os.close, handle)
        return handle

    @property
    def path(self) -> Path:
        """Of the log."""
        return self._path("log")

    def _path(self, suffix: str) -> Path:
        return segment_path(self.folder, self.number, suffix)

    @property
    def closed(self) -> bool:
        """Whether the last writer ended well."""
        return self.log_end == self.clean_end and not self.torn

    @property
    def size(self) -> int:
        """Bytes that count, of all files together."""
        return self.log_end + sum(self.ends.values())

    def sizes(self) -> dict[str, int]:
        """Bytes of each file as it is now."""
        return {name: os.fstat(handle).st_size for name, handle in {"log": self._log, **self._data}.items()}

    def grow(self) -> None:
        """Takes what was appended since; lines are added to `damage` for what cannot be read."""
        waiting, held = list[Record](), 0
        for record in self._commits():
            if waiting and (held > _HELD_BYTES or record.header.kind != waiting[0].header.kind):
                self._add_all(waiting)
                waiting, held = [], 0
            waiting.append(record)
            held += record.header.length
        self._add_all(waiting)
        self._check_sizes()

    def _commits(self) -> Iterator[Record]:
        """The commits that were appended since; a gap is looked at twice: a writer may be replacing a torn record."""
        self.torn = 0
        try:
            for last_look in (False, True):
                for item in read_log(self._log, self.seed, self.log_end, self.sequence):
                    if isinstance(item, Record):
                        yield from self._passed(item)
                    elif item.tail:
                        self.torn = item.end - item.offset
                    elif last_look:
                        self._lost(item)
                    else:
                        time.sleep(RETRY_SECONDS)
                        break
                else:
                    return
        except MalformedError as error:
            self.damage.append(f"{self.path} is damaged: {error}")

    def _passed(self, record: Record) -> list[Record]:
        """The record, if it is a commit."""
        self.log_end, self.sequence = record.end, record.header.sequence + 1
        if record.header.kind == CLOSE:
            self.clean_end = record.end
            return []
        return [record]

    def _lost(self, gap: Gap) -> None:
        self.damage.append(
            f"{self.path} is damaged between bytes {gap.offset} and {gap.end}: pages it added there are lost, "
            "and pages it removed there are back"
        )

    def _add_all(self, records: Sequence[Record]) -> None:
        """At once, or one by one where something is wrong with one of them."""
        try:
            self._add(records)
            return
        except MalformedError:
            pass
        for record in records:
            try:
                self._add([record])
            except MalformedError as error:
                self.damage.append(f"{self.path}: the record at byte {record.offset} makes no sense: {error}")

    def _add(self, records: Sequence[Record]) -> None:
        """All or none; records of one kind. Raises MalformedError."""
        if not records:
            return
        commit, counts = decode_commits(records, len(self.ends)), np.array([record.header.pages for record in records])
        n, firsts = len(commit.serials), np.cumsum(counts) - counts
        if n and (commit.serials[0] <= self.last_serial or commit.rows.max() > MAX_ROWS):
            raise MalformedError("its pages are impossible")
        starts, ends = self._place(commit, counts, placed=records[0].header.kind == PLACED)
        self.ends, self.records = ends, self.records + len(records)
        self.removed += [commit.removed] if len(commit.removed) else []
        if n:
            self.count, self.last_serial = self.count + n, int(commit.serials[-1])
            offsets = np.repeat(np.array([record.offset for record in records]), counts)
            within = (np.arange(n) - np.repeat(firsts, counts)).astype(np.int32)
            warned = np.isin(commit.metadatum, list(warnings_of(commit)))
            self._chunks.append(
                Columns(
                    serials=commit.serials,
                    rows=commit.rows,
                    scales=commit.scales,
                    starts=starts,
                    crcs=commit.crcs,
                    warned=warned,
                    records=offsets,
                    places=within,
                )
            )
            self._lasts.append(self.last_serial)
        if len(self._chunks) > MOST_PARTS:
            self._join()
        if len(self.removed) > MOST_PARTS:
            self.removed = [np.concatenate(self.removed)]

    def _join(self) -> Columns:
        """All pages together: those of many small records take less memory so."""
        self._chunks, self._lasts = [Columns.join(self._chunks)], [self.last_serial]
        return self._chunks[0]

    def _place(self, commit: Commit, counts: Numbers, placed: bool) -> tuple[Numbers, dict[str, int]]:
        """Where the pages are in each tier, int64 [T, n], and where the tiers end then. Raises MalformedError."""
        starts, ends = list[Numbers](), dict[str, int]()
        for i, (tier, end) in enumerate(self.ends.items()):
            bases, sizes = commit.bases[:, i], page_sizes(tier, commit.rows, self.dim)
            if bases.max() >= MAX_NUMBER or sizes.sum(dtype=np.float64) > MAX_NUMBER:
                raise MalformedError("its pages are impossible")
            if placed:
                found, ends[tier] = _check_placed(end, bases, sizes, counts, commit.starts[i])
            else:
                found, ends[tier] = _follow(end, bases, sizes, counts)
            starts.append(found)
        return np.stack(starts), ends

    def _check_sizes(self) -> None:
        for tier, end in self.ends.items():
            size = os.fstat(self._data[tier]).st_size
            if size < end:
                path = self._path(tier)
                self.damage.append(f"{path} has {size} bytes, its log says {end}: the end is lost")

    def snapshot(self) -> tuple[Columns, dict[str, TierMap], dict[str, NDArray[np.bool_]]]:
        """The pages as they are now, for each tier its file, and which pages' CRCs in it were compared.

        Raises CembedError: no memory.
        """
        columns = self._join()
        n = len(columns.serials)
        maps = {tier: self._map(tier) for tier in self.ends}
        self._checked = {
            tier: old if len(old) == n else np.concatenate([old, np.zeros(n - len(old), np.bool_)])
            for tier, old in self._checked.items()
        }
        return columns, maps, self._checked

    def _find(self, serial: int) -> tuple[Columns, int] | None:
        """The columns that have the page with this serial, and its number in them; removed pages are there too."""
        chunk = self._chunks[min(bisect.bisect_left(self._lasts, serial), len(self._chunks) - 1)]
        page = chunk.find(serial)
        return None if page is None else (chunk, page)

    def starts(self, serial: int) -> tuple[int, ...] | None:
        """Where a page is in each tier, None if it is not in this segment; by serial, as the next two."""
        found = self._find(serial)
        return None if found is None else tuple(found[0].starts[:, found[1]].tolist())

    def record(self, serial: int) -> tuple[Commit, int] | None:
        """The record of a page, and its place in it. Raises as commit()."""
        found = self._find(serial)
        return None if found is None else (self.commit(int(found[0].records[found[1]])), int(found[0].places[found[1]]))

    def stored(self, serial: int) -> StoredVectors | None:
        """The vectors of a page. Raises CembedError: they are damaged."""
        if (found := self._find(serial)) is None:
            return None
        vectors = found[0].vectors(found[1], self.dim, {tier: self._map(tier).data for tier in self.ends})
        for tier, start in zip(self.ends, found[0].starts[:, found[1]].tolist(), strict=True):
            if zlib.crc32(vectors.stored[tier].data) != vectors.crcs[tier]:
                raise CembedError(f"{self._path(tier)} is damaged from byte {start} on: {REPAIR}")
        return vectors

    def _map(self, tier: str) -> TierMap:
        size = min(self.ends[tier], os.fstat(self._data[tier]).st_size)
        if len(self._maps[tier].data) == size:
            return self._maps[tier]
        try:
            memory = mmap.mmap(self._data[tier], size, access=mmap.ACCESS_READ)
            self._maps[tier] = TierMap(np.frombuffer(memory, np.uint8), memory)
            return self._maps[tier]
        except (OSError, ValueError) as error:
            path = self._path(tier)
            raise CembedError(f"cannot map {path} into memory: {error}") from error

    def commit(self, offset: int) -> Commit:
        """The commit in the record at `offset`, which was good before. Raises CembedError: it is not any more."""
        cached = self._last_commit
        if cached is not None and cached[0] == offset:
            return cached[1]
        commit = self.commits([offset])
        self._last_commit = offset, commit
        return commit

    def commits(self, offsets: Sequence[int]) -> Commit:
        """Those in the records at `offsets` as one. Raises as commit()."""
        size, records = os.fstat(self._log).st_size, list[Record]()
        for offset in offsets:
            record = read_record(self._log, self.seed, offset, size)
            if record is None:
                raise CembedError(f"{self.path} is damaged at byte {offset}: {REPAIR}")
            records.append(record)
        with self.malformed():
            return decode_commits(records, len(self.ends))

    @contextlib.contextmanager
    def malformed(self) -> Iterator[None]:
        """Names the log where a MalformedError leaves the block."""
        try:
            yield
        except MalformedError as error:
            raise CembedError(f"{self.path} is damaged: {error}; {REPAIR}") from error

    def require_whole(self, last: bool) -> None:
        """Raises CembedError: there is damage, or the end of a segment that is not the last is missing."""
        if self.damage:
            raise CembedError(f"{self.damage[0]}; {REPAIR}")
        if not last and not self.closed:
            raise CembedError(f"{self.path} lacks its end: {REPAIR}")


def _follow(end: int, bases: Numbers, sizes: Numbers, counts: Numbers) -> tuple[Numbers, int]:
    """Starts of the pages of COMMITs, `counts` of them in each, and the end; the tier ended at `end` before."""
    firsts, places = np.cumsum(counts) - counts, place_pages(0, sizes)
    shifts = bases - places[firsts]
    tails = places[firsts + counts] + shifts
    if (bases < [end, *tails[:-1]]).any():
        raise MalformedError("its pages lie on others")
    return places[:-1] + np.repeat(shifts, counts), int(tails[-1])


def _check_placed(end: int, bases: Numbers, sizes: Numbers, counts: Numbers, starts: Numbers) -> tuple[Numbers, int]:
    """The same of PLACED records, which say both."""
    if (bases < [end, *bases[:-1]]).any() or (starts + sizes > np.repeat(bases, counts)).any():
        raise MalformedError("its pages lie where there are none")
    return starts, int(bases[-1])

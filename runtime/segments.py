"""A segment of an index as its log tells it: what was committed, and whether the log and the files are whole."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.errors import CembedError
from cembed.runtime.index_files import Current, open_regular, segment_path
from cembed.runtime.records import (
    CLOSE,
    MAX_NUMBER,
    Commit,
    Gap,
    MalformedError,
    Record,
    decode_commits,
    read_log,
    read_record,
    seed_of,
)
from cembed.runtime.views import REPAIR, Columns, TierMap, View, page_sizes, place_pages

MAX_ROWS = 1 << 20
_RETRY_SECONDS = 0.05


class Segment:
    """Reads one segment, and what is appended to it later. Nothing is written here.

    `log_end`, `sequence` and `ends` are where the next record and the next page of each tier go; `clean_end` is behind
    the last CLOSE; `torn` counts the bytes behind `log_end` that are no record; `damage` has a line for each place that
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
        self._chunks = [Columns.empty(len(current.tiers))]
        self._maps = {tier: TierMap(np.empty(0, np.uint8)) for tier in current.tiers}
        self._checked = {tier: np.zeros(0, np.bool_) for tier in current.tiers}
        self._last_commit: tuple[int, Commit] | None = None
        self.grow()

    def _open(self, suffix: str) -> int:
        path = segment_path(self.folder, self.number, suffix)
        try:
            handle = open_regular(path)
        except OSError as error:
            raise CembedError(f"{path} is missing or no plain file ({error.strerror}): take it from a copy") from error
        weakref.finalize(self, os.close, handle)
        return handle

    @property
    def path(self) -> Path:
        """Of the log."""
        return segment_path(self.folder, self.number, "log")

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
        try:
            items = self._read()
        except MalformedError as error:
            self.damage.append(f"{self.path} is damaged: {error}")
            return
        self.torn, commits = 0, list[Record]()
        for item in items:
            if isinstance(item, Record):
                commits += self._passed(item)
                continue
            self._add_all(commits)
            commits = []
            if item.tail:
                self.torn = item.end - item.offset
            else:
                self.damage.append(
                    f"{self.path} is damaged between bytes {item.offset} and {item.end}: pages it "
                    "added there are lost, and pages it removed there are back"
                )
        self._add_all(commits)
        self._check_sizes()

    def _read(self) -> Sequence[Record | Gap]:
        """A gap is looked at twice: a writer may just be replacing a torn record."""
        items = list(read_log(self._log, self.seed, self.log_end, self.sequence))
        if any(isinstance(item, Gap) and not item.tail for item in items):
            time.sleep(_RETRY_SECONDS)
            items = list(read_log(self._log, self.seed, self.log_end, self.sequence))
        return items

    def _passed(self, record: Record) -> list[Record]:
        """The record, if it is a commit."""
        self.log_end, self.sequence = record.end, record.header.sequence + 1
        if record.header.kind == CLOSE:
            self.clean_end = record.end
            return []
        return [record]

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
            except MalformedError as error:  # noqa: PERF203 only where there is damage
                self.damage.append(f"{self.path}: the record at byte {record.offset} makes no sense: {error}")

    def _add(self, records: Sequence[Record]) -> None:
        """All or none. Raises MalformedError."""
        if not records:
            return
        commit, counts = decode_commits(records, len(self.ends)), np.array([record.header.pages for record in records])
        n, firsts = len(commit.serials), np.cumsum(counts) - counts
        if n and (commit.serials[0] <= self.last_serial or commit.rows.max() > MAX_ROWS):
            raise MalformedError("its pages are impossible")
        starts, ends = list[NDArray[np.int64]](), dict[str, int]()
        for bases, (tier, end) in zip(commit.bases.T, self.ends.items(), strict=True):
            sizes = page_sizes(tier, commit.rows, self.dim)
            if bases.max() >= MAX_NUMBER or sizes.sum(dtype=np.float64) > MAX_NUMBER:
                raise MalformedError("its pages are impossible")
            places = place_pages(0, sizes)
            shifts = bases - places[firsts]
            tails = places[firsts + counts] + shifts
            if (bases < [end, *tails[:-1]]).any():
                raise MalformedError("its pages lie on others")
            starts.append(places[:-1] + np.repeat(shifts, counts))
            ends[tier] = int(tails[-1])
        self.ends, self.records = ends, self.records + len(records)
        self.removed += [commit.removed] if len(commit.removed) else []
        if n:
            self.count, self.last_serial = self.count + n, int(commit.serials[-1])
            offsets = np.repeat(np.array([record.offset for record in records]), counts)
            within = (np.arange(n) - np.repeat(firsts, counts)).astype(np.int32)
            self._chunks.append(
                Columns(commit.serials, commit.rows, commit.scales, np.stack(starts), commit.crcs, offsets, within)
            )

    def _check_sizes(self) -> None:
        for tier, end in self.ends.items():
            size = os.fstat(self._data[tier]).st_size
            if size < end:
                path = segment_path(self.folder, self.number, tier)
                self.damage.append(f"{path} has {size} bytes, its log says {end}: the end is lost")

    def view(self, removed: NDArray[np.int64]) -> View:
        """The pages as they are now, but those with a serial in `removed`. Raises CembedError: no memory."""
        columns = Columns.join(self._chunks)
        self._chunks = [columns]
        n = len(columns.serials)
        self._maps = {tier: self._map(tier) for tier in self.ends}
        self._checked = {
            tier: old if len(old) == n else np.concatenate([old, np.zeros(n - len(old), np.bool_)])
            for tier, old in self._checked.items()
        }
        alive = ~np.isin(columns.serials, removed) if len(removed) else np.ones(n, np.bool_)
        return View(self, columns, self._maps, self._checked, alive)

    def _map(self, tier: str) -> TierMap:
        size = min(self.ends[tier], os.fstat(self._data[tier]).st_size)
        if len(self._maps[tier].data) == size:
            return self._maps[tier]
        try:
            memory = mmap.mmap(self._data[tier], size, access=mmap.ACCESS_READ)
            return TierMap(np.frombuffer(memory, np.uint8), memory)
        except (OSError, ValueError) as error:
            path = segment_path(self.folder, self.number, tier)
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

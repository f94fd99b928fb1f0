"""Appending to a segment: vectors first, and when they are on disk, the record that makes them count.

A page is acknowledged when `append` returns. What a crash leaves after the ends of the log and of the tiers counts for
nobody, and is cut off by the next writer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.disk import Disk
from cembed.runtime.errors import CembedError
from cembed.runtime.index.columns import StoredVectors
from cembed.runtime.index.files import Current, segment_path
from cembed.runtime.index.records import (
    ALIGNMENT,
    CLOSE,
    CONTENT_BYTES,
    Commit,
    aligned,
    encode_commit,
    encode_record,
)
from cembed.runtime.index.segments import Segment
from cembed.runtime.index.texts import Texts

_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class StoredPage:
    """A page as it is appended; `metadata` is JSON.

    `of` is the serial of the page whose bytes count for it too, in the same segment or before it in the same append;
    its own, where those in `vectors` are to be written.
    """

    serial: int
    id: str
    source: str
    number: int
    metadata: str
    content: bytes
    vectors: StoredVectors
    of: int


class SegmentWriter:
    """The one that may append to `segment`. Raises CembedError: its files cannot be opened for writing."""

    def __init__(self, disk: Disk, segment: Segment) -> None:
        self.segment, self._disk = segment, disk
        self._handles: dict[str, int] = {}
        self._broken = False
        try:
            with self._failing("open"):
                for name in ("log", *segment.ends):
                    self._handles[name] = disk.open(segment_path(segment.folder, segment.number, name))
        except CembedError:
            self.release()
            raise

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CembedError(f"cannot {what} {self.segment.path}: {error.strerror or error}") from error

    def recover(self) -> list[str]:
        """Cuts off what a killed writer left, makes the rest durable, and says what was done.

        Records that it left may have been seen and yet not be on disk, even after an fsync that failed: they are
        written again, the same bytes in the same place, before anything is built on them.
        """
        segment, notes = self.segment, []
        with self._failing("recover"):
            for name, end in {"log": segment.log_end, **segment.ends}.items():
                path = segment_path(segment.folder, segment.number, name)
                if (extra := segment.sizes()[name] - end) > 0:
                    notes.append(f"{path}: cut off {extra} bytes of an add that was not finished")
                    self._disk.truncate(self._handles[name], end)
            self._rewrite()
        segment.grow()
        return notes

    def _rewrite(self) -> None:
        segment, log = self.segment, self._handles["log"]
        for tier in segment.ends:
            self._disk.sync(self._handles[tier])
        start = max(0, segment.clean_end - ALIGNMENT)  # the last CLOSE too
        for place in range(start, segment.log_end, _CHUNK):
            self._disk.write(log, os.pread(log, min(_CHUNK, segment.log_end - place), place), place)
        self._disk.sync(log)

    def append(self, pages: Sequence[StoredPage], removed: Sequence[int] = ()) -> None:
        """Adds pages and removes others, both or neither; returns when they are on disk.

        Raises CembedError: the disk is full or fails. The index is as it was then, or the message says otherwise.
        """
        segment, new = self.segment, [page for page in pages if page.of == page.serial]
        if self._broken:
            raise CembedError(f"an earlier write to {segment.folder} failed: open the index again")
        record = encode_commit(segment.seed, segment.sequence, commit_of(pages, removed, segment))
        self._broken = True  # until it went well, or was taken back
        try:
            for tier, end in segment.ends.items():
                self._disk.write(self._handles[tier], join_pages(tier, new), end)
            for tier in segment.ends:
                self._disk.sync(self._handles[tier])
            self._disk.write(self._handles["log"], record, segment.log_end)
        except OSError as error:
            self._take_back()
            raise CembedError(
                f"cannot write to {segment.folder}: {error.strerror or error}; the index is as it was"
            ) from error
        self._sync_log()
        segment.grow()
        self._broken = False

    def _take_back(self) -> None:
        """Frees the space of what was written; when that fails too, the next writer does it."""
        with contextlib.suppress(OSError):
            for name, end in {"log": self.segment.log_end, **self.segment.ends}.items():
                self._disk.truncate(self._handles[name], end)
            self._broken = False

    def _sync_log(self) -> None:
        try:
            self._disk.sync(self._handles["log"])
        except OSError as error:
            raise CembedError(
                f"{self.segment.path} may not be on disk ({error.strerror or error}): check the disk, open the index "
                "again, and repeat what was being done"
            ) from error

    def close(self) -> None:
        """Marks the log as whole, and lets go of the files. Raises CembedError: the mark cannot be written."""
        segment = self.segment
        try:
            if not self._broken and not segment.closed:
                with self._failing("write"):
                    record = encode_record(segment.seed, segment.sequence, CLOSE)
                    self._disk.write(self._handles["log"], record, segment.log_end)
                    self._disk.sync(self._handles["log"])
                segment.grow()
        finally:
            self.release()

    def release(self) -> None:
        """Lets go of the files as they are."""
        while self._handles:
            self._disk.close(self._handles.popitem()[1])


def commit_of(pages: Sequence[StoredPage], removed: Sequence[int], segment: Segment) -> Commit:
    """The commit that adds `pages` to a segment; texts that come again are kept once."""
    sources, source = _numbered(page.source for page in pages)
    metadata, metadatum = _numbered(page.metadata for page in pages)
    contents = b"".join(page.content.ljust(CONTENT_BYTES, b"\0") for page in pages)
    bases, starts = _lay_out(pages, segment)
    return Commit(
        bases=np.array([bases], np.int64),
        serials=np.array([page.serial for page in pages], np.int64),
        removed=np.sort(np.array(removed, np.int64)),
        rows=np.array([page.vectors.rows for page in pages], np.int32),
        numbers=np.array([page.number for page in pages], np.int32),
        source=source,
        metadatum=metadatum,
        scales=np.array([page.vectors.scale for page in pages], np.float32),
        crcs=_crcs(pages, list(segment.ends)),
        contents=np.frombuffer(contents, np.uint8).reshape(len(pages), CONTENT_BYTES),
        starts=starts,
        ids=Texts.of(page.id for page in pages),
        sources=sources,
        metadata=metadata,
    )


def _numbered(texts: Iterable[str]) -> tuple[Texts, NDArray[np.int32]]:
    """Each text once, and which of them was each one."""
    places = dict[str, int]()
    which = [places.setdefault(text, len(places)) for text in texts]
    return Texts.of(places), np.array(which, np.int32)


def _crcs(pages: Sequence[StoredPage], tiers: Sequence[str]) -> NDArray[np.uint32]:
    """[T, n]."""
    crcs = [[page.vectors.crcs[tier] for page in pages] for tier in tiers]
    return np.array(crcs, np.uint32).reshape(len(tiers), len(pages))


def _lay_out(pages: Sequence[StoredPage], segment: Segment) -> tuple[list[int], NDArray[np.int64]]:
    """Bases and starts of the commit. Pages that share no bytes follow each other, and need no starts."""
    ends, placed = list(segment.ends.values()), dict[int, Sequence[int]]()
    for page in pages:
        if page.of == page.serial:
            placed[page.serial] = ends
            ends = [end + aligned(len(page.vectors.stored[tier])) for end, tier in zip(ends, segment.ends, strict=True)]
        else:
            found = placed.get(page.of) or segment.starts(page.of)
            assert found is not None, f"{page.of = }"
            placed[page.serial] = found
    if all(page.of == page.serial for page in pages):
        return list(segment.ends.values()), np.empty((len(ends), 0), np.int64)
    return ends, np.array(list(placed.values()), np.int64).T


def join_pages(tier: str, pages: Sequence[StoredPage]) -> bytes:
    """The pages' bytes in a tier, each filled up to a multiple of 64."""
    parts: list[bytes | memoryview] = []
    for page in pages:
        data = page.vectors.stored[tier]
        parts.append(data.data)
        if len(data) % ALIGNMENT:
            parts.append(bytes(aligned(len(data)) - len(data)))
    return b"".join(parts)


def add_segment(disk: Disk, folder: Path, current: Current) -> Current:
    """Makes the empty files of the next segment, durably, and names it in what is returned. Raises OSError."""
    number = current.next_segment
    for suffix in ("log", *current.tiers):
        disk.close(disk.create(segment_path(folder, number, suffix)))
    disk.sync_folder(folder)
    return replace(current, segments=(*current.segments, number), next_segment=number + 1)

"""An index: vectors of many pages on disk, added one by one or by the million, searched without reading them all.

    with Index.create("pages.index", dim=128, bundle=embedder.bundle.hash) as index:
        index.add([NewPage("a.pdf#1", vectors, "a.pdf", 1, {"year": 2024})], bundle=embedder.bundle.hash)
        found = index.search(embedder.embed_queries(["warranty period"])[0], top=5)

One process writes; others read, see what was there when they opened the index, and more after `refresh`. What `add`,
`remove` and `compact` have done is on disk when they return. Needs a POSIX system.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

from cembed.runtime.disk import Disk
from cembed.runtime.errors import CembedError
from cembed.runtime.index.columns import StoredVectors
from cembed.runtime.index.compaction import Compacted, compact_segments
from cembed.runtime.index.files import (
    CURRENT,
    PLACED_VERSION,
    Current,
    make_folder,
    read_current,
    remove_orphans,
    take_lock,
    write_current,
    writing_to,
)
from cembed.runtime.index.new_pages import Batch, Gathering, NewPage
from cembed.runtime.index.reader import IndexReader
from cembed.runtime.index.segments import Segment
from cembed.runtime.index.writer import SegmentWriter, StoredPage, add_segment
from cembed.runtime.scoring.storage import by_exactness, storage_of

DEFAULT_STORAGE = ("f16", "u8", "bits")
SEGMENT_BYTES = 2 << 30


@dataclass(frozen=True)
class Added:
    """What `Index.add` did: `replaced` of the `added` pages took the id of another, `skipped` ones were there, and so
    were `changed` ones, of which other things are told now."""

    added: int
    replaced: int
    skipped: int
    changed: int = 0


class Index(IndexReader):
    """An opened index; made by `create` or `open`. `notes` says what a killed writer had left behind.

    Methods may be called from several threads; those that write do so one after the other.
    """

    def __init__(self, folder: Path, lock: int | None, disk: Disk, damaged: bool) -> None:
        """For `create` and `open`, which hold the lock that a writer needs."""
        self._lock_handle, self._disk = lock, disk
        self._writer: SegmentWriter | None = None
        super().__init__(folder, damaged)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        dim: int,
        bundle: str,
        storage: Sequence[str] = DEFAULT_STORAGE,
        store: Sequence[str] | None = None,
        disk: Disk | None = None,
    ) -> Index:
        """A new, empty index, open for writing.

        `dim` is the length of its vectors, `bundle` the hash of the bundle that makes them (any text, if nothing is to
        be compared). `storage` names the types to keep beside each other: the most exact one gives the scores,
        `u8` and `bits` are what large indexes are searched with first. `store` is what
        `storage` was called, `disk` is for tests.
        Raises CembedError: something else is there, an unknown storage type, no room.
        """
        folder, disk = Path(path), disk or Disk()
        storage = storage if store is None else store
        for name in storage or ("",):
            storage_of(name)
        current = Current(secrets.token_hex(8), dim, by_exactness(storage), bundle, (), 1, 0)
        if os.path.lexists(folder / CURRENT):
            raise CembedError(f"{folder} is an index already: open it, or choose another place")
        with writing_to(folder):
            make_folder(disk, folder)
            lock = take_lock(folder)
            try:
                remove_orphans(disk, folder, None)
                write_current(disk, folder, add_segment(disk, folder, current))
                return cls(folder, lock, disk, damaged=False)._start_writing()
            except BaseException:
                os.close(lock)
                raise

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False, damaged: bool = False, disk: Disk | None = None) -> Index:
        """An index that is there.

        `write` takes the lock, waits for nobody, and cleans up after a writer that was killed. `damaged` opens one with
        damage too: such an index gives what is whole, and can be mended with `compact(drop_damaged=True)`.
        Raises CembedError: no index, damage and where it is, another process is writing.
        """
        folder, disk = Path(path), disk or Disk()
        if not write:
            return cls(folder, None, disk, damaged)
        read_current(folder)  # before a lock is put where there is no index
        lock = take_lock(folder)
        try:
            return cls(folder, lock, disk, damaged)._start_writing()
        except BaseException:
            os.close(lock)
            raise

    def _start_writing(self) -> Index:
        with writing_to(self.folder):
            for folder in (self.folder, self.folder.absolute().parent):
                self._disk.sync_folder(folder)  # the CURRENT that was read may have been put there by a killed writer
            remove_orphans(self._disk, self.folder, self._current)
        self._writer = SegmentWriter(self._disk, self._segments[-1])
        self.notes += self._writer.recover()
        return self

    def __reduce__(self) -> tuple[Callable[..., Index], tuple[str]]:
        """Pickles as its path; what is open there sees what is in it by then."""
        if self._writer is not None:
            raise CembedError("an Index that is open for writing cannot be pickled: open it where it is searched")
        return partial(Index.open, damaged=self._damaged), (os.path.abspath(self.folder),)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends writing: marks the log as whole and gives the lock back. An index that only reads needs none of it."""
        with self._lock:
            writer, self._writer = self._writer, None
            handle, self._lock_handle = self._lock_handle, None
            try:
                if writer is not None:
                    writer.close()
            finally:
                if handle is not None:
                    os.close(handle)

    def add(self, pages: Iterable[NewPage], *, bundle: str) -> Added:
        """Adds pages; all of them are on disk when this returns.

        A page whose id is there replaces the other one; if it has the same `content` and all that is told of it is
        the same, it is skipped. Where a page with the same `content` is there under whatever id, its vectors count for
        the new one too: they are stored once, or once in each segment.
        `pages` may be a generator; about 2,000 are held. They become durable in batches of that size, each whole or not
        at all, and those before an error stay: add the same again, and go on.
        Raises CembedError: vectors of another bundle, a page that cannot be kept, a disk that is full or fails.
        """
        self.check_bundle(bundle)
        with self._changing(), ThreadPoolExecutor(1) as encoder, ThreadPoolExecutor(1) as writer:
            gathering = Gathering(self._known_pages(), self._next_serial(), self.dim, self.tiers)
            written: Future[None] | None = None
            for batch in gathering.batches(pages):
                encoded = encoder.submit(batch.encode, self.tiers)
                if written is not None:
                    written.result()
                written = writer.submit(self._append_encoded, encoded)
            if written is not None:
                written.result()
        return Added(gathering.added, gathering.replaced, gathering.skipped, gathering.changed)

    def _append_encoded(self, encoded: Future[tuple[Batch, dict[int, StoredVectors]]]) -> None:
        """Appends a batch. Vectors that are in its segment are named, those in another one are written again."""
        batch, new = encoded.result()
        self._make_room()
        here = {serial: (vectors, serial) for serial, vectors in new.items()}
        for draft in batch.drafts:
            if draft.of not in here:
                vectors, near = self._stored_vectors(draft.of)
                here[draft.of] = vectors, draft.of if near else draft.serial
            here[draft.serial] = here[draft.of]
        pages = [draft.stored(*here[draft.serial]) for draft in batch.drafts]
        if any(page.of != page.serial for page in pages):
            self._allow_placed()
        self._append(pages, batch.removed)

    def _stored_vectors(self, serial: int) -> tuple[StoredVectors, bool]:
        """A page's vectors, and whether they are in the segment that is written. Raises CembedError: damaged."""
        for segment in reversed(self._segments):
            if (vectors := segment.stored(serial)) is not None:
                return vectors, segment is self._segments[-1]
        raise AssertionError(f"{serial = }")

    def remove(self, ids: Iterable[str]) -> int:
        """Takes pages out, all or none; their bytes stay until `compact`. Gives their number.

        Raises CembedError: an id that is not there, a disk that is full or fails.
        """
        with self._changing():
            known = self._known_pages()
            serials = {page: known.serial(page) for page in ids}
            if missing := [page for page, serial in serials.items() if serial is None]:
                raise CembedError(f"{self.folder} has no page {missing[0]!r} ({len(missing)} of the ids are not there)")
            if serials:
                self._append([], [serial for serial in serials.values() if serial is not None])
            for page in serials:
                known.drop(page)
            return len(serials)

    def compact(self, *, drop_damaged: bool = False) -> Compacted:
        """Writes segments with removed pages or many small records anew, and drops the old ones.

        Needs room for the new beside the old. Readers go on with what they have opened. `drop_damaged` also leaves out
        pages of which something is damaged, in an index that was opened with `damaged=True`, and names them.
        Raises CembedError: damage, a disk that is full or fails; then open the index again, it is as before.
        """
        with self._changing():
            before = self.stats()
            current, dropped = self._compacted(drop_damaged)
            if current.segments != self._current.segments:
                with writing_to(self.folder):
                    write_current(self._disk, self.folder, current)
                    remove_orphans(self._disk, self.folder, current)
            self._damaged = self._damaged and not drop_damaged
            self._load()
            self._writer = SegmentWriter(self._disk, self._segments[-1])
            after = self.stats()
            return Compacted(after.pages, dropped, sum(before.bytes.values()), sum(after.bytes.values()))

    def _compacted(self, drop_damaged: bool) -> tuple[Current, tuple[str, ...]]:
        """The index as it shall be; until it went well, this object cannot write."""
        assert self._writer is not None
        writer, self._writer = self._writer, None
        writer.close()
        current = replace(self._current, next_serial=self._next_serial())
        try:
            with writing_to(self.folder):
                return compact_segments(self._disk, self.folder, current, self._snapshot(), SEGMENT_BYTES, drop_damaged)
        except BaseException:
            with contextlib.suppress(OSError):
                remove_orphans(self._disk, self.folder, self._current)
            raise

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """One change at a time; what is in memory is read anew after one that failed."""
        with self._lock:
            if self._writer is None:
                raise CembedError(f"{self.folder} is not open for writing: open it with write=True")
            try:
                yield
            except BaseException:
                self._known = None
                raise
            finally:
                self._views = None

    def _next_serial(self) -> int:
        return max(self._current.next_serial, *(segment.last_serial + 1 for segment in self._segments))

    def _append(self, pages: Sequence[StoredPage], removed: Sequence[int]) -> None:
        self._segments[-1].require_whole(last=True)
        assert self._writer is not None
        self._writer.append(pages, removed)

    def _make_room(self) -> None:
        """Starts another segment where the last one is full."""
        self._segments[-1].require_whole(last=True)
        if self._segments[-1].size < SEGMENT_BYTES:
            return
        assert self._writer is not None
        writer, self._writer = self._writer, None  # if this fails, the index must be opened again
        writer.close()
        with writing_to(self.folder):
            current = add_segment(self._disk, self.folder, self._current)
            write_current(self._disk, self.folder, current)
        self._segments.append(Segment(self.folder, current, current.segments[-1]))
        self._current = current
        self._writer = SegmentWriter(self._disk, self._segments[-1])

    def _allow_placed(self) -> None:
        """Makes the index one of the version that has PLACED records, before it gets its first."""
        if self._current.version >= PLACED_VERSION:
            return
        assert self._writer is not None
        writer, self._writer = self._writer, None  # as above
        try:
            with writing_to(self.folder):
                current = replace(self._current, version=PLACED_VERSION)
                write_current(self._disk, self.folder, current)
        except BaseException:
            writer.release()
            raise
        self._current, self._writer = current, writer

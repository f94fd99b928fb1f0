"""Disks that fail, kill, and record."""

from __future__ import annotations

import errno
import os
import random
import signal
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from cembed.runtime.disk import Disk

SECTOR = 512


class FaultyDisk(Disk):
    """Does not wait for the disk, and fails once: at operation `at`, with an errno, or by SIGKILL if `error` is None.

    A write that fails has done its first half.
    """

    def __init__(self, at: int, error: int | None = None) -> None:
        self.at, self.error, self.count = at, error, 0

    def _step(self) -> bool:
        self.count += 1
        return self.count == self.at

    def _fail(self) -> None:
        if self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.error or 0, os.strerror(self.error or 0))

    def make_folder(self, path: Path) -> None:
        if self._step():
            self._fail()
        super().make_folder(path)

    def create(self, path: Path) -> int:
        if self._step():
            self._fail()
        return super().create(path)

    def write(self, handle: int, data: bytes | memoryview, offset: int) -> None:
        if self._step():
            super().write(handle, memoryview(data)[: len(data) // 2], offset)
            self._fail()
        super().write(handle, data, offset)

    def sync(self, handle: int) -> None:
        if self._step():
            self._fail()

    def truncate(self, handle: int, size: int) -> None:
        if self._step():
            self._fail()
        super().truncate(handle, size)

    def rename(self, source: Path, target: Path) -> None:
        if self._step():
            self._fail()
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        if self._step():
            self._fail()
        super().remove(path)

    def sync_folder(self, path: Path) -> None:
        if self._step():
            self._fail()


ERRORS = (errno.EIO, errno.ENOSPC)


@dataclass
class File:
    """What is on disk for sure, and what was written since: at an offset, or None and the size to cut to."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int | None, bytes | int]] = field(default_factory=list)

    def settle(self) -> None:
        for change in self.pending:
            change_bytes(self.durable, *change)
        self.pending.clear()


def change_bytes(content: bytearray, offset: int | None, change: bytes | int) -> None:
    if isinstance(change, int):
        content[change:] = bytes(max(0, change - len(content)))
        return
    assert offset is not None
    content.extend(bytes(max(0, offset + len(change) - len(content))))
    content[offset : offset + len(change)] = change


class RecordingDisk(Disk):
    """Does everything but waiting, and knows what of it a power cut may take away.

    Files are told apart from their names: a synced file whose name is not synced is lost. Names change in the order
    given, or, in the hardest case, each on its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.names: dict[str, File] = {}
        self.durable_names: dict[str, File] = {}
        self.pending_names: list[tuple[str, File | None, str | None]] = []
        self._open: dict[int, File] = {}
        if folder.exists():
            for path in folder.iterdir():
                self.names[path.name] = File(bytearray(path.read_bytes()))
            self.durable_names = dict(self.names)
        self.watch = lambda: None

    def _done(self) -> None:
        self.count += 1
        self.watch()

    def _name(self, name: str, file: File | None, gone: str | None = None) -> None:
        self.pending_names.append((name, file, gone))
        change_names(self.names, name, file, gone)

    def create(self, path: Path) -> int:
        handle = super().create(path)
        self._open[handle] = File()
        self._name(path.name, self._open[handle])
        self._done()
        return handle

    def open(self, path: Path) -> int:
        handle = super().open(path)
        self._open[handle] = self.names[path.name]
        return handle

    def write(self, handle: int, data: bytes | memoryview, offset: int) -> None:
        super().write(handle, data, offset)
        self._open[handle].pending.append((offset, bytes(data)))
        self._done()

    def sync(self, handle: int) -> None:
        self._open[handle].settle()
        self._done()

    def truncate(self, handle: int, size: int) -> None:
        super().truncate(handle, size)
        self._open[handle].pending.append((None, size))
        self._done()

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._name(target.name, self.names[source.name], source.name)
        self._done()

    def remove(self, path: Path) -> None:
        super().remove(path)
        self._name(path.name, None)
        self._done()

    def sync_folder(self, path: Path) -> None:
        if path == self.folder:
            for change in self.pending_names:
                change_names(self.durable_names, *change)
            self.pending_names.clear()
        self._done()

    def cut_power(self, rng: random.Random, target: Path) -> None:
        """Writes one of the states that may be left into the empty folder `target`."""
        for name, file in self._kept_names(rng).items():
            (target / name).write_bytes(kept_bytes(file, rng))

    def _kept_names(self, rng: random.Random) -> dict[str, File]:
        names, style, pending = dict(self.durable_names), rng.random(), self.pending_names
        kept = pending[: rng.randint(0, len(pending))] if style < 0.5 else [p for p in pending if rng.random() < style]
        for change in kept:
            change_names(names, *change)
        return names


def change_names(names: dict[str, File], name: str, file: File | None, gone: str | None) -> None:
    if gone is not None:
        names.pop(gone, None)
    if file is None:
        names.pop(name, None)
    else:
        names[name] = file


def kept_bytes(file: File, rng: random.Random) -> bytes:
    """What is durable, and of the rest some sectors, in any order."""
    content, share = bytearray(file.durable), rng.choice((0.0, 0.5, 0.9, 1.0))
    pieces: list[tuple[int | None, bytes | int]] = []
    for offset, change in file.pending:
        if isinstance(change, int) or offset is None:
            pieces.append((offset, change))
            continue
        edges = [offset, *range(offset // SECTOR * SECTOR + SECTOR, offset + len(change), SECTOR), offset + len(change)]
        pieces += [(a, change[a - offset : b - offset]) for a, b in pairwise(edges)]
    for piece in pieces:
        if rng.random() < share:
            change_bytes(content, *piece)
    return bytes(content)

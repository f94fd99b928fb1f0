"""Disks that fail, kill, and record."""

from __future__ import annotations

import errno
import os
import random
import signal
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias, TypeVar

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

    def remove_folder(self, path: Path) -> None:
        if self._step():
            self._fail()
        super().remove_folder(path)

    def link(self, source: Path, target: Path) -> None:
        if self._step():
            self._fail()
        super().link(source, target)

    def make_link(self, text: str, path: Path) -> None:
        if self._step():
            self._fail()
        super().make_link(text, path)

    def sync_folder(self, path: Path) -> None:
        if self._step():
            self._fail()


ERRORS = (errno.EIO, errno.ENOSPC)
Node = TypeVar("Node")
Change: TypeAlias = "tuple[str, Node | None, str | None]"
"""What a name is from now on, None for nothing, and the name that goes."""


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
        for name, file in kept_names(self.durable_names, self.pending_names, rng).items():
            (target / name).write_bytes(kept_bytes(file, rng))


def kept_names(durable: dict[str, Node], pending: list[Change[Node]], rng: random.Random) -> dict[str, Node]:
    """What is durable, and of the changes since the first ones, or some."""
    names, style = dict(durable), rng.random()
    kept = pending[: rng.randint(0, len(pending))] if style < 0.5 else [p for p in pending if rng.random() < style]
    for change in kept:
        change_names(names, *change)
    return names


def change_names(names: dict[str, Node], name: str, file: Node | None, gone: str | None) -> None:
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


@dataclass
class Names:
    """A folder: what each name is now, what it is for sure, and what was done since. A text is a symbolic link."""

    now: dict[str, File | Names | str] = field(default_factory=dict)
    durable: dict[str, File | Names | str] = field(default_factory=dict)
    pending: list[tuple[str, File | Names | str | None, str | None]] = field(default_factory=list)

    def change(self, name: str, node: File | Names | str | None, gone: str | None = None) -> None:
        self.pending.append((name, node, gone))
        change_names(self.now, name, node, gone)

    def settle(self) -> None:
        for change in self.pending:
            change_names(self.durable, *change)
        self.pending.clear()

    def write(self, rng: random.Random, target: Path) -> None:
        """One of the states that may be left."""
        for name, node in kept_names(self.durable, self.pending, rng).items():
            if isinstance(node, Names):
                (target / name).mkdir()
                node.write(rng, target / name)
            elif isinstance(node, str):
                (target / name).symlink_to(node)
            else:
                (target / name).write_bytes(kept_bytes(node, rng))


class TreeDisk(RecordingDisk):
    """The same with folders and links in a folder, which is empty at first: each folder is synced by itself."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.root = Names()

    def _of(self, path: Path) -> Names:
        found = self.root
        for name in path.relative_to(self.folder).parts:
            inner = found.now[name]
            assert isinstance(inner, Names)
            found = inner
        return found

    def _changed(self, path: Path, node: File | Names | str | None, gone: str | None = None) -> None:
        if path != self.folder:
            self._of(path.parent).change(path.name, node, gone)
        self._done()

    def make_folder(self, path: Path) -> None:
        Disk.make_folder(self, path)
        self._changed(path, Names())

    def create(self, path: Path) -> int:
        handle = Disk.create(self, path)
        self._open[handle] = File()
        self._changed(path, self._open[handle])
        return handle

    def rename(self, source: Path, target: Path) -> None:
        Disk.rename(self, source, target)
        node = self._of(source.parent).now[source.name]
        if source.parent == target.parent:
            self._changed(target, node, source.name)
        else:
            self._of(source.parent).change(source.name, None)
            self._changed(target, node)

    def remove(self, path: Path) -> None:
        Disk.remove(self, path)
        self._changed(path, None)

    def remove_folder(self, path: Path) -> None:
        Disk.remove_folder(self, path)
        self._changed(path, None)

    def link(self, source: Path, target: Path) -> None:
        Disk.link(self, source, target)
        self._changed(target, self._of(source.parent).now[source.name])

    def make_link(self, text: str, path: Path) -> None:
        Disk.make_link(self, text, path)
        self._changed(path, text)

    def sync_folder(self, path: Path) -> None:
        if path.is_relative_to(self.folder):
            self._of(path).settle()
        self._done()

    def cut_power(self, rng: random.Random, target: Path) -> None:
        self.root.write(rng, target)

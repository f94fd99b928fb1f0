"""Every change to the files of an index, or of versions of a bundle, in one small class: tests replace it by one that
fails, kills or records."""

from __future__ import annotations

import os
from pathlib import Path

_EXISTING = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
_READING = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_fdatasync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class Disk:
    """What a writer needs. All raise OSError; what was done may be lost until `sync` or `sync_folder` returns."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def create(self, path: Path) -> int:
        """A handle of a new, empty file. Its name is durable after `sync_folder`."""
        return os.open(path, _EXISTING | os.O_CREAT | os.O_EXCL, 0o644)

    def open(self, path: Path) -> int:
        """A handle of an existing file; links are not followed."""
        return os.open(path, _EXISTING)

    def write(self, handle: int, data: bytes | memoryview, offset: int) -> None:
        """Writes all of `data` at `offset`."""
        rest = memoryview(data)
        while rest:
            written = os.pwrite(handle, rest, offset)
            rest, offset = rest[written:], offset + written

    def sync(self, handle: int) -> None:
        """Waits until a file's bytes and its size are on disk."""
        _fdatasync(handle)

    def truncate(self, handle: int, size: int) -> None:
        os.ftruncate(handle, size)

    def close(self, handle: int) -> None:
        os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """`target` is the old file or the new one, at every moment."""
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """An empty one."""
        path.rmdir()

    def link(self, source: Path, target: Path) -> None:
        """A second name of a file."""
        os.link(source, target)

    def make_link(self, text: str, path: Path) -> None:
        """A symbolic link to `text`."""
        os.symlink(text, path)

    def sync_folder(self, path: Path) -> None:
        """Waits until the names in a folder are on disk."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def open_to_read(path: Path) -> int:
    """A handle that cannot be written to; links are not followed, and a pipe does not block. Raises OSError."""
    return os.open(path, _READING)

"""Opening what others may have put there: plain files only, and no more bytes than such a file can have."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cembed.runtime.disk import open_to_read
from cembed.runtime.errors import CembedError

_CHUNK = 1 << 20


@contextlib.contextmanager
def open_plain(path: Path, limit: int) -> Iterator[tuple[BinaryIO, int]]:
    """The open file and its size in bytes. Raises CembedError: not there, a link, a folder, a pipe, a device, more than
    `limit` bytes."""
    try:
        handle = open_to_read(path)
    except OSError as error:
        reason = "it is a link" if path.is_symlink() else error.strerror
        raise CembedError(f"cannot read {path}: {reason}") from error
    try:
        size = _size(path, os.fstat(handle), limit)
        with os.fdopen(handle, "rb", closefd=False) as file:
            yield file, size
    finally:
        os.close(handle)


def _size(path: Path, status: os.stat_result, limit: int) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise CembedError(f"{path} is not a plain file")
    if status.st_size > limit:
        raise CembedError(f"{path} has {status.st_size} bytes, more than any such file: {limit}")
    return status.st_size


def read_plain(path: Path, limit: int) -> bytes:
    """All of a plain file of at most `limit` bytes. Raises CembedError as `open_plain`, or if it cannot be read."""
    with open_plain(path, limit) as (file, size):
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise CembedError(f"cannot read {path}: {error.strerror}") from error
    if len(content) != size:
        raise CembedError(f"{path} changed while it was read: try again")
    return content


def stamp_of(about: os.stat_result) -> tuple[int, ...]:
    """Differs where a file was changed, or is another one."""
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def hash_file(path: str) -> tuple[bytes, tuple[int, ...]]:
    """The sha256 of a regular file, and its stamp; others are not opened. Raises CembedError: it cannot be read."""
    try:
        _require_regular(os.stat(path))
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            about = os.fstat(handle)
            _require_regular(about)  # it may be another one since
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise CembedError(error.strerror or str(error)) from error
    return digest.digest(), stamp_of(about)


def _require_regular(about: os.stat_result) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise CembedError("is a folder" if stat.S_ISDIR(about.st_mode) else "is not a regular file")

"""Moving a file to another folder, which may be on another disk: it is there whole, or still where it was."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from cembed.runtime.disk import Disk
from cembed.runtime.errors import CembedError
from cembed.runtime.plain_files import hash_file

PARTIAL = ".cembed-part"


def free_path(wanted: str, digest: bytes, taken: Collection[str]) -> str:
    """A path like `wanted` that is not `taken`, and that no other file has; one with the same bytes gives up its."""
    stem, suffix = os.path.splitext(wanted)
    number, path = 1, wanted
    while path in taken or (os.path.lexists(path) and not _has(path, digest)):
        number += 1
        path = f"{stem} ({number}){suffix}"
    return path


def _has(path: str, digest: bytes) -> bool:
    try:
        return not os.path.islink(path) and hash_file(path)[0] == digest
    except CembedError:
        return False


def move_file(path: str, to: str) -> None:
    """Raises OSError."""
    os.makedirs(os.path.dirname(to), exist_ok=True)
    try:
        os.replace(path, to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(path, to)
        os.unlink(path)
    Disk().sync_folder(Path(to).parent)


def _copy(path: str, to: str) -> None:
    folder, name = os.path.split(to)
    partial = os.path.join(folder, f".{name}{PARTIAL}")
    try:
        shutil.copy2(path, partial, follow_symlinks=False)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, to)
    except BaseException:
        if os.path.lexists(partial):
            os.unlink(partial)
        raise

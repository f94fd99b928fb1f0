"""What is in the folders that are watched: plain files that may be documents, and nothing that leads out of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cembed.runtime.errors import CembedError
from cembed.runtime.pages.documents import SUFFIXES
from cembed.runtime.plain_files import stamp_of

Stamp = tuple[int, ...]
"""Device, inode, bytes, and time of the last change: another where a file was changed or is another one."""
PASSING = ("~", ".", "_tmp", "tmp~")
"""How names start that programs give to files they have not finished, or keep beside others."""


@dataclass(frozen=True)
class Listing:
    """A folder's documents by name; None in place of them where it could not be listed, and why."""

    path: str
    files: dict[str, Stamp] | None
    reason: str = ""


@dataclass(frozen=True)
class Folders:
    """Folders to watch, and places in them that are passed over, all absolute and without links.

    One that is in another is watched with that one.
    """

    roots: tuple[str, ...]
    excluded: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, folders: Sequence[Path], excluded: Sequence[Path] = ()) -> Folders:
        """Raises CembedError: no folder is named, or something that is no folder. One that is not there may come."""
        if not folders:
            raise CembedError("there is no folder to watch: name one")
        for folder in folders:
            if folder.exists() and not folder.is_dir():
                raise CembedError(f"{folder} is no folder: name the one that it is in")
        real = sorted(set(map(os.path.realpath, folders)), key=len)
        roots = [path for path in real if not any(_is_in(path, other) for other in real if other != path)]
        return cls(tuple(roots), frozenset(map(os.path.realpath, excluded)))

    def root_of(self, path: str) -> str | None:
        """The watched folder that a path is in."""
        return next((root for root in self.roots if _is_in(path, root)), None)

    def walk(self) -> Iterator[Listing]:
        """Every folder below the roots, and the roots."""
        for root in self.roots:
            yield from self._walk(root)

    def _walk(self, root: str) -> Iterator[Listing]:
        waiting = [root]
        while waiting:
            path = waiting.pop()
            try:
                with os.scandir(path) as entries:
                    files, folders = self._sort(entries)
            except OSError as error:
                yield Listing(path, None, error.strerror or str(error))
                continue
            yield Listing(path, files)
            waiting += sorted(folders, reverse=True)

    def _sort(self, entries: Iterator[os.DirEntry[str]]) -> tuple[dict[str, Stamp], list[str]]:
        files, folders = dict[str, Stamp](), list[str]()
        for entry in entries:
            if entry.name.startswith(PASSING) or entry.path in self.excluded:
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file(follow_symlinks=False) and is_document(entry.name):
                    files[entry.name] = stamp_of(entry.stat(follow_symlinks=False))
            except OSError:  # it vanished
                continue
        return files, folders


def is_document(name: str) -> bool:
    """
    >>> is_document("Scan.PDF"), is_document("scan.pdf.part")
    (True, False)
    """
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))

"""Bundles side by side in one folder, and a link that says which of them counts.

    current                 -> versions/0123456789abcdef; replaced by a rename
    versions/0123…          a bundle, named after the first digits of its hash; versions share files that are the same
    versions/0123….before   -> 4567…, the version that was current before it: written before `current` is replaced
    LOCK                    an empty file that the one writer locks

`cembed tune` and `cembed build-engine` keep 0123….tuned.json and 0123….engines beside a version, which go with it. A
version without a manifest is left over from a copy that was cut off, as are the hidden names; the next deploy removes
them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cembed.runtime.bundle.manifest import MANIFEST, Manifest
from cembed.runtime.bundle.manifest_file import check_digest, check_manifest, claimed_hash, read_bytes
from cembed.runtime.disk import Disk
from cembed.runtime.errors import CembedError
from cembed.runtime.index.files import LOCK, take_lock, writing_to

CURRENT, VERSIONS, BEFORE = "current", "versions", ".before"
PART, NEXT = ".part", ".next"  # a file, a link that is being made
DIGITS = 16
_BESIDE = re.compile(rf"([0-9a-f]{{{DIGITS}}})(\.before|\.tuned\.json|\.engines)")

State = Literal["current", "previous", "kept", "damaged"]


@dataclass(frozen=True)
class Version:
    """A bundle in a folder of versions: `copied` in seconds since 1970, `size` in bytes.

    A `damaged` one has no manifest that can be read, and `hash` are the first digits of what it was.
    """

    path: Path
    hash: str
    model: str
    copied: float
    state: State
    size: int


def resolve(path: str | Path) -> Path:
    """Where a path leads now, every link followed: what a process that stays opens, so that all it reads is of one
    version."""
    return Path(os.path.realpath(path))


def current_hash(path: str | Path) -> str | None:
    """The hash of the bundle at `path`, which may be a link that is replaced meanwhile; None where there is none, or
    one that is half there. Reads the manifest's bytes and no more."""
    root = resolve(path)
    try:
        content = read_bytes(root)
        check_digest(root, content)
    except (CembedError, OSError):
        return None
    return claimed_hash(content)


def versions(to: str | Path) -> list[Version]:
    """What is deployed in a folder: the current version, the previous one, then the others, the latest copy first.

    Manifests are read, files are not. Raises CembedError: nothing is deployed there.
    """
    shelf = Shelf(Path(to))
    shelf.require()
    found = [_version(shelf, name) for name in shelf.names()]
    order = ("current", "previous", "kept", "damaged")
    return sorted(found, key=lambda version: (order.index(version.state), -version.copied, version.hash))


def current(to: str | Path) -> Version | None:
    """The version that counts, if there is one. Raises CembedError: nothing is deployed there."""
    name = Shelf(Path(to)).current
    return next((version for version in versions(to) if version.path.name == name), None)


def _version(shelf: Shelf, name: str) -> Version:
    path = shelf.path(name)
    try:
        copied = path.stat().st_mtime
    except OSError:  # it was removed since
        copied = 0.0
    try:
        manifest, full = check_manifest(path, read_bytes(path))
    except CembedError:
        return Version(path, name, "", copied, "damaged", 0)
    size = sum(record.size for record in manifest.files.values())
    return Version(path, full, model_of(manifest), copied, shelf.state(name), size)


def model_of(manifest: Manifest) -> str:
    """The name of a bundle's model, for people."""
    return f"{', '.join(manifest.source.values())} ({manifest.backbone}, {manifest.head})"


@dataclass(frozen=True)
class Shelf:
    """A folder of versions. Names are those of folders in `versions`."""

    root: Path
    disk: Disk = field(default_factory=Disk)

    @property
    def folder(self) -> Path:
        return self.root / VERSIONS

    def path(self, name: str) -> Path:
        return self.folder / name

    def require(self) -> None:
        """Raises CembedError: it is no such folder."""
        if not self.folder.is_dir():
            raise CembedError(f"{self.root} has no versions: give a folder that `cembed deploy --to` has made")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Raises CembedError: another process has the lock; what the block could not write."""
        with writing_to(self.root):
            handle = take_lock(self.root)
            try:
                yield
            finally:
                os.close(handle)

    def make(self) -> None:
        """Makes the folder if it is not there. Raises CembedError: something else is."""
        with writing_to(self.root):
            if not os.path.lexists(self.root):
                self.root.parent.mkdir(parents=True, exist_ok=True)
                self.disk.make_folder(self.root)
            if not self.root.is_dir():
                raise CembedError(f"{self.root} is no folder: choose another --to")
            if strangers := {path.name for path in self.root.iterdir()} - {VERSIONS, LOCK, CURRENT, NEXT, "lost+found"}:
                raise CembedError(f"{self.root} has {sorted(strangers)[0]} in it, no versions: choose an empty --to")
            self.disk.sync_folder(self.root.parent)

    def names(self) -> list[str]:
        """Versions that are there, also those without a manifest."""
        names = sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir(follow_symlinks=False))
        return [name for name in names if re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", name)]

    @property
    def current(self) -> str | None:
        """Also if there is nothing where the link leads."""
        return _link_name(self.root / CURRENT)

    @property
    def previous(self) -> str | None:
        """What `rollback` goes back to."""
        before = None if self.current is None else _link_name(self.path(self.current + BEFORE))
        return before if before is not None and self.path(before).is_dir() else None

    def state(self, name: str) -> State:
        return "current" if name == self.current else "previous" if name == self.previous else "kept"

    def switch(self, name: str) -> None:
        """Makes a version, which is on disk, the current one: all at once, and durably. Raises OSError."""
        before = self.current
        if before not in (None, name):
            self._put_link(self.folder, name + BEFORE, str(before))
        self.disk.sync_folder(self.folder)
        if before != name:
            self._put_link(self.root, CURRENT, f"{VERSIONS}/{name}")
        self.disk.sync_folder(self.root)

    def _put_link(self, folder: Path, name: str, text: str) -> None:
        self.disk.make_link(text, folder / NEXT)
        self.disk.rename(folder / NEXT, folder / name)

    def clean(self, wanted: str) -> None:
        """Removes what a deploy that was cut off has left, but for a copy of the version that is wanted now."""
        if not self.folder.is_dir():
            self.disk.make_folder(self.folder)
        self.disk.sync_folder(self.root)
        for path in (self.root / NEXT, self.folder / NEXT, self.folder / PART):
            if os.path.lexists(path):
                self.disk.remove(path)
        for name in self.names():
            if name not in (wanted, self.current, self.previous) and not (self.path(name) / MANIFEST).exists():
                self.remove(name)
        self._sweep()

    def prune(self, keep: int) -> None:
        """Keeps `keep` versions: the current and the previous one, then the latest copies."""
        used = {self.current, self.previous} - {None}
        others = [name for name in self.names() if name not in used]
        others.sort(key=lambda name: self.path(name).stat().st_mtime, reverse=True)
        for name in others[max(0, keep - len(used)) :]:
            self.remove(name)
        self._sweep()

    def remove(self, name: str) -> None:
        """The manifest first: without it the rest is left over."""
        path = self.path(name)
        for file in sorted(path.iterdir(), key=lambda file: file.name != MANIFEST):
            self.disk.remove(file)
        self.disk.remove_folder(path)

    def _sweep(self) -> None:
        """What stood beside versions that are gone."""
        there = set(self.names())
        for entry in list(os.scandir(self.folder)):
            beside = _BESIDE.fullmatch(entry.name)
            if beside and beside[1] not in there:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    self.disk.remove(Path(entry.path))


def _link_name(path: Path) -> str | None:
    """The last name of where a link leads; None where there is no link to a version."""
    try:
        name = Path(os.readlink(path)).name
    except OSError:
        return None
    return name if re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", name) else None

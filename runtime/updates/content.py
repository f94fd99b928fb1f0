"""A bundle on its way to another place: its manifest, and its files as bytes that are hashed while they are written."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.manifest import DIGEST, MANIFEST, SIGNATURES, Manifest
from cembed.runtime.bundle.trust import MAX_SIGNATURES
from cembed.runtime.disk import Disk
from cembed.runtime.errors import CembedError
from cembed.runtime.plain_files import open_plain, read_plain

CHUNK = 1 << 20
LIMITS = {DIGEST: 1 << 10, SIGNATURES: MAX_SIGNATURES}
"""Bytes of the documents that a bundle may be without."""
_SLACK = 1 << 20  # bytes that names and folders may take
_MIB = 1 << 20


class Content(Protocol):
    """What a bundle is made of. `documents` are the manifest, its digest unless it is an old one, and its
    signatures if it has any."""

    @property
    def where(self) -> Path: ...

    @property
    def hash(self) -> str: ...

    @property
    def manifest(self) -> Manifest: ...

    @property
    def documents(self) -> dict[str, bytes]: ...

    def chunks(self, name: str) -> Iterator[bytes]:
        """A file's bytes, at most as many as the manifest says. Raises CembedError: it cannot be read."""
        ...


@dataclass(frozen=True)
class Folder:
    """A bundle that is there as a folder."""

    where: Path
    hash: str
    manifest: Manifest
    documents: dict[str, bytes]

    @classmethod
    def open(cls, path: Path, trusted: str | Path | None = None) -> Folder:
        """Raises CembedError as `Bundle`."""
        bundle = Bundle(path, verify=False, trusted=trusted)
        there = [name for name in LIMITS if os.path.lexists(bundle.root / name)]
        others = {name: read_plain(bundle.root / name, LIMITS[name]) for name in there}
        return cls(bundle.root, bundle.hash, bundle.manifest, {MANIFEST: bundle.content, **others})

    def chunks(self, name: str) -> Iterator[bytes]:
        return read_chunks(self.where / name, 0, self.manifest.files[name].size)


def read_chunks(path: Path, offset: int, length: int) -> Iterator[bytes]:
    """Bytes of a plain file, fewer where it ends. Raises CembedError: it cannot be read."""
    with open_plain(path, 1 << 50) as (file, _):
        try:
            file.seek(offset)
            while length and (chunk := file.read(min(CHUNK, length))):
                length -= len(chunk)
                yield chunk
        except OSError as error:
            raise CembedError(f"cannot read {path}: {error.strerror}") from error


def verify_bundle(root: Path, expected: str | None = None, trusted: str | Path | None = None) -> Bundle:
    """The one door to a version: it is signed by one who is trusted, if that is asked for, every file has its sha256,
    nothing else is there, and the hash of the bundle is the `expected` one. Raises CembedError: it is not so."""
    bundle = Bundle(root, trusted=trusted)
    bundle.start(bundle.manifest.files)
    for name in bundle.manifest.files:
        bundle.path(name)
    if expected not in (None, bundle.hash):
        raise CembedError(f"{root} is {bundle.hash}, not {expected}: remove it, and deploy again")
    return bundle


def write_file(disk: Disk, path: Path, content: Content, name: str, mode: int) -> None:
    """The file `name` as a new one at `path`, on disk. Raises CembedError: its bytes are not those of the
    manifest."""
    digest, at = hashlib.sha256(), 0
    handle = disk.create(path)
    try:
        for chunk in content.chunks(name):
            digest.update(chunk)
            disk.write(handle, chunk, at)
            at += len(chunk)
        os.fchmod(handle, mode)
        disk.sync(handle)
        _forget(handle)
    finally:
        disk.close(handle)
    if digest.hexdigest() != content.manifest.files[name].sha256:
        raise CembedError(f"{content.where}: what {name} is made from does not match its sha256: copy it again")


def _forget(handle: int) -> None:
    """Whoever reads the file next reads what the disk has kept, not what memory still has."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def require_room(folder: Path, size: int, what: Path) -> None:
    """Raises CembedError: `folder` has no room for `size` bytes."""
    free = shutil.disk_usage(folder).free
    if size + _SLACK > free:
        need = f"{what} takes {size / _MIB:,.1f} MiB there"
        raise CembedError(f"{folder} has {free / _MIB:,.1f} MiB free, and {need}: make room, and run it again")

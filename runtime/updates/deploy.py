"""A new bundle on a device: copied beside the one in use, tried there, and then all at once the one that counts."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cembed.runtime.bundle.bundle import DOCUMENTS, Bundle, sha256
from cembed.runtime.bundle.manifest import DIGEST, MANIFEST, SIGNATURES, FileRecord
from cembed.runtime.bundle.manifest_file import check_manifest, read_bytes
from cembed.runtime.bundle.trust import MAX_SIGNATURES
from cembed.runtime.disk import Disk
from cembed.runtime.embed.embedder import Embedder
from cembed.runtime.errors import CembedError
from cembed.runtime.plain_files import read_plain
from cembed.runtime.updates.content import Content, Folder, require_room, verify_bundle, write_file
from cembed.runtime.updates.patch import PatchContent
from cembed.runtime.updates.versions import DIGITS, PART, Shelf
from cembed.runtime.verify import MIN_COSINE, self_test

LEAST_KEPT = 2
Outcome = Literal["deployed", "repaired", "unchanged", "staged"]


@dataclass(frozen=True)
class Trial:
    """How a bundle is tried: the arguments of `Embedder.load`, and how near its vectors must be.

    The self-test passes within the tolerance that the bundle brings, or if no vector has a cosine below `min_cosine`
    with the stored one: another engine or processor rounds differently. `trusted` have to have signed it, before a byte
    of it is copied or computed.
    """

    providers: tuple[str, ...] | None = None
    threads: int | None = None
    min_cosine: float = MIN_COSINE
    trusted: str | Path | None = None


@dataclass(frozen=True)
class Deployed:
    """What came of it: the version's folder, the bundle's hash, bytes that were `copied` and that are `shared` with
    other versions, and the lowest cosine of the self-test, if there was one."""

    outcome: Outcome
    path: Path
    hash: str
    copied: int
    shared: int
    cosine: float | None


@dataclass(frozen=True)
class _Filled:
    copied: int
    shared: int
    changed: bool


def try_bundle(bundle: Bundle, trial: Trial) -> float:
    """The lowest cosine of the self-test of a verified bundle: the page and the query that it brings give their vectors
    with the engine of this device. Raises CembedError: they do not."""
    root = bundle.root
    embedder = Embedder.load(root, providers=trial.providers, threads=trial.threads, prepack=False, verify=False)
    worst, cosine = self_test(embedder)
    if not (worst <= bundle.manifest.self_test.tolerance or cosine >= trial.min_cosine):  # NaN is neither
        found = f"a vector has a cosine of {cosine:.4f} with the stored one, below {trial.min_cosine}"
        raise CembedError(f"{root} does not pass its self-test on this device: {found}")
    return cosine


def deploy(
    source: str | Path,
    to: str | Path,
    *,
    trial: Trial | None = None,
    keep: int = LEAST_KEPT,
    stage: bool = False,
    disk: Disk | None = None,
) -> Deployed:
    """Copies a bundle, or what a patch makes of the versions that are there, into a folder of versions, tries it, and
    makes it the current one. `keep` versions stay. With `stage` it is only copied and verified, so that engines can be
    built beside it; the next deploy of it does the rest. `disk` is for tests.

    Cut off anywhere, the version before is still the current one, and the next deploy goes on or cleans up. Raises
    CembedError: `source` is damaged or no bundle, its signature will not do, it fails its self-test, there is no room,
    another deploy is running.
    """
    if keep < LEAST_KEPT:
        raise CembedError(f"keep is {keep}: at least {LEAST_KEPT}, the current version and the one before it")
    shelf, trial = Shelf(Path(to), disk or Disk()), trial or Trial()
    shelf.make()
    with shelf.locked(), _opened(Path(source), shelf, trial.trusted) as content:
        return _deploy(shelf, content, trial, keep, stage)


@contextlib.contextmanager
def _opened(source: Path, shelf: Shelf, trusted: str | Path | None) -> Iterator[Content]:
    if not source.is_file():
        yield Folder.open(source, trusted)
        return
    with PatchContent.open(source, _files(shelf), trusted) as content:
        yield content


def _deploy(shelf: Shelf, content: Content, trial: Trial, keep: int, stage: bool) -> Deployed:
    name = content.hash[:DIGITS]
    shelf.clean(name)
    path, was_current, was_there = shelf.path(name), name == shelf.current, (shelf.path(name) / MANIFEST).exists()
    try:
        filled = _fill(shelf, name, content)
        bundle = verify_bundle(path, content.hash, trial.trusted)
        cosine = None if stage else try_bundle(bundle, trial)
    except BaseException:
        if not was_there:
            _give_up(shelf, name)
        raise
    if not stage:
        shelf.switch(name)
        _prune(shelf, keep)
    same: Outcome = "repaired" if filled.changed else "unchanged"
    outcome: Outcome = same if was_current else "staged" if stage else "deployed"
    return Deployed(outcome, path, bundle.hash, filled.copied, filled.shared, cosine)


def _give_up(shelf: Shelf, name: str) -> None:
    """Frees the room of a version that cannot be used, as far as the disk lets."""
    with contextlib.suppress(OSError):
        shelf.disk.remove(shelf.folder / PART)
    with contextlib.suppress(OSError):
        if name != shelf.current and shelf.path(name).exists():
            shelf.remove(name)


def _prune(shelf: Shelf, keep: int) -> None:
    try:
        shelf.prune(keep)
    except OSError as error:
        told = f"{shelf.root} has the new version, but the old ones could not all be removed"
        warnings.warn(f"{told}: {error.strerror or error}", RuntimeWarning, stacklevel=4)


def _fill(shelf: Shelf, name: str, content: Content) -> _Filled:
    """Makes a version of what is in its folder already: what is right stays, all else is put there, durably.

    Each file is made beside the folder and renamed into it, so a version in use is never without one. The manifest
    comes last.
    """
    disk, path, files = shelf.disk, shelf.path(name), content.manifest.files
    if not path.exists():
        disk.make_folder(path)
    wrong = {file: record for file, record in files.items() if not _is(path / file, record)}
    shared = _shared(shelf, wrong)
    copied = {file: record for file, record in wrong.items() if record.sha256 not in shared}
    require_room(shelf.root, sum(record.size for record in copied.values()), content.where)
    for file, record in wrong.items():
        _put(shelf, path / file, content, shared.get(record.sha256))
    changed = _remove_strangers(disk, path, DOCUMENTS | files.keys())
    disk.sync_folder(path)
    changed = _put_documents(shelf, path, content) or changed
    for folder in (path, shelf.folder):  # what is right may be the work of a process that was killed before this
        disk.sync_folder(folder)
    total, new = (sum(record.size for record in chosen.values()) for chosen in (wrong, copied))
    return _Filled(new, total - new, changed or bool(wrong))


def _is(path: Path, record: FileRecord) -> bool:
    """Whether the file is there, whole. One that cannot be read is not."""
    try:
        return not path.is_symlink() and path.stat().st_size == record.size and sha256(path) == record.sha256
    except OSError:
        return False


def _files(shelf: Shelf) -> dict[str, Path]:
    """The files of all versions, by the sha256 that they should have."""
    found: dict[str, Path] = {}
    for name in shelf.names() if shelf.folder.is_dir() else ():
        with contextlib.suppress(CembedError):
            manifest, _ = check_manifest(shelf.path(name), read_bytes(shelf.path(name)))
            found |= {record.sha256: shelf.path(name) / file for file, record in manifest.files.items()}
    return found


def _shared(shelf: Shelf, wanted: Mapping[str, FileRecord]) -> dict[str, Path]:
    """Files of other versions that are what is wanted, by sha256."""
    known = _files(shelf)
    records = [record for record in wanted.values() if record.sha256 in known]
    return {record.sha256: known[record.sha256] for record in records if _is(known[record.sha256], record)}


def _put(shelf: Shelf, target: Path, content: Content, same: Path | None) -> None:
    """One file, from another version if one has the `same`, else from the content."""
    part = shelf.folder / PART
    if same is None or not _linked(shelf.disk, same, part):
        write_file(shelf.disk, part, content, target.name, 0o444)
    shelf.disk.rename(part, target)


def _linked(disk: Disk, same: Path, part: Path) -> bool:
    """Some file systems have no second names, and some allow only so many."""
    try:
        disk.link(same, part)
    except OSError:
        return False
    return True


def _remove_strangers(disk: Disk, path: Path, known: set[str]) -> bool:
    strangers = [file for file in path.iterdir() if file.name not in known]
    for file in strangers:
        disk.remove(file)
    return bool(strangers)


def _put_documents(shelf: Shelf, path: Path, content: Content) -> bool:
    """The digest and the signatures, then the manifest, unless those that are there will do: an upgraded manifest is as
    good, but signatures are those of the content."""
    with contextlib.suppress(CembedError):
        if _will_do(path, content):
            return False
    for name in (DIGEST, SIGNATURES, MANIFEST):
        if name in content.documents:
            _put_bytes(shelf, path / name, content.documents[name])
        elif os.path.lexists(path / name):
            shelf.disk.remove(path / name)
    return True


def _will_do(path: Path, content: Content) -> bool:
    """Raises CembedError: what is there is no manifest of a bundle."""
    there, wanted = read_bytes(path), content.documents.get(SIGNATURES)
    same, signed = there == content.documents[MANIFEST], os.path.lexists(path / SIGNATURES)
    if check_manifest(path, there)[1] != content.hash:
        return False
    if wanted is None:
        return not (same and signed)
    return same and signed and read_plain(path / SIGNATURES, MAX_SIGNATURES) == wanted


def _put_bytes(shelf: Shelf, target: Path, data: bytes) -> None:
    part = shelf.folder / PART
    handle = shelf.disk.create(part)
    try:
        shelf.disk.write(handle, data, 0)
        shelf.disk.sync(handle)
    finally:
        shelf.disk.close(handle)
    shelf.disk.rename(part, target)


def rollback(to: str | Path, *, trial: Trial | None = None, disk: Disk | None = None) -> Deployed:
    """Makes the version before the current one, once it has been tried. Raises CembedError: there is none, it is
    damaged, another deploy is running."""
    shelf = Shelf(Path(to), disk or Disk())
    shelf.require()
    with shelf.locked():
        shelf.clean("")
        name = shelf.previous
        if name is None:
            raise CembedError(f"{shelf.root} has no previous version: there is nothing to go back to")
        trial = trial or Trial()
        bundle = verify_bundle(shelf.path(name), trusted=trial.trusted)
        cosine = try_bundle(bundle, trial)
        shelf.switch(name)
        return Deployed("deployed", bundle.root, bundle.hash, 0, 0, cosine)

"""`manifest.json` and `manifest.sha256` as files: how they are read, compared, written, and upgraded from schema 1."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from pathlib import Path

from cembed.runtime.bundle.contract import check_contract
from cembed.runtime.bundle.manifest import DIGEST, MANIFEST, MAX_MANIFEST, OLDEST_SCHEMA, SIGNATURES, Manifest
from cembed.runtime.disk import Disk
from cembed.runtime.errors import CembedError
from cembed.runtime.plain_files import read_plain

_VERSION = rb'"schema_version"\s*:\s*'
_BEFORE, _AFTER = re.compile(rb"(?<!\\)" + _VERSION + rb"1(?![0-9.eE])"), re.compile(_VERSION + rb"2")


def read_manifest(root: Path, content: bytes) -> tuple[Manifest, str]:
    """The manifest of a bundle, of the bytes that were read of it, and the bundle's hash.

    Raises CembedError: no manifest, one that does not match its digest or contradicts itself. Schema 1, which
    has no digest, is a RuntimeWarning.
    """
    manifest, name = check_manifest(root, content)
    if manifest.schema_version == OLDEST_SCHEMA:
        told = f"{root} has schema {OLDEST_SCHEMA}, in which nothing checks the manifest"
        warnings.warn(f"{told}: `cembed verify --upgrade` mends that", RuntimeWarning, stacklevel=3)
    return manifest, name


def check_manifest(root: Path, content: bytes) -> tuple[Manifest, str]:
    """`read_manifest` without the warning."""
    has_digest = check_digest(root, content)
    try:
        manifest = parse_manifest(content)
        name = hash_of(content, manifest)
    except CembedError as error:
        raise CembedError(f"{root}: {error}") from error
    if not has_digest and manifest.schema_version > OLDEST_SCHEMA:
        raise CembedError(f"{root}: missing {DIGEST}: the bundle is incomplete, copy it again")
    return manifest, name


def read_bytes(root: Path) -> bytes:
    """Raises CembedError: there is no manifest, it is a link, a device, far too large."""
    try:
        return read_plain(root / MANIFEST, MAX_MANIFEST)
    except CembedError as error:
        raise CembedError(f"{root} is not a bundle: {error}") from error


def parse_manifest(content: bytes) -> Manifest:
    """Raises CembedError: not UTF-8, not a manifest, one that contradicts itself."""
    try:
        manifest = Manifest.from_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CembedError(f"{MANIFEST} is not UTF-8") from error
    check_contract(manifest)
    return manifest


def digest_line(content: bytes) -> bytes:
    """The line of `manifest.sha256` for a manifest of these bytes, as `sha256sum` writes it."""
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()


def check_digest(root: Path, content: bytes) -> bool:
    """Whether there is a `manifest.sha256`. Raises CembedError: it is not that of the manifest's bytes.

    While a bundle is upgraded, the file has a line for the manifest before and one for the manifest after.
    """
    if not os.path.lexists(root / DIGEST):
        return False
    line = digest_line(content)
    known = read_plain(root / DIGEST, 2 * len(line))
    if known != line and line not in lines_of_upgrade(known):
        raise CembedError(f"{root / MANIFEST} does not match {DIGEST}: one of them is damaged, copy the bundle again")
    return True


def lines_of_upgrade(known: bytes) -> list[bytes]:
    """The two lines of a digest that an upgrade left when it was cut off; none if it is no such thing."""
    whole = re.fullmatch(rb"([0-9a-f]{64}  " + re.escape(MANIFEST).encode() + rb"\n){2}", known)
    return known.splitlines(keepends=True) if whole else []


def hash_of(content: bytes, manifest: Manifest) -> str:
    """What indexes, vector files and engines know a bundle by: the sha256 of its manifest.

    After an upgrade it is still that of the manifest before, whose bytes are made again here. Raises CembedError: they
    have another one.
    """
    claimed = manifest.upgraded_from
    if claimed is None:
        return hashlib.sha256(content).hexdigest()
    before, _, after = content.partition(_mark(claimed))
    version = _AFTER.match(after)
    old = before + after[: version.end() - 1] + b"1" + after[version.end() :] if version else b""
    if hashlib.sha256(old).hexdigest() != claimed:
        raise CembedError(f"{MANIFEST}: upgraded_from is not the hash of the manifest that this was made from")
    return claimed


def claimed_hash(content: bytes) -> str:
    """`hash_of` of a manifest that is not read, only looked at: cheap enough to be asked every second. Whoever opens
    the bundle finds out whether it is right."""
    upgraded_from = re.search(_mark("([0-9a-f]{64})"), content)
    return upgraded_from[1].decode() if upgraded_from else hashlib.sha256(content).hexdigest()


def _mark(claimed: str) -> bytes:
    return f'"upgraded_from": "{claimed}", '.encode()


def upgraded(content: bytes) -> bytes:
    """A manifest of schema 1 as one of schema 2: nothing else is touched. Raises CembedError: it cannot be done."""
    found = list(_BEFORE.finditer(content))
    if len(found) != 1:
        raise CembedError(f"{MANIFEST} does not say its schema_version in one place: export the bundle again")
    at, end = found[0].span()
    mark = _mark(hashlib.sha256(content).hexdigest())
    return content[:at] + mark + content[at : end - 1] + b"2" + content[end:]


def write_manifest(root: Path, text: str) -> None:
    """Writes a manifest and its digest into a bundle that is being made; a signature of what was there goes."""
    content = text.encode("utf-8")
    (root / SIGNATURES).unlink(missing_ok=True)
    (root / MANIFEST).write_bytes(content)
    (root / DIGEST).write_bytes(digest_line(content))


def upgrade(root: Path, disk: Disk | None = None) -> str:
    """Gives a bundle of schema 1 a digest of its manifest, and says what was done. Its hash stays what it is.

    At each moment the bundle can be opened, also after the power fails: first the digest gets a line for the new
    manifest too, then the manifest is replaced, then the old line goes. Run it again to finish. `disk` is for tests.
    Raises CembedError: no bundle, nothing can be written there.
    """
    disk, content = disk or Disk(), read_bytes(root)
    manifest, name = check_manifest(root, content)
    new = upgraded(content) if manifest.schema_version == OLDEST_SCHEMA else content
    if new == content and read_plain(root / DIGEST, MAX_MANIFEST) == digest_line(content):
        return f"nothing to do, schema {manifest.schema_version}"
    if hash_of(new, parse_manifest(new)) != name:
        raise CembedError(f"{root} cannot be upgraded, as its hash would change: export it again")
    if new != content and os.path.lexists(root / SIGNATURES):
        raise CembedError(f"{root} is signed as it is: remove {SIGNATURES}, and sign it again after the upgrade")
    try:
        if new != content:
            replace_document(disk, root, DIGEST, digest_line(content) + digest_line(new))
            replace_document(disk, root, MANIFEST, new)
        replace_document(disk, root, DIGEST, digest_line(new))
    except OSError as error:
        raise CembedError(f"cannot upgrade {root}: {error.strerror or error}") from error
    return f"schema {OLDEST_SCHEMA} to {parse_manifest(new).schema_version}, the hash stays {name[:12]}"


def replace_document(disk: Disk, root: Path, name: str, content: bytes) -> None:
    """Writes a file beside the bundle, where it is no stranger, and puts it in place."""
    root = root.resolve()
    temporary = root.parent / f".{root.name}.{name}"
    if os.path.lexists(temporary):
        disk.remove(temporary)
    try:
        handle = disk.create(temporary)
        try:
            os.fchmod(handle, (root / MANIFEST).stat().st_mode & 0o777)
            disk.write(handle, content, 0)
            disk.sync(handle)
        finally:
            disk.close(handle)
        disk.rename(temporary, root / name)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    disk.sync_folder(root)

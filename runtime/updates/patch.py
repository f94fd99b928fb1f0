"""A patch: what a new bundle has that an old one has not, in one zip file that any tool can look into.

patch.json        `Recipes`: the hashes of both bundles, and how each file is made that the old one does not have
manifest.json     those of the new bundle; an old-style bundle has no manifest.sha256, only a signed one manifest.sig
manifest.sha256
manifest.sig
blobs/SHA256      bytes of the new file with this sha256 that are not in the old one, one after the other
"""

from __future__ import annotations

import contextlib
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.manifest import DIGEST, MANIFEST, MAX_MANIFEST, SIGNATURES, Bytes, Manifest, Sha256
from cembed.runtime.bundle.manifest_file import digest_line, hash_of, parse_manifest
from cembed.runtime.bundle.schema import decode, parse
from cembed.runtime.bundle.trust import check_signatures
from cembed.runtime.disk import Disk
from cembed.runtime.errors import CembedError
from cembed.runtime.index.files import writing_to
from cembed.runtime.updates.content import (
    CHUNK,
    LIMITS,
    read_chunks,
    require_room,
    verify_bundle,
    write_file,
)
from cembed.runtime.writer import check_replaceable, directory

RECIPES, BLOBS = "patch.json", "blobs/"
FORMAT: Literal["cembed patch"] = "cembed patch"
MAX_RECIPES = 1 << 24  # bytes
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError, ValueError)

Piece = tuple[Bytes | None, Bytes]
"""A length in bytes after where it is in the old file, or after None: the next bytes of the blob."""


@dataclass(frozen=True)
class Recipe:
    """A new file: pieces of the file with the sha256 `old`, and of its blob."""

    old: Sha256 | None
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(length for _, length in self.pieces)

    @property
    def blob(self) -> int:
        """Bytes of the blob."""
        return sum(length for place, length in self.pieces if place is None)


@dataclass(frozen=True)
class Recipes:
    """Of bundle `new`, from bundle `old`; a recipe by the sha256 of the file that it makes."""

    format: Literal["cembed patch"]
    version: Literal[1]
    old: Sha256
    new: Sha256
    recipes: Mapping[Sha256, Recipe]


@dataclass(frozen=True)
class PatchContent:
    """The bundle that a patch makes of files that are there, `known` by their sha256; a `Content`."""

    where: Path
    hash: str
    manifest: Manifest
    documents: dict[str, bytes]
    recipes: Mapping[str, Recipe]
    known: Mapping[str, Path]
    archive: zipfile.ZipFile

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, known: Mapping[str, Path], trusted: str | Path | None = None) -> Iterator[PatchContent]:
        """Raises CembedError: no patch, a damaged or a hostile one, one for files that are not known, one for a bundle
        whose signature does not do."""
        with contextlib.ExitStack() as stack:
            with _reading(path):
                archive = stack.enter_context(zipfile.ZipFile(path))
                found = cls._of(path, archive, known, trusted)
            yield found

    @classmethod
    def _of(
        cls, path: Path, archive: zipfile.ZipFile, known: Mapping[str, Path], trusted: str | Path | None
    ) -> PatchContent:
        entries = _entries(archive)
        limits = {MANIFEST: MAX_MANIFEST, **{name: most for name, most in LIMITS.items() if name in entries}}
        documents = {name: _bytes(archive, entries, name, most) for name, most in limits.items()}
        check_signatures(path, documents[MANIFEST], documents.get(SIGNATURES), trusted)
        recipes: Recipes = decode(Recipes, parse(_text(archive, entries, RECIPES, MAX_RECIPES), RECIPES), RECIPES)
        manifest = parse_manifest(documents[MANIFEST])
        found = cls(path, recipes.new, manifest, documents, recipes.recipes, known, archive)
        found._check(entries, recipes.old)
        return found

    def _check(self, entries: Mapping[str, zipfile.ZipInfo], old: str) -> None:
        digest = self.documents.get(DIGEST)
        if digest not in (None, digest_line(self.documents[MANIFEST])):
            raise CembedError(f"{MANIFEST} does not match {DIGEST}")
        if hash_of(self.documents[MANIFEST], self.manifest) != self.hash:
            raise CembedError(f"{MANIFEST} is not that of the bundle {self.hash}")
        self._check_entries(entries)
        needed = {record.sha256 for record in self.manifest.files.values()} - self.recipes.keys()
        needed |= {recipe.old for recipe in self.recipes.values() if recipe.old is not None}
        if missing := needed - self.known.keys():
            raise CembedError(
                f"it is for the bundle {old[:16]}…, {len(missing)} of whose files are not there: use that"
            )

    def _check_entries(self, entries: Mapping[str, zipfile.ZipInfo]) -> None:
        """Each recipe makes a file of the manifest, each blob is of a recipe, and all have the size that they say."""
        sizes = {record.sha256: record.size for record in self.manifest.files.values()}
        for name, recipe in self.recipes.items():
            if sizes.get(name) != recipe.size:
                raise CembedError(f"{RECIPES} makes {recipe.size} bytes of a file {name}, which {MANIFEST} has not")
        blobs = {BLOBS + name: recipe.blob for name, recipe in self.recipes.items() if recipe.blob}
        if strangers := entries.keys() - {RECIPES, MANIFEST, *LIMITS} - blobs.keys():
            raise CembedError(f"{sorted(strangers)[0]!r:.80} is in it, which {RECIPES} does not have")
        for name, size in blobs.items():
            if name not in entries or entries[name].file_size != size:
                raise CembedError(f"{name} is not {size} bytes, as {RECIPES} has it")

    def chunks(self, name: str) -> Iterator[bytes]:
        record = self.manifest.files[name]
        recipe = self.recipes.get(record.sha256)
        with _reading(self.where):
            if recipe is None:
                yield from read_chunks(self.known[record.sha256], 0, record.size)
            else:
                yield from self._made(record.sha256, recipe)

    def _made(self, name: str, recipe: Recipe) -> Iterator[bytes]:
        with contextlib.ExitStack() as stack:
            blob = stack.enter_context(self.archive.open(BLOBS + name)) if recipe.blob else None
            for place, length in recipe.pieces:
                if place is not None and recipe.old is not None:
                    yield from read_chunks(self.known[recipe.old], place, length)
                    continue
                while blob is not None and length and (chunk := blob.read(min(CHUNK, length))):
                    length -= len(chunk)
                    yield chunk


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Says of which patch an error is."""
    try:
        yield
    except CembedError as error:
        raise CembedError(f"cannot use the patch {path}: {error}") from error
    except OSError as error:
        raise CembedError(f"cannot read the patch {path}: {error.strerror or error}") from error
    except _BAD_ZIP as error:
        raise CembedError(f"{path} is no patch, or a damaged one: copy it again") from error


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise CembedError("a name is in it twice")
    for entry in entries.values():
        kind = stat.S_IFMT(entry.external_attr >> 16)
        stored = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if kind not in (0, stat.S_IFREG) or entry.is_dir() or not stored or entry.flag_bits & 1:
            raise CembedError(f"{entry.filename!r:.80} in it is no plain file, stored or deflated")
    return entries


def _bytes(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], name: str, most: int) -> bytes:
    if name not in entries:
        raise CembedError(f"{name} is not in it")
    with archive.open(entries[name]) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise CembedError(f"{name} has more than {most} bytes")
    return content


def _text(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], name: str, most: int) -> str:
    try:
        return _bytes(archive, entries, name, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CembedError(f"{name} is not UTF-8") from error


def apply(old: Path, patch: Path, out: Path, *, force: bool = False, trusted: str | Path | None = None) -> str:
    """Makes the new bundle at `out`, whole or not at all, and returns its hash. Raises CembedError: `patch` is damaged,
    hostile or for another bundle, `trusted` has not signed the new bundle, there is no room, something is at `out` that
    `force` does not replace."""
    check_replaceable(out, force)
    bundle = Bundle(old)
    known = {record.sha256: bundle.root / name for name, record in bundle.manifest.files.items()}
    with PatchContent.open(patch, known, trusted) as content, writing_to(out), directory(out) as made:
        require_room(made, sum(record.size for record in content.manifest.files.values()), patch)
        for name in content.manifest.files:
            write_file(Disk(), made / name, content, name, 0o644)
        for name, data in content.documents.items():
            (made / name).write_bytes(data)
        verify_bundle(made, trusted=trusted)
    return content.hash

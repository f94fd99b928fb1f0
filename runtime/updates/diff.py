"""How a patch is made: two bundles are compared, files by their sha256, and within files page by page.

Pages have 4,096 bytes, as weights are laid out in pages: where a head changed in a file of weights, the patch has the
head.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.manifest import FileRecord
from cembed.runtime.bundle.vectors import write_whole
from cembed.runtime.errors import CembedError
from cembed.runtime.updates.content import Folder, read_chunks, verify_bundle
from cembed.runtime.updates.patch import BLOBS, FORMAT, MAX_RECIPES, RECIPES, Piece, Recipe, Recipes

PAGE = 1 << 12
LEAST_RUN = 16  # pages in a row that are worth a line


@dataclass(frozen=True)
class Difference:
    """What a patch is: its size, the new bundle's, and the new or changed files of that."""

    size: int
    whole: int
    files: tuple[str, ...]


def diff(old: Path, new: Path, out: Path, *, force: bool = False) -> Difference:
    """Writes a patch that makes `new` of `old`. Raises CembedError: one of them is damaged, `out` cannot be written, or
    is there and shall not be replaced."""
    if os.path.lexists(out) and (not force or not out.is_file()):
        raise CembedError(f"{out} exists: choose another --out, or replace a file with --force")
    before, after = verify_bundle(old), verify_bundle(new)
    known = {record.sha256 for record in before.manifest.files.values()}
    changed = {name: record for name, record in after.manifest.files.items() if record.sha256 not in known}
    recipes = {record.sha256: _recipe(before, after, name) for name, record in changed.items()}
    about = Recipes(FORMAT, 1, before.hash, after.hash, recipes)
    write_whole(out, lambda file: _write(file, about, after, changed))
    whole = sum(record.size for record in after.manifest.files.values())
    return Difference(out.stat().st_size, whole, tuple(changed))


def _recipe(before: Bundle, after: Bundle, name: str) -> Recipe:
    """How a file is made of the one of the same name."""
    new = after.manifest.files[name]
    old = before.manifest.files.get(name)
    if old is None:
        return Recipe(None, ((None, new.size),))
    pieces = tuple(_pieces(before.path(name), after.path(name)))
    return Recipe(old.sha256 if any(place is not None for place, _ in pieces) else None, pieces)


def _pieces(old: Path, new: Path) -> Iterator[Piece]:
    """Runs of pages that are in `old` somewhere, and what is between them."""
    fresh = 0
    for place, length in _runs(_pages(old), _pages(new)):
        if place is None or length < LEAST_RUN * PAGE:
            fresh += length
            continue
        if fresh:
            yield None, fresh
        fresh = 0
        yield place, length
    if fresh:
        yield None, fresh


def _pages(path: Path) -> Iterator[tuple[bytes, int]]:
    """The digest and the length of each page of a file."""
    for chunk in read_chunks(path, 0, path.stat().st_size):
        for at in range(0, len(chunk), PAGE):
            page = chunk[at : at + PAGE]
            yield hashlib.blake2b(page, digest_size=16).digest(), len(page)


def _runs(old: Iterable[tuple[bytes, int]], new: Iterable[tuple[bytes, int]]) -> Iterator[Piece]:
    """Pages of `new` that follow each other in `old` as one piece, pages that are not there as one each."""
    pages = [digest for digest, _ in old]
    places = {digest: number for number, digest in reversed(list(enumerate(pages)))}
    first, following, length = 0, 0, 0
    for digest, size in new:
        if length and following < len(pages) and pages[following] == digest:
            following, length = following + 1, length + size
            continue
        if length:
            yield first * PAGE, length
        place = places.get(digest)
        if place is None:
            length = 0
            yield None, size
        else:
            first, following, length = place, place + 1, size
    if length:
        yield first * PAGE, length


def _write(file: BinaryIO, about: Recipes, after: Bundle, changed: Mapping[str, FileRecord]) -> None:
    folder = Folder.open(after.root)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        text = json.dumps(asdict(about), indent=1) + "\n"
        if len(text) > MAX_RECIPES:
            raise CembedError(f"{after.root} differs in too many places from the old bundle: deploy it whole")
        for name, content in {RECIPES: text.encode(), **folder.documents}.items():
            archive.writestr(_entry(name), content)
        for name, record in {record.sha256: (name, record) for name, record in changed.items()}.values():
            recipe = about.recipes[record.sha256]
            if recipe.blob:
                with archive.open(_entry(BLOBS + record.sha256), "w", force_zip64=True) as blob:
                    for chunk in _fresh(after.root / name, recipe):
                        blob.write(chunk)


def _entry(name: str) -> zipfile.ZipInfo:
    """Without a date: the same bundles give the same patch."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, (stat.S_IFREG | 0o644) << 16
    return entry


def _fresh(new: Path, recipe: Recipe) -> Iterator[bytes]:
    at = 0
    for place, length in recipe.pieces:
        if place is None:
            yield from read_chunks(new, at, length)
        at += length

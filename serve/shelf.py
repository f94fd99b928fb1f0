"""The index of a server, and pictures of its pages beside it."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.index.new_pages import NewPage
from cembed.runtime.index.search import Hit
from cembed.runtime.index.views import PageInfo
from cembed.runtime.intake.opening import bundle_of, check_fits, open_or_create

REFRESH_SECONDS = 1.0
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
KEPT_SHARE = 0.9


class Shelf:
    """An index that one process searches, and adds to unless it is `read_only`: then it sees what others add."""

    def __init__(self, index: Index, bundle: str, read_only: bool, pictures: int) -> None:
        self.index, self.read_only = index, read_only
        self._bundle, self._refreshed = bundle, time.monotonic()
        self.pictures = Pictures(index.folder, index.identity, pictures)

    @classmethod
    def open(cls, path: Path, bundle: str, dim: int, read_only: bool, pictures: int) -> Shelf:
        """Raises CembedError: it is of another bundle or dim, damaged, or another process is writing to it."""
        if read_only:
            index = Index.open(path)
            check_fits(index, bundle, dim)
        else:
            try:
                index = open_or_create(path, bundle=bundle, dim=dim)
            except CembedError as error:
                raise CembedError(f"{error}; --read-only searches it beside another process") from None
        return cls(index, bundle, read_only, pictures)

    async def search(
        self, query: Vectors, top: int, where: Mapping[str, Any] | None, source: str | None
    ) -> Sequence[Hit]:
        """As `Index.search`, but `source` is a pattern of what is shown of a source."""
        return await asyncio.to_thread(self._search, query, top, where, source)

    def _search(self, query: Vectors, top: int, where: Mapping[str, Any] | None, source: str | None) -> Sequence[Hit]:
        if self.read_only and time.monotonic() > self._refreshed + REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            if bundle_of(self.index.folder) == self._bundle:  # else this is served until the server has that one
                self.index.refresh()
        asked, pattern = top, None if source is None else f"*{source}"  # with any folder before it
        while True:
            hits = self.index.search(query, asked, where=where or None, source=pattern).hits
            fitting = [hit for hit in hits if source is None or fnmatch.fnmatchcase(shown_source(hit), source)]
            if len(fitting) >= top or len(hits) < asked:
                return fitting[:top]
            asked *= 4  # the pattern fits folders, too

    async def add(self, page: NewPage, picture: bytes | None) -> PageInfo:
        """Adds a page; it is on disk when this returns, its picture soon after."""
        return await asyncio.to_thread(self._add, page, picture)

    def _add(self, page: NewPage, picture: bytes | None) -> PageInfo:
        self.index.add([page], bundle=self._bundle)
        info = self.index.info(page.id)
        if picture is not None:
            self.pictures.put(info.serial, picture)
        return info

    async def remove_after(self, source: str, pages: int) -> int:
        """Removes pages that an older file of this name had after its first `pages`. Gives their number."""
        return await asyncio.to_thread(self._remove_after, source, pages)

    def _remove_after(self, source: str, pages: int) -> int:
        number, old = pages + 1, list[str]()
        while f"{source}#{number}" in self.index:
            old.append(f"{source}#{number}")
            number += 1
        return self.index.remove(old) if old else 0

    def find(self, name: str) -> PageInfo:
        """A page by its serial or its id, unless that has a path. Raises CembedError: there is none."""
        if name.isascii() and name.isdigit() and len(name) < 19:
            with contextlib.suppress(CembedError):
                return self.index.serial_info(int(name))
        if os.path.isabs(name):
            raise CembedError("pages of files are known by their serials")
        return self.index.info(name)

    def change(self, bundle: str, index: Index | None) -> None:
        """Serves another index at the same place, with vectors of another bundle; without `index`, what is there."""
        self._bundle = bundle
        if index is None:
            self.index.refresh()
        else:
            self.index = index
        if self.pictures.identity != self.index.identity:
            self.pictures = Pictures(self.index.folder, self.index.identity, self.pictures.limit)

    def close(self) -> None:
        self.index.close()


def source_path(page: PageInfo) -> Path | None:
    """The file of a page that `cembed index add` added, as far as is known; pages that clients sent have none."""
    if os.path.isabs(page.source):
        return Path(page.source)
    return Path(page.folder) / page.source if page.folder else None


def shown_source(page: PageInfo | Hit) -> str:
    """A page's source as clients see it: the name of a file whose folder is this machine's own business."""
    return os.path.basename(page.source) if os.path.isabs(page.source) else page.source


class Pictures:
    """JPEG files of pages by their serials, of `limit` bytes in all: the oldest go first."""

    def __init__(self, index: Path, identity: str, limit: int) -> None:
        self.identity = identity
        self._folder = index.with_name(f"{index.name}.pictures") / identity
        self.limit, self._lock = limit, threading.Lock()
        self._sizes: dict[int, int] = {}
        for other in _entries(self._folder.parent):
            if other.name != identity:
                shutil.rmtree(other, ignore_errors=True)  # of an index that was here before
        for file in sorted(_entries(self._folder), key=lambda entry: entry.stat().st_mtime_ns):
            if file.name.removesuffix(".jpg").isdigit():
                self._sizes[int(file.name.removesuffix(".jpg"))] = file.stat().st_size

    def _path(self, serial: int) -> Path:
        return self._folder / f"{serial}.jpg"

    def read(self, serial: int) -> bytes | None:
        """A page's picture, where there is a whole one."""
        with contextlib.suppress(OSError):
            picture = self._path(serial).read_bytes()
            if picture.startswith(JPEG_START) and picture.endswith(JPEG_END):
                return picture
        return None

    def put(self, serial: int, picture: bytes) -> None:
        """Keeps a picture, if there is room: a page is there without one, too."""
        with self._lock, contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(picture)
                os.replace(partial, self._path(serial))
            except OSError:
                os.unlink(partial)
                raise
            self._sizes.pop(serial, None)
            self._sizes[serial] = len(picture)
            self._make_room()

    def _make_room(self) -> None:
        total = sum(self._sizes.values())
        if total <= self.limit:
            return
        for serial in list(self._sizes):
            if total <= KEPT_SHARE * self.limit:
                break
            total -= self._sizes.pop(serial)
            self._path(serial).unlink(missing_ok=True)


def _entries(folder: Path) -> Sequence[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []

"""Pages become rows: on this machine, one after the other, and in each process of a cluster."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs as filesystems

from cembed.runtime.embed.embedder import FULL, Budget, Embedder
from cembed.runtime.embed.loading import Loading
from cembed.runtime.errors import CembedError
from cembed.runtime.page_vectors import EmbeddedPage, embed_pages
from cembed.runtime.pages.documents import SUFFIXES, Page, PageError, PageReader, find_documents
from cembed.runtime.plain_files import hash_file, stamp_of
from cembed.scale.parts import Keys, Parts, has_key, open_filesystem
from cembed.scale.rows import Row, RowSchema, row_key

UNREADABLE = ""
"""The sha256 of a file that cannot be read."""


def hashed(path: str) -> tuple[str, str | None]:
    """The sha256 of a file in hex, or why it has none."""
    try:
        return hash_file(path)[0].hex(), None
    except CembedError as error:
        return UNREADABLE, str(error)


@dataclass
class LocalRun:
    """Files embedded into `parts` by this process, the page after the one at work being decoded meanwhile."""

    parts: Parts
    embedder: Embedder
    budget: Budget = FULL
    new: int = 0
    skipped: int = 0
    failures: list[PageError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def run(self, reader: PageReader, counter: PageReader, files: Iterable[Path], done: Callable[[], None]) -> None:
        """Embeds what is not there yet. Two readers that are open: one reads, the other counts pages meanwhile."""
        self._sha256 = dict[str, str]()
        paths = self._unfinished(counter, files)
        pages = (page for page in reader.read(paths) if isinstance(page, PageError) or not self._there(page))
        for page in embed_pages(self.embedder, pages, self.budget):
            self._add(page)
            done()

    def _unfinished(self, counter: PageReader, files: Iterable[Path]) -> Iterator[str]:
        """Files of which a page is missing; they are hashed when it is their turn."""
        settings = self.parts.schema.settings
        for path in map(str, files):
            sha256, error = hashed(path)
            if error is not None:
                self._add(PageError(path, None, error))
                continue
            self._sha256 = {**dict(list(self._sha256.items())[-2:]), path: sha256}  # of files that are being read
            keys = (row_key(path, sha256, page, settings) for page in (None, 1))
            if any(key in self.parts for key in keys) and self._whole(counter, path, sha256):
                continue
            yield path

    def _whole(self, counter: PageReader, path: str, sha256: str) -> bool:
        settings = self.parts.schema.settings
        if row_key(path, sha256, None, settings) in self.parts:
            self.skipped += 1
            return True
        pages = counter.page_count(path) or 0
        whole = all(row_key(path, sha256, page, settings) in self.parts for page in range(1, pages + 1))
        self.skipped += pages if whole else 0
        return whole and pages > 0

    def _there(self, page: Page) -> bool:
        key = row_key(page.path, self._sha256[page.path], page.number, self.parts.schema.settings)
        self.skipped += key in self.parts
        return key in self.parts

    def _add(self, page: EmbeddedPage | PageError) -> None:
        row = row_of(page, self._sha256.get(page.path, UNREADABLE))
        if not self.parts.add(row):
            self.skipped += 1
            return
        self.new += 1
        if isinstance(page, PageError):
            self.failures.append(page)
        elif page.warning:
            self.warnings.append(f"{page.place}: {page.warning}")


def row_of(page: EmbeddedPage | PageError, sha256: str) -> Row:
    if isinstance(page, PageError):
        return Row(page.path, page.number, sha256, error=page.reason)
    return Row(page.path, page.number, sha256, page.vectors, page.warning)


@dataclass(frozen=True)
class WorkerOptions(Loading):
    """What a process of a cluster needs to embed pages into rows of `schema`.

    Vectors are those of `cembed embed`, bit for bit, with the same `threads` and `prepack`. `prepack=None` maps weights
    that processes of a machine then share; with int8 weights the last bits may differ.
    """

    threads: int | None = 1
    schema: RowSchema = field(kw_only=True)
    budget: Budget = FULL

    def load(self) -> Embedder:
        """Raises CembedError: another bundle than that of the rows, or one that cannot be opened."""
        embedder = super().load()
        if embedder.bundle.hash != self.schema.bundle:
            raise CembedError(f"{self.bundle} is another bundle here than where the work was given out")
        return embedder


class Files:
    """The file at work: hashed once, and copied here first if it is elsewhere (a URI). The next one takes its place."""

    def __init__(self) -> None:
        self._path, self._sha256 = "", UNREADABLE
        self._stamp: tuple[int, ...] = ()
        self._copy: str | None = None

    def open(self, path: str) -> tuple[str, str]:
        """Where it is, and its sha256. Raises CembedError: it cannot be read."""
        here = self._copy if path == self._path and self._copy else path
        if path != self._path or stamp_of(os.stat(here)) != self._stamp:
            self.close()
            here = self._fetch(path) if "://" in path else path
            digest, self._stamp = hash_file(here)
            self._path, self._sha256 = path, digest.hex()
        return here, self._sha256

    def _fetch(self, path: str) -> str:
        files, place = open_filesystem(path)
        handle, self._copy = tempfile.mkstemp(prefix="cembed-")
        try:
            with os.fdopen(handle, "wb") as file, files.open_input_stream(place) as stream:
                shutil.copyfileobj(stream, file, 1 << 20)
        except OSError as error:
            raise CembedError(str(error)) from error
        return self._copy

    def close(self) -> None:
        self._path = ""
        if self._copy is not None:
            os.unlink(self._copy)
            self._copy = None


class PageSplitter:
    """One of `map_batches`: a column `path` of documents becomes `path`, `page` and `sha256` of each page to embed.

    `page` is 0 where a file cannot be read. `done` are the sorted keys of pages that are not to be embedded again.
    """

    def __init__(self, options: WorkerOptions, done: Keys) -> None:
        self._settings, self._done, self._files = options.schema.settings, done, Files()
        self._reader = options.reader().__enter__()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        found = [(path, *page) for path in map(str, batch["path"]) for page in self.pages(path)]
        columns: dict[str, Any] = {"path": [row[0] for row in found], "sha256": [row[2] for row in found]}
        return columns | {"page": np.array([row[1] for row in found], np.int32)}

    def pages(self, path: str) -> Iterator[tuple[int, str]]:
        """Numbers of pages, and the sha256 of the file."""
        try:
            file, sha256 = self._files.open(path)
            count = self._reader.pages_of(file)
        except (CembedError, OSError):
            sha256, count = UNREADABLE, 0
        for page in range(1, count + 1) or (0,):
            if not has_key(self._done, row_key(path, sha256, page or None, self._settings)):
                yield page, sha256


class PageEmbedder:
    """The other one: pages that `PageSplitter` gives, or whole documents in a column `bytes`, become rows in Arrow.

    Nothing that is wrong with a page raises. The bundle is loaded once for each process, which has one decoding process
    of its own.
    """

    def __init__(self, options: WorkerOptions) -> None:
        self._options, self._files, self._embedder = options, Files(), options.load()
        self._embedder.prepare("document", options.budget)
        self._reader = options.reader().__enter__()

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        paths = list(map(str, batch["path"]))
        if "bytes" in batch:
            rows = [row for path, data in zip(paths, batch["bytes"], strict=True) for row in self.document(path, data)]
        else:
            given = zip(paths, batch["page"], batch["sha256"], strict=True)
            rows = [self.row(path, int(page), str(sha256)) for path, page, sha256 in given]
        return pa.Table.from_batches([self._options.schema.batch(rows)])

    def row(self, path: str, page: int, sha256: str) -> Row:
        """A page of a file; page 0 says why there is none."""
        try:
            file, now = self._files.open(path)
        except (CembedError, OSError) as error:
            return Row(path, page or None, sha256, error=getattr(error, "strerror", None) or str(error))
        if now != sha256:
            return Row(path, page or None, sha256, error="was changed while it was being read")
        return self._embed(path, file, page, sha256)[0]

    def document(self, path: str, data: bytes) -> Iterator[Row]:
        """All pages of a document; `path` only names it."""
        sha256 = hashlib.sha256(data).hexdigest()
        with tempfile.NamedTemporaryFile(prefix="cembed-") as file:
            file.write(data)
            file.flush()
            page, pages = 1, 1
            while page <= pages:
                row, pages = self._embed(path, file.name, page, sha256)
                yield row
                page += 1

    def _embed(self, path: str, file: str, page: int, sha256: str) -> tuple[Row, int]:
        """A row, and how many pages the file has."""
        found, pages = self._reader.page(file, page or 1)
        number = page if page and pages else None
        made = next(iter(embed_pages(self._embedder, [found], self._options.budget)))
        return replace(row_of(made, sha256), path=path, page=number), pages


def find_sources(paths: Sequence[str]) -> list[str]:
    """Documents at local paths, absolute, and at URIs, files or folders of them. Raises CembedError as
    `find_documents`, or where a URI has none."""
    local = [path for path in paths if "://" not in path]
    found = [os.path.abspath(path) for path in find_documents(local)] if local else []
    return [*found, *(file for path in paths if "://" in path for file in _listed(path))]


def _listed(uri: str) -> list[str]:
    files, place = open_filesystem(uri)
    scheme = uri.partition("://")[0]
    try:
        info = files.get_file_info(place)
        if info.type == filesystems.FileType.File:
            return [uri]
        there = files.get_file_info(filesystems.FileSelector(place, recursive=True))
    except OSError as error:
        raise CembedError(f"{uri}: {error}") from error
    names = sorted(info.path for info in there if info.type == filesystems.FileType.File)
    if not (documents := [name for name in names if name.lower().endswith(SUFFIXES)]):
        raise CembedError(f"found no documents in {uri}: give files or folders with {', '.join(SUFFIXES)}")
    return [f"{scheme}://{name}" for name in documents]

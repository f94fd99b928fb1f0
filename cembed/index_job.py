"""One run of `cembed index add`: what is done with each page of each file.

A page that is there with the same content stays; one whose content is there under another name takes its vectors; the
rest is embedded. A page leaves the index only when its file, as it is now, has fewer pages and all of them are there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.embed.embedder import Budget, Embedder
from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.index.new_pages import NewPage, page_content
from cembed.runtime.page_vectors import EmbeddedPage, embed_pages
from cembed.runtime.pages.documents import Page, PageError, PageReader, place_of
from cembed.runtime.plain_files import hash_file, stamp_of

FLUSH_SECONDS = 2.0  # of embedding, at most, are lost when the process is killed
FLUSH_PAGES = 64  # that were embedded
FLUSH_RECORDS = 2048  # of any kind


@dataclass(frozen=True)
class Document:
    """A file to add: its path as given, its name in the index, and its pages, None where that is not known.

    `stamp` differs when the file was changed after its bytes were hashed.
    """

    path: str
    source: str
    folder: str | None
    digest: bytes
    stamp: tuple[int, ...]
    pages: int | None

    def page_id(self, number: int) -> str:
        return f"{self.source}#{number}"

    @property
    def changed(self) -> bool:
        """Whether it is another file now, or is being written to."""
        try:
            return stamp_of(os.stat(self.path)) != self.stamp
        except OSError:
            return True


class Sources:
    """The files that an index has pages of, found by any spelling of their paths.

    A relative source starts where it was added from; if it is not there any more, in the working directory.
    """

    def __init__(self, index: Index) -> None:
        self._known = index.sources()
        self._at: dict[str, str] = {}
        for source in self._known:
            self._at.setdefault(self._place(source), source)

    def _place(self, source: str) -> str:
        then = os.path.join(self._known[source].folder or "", source)
        return os.path.realpath(then if os.path.lexists(then) else source)

    def find(self, path: str) -> str | None:
        """The source that is the file at `path`."""
        real = os.path.realpath(path)
        same = path in self._known and self._place(path) == real
        return path if same else self._at.get(real)

    def name(self, path: str) -> tuple[str, str | None]:
        """The source that a file has or gets, which is its path as given if that is free; and its folder."""
        source = self.find(path)
        if source is not None:
            return source, self._known[source].folder
        source = os.path.realpath(path) if path in self._known else path
        return source, None if os.path.isabs(source) else os.getcwd()

    def numbers(self, source: str | None) -> Sequence[int]:
        """Of the pages that the index had of a source."""
        return self._known[source].numbers if source in self._known else ()


@dataclass
class Job:
    """One run. A page's content is its file's bytes, its number, and the settings it is embedded with.

    `metadata` goes with every page; None leaves it as it is, and empty for new ones. Then counts of pages: `shared` of
    the `added` ones took vectors that were there, of `changed` ones the metadata is another. Lines for a person:
    `failures`, new `warnings`, and `notes`.
    """

    index: Index
    embedder: Embedder
    budget: Budget
    settings: str
    metadata: dict[str, Any] | None
    added: int = 0
    shared: int = 0
    skipped: int = 0
    changed: int = 0
    removed: int = 0
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sources = Sources(self.index)
        self._documents: dict[str, Document] = {}  # by path without links
        self._todo: list[Document] = []
        self._copies: list[Document] = []  # of files in `_todo`
        self._waiting: list[NewPage] = []
        self._pending: dict[bytes, str | None] = {}  # contents of waiting pages with vectors, and their warnings
        self._flushed = time.monotonic()

    def plan(self, reader: PageReader, files: Sequence[Path]) -> int:
        """Takes the files whose pages are all there, and gives the number of pages in the others."""
        digests = set[bytes]()
        for document in self._examine(reader, files):
            if not self._take_all(document):
                (self._copies if document.digest in digests else self._todo).append(document)
                digests.add(document.digest)
        return sum(document.pages or 1 for document in [*self._todo, *self._copies])

    def _examine(self, reader: PageReader, files: Sequence[Path]) -> Iterator[Document]:
        """Each file that can be read, once."""
        for path in map(str, files):
            real = os.path.realpath(path)
            if real in self._documents:
                continue
            try:
                digest, stamp = hash_file(path)
            except CembedError as error:
                count = len(self._sources.numbers(self._sources.find(path)))
                self.failures.append(f"{path}: {error}{f'; its {count} pages stay in the index' if count else ''}")
                continue
            document = Document(path, *self._sources.name(path), digest, stamp, reader.page_count(path))
            self._documents[real] = document
            yield document

    def run(self, reader: PageReader, done: Callable[[], None]) -> None:
        """Does what plan() found; `done` is called for each page."""
        self._read(reader, self._todo, done)
        self.flush()
        rest = []
        for document in self._copies:
            if not self._take_all(document):
                rest.append(document)
                continue
            for _ in range(document.pages or 0):
                done()
        self._read(reader, rest, done)
        self.flush()
        self._remove_surplus()

    def _read(self, reader: PageReader, documents: Sequence[Document], done: Callable[[], None]) -> None:
        by_path = {document.path: document for document in documents}
        new = self._new_pages(reader, by_path, done)
        for page in embed_pages(self.embedder, new, self.budget):
            document = by_path[page.path]
            if isinstance(page, PageError):
                self._fail(document, page.number, page.reason)
            else:
                self._add(document, page)
            done()

    def _new_pages(
        self, reader: PageReader, documents: Mapping[str, Document], done: Callable[[], None]
    ) -> Iterator[Page | PageError]:
        """What `reader` gives, without the pages for which there are vectors: they are taken."""
        for page in reader.read(list(documents)):
            document = documents[page.path]
            if isinstance(page, PageError):
                yield page
            elif self._has_vectors(self._content(document, page.number)):
                self._take(document, page.number)
                done()
            elif document.changed:
                yield PageError(page.path, page.number, "was changed while it was being read: add it again")
            else:
                yield page
            del page  # it may be the largest thing in memory, and the next one is about to come

    def _content(self, document: Document, number: int) -> bytes:
        return page_content(document.digest, number, self.settings)

    def _is_there(self, document: Document, number: int) -> bool:
        return self.index.knows(document.page_id(number), self._content(document, number))

    def _has_vectors(self, content: bytes) -> bool:
        return content in self._pending or self.index.has_content(content)

    def _take_all(self, document: Document) -> bool:
        """Takes all pages of a file, if there are vectors for all of them."""
        numbers = range(1, (document.pages or 0) + 1)
        if not numbers or not all(self._has_vectors(self._content(document, number)) for number in numbers):
            return False
        for number in numbers:
            self._take(document, number)
        return True

    def _take(self, document: Document, number: int) -> None:
        """A page for which there are vectors."""
        content = self._content(document, number)
        if not self._is_there(document, number):
            self.shared += 1
            warning = self._pending[content] if content in self._pending else self.index.warning_of(content)
            self._warn(document, number, warning)
        elif self.metadata is None:
            self.skipped += 1
            return
        self._wait(document, number, None, None)

    def _add(self, document: Document, page: EmbeddedPage) -> None:
        """A page that is new."""
        self._pending[self._content(document, page.number)] = page.warning
        self._warn(document, page.number, page.warning)
        self._wait(document, page.number, page.vectors, page.warning)

    def _warn(self, document: Document, number: int, warning: str | None) -> None:
        if warning is not None:
            self.warnings.append(f"{place_of(document.path, number)}: {warning}")

    def _fail(self, document: Document, number: int | None, reason: str) -> None:
        """A page, or the rest of a file, that could not be read. What the index has of it stays."""
        if number is not None and self._is_there(document, number):
            self.skipped += 1
            return
        numbers = self._sources.numbers(document.source) if number is None else [number]
        old = [n for n in numbers if document.page_id(n) in self.index and not self._is_there(document, n)]
        kept = f"; {len(old)} pages of an older version stay in the index" if old else ""
        if old and number is not None:
            kept = "; the index keeps it from an older version of the file"
        self.failures.append(f"{place_of(document.path, number)}: {reason}{kept}")

    def _wait(self, document: Document, number: int, vectors: Vectors | None, warning: str | None) -> None:
        name, metadata = document.page_id(number), self.metadata
        if metadata is None:
            metadata = dict(self.index.info(name).metadata) if name in self.index else {}
        page = NewPage(
            id=name,
            vectors=vectors,
            source=document.source,
            page=number,
            metadata=metadata,
            content=self._content(document, number),
            warning=warning,
            folder=document.folder,
        )
        self._waiting.append(page)
        many = len(self._pending) >= FLUSH_PAGES or len(self._waiting) >= FLUSH_RECORDS
        if many or time.monotonic() > self._flushed + FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Makes what is waiting durable."""
        done = self.index.add(self._waiting, bundle=self.embedder.bundle.hash)
        self.added, self.skipped = self.added + done.added, self.skipped + done.skipped
        self.changed += done.changed
        self._waiting, self._pending, self._flushed = [], {}, time.monotonic()

    def _remove_surplus(self) -> None:
        """Removes pages that files do not have any more."""
        surplus = [name for document in self._documents.values() for name in self._surplus(document)]
        self.removed = self.index.remove(surplus) if surplus else 0

    def _surplus(self, document: Document) -> list[str]:
        """Ids of pages that a file does not have any more: none, unless all that it has now are in the index."""
        if document.pages is None:
            return []
        numbers = [number for number in self._sources.numbers(document.source) if number > document.pages]
        names = [name for name in map(document.page_id, numbers) if name in self.index]
        whole = all(self._is_there(document, number) for number in range(1, document.pages + 1))
        if names and (not whole or document.changed):
            self.notes.append(
                f"kept: {document.path}: {len(names)} pages that only an older version of it has; "
                "they go when all pages of the file can be read"
            )
            return []
        return names

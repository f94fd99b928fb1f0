"""One run over some files: what is done with each page of each file.

A page that is there with the same content stays; one whose content is there under another name takes its vectors; one
whose content is known to be missing is not tried again; the rest is embedded. A page leaves the index only when its
file, as it is now, has fewer pages and all of them are there, or is at another path now.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.embed.blank import is_blank
from cembed.runtime.embed.embedder import Budget, Embedder
from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.index.new_pages import NewPage, page_content
from cembed.runtime.index.reader import IndexReader
from cembed.runtime.intake.ledger import Content, Entry, Missing
from cembed.runtime.intake.sources import Document, Sources
from cembed.runtime.page_vectors import EmbeddedPage, embed_pages
from cembed.runtime.pages.documents import Page, PageError, PageReader, place_of
from cembed.runtime.plain_files import hash_file

FLUSH_SECONDS = 2.0  # of embedding, at most, are lost when the process is killed
FLUSH_PAGES = 64  # that were embedded
FLUSH_RECORDS = 2048  # of any kind
REASONS = 20  # of a file, that are kept


@dataclass(frozen=True)
class BlankPage:
    """A page without any writing."""

    path: str
    number: int


Outcome = EmbeddedPage | BlankPage | PageError
Wanted = Callable[[str, int], bool]


class Pages(Protocol):
    """What reads files and embeds their pages."""

    @property
    def bundle(self) -> str:
        """The hash of the bundle that makes the vectors."""

    def prepare(self) -> None:
        """Gets ready, before there is a page. Raises CembedError: it cannot."""

    def page_count(self, path: str) -> int | None:
        """None for a file that cannot be read."""

    def embed(self, paths: Sequence[str], wanted: Wanted) -> Iterator[Outcome]:
        """Every page of every file in order for which `wanted(path, number)`, or why it cannot be had."""


@dataclass(frozen=True)
class LocalPages:
    """`Pages` by an embedder and an open reader of this process; with `skip_blank`, blank pages are not embedded."""

    embedder: Embedder
    reader: PageReader
    budget: Budget
    skip_blank: bool = False

    @property
    def bundle(self) -> str:
        return self.embedder.bundle.hash

    def prepare(self) -> None:
        self.embedder.prepare("document", self.budget)

    def page_count(self, path: str) -> int | None:
        return self.reader.page_count(path)

    def embed(self, paths: Sequence[str], wanted: Wanted) -> Iterator[Outcome]:
        blank: list[BlankPage] = []
        for outcome in embed_pages(self.embedder, self._read(paths, wanted, blank), self.budget):
            yield from blank
            blank.clear()
            yield outcome
        yield from blank

    def _read(self, paths: Sequence[str], wanted: Wanted, blank: list[BlankPage]) -> Iterator[Page | PageError]:
        for page in self.reader.read(paths):
            if isinstance(page, PageError):
                yield page
            elif wanted(page.path, page.number):
                if self.skip_blank and is_blank(page.image):
                    blank.append(BlankPage(page.path, page.number))
                else:
                    yield page
            del page  # it may be the largest thing in memory, and the next one is about to come


@dataclass
class Result:
    """What became of a file. `retry` says why it is to be tried again, and nothing of it is to be remembered.

    `missing` are pages that are not there; `old` ones of an earlier version are in the index in their place.
    """

    document: Document
    missing: dict[int | None, Missing] = field(default_factory=dict)
    warned: bool = False
    retry: str | None = None

    @property
    def failed(self) -> bool:
        return any(not missing.blank for missing in self.missing.values())

    @property
    def content(self) -> Content:
        return Content(self.document.pages or 0, tuple(self.missing.values()))

    def entry(self, pages: int, when: float) -> Entry:
        """For the ledger: `pages` of it are in the index."""
        wrong = [missing for missing in self.missing.values() if not missing.blank]
        blank = len(self.missing) - len(wrong)
        return Entry(
            path=os.path.realpath(self.document.path),
            stamp=self.document.stamp,
            state="failed" if wrong else "indexed" if pages or not blank else "blank",
            digest=self.document.digest,
            pages=pages,
            blank=blank,
            reasons=tuple(m.reason if m.number is None else f"page {m.number}: {m.reason}" for m in wrong[:REASONS]),
            when=when,
        )


def know_nothing(digest: bytes) -> Content | None:
    """For a run without a ledger."""
    return None


def path_as_given(path: str, digest: bytes) -> str:
    return path


@dataclass
class Job:
    """One run. A page's content is its file's bytes, its number, and the settings it is embedded with.

    `metadata` goes with every page; None leaves it as it is, and empty for new ones. `known` says what is known of a
    file's bytes by their sha256, `before` is an older index whose pages had metadata, `awaited` are paths where files
    will be. Then counts of pages: `shared` of the `added` ones took vectors that were there, of `changed` ones the
    metadata is another, `blank` ones and those that `failed_before` were passed over, `removed` ones left the index,
    and so did those of `moved` files at the paths that these `left`. Lines for a person: `failures`, new `warnings`,
    and `notes`.
    """

    index: Index
    pages: Pages
    settings: str
    metadata: dict[str, Any] | None
    known: Callable[[bytes], Content | None] = know_nothing
    sources: Sources | None = None
    before: IndexReader | None = None
    awaited: Collection[str] = ()
    added: int = 0
    shared: int = 0
    skipped: int = 0
    changed: int = 0
    removed: int = 0
    blank: int = 0
    failed_before: int = 0
    moved: int = 0
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    unreadable: dict[str, CembedError] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sources = self.sources or Sources(self.index)
        self._seen = set[str]()  # paths without links
        self._todo: list[Document] = []
        self._copies: list[Document] = []  # of files in `_todo`
        self._arrivals: list[Document] = []  # whose content is there, under other names
        self._from: dict[str, list[str]] = {}  # the sources that a path was moved from
        self._waiting: list[NewPage] = []
        self._pending: dict[bytes, str | None] = {}  # contents of waiting pages with vectors, and their warnings
        self._flushed = time.monotonic()

    # Planning ---------------------------------------------------------------------------------------------------------

    def plan(self, files: Sequence[Path | str], names: Callable[[str, bytes], str] = path_as_given) -> int:
        """Finds out which files need to be read, and gives the number of their pages. `names` gives the path that a
        file is to have in the index, by its path and its sha256."""
        digests = set[bytes]()
        for document in self._examine(files, names):
            if self._is_settled(document):
                self._arrivals.append(document)
            else:
                (self._copies if document.digest in digests else self._todo).append(document)
                digests.add(document.digest)
        return sum(document.pages or 1 for document in [*self._todo, *self._copies])

    def _examine(self, files: Sequence[Path | str], names: Callable[[str, bytes], str]) -> Iterator[Document]:
        """Each file that can be read, once."""
        for path in map(str, files):
            real = os.path.realpath(path)
            if real in self._seen:
                continue
            self._seen.add(real)
            try:
                digest, stamp = hash_file(path)
            except CembedError as error:
                self.unreadable[path] = error
                count = len(self._sources.numbers(self._sources.find(path)))
                self.failures.append(f"{path}: {error}{f'; its {count} pages stay in the index' if count else ''}")
                continue
            known = self.known(digest)
            pages = known.pages or None if known else self.pages.page_count(path)
            document = Document(path, *self._sources.name(names(path, digest)), digest, stamp, pages)
            self.results[path] = Result(document, dict(known.lacks) if known else {})
            yield document

    def _is_settled(self, document: Document) -> bool:
        """Whether there are vectors for every page that is not known to be missing."""
        lacks = self.results[document.path].missing
        if None in lacks:
            return True
        numbers = range(1, (document.pages or 0) + 1)
        return bool(numbers) and all(
            number in lacks or self._has_vectors(self._content(document, number)) for number in numbers
        )

    # Doing ------------------------------------------------------------------------------------------------------------

    def run(self, done: Callable[[], None]) -> None:
        """Does what plan() found; `done` is called for each page that was counted there."""
        self._find_moved(self._arrivals)
        for document in self._arrivals:
            self._take_all(document)
            for missing in self.results[document.path].missing.values():
                self._pass_over(missing)
        self._read(self._todo, done)
        self.flush()
        rest = []
        for document in self._copies:
            lacks = self._lacks_of(document.digest)
            self.results[document.path].missing |= lacks
            if not self._is_settled(document):
                rest.append(document)
                continue
            self._take_all(document)
            for missing in lacks.values():
                self._miss(document, missing)
            for _ in range(document.pages or 1):
                done()
        self._read(rest, done)
        self.flush()
        self._remove_surplus()

    def _lacks_of(self, digest: bytes) -> dict[int | None, Missing]:
        """What was just found to be missing in a file of these bytes."""
        found = [result for result in self.results.values() if result.document.digest == digest and not result.retry]
        return {number: missing for result in found for number, missing in result.missing.items()}

    def _find_moved(self, documents: Sequence[Document]) -> None:
        """Which of these files the index knows from another path, where they are not any more."""
        new = {content: document for document in documents for content in self._new_contents(document)}
        for source in self._sources if new else ():
            content = self.index.content_of(f"{source}#{self._sources.numbers(source)[0]}")
            if content in new and self._sources.is_gone(source) and self._sources.place(source) not in self.awaited:
                self._from.setdefault(new[content].path, []).append(source)

    def _new_contents(self, document: Document) -> Iterator[bytes]:
        """Of the pages that the index does not have where the file is."""
        for number in range(1, (document.pages or 0) + 1):
            if not self._is_there(document, number):
                yield self._content(document, number)

    def _read(self, documents: Sequence[Document], done: Callable[[], None]) -> None:
        by_path = {document.path: document for document in documents}

        def wanted(path: str, number: int) -> bool:
            """Whether a page is to be embedded; one for which there are vectors is taken."""
            needed = self._needs(by_path[path], number)
            if not needed:
                done()
            return needed

        for outcome in self.pages.embed(list(by_path), wanted) if by_path else ():
            document = by_path[outcome.path]
            if isinstance(outcome, PageError):
                self._fail(document, outcome.number, outcome.reason)
            elif document.changed:
                self._put_off(document, outcome.number)
            elif isinstance(outcome, BlankPage):
                self._miss(document, Missing(outcome.number, "blank", blank=True))
            else:
                self._add(document, outcome)
            done()

    def _needs(self, document: Document, number: int) -> bool:
        if self._has_vectors(self._content(document, number)):
            self._take(document, number)
        elif number in (lacks := self.results[document.path].missing):
            self._pass_over(lacks[number])
        elif document.changed:
            self._put_off(document, number)
        else:
            return True
        return False

    def _content(self, document: Document, number: int) -> bytes:
        return page_content(document.digest, number, self.settings)

    def indexed(self, document: Document) -> int:
        """How many pages of a file are in the index, as they are now."""
        return sum(self._is_there(document, number) for number in range(1, (document.pages or 0) + 1))

    def _is_there(self, document: Document, number: int) -> bool:
        return self.index.knows(document.page_id(number), self._content(document, number))

    def _has_vectors(self, content: bytes) -> bool:
        return content in self._pending or self.index.has_content(content)

    def _take_all(self, document: Document) -> None:
        """Takes all pages of a file for which there are vectors; the others are known to be missing."""
        for number in range(1, (document.pages or 0) + 1):
            if self._has_vectors(self._content(document, number)):
                self._take(document, number)

    def _pass_over(self, missing: Missing) -> None:
        if missing.blank:
            self.blank += 1
        else:
            self.failed_before += 1

    def _take(self, document: Document, number: int) -> None:
        """A page for which there are vectors."""
        content = self._content(document, number)
        warning = self._pending[content] if content in self._pending else self.index.warning_of(content)
        self.results[document.path].warned |= warning is not None
        if not self._is_there(document, number):
            self.shared += 1
            self._warn(document, number, warning)
        elif self.metadata is None:
            self.skipped += 1
            return
        self._wait(document, number, None, None)

    def _add(self, document: Document, page: EmbeddedPage) -> None:
        """A page that is new."""
        self._pending[self._content(document, page.number)] = page.warning
        self.results[document.path].warned |= page.warning is not None
        self._warn(document, page.number, page.warning)
        self._wait(document, page.number, page.vectors, page.warning)

    def _warn(self, document: Document, number: int, warning: str | None) -> None:
        if warning is not None:
            self.warnings.append(f"{place_of(document.path, number)}: {warning}")

    def _miss(self, document: Document, missing: Missing) -> None:
        self.results[document.path].missing[missing.number] = missing
        self.blank += missing.blank
        if not missing.blank:
            self._complain(document, missing.number, missing.reason)

    def _put_off(self, document: Document, number: int) -> None:
        """A page of a file that changed while it was read."""
        result = self.results[document.path]
        if result.retry is None:
            result.retry = "was changed while it was being read"
            self._complain(document, number, f"{result.retry}: add it again")

    def _fail(self, document: Document, number: int | None, reason: str) -> None:
        """A page, or the rest of a file, that could not be read. What the index has of it stays."""
        if number is not None and self._is_there(document, number):
            self.skipped += 1
            return
        self._miss(document, Missing(number, reason))
        if document.changed:
            self.results[document.path].retry = "was changed while it was being read"

    def _complain(self, document: Document, number: int | None, reason: str) -> None:
        numbers = self._sources.numbers(document.source) if number is None else [number]
        old = [n for n in numbers if document.page_id(n) in self.index and not self._is_there(document, n)]
        kept = f"; {len(old)} pages of an older version stay in the index" if old else ""
        if old and number is not None:
            kept = "; the index keeps it from an older version of the file"
        self.failures.append(f"{place_of(document.path, number)}: {reason}{kept}")

    def _wait(self, document: Document, number: int, vectors: Vectors | None, warning: str | None) -> None:
        page = NewPage(
            id=document.page_id(number),
            vectors=vectors,
            source=document.source,
            page=number,
            metadata=self._metadata(document, number),
            content=self._content(document, number),
            warning=warning,
            folder=document.folder,
        )
        self._waiting.append(page)
        many = len(self._pending) >= FLUSH_PAGES or len(self._waiting) >= FLUSH_RECORDS
        if many or time.monotonic() > self._flushed + FLUSH_SECONDS:
            self.flush()

    def _metadata(self, document: Document, number: int) -> dict[str, Any]:
        """What was given; else what the page has, or had where its file was before."""
        if self.metadata is not None:
            return self.metadata
        before = [f"{source}#{number}" for source in [document.source, *self._from.get(document.path, [])]]
        indexes = [self.index] if self.before is None else [self.index, self.before]
        there = ((index, name) for name in before for index in indexes if name in index)
        return next((dict(index.info(name).metadata) for index, name in there), {})

    def flush(self) -> None:
        """Makes what is waiting durable."""
        done = self.index.add(self._waiting, bundle=self.pages.bundle)
        self.added, self.skipped = self.added + done.added, self.skipped + done.skipped
        self.changed += done.changed
        for page in self._waiting:
            self._sources.add(page.source, page.folder, page.page)
        self._waiting, self._pending, self._flushed = [], {}, time.monotonic()

    # Removing ---------------------------------------------------------------------------------------------------------

    def _remove_surplus(self) -> None:
        """Removes pages that files do not have any more, and those of paths that files were moved from."""
        documents = [result.document for result in self.results.values()]
        surplus = {document.source: self._surplus(document) for document in documents}
        left = {source: self._sources.numbers(source) for sources in self._from.values() for source in sources}
        self.removed, self.moved = sum(map(len, surplus.values())), len(left)
        self.left = [self._sources.place(source) for source in left]
        remove_pages(self.index, self._sources, {**surplus, **left})

    def _surplus(self, document: Document) -> list[int]:
        """Pages that a file does not have any more: none, unless all that it has now are in the index, or blank."""
        if document.pages is None:
            return []
        there = [n for n in self._sources.numbers(document.source) if document.page_id(n) in self.index]
        lacks = self.results[document.path].missing
        blank = {number for number, missing in lacks.items() if missing.blank}
        surplus = [number for number in there if number > document.pages or number in blank]
        numbers = (number for number in range(1, document.pages + 1) if number not in blank)
        whole = all(self._is_there(document, number) for number in numbers)
        if surplus and (not whole or document.changed):
            self.notes.append(
                f"kept: {document.path}: {len(surplus)} pages that only an older version of it has; "
                "they go when all pages of the file can be read"
            )
            return []
        return surplus


def remove_pages(index: Index, sources: Sources, pages: Mapping[str, Sequence[int]]) -> None:
    """Takes pages, by source and number, out of an index."""
    ids = [name for source, numbers in pages.items() for n in numbers if (name := f"{source}#{n}") in index]
    if ids:
        index.remove(ids)
    for source, numbers in pages.items():
        sources.remove(source, numbers)

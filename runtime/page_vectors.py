"""From files to vectors, one page at a time: the way of every command and service that embeds documents."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.embed.embedder import FULL, Budget, Embedder
from cembed.runtime.engines.session import return_freed
from cembed.runtime.errors import CembedError
from cembed.runtime.pages.documents import Page, PageError, PageReader, find_documents, place_of

NO_MEMORY = "needs more memory than there is, or than this process may have"
RETURNED_AFTER = 64
"""Pages: memory that is free then goes back. 1,000 pages of as many sizes took 45 MiB more without it."""


@dataclass(frozen=True, eq=False)
class EmbeddedPage:
    """A page's `vectors`, float32 [num_vectors, dim] of length 1; the rest is what its `Page` had."""

    path: str
    number: int
    vectors: Vectors
    warning: str | None = None

    @property
    def place(self) -> str:
        """As messages name it."""
        return place_of(self.path, self.number)


def embed_documents(
    embedder: Embedder, paths: Iterable[str | Path], budget: Budget = FULL, reader: PageReader | None = None
) -> Iterator[EmbeddedPage | PageError]:
    """Every page of every document at `paths`, files or folders of them, in order: its vectors, or why it has none.

    One page is in memory at a time, while the next one is being decoded by a process that ends with the iteration.
    `budget` is as for `Embedder.embed_images`. `reader` says how files are read, such as `PageReader(dpi=200)`; it must
    not be in use. A page that cannot be read or embedded is a PageError, and the others go on.
    Raises CembedError, before the first page: what `find_documents` refuses, a budget that the bundle does not have, a
    damaged graph.
    """
    files = find_documents(paths)
    embedder.prepare("document", budget)
    return _embed_files(embedder, files, budget, reader or PageReader())


def _embed_files(
    embedder: Embedder, files: list[Path], budget: Budget, reader: PageReader
) -> Iterator[EmbeddedPage | PageError]:
    with reader as opened:
        yield from embed_pages(embedder, opened.read(files), budget)


def embed_pages(
    embedder: Embedder, pages: Iterable[Page | PageError], budget: Budget = FULL
) -> Iterator[EmbeddedPage | PageError]:
    """`embed_documents` for pages of a `PageReader` that the caller holds open, to count them first or to pick some.

    A PageError is passed on. No image is kept: when the next page is asked for, the one before it may go.
    """
    numbers = count(1)  # enumerate would keep the page
    for page in pages:
        if next(numbers) % RETURNED_AFTER == 0:
            return_freed()
        outcome = page if isinstance(page, PageError) else _embed(embedder, page, budget)
        del page  # its image may be the largest thing in memory
        yield outcome


def _embed(embedder: Embedder, page: Page, budget: Budget) -> EmbeddedPage | PageError:
    try:
        vectors = embedder.embed_image(page.image, budget)
    except CembedError as error:
        return PageError(page.path, page.number, str(error))
    except MemoryError:
        if resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY:
            raise  # it is no fault of the page
        return PageError(page.path, page.number, NO_MEMORY)
    return EmbeddedPage(page.path, page.number, vectors, page.warning)

"""Pages on their way into an index: checked, gathered into batches, and encoded for each tier."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError
from cembed.runtime.finite import not_finite
from cembed.runtime.index.columns import StoredVectors
from cembed.runtime.index.known_pages import KnownPages, Told
from cembed.runtime.index.metadata import MAX_TEXT, Notes
from cembed.runtime.index.records import CONTENT_BYTES
from cembed.runtime.index.segments import MAX_ROWS
from cembed.runtime.index.writer import StoredPage
from cembed.runtime.scoring.storage import STORAGE

BATCH_PAGES = 2048
BATCH_BYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class NewPage:
    """A page to add: `vectors` float32 [K, D], a name that no other page has, and what searches shall tell of it.

    `page` counts from 1 in the file `source`; `metadata` is what JSON can hold, for filters. `content`, up to 16 bytes,
    is a hash of what the vectors were made from: where an index has it, under whatever id, its vectors and their
    warning count for this page too, and `vectors` may be None. `warning` is a line that says why something of the page
    may be missing; `folder` where a relative `source` starts.
    """

    id: str
    vectors: Vectors | None
    source: str = ""
    page: int = 1
    metadata: Mapping[str, Any] = field(default_factory=dict)
    content: bytes = b""
    warning: str | None = None
    folder: str | None = None


def page_content(digest: bytes, number: int, settings: str) -> bytes:
    """The `content` of a page by the sha256 of its file, its number, and what its vectors depend on beside it."""
    return hashlib.sha256(digest + f"{number} {settings}".encode()).digest()[:CONTENT_BYTES]


@dataclass(frozen=True, eq=False)
class Draft:
    """A page that was checked and has its place; its vectors are a copy, or those of the page with the serial `of`."""

    serial: int
    page: NewPage
    vectors: Vectors | None
    metadata: str
    of: int

    @property
    def weight(self) -> int:
        """Bytes it holds, about."""
        held = 0 if self.vectors is None else self.vectors.nbytes
        return held + len(self.metadata) + len(self.page.id) + len(self.page.source)

    def stored(self, vectors: StoredVectors, of: int) -> StoredPage:
        """As it is appended, with its vectors, or those of the page `of` in the same segment."""
        page, content = self.page, self.page.content.ljust(CONTENT_BYTES, b"\0")
        return StoredPage(
            serial=self.serial,
            id=page.id,
            source=page.source,
            number=page.page,
            metadata=self.metadata,
            content=content,
            vectors=vectors,
            of=of,
        )


def encode(vectors: Vectors, tiers: Sequence[str]) -> StoredVectors:
    encoded = {tier: STORAGE[tier].encode(vectors) for tier in tiers}
    scale = next((scale for tier, (_, scale) in encoded.items() if STORAGE[tier].has_scale), 1.0)
    stored = {tier: data for tier, (data, _) in encoded.items()}
    return StoredVectors(len(vectors), scale, stored, {tier: zlib.crc32(data.data) for tier, data in stored.items()})


def check_vectors(page: NewPage, dim: int, tiers: Sequence[str]) -> Vectors:
    """A copy of a page's vectors. Raises CembedError: they cannot be kept."""
    if page.vectors is None:
        raise CembedError(f"page {page.id!r} has no vectors, and no page of this index has its content")
    if np.ndim(page.vectors) != 2 or len(page.vectors) == 0 or page.vectors.shape[1] != dim:
        shape = np.shape(page.vectors)
        raise CembedError(f"page {page.id!r} has vectors of shape {shape}: this index takes [num_vectors, {dim}]")
    if len(page.vectors) > MAX_ROWS:
        raise CembedError(f"page {page.id!r} has {len(page.vectors)} vectors: at most {MAX_ROWS} are possible")
    with np.errstate(over="ignore"):
        vectors = np.array(page.vectors, order="C", dtype=np.float32)  # a copy: the caller may use the memory again
    largest = max(float(vectors.max()), -float(vectors.min()))
    if not largest < np.inf:
        raise not_finite(f"page {page.id!r}", np.asarray(page.vectors))
    if too_small := [tier for tier in tiers if largest > STORAGE[tier].largest]:
        raise CembedError(f"page {page.id!r} contains values that {too_small[0]} cannot hold: normalise its vectors")
    return vectors


def check_texts(page: NewPage) -> None:
    """Raises CembedError: texts that cannot be kept."""
    if not page.id or max(len(page.id), len(page.source)) > MAX_TEXT:
        raise CembedError(f"page id {page.id[:50]!r}: ids are not empty, and texts not longer than {MAX_TEXT}")
    if not 0 <= page.page < 1 << 31:
        raise CembedError(f"page {page.id!r} has page number {page.page}: 0 to {(1 << 31) - 1} are possible")
    if len(page.content) > CONTENT_BYTES:
        raise CembedError(f"page {page.id!r} has a content hash of {len(page.content)} bytes: keep {CONTENT_BYTES}")


@dataclass
class Batch:
    drafts: list[Draft] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    weight: int = 0

    def has_room(self, draft: Draft) -> bool:
        """A page that replaces one of the same batch has to wait for the next."""
        full = len(self.drafts) == BATCH_PAGES or self.weight + draft.weight > BATCH_BYTES
        return not full and draft.page.id not in self.names

    def add(self, draft: Draft, old: int | None) -> None:
        """With the serial of the page that it takes the place of."""
        self.drafts.append(draft)
        self.names.add(draft.page.id)
        self.removed += [] if old is None else [old]
        self.weight += draft.weight

    def encode(self, tiers: Sequence[str]) -> tuple[Batch, dict[int, StoredVectors]]:
        """With the vectors of the pages that have their own, by serial."""
        return self, {d.serial: encode(d.vectors, tiers) for d in self.drafts if d.vectors is not None}


@dataclass
class Gathering:
    """Makes batches of the pages that are not known yet; keeps `known` up to date, and counts.

    `serial` is that of the next page. The other numbers are those of `Added`.
    """

    known: KnownPages
    serial: int
    dim: int
    tiers: Sequence[str]
    added: int = 0
    replaced: int = 0
    skipped: int = 0
    changed: int = 0

    def batches(self, pages: Iterable[NewPage]) -> Iterator[Batch]:
        """Raises CembedError: a page that cannot be kept."""
        batch = Batch()
        for page in pages:
            draft = self._draft(page)
            if draft is None:
                self.skipped += 1
                continue
            if batch.drafts and not batch.has_room(draft):
                yield batch
                batch = Batch()
            batch.add(draft, self.known.serial(page.id))
            self._count(draft.page)
            told = Told(page.source, page.page, draft.metadata)
            self.known.put(page.id, draft.serial, page.content, told, draft.page.warning)
            self.serial += 1
        if batch.drafts:
            yield batch

    def _draft(self, page: NewPage) -> Draft | None:
        """None for a page that is there as it is."""
        check_texts(page)
        of = self.known.vectors_of(page.content, alive=page.vectors is not None)
        if of is not None:
            page = replace(page, warning=self.known.warning_of(page.content))
        metadata = Notes(page.metadata, page.warning, page.folder).encode(page.id)
        there = of is not None and self.known.has(page.id, page.content)
        if there and self.known.says(page.id, Told(page.source, page.page, metadata)):
            return None
        vectors = check_vectors(page, self.dim, self.tiers) if of is None else None
        return Draft(self.serial, page, vectors, metadata, self.serial if of is None else of)

    def _count(self, page: NewPage) -> None:
        if self.known.has(page.id, page.content):
            self.changed += 1
            return
        self.added += 1
        self.replaced += self.known.serial(page.id) is not None

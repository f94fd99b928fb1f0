"""Pages on their way into an index: checked, gathered into batches, and encoded for each tier."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cembed.runtime.errors import CembedError
from cembed.runtime.finite import not_finite
from cembed.runtime.index_writer import StoredPage
from cembed.runtime.known_pages import KnownPages
from cembed.runtime.records import CONTENT_BYTES
from cembed.runtime.segments import MAX_ROWS
from cembed.runtime.storage import STORAGE
from cembed.runtime.vectors import Vectors

MAX_TEXT = 1 << 20
BATCH_PAGES = 2048
BATCH_BYTES = 32 << 20

_LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True, eq=False)
class NewPage:
    """A page to add: `vectors` float32 [K, D], a name that no other page has, and what searches shall tell of it.

    `page` counts from 1 in the file `source`; `metadata` is what JSON can hold, for filters. `content`, up to 16 bytes,
    is a hash of what the vectors were made from: where an index has it, the page is skipped.
    """

    id: str
    vectors: Vectors
    source: str = ""
    page: int = 1
    metadata: Mapping[str, Any] = field(default_factory=dict)
    content: bytes = b""


@dataclass(frozen=True, eq=False)
class Draft:
    """A page that was checked and has its place; its vectors are a copy."""

    serial: int
    page: NewPage
    vectors: Vectors
    metadata: str

    @property
    def weight(self) -> int:
        """Bytes it holds, about."""
        return self.vectors.nbytes + len(self.metadata) + len(self.page.id) + len(self.page.source)

    def encode(self, tiers: Sequence[str]) -> StoredPage:
        encoded = {tier: STORAGE[tier].encode(self.vectors) for tier in tiers}
        page, scale = self.page, encoded["u8"][1] if "u8" in encoded else 1.0
        stored = {tier: data for tier, (data, _) in encoded.items()}
        crcs = {tier: zlib.crc32(data.data) for tier, data in stored.items()}
        content = page.content.ljust(CONTENT_BYTES, b"\0")
        return StoredPage(
            self.serial, page.id, page.source, page.page, self.metadata, content, len(self.vectors), scale, stored, crcs
        )


def draft(page: NewPage, serial: int, dim: int, tiers: Sequence[str]) -> Draft:
    """Raises CembedError: vectors or texts that cannot be kept."""
    _check_texts(page)
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
    if largest > _LARGEST_HALF and "f16" in tiers:
        raise CembedError(f"page {page.id!r} contains values that f16 cannot hold: normalise its vectors")
    return Draft(serial, page, vectors, encode_metadata(page) if page.metadata else "{}")


def _check_texts(page: NewPage) -> None:
    if not page.id or max(len(page.id), len(page.source)) > MAX_TEXT:
        raise CembedError(f"page id {page.id[:50]!r}: ids are not empty, and texts not longer than {MAX_TEXT}")
    if not 0 <= page.page < 1 << 31:
        raise CembedError(f"page {page.id!r} has page number {page.page}: 0 to {(1 << 31) - 1} are possible")
    if len(page.content) > CONTENT_BYTES:
        raise CembedError(f"page {page.id!r} has a content hash of {len(page.content)} bytes: keep {CONTENT_BYTES}")


def encode_metadata(page: NewPage) -> str:
    """Raises CembedError: not what JSON can hold."""
    try:
        text = json.dumps(dict(page.metadata), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise CembedError(f"the metadata of page {page.id!r} cannot be kept as JSON: {error}") from error
    if len(text) > MAX_TEXT:
        raise CembedError(f"the metadata of page {page.id!r} is longer than {MAX_TEXT}")
    return text


@dataclass
class Batch:
    drafts: list[Draft]
    removed: list[int]
    weight: int = 0

    def encode(self, tiers: Sequence[str]) -> tuple[list[StoredPage], list[int]]:
        return [draft.encode(tiers) for draft in self.drafts], self.removed


def gather(
    pages: Iterable[NewPage], known: KnownPages, serial: int, dim: int, tiers: Sequence[str], counts: dict[str, int]
) -> Iterator[Batch]:
    """Batches of the pages that are not known yet, and what they replace; `known` and `counts` are kept up to date."""
    batch, names = Batch([], []), set[str]()
    for page in pages:
        if known.has(page.id, page.content):
            counts["skipped"] += 1
            continue
        new = draft(page, serial, dim, tiers)
        if len(batch.drafts) == BATCH_PAGES or batch.weight + new.weight > BATCH_BYTES or page.id in names:
            yield batch
            batch, names = Batch([], []), set()
        old = known.serial(page.id)
        if old is not None:
            counts["replaced"] += 1
            batch.removed.append(old)
        known.put(page.id, serial, page.content)
        names.add(page.id)
        batch.drafts.append(new)
        batch.weight += new.weight
        serial += 1
    if batch.drafts:
        yield batch

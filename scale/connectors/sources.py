"""Where points come from: an index, or a folder of parts. Both can be read again and again.

A page may be in parts more than once, when its file was changed between two runs of `cembed embed`: the last row
counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.index.new_pages import NewPage
from cembed.runtime.index.reader import IndexReader
from cembed.runtime.index.records import CONTENT_BYTES
from cembed.runtime.scoring.storage import STORAGE
from cembed.scale.connectors.points import point_id
from cembed.scale.parts import Store, open_store
from cembed.scale.rows import VALUES, Row, RowSchema


@dataclass(frozen=True, eq=False)
class Survey:
    """What a source has: `pages` that count and `failed` rows, without vectors; the most vectors a page has, and which
    page; numbers of rows that do not count, since a later one is of the same page."""

    pages: int
    failed: int
    largest: int
    largest_page: str
    replaced: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


class Source(Protocol):
    """Rows with vectors, and why others have none."""

    @property
    def schema(self) -> RowSchema: ...

    def survey(self) -> Survey:
        """Looks at all rows, but not at their numbers."""

    def rows(self) -> Iterator[Row]:
        """All rows, the replaced ones too."""


@dataclass(frozen=True)
class IndexRows:
    """The pages of an index, with the vectors of its most exact storage type."""

    index: IndexReader

    @property
    def schema(self) -> RowSchema:
        return schema_of_index(self.index)

    def survey(self) -> Survey:
        page = self.index.largest()
        return Survey(0, 0, 0, "") if page is None else Survey(len(self.index), 0, page.vectors, page.id)

    def rows(self) -> Iterator[Row]:
        return map(row_of_page, self.index.pages())


def schema_of_index(index: IndexReader) -> RowSchema:
    kept = next((tier for tier in index.tiers if STORAGE[tier].bits in VALUES), "f32")
    return RowSchema(index.dim, index.bundle, "", kept, of_index=True)


def row_of_page(page: NewPage) -> Row:
    """A page of an index; one without a content hash gets that of its vectors."""
    assert page.vectors is not None
    content = page.content or hashlib.sha256(page.vectors.tobytes()).digest()[:CONTENT_BYTES]
    return Row(
        path=page.source,
        page=page.page,
        sha256=content.hex(),
        vectors=page.vectors,
        warning=page.warning,
        id=page.id,
        folder=page.folder,
        metadata=page.metadata,
    )


def rows_of_index(index: IndexReader) -> tuple[RowSchema, Iterator[Row]]:
    """The pages of an index in the order they were added. Raises CembedError, while it is read: damaged."""
    return schema_of_index(index), IndexRows(index).rows()


@dataclass(frozen=True)
class PartRows:
    """The rows of a folder of parts."""

    store: Store
    schema: RowSchema

    @classmethod
    def open(cls, path: str) -> PartRows:
        """Raises CembedError: no folder of parts, or none with rows."""
        store = open_store(path)
        schema = store.schema()
        if schema is None:
            raise CembedError(f"{path} has no rows: give a folder that `cembed embed --out` or `index export` wrote")
        return cls(store, schema)

    def survey(self) -> Survey:
        columns = ["path", "page", "vectors", *(["id"] if self.schema.of_index else [])]
        ids, counts = bytearray(), [np.empty(0, np.int64)]
        failed, largest, largest_page = 0, -1, ""
        for batch in self.store.batches(columns):
            found = pc.fill_null(pc.list_value_length(batch.column("vectors")), -1).to_numpy().astype(np.int64)
            names = page_ids(batch)
            ids += b"".join(point_id(name).bytes for name in names)
            counts.append(found)
            failed += int((found < 0).sum())
            if len(found) and found.max() > largest:
                largest, largest_page = int(found.max()), names[int(found.argmax())]
        rows = np.concatenate(counts)
        replaced = replaced_rows(bytes(ids), rows >= 0)
        return Survey(len(rows) - failed - len(replaced), failed, max(largest, 0), largest_page, replaced)

    def rows(self) -> Iterator[Row]:
        for batch in self.store.batches():
            yield from self.schema.rows(batch)


def page_ids(batch: Any) -> list[str]:
    if "id" in batch.schema.names:
        return list(batch.column("id").to_pylist())
    paths, pages = batch.column("path").to_pylist(), batch.column("page").to_pylist()
    return [f"{path}#{page}" for path, page in zip(paths, pages, strict=True)]


def replaced_rows(ids: bytes, counted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Numbers of those of the counted rows that a later one has the same id as; ids take 16 bytes each.

    >>> replaced_rows(b"a" * 16 + b"b" * 16 + b"a" * 32, np.array([True, True, True, False]))
    array([0])
    """
    halves = np.frombuffer(ids, np.uint64).reshape(-1, 2)
    rows = np.flatnonzero(counted)
    order = rows[np.lexsort((rows, halves[rows, 1], halves[rows, 0]))]
    same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    return np.sort(order[:-1][same])


def rows_that_count(source: Source, survey: Survey) -> Iterator[Row]:
    """Rows with vectors that no later one replaces, and failed ones."""
    replaced = iter(survey.replaced.tolist())
    skip = next(replaced, -1)
    for number, row in enumerate(source.rows()):
        if number == skip:
            skip = next(replaced, -1)
        else:
            yield row


def open_index(path: Any) -> IndexRows:
    """Raises CembedError: no index, or damage."""
    return IndexRows(Index.open(path))


def stored_as(schema: RowSchema, storage: str | None) -> RowSchema:
    """A schema with another type of components. Raises CembedError: rows cannot be of that type."""
    return schema if storage is None else replace(schema, storage=storage)

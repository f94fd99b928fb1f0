"""A row for each page: where it is from, what it holds, and its vectors or why it has none.

    path       string                     as it was given
    page       int32                      from 1; null where a whole file could not be read
    sha256     string                     of the file, in hex; empty where it could not be read
    bundle     string                     hash of the bundle that made the vectors
    settings   string                     what they depend on beside bundle, file and page, as JSON
    vectors    list<fixed_size_list<T>[dim]>   T float, halffloat or uint8; null where there are none
    scale      float                      uint8 only: a component is (level - 128) * scale
    warning    string                     why something of the page may be missing, else null
    error      string                     why there are no vectors, else null
    key        fixed_size_binary[16]      the same for the same page of the same file at the same path, and no other

Rows of an index have more; their sha256 is the page's content hash, 32 digits, as an index knows no more of the file:

    id         string                     the page's
    folder     string                     where a relative path starts, or null
    metadata   string                     JSON

Letters: n pages, K vectors of a page.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError
from cembed.runtime.index.new_pages import page_content
from cembed.runtime.index.records import CONTENT_BYTES
from cembed.runtime.scoring.storage import STORAGE, storage_of

VALUES = {32: pa.float32(), 16: pa.float16(), 8: pa.uint8()}
"""Arrow's types by the bits of a component."""
TOLD = ("id", "folder", "metadata")
KEY_BYTES = 16
METADATA = b"cembed"


@dataclass(frozen=True, eq=False)
class Row:
    """A page: `vectors` float32 [K, dim], or `error`. `page` is None where a whole file could not be read.

    `id`, `folder` and `metadata` are those of a page of an index.
    """

    path: str
    page: int | None
    sha256: str
    vectors: Vectors | None = None
    warning: str | None = None
    error: str | None = None
    id: str | None = None
    folder: str | None = None
    metadata: Mapping[str, Any] | None = None

    @property
    def page_id(self) -> str:
        """What `cembed index add` calls the page, unless it has an id."""
        return f"{self.path}#{self.page}" if self.id is None else self.id

    def content(self, settings: str) -> bytes:
        """The `content` of the page in an index."""
        digest = bytes.fromhex(self.sha256)
        return digest if len(digest) == CONTENT_BYTES else page_content(digest, self.page or 0, settings)

    def key(self, settings: str) -> bytes:
        told = None if self.id is None else [self.id, self.folder, self.warning, dict(self.metadata or {})]
        return row_key(self.path, self.sha256, self.page, settings, told)


def row_key(path: str, sha256: str, page: int | None, settings: str, told: Sequence[Any] | None = None) -> bytes:
    """Names a page of a file as it is now, None for all of the file; and what an index tells of it."""
    content = page_content(bytes.fromhex(sha256), page or 0, settings)
    more = "" if told is None else "\0" + json.dumps(told, sort_keys=True)
    return hashlib.sha256(content + f"{path}{more}".encode("utf-8", "surrogateescape")).digest()[:KEY_BYTES]


@dataclass(frozen=True)
class RowSchema:
    """What all rows of a table have in common; `storage` is the type of components: f32, f16 or u8.

    Rows `of_index` have an id, a folder and metadata.

    Raises CembedError: a type that Arrow has no values for.
    """

    dim: int
    bundle: str
    settings: str
    storage: str = "f32"
    of_index: bool = False

    def __post_init__(self) -> None:
        if storage_of(self.storage).bits not in VALUES:
            known = ", ".join(name for name, storage in STORAGE.items() if storage.bits in VALUES)
            raise CembedError(f"rows cannot be stored as {self.storage}: give one of {known}")

    @property
    def arrow(self) -> Any:
        """As pyarrow has it, with this schema in its metadata."""
        storage = STORAGE[self.storage]
        vectors = pa.list_(pa.list_(VALUES[storage.bits], self.dim))
        texts = [(name, pa.string()) for name in ("sha256", "bundle", "settings")]
        scale = [("scale", pa.float32())] if storage.has_scale else []
        ends = [("warning", pa.string()), ("error", pa.string()), ("key", pa.binary(KEY_BYTES))]
        told = [(name, pa.string()) for name in TOLD] if self.of_index else []
        fields = [("path", pa.string()), ("page", pa.int32()), *texts, ("vectors", vectors), *scale, *ends, *told]
        known = {name: value for name, value in asdict(self).items() if name != "of_index" or value}
        return pa.schema(fields, {METADATA: json.dumps(known).encode()})

    @classmethod
    def of(cls, schema: Any, where: str) -> RowSchema:
        """The schema of a table. Raises CembedError: it is none of cembed's."""
        try:
            return cls(**json.loads((schema.metadata or {})[METADATA]))
        except (KeyError, ValueError, TypeError):
            raise CembedError(
                f"{where} is not a table of cembed: it lacks the schema that cembed embed writes"
            ) from None

    def batch(self, rows: Sequence[Row]) -> Any:
        """Rows as a record batch."""
        columns: dict[str, Any] = {
            "path": [clean(row.path) for row in rows],
            "page": [row.page for row in rows],
            "sha256": [row.sha256 for row in rows],
            "bundle": [self.bundle] * len(rows),
            "settings": [self.settings] * len(rows),
            "warning": [row.warning for row in rows],
            "error": [row.error for row in rows],
            "key": [row.key(self.settings) for row in rows],
            "id": [clean(row.page_id) for row in rows],
            "folder": [None if row.folder is None else clean(row.folder) for row in rows],
            "metadata": [json.dumps(dict(row.metadata or {})) for row in rows],
        }
        columns["vectors"], columns["scale"] = self._vectors(rows)
        schema = self.arrow
        return pa.record_batch([pa.array(columns[field.name], field.type) for field in schema], schema=schema)

    def _vectors(self, rows: Sequence[Row]) -> tuple[Any, list[float | None]]:
        """One column of all vectors, without a copy of a row for each, and the scales of pages."""
        storage, value = STORAGE[self.storage], VALUES[STORAGE[self.storage].bits]
        stored = [None if row.vectors is None else storage.encode(self._checked(row.vectors)) for row in rows]
        data = np.concatenate([np.empty(0, np.uint8), *(each[0] for each in stored if each is not None)])
        values = pa.array(data.view(value.to_pandas_dtype()), value)
        counts = [0 if row.vectors is None else len(row.vectors) for row in rows]
        offsets = pa.array(np.cumsum([0, *counts]), pa.int32())
        missing = pa.array([row.vectors is None for row in rows])
        vectors = pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(values, self.dim), mask=missing)
        return vectors, [None if each is None else each[1] for each in stored]

    def _checked(self, vectors: Vectors) -> Vectors:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise CembedError(f"a page has vectors of shape {list(vectors.shape)}, the table has [K, {self.dim}]")
        return vectors

    def rows(self, batch: Any) -> Iterator[Row]:
        """The rows of a batch or table with these columns; of stored types, vectors are what is left of them."""
        for part in batch.to_batches() if isinstance(batch, pa.Table) else [batch]:
            yield from self._rows(part)

    def _rows(self, batch: Any) -> Iterator[Row]:
        storage, vectors = STORAGE[self.storage], batch.column("vectors")
        scales = batch.column("scale").to_pylist() if storage.has_scale else [1.0] * len(batch)
        offsets = vectors.offsets.to_numpy()
        values = vectors.values.values
        data = values.to_numpy(zero_copy_only=True).view(np.uint8)
        size = storage.vector_bytes(self.dim)
        names = ("path", "page", "sha256", "warning", "error")
        texts = zip(*(batch.column(name).to_pylist() for name in names), self._told(batch), strict=True)
        for i, (path, page, sha256, warning, error, told) in enumerate(texts):
            first, last = int(offsets[i]), int(offsets[i + 1])
            found = None
            if vectors[i].is_valid:
                found = storage.decode(data[first * size : last * size], last - first, self.dim, scales[i] or 1.0)
            yield Row(path, page, sha256, found, warning, error, *told)

    def _told(self, batch: Any) -> Iterator[tuple[Any, ...]]:
        """Id, folder and metadata of each row; nothing of rows that are none of an index."""
        if not self.of_index:
            yield from [()] * len(batch)
            return
        for page, folder, metadata in zip(*(batch.column(name).to_pylist() for name in TOLD), strict=True):
            yield page, folder, json.loads(metadata)


def clean(text: str) -> str:
    """Text that is UTF-8, of a file's name that may be none."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def keys_of(batch: Any) -> np.ndarray[Any, np.dtype[np.bytes_]]:
    """The column `key` of a batch or table, [n] of 16 bytes."""
    chunks = batch.column("key")
    chunks = chunks.chunks if isinstance(chunks, pa.ChunkedArray) else [chunks]
    parts = [
        np.frombuffer(chunk.buffers()[1], f"S{KEY_BYTES}")[chunk.offset : chunk.offset + len(chunk)] for chunk in chunks
    ]
    return np.concatenate([np.empty(0, f"S{KEY_BYTES}"), *parts])

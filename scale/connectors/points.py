"""A page as an engine takes it: an id that stays the same, vectors, and what is told beside them.

id         UUIDv5 of the page's id in NAMESPACE: the same page replaces itself
version    32 digits in hex; others as soon as anything of the page is another
page_id    the page's id in an index, or PATH#NUMBER
path, page, warning
sha256     of the file, in hex, where it is known
content    32 digits in hex: names the file's bytes, the page and the settings of the bundle
bundle     hash of the bundle that made the vectors
folder     where a relative path starts, if it is known
metadata   what JSON can hold
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError
from cembed.scale.rows import Row, RowSchema, clean

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_OID, "cembed")
TEXTS = ("page_id", "path", "sha256", "content", "version", "bundle", "warning", "folder")
"""Fields that are texts; beside them there are `page`, a number, and `metadata`."""
SHA256_DIGITS = 64
NEARLY_ONE = 0.02
LEVELS = 127


def point_id(page_id: str) -> uuid.UUID:
    """
    >>> point_id("scans/a.pdf#1"), point_id("scans/a.pdf#1") == uuid.uuid5(NAMESPACE, "scans/a.pdf#1")
    (UUID('780b75cb-b4c8-56c9-b7b2-5416bc2d2d6a'), True)
    """
    digest = hashlib.sha1(NAMESPACE.bytes + page_id.encode("utf-8", "surrogateescape")).digest()
    return uuid.UUID(bytes=digest[:16], version=5)


@dataclass(frozen=True, eq=False)
class Point:
    """A row with vectors; `vectors` float32 [K, dim] are those that the engine keeps."""

    row: Row
    schema: RowSchema
    vectors: Vectors

    @cached_property
    def id(self) -> str:
        return str(point_id(self.row.page_id))

    @cached_property
    def version(self) -> str:
        told = {name: value for name, value in self._told.items() if name != "page_id"}
        text = json.dumps([told, self.schema.dim, self.schema.storage], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @cached_property
    def fields(self) -> dict[str, Any]:
        """What is told of it, as JSON has it; None where there is nothing to tell."""
        return {**self._told, "version": self.version}

    @cached_property
    def _told(self) -> dict[str, Any]:
        row = self.row
        return {
            "page_id": clean(row.page_id),
            "path": clean(row.path),
            "page": row.page or 0,
            "sha256": row.sha256 if len(row.sha256) == SHA256_DIGITS else None,
            "content": row.content(self.schema.settings).hex(),
            "bundle": self.schema.bundle,
            "warning": row.warning,
            "folder": None if row.folder is None else clean(row.folder),
            "metadata": dict(row.metadata or {}),
        }

    @property
    def known(self) -> dict[str, Any]:
        """The fields that there is something to tell of."""
        return {name: value for name, value in self.fields.items() if value is not None}


def row_of(fields: Mapping[str, Any], vectors: Vectors) -> Row:
    """The row of an index that a point was made from, by what its engine tells."""
    return Row(
        path=fields["path"],
        page=int(fields["page"]),
        sha256=fields["content"],
        vectors=vectors,
        warning=fields.get("warning"),
        id=fields["page_id"],
        folder=fields.get("folder"),
        metadata=fields.get("metadata") or {},
    )


def check_unit(engine: str, row: Row) -> None:
    """Raises CembedError: vectors whose length is not one, where the engine's order would not be MaxSim's."""
    assert row.vectors is not None
    lengths = np.linalg.norm(row.vectors, axis=1)
    worst = int(np.abs(lengths - 1).argmax())
    if not abs(lengths[worst] - 1) <= NEARLY_ONE:
        raise CembedError(
            f"page {row.page_id} has a vector of length {lengths[worst]:.3f}: {engine} compares directions only, "
            "so all of them must have length one"
        )


def common_levels(vectors: Vectors) -> Vectors:
    """Numbers 0 to 255 of vectors of length one: (level - 128) / 127, the same for every page and query.

    >>> common_levels(np.array([[0.0, 1.0, -0.5]], np.float32))
    array([[128., 255.,  64.]], dtype=float32)
    """
    levels: Vectors = np.clip(np.rint(vectors * np.float32(LEVELS)) + 128, 0, 255)
    return levels


def restore_levels(vectors: Vectors) -> Vectors:
    """What is left of vectors of length one as `common_levels`."""
    restored: Vectors = (common_levels(vectors) - 128) / np.float32(LEVELS)
    return restored

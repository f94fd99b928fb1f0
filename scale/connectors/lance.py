"""LanceDB: a table with a row for each page, `vectors` as list<fixed_size_list<T>[dim]>, which its search of many
vectors takes.

It compares by cosine only: `_distance` is the number of query vectors less MaxSim. A place is a folder or a URI.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import missing_extra
from cembed.scale.connectors.points import TEXTS, Point, check_unit, row_of
from cembed.scale.connectors.sources import Survey
from cembed.scale.connectors.target import Place, Scores, Target, engine_errors
from cembed.scale.parts import Done, Keys
from cembed.scale.rows import KEY_BYTES, VALUES, Row

VECTORS = "vectors"


class Connector(Target):
    """A table of LanceDB."""

    engine = "LanceDB"
    cells: ClassVar = {32: "float", 16: "halffloat"}

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        try:
            import lancedb
        except ImportError as error:
            raise missing_extra("--to lance", "lancedb, pylance", "lance", error) from error
        self._where = place.require("lance", "folder or URI")
        with self._told():
            self._database = lancedb.connect(self._where)
        self._table: Any = None
        self._ids: Done | None = None

    def _told(self) -> contextlib.AbstractContextManager[None]:
        return engine_errors(f"LanceDB at {self._where}", ValueError, RuntimeError, OSError)

    @property
    def arrow(self) -> Any:
        """The table's schema."""
        texts = [(name, pa.string()) for name in ("id", *TEXTS, "metadata")]
        vectors = pa.list_(pa.list_(VALUES[self.storage.bits], self.schema.dim))
        return pa.schema([*texts, ("page", pa.int32()), (VECTORS, vectors)])

    def point(self, row: Row) -> Point:
        check_unit(self.engine, row)
        return super().point(row)

    def open(self, survey: Survey | None) -> None:
        name = self.place.collection
        with self._told():
            if name not in _tables(self._database):
                self.absent(survey)
                self._table = self._database.create_table(name, schema=self.arrow)
                return
            self._table = self._database.open_table(name)
            there = self._table.schema
            self.same("columns", ", ".join(there.names), ", ".join(self.arrow.names))
            self.same("vectors", there.field(VECTORS).type, self.arrow.field(VECTORS).type)
            for bundle in self._dataset().head(1, columns=["bundle"]).column("bundle").to_pylist():
                self.same("pages of bundle", bundle, self.schema.bundle)
            self._ids, self._versions = Done(self._keys("id")), Done(self._keys("id", "version"))

    def _keys(self, *columns: str) -> Iterator[Keys]:
        """Keys of what is there, to be kept in a file, so that memory does not grow with it."""
        for batch in self._dataset().to_batches(columns=list(columns)):
            texts = zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
            yield np.frombuffer(b"".join(_key("".join(row)) for row in texts), f"S{KEY_BYTES}")

    def _dataset(self) -> Any:
        return self._table.to_lance()

    def unsent(self, points: Sequence[Point]) -> list[Point]:
        if self._ids is None:
            return list(points)
        return [point for point in points if _key(point.id + point.version) not in self._versions]

    def send(self, points: Sequence[Point]) -> None:
        there = [point for point in points if self._ids is not None and _key(point.id) in self._ids]
        new = [point for point in points if self._ids is None or _key(point.id) not in self._ids]
        with self._told():
            if new:
                self._table.add(self.batch(new))
            if there:
                self._table.merge_insert("id").when_matched_update_all().execute(self.batch(there))

    def batch(self, points: Sequence[Point]) -> Any:
        """Points as rows of the table."""
        value = VALUES[self.storage.bits]
        data = np.concatenate([self.storage.encode(point.vectors)[0] for point in points])
        values = pa.array(data.view(value.to_pandas_dtype()), value)
        offsets = pa.array(np.cumsum([0, *(len(point.vectors) for point in points)]), pa.int32())
        columns = {name: [point.fields[name] for point in points] for name in (*TEXTS, "page")}
        columns["id"] = [point.id for point in points]
        columns["metadata"] = [json.dumps(point.fields["metadata"]) for point in points]
        vectors = pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(values, self.schema.dim))
        arrays = [
            vectors if field.name == VECTORS else pa.array(columns[field.name], field.type) for field in self.arrow
        ]
        return pa.record_batch(arrays, schema=self.arrow)

    def search(self, query: Vectors, top: int, only: Sequence[str] | None = None) -> dict[str, float]:
        with self._told():
            search = self._table.search(query, vector_column_name=VECTORS).distance_type("cosine").bypass_vector_index()
            if only is not None:
                listed = ", ".join(f"'{page}'" for page in only)
                search = search.where(f"id IN ({listed})", prefilter=True)
            found = search.limit(top).select(["id", "_distance"]).to_arrow().to_pylist()
        return {row["id"]: len(query) - row["_distance"] for row in found}

    def exact(self, query: Vectors, points: Sequence[Point]) -> Scores:
        alike = [Point(point.row, point.schema, _unit(point.vectors)) for point in points]
        return super().exact(_unit(query), alike)

    def count(self) -> int:
        with self._told():
            return int(self._table.count_rows())

    def rows(self) -> Iterator[Row]:
        with self._told():
            for batch in self._dataset().to_batches():
                yield from self._rows(batch)

    def _rows(self, batch: Any) -> Iterator[Row]:
        told = batch.drop_columns([VECTORS]).to_pylist()
        for fields, vectors in zip(told, batch.column(VECTORS), strict=True):
            numbers = vectors.values.flatten().to_numpy(zero_copy_only=False)
            metadata = json.loads(fields["metadata"])
            yield row_of({**fields, "metadata": metadata}, numbers.astype(np.float32).reshape(-1, self.schema.dim))


def _tables(database: Any) -> set[str]:
    """The names of all tables, which come in pieces."""
    names, page = set[str](), None
    while True:
        found = database.list_tables(page_token=page)
        names |= set(found.tables)
        page = found.page_token
        if not page:
            return names


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:KEY_BYTES]


def _unit(vectors: Vectors) -> Vectors:
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit

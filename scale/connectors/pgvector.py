"""PostgreSQL with pgvector: a table with a row for each page, `vectors` as vector(dim)[] or halfvec(dim)[], and a
function that is MaxSim.

A place is a connection string, as psql takes it; that of the environment, CEMBED_POSTGRES, if none is given.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError, missing_extra
from cembed.scale.connectors.points import TEXTS, Point, row_of
from cembed.scale.connectors.sources import Survey
from cembed.scale.connectors.target import Place, Target, engine_errors
from cembed.scale.rows import Row

DSN = "CEMBED_POSTGRES"
PASSWORD = re.compile(r"(://[^:@/]*:)[^@]*@|(password=)\S+")
MOST_DIM = 16_000
MOST_BYTES = 1 << 30
HEADER = ">iiIii"
"""Of an array as PostgreSQL sends it: dimensions, whether there are nulls, the type's number, length, first index."""
ROWS_AT_ONCE = 64
SECONDS = 15
NUMPY = {32: ">f4", 16: ">f2"}
FIELDS = (*TEXTS, "page", "metadata")
TABLE = """
CREATE TABLE {table} (
    id uuid PRIMARY KEY,
    page_id text NOT NULL,
    path text NOT NULL,
    page integer NOT NULL,
    sha256 text,
    content text NOT NULL,
    version text NOT NULL,
    bundle text NOT NULL,
    warning text,
    folder text,
    metadata jsonb NOT NULL,
    vectors {cell}({dim})[] NOT NULL
)
"""
FUNCTION = """
CREATE OR REPLACE FUNCTION cembed_maxsim(document {cell}[], query {cell}[]) RETURNS double precision
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT sum(best.similarity)
    FROM unnest(query) AS q(vector)
    CROSS JOIN LATERAL (SELECT max(-(d.vector <#> q.vector)) AS similarity FROM unnest(document) AS d(vector)) AS best
$$
"""
UPSERT = """
INSERT INTO {table} (id, {names}, vectors) VALUES ({values}, %b)
ON CONFLICT (id) DO UPDATE SET {replaced}, vectors = EXCLUDED.vectors
"""

COLUMN = """
SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = 'vectors'
"""
SEARCH = """
SELECT id::text, cembed_maxsim(vectors, %b) AS score FROM {table} {where} ORDER BY score DESC LIMIT %s
"""


class Packed(bytes):
    """An array as PostgreSQL takes it."""


class Connector(Target):
    """A table of PostgreSQL."""

    engine = "PostgreSQL"
    cells: ClassVar = {32: "vector", 16: "halfvec"}

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        try:
            import psycopg
        except ImportError as error:
            raise missing_extra("--to pgvector", "psycopg", "postgres", error) from error
        self._psycopg, dsn = psycopg, place.place or os.environ.get(DSN)
        if not dsn:
            raise CembedError(f"pgvector needs a connection: give --out postgresql://…, or set {DSN}")
        self.where = PASSWORD.sub(lambda found: f"{found[1]}…@" if found[1] else f"{found[2]}…", dsn)
        with self._told():
            self._connection = psycopg.connect(dsn, autocommit=True, connect_timeout=SECONDS)
        self._fresh, self._element = False, 0
        self._table = psycopg.sql.Identifier(place.collection)

    def _told(self) -> contextlib.AbstractContextManager[None]:
        return engine_errors(f"PostgreSQL at {self.where}", self._psycopg.Error, UnicodeError)

    def _run(self, query: str, values: Sequence[Any] | None = None, **names: Any) -> list[Any]:
        """Rows of a query, in which `{table}` and `names` are filled in."""
        with self._told(), self._connection.cursor(binary=True) as cursor:
            cursor.execute(self._filled(query, **names), values)
            return list(cursor.fetchall()) if cursor.description else []

    def _filled(self, query: str, **names: Any) -> Any:
        sql = self._psycopg.sql
        texts = {name: sql.SQL(str(value)) for name, value in names.items()}
        return sql.SQL(query).format(table=self._table, **texts)

    def open(self, survey: Survey | None) -> None:
        if survey is not None:
            self._check_size(survey)
        self._prepare()
        name = self._table.as_string(self._connection)
        ((missing,),) = self._run("SELECT to_regclass(%s) IS NULL", [name])
        self._fresh = bool(missing)
        if self._fresh:
            self.absent(survey)
            self._run(TABLE, cell=self.cell, dim=self.schema.dim)
            return
        there = self._run(COLUMN, [name])
        self.same("vectors", there[0][0] if there else "of no column", f"{self.cell}({self.schema.dim})[]")
        for bundle in self._run("SELECT bundle FROM {table} LIMIT 1"):
            self.same("pages of bundle", bundle[0], self.schema.bundle)

    def _prepare(self) -> None:
        """The extension, the function, and how arrays are sent."""
        self._run("CREATE EXTENSION IF NOT EXISTS vector")
        array = f"{self.cell}[]"
        ((element, whole),) = self._run("SELECT %s::regtype::oid, %s::regtype::oid", [self.cell, array])
        self._element = int(element)
        self._connection.adapters.register_dumper(Packed, _dumper(self._psycopg, int(whole)))
        ((missing,),) = self._run("SELECT to_regprocedure(%s) IS NULL", [f"cembed_maxsim({array},{array})"])
        if missing:
            self._run(FUNCTION, cell=self.cell)

    def _check_size(self, survey: Survey) -> None:
        if self.schema.dim > MOST_DIM:
            raise CembedError(f"these vectors have dim {self.schema.dim}: pgvector takes at most {MOST_DIM:,}")
        if survey.largest * (8 + self.storage.vector_bytes(self.schema.dim)) >= MOST_BYTES:
            raise CembedError(
                f"page {survey.largest_page} has {survey.largest} vectors of {self.schema.dim}: PostgreSQL takes at "
                "most 1 GB a value"
            )

    def unsent(self, points: Sequence[Point]) -> list[Point]:
        if self._fresh:
            return list(points)
        ids = [point.id for point in points]
        found = dict(self._run("SELECT id::text, version FROM {table} WHERE id = ANY(%s::uuid[])", [ids]))
        return [point for point in points if found.get(point.id) != point.version]

    def send(self, points: Sequence[Point]) -> None:
        json = self._psycopg.types.json.Jsonb
        rows = [
            (point.id, *({**point.fields, "metadata": json(point.fields["metadata"])}[name] for name in FIELDS),
             self.pack(point.vectors))
            for point in points
        ]  # fmt: skip
        insert = self._filled(
            UPSERT,
            names=", ".join(FIELDS),
            values=", ".join(["%s"] * (1 + len(FIELDS))),
            replaced=", ".join(f"{name} = EXCLUDED.{name}" for name in FIELDS),
        )
        with self._told(), self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.executemany(insert, rows)

    def pack(self, vectors: Vectors) -> Packed:
        """Vectors [K, dim] as an array of PostgreSQL, each a number of its type."""
        count, dim = vectors.shape
        cells = np.zeros(count, _cell(NUMPY[self.storage.bits], dim))
        cells["bytes"], cells["dim"], cells["numbers"] = cells.dtype.itemsize - 4, dim, vectors
        return Packed(struct.pack(HEADER, 1, 0, self._element, count, 1) + cells.tobytes())

    def unpack(self, data: bytes) -> Vectors:
        found = np.frombuffer(data, _cell(NUMPY[self.storage.bits], self.schema.dim), offset=struct.calcsize(HEADER))
        return np.ascontiguousarray(found["numbers"], np.float32)

    def search(self, query: Vectors, top: int, only: Sequence[str] | None = None) -> dict[str, float]:
        where = "" if only is None else "WHERE id = ANY(%s::uuid[])"
        values = [self.pack(query), *([] if only is None else [list(only)]), top]
        return dict(self._run(SEARCH, values, where=where))

    def count(self) -> int:
        return int(self._run("SELECT count(*) FROM {table}")[0][0])

    def rows(self) -> Iterator[Row]:
        names = (*FIELDS, "vectors")
        query = self._filled("SELECT {names} FROM {table}", names=", ".join(names))
        with self._told(), self._connection.transaction(), self._connection.cursor("cembed", binary=True) as cursor:
            cursor.itersize = ROWS_AT_ONCE
            for row in cursor.execute(query):
                fields = dict(zip(names, row, strict=True))
                yield row_of(fields, self.unpack(fields["vectors"]))

    def close(self) -> None:
        self._connection.close()


def _cell(numbers: str, dim: int) -> np.dtype[Any]:
    """An element of an array: how many bytes follow, dim, nothing, numbers; the greatest byte first."""
    return np.dtype([("bytes", ">i4"), ("dim", ">i2"), ("unused", ">i2"), ("numbers", numbers, (dim,))])


def _dumper(psycopg: Any, array: int) -> Any:
    class Dumper(psycopg.adapt.Dumper):  # type: ignore[misc]
        format, oid = psycopg.pq.Format.BINARY, array

        def dump(self, value: Packed) -> bytes:
            return value

    return Dumper

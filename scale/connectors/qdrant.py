"""Qdrant: a collection with one multivector, compared by MaxSim, and what is told of a page as payload.

A place is a URL, or a folder for the client's local mode. The API key is that of the environment, QDRANT_API_KEY.

uint8 has no sign, so that levels are `common_levels` and the distance is Euclid: for vectors of length one its order is
that of the dot product, and what is added to the levels does not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError, missing_extra
from cembed.scale.connectors.points import LEVELS, Point, check_unit, common_levels, row_of
from cembed.scale.connectors.sources import Survey
from cembed.scale.connectors.target import MIB, Place, Scores, Target, engine_errors
from cembed.scale.rows import Row

MOST_NUMBERS = 1_048_576
"""That the server takes of a point."""
NUMBER_BYTES = 24
"""Of a float32 as JSON, at most: sign, 17 digits, point, exponent, comma."""
KEY = "QDRANT_API_KEY"
VECTOR = "vectors"
IN_MEMORY = ":memory:"
SECONDS = 300
ROWS_AT_ONCE = 64


class Connector(Target):
    """A collection of Qdrant."""

    engine = "Qdrant"
    cells: ClassVar = {32: "float32", 16: "float16", 8: "uint8"}

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        try:
            import qdrant_client
            from httpx import InvalidURL
            from qdrant_client.common.client_exceptions import QdrantException
        except ImportError as error:
            raise missing_extra("--to qdrant", "qdrant-client", "qdrant", error) from error
        self._models = qdrant_client.models
        where, exceptions = place.require("qdrant", "URL or folder"), qdrant_client.http.exceptions
        told = (exceptions.ResponseHandlingException, exceptions.UnexpectedResponse, QdrantException, InvalidURL)
        self._where, self._failures = where, (*told, sqlite3.Error, ValueError, RuntimeError, OSError)
        self._fresh, self._is_remote = False, "://" in where
        with self._told():
            self._client = self.client(qdrant_client.QdrantClient, where)

    def client(self, kind: Any, where: str) -> Any:
        """Raises what the client raises: a folder that another process has open, a URL that is none."""
        if self._is_remote:
            key = os.environ.get(KEY)
            return kind(url=where, api_key=key, timeout=SECONDS, check_compatibility=False)
        return kind(where) if where == IN_MEMORY else kind(path=where, force_disable_check_same_thread=True)

    def _told(self) -> contextlib.AbstractContextManager[None]:
        return engine_errors(f"Qdrant at {self._where}", *self._failures)

    def point(self, row: Row) -> Point:
        if self.storage.has_scale:
            check_unit("Qdrant with uint8", row)
        return super().point(row)

    def params(self) -> Any:
        """The parameters of the collection's vector."""
        models = self._models
        return models.VectorParams(
            size=self.schema.dim,
            distance=models.Distance.EUCLID if self.storage.has_scale else models.Distance.DOT,
            datatype=models.Datatype(self.cell),
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
        )

    def open(self, survey: Survey | None) -> None:
        if survey is not None:
            self._check_size(survey)
        name = self.place.collection
        with self._told():
            self._fresh = not self._client.collection_exists(name)
            if self._fresh:
                self.absent(survey)
                self._client.create_collection(name, vectors_config={VECTOR: self.params()})
            else:
                self._check_collection()

    def _check_size(self, survey: Survey) -> None:
        numbers, dim = survey.largest * self.schema.dim, self.schema.dim
        what = f"page {survey.largest_page} has {survey.largest} vectors of {dim}"
        if numbers > MOST_NUMBERS:
            raise CembedError(
                f"{what}, {numbers:,} numbers: Qdrant takes at most {MOST_NUMBERS:,} a point; embed with fewer "
                "vectors (--num-vectors, --pool-factor)"
            )
        if numbers * NUMBER_BYTES > self.place.batch_bytes:
            raise CembedError(
                f"{what}, up to {-(-numbers * NUMBER_BYTES // MIB)} MiB in a request, and --batch allows "
                f"{self.place.batch_bytes // MIB}: give more, if the server takes as much"
            )

    def _check_collection(self) -> None:
        config = self._client.get_collection(self.place.collection).config.params.vectors
        names = ", ".join(config) if isinstance(config, dict) else "none"
        self.same("vectors named", VECTOR if VECTOR in names.split(", ") else names, VECTOR)
        ours, there = self.params(), config[VECTOR]
        self.same("vectors of dim", there.size, ours.size)
        self.same("the distance", there.distance.value, ours.distance.value)
        self.same("numbers of type", (there.datatype or self._models.Datatype.FLOAT32).value, self.cell)
        multi = there.multivector_config
        self.same("the comparator", None if multi is None else multi.comparator.value, "max_sim")
        points, _ = self._client.scroll(self.place.collection, limit=1, with_payload=["bundle"])
        for point in points:
            self.same("pages of bundle", (point.payload or {}).get("bundle"), self.schema.bundle)

    def numbers(self, vectors: Vectors) -> list[list[float]]:
        """Vectors of a page or query as they are sent."""
        sent = common_levels(vectors) if self.storage.has_scale else vectors
        return sent.tolist()  # type: ignore[no-any-return]

    def weight(self, point: Point) -> int:
        return point.vectors.size * NUMBER_BYTES + len(json.dumps(point.known)) + 100

    def unsent(self, points: Sequence[Point]) -> list[Point]:
        if self._fresh:
            return list(points)
        ids = [point.id for point in points]
        with self._told():
            found = self._client.retrieve(self.place.collection, ids, with_payload=["version"], with_vectors=False)
        versions = {str(record.id): (record.payload or {}).get("version") for record in found}
        return [point for point in points if versions.get(point.id) != point.version]

    def send(self, points: Sequence[Point]) -> None:
        made = [
            self._models.PointStruct(id=point.id, vector={VECTOR: self.numbers(point.vectors)}, payload=point.known)
            for point in points
        ]
        with self._told():
            self._client.upsert(self.place.collection, made, wait=True)

    def search(self, query: Vectors, top: int, only: Sequence[str] | None = None) -> dict[str, float]:
        models = self._models
        with self._told():
            found = self._client.query_points(
                self.place.collection,
                query=self.numbers(query),
                using=VECTOR,
                query_filter=models.Filter(must=[models.HasIdCondition(has_id=list(only))]) if only else None,
                search_params=models.SearchParams(exact=True) if self._is_remote else None,
                limit=top,
                with_payload=False,
            ).points
        return {str(point.id): point.score for point in found}

    def exact(self, query: Vectors, points: Sequence[Point]) -> Scores:
        if not self.storage.has_scale:
            return super().exact(query, points)
        return np.array([euclid(common_levels(query), common_levels(point.vectors)) for point in points])

    @property
    def tolerance(self) -> float:
        """Distances of levels are `LEVELS` times as large."""
        return super().tolerance * (LEVELS if self.storage.has_scale else 1)

    def count(self) -> int:
        with self._told():
            return int(self._client.count(self.place.collection, exact=True).count)

    def rows(self) -> Iterator[Row]:
        offset: Any = None
        while True:
            with self._told():
                found, offset = self._client.scroll(
                    self.place.collection, limit=ROWS_AT_ONCE, offset=offset, with_payload=True, with_vectors=True
                )
            for record in found:
                yield row_of(record.payload, self._vectors(record.vector[VECTOR]))
            if offset is None:
                return

    def _vectors(self, numbers: Any) -> Vectors:
        vectors = np.asarray(numbers, np.float32)
        return (vectors - 128) / np.float32(LEVELS) if self.storage.has_scale else vectors

    def close(self) -> None:
        self._client.close()


def euclid(query: Vectors, page: Vectors) -> float:
    """What Qdrant makes of MaxSim by distances: the root of the sum of the squared ones to the nearest vectors.

    >>> euclid(np.array([[0.0, 0], [3, 4]], np.float32), np.array([[0.0, 0]], np.float32))
    5.0
    """
    apart = ((np.asarray(query, np.float64)[:, None] - page[None]) ** 2).sum(axis=-1)
    return float(np.sqrt(apart.min(axis=1).sum()))

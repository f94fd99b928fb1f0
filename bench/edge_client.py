"""Qdrant's engine in this process (qdrant-edge), behind the calls of qdrant-client that the connector makes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import qdrant_edge as edge
from qdrant_client import models

from cembed.scale.connectors.qdrant import Connector
from cembed.scale.connectors.target import Place

DISTANCES = {models.Distance.DOT: edge.Distance.Dot, models.Distance.EUCLID: edge.Distance.Euclid}
DATATYPES = {
    models.Datatype.FLOAT32: edge.VectorStorageDatatype.Float32,
    models.Datatype.FLOAT16: edge.VectorStorageDatatype.Float16,
    models.Datatype.UINT8: edge.VectorStorageDatatype.Uint8,
}


INDEXED_FROM = 100  # kB of a segment: below nothing is quantised


class EdgeClient:
    """A shard in a folder, which is one collection. With `quantization` a search is that of its graph and of quantised
    numbers alone, otherwise it is exact."""

    def __init__(self, folder: str, quantization: Any = None) -> None:
        self._folder, self._quantization = folder, quantization
        self._shard: Any = None
        self._params: dict[str, models.VectorParams] = {}

    def collection_exists(self, name: str) -> bool:
        return self._shard is not None

    def create_collection(self, name: str, vectors_config: dict[str, models.VectorParams]) -> None:
        os.makedirs(self._folder, exist_ok=True)
        self._params = vectors_config
        vectors = {
            name: edge.EdgeVectorParams(
                size=given.size,
                distance=DISTANCES[given.distance],
                multivector_config=edge.MultiVectorConfig(comparator=edge.MultiVectorComparator.MaxSim),
                datatype=DATATYPES[given.datatype],
                quantization_config=self._quantization,
            )
            for name, given in vectors_config.items()
        }
        optimizers = edge.EdgeOptimizersConfig(indexing_threshold=INDEXED_FROM) if self._quantization else None
        self._shard = edge.EdgeShard.create(self._folder, edge.EdgeConfig(vectors=vectors, optimizers=optimizers))

    def get_collection(self, name: str) -> Any:
        return SimpleNamespace(config=SimpleNamespace(params=SimpleNamespace(vectors=self._params)))

    def upsert(self, name: str, points: Sequence[models.PointStruct], wait: bool) -> None:
        made = [edge.Point(id=str(point.id), vector=point.vector, payload=point.payload) for point in points]
        self._shard.update(edge.UpdateOperation.upsert_points(made))

    def retrieve(self, name: str, ids: Sequence[str], with_payload: Any, with_vectors: bool) -> Any:
        return self._shard.retrieve(list(ids), with_payload=with_payload, with_vector=with_vectors)

    def scroll(
        self, name: str, limit: int, offset: Any = None, with_payload: Any = True, with_vectors: bool = False
    ) -> Any:
        request = edge.ScrollRequest(offset=offset, limit=limit, with_payload=with_payload, with_vector=with_vectors)
        return self._shard.scroll(request)

    def query_points(self, name: str, query: Any, using: str, query_filter: Any, limit: int, **more: Any) -> Any:
        only = query_filter and edge.Filter(must=[edge.HasIdCondition(set(query_filter.must[0].has_id))])
        nearest = edge.Query.Nearest(query, using=using)
        quantised = edge.QuantizationSearchParams(rescore=False)
        params = edge.SearchParams(quantization=quantised) if self._quantization else edge.SearchParams(exact=True)
        request = edge.QueryRequest(limit=limit, query=nearest, filter=only, params=params)
        return SimpleNamespace(points=self._shard.query(request))

    def count(self, name: str, exact: bool) -> Any:
        return SimpleNamespace(count=self._shard.count(edge.CountRequest(exact=exact)))

    def optimize(self) -> None:
        if self._quantization:
            self._shard.optimize()

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()


class EdgeConnector(Connector):
    """The connector to Qdrant, with its engine in this process."""

    def __init__(self, place: Place, quantization: Any = None) -> None:
        self._quantization = quantization
        super().__init__(place)

    def finish(self) -> None:
        self._client.optimize()

    def client(self, kind: Any, where: str) -> Any:
        return EdgeClient(where, self._quantization)

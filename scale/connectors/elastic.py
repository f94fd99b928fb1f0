"""Elasticsearch: lines for its bulk API, with a page's vectors as `rank_vectors`, and the mapping of the index."""

from __future__ import annotations

import json
import re
from typing import ClassVar

from cembed.runtime.errors import CembedError
from cembed.scale.connectors.json_files import JsonTarget
from cembed.scale.connectors.points import TEXTS, Point
from cembed.scale.connectors.sources import Survey

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
MOST_DIM = 4096


class Connector(JsonTarget):
    """A folder of bulk files for Elasticsearch from 8.18 on."""

    engine, target = "Elasticsearch", "elastic-json"
    cells: ClassVar = {32: "float", 16: "float", 8: "byte"}

    def check(self, survey: Survey) -> None:
        if not NAME.fullmatch(self.place.collection):
            raise CembedError(
                f"Elasticsearch has no index called {self.place.collection!r}: small letters, digits, -, _ and . are "
                "possible"
            )
        if self.schema.dim > MOST_DIM:
            raise CembedError(f"these vectors have dim {self.schema.dim}: Elasticsearch takes at most {MOST_DIM:,}")

    def schema_file(self) -> tuple[str, str]:
        texts: dict[str, dict[str, object]] = {name: {"type": "keyword"} for name in TEXTS}
        vectors: dict[str, object] = {"type": "rank_vectors", "element_type": self.cell, "dims": self.schema.dim}
        others: dict[str, dict[str, object]] = {"page": {"type": "integer"}, "metadata": {"type": "flattened"}}
        mapping = {"mappings": {"properties": {**texts, **others, "embedding": vectors}}}
        return f"{self.place.collection}.mapping.json", json.dumps(mapping, indent=1)

    def lines(self, point: Point) -> list[str]:
        action = {"index": {"_index": self.place.collection, "_id": point.id}}
        told = json.dumps(point.known, separators=(",", ":"))[:-1]
        arrays = ",".join(self.arrays(point.vectors))
        return [json.dumps(action, separators=(",", ":")), f'{told},"embedding":[{arrays}]}}']

"""A folder of parts, as `cembed embed --out` writes it: Parquet, or Lance by its name.

Nothing in it is changed: a page that is another now is one row more, and the last row of a page counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from cembed.runtime.errors import CembedError
from cembed.scale.connectors.points import Point
from cembed.scale.connectors.sources import PartRows, Survey
from cembed.scale.connectors.target import Place, Target
from cembed.scale.parts import Done, Keys, open_store
from cembed.scale.rows import VALUES, Row, keys_of


class Connector(Target):
    """A folder of parts."""

    engine = "a folder of parts"
    cells: ClassVar = {bits: str(value) for bits, value in VALUES.items()}

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._store = open_store(place.require("parquet", "DIR.parquet"))
        self._keys: Done | None = None

    def point(self, row: Row) -> Point:
        assert row.vectors is not None
        return Point(row, self.schema, row.vectors)

    def open(self, survey: Survey | None) -> None:
        there = self._store.schema()
        if there is None:
            return
        if different := [name for name, value in vars(self.schema).items() if getattr(there, name) != value]:
            raise CembedError(f"{self.where} has rows of another {', '.join(different)}: choose another folder")
        self._keys = Done(self._current())

    def _current(self) -> Iterator[Keys]:
        """Keys of the rows that count."""
        replaced, first = PartRows(self._store, self.schema).survey().replaced, 0
        for batch in self._store.batches(["key"]):
            keys = keys_of(batch)
            yield keys[~np.isin(np.arange(first, first + len(keys)), replaced)]
            first += len(keys)

    def unsent(self, points: Sequence[Point]) -> list[Point]:
        keys = self._keys
        return [point for point in points if keys is None or point.row.key(self.schema.settings) not in keys]

    def send(self, points: Sequence[Point]) -> None:
        self._store.append(self.schema.batch([point.row for point in points]))

    def rows(self) -> Iterator[Row]:
        for batch in self._store.batches():
            yield from self.schema.rows(batch)

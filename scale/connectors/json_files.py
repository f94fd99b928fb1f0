"""Files of JSON lines that an engine's own tool feeds, and the schema: as documented, not run against an engine.

A folder has `COLLECTION-00000.jsonl` and so on, each of at most the batch's bytes, and written whole or not at all.
They are written anew each time.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cembed.runtime.bundle.vectors import Vectors, write_whole
from cembed.runtime.errors import CembedError
from cembed.scale.connectors.points import LEVELS, Point, check_unit
from cembed.scale.connectors.sources import Survey
from cembed.scale.connectors.target import Place, Target
from cembed.scale.rows import Row

NUMBER_BYTES = 17
"""Of a number in nine digits, at most, and a comma: with nine a float32 comes back as it is."""


class JsonTarget(Target):
    """A folder of files for an engine."""

    target: ClassVar[str]

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.folder, self._next = Path(place.require(self.target, "folder")), 0

    def point(self, row: Row) -> Point:
        if self.storage.has_scale:
            check_unit(f"{self.engine} with bytes", row)
        return super().point(row)

    def open(self, survey: Survey | None) -> None:
        if survey is None:
            raise CembedError(f"files for {self.engine} cannot be read back: export to parquet")
        self.check(survey)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.glob(f"{self.place.collection}-[0-9]*.jsonl"):
                old.unlink()
        except OSError as error:
            raise CembedError(f"cannot write {self.folder}: {error.strerror or error}") from error
        self._write(*self.schema_file())

    @abstractmethod
    def check(self, survey: Survey) -> None:
        """Raises CembedError: names or vectors that the engine would not take."""

    @abstractmethod
    def schema_file(self) -> tuple[str, str]:
        """The name and text of the file that says what the lines are."""

    @abstractmethod
    def lines(self, point: Point) -> list[str]:
        """A point as JSON."""

    def weight(self, point: Point) -> int:
        return point.vectors.size * NUMBER_BYTES + len(json.dumps(point.known)) + 20 * len(point.vectors) + 200

    def send(self, points: Sequence[Point]) -> None:
        lines = [f"{line}\n" for point in points for line in self.lines(point)]
        self._write(f"{self.place.collection}-{self._next:05d}.jsonl", "".join(lines))
        self._next += 1

    def _write(self, name: str, text: str) -> None:
        write_whole(self.folder / name, lambda file: file.write(text.encode()))

    def arrays(self, vectors: Vectors) -> list[str]:
        """Each vector as a JSON array."""
        if self.storage.has_scale:
            return [json.dumps(row, separators=(",", ":")) for row in signed_levels(vectors).tolist()]
        form = ",".join(["%.9g"] * vectors.shape[1])
        return [f"[{form % tuple(row)}]" for row in vectors.tolist()]


def signed_levels(vectors: Vectors) -> Any:
    """
    >>> signed_levels(np.array([[0.0, 1.0, -0.5]], np.float32))
    array([[  0, 127, -64]], dtype=int8)
    """
    return np.rint(vectors * np.float32(LEVELS)).astype(np.int8)

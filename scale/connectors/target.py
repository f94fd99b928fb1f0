"""What a connector is: a place in an engine that takes points, and can be asked about them."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError, one_line
from cembed.runtime.scoring.maxsim import maxsim
from cembed.runtime.scoring.storage import STORAGE, by_exactness, storage_of
from cembed.scale.connectors import TARGETS
from cembed.scale.connectors.points import Point, restore_levels
from cembed.scale.connectors.sources import Survey
from cembed.scale.rows import Row, RowSchema

Scores = NDArray[np.float64]
MIB = 1 << 20
BATCH_MIB = 32
LONGEST_REASON = 300


@dataclass(frozen=True)
class Place:
    """Where pages go: `place` is a folder, URL or connection, as the target has it; `schema` is that of the points."""

    place: str | None
    schema: RowSchema
    collection: str = "pages"
    batch_bytes: int = BATCH_MIB * MIB

    def require(self, target: str, what: str) -> str:
        """`place`. Raises CembedError: it was not given."""
        if not self.place:
            raise CembedError(f"{target} needs a place: give --out {what}")
        return self.place


class Target(ABC):
    """A place in an engine. Methods are called in one thread at a time. All of them raise CembedError.

    `cells` are the engine's types of numbers, by the bits of a storage type; `where` names the place to a person.
    """

    engine: ClassVar[str]
    cells: ClassVar[Mapping[int, str]]

    def __init__(self, place: Place) -> None:
        self.place, self.schema, self.where = place, place.schema, place.place or self.engine
        self.storage = storage_of(self.schema.storage)
        if self.storage.bits not in self.cells:
            known = ", ".join(name for name in by_exactness() if STORAGE[name].bits in self.cells)
            raise CembedError(f"{self.engine} cannot keep {self.schema.storage}: give --storage with one of {known}")
        self.cell = self.cells[self.storage.bits]

    def point(self, row: Row) -> Point:
        """A row with the vectors that the engine will have. Raises CembedError: it cannot keep them."""
        assert row.vectors is not None
        restore = restore_levels if self.storage.has_scale else self.storage.restore
        return Point(row, self.schema, restore(row.vectors))

    @abstractmethod
    def open(self, survey: Survey | None) -> None:
        """Makes what points go into, or looks at what is there: another dim, type or bundle, points that are too large.
        Nothing was sent until this returns. Without a survey it is opened to be read, and nothing is made."""

    def weight(self, point: Point) -> int:
        """Bytes of a point in a request, at most."""
        return point.vectors.nbytes

    def unsent(self, points: Sequence[Point]) -> list[Point]:
        """Those of the points that are not there as they are."""
        return list(points)

    @abstractmethod
    def send(self, points: Sequence[Point]) -> None:
        """Puts points there, in the place of those with the same ids; they stay when this returns."""

    def finish(self) -> None:  # noqa: B027 most need nothing
        """After the last point."""

    def search(self, query: Vectors, top: int, only: Sequence[str] | None = None) -> dict[str, float] | None:
        """The engine's scores of the pages that fit a query [Q, dim] best, by the ids of points, the best one first.

        `only` are the ids among which it searches. None where there is no engine to ask.
        """
        return None

    def scores(self, query: Vectors, points: Sequence[Point]) -> Scores | None:
        """The engine's scores of points [n], NaN for one that is not found; None where there is no engine to ask."""
        found = self.search(query, len(points), [point.id for point in points])
        return None if found is None else np.array([found.get(point.id, np.nan) for point in points])

    def exact(self, query: Vectors, points: Sequence[Point]) -> Scores:
        """What is right for `scores`."""
        return np.asarray(maxsim([query], [point.vectors for point in points])[0], np.float64)

    @property
    def tolerance(self) -> float:
        """How far apart both may be, for each vector of a query: float32 sums, or queries rounded to the same type."""
        return {32: 1e-5, 16: 1e-3}.get(self.storage.bits, 1e-2)

    def count(self) -> int | None:
        """How many points there are; None where nobody counts."""
        return None

    def rows(self) -> Iterator[Row]:
        """All points as rows of an index, in any order."""
        raise CembedError(f"{self.engine}: nothing can be read back")

    def close(self) -> None:  # noqa: B027
        """Whatever ended the run."""

    def absent(self, survey: Survey | None) -> None:
        """What is to be read is not there. Raises CembedError."""
        if survey is None:
            raise CembedError(
                f"{self.engine} at {self.where} has no {self.place.collection!r}: give another collection"
            )

    def same(self, what: str, there: object, ours: object) -> None:
        """Raises CembedError: what is there differs."""
        if there != ours:
            raise CembedError(
                f"{self.engine} has a collection {self.place.collection!r} with {what} {there}, these pages have "
                f"{ours}: choose another --collection"
            )


@dataclass(frozen=True)
class TargetRows:
    """The points of a target that is open, as a source: the way back from an engine."""

    target: Target

    @classmethod
    @contextlib.contextmanager
    def open(cls, name: str, place: Place) -> Iterator[TargetRows]:
        """Raises CembedError: nothing is there, or with another dim, type or bundle."""
        with contextlib.closing(connect(name, place)) as target:
            target.open(None)
            yield cls(target)

    @property
    def schema(self) -> RowSchema:
        return replace(self.target.schema, of_index=True)

    def survey(self) -> Survey:
        return Survey(self.target.count() or 0, 0, 0, "")

    def rows(self) -> Iterator[Row]:
        return self.target.rows()


def connect(name: str, place: Place) -> Target:
    """The target of a name in TARGETS. Raises CembedError: an unknown one, a missing package, no such engine there."""
    if name not in TARGETS:
        raise CembedError(f"unknown target {name!r}: cembed has {', '.join(TARGETS)}")
    module = import_module(f"cembed.scale.connectors.{TARGETS[name]}")
    made: Target = module.Connector(place)
    return made


@contextlib.contextmanager
def engine_errors(where: str, *kinds: type[BaseException]) -> Iterator[None]:
    """What an engine says becomes one line that names it."""
    try:
        yield
    except kinds as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CembedError(f"{where}: {one_line(reason)[:LONGEST_REASON]}") from error

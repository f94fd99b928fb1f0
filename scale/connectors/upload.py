"""A source goes into a target: checked, in batches, the next one being made while one is sent, and queried back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from cembed.runtime.errors import CembedError
from cembed.scale.connectors.points import Point
from cembed.scale.connectors.sources import Source, rows_that_count
from cembed.scale.connectors.target import Target
from cembed.scale.rows import Row

BATCH_POINTS = 2048
SAMPLE = 20
QUERY_VECTORS = 16


class Sample:
    """Points taken at random, evenly, from all that pass; the same ones each time."""

    def __init__(self, size: int = SAMPLE) -> None:
        self.points, self._size, self._seen, self._random = list[Point](), size, 0, random.Random(0)

    def offer(self, point: Point) -> None:
        self._seen += 1
        if len(self.points) < self._size:
            self.points.append(point)
        elif (place := self._random.randrange(self._seen)) < self._size:
            self.points[place] = point


@dataclass
class Upload:
    """One run, and what it has done so far, whatever ends it: `sent` and `there` are pages, `failed` rows without
    vectors, `verified` the pages that were queried back."""

    source: Source
    target: Target
    sent: int = 0
    there: int = 0
    verified: int = 0
    failed: list[Row] = field(default_factory=list)
    sample: Sample = field(default_factory=Sample)

    def run(self, started: Callable[[int], None], done: Callable[[int], None]) -> None:
        """Sends what is not there yet; `started` gets the number of pages, `done` those of each batch.

        A signal that raises here leaves the batch that is being sent whole. Raises CembedError: nothing was sent if it
        cannot be kept there; an engine that fails; one that gives other scores than MaxSim.
        """
        survey = self.source.survey()
        self.target.open(survey)
        started(survey.pages)
        with ThreadPoolExecutor(1) as sender:
            waiting: Future[int] | None = None
            for batch in self._batches(rows_that_count(self.source, survey)):
                if waiting is not None:
                    done(waiting.result())
                waiting = sender.submit(self._put, batch)
            if waiting is not None:
                done(waiting.result())
        self.target.finish()
        count = self.target.count()
        if count is not None and count < survey.pages:
            raise CembedError(f"{self.target.engine} has {count} pages after {survey.pages} were sent: send them again")
        self._verify()

    def _batches(self, rows: Iterator[Row]) -> Iterator[list[Point]]:
        """Points in batches of the size that was asked for, or of one point that is larger."""
        batch, weight = list[Point](), 0
        for row in rows:
            if row.vectors is None:
                self.failed.append(row)
                continue
            point = self.target.point(row)
            self.sample.offer(point)
            more = self.target.weight(point)
            if batch and (weight + more > self.target.place.batch_bytes or len(batch) == BATCH_POINTS):
                yield batch
                batch, weight = [], 0
            batch.append(point)
            weight += more
        if batch:
            yield batch

    def _put(self, batch: list[Point]) -> int:
        new = self.target.unsent(batch)
        if new:
            self.target.send(new)
        self.sent, self.there = self.sent + len(new), self.there + len(batch) - len(new)
        return len(batch)

    def _verify(self) -> None:
        points = self.sample.points
        for point in points:
            query = point.vectors[:QUERY_VECTORS]
            found = self.target.scores(query, points)
            if found is None:
                return
            exact = self.target.exact(query, points)
            wrong = ~(np.abs(found - exact) <= self.target.tolerance * len(query))
            if wrong.any():
                place = int(wrong.argmax())
                raise CembedError(
                    f"{self.target.engine} gives page {points[place].row.page_id} a score of {found[place]:.6f} for "
                    f"the first vectors of {point.row.page_id}; MaxSim is {exact[place]:.6f}"
                )
            self.verified += 1

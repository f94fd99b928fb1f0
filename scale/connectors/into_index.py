"""Rows become pages of an index, without embedding: the way back from a folder of parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Added, Index
from cembed.runtime.index.new_pages import NewPage
from cembed.scale.connectors.sources import Source, Survey, rows_that_count
from cembed.scale.rows import Row


@dataclass
class IntoIndex:
    """One run; `failed` are rows without vectors. `metadata` goes with every page; without it pages that are there keep
    theirs, unless rows have their own."""

    source: Source
    index: Index
    metadata: Mapping[str, Any] | None = None
    failed: list[Row] = field(default_factory=list)

    def run(self, survey: Survey, done: Callable[[], None]) -> Added:
        """Adds the rows; `done` is called for each. Raises CembedError: rows of another bundle or dim."""
        if self.index.dim != self.source.schema.dim:
            raise CembedError(
                f"{self.index.folder} has vectors of dim {self.index.dim}, the rows have {self.source.schema.dim}"
            )
        return self.index.add(self._pages(survey, done), bundle=self.source.schema.bundle)

    def _pages(self, survey: Survey, done: Callable[[], None]) -> Iterator[NewPage]:
        for row in rows_that_count(self.source, survey):
            if row.vectors is None:
                self.failed.append(row)
            else:
                yield self.page(row)
                done()

    def page(self, row: Row) -> NewPage:
        """What the row tells; where it is none of an index, what the index tells of the page stays."""
        there = self.index.info(row.page_id) if row.id is None and row.page_id in self.index else None
        told = (row.metadata or {}) if there is None else there.metadata
        if self.metadata is not None:
            told = {**(row.metadata or {}), **self.metadata}
        return NewPage(
            id=row.page_id,
            vectors=row.vectors,
            source=row.path,
            page=row.page or 0,
            metadata=told,
            content=row.content(self.source.schema.settings),
            warning=row.warning,
            folder=row.folder if there is None else there.folder,
        )

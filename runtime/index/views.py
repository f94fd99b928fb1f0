"""The pages of a segment at one moment, as searches see them.

Letters: n pages, T storage types (tiers), K vectors of a page, D dim. A page's vectors in a tier are compared with
their CRC when they are first used in this process, and are never used before.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.errors import CembedError
from cembed.runtime.index.columns import REPAIR, Columns, StoredVectors, TierMap, page_sizes
from cembed.runtime.index.files import segment_path
from cembed.runtime.index.metadata import Notes, parse_metadata
from cembed.runtime.index.records import Commit
from cembed.runtime.index.segments import Segment
from cembed.runtime.scoring.kernels import Pages
from cembed.runtime.scoring.storage import STORAGE

_AT_ONCE = 256  # pages of small records that are read together
_BYTES_AT_ONCE = 32 << 20  # of the log, unless a record has more


@dataclass(frozen=True)
class PageInfo:
    """A page of an index but its vectors: `page` counts from 1 in its source; `vectors` says how many it has.

    `warning` is why something of the page may be missing, `folder` where a relative source starts, if it is known.
    `serial` is a number that no other page of the index has or had, nor this one with other vectors.
    """

    id: str
    source: str
    page: int
    metadata: Mapping[str, Any]
    vectors: int
    warning: str | None = None
    folder: str | None = None
    serial: int = 0


@dataclass(frozen=True, eq=False)
class View:
    """A segment at one moment; `alive` [n] are the pages that were not removed. May be used by several threads."""

    segment: Segment
    columns: Columns
    maps: Mapping[str, TierMap]
    checked: Mapping[str, NDArray[np.bool_]]
    alive: NDArray[np.bool_]

    @classmethod
    def of(cls, segment: Segment, removed: NDArray[np.int64]) -> View:
        """The pages as they are now, but those with a serial in `removed`. Raises CembedError: no memory."""
        columns, maps, checked = segment.snapshot()
        serials = columns.serials
        alive = ~np.isin(serials, removed) if len(removed) else np.ones(len(serials), np.bool_)
        return cls(segment, columns, maps, checked, alive)

    def __len__(self) -> int:
        return len(self.alive)

    @property
    def dim(self) -> int:
        return self.segment.dim

    def commits(self) -> Iterator[tuple[Commit, slice]]:
        """What the log says of all pages, some records at a time, and which pages these are. Raises CembedError."""
        offsets, firsts = np.unique(self.columns.records, return_index=True)
        edges, first = np.append(firsts, len(self)), 0
        while first < len(offsets):
            last = int(np.searchsorted(edges, edges[first] + _AT_ONCE, "right")) - 1
            near = int(np.searchsorted(offsets, offsets[first] + _BYTES_AT_ONCE))
            last = max(first + 1, min(last, near))
            yield self.segment.commits(offsets[first:last].tolist()), slice(int(edges[first]), int(edges[last]))
            first = last

    @cached_property
    def live(self) -> NDArray[np.int64] | None:
        """Numbers of the live pages, None for all."""
        return None if self.alive.all() else np.flatnonzero(self.alive)

    @cached_property
    def _pages(self) -> Mapping[str, Pages]:
        ones, columns, pages = np.ones(len(self), np.float32), self.columns, dict[str, Pages]()
        for (tier, mapping), starts in zip(self.maps.items(), self.columns.starts, strict=True):
            scales = columns.scales if STORAGE[tier].has_scale else ones
            pages[tier] = Pages(tier, self.dim, mapping.data, starts, columns.rows, scales)
        return pages

    def pages(self, tier: str, which: NDArray[np.int64] | None) -> Pages:
        """The pages as the kernels take them, once the CRCs of `which` (None: all) were compared.

        Raises CembedError: the vectors of one are damaged.
        """
        for page in self.damaged(tier, which):
            raise CembedError(f"{self.describe(tier, page)}: {REPAIR}")
        return self._pages[tier]

    def damaged(self, tier: str, which: NDArray[np.int64] | None) -> Iterator[int]:
        """Those of `which` whose bytes in a tier are not what was written; others are not looked at again."""
        checked, index = self.checked[tier], list(self.maps).index(tier)
        todo = np.flatnonzero(~checked) if which is None else which[~checked[which]]
        starts, crcs, data = self.columns.starts[index], self.columns.crcs[index], self.maps[tier].data.data
        sizes = page_sizes(tier, self.columns.rows[todo], self.dim)
        crc32, size_of_file = zlib.crc32, len(data)
        for page, start, size, crc in zip(
            todo.tolist(), starts[todo].tolist(), sizes.tolist(), crcs[todo].tolist(), strict=True
        ):
            if start + size <= size_of_file and crc32(data[start : start + size]) == crc:
                checked[page] = True
            else:
                yield page

    def describe(self, tier: str, page: int) -> str:
        """Names a page whose vectors are damaged."""
        columns = self.columns
        start = int(columns.starts[list(self.maps).index(tier), page])
        end = start + int(page_sizes(tier, columns.rows[page : page + 1], self.dim)[0])
        name = segment_path(self.segment.folder, self.segment.number, tier)
        if end > len(self.maps[tier].data):
            return f"{name} ends before byte {end}: {self.info(page).id!r} has lost its vectors"
        return f"{name} is damaged between bytes {start} and {end}: the vectors of {self.info(page).id!r}"

    def vectors(self, page: int) -> NDArray[np.float32]:
        """What the most exact tier keeps of a page, float32 [K, D]. Raises CembedError: damaged."""
        tier = next(iter(self.maps))
        self.pages(tier, np.array([page]))
        found = self.stored(page)
        return STORAGE[tier].decode(found.stored[tier], found.rows, self.dim, found.scale)

    def largest(self) -> int | None:
        """The number of the live page with the most vectors."""
        return int(np.where(self.alive, self.columns.rows, -1).argmax()) if self.alive.any() else None

    def release(self) -> None:
        """Gives back the memory of vectors that were read."""
        for mapping in self.maps.values():
            mapping.release()

    def stored(self, page: int) -> StoredVectors:
        """A page's bytes; compare the CRCs first."""
        return self.columns.vectors(page, self.dim, {tier: mapping.data for tier, mapping in self.maps.items()})

    def commit(self, page: int) -> tuple[Commit, int]:
        """The record of a page, and its place in it. Raises CembedError: damaged since it was first read."""
        return self.segment.commit(int(self.columns.records[page])), int(self.columns.places[page])

    def info(self, page: int) -> PageInfo:
        """Raises CembedError: the record is damaged."""
        commit, place = self.commit(page)
        with self.segment.malformed():
            notes = Notes.of(parse_metadata(commit, int(commit.metadatum[place])))
            return PageInfo(
                id=commit.ids[place],
                source=commit.sources[commit.source[place]],
                page=int(commit.numbers[place]),
                metadata=notes.metadata,
                vectors=int(self.columns.rows[page]),
                warning=notes.warning,
                folder=notes.folder,
                serial=int(self.columns.serials[page]),
            )

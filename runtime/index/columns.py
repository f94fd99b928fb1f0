"""What a segment's log says of its pages, as columns, and the files that it says it of.

Letters: n pages, T storage types (tiers).
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.index.records import ALIGNMENT
from cembed.runtime.scoring.storage import STORAGE

REPAIR = (
    "take the file from a copy, or drop what is damaged with `cembed index compact --drop-damaged` and add it again"
)


@dataclass(frozen=True, eq=False)
class StoredVectors:
    """A page's vectors, `rows` of them, as bytes in each tier with their CRCs; `scale` is that of `u8`."""

    rows: int
    scale: float
    stored: Mapping[str, NDArray[np.uint8]]
    crcs: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Columns:
    """What the log says of pages: serials, rows, scales and whether there is a warning [n], starts and crcs [T, n]; and
    where it says so: the offset of the record, and the page's place in it."""

    serials: NDArray[np.int64]
    rows: NDArray[np.int32]
    scales: NDArray[np.float32]
    starts: NDArray[np.int64]
    crcs: NDArray[np.uint32]
    warned: NDArray[np.bool_]
    records: NDArray[np.int64]
    places: NDArray[np.int32]

    def find(self, serial: int) -> int | None:
        """The number of the page with this serial."""
        place = int(np.searchsorted(self.serials, serial))
        return place if place < len(self.serials) and self.serials[place] == serial else None

    def vectors(self, page: int, dim: int, files: Mapping[str, NDArray[np.uint8]]) -> StoredVectors:
        """What `files`, the tiers of the segment, hold of a page; compare the CRCs first."""
        rows, stored = self.rows[[page]], {}
        for (tier, file), start in zip(files.items(), self.starts[:, page].tolist(), strict=True):
            stored[tier] = file[start : start + int(page_sizes(tier, rows, dim)[0])]
        crcs = dict(zip(files, self.crcs[:, page].tolist(), strict=True))
        return StoredVectors(int(rows[0]), float(self.scales[page]), stored, crcs)

    @classmethod
    def join(cls, parts: list[Columns]) -> Columns:
        if len(parts) == 1:
            return parts[0]
        names = cls.__dataclass_fields__
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in names})

    @classmethod
    def empty(cls, tiers: int) -> Columns:
        return cls(
            serials=np.empty(0, np.int64),
            rows=np.empty(0, np.int32),
            scales=np.empty(0, np.float32),
            starts=np.empty((tiers, 0), np.int64),
            crcs=np.empty((tiers, 0), np.uint32),
            warned=np.empty(0, np.bool_),
            records=np.empty(0, np.int64),
            places=np.empty(0, np.int32),
        )


def page_sizes(tier: str, rows: NDArray[np.int32], dim: int) -> NDArray[np.int64]:
    """Bytes int64 [n] of pages of `rows` vectors in a tier."""
    return rows.astype(np.int64) * STORAGE[tier].vector_bytes(dim)


def place_pages(base: int, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Offsets int64 [n + 1] of pages that follow each other from `base` on, and of what comes after them.

    >>> place_pages(128, np.array([64, 70, 1]))
    array([128, 192, 320, 384])
    """
    return base + np.cumsum(np.concatenate([[0], -(-sizes // ALIGNMENT) * ALIGNMENT]), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class TierMap:
    """A file, or the part of it that counts, as bytes that are read when they are used."""

    data: NDArray[np.uint8]
    memory: mmap.mmap | None = None

    def release(self) -> None:
        """Gives back the memory that was used so far; the bytes can be read again."""
        if self.memory is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.memory.madvise(mmap.MADV_DONTNEED)

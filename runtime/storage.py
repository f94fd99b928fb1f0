"""How a page's vectors are kept: what a storage type costs in bytes, and what it leaves of them.

A new type is a row of `STORAGE`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from cembed.runtime.vectors import Vectors


@dataclass(frozen=True)
class Storage:
    """`vector_bytes` of a dim, `page_bytes` beside the vectors, and the float32 rows [K, D] that scoring sees."""

    vector_bytes: Callable[[int], int]
    page_bytes: int
    restore: Callable[[Vectors], Vectors]

    def page_size(self, vectors: Vectors) -> int:
        return self.page_bytes + len(vectors) * self.vector_bytes(vectors.shape[1])


def through_half(vectors: Vectors) -> Vectors:
    return vectors.astype(np.float16).astype(np.float32)


def through_bytes(vectors: Vectors) -> Vectors:
    """Eight bits with zero point 128 and one scale for the page: a scale of each vector would have to come before the
    maximum.

    >>> through_bytes(np.array([[0.0, 1.0, -0.5]], np.float32)).round(3)
    array([[ 0.   ,  1.   , -0.504]], dtype=float32)
    """
    scale = np.float32(max(np.abs(vectors).max(), np.finfo(np.float32).tiny) / 127)
    levels = np.rint(vectors / scale) + 128
    restored: Vectors = (levels.astype(np.uint8).astype(np.float32) - 128) * scale
    return restored


def through_signs(vectors: Vectors) -> Vectors:
    """One bit: rows of length one with every component at plus or minus the same value.

    >>> through_signs(np.array([[0.9, -0.1, 0.3, 0.0]], np.float32))
    array([[ 0.5, -0.5,  0.5,  0.5]], dtype=float32)
    """
    return np.where(vectors < 0, -1, 1).astype(np.float32) / np.float32(np.sqrt(vectors.shape[1]))


STORAGE: Mapping[str, Storage] = {
    "f32": Storage(lambda dim: 4 * dim, 0, lambda vectors: vectors),
    "f16": Storage(lambda dim: 2 * dim, 0, through_half),
    "u8": Storage(lambda dim: dim, 4, through_bytes),
    "bits": Storage(lambda dim: -(-dim // 8), 0, through_signs),
}

"""How a page's vectors are kept: bytes, and what they leave of the vectors.

    f32, f16   little-endian, row after row
    u8         levels with zero point 128, row after row, and one scale for the page
    bits       a bit is set where a component is negative; blocks of 32 rows (the last one has those that are left), in
               a block every 4 components in turn, of these every row in turn: 4 bits, the lowest first

A page of K vectors takes K * dim * (4, 2, 1 or 1/8) bytes: nothing is padded. A new type is a row of `STORAGE`, whose
order means nothing, and a kernel in native/. `tests/native/shared_tables.py` writes the rows for C++.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError

Bytes = NDArray[np.uint8]
BLOCK = 32  # rows of a block of sign bits


@dataclass(frozen=True)
class Storage:
    """Everything about a type: the way to bytes and back, and what the parts of the runtime ask of it.

    `code` is its number in C, `bits` those of a component. Of two types the one of greater `exactness` leaves more of
    the vectors. With a `query_limit` scores are made of integers: query vectors are rounded to integers of at most that
    size.
    """

    code: int
    exactness: int
    bits: int
    encode: Callable[[Vectors], tuple[Bytes, float]]
    decode: Callable[[Bytes, int, int, float], Vectors]
    has_scale: bool = False  # levels of a page are multiplied with its scale
    signs: bool = False  # components are plus or minus one over the root of dim
    dim_step: int = 1  # dims are multiples of it
    largest: float = math.inf  # component that can be kept
    query_limit: int | None = None
    screens: bool = False  # large indexes are searched with it first
    on_gpu: bool = False  # there are kernels in native/cuda

    @property
    def page_bytes(self) -> int:
        """Bytes of a page beside its vectors: a float32 if it has a scale."""
        return 4 if self.has_scale else 0

    def vector_bytes(self, dim: int) -> int:
        return -(-dim * self.bits // 8)

    def page_size(self, vectors: Vectors) -> int:
        """Bytes of vectors [K, D], scale included."""
        return self.page_bytes + len(vectors) * self.vector_bytes(vectors.shape[1])

    def restore(self, vectors: Vectors) -> Vectors:
        """What is left of vectors [K, D] when they were stored."""
        rows, dim = vectors.shape
        data, scale = self.encode(vectors)
        return self.decode(data, rows, dim, scale)


def _encode_as(kind: str) -> Callable[[Vectors], tuple[Bytes, float]]:
    def encode(vectors: Vectors) -> tuple[Bytes, float]:
        return np.ascontiguousarray(vectors, kind).reshape(-1).view(np.uint8), 1.0

    return encode


def _decode_as(kind: str) -> Callable[[Bytes, int, int, float], Vectors]:
    def decode(data: Bytes, rows: int, dim: int, scale: float) -> Vectors:
        return data.view(kind).reshape(rows, dim).astype(np.float32)

    return decode


def encode_levels(vectors: Vectors) -> tuple[Bytes, float]:
    """Eight bits with zero point 128 and one scale for the page: a scale of each vector would have to come before the
    maximum.

    >>> encode_levels(np.array([[0.0, 1.0, -0.5]], np.float32))[0]
    array([128, 255,  64], dtype=uint8)
    """
    scale = np.float32(max(np.abs(vectors).max(), np.finfo(np.float32).tiny * 127) / 127)
    levels: Bytes = (np.rint(vectors / scale) + 128).astype(np.uint8).reshape(-1)
    return levels, float(scale)


def decode_levels(data: Bytes, rows: int, dim: int, scale: float) -> Vectors:
    restored: Vectors = (data.astype(np.float32).reshape(rows, dim) - 128) * np.float32(scale)
    return restored


def encode_signs(vectors: Vectors) -> tuple[Bytes, float]:
    """One bit a component. Raises CembedError: a dim that is not a multiple of 8.

    >>> encode_signs(np.array([[-1, 1, 1, 1, 1, 1, 1, 1], [1, -1, 1, 1, 1, 1, 1, -1]], np.float32))
    (array([ 33, 128], dtype=uint8), 1.0)
    """
    rows, dim = vectors.shape
    check_dim("bits", dim)
    fours = (vectors < 0).reshape(rows, dim // 4, 4)
    blocks = [fours[first : first + BLOCK].swapaxes(0, 1).reshape(-1) for first in range(0, rows, BLOCK)]
    return np.packbits(np.concatenate(blocks), bitorder="little"), 1.0


def decode_signs(data: Bytes, rows: int, dim: int, scale: float) -> Vectors:
    """Rows of length one with every component at plus or minus the same value.

    >>> decode_signs(np.array([33, 128], np.uint8), 2, 8, 1.0).round(2)[1]
    array([ 0.35, -0.35,  0.35,  0.35,  0.35,  0.35,  0.35, -0.35],
          dtype=float32)
    """
    signs = np.unpackbits(data, bitorder="little")
    edges = [*range(0, rows, BLOCK), rows]
    fours = [signs[a * dim : b * dim].reshape(dim // 4, b - a, 4).swapaxes(0, 1) for a, b in pairwise(edges)]
    restored: Vectors = (1 - 2 * np.concatenate(fours).reshape(rows, dim).astype(np.float32)) / np.float32(np.sqrt(dim))
    return restored


STORAGE: Mapping[str, Storage] = {
    "f32": Storage(0, 3, 32, _encode_as("<f4"), _decode_as("<f4")),
    "f16": Storage(1, 2, 16, _encode_as("<f2"), _decode_as("<f2"), largest=65504.0, on_gpu=True),
    "u8": Storage(2, 1, 8, encode_levels, decode_levels, True, query_limit=127, screens=True, on_gpu=True),
    "bits": Storage(3, 0, 1, encode_signs, decode_signs, signs=True, dim_step=8, query_limit=31, screens=True),
}
DOUBLE = 4  # the code of float64, in which arrays may come and nothing is stored


def by_exactness(names: Collection[object] = STORAGE) -> tuple[str, ...]:
    """The storage types among `names`, each once, the most exact first.

    >>> by_exactness(["bits", "f32", "u8", "f8", "u8"])
    ('f32', 'u8', 'bits')
    """
    return tuple(sorted((name for name in STORAGE if name in names), key=lambda name: -STORAGE[name].exactness))


def storage_of(name: str) -> Storage:
    """The row of a type. Raises CembedError: there is none."""
    if name not in STORAGE:
        raise CembedError(f"unknown storage {name!r}: cembed has {', '.join(by_exactness())}")
    return STORAGE[name]


def check_dim(name: str, dim: int) -> None:
    """Raises CembedError: vectors of this length cannot be kept in a type."""
    step = storage_of(name).dim_step
    if dim < 1 or dim % step:
        needed = "at least 1 is needed" if step == 1 else f"a multiple of {step} is needed, or another storage type"
        raise CembedError(f"vectors of dim {dim} as {name}: {needed}")

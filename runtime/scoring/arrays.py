"""MaxSim over arrays where they lie: the library is told addresses and steps, nothing is copied.

It reads float16, float32 and float64 with any steps. What numpy makes an array of (tensors, lists) counts as that one.
Other numbers (integers, bfloat16 of ml_dtypes, another byte order) are converted to float32, each array when it is met.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError
from cembed.runtime.finite import finite, not_finite
from cembed.runtime.scoring.kernels import load, sum_of, thread_count
from cembed.runtime.scoring.storage import DOUBLE, STORAGE

Floats: TypeAlias = NDArray[np.floating[Any]]
Table: TypeAlias = NDArray[np.void]
ARRAY = np.dtype(  # maxsim_array of native/maxsim.h
    [("data", np.int64), ("rows", np.int64), ("row_step", np.int64), ("step", np.int64), ("type", np.int32)], align=True
)
TYPES = {
    np.dtype(np.float32): STORAGE["f32"].code,
    np.dtype(np.float16): STORAGE["f16"].code,
    np.dtype(np.float64): DOUBLE,
}
MOST_ROWS = 1 << 30  # MAXSIM_MOST_ROWS
_PYTHON = ("PyList_GetItem", "PyObject_GetBuffer", "PyBuffer_Release", "PyErr_Clear")


@dataclass(frozen=True, eq=False)
class Operand:
    """Queries or documents: a list of arrays [num_vectors, dim], or one array [num, num_vectors, dim] and the lengths
    [num] of what comes before the padding. `what` is how messages call one of them."""

    what: str
    given: Sequence[Floats] | Floats
    lengths: NDArray[np.integer[Any]] | None

    def __len__(self) -> int:
        return len(self.given)

    def item(self, index: int) -> Floats:
        try:
            item = np.asarray(self.given[index])
        except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors of a GPU, or of bfloat16
            raise CembedError(f"{self.what} {index} cannot be made an array: {error}") from error
        return item if self.lengths is None else item[: self.lengths[index]]

    def checked(self, index: int, dim: int | None) -> Floats:
        """Raises CembedError: not [num_vectors, dim] of numbers; where `dim` is None any will do."""
        item, what = self.item(index), f"{self.what} {index}"
        if item.ndim != 2 or 0 in item.shape:
            raise CembedError(f"{what} has shape {item.shape}: [num_vectors, dim], neither zero, is needed")
        if dim not in (None, item.shape[1]):
            raise CembedError(f"{what} has dim {item.shape[1]}, the others have {dim}")
        if not np.can_cast(item.dtype, np.float32, "same_kind"):
            raise CembedError(f"{what} is of type {item.dtype}: floats are needed, of 16, 32 or 64 bits")
        if len(item) > MOST_ROWS:
            raise CembedError(f"{what} has {len(item)} vectors: at most {MOST_ROWS} are possible")
        return item

    def vectors(self, dim: int | None) -> list[Vectors]:
        """All of them in float32, of one dim. Raises CembedError as checked(), and for NaN and infinity."""
        items = list[Floats]()
        for index in range(len(self)):
            items.append(self.checked(index, dim))
            dim = items[0].shape[1]
        return [finite(f"{self.what} {index}", item) for index, item in enumerate(items)]


def score_arrays(queries: Operand, documents: Operand, threads: int | None) -> NDArray[np.float32]:
    """Scores [num_queries, num_documents]. Raises CembedError: what cannot be scored, fewer than one thread."""
    library = load()
    if library is None or len(queries) == 0:
        return _with_numpy(queries, documents)
    dim = queries.checked(0, None).shape[1]
    asked, found = described(library, queries, dim), described(library, documents, dim)
    scores = np.empty((asked.count, found.count), np.float32)
    sides = asked.address, asked.count, dim, found.address, found.count
    wrong = library.maxsim_arrays(*sides, thread_count(threads), scores.ctypes.data)
    if wrong == found.count:
        return scores
    if wrong == -1:
        raise MemoryError("MaxSim had no memory for the queries")
    side, index = (documents, wrong) if wrong >= 0 else (queries, -2 - wrong)
    raise not_finite(f"{side.what} {index}", side.item(index))


@dataclass(frozen=True, eq=False)
class Described:
    """Where a table of arrays is, how many it has, and what holds its memory and theirs."""

    address: int
    count: int
    held: tuple[Table, Sequence[Floats] | Floats]


def described(library: ctypes.CDLL, side: Operand, dim: int) -> Described:
    """Raises CembedError: see Operand.checked()."""
    array, table = side.given, np.empty(len(side), ARRAY)
    address = table.ctypes.data
    if isinstance(array, np.ndarray) and side.lengths is not None and array.dtype in TYPES and len(array):
        side.checked(0, dim)
        table["data"] = array.ctypes.data + array.strides[0] * np.arange(len(array))
        table["rows"] = side.lengths
        table["row_step"], table["step"], table["type"] = *array.strides[1:], TYPES[array.dtype]
        return Described(address, len(table), (table, array))
    items = list(array) if side.lengths is None else [side.item(index) for index in range(len(side))]
    describe, at = _describer(library), 0
    while (at := describe(items, at, dim, address)) < len(items):
        items[at] = _converted(items[at], side.checked(at, dim))
    return Described(address, len(table), (table, items))


def _converted(given: Floats, array: Floats) -> Floats:
    """float32; but no copy where `given` was no array yet, and is one of floats now."""
    if not isinstance(given, np.ndarray) and array.dtype in TYPES:
        return array
    with np.errstate(over="ignore"):
        return np.array(array, np.float32, order="C")


class _Python(ctypes.Structure):
    """maxsim_python of native/maxsim.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in _PYTHON)


@cache
def _describer(library: ctypes.CDLL) -> Callable[[list[Floats], int, int, int], int]:
    """maxsim_describe, which keeps the interpreter's lock: items, the first to describe, dim, the table's address."""
    python = _Python(*(ctypes.cast(ctypes.pythonapi[name], ctypes.c_void_p) for name in _PYTHON))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    kind = ctypes.PYFUNCTYPE(size, ctypes.POINTER(_Python), ctypes.py_object, size, size, ctypes.c_int32, pointer)
    describe = kind(("maxsim_describe", library))
    return lambda items, first, dim, address: describe(python, items, first, len(items), dim, address)


def _with_numpy(queries: Operand, documents: Operand) -> NDArray[np.float32]:
    """One pair at a time: products of matrices are rounded differently when the matrices are larger."""
    asked = queries.vectors(None)
    found = documents.vectors(asked[0].shape[1] if asked else None)
    scores = [[sum_of((query @ vectors.T).max(axis=1)) for vectors in found] for query in asked]
    return np.array(scores, np.float32).reshape(len(asked), len(found))

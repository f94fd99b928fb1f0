"""MaxSim over stored pages: score(q, d) = sum over query vectors of the largest dot product with a page's vector.

What a page's bytes mean is storage.py's. Floats are multiplied as they are. For levels and signs the query is rounded
to integers, of at most 127 and 31, with a scale of each query vector: sums are exact then, and equal on all machines.

The work is done by the library in native/, which pip builds. Where it could not be built numpy takes over, with the
same results (of floats up to rounding).
"""

from __future__ import annotations

import ctypes
import os
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.compiled import compiled_library
from cembed.runtime.errors import CembedError
from cembed.runtime.finite import finite
from cembed.runtime.scoring.storage import STORAGE, Storage, check_dim

Numbers = NDArray[np.int64]
Scores = NDArray[np.float32]
LANES = 16  # terms of a score are summed up in as many lanes
_EXACT = 1 << 24  # float32 holds all integers up to it


@dataclass(frozen=True, eq=False)
class Pages:
    """Many pages' vectors in one storage type, anywhere in one buffer. Raises CembedError if they are not inside it."""

    storage: str  # a key of STORAGE
    dim: int
    data: NDArray[np.uint8]  # [bytes]; may be memory-mapped
    starts: NDArray[np.int64]  # [N] first byte of each page
    rows: NDArray[np.int32]  # [N] vectors of each page, at least one
    scales: NDArray[np.float32]  # [N] what levels are multiplied with; ones where a type has no scale

    def __post_init__(self) -> None:
        check_dim(self.storage, self.dim)
        arrays = (self.data, self.starts, self.rows, self.scales)
        kinds = [array.dtype.name for array in arrays]
        assert kinds == ["uint8", "int64", "int32", "float32"], f"{kinds = }"
        assert all(array.ndim == 1 and array.flags.c_contiguous for array in arrays), "flat arrays are needed"
        assert len(self.starts) == len(self.rows) == len(self.scales), "as many starts as rows and scales are needed"
        if len(self) and not self._inside():
            raise CembedError("pages lie outside of their data, or are empty: the index or the file is damaged")

    @property
    def kind(self) -> Storage:
        return STORAGE[self.storage]

    def __len__(self) -> int:
        return len(self.starts)

    def _inside(self) -> bool:
        ends = self.starts + self.kind.vector_bytes(self.dim) * self.rows.astype(np.int64)
        return bool(self.starts.min() >= 0 and self.rows.min() >= 1 and ends.max() <= len(self.data))

    def vectors(self, page: int) -> Vectors:
        """What is stored of a page, as float32 [K, D]."""
        return self._decoded(page, float(self.scales[page]))

    def integers(self, page: int) -> Vectors:
        """Of types of integers: levels between -128 and 127, or signs -1 and 1, as float32 [K, D]."""
        vectors = self._decoded(page, 1.0)
        return np.sign(vectors) if self.kind.signs else vectors

    def _decoded(self, page: int, scale: float) -> Vectors:
        rows, start = int(self.rows[page]), int(self.starts[page])
        data = np.asarray(self.data[start : start + rows * self.kind.vector_bytes(self.dim)])
        return self.kind.decode(data, rows, self.dim, scale)


def score(query: Vectors, pages: Pages, which: Numbers | None = None, threads: int | None = None) -> Scores:
    """Scores float32 [M] of a query [Q, D] with the pages `which` [M], or with all.

    They depend neither on the number of threads (None: one for each core) nor on what else is scored. Raises
    CembedError: an empty query, NaN or infinity in it, another dim than the pages', a page that is not there.
    """
    query, which = _checked(query, pages, which)
    library = load()
    if library is None:
        return _score_with_numpy(query, pages, which)
    found = np.empty(len(which), np.float32)
    arguments = _arguments(query, pages, which)
    _enough(library.maxsim_score(*arguments, thread_count(threads), _pointer(found)))
    return found


def top(
    query: Vectors, pages: Pages, k: int, which: Numbers | None = None, threads: int | None = None
) -> tuple[Numbers, Scores]:
    """Numbers and scores [<= k] of the best pages, best first, of equal ones the smaller number. Raises as score()."""
    query, which = _checked(query, pages, which)
    library = load()
    if library is None:
        found = _score_with_numpy(query, pages, which)
        order = np.lexsort((which, -found))[: max(k, 0)]
        return which[order], found[order]
    numbers, scores = np.empty(max(0, min(k, len(which))), np.int64), np.empty(max(0, min(k, len(which))), np.float32)
    arguments = _arguments(query, pages, which)
    _enough(library.maxsim_top(*arguments, len(numbers), thread_count(threads), _pointer(numbers), _pointer(scores)))
    return numbers, scores


def matches(query: Vectors, pages: Pages, page: int) -> NDArray[np.int32]:
    """Which vector of a page each query vector [Q, D] found, int32 [Q]: of equal ones the first. Raises as score()."""
    query, _ = _checked(query, pages, np.array([page]))
    similarity, _ = _similarity(query, pages, page)
    return np.asarray(similarity.argmax(axis=1), np.int32)


def checked_query(query: Vectors, dim: int, what: str = "the query") -> Vectors:
    """As float32 [Q, D]. Raises CembedError as score() does; `what` is how the message calls it."""
    query = np.asarray(query)
    if query.ndim != 2 or 0 in query.shape:
        raise CembedError(f"{what} has shape {query.shape}: [num_vectors, dim], neither zero, is needed")
    if query.shape[1] != dim:
        raise CembedError(f"{what} has dim {query.shape[1]}, the pages have {dim}")
    return finite(what, query)


def _checked(query: Vectors, pages: Pages, which: Numbers | None) -> tuple[Vectors, Numbers]:
    query = checked_query(query, pages.dim)
    if which is None:
        return query, np.arange(len(pages), dtype=np.int64)
    which = np.ascontiguousarray(which, np.int64)
    if which.ndim != 1 or (which.size and not 0 <= which.min() <= which.max() < len(pages)):
        raise CembedError(f"pages 0 to {len(pages) - 1} can be scored: another one was asked for")
    return query, which


# The library ---------------------------------------------------------------------------------------------------------


class _Pages(ctypes.Structure):
    """maxsim_pages of native/maxsim.h."""

    _fields_ = (
        ("storage", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


@cache
def load() -> ctypes.CDLL | None:
    """The library, or None and one warning where it cannot be had."""
    reason = "it was not built. Install cembed where a C++ compiler is"
    if file := compiled_library(__file__, "libmaxsim"):
        try:
            return _declared(ctypes.CDLL(str(file)))
        except (OSError, AttributeError) as error:
            reason = str(error)
    warnings.warn(f"MaxSim runs in numpy, slowly, without its library: {reason}", stacklevel=3)
    return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    head: list[Any] = [ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(_Pages), ctypes.c_void_p, ctypes.c_int64]
    library.maxsim_score.argtypes = [*head, ctypes.c_int32, ctypes.c_void_p]
    library.maxsim_top.argtypes = [*head, ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p]
    library.maxsim_top.restype = ctypes.c_int64
    library.maxsim_kernels.restype = ctypes.c_char_p
    pointer, number, size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.maxsim_arrays.argtypes = [pointer, size, number, pointer, size, number, pointer]
    library.maxsim_arrays.restype = size
    return library


def kernel_sets() -> list[str]:
    """The sets of kernels that this machine runs, from the fastest; none without the library."""
    library, names = load(), list[str]()
    while library is not None and (name := library.maxsim_kernels(len(names))):
        names.append(name.decode())
    return names


def use_kernels(name: str) -> None:
    """Take a set of `kernel_sets()` from now on, in the whole process, instead of the fastest."""
    library = load()
    assert library is not None, "there is no library"
    library.maxsim_use(kernel_sets().index(name))


def _arguments(query: Vectors, pages: Pages, which: Numbers) -> tuple[Any, ...]:
    """What both functions of the library begin with. The caller's arrays outlive the call."""
    arrays = (_pointer(array) for array in (pages.data, pages.starts, pages.rows, pages.scales))
    described = _Pages(pages.kind.code, pages.dim, *arrays)
    return _pointer(query), len(query), ctypes.byref(described), _pointer(which), len(which)


def _pointer(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


def thread_count(threads: int | None) -> int:
    """What is used where so many were asked for (None: one for each core). Raises CembedError: fewer than one."""
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads < 1:
        raise CembedError(f"{threads} threads: at least one is needed")
    return threads


def _enough(result: int) -> None:
    if result < 0:
        raise MemoryError("MaxSim had no memory for the query")


# Without it -----------------------------------------------------------------------------------------------------------


def _score_with_numpy(query: Vectors, pages: Pages, which: Numbers) -> Scores:
    """One page at a time: products of matrices are rounded differently when the matrices are larger."""
    found = np.empty(len(which), np.float32)
    unit = np.float32(1 / np.sqrt(np.float32(pages.dim)) if pages.kind.signs else 1)
    for index, page in enumerate(which):
        similarity, scales = _similarity(query, pages, page)
        found[index] = sum_of(similarity.max(axis=1).astype(np.float32) * scales) * (unit * pages.scales[page])
    return found


def exact_scores(query: Vectors, pages: Pages, which: Numbers) -> NDArray[np.float64]:
    """What score() is an approximation of, by numpy in float64. For levels and signs the query is rounded as there."""
    found = np.empty(len(which))
    unit = 1 / np.sqrt(pages.dim) if pages.kind.signs else 1.0
    wide = query.astype(np.float64) if pages.kind.query_limit is None else query
    for index, page in enumerate(which):
        similarity, scales = _similarity(wide, pages, page)
        found[index] = (similarity.max(axis=1) * scales.astype(np.float64)).sum() * unit * float(pages.scales[page])
    return found


def _similarity(query: NDArray[np.floating[Any]], pages: Pages, page: int) -> tuple[NDArray[np.floating[Any]], Scores]:
    """Products [Q, K] of query vectors with a page's, and what each query vector's are multiplied with [Q]."""
    limit = pages.kind.query_limit
    if limit is None:
        return query @ pages.vectors(page).T, np.ones(len(query), np.float32)
    smallest = np.finfo(np.float32).tiny * np.float32(127)
    scales = np.maximum(np.abs(query).max(axis=1), smallest) / np.float32(limit)
    vectors = pages.integers(page)
    exact = np.float32 if limit * 128 * pages.dim < _EXACT else np.float64
    return np.rint(query / scales[:, None]).astype(exact) @ vectors.T.astype(exact), scales


def sum_of(terms: Scores) -> np.float32:
    """The sum in the order of the library: 16 lanes, then halves of them."""
    lanes = np.zeros(LANES, np.float32)
    for first in range(0, len(terms), LANES):
        part = terms[first : first + LANES]
        lanes[: len(part)] += part
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return np.float32(lanes[0])

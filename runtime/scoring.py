"""Late interaction: score(q, d) = sum over query vectors of the largest dot product with a document vector.

ColBERT (arXiv 2004.12832, section 3.3); for page images ColPali (arXiv 2407.01449, section 3.3). kernels.py adds up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.errors import CembedError
from cembed.runtime.kernels import Pages, score

FloatArray: TypeAlias = NDArray[np.floating[Any]]
Lengths: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
_BLOCK_ROWS = 8192  # rows of documents copied side by side at once


def maxsim(
    queries: Sequence[FloatArray] | FloatArray,
    documents: Sequence[FloatArray] | FloatArray | Pages,
    *,
    query_lengths: Lengths | None = None,
    document_lengths: Lengths | None = None,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """Scores float32 [num_queries, num_documents].

    Either side is a list of arrays [num_vectors, dim], ragged as they are, or one array [num, num_vectors, dim]; there,
    lengths [num] say how many vectors of each come before the padding, which never takes part. Documents may also be
    stored pages. Threads: None is one for each core.

    Raises CembedError: an item that is not two-dimensional, has no rows, another dim, or NaN or infinity in it; lengths
    that are not between 1 and num_vectors, or of something that is not one array.

    >>> query = [np.array([[1.0, 0.0], [0.0, 1.0]])]
    >>> pages = [np.array([[1.0, 0.0]]), np.array([[0.5, 0.25], [-1.0, 0.0]])]
    >>> maxsim(query, pages)
    array([[1.  , 0.75]], dtype=float32)
    >>> maxsim(query, np.stack([pages[1], pages[1]]), document_lengths=[1, 2])
    array([[0.75, 0.75]], dtype=float32)
    """
    asked = _items("query", queries, query_lengths)
    dim = _check("query", asked, documents.dim if isinstance(documents, Pages) else None)
    rows = [_finite("query", number, query) for number, query in enumerate(asked)]
    if isinstance(documents, Pages):
        if document_lengths is not None:
            raise CembedError("stored pages know their lengths: leave document_lengths out")
        blocks = iter([documents])
        count = len(documents)
    else:
        items = _items("document", documents, document_lengths)
        _check("document", items, dim)
        blocks, count = _blocks(items), len(items)
    scores, done = np.zeros((len(rows), count), np.float32), 0
    for block in blocks:
        for index, query in enumerate(rows):
            scores[index, done : done + len(block)] = score(query, block, threads=threads)
        done += len(block)
    return scores


def _items(what: str, given: Sequence[FloatArray] | FloatArray, lengths: Lengths | None) -> list[FloatArray]:
    """Arrays without padding: views of one array, if that was given."""
    if lengths is None:
        return list(given)
    if not isinstance(given, np.ndarray) or given.ndim != 3:
        raise CembedError(f"{what}_lengths belong to one array [num, num_vectors, dim]: leave them out with a list")
    wanted = np.asarray(lengths)
    if wanted.shape != given.shape[:1] or wanted.dtype.kind not in "iu":
        raise CembedError(f"{what}_lengths: one whole number for each of {len(given)} is wanted")
    if wanted.size and not 1 <= wanted.min() <= wanted.max() <= given.shape[1]:
        raise CembedError(f"{what}_lengths are {wanted.min()} to {wanted.max()}: 1 to {given.shape[1]} are there")
    return [item[:length] for item, length in zip(given, wanted, strict=True)]


def _blocks(items: Sequence[FloatArray]) -> Iterator[Pages]:
    """Documents side by side, `_BLOCK_ROWS` rows or a little more at once."""
    first, rows = 0, 0
    for last, item in enumerate(items, 1):
        rows += len(item)
        if rows >= _BLOCK_ROWS or last == len(items):
            yield _stored(items, first, last)
            first, rows = last, 0


def _stored(items: Sequence[FloatArray], first: int, last: int) -> Pages:
    block = items[first:last]
    with np.errstate(over="ignore"):
        vectors = np.concatenate(block, dtype=np.float32, casting="unsafe")
    if not (np.isfinite(vectors.min()) and np.isfinite(vectors.max())):
        for index, item in enumerate(block, first):
            _finite("document", index, item)
    rows = np.array([len(item) for item in block], np.int32)
    starts = (np.cumsum(rows, dtype=np.int64) - rows) * vectors.shape[1] * 4
    data = vectors.reshape(-1).view(np.uint8)
    return Pages("f32", vectors.shape[1], data, starts, rows, np.ones(len(rows), np.float32))


def _check(what: str, items: Sequence[FloatArray], dim: int | None) -> int | None:
    for index, item in enumerate(items):
        if np.ndim(item) != 2 or 0 in np.shape(item):
            raise CembedError(f"{what} {index} has shape {np.shape(item)}: [num_vectors, dim], neither zero, is wanted")
        dim = item.shape[1] if dim is None else dim
        if item.shape[1] != dim:
            raise CembedError(f"{what} {index} has dim {item.shape[1]}, the others have {dim}")
    return dim


def _finite(what: str, index: int, item: FloatArray) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        vectors = np.asarray(item, np.float32)
    if not np.isfinite(vectors).all():
        raise CembedError(f"{what} {index} contains NaN, infinity, or values that float32 cannot hold")
    return vectors

"""Late interaction: score(q, d) = sum over query vectors of the largest dot product with a document vector.

ColBERT (arXiv 2004.12832, section 3.3); for page images ColPali (arXiv 2407.01449, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.errors import CembedError

FloatArray = NDArray[np.floating[Any]]
_BLOCK_ROWS = 8192  # rows of documents scored at once: bounds the similarity matrix


def maxsim(queries: Sequence[FloatArray], documents: Sequence[FloatArray]) -> NDArray[np.float32]:
    """Scores float32 [num_queries, num_documents] of lists of arrays [num_vectors, dim], ragged as they are.

    Raises CembedError: an item that is not two-dimensional, has no rows, another dim, or NaN or infinity in it.

    >>> query = [np.array([[1.0, 0.0], [0.0, 1.0]])]
    >>> pages = [np.array([[1.0, 0.0]]), np.array([[0.5, 0.25], [-1.0, 0.0]])]
    >>> maxsim(query, pages)
    array([[1.  , 0.75]], dtype=float32)
    """
    dim = _check("query", queries, None)
    _check("document", documents, dim)
    scores = np.zeros((len(queries), len(documents)), np.float32)
    if not len(queries) or not len(documents):
        return scores
    rows = np.concatenate([np.asarray(q, np.float32) for q in queries])
    starts = np.cumsum([0, *(len(q) for q in queries)])[:-1]
    for first, last in _blocks([len(d) for d in documents]):
        block = [np.asarray(d, np.float32) for d in documents[first:last]]
        offsets = np.cumsum([0, *(len(d) for d in block)])[:-1]
        similarity = rows @ np.concatenate(block).T  # query rows, document rows
        best = np.maximum.reduceat(similarity, offsets, axis=1)
        scores[:, first:last] = np.add.reduceat(best, starts, axis=0)
    return scores


def _blocks(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of documents of about `_BLOCK_ROWS` rows together.

    >>> _blocks([5000, 5000, 10])
    [(0, 2), (2, 3)]
    """
    blocks, first, rows = [], 0, 0
    for index, length in enumerate(lengths):
        rows += length
        if rows >= _BLOCK_ROWS:
            blocks.append((first, index + 1))
            first, rows = index + 1, 0
    return blocks + ([(first, len(lengths))] if first < len(lengths) else [])


def _check(what: str, items: Sequence[FloatArray], dim: int | None) -> int | None:
    for index, item in enumerate(items):
        if np.ndim(item) != 2 or 0 in np.shape(item):
            raise CembedError(f"{what} {index} has shape {np.shape(item)}: [num_vectors, dim], neither zero, is wanted")
        dim = item.shape[1] if dim is None else dim
        if item.shape[1] != dim:
            raise CembedError(f"{what} {index} has dim {item.shape[1]}, the others have {dim}")
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.asarray(item, np.float32)).all()
        if not finite:
            raise CembedError(f"{what} {index} contains NaN, infinity, or values that float32 cannot hold")
    return dim

"""Late interaction: score(q, d) = sum over query vectors of the largest dot product with a document vector.

ColBERT (arXiv 2004.12832, section 3.3); for page images ColPali (arXiv 2407.01449, section 3.3). The library adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.errors import CembedError
from cembed.runtime.scoring.arrays import Floats, Operand, score_arrays
from cembed.runtime.scoring.kernels import Pages, score

Lengths: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]


def maxsim(
    queries: Sequence[Floats] | Floats,
    documents: Sequence[Floats] | Floats | Pages,
    *,
    query_lengths: Lengths | None = None,
    document_lengths: Lengths | None = None,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """Scores float32 [num_queries, num_documents].

    Either side is a list of arrays [num_vectors, dim], ragged as they are, or one array [num, num_vectors, dim]; there,
    lengths [num] say how many vectors of each come before the padding, which never takes part. Documents may also be
    stored pages. Threads: None is one for each core; fewer start where the work is small.

    Arrays of float16, float32 and float64 are scored where they lie, whatever their strides; nothing may change them
    meanwhile. Other numbers (bfloat16 of ml_dtypes, integers) are converted to float32 first, in a copy.

    Raises CembedError: an item that is not two-dimensional, has no rows, another dim, no numbers, or NaN or infinity in
    it (float64 counts as float32 has it); lengths that are not between 1 and num_vectors, or of something that is not
    one array.

    >>> query = [np.array([[1.0, 0.0], [0.0, 1.0]])]
    >>> pages = [np.array([[1.0, 0.0]]), np.array([[0.5, 0.25], [-1.0, 0.0]])]
    >>> maxsim(query, pages)
    array([[1.  , 0.75]], dtype=float32)
    >>> maxsim(query, np.stack([pages[1], pages[1]]), document_lengths=[1, 2])
    array([[0.75, 0.75]], dtype=float32)
    """
    asked = Operand("query", queries, _lengths("query", queries, query_lengths))
    if not isinstance(documents, Pages):
        found = Operand("document", documents, _lengths("document", documents, document_lengths))
        return score_arrays(asked, found, threads)
    if document_lengths is not None:
        raise CembedError("stored pages know their lengths: leave document_lengths out")
    scores = [score(query, documents, threads=threads) for query in asked.vectors(documents.dim)]
    return np.array(scores, np.float32).reshape(len(asked), len(documents))


def _lengths(what: str, given: Sequence[Floats] | Floats, lengths: Lengths | None) -> NDArray[np.integer[Any]] | None:
    """How many vectors of each item of one array [num, num_vectors, dim] count; None for a list."""
    stack = isinstance(given, np.ndarray) and given.ndim == 3
    if lengths is None:
        return np.full(len(given), np.shape(given)[1]) if stack else None
    if not stack:
        raise CembedError(f"{what}_lengths belong to one array [num, num_vectors, dim]: leave them out with a list")
    counts, most = np.asarray(lengths), np.shape(given)[1]
    if counts.shape != (len(given),) or counts.dtype.kind not in "iu":
        raise CembedError(f"{what}_lengths: one whole number for each of {len(given)} is needed")
    if counts.size and not 1 <= counts.min() <= counts.max() <= most:
        raise CembedError(f"{what}_lengths are {counts.min()} to {counts.max()}: 1 to {most} are there")
    return counts

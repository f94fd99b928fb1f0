"""What is made of the states of a page: one vector, fewer vectors, vectors of length one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.manifest import Pooling
from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError, missing_extra

FloatArray = NDArray[np.floating[Any]]
BLAME = "the checkpoint or its precision (fp16?) is at fault"


def normalise(states: FloatArray, source: str = "the model") -> Vectors:
    """Rows of length one. Raises CembedError for NaN, infinity or a row of zeros: none may be stored as a vector.

    `source` is what made the states.
    """
    with np.errstate(over="ignore"):
        norms = np.linalg.norm(states, axis=-1, keepdims=True)
    require_finite(norms, source)
    if not norms.all():
        raise CembedError(f"{source} gave zeros: {BLAME}")
    vectors: Vectors = (states / norms).astype(np.float32)
    return vectors


def require_finite(states: FloatArray, source: str) -> None:
    """Raises CembedError for NaN or infinity, by its name, and with what made it."""
    if not np.isfinite(states).all():
        raise CembedError(f"{source} gave {'NaN' if np.isnan(states).any() else 'infinity'}: {BLAME}")


def pool_states(states: FloatArray, pooling: Pooling) -> FloatArray:
    """States [K, D] as one row, unless `pooling` is `none`.

    >>> states = np.array([[1.0, 2.0], [3.0, 4.0]])
    >>> [pool_states(states, pooling).tolist() for pooling in ("mean", "last", "concat")]
    [[[2.0, 3.0]], [[3.0, 4.0]], [[1.0, 2.0, 3.0, 4.0]]]
    """
    if pooling == "mean":
        states = states.mean(axis=0, keepdims=True)
    elif pooling == "last":
        states = states[-1:]
    elif pooling == "concat":
        states = states.reshape(1, -1)
    return states


def pool_tokens(vectors: Vectors, factor: int) -> Vectors:
    """The vectors [K, D] merged to at most K // factor, by hierarchical clustering of their similarities.

    Ward linkage over the rows of 1 - similarity, means of clusters normalised: the pooling of colpali-engine
    (arXiv 2409.14683). Raises CembedError without scipy, which the extra `pool` brings.
    """
    clusters = max(len(vectors) // factor, 1)
    if factor == 1 or clusters == len(vectors):
        return vectors
    try:
        from scipy.cluster.hierarchy import fcluster, linkage
    except ImportError as error:
        raise missing_extra("pool_factor", "scipy", "pool", error) from error
    labels = fcluster(linkage(1 - vectors @ vectors.T, method="ward"), t=clusters, criterion="maxclust")
    return normalise(np.stack([vectors[labels == label].mean(axis=0) for label in np.unique(labels)]))

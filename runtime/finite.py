"""NaN and infinity called by their names."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.errors import CembedError


def finite(what: str, given: NDArray[Any]) -> NDArray[np.float32]:
    """Vectors [num, dim] as float32, contiguous; no copy of such ones. Raises CembedError: see not_finite()."""
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(given, np.float32)
    if not np.isfinite(vectors).all():
        raise not_finite(what, given)
    return vectors


def not_finite(what: str, given: NDArray[Any]) -> CembedError:
    """The error for vectors [num, dim] of which some component is NaN or infinite, or is so as float32.

    >>> print(not_finite("document 7", np.array([[0.5, 0.5], [1.0, -np.inf]])))
    document 7 contains -infinity, in component 1 of vector 1
    """
    with np.errstate(over="ignore"):
        vector, component = np.argwhere(~np.isfinite(np.asarray(given, np.float32)))[0]
    value = given[vector, component]
    if np.isnan(value):
        name = "NaN"
    elif np.isinf(value):
        name = "infinity" if value > 0 else "-infinity"
    else:
        name = f"{value:g} (infinity: float32 cannot hold it)"
    return CembedError(f"{what} contains {name}, in component {component} of vector {vector}")

"""What the server and its workers say to each other: a header in JSON, and arrays.

A frame is the length of the header, 4 bytes, and that of the arrays, 8 bytes, both little-endian, then these two.
Nothing of it is code: a worker that strangers' bytes have taken over can at most answer nonsense.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Header = dict[str, Any]
PREFIX = 12
MAX_HEADER, MAX_ARRAYS = 1 << 20, 1 << 30
DTYPES = {"float32": np.float32, "uint8": np.uint8}


class NonsenseError(Exception):
    """A frame that the other side cannot have meant."""


def pack(header: Mapping[str, Any], arrays: Mapping[str, Array] | None = None) -> bytes:
    """A frame.

    >>> frame = pack({"pages": 1}, {"heat": np.zeros((2, 1), np.float32)})
    >>> unpack(frame[12:-8], frame[-8:])
    ({'pages': 1}, {'heat': array([[0.],
           [0.]], dtype=float32)})
    """
    arrays = arrays or {}
    kinds = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    text = json.dumps({**header, "arrays": kinds}).encode()
    body = b"".join(array.tobytes() for array in arrays.values())
    return len(text).to_bytes(4, "little") + len(body).to_bytes(8, "little") + text + body


def sizes(prefix: bytes) -> tuple[int, int]:
    """Bytes of the header and of the arrays. Raises NonsenseError: too many."""
    header, arrays = int.from_bytes(prefix[:4], "little"), int.from_bytes(prefix[4:], "little")
    if header > MAX_HEADER or arrays > MAX_ARRAYS:
        raise NonsenseError(f"{header = }, {arrays = }")
    return header, arrays


def unpack(text: bytes, body: bytes) -> tuple[Header, dict[str, Array]]:
    """Header and arrays of a frame. Raises NonsenseError: they do not fit."""
    try:
        header: Header = json.loads(text)
        arrays, start = dict[str, Array](), 0
        for name, (dtype, shape) in header.pop("arrays").items():
            end = start + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
            arrays[name] = np.frombuffer(body[start:end], DTYPES[dtype]).reshape(shape)
            start = end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NonsenseError(str(error)) from None
    if start != len(body):
        raise NonsenseError(f"{start = }, {len(body) = }")
    return header, arrays

"""Arrays in safetensors files, with bounds: nothing is allocated for what a header merely says.

A file is the length of its header in 8 bytes, the header in JSON, and the bytes of the arrays, one after the other.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.schema import Range, decode, parse
from cembed.runtime.errors import CembedError
from cembed.runtime.plain_files import open_plain

Shape = tuple[int | None, ...]
"""Lengths of axes; None is any length."""

MAX_HEADER = 1 << 24
MAX_AXES = 8
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_LENGTH = struct.Struct("<Q")
_Size = Annotated[int, Range(0, 1 << 50)]


@dataclass(frozen=True)
class Stored:
    """An array as the header has it; `data_offsets` count from the header's end."""

    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]

    @property
    def nbytes(self) -> int:
        return np.dtype(DTYPES[self.dtype]).itemsize * prod(self.shape)


@dataclass(frozen=True, eq=False)
class Header:
    """What a file says it holds, by name, all of which it has the bytes for; `start` is where the first one is."""

    arrays: Mapping[str, Stored]
    metadata: Mapping[str, str] = field(default_factory=dict)
    start: int = 0


def read_safetensors(
    path: Path, expected: Mapping[str, tuple[str, Shape]], limit: int, most_header: int = MAX_HEADER
) -> tuple[dict[str, NDArray[Any]], Mapping[str, str]]:
    """The arrays of a file, and its metadata. `expected` has the dtype, as numpy calls it, and the shape of each array.

    Raises CembedError: no such file, more than `limit` bytes, damage, arrays that are missing, others, or of another
    dtype or shape. Only what `expected` allows is allocated.
    """
    with open_plain(path, limit) as (file, size):
        header = read_header(path, file, size, most_header)
        check_arrays(path, header, expected)
        arrays = {name: _read_array(path, file, header, stored) for name, stored in header.arrays.items()}
    return arrays, header.metadata


def read_header(path: Path, file: BinaryIO, size: int, most: int = MAX_HEADER) -> Header:
    """The header, of at most `most` bytes, of an open file of `size`; `path` is for messages.

    Raises CembedError: damaged.
    """
    raw = _read(path, file, 0, min(size, _LENGTH.size))
    length = _LENGTH.unpack(raw)[0] if len(raw) == _LENGTH.size else 0
    if not 2 <= length <= min(most, size - _LENGTH.size):
        raise CembedError(f"{path} is no safetensors file, or cut off: its header is said to have {length} bytes")
    try:
        raw = parse(_read(path, file, _LENGTH.size, length).decode("utf-8"), "its header")
        metadata: Any = raw.pop("__metadata__", {}) if isinstance(raw, dict) else {}
        metadata = decode(Mapping[str, str], metadata, "__metadata__")
        arrays: dict[str, Stored] = decode(Mapping[str, Stored], raw, "header")
        header = Header(arrays, metadata, _LENGTH.size + length)
        _check_places(header, size)
    except (CembedError, UnicodeDecodeError) as error:
        raise CembedError(f"{path} is a damaged safetensors file: {error}") from error
    return header


def _check_places(header: Header, size: int) -> None:
    """The arrays follow each other and fill the file."""
    for name, stored in header.arrays.items():
        if stored.dtype not in DTYPES or len(stored.shape) > MAX_AXES:
            given = f"{stored.dtype!r:.80} in {len(stored.shape)} axes"
            raise CembedError(f"{name!r:.80} is {given}: known are {', '.join(DTYPES)} in {MAX_AXES} at most")
        if stored.data_offsets[1] - stored.data_offsets[0] != stored.nbytes:
            raise CembedError(f"{name!r:.80} has other bytes than its shape takes")
    places = sorted(stored.data_offsets for stored in header.arrays.values())
    edges = [(0, 0), *places, (size - header.start,) * 2]
    if any(before[1] != after[0] for before, after in pairwise(edges)):
        raise CembedError("its arrays do not follow each other to the end of the file")


def check_arrays(path: Path, header: Header, expected: Mapping[str, tuple[str, Shape]]) -> None:
    """Raises CembedError unless the arrays are those of `expected`."""
    if header.arrays.keys() != expected.keys():
        found = ", ".join(f"{name!r:.80}" for name in list(header.arrays)[:8])
        raise CembedError(f"{path} has the arrays {found or 'none'}: {', '.join(expected)} are expected")
    for name, (dtype, shape) in expected.items():
        stored = header.arrays[name]
        sizes = zip(stored.shape, shape, strict=False)
        fits = len(stored.shape) == len(shape) and all(needed in (None, size) for size, needed in sizes)
        if DTYPES[stored.dtype] != dtype or not fits:
            given = f"{DTYPES[stored.dtype]} {list(stored.shape[:8])}"
            raise CembedError(f"{path}: {name} is {given}, expected is {dtype} {list(shape)}")


def _read_array(path: Path, file: BinaryIO, header: Header, stored: Stored) -> NDArray[Any]:
    file.seek(header.start + stored.data_offsets[0])
    values = np.fromfile(file, np.dtype(DTYPES[stored.dtype]).newbyteorder("<"), prod(stored.shape))
    if values.nbytes != stored.nbytes:
        raise CembedError(f"{path} is cut off")
    return values.reshape(stored.shape)


def _read(path: Path, file: BinaryIO, offset: int, size: int) -> bytes:
    try:
        file.seek(offset)
        content = file.read(size)
    except OSError as error:
        raise CembedError(f"cannot read {path}: {error.strerror}") from error
    if len(content) != size:
        raise CembedError(f"{path} is cut off")
    return content

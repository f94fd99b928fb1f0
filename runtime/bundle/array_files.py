"""Arrays in `.npz` and `.safetensors` files: written part by part, so that no copy is made of what is large, and read
only after a look at their headers."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cembed.runtime.errors import CembedError

_CODES = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}
_MOST_HEADER = 100_000_000  # that the safetensors library reads
_MOST_UNPACKED = 16  # bytes for each byte of an .npz file; vectors hardly shrink, texts do
_SLACK = 1 << 20
_TEXTS = 4096  # that are laid out at once


@dataclass(frozen=True, eq=False)
class Parts:
    """An array of `shape`, given as parts that follow each other in its first axis."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    parts: Iterable[NDArray[Any]]

    @classmethod
    def of(cls, parts: Sequence[NDArray[Any]]) -> Parts:
        first = parts[0]
        return cls(first.dtype, (sum(map(len, parts)), *first.shape[1:]), parts)

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Parts:
        """One string for each of `texts`, all as wide as the longest."""
        dtype = np.dtype(f"<U{max(1, *map(len, texts))}")
        blocks = (texts[first : first + _TEXTS] for first in range(0, len(texts), _TEXTS))
        return cls(dtype, (len(texts),), (np.array(block, dtype) for block in blocks))

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def write(self, file: Any) -> None:
        """The bytes of all parts, in C order, little endian."""
        for part in self.parts:
            flat = np.ascontiguousarray(part, self.dtype.newbyteorder("<")).reshape(-1)
            file.write(flat.view(np.uint8).data)


def write_npz(file: BinaryIO, arrays: Mapping[str, Parts]) -> None:
    """As `numpy.savez` writes them."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            header = {"descr": npy.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array_header_1_0(member, header)
                array.write(member)


def write_safetensors(file: BinaryIO, arrays: Mapping[str, Parts], metadata: Mapping[str, str]) -> None:
    """As the safetensors library writes them. Raises CembedError for metadata that it would not read."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)  # so that all are aligned
    end = 0
    for name, array in ordered:
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _CODES[array.dtype.name], "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    if len(text) > _MOST_HEADER:
        raise CembedError(f"a .safetensors file has no room for {len(text):,} bytes of paths: write .npz")
    file.write(len(text).to_bytes(8, "little") + text)
    for _, array in ordered:
        array.write(file)


def check_npz(file: BinaryIO, names: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raises KeyError or ValueError, before anything is unpacked: an array is missing, its header does not fit its
    size, or all would take far more memory than the file."""
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        there = {*archive.namelist()}
        names = [*names, *(name for name in optional if f"{name}.npy" in there)]
        members = {name: archive.getinfo(f"{name}.npy") for name in names}
        unpacked = sum(member.file_size for member in members.values())
        if unpacked > _MOST_UNPACKED * size + _SLACK:
            raise ValueError(f"it has {size:,} bytes, and would unpack to {unpacked:,}")
        for name, member in members.items():
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others take memory at once
                raise ValueError(f"{name} is compressed as numpy never does")
            with archive.open(member) as stream:
                needed = array_bytes(stream, name) + stream.tell()
            if needed != member.file_size:
                raise ValueError(f"the header of {name} needs {needed:,} bytes, there are {member.file_size:,}")
    file.seek(0)


def array_bytes(stream: Any, name: str) -> int:
    """What the header at `stream` says that the array after it takes. Raises ValueError: none that is read here."""
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(stream)
    if version not in readers:
        raise ValueError(f"{name} has version {version} of numpy's format")
    shape, _, dtype = readers[version](stream)
    if dtype.hasobject or any(length < 0 for length in shape):
        raise ValueError(f"{name} holds {dtype} {list(shape)}")
    return int(dtype.itemsize) * math.prod(shape)

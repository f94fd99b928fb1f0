"""The vector file: the vectors of many pages, where they come from, and which bundle made them.

    vectors   float32 [rows, dim]       all pages' vectors, one page after the other
    offsets   int64   [num_pages + 1]   page i is vectors[offsets[i]:offsets[i + 1]]
    pages     int32   [num_pages]       page number in its file, from 1
    paths     str     [num_pages]       source files
    bundle    str                       sha256 of the manifest of the bundle

As `.npz`, numpy alone opens it. As `.safetensors`, `paths` is a JSON list and `bundle` a string in the metadata.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cembed.runtime.errors import CembedError
from cembed.runtime.finite import finite

Vectors = NDArray[np.float32]
SUFFIXES = (".npz", ".safetensors")
_ARRAYS = ("vectors", "offsets", "pages")


@dataclass(frozen=True, eq=False)
class VectorFile:
    """The content of a vector file; see the module for the shapes."""

    vectors: NDArray[np.float32]
    offsets: NDArray[np.int64]
    pages: NDArray[np.int32]
    paths: tuple[str, ...]
    bundle: str

    @classmethod
    def of(
        cls, embeddings: Sequence[NDArray[np.float32]], paths: Sequence[str], pages: Sequence[int], bundle: str
    ) -> VectorFile:
        """From one array [num_vectors, dim] for each page. Raises CembedError if there is none."""
        if not embeddings:
            raise CembedError("there are no vectors to keep")
        offsets = np.cumsum([0, *(len(e) for e in embeddings)], dtype=np.int64)
        return cls(np.concatenate(embeddings), offsets, np.array(pages, np.int32), tuple(paths), bundle)

    def __len__(self) -> int:
        return len(self.paths)

    def documents(self) -> list[NDArray[np.float32]]:
        """The vectors [num_vectors, dim] of each page: views, nothing is copied."""
        return [self.vectors[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def save(self, path: Path) -> None:
        """Write `path`, whole or not at all. Raises CembedError for another suffix or a full disk."""
        check_suffix(path)
        write_whole(path, lambda file: self._write(file, path.suffix))

    def _write(self, file: BinaryIO, suffix: str) -> None:
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        if suffix == ".npz":
            np.savez(file, allow_pickle=False, paths=np.array(self.paths), bundle=np.array(self.bundle), **arrays)
        else:
            file.write(save(arrays, {"paths": json.dumps(self.paths), "bundle": self.bundle}))

    @classmethod
    def load(cls, path: Path) -> VectorFile:
        """Read a vector file. Raises CembedError: not there, damaged, not a vector file."""
        check_suffix(path)
        try:
            content = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
        except OSError as error:
            raise CembedError(f"cannot read {path}: {error.strerror or error}") from error
        except Exception as error:  # zip, numpy, JSON and safetensors each raise their own
            raise CembedError(f"{path} is not a vector file, or damaged: {error}") from error
        content.check(path)
        return content

    def check(self, path: Path) -> None:
        """Raises CembedError if the arrays do not fit each other, or hold NaN or infinity."""
        n = len(self.paths)
        fits = (
            [array.dtype for array in (self.vectors, self.offsets, self.pages)] == [np.float32, np.int64, np.int32]
            and self.vectors.ndim == 2
            and self.offsets.shape == (n + 1,)
            and self.pages.shape == (n,)
            and self.offsets[0] == 0
            and self.offsets[-1] == len(self.vectors)
            and bool((np.diff(self.offsets) > 0).all())
        )
        if not fits:
            raise CembedError(f"{path} is damaged: its arrays do not fit each other")
        finite(f"{path} is damaged: it", self.vectors)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a file that appears at `path` when it is complete and on disk, or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CembedError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path, force: bool) -> None:
    """Raises CembedError before any work is done, if `path` could not be written after it."""
    check_suffix(path)
    if not path.parent.is_dir():
        raise CembedError(f"{path.parent} is no folder: make it first")
    if path.is_dir():
        raise CembedError(f"{path} is a folder: name a file")
    if path.exists() and not force:
        raise CembedError(f"{path} exists: choose another --out, or replace it with --force")


def check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise CembedError(f"{path}: a vector file ends in {' or '.join(SUFFIXES)}")


def _read_npz(path: Path) -> VectorFile:
    file: BinaryIO
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        vectors, offsets, pages = (arrays[name] for name in _ARRAYS)
        return VectorFile(vectors, offsets, pages, tuple(map(str, arrays["paths"])), str(arrays["bundle"][()]))


def _read_safetensors(path: Path) -> VectorFile:
    path.stat()  # an OSError that says what is wrong
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata()
            vectors, offsets, pages = (file.get_tensor(name) for name in _ARRAYS)
            return VectorFile(vectors, offsets, pages, tuple(json.loads(metadata["paths"])), metadata["bundle"])
    except SafetensorError as error:
        raise ValueError(error) from error

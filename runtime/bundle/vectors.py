"""The vector file: the vectors of many pages, where they come from, and which bundle made them.

    vectors   float32 [rows, dim]       all pages' vectors, one page after the other
    offsets   int64   [num_pages + 1]   page i is vectors[offsets[i]:offsets[i + 1]]
    pages     int32   [num_pages]       page number in its file, from 1
    paths     str     [num_pages]       source files
    bundle    str                       sha256 of the manifest of the bundle
    warnings  str     [num_pages]       what may be wrong with a page, or nothing; left out where no page has any

As `.npz`, numpy alone opens it. As `.safetensors`, `paths` and `warnings` are JSON lists and `bundle` a string in the
metadata.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from cembed.runtime.bundle.array_files import Parts, check_npz, write_npz, write_safetensors
from cembed.runtime.errors import CembedError
from cembed.runtime.finite import finite

Vectors = NDArray[np.float32]
SUFFIXES = (".npz", ".safetensors")
_ARRAYS = ("vectors", "offsets", "pages")


@dataclass(frozen=True, eq=False)
class VectorParts:
    """The content of a vector file with the vectors in parts: to be written without a copy of them all."""

    parts: Sequence[NDArray[np.float32]]
    offsets: NDArray[np.int64]
    pages: NDArray[np.int32]
    paths: Sequence[str]
    bundle: str
    warnings: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        embeddings: Sequence[NDArray[np.float32]],
        paths: Sequence[str],
        pages: Sequence[int],
        bundle: str,
        warnings: Sequence[str] = (),
    ) -> VectorParts:
        """From one array [num_vectors, dim] for each page. Raises CembedError if there is none."""
        if not embeddings:
            raise CembedError("there are no vectors to keep")
        offsets = np.cumsum([0, *(len(e) for e in embeddings)], dtype=np.int64)
        return cls(embeddings, offsets, np.array(pages, np.int32), paths, bundle, warnings if any(warnings) else ())

    def save(self, path: Path) -> None:
        """Write `path`, whole or not at all. Raises CembedError for another suffix or a full disk."""
        check_suffix(path)
        write_whole(path, self._write_npz if path.suffix == ".npz" else self._write_safetensors)

    def _arrays(self) -> dict[str, Parts]:
        return {
            "vectors": Parts.of(self.parts),
            "offsets": Parts.of([self.offsets]),
            "pages": Parts.of([self.pages]),
        }

    def _write_npz(self, file: BinaryIO) -> None:
        bundle = np.array(self.bundle)
        texts = {"paths": Parts.of_texts(self.paths), "bundle": Parts(bundle.dtype, (), [bundle])}
        texts |= {"warnings": Parts.of_texts(self.warnings)} if self.warnings else {}
        write_npz(file, self._arrays() | texts)

    def _write_safetensors(self, file: BinaryIO) -> None:
        texts = {"paths": json.dumps(list(self.paths)), "bundle": self.bundle}
        texts |= {"warnings": json.dumps(list(self.warnings))} if self.warnings else {}
        write_safetensors(file, self._arrays(), texts)


@dataclass(frozen=True, eq=False)
class VectorFile:
    """The content of a vector file; see the module for the shapes. `warnings` is empty where no page has any."""

    vectors: NDArray[np.float32]
    offsets: NDArray[np.int64]
    pages: NDArray[np.int32]
    paths: tuple[str, ...]
    bundle: str
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        embeddings: Sequence[NDArray[np.float32]],
        paths: Sequence[str],
        pages: Sequence[int],
        bundle: str,
        warnings: Sequence[str] = (),
    ) -> VectorFile:
        """From one array [num_vectors, dim] for each page. Raises CembedError if there is none."""
        made = VectorParts.of(embeddings, paths, pages, bundle, warnings)
        vectors = np.concatenate(made.parts)
        return cls(vectors, made.offsets, made.pages, tuple(paths), bundle, tuple(made.warnings))

    def __len__(self) -> int:
        return len(self.paths)

    def documents(self) -> list[NDArray[np.float32]]:
        """The vectors [num_vectors, dim] of each page: views, nothing is copied."""
        return [self.vectors[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def save(self, path: Path) -> None:
        """Write `path`, whole or not at all. Raises CembedError for another suffix or a full disk."""
        VectorParts([self.vectors], self.offsets, self.pages, self.paths, self.bundle, self.warnings).save(path)

    @classmethod
    def load(cls, path: Path) -> VectorFile:
        """Read a vector file. Raises CembedError: not there, damaged, not a vector file, more than memory holds."""
        check_suffix(path)
        try:
            content = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
        except OSError as error:
            raise CembedError(f"cannot read {path}: {error.strerror or error}") from error
        except MemoryError as error:
            raise CembedError(f"there is not enough memory for the vectors of {path}") from error
        except Exception as error:  # zip, numpy, JSON and safetensors each raise their own
            reason = " ".join(str(error).split())
            raise CembedError(f"{path} is not a vector file, or damaged: {reason:.200}") from error
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
            and len(self.warnings) in (0, n)
            and self.offsets[0] == 0
            and self.offsets[-1] == len(self.vectors)
            and bool((np.diff(self.offsets) > 0).all())
        )
        if not fits:
            raise CembedError(f"{path} is damaged: its arrays do not fit each other")
        finite(f"{path} is damaged: it", self.vectors)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a file that appears at `path` when it is complete and on disk, or not at all."""
    temporary = write_aside(path, write)
    try:
        temporary.replace(path)
    except OSError as error:
        raise CembedError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_aside(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """A hidden file beside `path` that `write` has filled, on disk; none if that failed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CembedError(f"cannot write {path}: {error.strerror or error}") from error
        raise
    return temporary


def check_writable(path: Path, force: bool) -> None:
    """Raises CembedError before any work is done, if `path` could not be written after it."""
    check_suffix(path)
    if not path.parent.is_dir():
        raise CembedError(f"{path.parent} is no folder: make it first")
    if path.is_dir():
        raise CembedError(f"{path} is a folder: name a file")
    if os.path.lexists(path) and not force:
        raise CembedError(f"{path} exists: choose another --out, or replace it with --force")
    write_aside(path, lambda file: None).unlink()


def check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise CembedError(f"{path}: a vector file ends in {' or '.join(SUFFIXES)}")


def _read_npz(path: Path) -> VectorFile:
    file: BinaryIO
    with path.open("rb") as file:
        check_npz(file, (*_ARRAYS, "paths", "bundle"), ("warnings",))
        with np.load(file, allow_pickle=False) as arrays:
            vectors, offsets, pages = (arrays[name] for name in _ARRAYS)
            warnings = _texts(arrays["warnings"], "warnings") if "warnings" in arrays else ()
            paths, (bundle,) = _texts(arrays["paths"], "paths"), _texts(arrays["bundle"][None], "bundle")
            return VectorFile(vectors, offsets, pages, paths, bundle, warnings)


def _texts(values: Any, name: str) -> tuple[str, ...]:
    """`values`, an array of strings or a list of them. Raises ValueError for anything else."""
    texts = tuple(values.tolist() if isinstance(values, np.ndarray) else values)
    if not isinstance(values, (np.ndarray, list)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} are no strings")
    return texts


def _read_safetensors(path: Path) -> VectorFile:
    path.stat()  # an OSError that says what is wrong
    try:
        with safe_open(str(path), framework="numpy") as file:  # it compares shapes and places with the file's size
            metadata = file.metadata() or {}
            if missing := {"paths", "bundle"} - metadata.keys():
                raise ValueError(f"its metadata has no {', '.join(sorted(missing))}")
            paths, warnings = (_texts(json.loads(metadata.get(name, "[]")), name) for name in ("paths", "warnings"))
            vectors, offsets, pages = (file.get_tensor(name) for name in _ARRAYS)
            return VectorFile(vectors, offsets, pages, paths, metadata["bundle"], warnings)
    except SafetensorError as error:
        raise ValueError(error) from error

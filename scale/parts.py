"""Rows in a folder of parts, written as they come, each part whole or not at all: `DIR.parquet` or `DIR.lance`.

A run that was ended is started again with the same command, and goes on: what is written is not made again. Parts of a
killed run are found by their name, `.tmp`, and removed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs as filesystems
from pyarrow import parquet

from cembed.runtime.errors import CembedError, missing_extra
from cembed.runtime.writer import sync
from cembed.scale import SUFFIXES
from cembed.scale.rows import KEY_BYTES, Row, RowSchema, keys_of

PART_ROWS = 2048
PART_BYTES = 64 << 20
FLUSH_SECONDS = 30.0
"""Of embedding, at most, are lost when the process is killed."""
BUCKETS = 256
NEW_KEYS = 1 << 18
"""That are held as objects, before they are written beside the others."""
Keys = NDArray[np.bytes_]


class Store(Protocol):
    """Where parts are."""

    def schema(self) -> RowSchema | None:
        """Of what is there; None if nothing is."""

    def batches(self, columns: list[str] | None = None) -> Iterator[Any]:
        """Record batches of what is there."""

    def append(self, batch: Any) -> None:
        """Adds a batch, which is on disk when this returns."""


class ParquetStore:
    """`part-N.parquet` in a folder of any file system that pyarrow knows."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fs, self._root = open_filesystem(path)
        self._next = 0

    def _parts(self) -> list[str]:
        selector = filesystems.FileSelector(self._root, allow_not_found=True)
        names = [info.base_name for info in self._fs.get_file_info(selector)]
        for name in names:
            if name.endswith(".tmp"):  # of a killed run
                self._fs.delete_file(f"{self._root}/{name}")
        found = sorted(name for name in names if name.startswith("part-") and name.endswith(".parquet"))
        if found:
            self._next = 1 + int(found[-1].removeprefix("part-").removesuffix(".parquet"))
        return [f"{self._root}/{name}" for name in found]

    def schema(self) -> RowSchema | None:
        parts = self._parts()
        return RowSchema.of(parquet.read_schema(parts[0], filesystem=self._fs), self.path) if parts else None

    def batches(self, columns: list[str] | None = None) -> Iterator[Any]:
        for part in self._parts():
            with self._fs.open_input_file(part) as file:
                yield from parquet.ParquetFile(file).iter_batches(PART_ROWS, columns=columns)

    def append(self, batch: Any) -> None:
        self._fs.create_dir(self._root, recursive=True)
        part = f"{self._root}/part-{self._next:08d}.parquet"
        with self._fs.open_output_stream(f"{part}.tmp") as file:
            # Vectors of models are noise to every compression and to dictionaries; texts repeat.
            texts = ["path", "sha256", "bundle", "settings", "warning", "error"]
            with parquet.ParquetWriter(file, batch.schema, compression="zstd", use_dictionary=texts) as writer:
                writer.write_batch(batch)
        if isinstance(self._fs, filesystems.LocalFileSystem):
            sync([Path(f"{part}.tmp")])
        self._fs.move(f"{part}.tmp", part)
        if isinstance(self._fs, filesystems.LocalFileSystem):
            sync([Path(self._root)])
        self._next += 1


class LanceStore:
    """A Lance dataset: a version for each part."""

    def __init__(self, path: str) -> None:
        try:
            import lance
        except ImportError as error:
            raise missing_extra(f"{path}", "pylance", "lance", error) from error
        self.path, self._lance = path, lance

    def _open(self) -> Any:
        try:
            return self._lance.dataset(self.path)
        except ValueError:  # there is none
            return None

    def schema(self) -> RowSchema | None:
        found = self._open()
        return None if found is None else RowSchema.of(found.schema, self.path)

    def batches(self, columns: list[str] | None = None) -> Iterator[Any]:
        found = self._open()
        return iter(()) if found is None else iter(found.to_batches(columns=columns))

    def append(self, batch: Any) -> None:
        mode = "create" if self._open() is None else "append"
        self._lance.write_dataset(pa.Table.from_batches([batch]), self.path, mode=mode)


def open_store(path: str | Path) -> Store:
    """Raises CembedError: another suffix than those in SUFFIXES."""
    name = os.fspath(path).rstrip("/")
    if not name.endswith(SUFFIXES):
        raise CembedError(f"{name}: rows are written to a folder named *.parquet or *.lance")
    return LanceStore(name) if name.endswith(".lance") else ParquetStore(name)


def open_filesystem(path: str) -> tuple[Any, str]:
    """A file system of pyarrow and the path in it, of a local path or a URI (s3, gs, abfs, hdfs, file)."""
    try:
        if "://" in path:
            return filesystems.FileSystem.from_uri(path)  # type: ignore[no-any-return]
        return filesystems.LocalFileSystem(), os.path.abspath(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise CembedError(f"{path}: {error}") from error


class Done:
    """The keys of rows that are written: sorted, in a file that is mapped, so that memory does not grow with them."""

    def __init__(self, parts: Iterable[Keys], folder: str | None = None) -> None:
        with contextlib.ExitStack() as stack:
            buckets = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(BUCKETS)]
            for keys in parts:
                firsts = keys.view(np.uint8).reshape(-1, KEY_BYTES)[:, 0]
                order = np.argsort(firsts, kind="stable")
                edges = np.searchsorted(firsts[order], np.arange(BUCKETS + 1))
                for bucket, first, last in zip(buckets, edges, edges[1:], strict=False):
                    bucket.write(keys[order[first:last]].tobytes())
            handle, name = tempfile.mkstemp(dir=folder)
            with os.fdopen(handle, "wb") as file:
                for bucket in buckets:
                    bucket.seek(0)
                    file.write(np.sort(np.frombuffer(bucket.read(), f"S{KEY_BYTES}")).tobytes())
        try:
            size = os.path.getsize(name)
            self.keys: Keys = np.memmap(name, f"S{KEY_BYTES}", "r") if size else np.empty(0, f"S{KEY_BYTES}")
        finally:
            os.unlink(name)

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: bytes) -> bool:
        return has_key(self.keys, key)


def has_key(keys: Keys, key: bytes) -> bool:
    """Whether sorted keys have this one.

    >>> has_key(np.array([b"a", b"c"]), b"c"), has_key(np.array([b"a", b"c"]), b"b")
    (True, False)
    """
    place = int(np.searchsorted(keys, key))
    return place < len(keys) and bytes(keys[place]) == key.rstrip(b"\0")


class Parts:
    """Rows on their way into a store, in parts; leaving the `with` block writes what is left, whatever ended it."""

    def __init__(self, store: Store, schema: RowSchema) -> None:
        """Raises CembedError: rows of another bundle, dim, storage or settings are there."""
        there = store.schema()
        if there is not None and there != schema:
            different = [name for name in vars(schema) if getattr(there, name) != getattr(schema, name)]
            raise CembedError(f"the rows that are there have another {', '.join(different)}: choose another folder")
        self.schema, self._store = schema, store
        self.done = Done(keys_of(batch) for batch in store.batches(["key"]))
        self._new = set[bytes]()
        self._rows, self._batches, self._bytes, self._flushed = list[Row](), list[Any](), 0, time.monotonic()

    def __contains__(self, key: bytes) -> bool:
        return key in self._new or key in self.done

    def add(self, row: Row) -> bool:
        """Adds a row that is not there; gives whether it was not."""
        if not self._take(row.key(self.schema.settings)):
            return False
        self._rows.append(row)
        self._bytes += 0 if row.vectors is None else row.vectors.nbytes
        self._flush_if_much()
        return True

    def add_batch(self, batch: Any) -> int:
        """Adds those rows of a batch that are not there; gives their number."""
        new = np.array([self._take(bytes(key).ljust(KEY_BYTES, b"\0")) for key in keys_of(batch)], bool)
        if new.any():
            self._batches.append(batch if new.all() else batch.filter(pa.array(new)))
            self._bytes += self._batches[-1].nbytes
            self._flush_if_much()
        return int(new.sum())

    def _take(self, key: bytes) -> bool:
        """Whether a key is new; from now on it is there."""
        if key in self:
            return False
        self._new.add(key)
        if len(self._new) >= NEW_KEYS:
            new = np.array(list(self._new), f"S{KEY_BYTES}")
            self.done, self._new = Done([self.done.keys, new]), set()
        return True

    def _flush_if_much(self) -> None:
        rows = len(self._rows) + sum(map(len, self._batches))
        if rows >= PART_ROWS or self._bytes >= PART_BYTES or time.monotonic() > self._flushed + FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Makes a part of what is waiting."""
        batches = [*self._batches, *([self.schema.batch(self._rows)] if self._rows else [])]
        if batches:
            self._store.append(pa.concat_batches(batches))
        self._rows, self._batches, self._bytes, self._flushed = [], [], 0, time.monotonic()

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.flush()

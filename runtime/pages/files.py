"""Files that are open for reading: the reading side opens them, the decoding process gets them without their paths."""

from __future__ import annotations

import gc
import mmap
import os
import stat
from functools import cached_property
from typing import Any, BinaryIO
from weakref import WeakSet

from cembed.runtime.pages.images import RefusedError

# A pipe must not be waited for, nor a terminal taken, before anything can be said of what a path leads to.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_CLOEXEC", 0)

_HELD: WeakSet[mmap.mmap] = WeakSet()  # mapped still, though closed
_MOST_HELD, _LARGE = 16, 4 << 20


class File:
    """An open file, which is closed with it; `named_pdf` is all that its name says."""

    def __init__(self, descriptor: int, named_pdf: bool = False) -> None:
        self.descriptor, self.named_pdf = descriptor, named_pdf
        self.size = os.fstat(descriptor).st_size
        self._streams: list[BinaryIO] = []
        self.found: Any = None  # out about it, for when it is opened again

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> File:
        """Follows links. Raises RefusedError for what is no regular file or empty, OSError, and ValueError for NUL."""
        about = os.stat(path)
        if stat.S_ISREG(about.st_mode):
            descriptor = os.open(path, _FLAGS)
            about = os.fstat(descriptor)  # whatever it was a moment ago
            if stat.S_ISREG(about.st_mode) and about.st_size:
                return cls(descriptor, os.fspath(path).lower().endswith(".pdf"))
            os.close(descriptor)
        if stat.S_ISREG(about.st_mode):
            raise RefusedError("the file is empty")
        raise RefusedError("is a folder" if stat.S_ISDIR(about.st_mode) else "is not a regular file")

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stream(self) -> BinaryIO:
        """From the start of the file. One is used at a time: they share their place in it."""
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        stream = os.fdopen(os.dup(self.descriptor), "rb")
        self._streams.append(stream)
        return stream

    def read(self) -> bytes:
        with self.stream() as stream:
            return stream.read()

    @cached_property
    def mapped(self) -> mmap.mmap:
        """Takes addresses, which the reading side has made room for, and no memory that counts."""
        return mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)

    def close(self) -> None:
        """With all that was opened of it: what failed may be held by a circle of objects, and descriptors are few."""
        self.found = None
        for stream in self._streams:
            stream.close()
        os.close(self.descriptor)
        if "mapped" in vars(self):
            try:
                self.mapped.close()
            except BufferError:  # something points into it
                _HELD.add(self.mapped)
                if self.size > _LARGE or len(_HELD) > _MOST_HELD:
                    gc.collect()

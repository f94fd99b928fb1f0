"""The directories of a TIFF file: which frames are pages, and what their tags say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from cembed.runtime.pages.images import RefusedError

# The second of each pair is written by programs that swap the first two bytes only.
HEADERS = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 10: "i4", 11: "f4",
         12: "f8", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}  # fmt: skip
FRACTIONS = (5, 10)  # are pairs

NEW_SUBFILE_TYPE, SUBFILE_TYPE, SUB_IFDS = 254, 255, 330
REDUCED, MASK = 1, 4  # bits of NewSubfileType
OLD_SUBFILE_TYPES = {2: REDUCED}

Values = npt.NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class Directory:
    """The tags of one frame, by number, each with its type and values still undecoded."""

    file: TiffFile
    start: int
    entries: npt.NDArray[np.void]

    def values(self, tag: int) -> Values | None:
        """The values of a tag, fractions as pairs; None if the frame has none. Raises RefusedError: damage."""
        found = self.entries[self.entries["tag"] == tag]
        if not found.size or not found["count"][0]:
            return None
        kind, count, inline = found["type"][0], int(found["count"][0]), found["value"][0].tobytes()
        if kind not in TYPES:
            raise RefusedError(f"damaged: tag {tag} is of the unknown type {kind}")
        dtype = np.dtype(
            self.file.order + TYPES[kind] if kind not in FRACTIONS else f"(2,){self.file.order}{TYPES[kind]}"
        )
        length = count * dtype.itemsize
        data = inline[:length] if length <= len(inline) else self.file.read(self.file.offset(inline), length)
        if len(data) < length:
            raise RefusedError(f"damaged: the file ends within the values of tag {tag}")
        return np.frombuffer(data, dtype)

    def number(self, tag: int, default: int) -> int:
        """The first value of a tag."""
        values = self.values(tag)
        return default if values is None else int(values.flat[0])

    def alone(self) -> bytes:
        """The whole file, with this frame as the first."""
        return self.file.starting_at(self.start)

    @property
    def subfile(self) -> int:
        """NewSubfileType, or what SubfileType says in its terms."""
        with contextlib.suppress(RefusedError):
            return self.number(NEW_SUBFILE_TYPE, OLD_SUBFILE_TYPES.get(self.number(SUBFILE_TYPE, 0), 0))
        return 0


class TiffFile:
    """An open TIFF or BigTIFF file. Raises RefusedError where it is neither."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = self._file.seek(0, 2)
        head = self.read(0, 16)
        if head[:4] not in HEADERS:
            raise RefusedError("damaged: the header of a TIFF file is wrong")
        self.order, big = "<" if head[:2] == b"II" else ">", b"+" in head[2:4]
        if len(head) < (16 if big else 8):
            raise RefusedError("damaged: the file ends within its header")
        word = self.order + ("u8" if big else "u4")
        self._count, self._word = np.dtype(self.order + ("u8" if big else "u2")), np.dtype(word)
        fields = [("tag", self.order + "u2"), ("type", self.order + "u2"), ("count", word)]
        self._entry = np.dtype([*fields, ("value", f"V{self._word.itemsize}")])
        self._first = self.offset(head[8:] if big else head[4:])

    def read(self, start: int, length: int) -> bytes:
        """The bytes from `start`, fewer where the file ends."""
        if start >= self.size:
            return b""
        self._file.seek(start)
        return self._file.read(min(length, self.size - start))

    def starting_at(self, start: int) -> bytes:
        """The file with another first directory."""
        first = np.array([start], self._word).tobytes()
        return self.read(0, len(first)) + first + self.read(2 * len(first), self.size)

    def offset(self, value: bytes) -> int:
        return int(np.frombuffer(value[: self._word.itemsize], self._word)[0])

    def pages(self) -> list[Directory | None]:
        """The frames that are pages: no thumbnails and no masks, if there is anything else. None stands for all that
        follow a place where the chain of frames is torn.
        """
        chain = list(self._chain(self._first))
        frames = unmarked(chain, REDUCED | MASK)
        if not any(frames):  # cameras keep the picture itself beneath its thumbnail
            nested = [inner for frame in chain if frame is not None for inner in self._nested(frame)]
            frames = unmarked(nested, REDUCED | MASK)
        return frames or unmarked(chain, MASK) or chain

    def _nested(self, frame: Directory) -> Iterator[Directory]:
        with contextlib.suppress(RefusedError):
            starts = frame.values(SUB_IFDS)
            for start in [] if starts is None else starts.tolist():
                directory, _ = self._directory(start)
                if directory is not None:
                    yield directory

    def _chain(self, start: int) -> Iterator[Directory | None]:
        seen: set[int] = set()
        while start and start not in seen:
            seen.add(start)
            directory, start = self._directory(start)
            yield directory

    def _directory(self, start: int) -> tuple[Directory | None, int]:
        """The directory at `start`, None if the file does not hold it, and the place of the next one or 0."""
        head = self.read(start, self._count.itemsize)
        count = int(np.frombuffer(head, self._count)[0]) if len(head) == self._count.itemsize else 0
        length = count * self._entry.itemsize
        body = self.read(start + len(head), min(length + self._word.itemsize, self.size))
        if not count or len(body) < length:
            return None, 0
        following = body[length:]
        following_start = self.offset(following) if len(following) == self._word.itemsize else 0
        return Directory(self, start, np.frombuffer(body[:length], self._entry)), following_start


def unmarked(frames: Sequence[Directory | None], marks: int) -> list[Directory | None]:
    """The frames whose subfile type has none of `marks`; None stays."""
    return [frame for frame in frames if frame is None or not frame.subfile & marks]

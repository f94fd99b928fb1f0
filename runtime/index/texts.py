"""The texts of a record: each count uint32, ends uint32 [count], and the text in UTF-8."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COUNT = struct.Struct("<I")


class MalformedError(Exception):
    """Bytes that are no record of this version, whatever their CRC says."""


class Texts(Sequence[str]):
    """Strings in one piece of memory, decoded one at a time."""

    def __init__(self, ends: NDArray[np.int64], text: bytes) -> None:
        self._ends, self._text = ends, text

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        return cls(np.cumsum([len(part) for part in parts], dtype=np.int64), b"".join(parts))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        first = int(self._ends[index - 1]) if index else 0
        return self._text[first : int(self._ends[index])].decode("utf-8", "surrogatepass")

    def mention(self, part: str) -> bool:
        """Whether `part` is in one of them, or where two meet."""
        return part.encode() in self._text

    def encode(self) -> bytes:
        return _COUNT.pack(len(self)) + self._ends.astype("<u4").tobytes() + self._text

    def check(self) -> None:
        """Raises MalformedError: not UTF-8."""
        text = np.frombuffer(self._text + b"\0", np.uint8)
        try:
            self._text.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise MalformedError(f"its texts are not UTF-8: {error}") from error
        if (text[self._ends] & 0xC0 == 0x80).any():
            raise MalformedError("its texts are not UTF-8: one ends within a character")

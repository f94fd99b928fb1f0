"""Bytes that requests hold at a time, all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Share:
    """What one request holds."""

    def __init__(self, room: Room) -> None:
        self._room, self.held = room, 0

    def take(self, size: int) -> None:
        """Raises what the room raises when it is full."""
        self.held += size
        self._room.held += size
        if self._room.held > self._room.limit:
            raise self._room.refusal()


class Room:
    """Of `limit` bytes; what does not fit in is refused."""

    def __init__(self, limit: int, refusal: Callable[[], Exception]) -> None:
        self.limit, self.refusal, self.held = limit, refusal, 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """What is taken of it is given back in the end.

        >>> room = Room(10, MemoryError)
        >>> with room.share() as share:
        ...     share.take(7)
        ...     room.held
        7
        >>> room.held
        0
        """
        share = Share(self)
        try:
            yield share
        finally:
            self.held -= share.held

"""Which pages an index has: by id, and by the hash of their content."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cembed.runtime.records import CONTENT_BYTES
from cembed.runtime.views import View

_NO_CONTENT = bytes(CONTENT_BYTES)


class KnownPages:
    """Serials of the live pages."""

    def __init__(self, views: Iterable[View]) -> None:
        """Reads the logs once more. Raises CembedError: they are damaged."""
        self._ids: dict[str, int] = {}
        self._contents: dict[bytes, str] = {}
        self._content_of: dict[str, bytes] = {}
        for view in views:
            for commit, pages in view.commits():
                for place in np.flatnonzero(view.alive[pages]).tolist():
                    self.put(commit.ids[place], int(commit.serials[place]), commit.contents[place].tobytes())

    def __len__(self) -> int:
        return len(self._ids)

    def serial(self, page: str) -> int | None:
        return self._ids.get(page)

    def has(self, page: str, content: bytes) -> bool:
        """Whether `content` is there, under this id or, where nothing has this id, under any."""
        content = content.ljust(CONTENT_BYTES, b"\0")
        return content in self._contents and self._content_of.get(page, content) == content

    def put(self, page: str, serial: int, content: bytes) -> None:
        """The page that had this id is not there any more."""
        self.drop(page)
        self._ids[page] = serial
        content = content.ljust(CONTENT_BYTES, b"\0")
        if content != _NO_CONTENT:
            self._contents[content] = page
            self._content_of[page] = content

    def drop(self, page: str) -> None:
        self._ids.pop(page, None)
        content = self._content_of.pop(page, _NO_CONTENT)
        if self._contents.get(content) == page:
            del self._contents[content]

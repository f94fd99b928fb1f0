"""Which pages an index has: by id, and by the hash of their content."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from cembed.runtime.index.metadata import canonical, warnings_of
from cembed.runtime.index.records import CONTENT_BYTES, Commit
from cembed.runtime.index.views import View

_NO_CONTENT = bytes(CONTENT_BYTES)


class Told(NamedTuple):
    """What is said of a page: `metadata` is JSON."""

    source: str
    number: int
    metadata: str

    def same(self, other: Told) -> bool:
        """Whether it is the same but for the order of names in the metadata."""
        try:
            ours, theirs = canonical(self.metadata), canonical(other.metadata)
        except (ValueError, RecursionError):
            return False
        return (self.source, self.number, ours) == (other.source, other.number, theirs)


class _Known(NamedTuple):
    serial: int
    content: bytes
    told: int  # the hash of a Told: texts of a million pages would take memory


class KnownPages:
    """The live pages, and which page has the vectors of a content."""

    def __init__(self, views: Iterable[View], tell: Callable[[int], Told]) -> None:
        """Reads the logs once more; `tell` says what is said of a page by its serial. Raises CembedError: damage."""
        self._tell = tell
        self._pages: dict[str, _Known] = {}
        self._contents: dict[bytes, int] = {}  # the newest serial, of a removed page too: its bytes are still there
        self._copies: dict[bytes, int] = {}  # live pages with a content, where there are more than one
        self._gone: set[bytes] = set()  # contents of which no page is left
        self._warnings: dict[bytes, str] = {}
        for view in views:
            for commit, pages in view.commits():
                self._read(commit, np.flatnonzero(view.alive[pages]).tolist())

    def _read(self, commit: Commit, places: Iterable[int]) -> None:
        sources, metadata = list(map(hash, commit.sources)), list(map(hash, commit.metadata))
        serials, numbers, warnings = commit.serials.tolist(), commit.numbers.tolist(), warnings_of(commit)
        source, metadatum = commit.source.tolist(), commit.metadatum.tolist()
        for i in places:
            told = hash((sources[source[i]], numbers[i], metadata[metadatum[i]]))
            known = _Known(serials[i], commit.contents[i].tobytes(), told)
            self._put(commit.ids[i], known, warnings.get(metadatum[i]))

    def __len__(self) -> int:
        return len(self._pages)

    def serial(self, page: str) -> int | None:
        known = self._pages.get(page)
        return None if known is None else known.serial

    def has(self, page: str, content: bytes) -> bool:
        """Whether the page with this id has `content`."""
        known, content = self._pages.get(page), _padded(content)
        return known is not None and known.content == content != _NO_CONTENT

    def content(self, page: str) -> bytes | None:
        """None if there is no such page."""
        known = self._pages.get(page)
        return None if known is None else known.content

    def vectors_of(self, content: bytes, *, alive: bool = False) -> int | None:
        """The serial of a page with the vectors of `content`, which may be a removed one unless one is `alive`."""
        content = _padded(content)
        return None if alive and content in self._gone else self._contents.get(content)

    def warning_of(self, content: bytes) -> str | None:
        return self._warnings.get(_padded(content))

    def says(self, page: str, told: Told) -> bool:
        """Whether that is what is said of the page with this id."""
        known = self._pages[page]
        return known.told == _hash(told) or self._tell(known.serial).same(told)

    def put(self, page: str, serial: int, content: bytes, told: Told, warning: str | None) -> None:
        """The page that had this id is not there any more."""
        self._put(page, _Known(serial, _padded(content), _hash(told)), warning)

    def _put(self, page: str, known: _Known, warning: str | None) -> None:
        self.drop(page)
        self._pages[page], content = known, known.content
        if content == _NO_CONTENT:
            return
        if content in self._contents and content not in self._gone:
            self._copies[content] = self._copies.get(content, 1) + 1
        self._contents[content] = known.serial
        self._gone.discard(content)
        self._warnings.pop(content, None)
        if warning is not None:
            self._warnings[content] = warning

    def drop(self, page: str) -> None:
        known = self._pages.pop(page, None)
        if known is None or known.content == _NO_CONTENT:
            return
        copies = self._copies.pop(known.content, 1)
        if copies > 2:
            self._copies[known.content] = copies - 1
        elif copies == 1:
            self._gone.add(known.content)


def _padded(content: bytes) -> bytes:
    return content.ljust(CONTENT_BYTES, b"\0")


def _hash(told: Told) -> int:
    return hash((hash(told.source), told.number, hash(told.metadata)))

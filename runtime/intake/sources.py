"""The files of an index: which of its sources a path is, and whether that file is still there."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cembed.runtime.index.reader import IndexReader, Source
from cembed.runtime.plain_files import stamp_of


@dataclass(frozen=True)
class Document:
    """A file to add: its path as given, its name in the index, and its pages, None where that is not known.

    `stamp` differs when the file was changed after its bytes were hashed.
    """

    path: str
    source: str
    folder: str | None
    digest: bytes
    stamp: tuple[int, ...]
    pages: int | None

    def page_id(self, number: int) -> str:
        return f"{self.source}#{number}"

    @property
    def changed(self) -> bool:
        """Whether it is another file now, or is being written to."""
        try:
            return stamp_of(os.stat(self.path)) != self.stamp
        except OSError:
            return True


class Sources:
    """The files that an index has pages of, found by any spelling of their paths.

    A relative source starts where it was added from; if it is not there any more, or that is not known, in the working
    directory. Where it is not known it may be a name that somebody sent: files are found by it, none is opened for it.
    """

    def __init__(self, index: IndexReader, before: Sources | None = None) -> None:
        """Files that the index has no pages of have the names that they had `before`, in another one."""
        self._known, self._before = index.sources(), before
        self._at: dict[str, str] = {}
        for source in self._known:
            self._at.setdefault(self.place(source), source)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def _then(self, source: str) -> str:
        return os.path.join(self._known[source].folder or "", source)

    def place(self, source: str) -> str:
        """The path of a source's file, without links."""
        then = self._then(source)
        here = not os.path.lexists(then) and os.path.lexists(source)
        return os.path.realpath(source if here else then)

    def find(self, path: str) -> str | None:
        """The source that is the file at `path`."""
        real = os.path.realpath(path)
        same = path in self._known and self.place(path) == real
        return path if same else self._at.get(real)

    def name(self, path: str) -> tuple[str, str | None]:
        """The source that a file has or gets, which is its path as given if that is free; and its folder."""
        source = self.find(path)
        if source is not None:
            return source, self._known[source].folder
        if self._before is not None and self._before.find(path) is not None:
            return self._before.name(path)
        source = os.path.realpath(path) if path in self._known else path
        return source, None if os.path.isabs(source) else os.getcwd()

    def numbers(self, source: str | None) -> Sequence[int]:
        """Of the pages that the index has of a source."""
        return self._known[source].numbers if source in self._known else ()

    def is_gone(self, source: str) -> bool:
        """Whether its file is not where it was, in a folder that is still there."""
        then = self._then(source)
        return os.path.isabs(then) and not os.path.lexists(then) and os.path.isdir(os.path.dirname(then))

    def below(self, folder: str) -> list[str]:
        """Sources whose files are, or were, in a folder."""
        inside = os.path.join(folder, "")
        return [source for place, source in self._at.items() if place.startswith(inside) and self._is_file(source)]

    def files(self) -> list[str]:
        """The paths of all sources that are known to be files, without links."""
        return [self.place(source) for source in self._known if self._is_file(source)]

    def _is_file(self, source: str) -> bool:
        return os.path.isabs(self._then(source))

    def add(self, source: str, folder: str | None, number: int) -> None:
        """A page that the index has now."""
        if source not in self._known:
            self._known[source] = Source([], folder)
            self._at.setdefault(self.place(source), source)
        numbers = self._known[source].numbers
        assert isinstance(numbers, list)
        place = bisect.bisect_left(numbers, number)
        if numbers[place : place + 1] != [number]:
            numbers.insert(place, number)

    def remove(self, source: str, numbers: Sequence[int]) -> None:
        """Pages that the index does not have any more."""
        if source not in self._known:
            return
        left = sorted(set(self._known[source].numbers) - set(numbers))
        self._known[source] = Source(left, self._known[source].folder)
        if not left:
            place = self.place(source)
            del self._known[source]
            if self._at.get(place) == source:
                del self._at[place]

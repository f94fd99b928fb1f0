"""An index that is made anew with another bundle, from the files that it has pages of, while the old one is served.

Pages that clients sent have none: nothing of theirs is read, whatever their names are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cembed.runtime.index.index import Index
from cembed.runtime.intake.sources import Sources
from cembed.runtime.intake.swap import swap
from cembed.serve.watcher import BATCH, Watcher

LONGEST_WAIT = 60.0
"""Seconds, for files that are being written: they are read when the index is there."""


class Renewal:
    """`old` is the index at `path`, and stays as it is until `end`."""

    def __init__(self, path: Path, old: Index, say: Callable[[str], None]) -> None:
        self._path, self._old, self._say = path, old, say
        self._lost = list[str]()

    def fill(self, watcher: Watcher) -> None:
        """Embeds what is in the folders, then the other files of the old index."""
        self._say(f"{self._path} is made anew: {len(self._old)} pages")
        watcher.step()
        end = time.monotonic() + LONGEST_WAIT
        while watcher.busy and time.monotonic() < end:
            time.sleep(watcher.due(1.0))
            watcher.step()
        old = Sources(self._old)
        others = [path for path in old.files() if watcher.folders.root_of(path) is None]
        for start in range(0, len(others), BATCH):
            watcher.take_others(others[start : start + BATCH])
        pages = (f"{source}#{number}" for source in old for number in old.numbers(source))
        self._lost = [page for page in pages if page not in watcher.index]

    def end(self) -> None:
        """Puts the new index in the place of the old one, which is kept if it has pages that the new one lacks."""
        kept = swap(self._path, keep=bool(self._lost))
        self._say(f"{self._path} is made anew")
        if self._lost:
            self._say(
                f"{len(self._lost)} pages of the old index are not in it, such as {self._lost[0]}: their files are "
                f"gone, blank or cannot be read; the old index is at {kept}"
            )

"""The watcher: what comes into folders goes into an index, whatever befalls the folders, the files or the disk.

A pass lists the folders and compares them with the ledger. A file that is new or changed is pending until its size and
time have been still for a while; then it is read, and its outcome goes into the ledger. What may pass is tried again
with growing pauses: a lock, a missing right, a file that is still being written. What will not is remembered by its
content.
"""

from __future__ import annotations

import heapq
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.intake.folders import Folders, Stamp
from cembed.runtime.intake.job import Job, Pages, Result, remove_pages
from cembed.runtime.intake.ledger import Entry, Ledger, State
from cembed.runtime.intake.moving import free_path, move_file
from cembed.runtime.intake.sources import Sources
from cembed.runtime.intake.survey import SETTLED, Survey, survey
from cembed.runtime.pages.documents import place_of
from cembed.runtime.plain_files import stamp_of

BATCH = 64
"""Files that are taken at a time."""
LEAST_REMOVED = 1000
"""Pages that were removed, before their bytes are worth a compaction."""
PATIENCE = 5
"""Times `stable_for` that a file has to be still until what is wrong with it counts: its writer may have paused."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 600.0
"""Half the seconds until a file is first tried again, and the most."""


@dataclass(frozen=True)
class Rules:
    """How folders are watched; seconds.

    `mirror`: pages of files that are deleted leave the index. `done` and `failed` are folders that files go to when
    they are in the index, or when nothing of them can be read. `once`: what is wrong counts at once.
    """

    stable_for: float = 2.0
    every: float = 5.0
    mirror: bool = False
    done: Path | None = None
    failed: Path | None = None
    once: bool = False

    def __post_init__(self) -> None:
        """Raises CembedError: rules that contradict each other."""
        if self.mirror and (self.done or self.failed):
            raise CembedError(
                "--mirror takes out the pages of files that leave a folder, and --move-done and --move-failed make "
                "files leave it: choose one of them"
            )


@dataclass
class Pending:
    """A file that is not settled: unchanged `since`, not looked at before `retry_at`."""

    stamp: Stamp
    since: float
    tries: int = 0
    retry_at: float = 0.0


@dataclass
class Tally:
    """Pages and files so far: for a person, in the end."""

    added: int = 0
    shared: int = 0
    removed: int = 0
    moved: int = 0
    blank: int = 0
    failed: int = 0
    failed_before: int = 0

    def count(self, job: Job) -> None:
        for name in ("added", "shared", "removed", "moved", "blank", "failed_before"):
            setattr(self, name, getattr(self, name) + getattr(job, name))


@dataclass
class Watcher:
    """`before` is an older index, whose pages had names and metadata. `between` is called between pages, and may raise
    to stop: what was done stays. `say` takes lines for a person."""

    folders: Folders
    rules: Rules
    index: Index
    pages: Pages
    settings: str
    ledger: Ledger
    metadata: dict[str, Any] | None = None
    before: Index | None = None
    between: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda line: None
    clock: Callable[[], float] = time.monotonic
    pending: dict[str, Pending] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    troubles: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sources = Sources(self.index, Sources(self.before) if self.before is not None else None)
        self._missed: dict[str, float] = {}
        self._looked_at = Tally()
        for entry in self.ledger.entries("moving"):
            if not os.path.lexists(entry.path) and os.path.lexists(entry.to):
                self._note_moved(entry)
        if self.rules.mirror:
            self._expect_indexed()

    def _expect_indexed(self) -> None:
        """Files that are in the index and unknown to the ledger shall be there, or be missed."""
        with self.ledger.changing():
            for path in (path for root in self.folders.roots for path in self._sources.below(root)):
                if self.ledger.get(path) is None:
                    self.ledger.put(Entry(path, (), "waiting"))

    # A pass -----------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One pass. Raises CembedError: the index or the ledger cannot be written; nothing is lost by that."""
        found = survey(self.folders, self.ledger, self.between)
        self.troubles = found.troubles
        self._wait_for(found.unsettled)
        while batch := self._ready():
            self._take(batch)
        self._let_go(found)
        self._compact()

    def _compact(self) -> None:
        """What was removed takes disk and memory until then; only where that is half of all, and there is room."""
        if self.tally == self._looked_at:
            return
        self._looked_at, stats = replace(self.tally), self.index.stats()
        room = shutil.disk_usage(self.index.folder).free > sum(stats.bytes.values())
        if stats.removed <= max(stats.pages, LEAST_REMOVED) or not room:
            return
        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(self.index.compact)
            while not done.done():
                self.between()  # that it is alive
                wait([done], 0.5)
            done.result()

    @property
    def busy(self) -> bool:
        """Whether something that was seen was not tried yet, or may be gone."""
        return any(not pending.tries for pending in self.pending.values()) or bool(self._missed)

    def due(self, every: float) -> float:
        """Seconds until the next pass is due, `every` at most: when the next pending file may have been still."""
        times = [max(f.since + self.rules.stable_for, f.retry_at) for f in self.pending.values()]
        times += [since + 2 * self.rules.stable_for for since in self._missed.values()]
        return min(max(min(times, default=math.inf) - self.clock(), 0.01), every)

    def take_others(self, paths: Sequence[str]) -> None:
        """Files that are not in the folders, once, as they are now."""
        settled = {path for path in paths if (entry := self.ledger.get(path)) and entry.state in SETTLED}
        self.pending = {path: Pending((), -math.inf) for path in paths if path not in settled}
        if self.pending:
            self._take(list(self.pending))

    def _wait_for(self, unsettled: dict[str, Stamp]) -> None:
        now, before = self.clock(), self.pending
        self.pending = {}
        for path, stamp in unsettled.items():
            same = path in before and before[path].stamp == stamp
            self.pending[path] = before[path] if same else Pending(stamp, now)

    def _ready(self) -> list[str]:
        """The next files to take: those that came first."""
        now = self.clock()
        ready = (
            (file.since, path)
            for path, file in self.pending.items()
            if now >= max(file.since + self.rules.stable_for, file.retry_at)
        )
        return [path for _, path in heapq.nsmallest(BATCH, ready)]

    def _take(self, paths: Sequence[str]) -> None:
        job = Job(
            index=self.index,
            pages=self.pages,
            settings=self.settings,
            metadata=self.metadata,
            known=self.ledger.content,
            sources=self._sources,
            before=self.before,
        )
        job.plan(paths, self._name)
        job.awaited = {entry.to for entry in self.ledger.entries("moving")}
        job.run(self.between)
        self.tally.count(job)
        moves = list[Entry]()
        with self.ledger.changing():
            self.ledger.forget(job.left)
            for path in paths:
                moves += self._settle(path, job)
        for line in [*job.warnings, *job.notes]:
            self.say(line)
        for entry in moves:
            self._move(entry)

    def _settle(self, path: str, job: Job) -> list[Entry]:
        """Notes what became of a file; gives it, if it is to be moved."""
        if path in job.unreadable:
            error = job.unreadable[path]
            if isinstance(error.__cause__, FileNotFoundError):
                del self.pending[path]  # the next pass tells whether it is gone
            else:
                self._put_off(path, str(error))
            return []
        result, pending = job.results[path], self.pending[path]
        if result.retry:
            self._put_off(path, result.retry)
        elif (result.failed or result.warned) and not self._is_ripe(pending):
            pending.retry_at, pending.tries = pending.since + PATIENCE * self.rules.stable_for, 1
        else:
            del self.pending[path]
            self.ledger.tell(succeeded=time.time())
            return self._note(result, job.indexed(result.document))
        return []

    def _is_ripe(self, pending: Pending) -> bool:
        return self.rules.once or self.clock() >= pending.since + PATIENCE * self.rules.stable_for

    def _put_off(self, path: str, reason: str) -> None:
        """What may pass is tried again, later and later."""
        pending = self.pending[path]
        pending.tries += 1
        pause = max(self.rules.stable_for, SHORTEST_PAUSE) * 2 ** min(pending.tries, 20)
        pending.retry_at = self.clock() + min(pause, LONGEST_PAUSE)
        before = self.ledger.get(path)
        if before is None or before.reasons != (reason,):
            to = before.to if before else ""
            self.ledger.put(Entry(path, (), "moving" if to else "waiting", reasons=(reason,), to=to, when=time.time()))
            self.say(f"{path}: {reason}; it is tried again")

    def _note(self, result: Result, pages: int) -> list[Entry]:
        document, entry = result.document, result.entry(pages, time.time())
        known = self.ledger.content(document.digest)
        for missing in result.missing.values():
            if not missing.blank and (known is None or missing not in known.missing):
                self.tally.failed += 1
                self.say(f"not embedded: {place_of(document.path, missing.number)}: {missing.reason}")
        self.ledger.learn(document.digest, result.content)
        to = self._destination(entry)
        self.ledger.put(replace(entry, state="moving", to=to) if to else entry)
        return [replace(entry, to=to)] if to else []

    # Files that are moved ---------------------------------------------------------------------------------------------

    def _name(self, path: str, digest: bytes) -> str:
        """The path that a file has in the index: that to which it will be moved."""
        self.between()
        if self.rules.done is None or self.folders.root_of(path) is None:
            return path
        before, done = self.ledger.get(path), os.path.join(os.path.realpath(self.rules.done), "")
        planned = before.to if before is not None and before.to.startswith(done) else ""
        taken = {entry.to for entry in self.ledger.entries("moving") if entry.path != path}
        to = free_path(planned or self._place(self.rules.done, path), digest, taken)
        if to != planned:
            self.ledger.put(Entry(path, (), "moving", to=to, when=time.time()))
        return to

    def _place(self, folder: Path, path: str) -> str:
        """Where in `folder` a file goes: as deep as it is in the watched one."""
        return os.path.join(os.path.realpath(folder), os.path.relpath(path, self.folders.root_of(path)))

    def _destination(self, entry: Entry) -> str:
        """Where a file is to be moved; nowhere, if it is empty."""
        if self.folders.root_of(entry.path) is None:
            return ""
        if entry.pages or entry.state == "blank":
            planned = self.ledger.get(entry.path)
            return planned.to if planned else ""
        return free_path(self._place(self.rules.failed, entry.path), entry.digest, ()) if self.rules.failed else ""

    def _move(self, entry: Entry) -> None:
        try:
            if stamp_of(os.stat(entry.path)) != entry.stamp:
                return  # it was changed since it was read: the next pass takes what it is now
            move_file(entry.path, entry.to)
        except OSError as error:
            reason = f"cannot be moved to {entry.to}: {error.strerror or error}"
            self.pending[entry.path] = Pending(entry.stamp, self.clock())
            self._put_off(entry.path, reason)
            return
        self._note_moved(entry)

    def _note_moved(self, entry: Entry) -> None:
        known: State = "failed" if entry.reasons else "blank" if entry.blank and not entry.pages else "indexed"
        with self.ledger.changing():
            self.ledger.forget([entry.path])
            if entry.digest:  # it was not only planned
                self.ledger.put(replace(entry, path=entry.to, to="", state=known))

    # Files that are gone ----------------------------------------------------------------------------------------------

    def _let_go(self, found: Survey) -> None:
        """Files that were missed for a while are forgotten, and leave the index where it is a mirror."""
        now = self.clock()
        self._missed = {path: self._missed.get(path, now) for path in found.gone if not found.is_held(path)}
        gone = [path for path, since in self._missed.items() if now >= since + 2 * self.rules.stable_for]
        if not gone:
            return
        if self.rules.mirror:
            sources = [source for path in gone if (source := self._sources.find(path)) is not None]
            numbers = {source: list(self._sources.numbers(source)) for source in sources}
            remove_pages(self.index, self._sources, numbers)
            self.tally.removed += sum(map(len, numbers.values()))
        self.ledger.forget(gone)
        for path in gone:
            del self._missed[path]

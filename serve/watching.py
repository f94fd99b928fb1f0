"""`cembed watch`: a Watcher that goes on, whatever happens to the index, the disk or the bundle."""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cembed import __version__
from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.intake import heartbeat
from cembed.runtime.intake.job import Pages
from cembed.runtime.intake.ledger import Ledger
from cembed.runtime.intake.opening import bundle_of, open_or_create, reading_of
from cembed.runtime.intake.swap import mend, next_path
from cembed.runtime.updates.versions import current_hash, resolve
from cembed.serve.hints import Hints
from cembed.serve.hosts import Host, Model, Watching
from cembed.serve.notify import Notifier
from cembed.serve.renewal import Renewal
from cembed.serve.watcher import Tally, Watcher

LONGEST_PAUSE = 60.0
"""Seconds until the index is tried again, when it could not be written."""
M_ARENA_MAX = -8  # of malloc.h
BEAT_SECONDS, CHANGE_SECONDS = 60.0, 5.0
"""How often the ledger is told that the watcher is alive, and at most how often what it does: flash wears out."""
LOOK_SECONDS = 1.0
"""How often it is asked whether there is another bundle."""
ONCE_SECONDS = 60.0
"""How long the one pass of `once` waits for files that are being written."""


class NewBundleError(Exception):
    """Another bundle is where the one was that is in use."""


@dataclass
class Watch:
    """One watcher, for as long as the process lives. `say` takes lines for a person."""

    told: Watching
    host: Host
    say: Callable[[str], None]
    tally: Tally = field(default_factory=Tally)
    unfinished: int = 0
    """Files that wait when it ends."""
    troubles: dict[str, str] = field(default_factory=dict)
    """What is wrong with folders."""

    def __post_init__(self) -> None:
        self._notifier, self._hints = Notifier(), Hints(self.told.folders.roots)
        use_one_arena()
        self._bundle = self._refused = ""  # hashes: of the bundle in use, and of one that cannot be
        self._looked = self._told_at = 0.0
        self._last_facts: dict[str, Any] = {}
        self._trouble, self._retry, self._pause = "", self.told.retry_failed, 1.0

    def run(self) -> None:
        """Until a signal ends it, or with `once` when everything that is there was looked at.

        Raises CembedError: the bundle cannot be used, the index is of another one or another process writes to it.
        """
        model: Model | None = self._load()
        with self._hints:
            try:
                while model is not None:
                    model = self._watch_with(model)
            finally:
                self._notifier.stopping()

    # The bundle -------------------------------------------------------------------------------------------------------

    def _load(self) -> Model:
        return self.host.load(resolve(Path(self.told.loading.bundle)))

    def _next(self, old: Model) -> Model:
        """The model of the bundle that is there now; or the old one, if that cannot be used."""
        path = self.told.loading.bundle
        found = current_hash(Path(path)) or ""
        try:
            self._check_index(found)
            new = self._load()
        except CembedError as error:
            self._refused, self._trouble = found, f"another bundle is at {path}, and cannot be used: {error}"
            self.say(f"{self._trouble}; the old one stays in use")
            return old
        self._refused = self._trouble = ""
        self.say(f"another bundle is at {path}: {new.bundle[:12]}, in place of {old.bundle[:12]}")
        return new

    def _check_index(self, bundle: str) -> None:
        """Raises CembedError: the index is of another bundle, and shall not be made anew."""
        old = bundle_of(self.told.index)
        if old not in (None, bundle) and not self.told.reembed:
            raise CembedError(
                f"{self.told.index} has vectors of bundle {str(old)[:12]}, not of {bundle[:12]}: --reembed makes it "
                "anew from the files, and keeps the old one until then"
            )

    # The loop ---------------------------------------------------------------------------------------------------------

    def _watch_with(self, model: Model) -> Model | None:
        """Gives the model to go on with, or None when it is over."""
        self._bundle = model.bundle
        try:
            with model.pages() as pages:
                self._check(model)
                while not self._try(model, pages):
                    self._sleep_longer()
                return None
        except NewBundleError:
            return self._next(model)

    def _check(self, model: Model) -> None:
        """Raises CembedError: what is wrong with the index is for a person to mend."""
        mend(self.told.index, model.bundle)
        self._check_index(model.bundle)
        old = self._is_old(model)
        (Index.open(self.told.index, write=True) if old else self._open(self.told.index, model)).close()
        self._notifier.ready()

    def _is_old(self, model: Model) -> bool:
        return bundle_of(self.told.index) not in (None, model.bundle)

    def _open(self, path: Path, model: Model, before: Index | None = None) -> Index:
        """A new one has the storage types that were asked for, or those of the one before."""
        storage = self.told.storage or (before.tiers if before is not None else ())
        return open_or_create(path, bundle=model.bundle, dim=model.dim, storage=storage)

    def _try(self, model: Model, pages: Pages) -> bool:
        """Watches until it is over; gives False when something failed, and it is to be tried again."""
        try:
            if self._is_old(model):
                self._make_anew(model, pages)
            with self._writing(self.told.index, model, pages) as watcher:
                self.host.use(model, watcher.index)
                try:
                    self._pass_by_pass(watcher)
                finally:
                    self._tell_end(watcher)
            return True
        except CembedError as error:
            if self.told.rules.once:
                raise
            self._trouble = str(error)
            self.say(f"{error}; it is tried again in {self._pause:g} s")
            return False

    @contextmanager
    def _writing(self, path: Path, model: Model, pages: Pages, before: Index | None = None) -> Iterator[Watcher]:
        told = self.told
        with self._open(path, model, before) as index, Ledger.beside(path, write=True) as ledger:
            ledger.adopt(**reading_of(index, told.page_settings, told.skip_blank_pages, __version__))
            if self._retry:
                ledger.forget_contents()
                self._retry = False
            yield Watcher(
                folders=told.folders,
                rules=told.rules,
                index=index,
                pages=pages,
                settings=told.page_settings,
                ledger=ledger,
                metadata=told.metadata,
                before=before,
                between=partial(self._between, ledger),
                say=self.say,
                tally=self.tally,
            )

    def _pass_by_pass(self, watcher: Watcher) -> None:
        end = time.monotonic() + ONCE_SECONDS
        while True:
            start = time.monotonic()
            watcher.step()
            self._pause, self.unfinished = 1.0, len(watcher.pending)
            self._trouble = self._trouble if self._refused else ""
            self._tell_troubles(watcher.troubles)
            self._tell(watcher.ledger, watcher)
            if self.told.rules.once and (not watcher.busy or time.monotonic() > end):
                return
            took = time.monotonic() - start
            self._sleep_between(watcher.ledger, min(took, self.told.rules.every))  # hints may never end
            self._wait(watcher, time.monotonic() + watcher.due(self.told.rules.every))

    def _wait(self, watcher: Watcher, until: float) -> None:
        """For the next pass, or a hint."""
        while (left := until - time.monotonic()) > 0:
            self._between(watcher.ledger)
            if self._hints.wait(min(left, LOOK_SECONDS)):
                return

    def _sleep_longer(self) -> None:
        self._sleep_between(None, self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _sleep_between(self, ledger: Ledger | None, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._between(ledger)
            time.sleep(min(left, LOOK_SECONDS))

    def _make_anew(self, model: Model, pages: Pages) -> None:
        """Makes the index anew with another bundle. Goes on where it was interrupted."""
        with Index.open(self.told.index, write=True) as old:
            renewal = Renewal(self.told.index, old, self.say)
            with self._writing(next_path(self.told.index), model, pages, before=old) as watcher:
                renewal.fill(watcher)
        renewal.end()

    # What others are told ---------------------------------------------------------------------------------------------

    def _between(self, ledger: Ledger | None) -> None:
        """Between pages, and while there is nothing to do. Raises NewBundleError."""
        self._notifier.alive()
        self.host.check()
        if ledger is not None and time.monotonic() > self._told_at + BEAT_SECONDS:
            self._tell(ledger)
        if time.monotonic() < self._looked + LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        if current_hash(Path(self.told.loading.bundle)) not in (None, self._bundle, self._refused):
            raise NewBundleError

    def _tell(self, ledger: Ledger, watcher: Watcher | None = None) -> None:
        """Says in the ledger that this is alive, and what it does: soon if that has changed."""
        facts = self._last_facts if watcher is None else self._facts(watcher)
        since = time.monotonic() - self._told_at
        if since > BEAT_SECONDS or (facts != self._last_facts and since > CHANGE_SECONDS) or not self._last_facts:
            self._last_facts, self._told_at = facts, time.monotonic()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            ledger.tell(watcher=facts, beat={**heartbeat.beat(), "peak_bytes": peak})
            self._notifier.status(
                f"{facts.get('queue', 0)} files wait" + (f"; {self._trouble}" if self._trouble else "")
            )

    def _tell_troubles(self, troubles: dict[str, str]) -> None:
        """Once, each time that there is another one."""
        for folder, reason in troubles.items():
            if self.troubles.get(folder) != reason:
                self.say(f"{folder}: {reason}")
        self.troubles = troubles

    def _tell_end(self, watcher: Watcher) -> None:
        with suppress(CembedError):
            watcher.ledger.tell(watcher={**self._facts(watcher), "ended": True})

    def _facts(self, watcher: Watcher) -> dict[str, Any]:
        return {
            "folders": list(self.told.folders.roots),
            "bundle": self._bundle,
            "queue": len(watcher.pending),
            "trouble": self._trouble,
            "troubles": watcher.troubles,
            "version": __version__,
        }


def use_one_arena() -> None:
    """glibc gives threads heaps of their own, each of which grows to what the largest batch ever took."""
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)

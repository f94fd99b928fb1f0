"""How it goes with an index and what fills it, for a person or a health check. Nothing is locked or changed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.intake import heartbeat
from cembed.runtime.intake.ledger import Entry, Ledger, ledger_path

LISTED = 1000
LEAST_FREE = 64 << 20
"""Bytes of disk."""


@dataclass(frozen=True)
class Status:
    """`files` counts by state; `waiting` and `failed` are the first of these; `watcher` and `succeeded` are for a
    person; bytes of the index on disk, and of the watcher's largest memory."""

    state: str
    trouble: tuple[str, ...]
    pages: int
    warnings: int
    bundle: str
    files: Mapping[str, int]
    waiting: tuple[Entry, ...]
    failed: tuple[Entry, ...]
    queue: int
    succeeded: str
    watcher: str
    index_bytes: int
    disk_free: int
    memory: int | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        told = asdict(self)
        for name in ("waiting", "failed"):
            told[name] = [
                {
                    "path": os.fsencode(e.path).decode(errors="replace"),
                    "reasons": e.reasons,
                    "pages": e.pages,
                    "time": e.when,
                }
                for e in getattr(self, name)
            ]
        return told


def status_of(index: Path, stale_after: float) -> Status:
    """Raises CembedError: no index, or one that is damaged."""
    stats = Index.open(index).stats()
    facts, counts, waiting, failed = _told(index)
    watcher, beat = facts.get("watcher", {}), facts.get("beat", {})
    free = shutil.disk_usage(index).free
    trouble = tuple(_trouble(watcher, beat, free, stale_after))
    return Status(
        state="trouble" if trouble else "some files failed" if failed else "well",
        trouble=trouble,
        pages=stats.pages,
        warnings=stats.warnings,
        bundle=stats.bundle,
        files=counts,
        waiting=tuple(waiting),
        failed=tuple(failed),
        queue=watcher.get("queue", 0),
        succeeded=_when(facts.get("succeeded")),
        watcher=_watcher_line(watcher, beat),
        index_bytes=sum(stats.bytes.values()),
        disk_free=free,
        memory=beat.get("peak_bytes"),
    )


def _told(index: Path) -> tuple[dict[str, Any], dict[str, int], list[Entry], list[Entry]]:
    if not ledger_path(index).exists():
        return {}, {}, [], []
    try:
        with Ledger.beside(index, write=False) as ledger:
            lists = ledger.entries("waiting", limit=LISTED), ledger.entries("failed", limit=LISTED)
            return ledger.facts(), ledger.counts(), *lists
    except CembedError as error:  # it is being made, or damaged: the next that writes mends it
        return {"watcher": {"trouble": str(error)}}, {}, [], []


def _trouble(watcher: Mapping[str, Any], beat: Mapping[str, Any], free: int, stale_after: float) -> Iterator[str]:
    if beat and not watcher.get("ended"):
        age = heartbeat.age(beat)
        if age is None or age > stale_after:
            ago = "since this machine started" if age is None else f"for {age:.0f} s"
            yield f"the watcher has given no sign of life {ago}"
    if watcher.get("trouble"):
        yield watcher["trouble"]
    yield from (f"{folder}: {reason}" for folder, reason in watcher.get("troubles", {}).items())
    if free < LEAST_FREE:
        yield f"the disk is almost full: {free:,} bytes are free"


def _watcher_line(watcher: Mapping[str, Any], beat: Mapping[str, Any]) -> str:
    if not beat:
        return ""
    doing = "ended" if watcher.get("ended") else f"process {beat['pid']}, {watcher.get('queue', 0)} files wait"
    return f"{doing}; seen {_when(beat['time'])}; {beat['peak_bytes']:,} bytes of memory at most"


def _when(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

"""An index in the place of another, at once, while others read the old one."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

from cembed.runtime.disk import Disk
from cembed.runtime.errors import CembedError
from cembed.runtime.index.files import CURRENT
from cembed.runtime.index.index import Index
from cembed.runtime.intake.ledger import Ledger, ledger_path
from cembed.runtime.intake.opening import bundle_of

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # renameat2(2)


def next_path(index: Path) -> Path:
    """Where an index is made that is to take the place of another."""
    return index.with_name(f"{index.name}.next")


def before_path(index: Path) -> Path:
    """Where the old one goes, if it has pages that the new one lacks: a name that is free."""
    number, path = 1, index.with_name(f"{index.name}.before")
    while os.path.lexists(path):
        number += 1
        path = index.with_name(f"{index.name}.before-{number}")
    return path


def _old_path(index: Path) -> Path:
    """Where the old one is for a moment, where there is no exchange."""
    return index.with_name(f"{index.name}.old")


def mend(index: Path, bundle: str) -> None:
    """Ends a swap that was interrupted, to an index of this bundle. Raises CembedError."""
    new, old = next_path(index), _old_path(index)
    if not os.path.lexists(index) and bundle_of(old) is not None:  # between the two renames
        _rename(new if bundle_of(new) == bundle else old, index)
    if bundle_of(index) != bundle:
        if bundle_of(new) not in (None, bundle):  # begun with a bundle that was there in between
            remove(new)
        return
    if bundle_of(new) is not None and _is_begun(new):
        remove(new)
    for left in (new, old):
        if bundle_of(left) is not None:
            _rename(left, before_path(index))
    ledger_path(new).unlink(missing_ok=True)


def _is_begun(index: Path) -> bool:
    """Whether this was to take the place of another, and is not the other."""
    opened = Index.open(index)
    if not len(opened):
        return True
    if not ledger_path(index).exists():
        return False
    with Ledger.beside(index, write=False) as ledger:
        told: bool = ledger.facts().get("reading", {}).get("index") == opened.identity
        return told


def swap(index: Path, keep: bool) -> Path | None:
    """Puts the index at `next_path` where `index` is; both are closed. Raises CembedError: it is as before.

    The old one is removed, or kept where the path says that it gives.
    """
    old = next_path(index)
    if not _exchange(next_path(index), index):
        old = _old_path(index)
        _rename(index, old)
        _rename(next_path(index), index)
    if os.path.lexists(ledger_path(next_path(index))):
        os.replace(ledger_path(next_path(index)), ledger_path(index))
    Disk().sync_folder(index.absolute().parent)
    if not keep:
        remove(old)
        return None
    kept = before_path(index)
    _rename(old, kept)
    return kept


def remove(index: Path) -> None:
    """Takes an index away, and what is beside it. Raises CembedError."""
    try:
        if index.is_dir():
            (index / CURRENT).unlink(missing_ok=True)  # from here on it is none
            shutil.rmtree(index)
        ledger_path(index).unlink(missing_ok=True)
    except OSError as error:
        raise CembedError(f"cannot remove {index}: {error.strerror or error}") from error


def _exchange(one: Path, other: Path) -> bool:
    """Both names change their places in one step, where the system and the disk can do that."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return call is not None and call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def _rename(path: Path, to: Path) -> None:
    try:
        os.rename(path, to)
    except OSError as error:
        raise CembedError(f"cannot rename {path} to {to}: {error.strerror or error}") from error

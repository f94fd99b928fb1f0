"""Opening an index to add to it, and what its files are read for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cembed.runtime.errors import CembedError
from cembed.runtime.index.files import CURRENT, read_current
from cembed.runtime.index.index import DEFAULT_STORAGE, Index


def open_or_create(path: Path, *, bundle: str, dim: int, storage: Sequence[str] = ()) -> Index:
    """The index at `path`, open for writing, or a new one in these storage types, or the usual ones.

    Raises CembedError: it is of another bundle or dim, damaged, or another process is writing to it.
    """
    if not os.path.lexists(path / CURRENT):
        return Index.create(path, dim=dim, bundle=bundle, storage=storage or DEFAULT_STORAGE)
    index = Index.open(path, write=True)
    try:
        check_fits(index, bundle, dim)
    except CembedError:
        index.close()
        raise
    return index


def check_fits(index: Index, bundle: str, dim: int) -> None:
    """Raises CembedError: the index has vectors of another bundle or dim."""
    index.check_bundle(bundle)
    if index.dim != dim:
        raise CembedError(f"{index.folder} has vectors of dim {index.dim}, these would have {dim}: give --dim")


def bundle_of(path: Path) -> str | None:
    """The hash of the bundle that an index is of; None if there is no index. Raises CembedError: it is damaged."""
    return read_current(path).bundle if os.path.lexists(path / CURRENT) else None


def reading_of(index: Index, settings: str, skip_blank_pages: bool, version: str) -> dict[str, str]:
    """What the outcome of a file depends on beside its bytes, for `Ledger.adopt`."""
    told = f"{settings} {skip_blank_pages}"
    return {"index": index.identity, "bundle": index.bundle, "settings": told, "version": version}

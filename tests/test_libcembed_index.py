"""The C library and indexes: what Python wrote is found as Python finds it, and damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import libcembed
import numpy as np
import pytest
from libcembed import CallError, Library
from test_index import BUNDLE, DIM, PAGES, QUERY, make, some_pages

from cembed.runtime import CembedError
from cembed.runtime.index import Index


def same(library: Library, folder: Path, top: int = 10, query: np.typing.NDArray[np.float32] = QUERY) -> None:
    """Whether both find the same."""
    theirs, ours = Index.open(folder), libcembed.Index(library, folder)
    info = ours.info
    assert (info.pages, info.dim, info.bundle.decode()) == (len(theirs), theirs.dim, theirs.bundle)
    expected = [(h.id, h.score, h.source, h.page, h.metadata) for h in theirs.search(query, top).hits]
    found = [(*hit[:4], json.loads(hit[4])) for hit in ours.search(query, top)]
    assert found == expected
    ours.close()


@pytest.mark.parametrize("store", ["f32", "f16,u8,bits", "u8"])
def test_it_finds_what_python_finds(library: Library, tmp_path: Path, store: str) -> None:
    """Also what was added later, over segments, removed, and compacted."""
    folder = tmp_path / "index"
    with make(folder, store=store) as index:
        same(library, folder)  # while a writer has it open
        index.add(some_pages(30, seed=5), bundle=BUNDLE)
        index.remove([PAGES[0].id, PAGES[7].id])
        same(library, folder)
    same(library, folder, top=3)
    with Index.open(folder, write=True) as index:
        index.compact()
    same(library, folder, top=1000)


def test_stages_are_those_of_python(library: Library, tmp_path: Path) -> None:
    pages = some_pages(1100, dim=512, rows=32)
    with make(tmp_path / "index", pages, "f32,u8,bits"):
        pass
    same(library, tmp_path / "index", query=pages[3].vectors[:4])


def test_a_torn_end_does_not_count(library: Library, tmp_path: Path) -> None:
    with make(tmp_path / "index") as index:
        log = tmp_path / "index" / "00000001.log"
        index.add(some_pages(3, seed=9), bundle=BUNDLE)
    log.write_bytes(log.read_bytes()[:-100])
    same(library, tmp_path / "index")


def test_damage_is_named(library: Library, tmp_path: Path) -> None:
    """A flipped bit anywhere gives what Python gives: a refusal, or hits that are right."""
    with make(tmp_path / "whole"):
        pass
    whole, refused = ours(library, tmp_path / "whole"), 0
    assert whole is not None
    random = np.random.default_rng(3)
    for path in sorted((tmp_path / "whole").iterdir()):
        for _ in range(12 if path.stat().st_size else 0):
            folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "damaged"))
            raw = bytearray(path.read_bytes())
            raw[random.integers(len(raw))] ^= 1 << random.integers(8)
            (folder / path.name).write_bytes(raw)
            found = ours(library, folder)
            assert found in (None, whole)
            assert (found is None) == (not python_takes(folder)), path.name
            refused += found is None
            shutil.rmtree(folder)
    assert refused > 20


def ours(library: Library, folder: Path) -> object:
    """Hits, or None where the index is refused."""
    try:
        return libcembed.Index(library, folder).search(QUERY)
    except CallError as error:
        return None if error.status == libcembed.INDEX else error


def python_takes(folder: Path) -> bool:
    try:
        return bool(Index.open(folder).search(QUERY).hits)
    except CembedError:
        return False


def test_indexes_that_are_refused(library: Library, tmp_path: Path) -> None:
    with pytest.raises(CallError, match="no index"):
        libcembed.Index(library, tmp_path)
    with make(tmp_path / "index"):
        pass
    index = libcembed.Index(library, tmp_path / "index")
    for query, message in (
        (QUERY[:, :8].copy(), "dim"),
        (QUERY * np.nan, "NaN"),
        (np.empty((0, DIM), np.float32), "row"),
    ):
        with pytest.raises(CallError, match=message):
            index.search(query)
    with pytest.raises(CallError, match="top"):
        index.search(QUERY, 0)
    index.close()

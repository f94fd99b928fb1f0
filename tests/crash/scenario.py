"""What the crash tests do to an index, and what it must hold afterwards.

A state maps ids to versions: vectors, place and metadata of a page are all made from its id and version. Three
versions in a row have the same vectors, and so have some pages of a version: such pages are added without vectors, if
the index has them. While an operation runs, the index may be in the state before it, after it, or, in an add of some
batches, between two of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cembed.runtime.disk import Disk
from cembed.runtime.index import index as index_module
from cembed.runtime.index import new_pages, segments
from cembed.runtime.index.index import Index
from cembed.runtime.index.new_pages import NewPage
from cembed.runtime.index.search import Stage

DIM, BUNDLE = 8, "scenario"
ALIKE = [f"page {name}" for name in range(15)]
State = dict[str, int]


@dataclass(frozen=True)
class Operation:
    """`add` or `remove` pages given as id and version, `compact`, or `reopen`."""

    kind: str
    pages: tuple[tuple[str, int], ...] = ()


def make_small() -> None:
    """Batches of three pages and segments of a few, so that a short run has everything in it."""
    new_pages.BATCH_PAGES, index_module.SEGMENT_BYTES = 3, 3000
    segments.RETRY_SECONDS = 0


def content_of(page: str, version: int) -> bytes:
    return f"{'alike' if page in ALIKE else page}@{version // 3}".encode()


def vectors_of(page: str, version: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng([*content_of(page, version)])
    rows = rng.integers(-7, 8, (int(rng.integers(1, 5)), DIM)).astype(np.float32)
    rows[:, 0] = 8  # exact in f16
    return rows


def new_page(index: Index, page: str, version: int) -> NewPage:
    content = content_of(page, version)
    vectors = None if index.has_content(content) else vectors_of(page, version)
    warning = f"warning {version}" if version % 3 == 0 else None  # the first of those with the same vectors
    return NewPage(page, vectors, f"{page}.pdf", version, {"version": version}, content, warning)


def operations(seed: int, state: State, count: int) -> Iterator[Operation]:
    """A random run from `state` on; the same for the same arguments."""
    rng, state, version = random.Random(seed), dict(state), max(state.values(), default=0)
    for _ in range(count):
        kind = rng.choices(["add", "remove", "compact", "reopen"], [6, 2, 1, 1])[0]
        if kind == "add":
            version += 1
            names = rng.sample(range(40), rng.randint(1, 8))
            operation = Operation(kind, tuple((f"page {name}", version) for name in names))
        elif kind == "remove":
            names = rng.sample(sorted(state), min(len(state), rng.randint(1, 3)))
            operation = Operation(kind, tuple((name, state[name]) for name in names))
        else:
            operation = Operation(kind)
        state = after(state, operation)
        yield operation


def after(state: State, operation: Operation) -> State:
    if operation.kind == "add":
        return state | dict(operation.pages)
    if operation.kind == "remove":
        return {page: version for page, version in state.items() if page not in dict(operation.pages)}
    return state


def allowed(state: State, operation: Operation | None) -> list[State]:
    """What may be there when `operation` was cut short."""
    if operation is None:
        return [state]
    steps = [after(state, operation)]
    if operation.kind == "add":
        steps += [state | dict(operation.pages[:n]) for n in range(len(operation.pages))]
    return [state, *steps]


def apply(index: Index, operation: Operation, disk: Disk) -> Index:
    """The index to go on with."""
    if operation.kind == "add":
        index.add([new_page(index, *page) for page in operation.pages], bundle=BUNDLE)
    elif operation.kind == "remove":
        index.remove([page for page, _ in operation.pages])
    elif operation.kind == "compact":
        index.compact()
    else:
        index.close()
        return Index.open(index.folder, write=True, disk=disk)
    return index


def start(folder: Path, disk: Disk) -> Index:
    return Index.create(folder, dim=DIM, bundle=BUNDLE, disk=disk)


def read(folder: Path, *, write: bool = False) -> State:
    """What an index holds, every byte of it checked: vectors, texts, and scores in each tier."""
    with Index.open(folder, write=write) as index:
        return state_of(index)


def state_of(index: Index) -> State:
    state = {}
    query = vectors_of("query", 0)
    pages = index.find()
    for page in pages:
        version = page.metadata["version"]
        assert (page.source, page.page) == (f"{page.id}.pdf", version), page
        assert page.warning in (None, f"warning {version // 3 * 3}"), page
        assert np.array_equal(index.vectors(page.id), vectors_of(page.id, version)), page
        state[page.id] = version
    assert len(pages) == len(state) == len(index)
    for tier in index.tiers:
        found = index.search(query, max(1, len(pages)), plan=(Stage(tier, max(1, len(pages))),), threads=1)
        assert {hit.id for hit in found.hits} == set(state)
        if tier == "f16":
            for hit in found.hits:
                exact = (query @ vectors_of(hit.id, state[hit.id]).T).max(axis=1).sum()
                assert abs(hit.score - exact) < 1e-3, hit
    return state

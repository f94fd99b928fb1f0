"""NaN and infinity are called by their names, with their places, wherever vectors come in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cembed.runtime import CembedError, Index, NewPage
from cembed.runtime.bundle.vectors import VectorFile
from cembed.runtime.finite import finite
from cembed.runtime.scoring.kernels import Pages, checked_query, matches, score, top

NAMES = {np.nan: "NaN", np.inf: "infinity", -np.inf: "-infinity", 1e39: "1e+39 (infinity: float32 cannot hold it)"}
NONE = np.zeros(0)
PAGES = Pages("f32", 8, *(NONE.astype(kind) for kind in (np.uint8, np.int64, np.int32, np.float32)))


def of_index(folder: Path, ask: Callable[[Index], object]) -> None:
    with Index.create(folder / "index", dim=8, bundle="0" * 64) as index:
        ask(index)


WAYS: dict[str, tuple[str, Callable[[NDArray[np.float64], Path], object]]] = {
    "finite": ("it", lambda bad, _: finite("it", bad)),
    "checked_query": ("the query", lambda bad, _: checked_query(bad, 8)),
    "score": ("the query", lambda bad, _: score(bad, PAGES)),
    "top": ("the query", lambda bad, _: top(bad, PAGES, 1)),
    "matches": ("the query", lambda bad, _: matches(bad, PAGES, 0)),
    "search": ("the query", lambda bad, folder: of_index(folder, lambda index: index.search(bad))),
    "add": ("page 'x'", lambda bad, folder: of_index(folder, lambda i: i.add([NewPage("x", bad)], bundle="0" * 64))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", NAMES)
def test_its_name_and_its_place(way: str, value: float, tmp_path: Path) -> None:
    """The first of several."""
    bad = np.ones((3, 8))
    bad[1, 6] = bad[2, 0] = value
    what, call = WAYS[way]
    with pytest.raises(CembedError) as raised:
        call(bad, tmp_path)
    assert str(raised.value) == f"{what} contains {NAMES[value]}, in component 6 of vector 1"


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_vector_file_with_nan(suffix: str, tmp_path: Path) -> None:
    vectors = [np.ones((2, 8), np.float32), np.ones((3, 8), np.float32)]
    vectors[1][0, 7] = np.nan
    path = tmp_path / f"v{suffix}"
    VectorFile.of(vectors, ["a", "b"], [1, 1], "0" * 64).save(path)
    with pytest.raises(CembedError) as raised:
        VectorFile.load(path)
    assert str(raised.value) == f"{path} is damaged: it contains NaN, in component 7 of vector 2"


def test_what_is_finite_is_not_copied() -> None:
    vectors = np.ones((3, 8), np.float32)
    assert finite("it", vectors) is vectors
    assert finite("it", vectors.astype(np.float16)).dtype == np.float32

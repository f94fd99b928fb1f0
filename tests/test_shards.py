"""Many indexes searched as one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from serving import SAMPLE, load_sample

from cembed.runtime import CembedError, Index, NewPage, Shards

DIM, SHARDS, EACH = 32, 3, 40


def unit(random: np.random.Generator, rows: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    vectors = random.standard_normal((rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make(path: Path, pages: list[NewPage], bundle: str = "b", dim: int = DIM) -> Path:
    with Index.create(path, dim=dim, bundle=bundle) as index:
        index.add(pages, bundle=bundle)
    return path


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """All pages in one index, and in three shards; some are equal."""
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    same = unit(random, 3)
    pages = [
        NewPage(f"{i}", same if i % 10 == 0 else unit(random, 2 + i % 3), f"{i % 4}.pdf", i + 1, {"odd": i % 2})
        for i in range(SHARDS * EACH)
    ]
    shards = [make(folder / f"shelf-{i}", pages[i * EACH : (i + 1) * EACH]) for i in range(SHARDS)]
    return make(folder / "whole", pages), shards


@pytest.mark.parametrize("processes", [1, 2, None])
def test_shards_give_what_one_index_gives(indexes: tuple[Path, list[Path]], processes: int | None) -> None:
    whole, paths = indexes
    random = np.random.default_rng(1)
    with Index.open(whole) as index, Shards(paths, processes) as shards:
        assert (len(shards), shards.dim, shards.bundle, shards.tiers) == (len(index), DIM, "b", index.tiers)
        for _ in range(5):
            query = unit(random, 4)
            for more in ({}, {"where": {"odd": 1}}, {"source": "2.*"}):
                found, expected = shards.search(query, 30, **more), index.search(query, 30, **more)  # type: ignore[arg-type]
                assert [(hit.id, hit.score) for hit in found.hits] == [(hit.id, hit.score) for hit in expected.hits]
                assert sum(stage.pages for stage in found.stages) == sum(stage.pages for stage in expected.stages)
        hit = found.hits[0]
        assert hit.index in {str(path) for path in paths}
        assert shards.info(hit.id, hit.index or "").source == hit.source


def test_shards_that_do_not_belong_together(tmp_path: Path, indexes: tuple[Path, list[Path]]) -> None:
    other = make(tmp_path / "other", [NewPage("x", np.ones((1, DIM), np.float32))], bundle="c")
    with pytest.raises(CembedError, match="another bundle"):
        Shards([indexes[1][0], other])
    with pytest.raises(CembedError, match="nowhere"):
        Shards([indexes[1][0], tmp_path / "nowhere"])
    with pytest.raises(CembedError, match="no shards"):
        Shards([])


def test_a_pattern_on_the_command_line(tmp_path: Path) -> None:
    embedder = load_sample()
    for shard, query in enumerate(("pension seminar", "invoice", "menu")):
        page = NewPage(query, embedder.embed_query(query), f"{query}.pdf")
        make(tmp_path / f"shelf-{shard}", [page], embedder.bundle.hash, embedder.dim)
    command = [sys.executable, "-m", "cembed", "search", str(tmp_path / "shelf-*"), "invoice", "--bundle", str(SAMPLE)]
    rows = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    assert rows[0]["path"] == "invoice.pdf"
    assert rows[0]["index"] == str(tmp_path / "shelf-1")
    assert len(rows) == 3
    shutil.rmtree(tmp_path / "shelf-1")
    (tmp_path / "shelf-1").mkdir()
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1

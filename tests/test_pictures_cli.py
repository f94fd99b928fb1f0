"""`--max-pixels` on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import cembed

WORDS = np.kron(np.random.default_rng(0).integers(0, 2, (15, 20), dtype=np.uint8) * 255, np.ones((8, 8), np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A page of 160 x 120 as a PNG, which cannot be read reduced, and in two kinds that can."""
    (tmp_path / "pages").mkdir()
    for name in ("a.jpg", "b.png", "c.tif"):
        Image.fromarray(WORDS).save(tmp_path / "pages" / name)
    return tmp_path / "pages"


def test_embed_reads_large_pages_reduced_or_names_the_flag(causal_bundle: Path, folder: Path, tmp_path: Path) -> None:
    outcome = cembed("embed", causal_bundle, folder, "--out", tmp_path / "v.npz", "--max-pixels", 5000)
    assert outcome.status == 3
    assert outcome.err.splitlines() == [
        f"not embedded: {folder}/b.png, page 1: 160 x 120 pixels are over the limit of 5000, and a PNG file cannot be "
        "reduced while it is read: set a higher one (--max-pixels)"
    ]
    assert cembed("embed", causal_bundle, folder, "--out", tmp_path / "w.npz").status == 0


def test_index_add_takes_the_flag_and_knows_pages_by_it(causal_bundle: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "b.png").unlink()
    add = ("index", "add", tmp_path / "index", folder, "--bundle", causal_bundle)
    assert "2 pages added, 0 were there" in cembed(*add).out
    assert "0 pages added, 2 were there" in cembed(*add, "--max-pixels", 100_000_000).out
    assert "2 pages added, 0 were there" in cembed(*add, "--max-pixels", 5000).out


@pytest.mark.parametrize("words", [("--dpi", "nan"), ("--timeout=NaN",), ("--timeout", "-nan")])
def test_nan_is_called_by_its_name(folder: Path, words: tuple[str, ...]) -> None:
    outcome = cembed("embed", "no-bundle", folder, "--out", folder / "v.npz", *words)
    assert outcome.status == 2
    option, value = "=".join(words).split("=")
    assert outcome.err == f"error: {option} is {value}: give a number\n"


def test_no_pixels_are_too_few(folder: Path) -> None:
    outcome = cembed("embed", "no-bundle", folder, "--out", folder / "v.npz", "--max-pixels", "0")
    assert outcome.status == 2
    assert "--max-pixels" in outcome.err

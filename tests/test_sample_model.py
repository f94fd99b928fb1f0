"""The shipped model: small enough, finds the sample pages, and survives quantising."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from row_products import overflows
from typer.testing import CliRunner

from cembed.cli import app
from cembed.quantize.plan import QuantiseOptions
from cembed.quantize.quantizer import quantise
from cembed.runtime import Bundle, Embedder
from cembed.runtime.evaluate import Dataset, evaluate
from cembed.runtime.verify import verify

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
MODEL, PAGES = SAMPLES / "model", SAMPLES / "pages" / "sample"


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 16 * 2**20


def test_it_finds_the_sample_pages(sample_bundle: Path) -> None:
    """60 pages that training never saw, a quarter of them in unseen layouts and faces; chance is about 0.05."""
    found = evaluate(Embedder.load(sample_bundle), Dataset.read(PAGES), [1, 32])
    quality = {(row.vectors, row.part): row.measures["nDCG@5"] for row in found.rows}
    assert quality[32, "all"] >= QUALITY, quality
    assert quality[32, "all"] > quality[1, "all"]


QUALITY = 0.93


@pytest.mark.parametrize(
    ("scheme", "cosine", "drop"), [("int8", 0.999, 0.03), ("int4", 0.94, 0.08), ("w8a8", 0.98, 0.03)]
)
def test_integers_lose_little(sample_bundle: Path, tmp_path: Path, scheme: str, cosine: float, drop: float) -> None:
    """On 60 questions one rank moves nDCG@5 by 0.006; the card has the loss on 1,200."""
    options = QuantiseOptions(scheme, calibration=(PAGES,), accept_loss=True)
    report = quantise(sample_bundle, options, tmp_path / "q").quantisation
    assert report is not None
    assert 1 - report.comparison.median_cosine <= (1 - cosine) * (3 if overflows() else 1)
    assert report.comparison.ndcg5 is not None
    assert report.comparison.ndcg5[0] - report.comparison.ndcg5[1] <= drop
    assert report.comparison.bytes[1] < 0.35 * report.comparison.bytes[0]


def test_the_first_result_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantised bundle and the vectors that come with the repository, by the command as it stands there."""
    root = SAMPLES.parent
    monkeypatch.chdir(root)
    (line,) = [line for line in (root / "README.md").read_text().splitlines() if "samples/pages/sample.npz" in line]
    done = CliRunner().invoke(app, [*shlex.split(line)[1:], "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)[0]["path"].endswith("/00006.jpg")
    assert all(check.passed for check in verify(Bundle(SAMPLES / "bundle")))

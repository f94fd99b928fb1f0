"""The fuzz targets in Python: what they start from is taken, and a few inputs made of it give no more than refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FUZZ))
import run  # noqa: E402

CORPORA = sorted(path for path in (FUZZ / "corpus").rglob("*") if path.is_file())
MOST_BYTES = 200 << 10


@pytest.mark.parametrize("path", CORPORA, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_fuzzing_starts_from_is_taken(path: Path) -> None:
    assert run.target(path.parent.name)(path.read_bytes()) == (not path.name.startswith("refused"))


def test_every_target_has_a_small_corpus() -> None:
    assert {path.parent.name for path in CORPORA} == run.TARGETS.keys()
    assert sum(path.stat().st_size for path in CORPORA) <= MOST_BYTES


@pytest.mark.parametrize("name", run.TARGETS)
def test_changed_inputs_are_taken_or_refused(name: str) -> None:
    assert run.fuzz(name, 60, seed=1, most=300) == 300


def test_every_target_in_cpp_has_something_to_start_from() -> None:
    """libFuzzer ends at once where the folder is not there."""
    native = FUZZ.parent / "native"
    targets = {path.stem.removeprefix("fuzz_") for path in native.glob("fuzz_*.cpp")}
    assert targets == {path.name for path in (native / "seeds").iterdir() if any(path.iterdir())}

"""`cembed bench`: every storage type is timed and compared with float64."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from test_cli import cembed, cembed_process

from cembed.runtime import maxsim
from cembed.runtime.scoring import timing as trial
from cembed.runtime.scoring.kernels import Pages, kernel_sets
from cembed.runtime.scoring.storage import STORAGE
from cembed.runtime.scoring.timing import Case, Floats, Shape

SMALL = ("--pages", 40, "--vectors", 5, "--dim", 16, "--query-vectors", 3, "--rounds", 2)


def test_json_has_every_storage_type() -> None:
    shown = json.loads(cembed("bench", "maxsim", *SMALL, "--json").out)
    assert shown["kernels"] == next(iter(kernel_sets()), "numpy")
    assert shown["shape"] == {"query_rows": 3, "dim": 16, "pages": 40, "rows": 5}
    assert [timing["storage"] for timing in shown["timings"]] == list(STORAGE)
    for timing in shown["timings"]:
        assert timing["bytes"] == 40 * 5 * STORAGE[timing["storage"]].vector_bytes(16)
        assert timing["ms"] > 0
        assert timing["times_numpy"] > 0
        assert 0 <= timing["error"] <= 1e-5


def test_the_table() -> None:
    outcome = cembed_process("bench", "maxsim", *SMALL, "--threads", 1, "--storage", "u8,bits")
    assert (outcome.status, outcome.err) == (0, "")
    assert "GB/s" in outcome.out
    assert "f16" not in outcome.out


def test_wrong_scores_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "maxsim", lambda *given, threads: np.full((1, 40), 2.5, np.float32))
    outcome = cembed("bench", "maxsim", *SMALL, "--storage", "f32", "--json")
    assert outcome.status == 1
    assert "f32 are not those of float64" in outcome.err


@pytest.mark.parametrize(("option", "value", "said"), [("--storage", "f64", "f32, f16, u8"), ("--dim", 12, "of 8")])
def test_what_cannot_be_stored(option: str, value: object, said: str) -> None:
    assert said in cembed("bench", "maxsim", *SMALL, option, value).error


def test_numpy_as_one_writes_it_is_the_definition() -> None:
    case = Case.draw(Shape(3, 16, 50, 4))
    similarity = np.einsum("qd,nkd->nqk", case.query.astype(np.float64), case.documents)
    for way in trial.numpy_ways(case):
        assert np.allclose(way(), similarity.max(axis=2).sum(axis=1), atol=1e-5)


def test_what_is_timed_is_the_call_that_users_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """maxsim(), with a list of arrays for float32 and with stored pages for the rest."""
    given = []

    def called(queries: Sequence[Floats], documents: Sequence[Floats] | Pages, *, threads: int) -> Floats:
        given.append(documents)
        return maxsim(queries, documents, threads=threads)

    monkeypatch.setattr(trial, "maxsim", called)
    trial.try_out(Shape(3, 16, 40, 5), ["f32", "u8"], 1, 1)
    lists = [documents for documents in given if not isinstance(documents, Pages)]
    assert all(isinstance(documents, list) and len(documents) == 40 for documents in lists)
    assert {documents.storage for documents in given if isinstance(documents, Pages)} == {"u8"}
    assert lists

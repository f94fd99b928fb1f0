"""Embeds by many threads, and a server in trouble: shortly on every run, for long with `make test-crash`."""

from __future__ import annotations

from pathlib import Path

import pytest
import soak
from conftest import BundleMaker
from test_crash import LONG


@pytest.fixture
def bundle(bundle_of: BundleMaker) -> Path:
    return bundle_of("causalqwen2_5")


def test_answers_of_many_threads_are_those_of_one(bundle: Path) -> None:
    measured = soak.embeds(bundle, 50_000 if LONG else 500, seed=1)
    if LONG:
        assert measured.rss[-1] <= measured.rss[0] * (1 + soak.MAX_GROWTH), measured.rss


def test_what_was_answered_is_right_and_stays(bundle: Path) -> None:
    clients = soak.server(bundle, 600.0 if LONG else 12.0, None, seed=1, ceilings=LONG)
    assert clients.added

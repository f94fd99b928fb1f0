"""Deployed bundles through kills, failing disks and power cuts: a part on every run, all with `make test-crash`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_crash import LONG

RUNS = {
    # name: arguments of the quick part, and of the long one
    "power_cuts": [("3", "1", "3"), ("3", "10"), ("6", "10")],
    "kills_then_cuts": [("3", "17"), ("3", "1"), ("6", "1")],
    "errors": [("31",), ("1",)],
    "kills_everywhere": [("31",), ("1",)],
    "kills": [("8",), ("300",)],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_bundle_is_current_and_it_is_the_one_that_was_told(name: str) -> None:
    """In a process of its own: it forks, and replaces the self-test of bundles without weights."""
    quick, *long = RUNS[name]
    for arguments in long if LONG else [quick]:
        script = str(Path(__file__).with_name("deploys.py"))
        command = [sys.executable, "-W", "ignore::RuntimeWarning", script, name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout, end="")
        assert done.returncode == 0, done.stderr[-4000:]

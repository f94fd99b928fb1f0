"""`cembed watch` through kills, and with a ledger that a power cut has left: a part on every run, all with
`make test-crash`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_crash import LONG

RUNS = {
    # name: arguments of the quick part, and of the long one
    "plain": [("2",), ("100",)],
    "mirror": [("2",), ("100",)],
    "moved": [("2",), ("100",)],
    "anew": [("1",), ("60",)],
    "ledgers": [("1",), ("40",)],
    "stops": [("1",), ("20",)],
}


@pytest.mark.parametrize("name", RUNS)
def test_what_was_reported_stays_and_in_the_end_all_is_there(name: str) -> None:
    quick, *long = RUNS[name]
    for arguments in long if LONG else [quick]:
        script = str(Path(__file__).with_name("watches.py"))
        command = [sys.executable, "-W", "ignore::RuntimeWarning", script, name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout, end="")
        assert done.returncode == 0, done.stderr[-4000:]

"""A part of the crash tests on every run; all of them with `make test-crash`, which sets CEMBED_CRASH=long."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LONG = os.environ.get("CEMBED_CRASH") == "long"
RUNS = {
    # name: arguments of the quick part, and of the long one
    "power_cuts": [("3", "1", "4"), ("3", "20"), ("6", "20"), ("8", "20")],
    "kills_then_cuts": [("3", "40"), ("3", "1"), ("6", "1"), ("8", "1")],
    "errors": [("3", "23"), ("3", "1"), ("6", "1"), ("8", "1")],
    "kills": [("10",), ("300",)],
    "kills_everywhere": [("3", "23"), ("3", "1"), ("6", "1"), ("8", "1")],
    "flips": [("101",), ("1",), ("1", "1")],
    "mend": [("1", "5"), ("2", "300")],
    "injections": [(), ("3",)],
}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_acknowledged_is_lost_and_nothing_wrong_is_given(name: str) -> None:
    """In a process of its own: it forks, and makes batches small."""
    quick, *long = RUNS[name]
    if name == "injections" and (not LONG or shutil.which("strace") is None):
        pytest.skip("strace is not installed" if LONG else "part of make test-crash")
    for arguments in long if LONG else [quick]:
        command = [sys.executable, str(Path(__file__).with_name("runs.py")), name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout, end="")
        assert done.returncode == 0, done.stderr[-4000:]

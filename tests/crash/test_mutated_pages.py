"""Mutated pages through the caged decoding process: a few on every run, 200,000 with `make test-crash`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from test_crash import LONG


def test_mutated_pages_hang_nothing_and_change_no_sound_page() -> None:
    script = str(Path(__file__).with_name("mutated_pages.py"))
    count = "200000" if LONG else "300"
    done = subprocess.run([sys.executable, script, count], capture_output=True, text=True, check=False)
    print(done.stdout, end="")
    assert done.returncode == 0, done.stderr[-4000:]

"""Mutated bundles: some on every run, 200,000 with `make test-crash`, half of them signed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import BundleMaker
from test_crash import LONG


def test_mutated_bundles_are_refused_or_mean_the_same(bundle_of: BundleMaker) -> None:
    script, count = Path(__file__).with_name("mutated_bundles.py"), "200000" if LONG else "600"
    command = [sys.executable, str(script), str(bundle_of("causalqwen2_5")), count]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, end="")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "SEVERAL LINES" not in done.stdout

"""Whether a watcher is alive, told by a clock that nobody sets: seconds since this machine started."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def beat() -> dict[str, Any]:
    """This moment, for `age`."""
    return {"boot": _boot(), "seconds": _seconds(), "pid": os.getpid(), "time": time.time()}


def age(told: Mapping[str, Any]) -> float | None:
    """Seconds since a beat; None if it was before this machine started."""
    if told.get("boot") != _boot():
        return None
    return max(0.0, _seconds() - float(told["seconds"]))


def _boot() -> str:
    with contextlib.suppress(OSError):
        return BOOT_ID.read_text(encoding="ascii").strip()
    return ""


def _seconds() -> float:
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)

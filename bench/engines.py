"""Engines that run here: Qdrant's in this process, and PostgreSQL with pgvector by pg0. The tests use them too."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from cembed.scale.connectors.target import Place, Target

ENDS_IN = 10.0


def edge(place: Place, quantization: Any = None) -> Target:
    """Qdrant's engine in a folder; `quantization` is a configuration of it."""
    from edge_client import EdgeConnector

    return EdgeConnector(place, quantization)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The connection string of a PostgreSQL of this process; another user's where this one is root.

    Raises RuntimeError: it does not start.
    """
    import pg0

    home, user = tempfile.mkdtemp(prefix="cembed-postgres-"), dict[str, Any]()
    if os.getuid() == 0:
        user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        shutil.chown(home, "nobody", "nogroup")

    def run(*command: str) -> str:
        line, environment = [pg0._find_pg0(), *command, "--name", "cembed"], {**os.environ, "HOME": home}
        done = subprocess.run(line, env=environment, cwd=home, capture_output=True, text=True, timeout=60, **user)
        if done.returncode:
            raise RuntimeError(f"no PostgreSQL: {done.stderr.strip()[-200:]}")
        return str(done.stdout)

    try:
        run("start", "-c", "fsync=off", "-c", "shared_buffers=64MB")
        told = json.loads(run("info", "-o", "json"))
        yield told["uri"]
        end(told["pid"])
    finally:
        shutil.rmtree(home, ignore_errors=True)


def end(process: int) -> None:
    """Ends PostgreSQL at once, and waits for it."""
    os.kill(process, signal.SIGQUIT)
    last = time.monotonic() + ENDS_IN
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < last:
            os.kill(process, 0)
            time.sleep(0.02)

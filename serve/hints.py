"""Hints that something happened in a folder, where the system gives them: passes come without them, too.

Network drives give none of what other machines do.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence


class Hints:
    """While entered, `wait` ends early when something changed below one of the folders; needs watchfiles."""

    def __init__(self, folders: Sequence[str]) -> None:
        self._folders, self._changed, self._stop = folders, threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Hints:
        with contextlib.suppress(ImportError):
            import watchfiles  # noqa: F401

            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def wait(self, seconds: float) -> bool:
        """Waits so long, or until something has changed since the last time, and then True."""
        changed = self._changed.wait(seconds)
        self._changed.clear()
        return changed

    def _listen(self) -> None:
        import watchfiles

        while not self._stop.is_set():
            there = [folder for folder in self._folders if os.path.isdir(folder)]
            with contextlib.suppress(OSError, RuntimeError):  # a folder vanished, or there are too many to watch
                for _ in watchfiles.watch(
                    *there,
                    stop_event=self._stop,
                    raise_interrupt=False,
                    rust_timeout=1000,
                    ignore_permission_denied=True,
                ):
                    self._changed.set()
            self._stop.wait(10.0)

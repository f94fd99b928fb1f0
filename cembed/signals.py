"""Being told to stop: what was done until then is kept."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """A signal came: `status` is the exit status that says so, `message` what the person is told."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status, self.message = 128 + number, "interrupted"


class StopSignals:
    """While entered, the first of SIGNALS raises Stopped in the main thread; after it, or `hold`, none is heeded.

    One that the process ignores, as under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self._held = False
        self._before: dict[int, Any] = {}

    def hold(self) -> None:
        self._held = True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self._held:
            self._held = True
            raise Stopped(number)

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

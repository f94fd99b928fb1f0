"""What systemd is told of a service (sd_notify(3)): that it is ready, alive, stopping, and what it does."""

from __future__ import annotations

import contextlib
import os
import socket
import time


class Notifier:
    """Says nothing where nobody listens: without NOTIFY_SOCKET."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")  # children shall not speak in this process's name
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        ours = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        limit = os.environ.pop("WATCHDOG_USEC", "")
        self._every = int(limit) / 3e6 if ours and limit.isdigit() else None
        self._alive, self._status = 0.0, ""

    def ready(self) -> None:
        self._send("READY=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self) -> None:
        """To be called again and again by what must not hang."""
        if self._every is not None and time.monotonic() >= self._alive + self._every:
            self._alive = time.monotonic()
            self._send("WATCHDOG=1")

    def status(self, line: str) -> None:
        """One line for `systemctl status`."""
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(self._address)
            sender.send(message.encode())

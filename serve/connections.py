"""Connections as uvicorn keeps them, with limits that it does not have."""

from __future__ import annotations

import asyncio
import json
import socket
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cembed.serve.errors import RefusalError, error_body
from cembed.serve.service import Service
from cembed.serve.settings import Limits


class Answered:
    """A request that needs no more: what follows of its body is passed over."""

    response_complete, disconnected, keep_alive, more_body = True, False, True, True

    def __init__(self) -> None:
        self.message_event = asyncio.Event()


@lru_cache(maxsize=256)
def refusal_bytes(path: str, message: str, seconds: int) -> bytes:
    """A whole answer with 429.

    >>> refusal_bytes("/v2/rerank", "later", 2).splitlines()[::2]
    [b'HTTP/1.1 429 Too Many Requests', b'content-length: 20', b'']
    """
    refusal = RefusalError(429, message, code="busy", retry_after=seconds)
    text = json.dumps(error_body(path, refusal)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(text)), **refusal.headers}
    lines = [f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}"]
    lines += [f"{name.lower()}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + text


class Connection(HttpToolsProtocol):
    """Ends connections beyond the limits: those that take long to send the lines of a request, or many of them.

    A deadline runs whenever no request is being answered, also while the rest of a body comes that nobody waits for.
    Where no more requests may wait, one is refused as soon as its lines are there: for the price of reading them, as
    what is refused would take the time of what is not.
    """

    limits: Limits
    service: Service
    _deadline: asyncio.TimerHandle | None = None
    _in_lines, _unread = False, 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait(self.limits.header_time)
        if len(self.connections) > self.limits.connections:
            transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._unread = self._unread + len(data) if self._in_lines else 0
        if self._unread > self.limits.header:
            self._expire()

    def _wait(self, seconds: float) -> None:
        self._done()
        self._deadline = self.loop.call_later(seconds, self._expire)

    def _done(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    def on_message_begin(self) -> None:
        self._wait(self.limits.header_time)
        self._in_lines = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._done()
        self._in_lines = False
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.parser.get_method() == b"POST" and self.service.pool.full:
            self._refuse(self.service.pool.busy())
        else:
            super().on_headers_complete()

    def _refuse(self, refusal: RefusalError) -> None:
        path = self.url.partition(b"?")[0].decode("latin-1")
        self.service.metrics.busy.inc()
        self.cycle = Answered()  # type: ignore[assignment]
        self.transport.write(refusal_bytes(path, refusal.message, refusal.retry_after or 1))
        if self.parser.get_http_version() == "1.0" or not self.parser.should_keep_alive():
            self.transport.close()
        else:
            self.on_response_complete()

    def on_response_complete(self) -> None:
        idle = not self.pipeline
        super().on_response_complete()
        if idle and self._deadline is None:
            self._wait(self.limits.body_time if self.cycle.more_body else self.limits.header_time)

    def connection_lost(self, exc: Exception | None) -> None:
        self._done()
        super().connection_lost(exc)


def end_unread(listening: socket.socket, seconds: float) -> None:
    """Has the system end connections whose clients read nothing for so long, also those that are being closed."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))


def protocol(service: Service) -> type[Connection]:
    """What uvicorn makes of each connection to this service."""
    return type("ServiceConnection", (Connection,), {"limits": service.settings.limits, "service": service})

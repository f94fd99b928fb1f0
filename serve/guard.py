"""The door: who may ask, how much and how slowly, and what is written down of it. Nothing is parsed before it.

An ASGI middleware. A body is read whole here, within limits; then the request runs until it is answered or its client
leaves, whichever is first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import anyio

from cembed.serve.errors import RefusalError, error_body
from cembed.serve.room import Share
from cembed.serve.service import Service
from cembed.serve.settings import LOOPBACK

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
"""Paths that need no token: the page asks for one by itself."""
STATIC = "/static/"
REQUEST_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)
LEFT = 499
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
log = logging.getLogger("cembed.serve")


class Exchange:
    """One request: what of it is written down, and its headers."""

    def __init__(self, scope: Message) -> None:
        self.start = time.perf_counter()
        self.method, self.path = scope["method"], scope["path"]
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}
        given = self.headers.get("x-request-id", "")
        self.id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        self.status, self.finished, self.scope = 0, False, scope
        scope.setdefault("state", {})["id"] = self.id

    @property
    def free(self) -> bool:
        """Whether everybody may have it."""
        return self.path in OPEN or self.path.startswith(STATIC)

    @property
    def route(self) -> str:
        """As metrics name it: few, whatever clients ask for."""
        return getattr(self.scope.get("route"), "path", "other")

    @property
    def length(self) -> int | None:
        """Raises RefusalError: it is no number."""
        text = self.headers.get("content-length")
        if text is not None and not (text.isascii() and text.isdigit()):
            raise RefusalError(400, "Content-Length is no number")
        return None if text is None else int(text)


class Guard:
    """`app` behind it answers only what it should."""

    def __init__(self, app: App, service: Service) -> None:
        self._app, self._service = app, service
        self._settings, self._limits = service.settings, service.settings.limits
        self._token = (service.settings.token or "").encode()
        self._hosts = {*LOOPBACK, *service.settings.allow_hosts}
        if not service.settings.local:
            self._hosts.add(socket.gethostname().lower())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope)

        async def begin(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                more = SECURITY | {"X-Request-Id": exchange.id}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in more.items())]
            with anyio.fail_after(self._limits.body_time):
                await send(message)
            exchange.finished = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            self._admit(exchange)
            await self._with_body(exchange, receive, begin)
        except RefusalError as refusal:
            await self._refuse(exchange, refusal, begin)
        except TimeoutError:  # the answer is not read
            exchange.status = LEFT
            raise
        except Exception:
            log.exception("request %s failed", exchange.id)
            if exchange.status == 0:
                wrong = RefusalError(500, f"the server failed; its log says why at request {exchange.id}")
                await self._refuse(exchange, wrong, begin)
        self._note(exchange)

    def _admit(self, exchange: Exchange) -> None:
        """Raises RefusalError: somebody who may not ask, or more than can be done; before anything is read."""
        self._check_host(exchange)
        if self._token and not exchange.free and not self._knows_token(exchange):
            raise RefusalError(401, "give the server's token as Authorization: Bearer TOKEN", code="invalid_api_key")
        if exchange.method == "POST" and self._service.pool.full:
            raise self._service.pool.busy()
        if exchange.headers.get("content-encoding", "identity") != "identity":
            raise RefusalError(415, "Content-Encoding: send the body as it is")
        if (exchange.length or 0) > self._limits.body:
            raise self._too_large()

    def _check_host(self, exchange: Exchange) -> None:
        """A page of another site may not ask through somebody's browser, whatever name it gives this machine."""
        host = exchange.headers.get("host", "")
        if not self._answers_to(hostname(host) or ""):
            raise RefusalError(421, "Host: this server does not answer to this name; --allow-host allows names")
        origin = exchange.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise RefusalError(403, "Origin: pages of other sites may not use this server")
        if not exchange.free and exchange.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise RefusalError(403, "Sec-Fetch-Site: pages of other sites may not use this server")

    def _answers_to(self, name: str) -> bool:
        """Whoever owns another name may lead it here, and its pages would ask as if they were this server's."""
        if self._settings.local:
            return name in self._hosts
        return bool(self._token) or name in self._hosts or is_address(name)

    def _knows_token(self, exchange: Exchange) -> bool:
        kind, _, token = exchange.headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), self._token)

    def _too_large(self) -> RefusalError:
        return RefusalError(413, f"the body has more than {self._limits.body} bytes")

    async def _with_body(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        """Runs the request with its body, which counts for as long as that takes."""
        with self._service.room.share() as share:
            exchange.scope["state"]["share"] = share
            try:
                with anyio.fail_after(self._limits.body_time):
                    body = await self._read(receive, share)
            except TimeoutError:
                raise RefusalError(408, f"the body took longer than {self._limits.body_time:g} s") from None
            if body is None:
                exchange.status = LEFT
            else:
                await self._run(exchange, body, receive, send)

    async def _read(self, receive: Receive, share: Share) -> bytes | None:
        """None if the client has left before it has sent all of it. Raises RefusalError: too much."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            body += part
            if len(body) > self._limits.body:
                raise self._too_large()
            share.take(len(part))
            if not message.get("more_body", False):
                return bytes(body)

    async def _run(self, exchange: Exchange, body: bytes, receive: Receive, send: Send) -> None:
        """Ends the request's work when its client leaves."""
        given, answered = False, asyncio.Event()

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await answered.wait()
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(self._app(exchange.scope, replay, send))
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not exchange.finished:
                exchange.status = LEFT
                self._service.metrics.left.inc()
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        finally:
            answered.set()
            gone.cancel()

    async def _refuse(self, exchange: Exchange, refusal: RefusalError, send: Send) -> None:
        text = json.dumps(error_body(exchange.path, refusal)).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(text)), **refusal.headers}
        start = {
            "type": "http.response.start",
            "status": refusal.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
        await send(start)
        await send({"type": "http.response.body", "body": b"" if exchange.method == "HEAD" else text})

    def _note(self, exchange: Exchange) -> None:
        seconds = time.perf_counter() - exchange.start
        self._service.metrics.answered(exchange.route, exchange.status, seconds)
        if exchange.status == 429:  # a flood would be written down line by line
            return
        about = {"id": exchange.id, "method": exchange.method, "route": exchange.route}
        log.info(json.dumps({**about, "status": exchange.status, "ms": round(1000 * seconds, 1)}))


def is_address(name: str) -> bool:
    """Whether a host is named by its address, as no name of a page can be.

    >>> is_address("192.168.1.7"), is_address("fe80::1"), is_address("evil.example")
    (True, True, False)
    """
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def hostname(host: str) -> str | None:
    """The name in a Host header.

    >>> hostname("localhost:8080"), hostname("[::1]:8080")
    ('localhost', '::1')
    """
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None

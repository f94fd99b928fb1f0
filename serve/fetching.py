"""Pictures from URLs of hosts that are allowed, and from nowhere else: not through redirects, nor through a proxy."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import anyio
import httptools

from cembed.serve.each import each
from cembed.serve.errors import RefusalError

AT_ONCE = 8
PART = 1 << 16
PORTS = {"http": 80, "https": 443}
ONLY_DATA = "send the picture itself as a data: URI; this server fetches no URLs"


@dataclass(frozen=True, repr=False)
class File:
    """A page: bytes of a picture or a PDF, not decoded yet."""

    data: bytes


@dataclass(frozen=True)
class Url:
    """A page that is still to be fetched, for the field `param` of a request."""

    url: SplitResult
    param: str

    def refusal(self, reason: str) -> RefusalError:
        return RefusalError(400, f"{self.param}: the URL gave no picture: {reason}", self.param)

    @property
    def request(self) -> bytes:
        target = (self.url.path or "/") + (f"?{self.url.query}" if self.url.query else "")
        lines = [f"GET {target} HTTP/1.1", f"Host: {self.url.netloc}", "Accept: */*", "Connection: close"]
        return "\r\n".join([*lines, "", ""]).encode("ascii")


class Reply:
    """What httptools finds in an answer; without a length, it is over when its connection is."""

    def __init__(self) -> None:
        self.body, self.has_length, self.whole = bytearray(), False, False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.has_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.whole = True


@dataclass(frozen=True)
class Fetcher:
    """Fetches pictures from `hosts`, of `limit` bytes at most for a request, within `seconds`."""

    hosts: tuple[str, ...]
    limit: int
    seconds: float

    def url(self, text: str, param: str) -> Url:
        """Raises RefusalError: its host is not allowed, or it says more than a host and what to get there."""
        try:
            parts = urlsplit(text)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise RefusalError(400, f"{param}: this is no URL", param) from None
        if host not in self.hosts:
            raise RefusalError(400, f"{param}: {ONLY_DATA if not self.hosts else 'this host is not allowed'}", param)
        if "@" in parts.netloc or not (text.isascii() and text.isprintable()) or " " in text:
            raise RefusalError(400, f"{param}: a URL has no user, spaces or characters beyond ASCII", param)
        return Url(parts, param)

    async def __call__(self, urls: Sequence[Url], take: Callable[[int], None]) -> list[File]:
        """Files of `urls`; `take` is told of bytes as they come, and may refuse. Raises RefusalError."""
        size = 0

        def count(more: int) -> None:
            nonlocal size
            size += more
            take(more)
            if size > self.limit:
                raise RefusalError(400, f"{urls[0].param}: the URLs give more than {self.limit} bytes", urls[0].param)

        try:
            with anyio.fail_after(self.seconds):
                return await each(lambda url: fetch(url, count), urls, AT_ONCE)
        except TimeoutError:
            raise urls[0].refusal(f"it took longer than {self.seconds:g} s") from None


async def fetch(url: Url, count: Callable[[int], None]) -> File:
    """Raises RefusalError: there is no answer with 200 and a body."""
    try:
        status, data = await exchange(url, count)
    except (OSError, ValueError, httptools.HttpParserError, httptools.HttpParserUpgrade):
        raise url.refusal("it cannot be read") from None
    if status != 200 or not data:
        raise url.refusal(f"status {status}" if status != 200 else "it is empty")
    return File(data)


async def exchange(url: Url, count: Callable[[int], None]) -> tuple[int, bytes]:
    """The status of an answer, and its body if that is 200."""
    scheme = url.url.scheme
    context = ssl.create_default_context() if scheme == "https" else None
    reader, writer = await asyncio.open_connection(url.url.hostname, url.url.port or PORTS[scheme], ssl=context)
    try:
        writer.write(url.request)
        reply = Reply()
        parser = httptools.HttpResponseParser(reply)
        while not reply.whole and (data := await reader.read(PART)):
            count(len(data))
            parser.feed_data(data)
        if not reply.whole and reply.has_length:
            raise ConnectionError("it ended too early")
        return parser.get_status_code(), bytes(reply.body)
    finally:
        writer.transport.abort()

"""What a server may be told, and its limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cembed.runtime.embed.embedder import FULL, Budget
from cembed.runtime.embed.loading import Loading
from cembed.serve.hosts import Watching

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What clients may take. Seconds and bytes; a request is refused beyond them, never the process ended.

    `queue` requests wait for a worker, for `wait` at most; `answer` is for one page or query in a worker; a `body` is
    sent, and an answer read, within `body_time`, all bodies together are `bodies`; `header_time` is for the lines of a
    request, of `header` bytes, or the next request of a connection; `fetch` is for the URLs of one; `inputs` are
    those of one request, `text` the characters of one; `pictures` are kept of the pages of an index.
    """

    queue: int = 64
    wait: float = 30.0
    answer: float = 120.0
    body: int = 64 * MIB
    bodies: int = 256 * MIB
    body_time: float = 30.0
    header: int = 1 << 16
    header_time: float = 10.0
    connections: int = 2000
    fetch: float = 20.0
    drain: float = 30.0
    inputs: int = 2048
    text: int = 1 << 16
    pictures: int = 1024 * MIB


@dataclass(frozen=True)
class Settings:
    """One server. `page_settings` is what vectors of pages depend on beside a file's bytes; see `page_content`."""

    worker: Loading
    index: Path | None = None
    read_only: bool = False
    name: str = ""
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    token: str | None = field(default=None, repr=False)
    allow_hosts: tuple[str, ...] = ()
    url_hosts: tuple[str, ...] = ()
    budget: Budget = FULL
    page_settings: str = ""
    limits: Limits = Limits()
    watch: Watching | None = None

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK

"""cembed-service under attack: many bad clients of a kind, while /health is asked and memory is measured.

    python samples/cpp/attack.py bundle --program build/lib/samples/cembed-service

Needs ONNX Runtime where the service looks for it; all is on the loopback interface of this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import resource
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from random import randbytes
from typing import Annotated

import typer
from load import CALLERS, Service

MEMORY = 64 << 20  # bytes over what the idle service takes
PATIENCE = 1.0  # seconds until an answer of /health
HOST = b"Host: localhost\r\n"
HEALTH = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
QUERY = b"POST /embed HTTP/1.1\r\n" + HOST + b"Content-Type: text/plain\r\nContent-Length: 8\r\n\r\nwarranty"
LONG_QUERY = QUERY.replace(b"8\r\n\r\nwarranty", b"65536\r\nConnection: close\r\n\r\n" + b"a b " * 16384)
POST = b"POST /embed HTTP/1.1\r\n" + HOST + b"Content-Type: image/png\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
FIELDS = b"".join(b"a%d:\r\n" % number for number in range(90))
HELLO = bytes.fromhex("1603010200010001fc0303") + bytes(500)  # of TLS
BLOCK = bytes(1 << 16)


@dataclass(frozen=True)
class Client:
    """A connection; each call raises OSError when the service has closed it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def send_on(self, data: bytes, pause: float = 0) -> None:
        """The same for ever, with so many seconds between."""
        while True:
            await self.send(data)
            await asyncio.sleep(pause)

    async def read_on(self) -> None:
        """Until the service closes the connection."""
        while await self.reader.read(1 << 16):
            pass


async def endless_chunks(client: Client) -> None:
    await client.send(CHUNKED)
    await client.send_on(b"10000\r\n" + BLOCK + b"\r\n")


async def tiny_chunks(client: Client) -> None:
    await client.send(CHUNKED)
    await client.send_on(b"1;" + b"a" * 100 + b"\r\n0\r\n")


async def endless_chunk_header(client: Client) -> None:
    await client.send(CHUNKED + b"1;")
    await client.send_on(b"a" * 1000)


async def endless_trailer(client: Client) -> None:
    await client.send(CHUNKED + b"0\r\n")
    await client.send_on(b"a: b\r\n" * 100)


async def huge_length(client: Client) -> None:
    await client.send(POST + b"Content-Length: 1000000000000\r\n\r\n")
    await client.send_on(BLOCK)


async def stalled_body(client: Client) -> None:
    await client.send(POST + FIELDS + b"Content-Length: 30000000\r\n\r\n")
    await client.send(BLOCK * 16)
    await client.read_on()


async def large_upload(client: Client) -> None:
    await client.send(POST + b"Content-Length: %d\r\n\r\n" % (496 * len(BLOCK)))
    for _ in range(496):
        await client.send(BLOCK)
    await client.read_on()


async def endless_lines(client: Client) -> None:
    await client.send(b"GET /health HTTP/1.1\r\n")
    await client.send_on(b"a: b\r\n" * 100)


async def endless_line(client: Client) -> None:
    await client.send(b"GET /health HTTP/1.1\r\na: ")
    await client.send_on(b"b" * 1000)


async def slow_header(client: Client) -> None:
    await client.send(b"GET /health HTTP/1.1\r\na: ")
    await client.send_on(b"b", 0.2)


async def long_query(client: Client) -> None:
    await client.send(LONG_QUERY)
    await client.read_on()


async def slow_body(client: Client) -> None:
    await client.send(POST + b"Content-Length: 100000\r\n\r\n")
    await client.send_on(b"a", 0.2)


async def idle(client: Client) -> None:
    await client.read_on()


async def never_reading(client: Client) -> None:
    await client.send_on(QUERY * 100)


async def never_reading_health(client: Client) -> None:
    await client.send_on(HEALTH * 100)


async def half_closed(client: Client) -> None:
    await client.send(QUERY)
    client.writer.write_eof()
    await client.read_on()


async def gone(client: Client) -> None:
    await client.send(QUERY)


async def garbage(client: Client) -> None:
    await client.send_on(randbytes(1000), 0.01)


async def letters(client: Client) -> None:
    await client.send_on(bytes(65 + byte % 26 for byte in randbytes(1000)), 0.01)


async def churn(client: Client) -> None:
    await client.send(HEALTH)
    await client.reader.readline()


async def tls(client: Client) -> None:
    await client.send(HELLO)
    await client.read_on()


Behaviour = Callable[[Client], Awaitable[None]]
BODIES: tuple[Behaviour, ...] = (
    *(endless_chunks, tiny_chunks, endless_chunk_header, endless_trailer),
    *(huge_length, stalled_body, large_upload, long_query, slow_body),
)
OTHERS: tuple[Behaviour, ...] = (
    *(endless_lines, endless_line, slow_header, idle, never_reading, never_reading_health),
    *(half_closed, gone, garbage, letters, churn, tls),
)
KINDS = {behaviour.__name__: behaviour for behaviour in BODIES + OTHERS}
FEWER = {"large_upload": 50}  # each sends 31 MB


def attack(kind: str, port: int, clients: int, seconds: float) -> None:
    """So many at a time; each that is thrown out comes again."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

    async def come() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await KINDS[kind](Client(reader, writer))
        finally:
            writer.transport.abort()

    async def come_again() -> None:
        while True:
            with contextlib.suppress(OSError):
                await come()
            await asyncio.sleep(0.01)

    async def all_of_them() -> None:
        tasks = [asyncio.create_task(come_again()) for _ in range(clients)]
        for task in (await asyncio.wait(tasks, timeout=seconds))[0]:
            task.result()  # none ends but by an error

    asyncio.run(all_of_them())


@dataclass(frozen=True)
class Damage:
    """What an attack did: bytes over what the idle service takes, and the slowest answer of /health, in seconds."""

    memory: int
    health: float

    @property
    def is_small(self) -> bool:
        return self.memory <= MEMORY and self.health <= PATIENCE

    def __str__(self) -> str:
        return f"{self.memory / 1e6:6.1f} MB more, /health after {1000 * self.health:4.0f} ms at most"


def ask(service: Service, method: str, path: str, body: bytes = b"", kind: str = "text/plain") -> tuple[int, str]:
    """Status and text of the answer on a new connection."""
    connection = HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request(method, path, body, {"Content-Type": kind})
    answer = connection.getresponse()
    text = answer.read().decode("latin-1")
    connection.close()
    return answer.status, text


def memory(service: Service, key: str) -> int:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return 1024 * int(status.split(f"{key}:")[1].split()[0])


def warm_up(service: Service, page: bytes) -> int:
    """Bytes that the service takes when it has embedded pages and queries, as many at once as it does."""
    with ThreadPoolExecutor(CALLERS) as pool:
        for body, kind in ((page, "image/png"), (b"warranty", "text/plain")):
            asked = [pool.submit(ask, service, "POST", "/embed", body, kind) for _ in range(10)]
            assert {future.result()[0] for future in asked} == {200}
    return memory(service, "VmRSS")


def recover(service: Service) -> None:
    """Waits until all that is left of an attack is gone, and asks a query."""
    deadline = time.monotonic() + 150  # the limits of the steps of one request are a minute together
    while "cembed_connections 1\n" not in ask(service, "GET", "/metrics")[1]:
        assert time.monotonic() < deadline, ask(service, "GET", "/metrics")
        time.sleep(0.1)
    assert ask(service, "POST", "/embed", b"warranty")[0] == 200


def damage(service: Service, pool: ProcessPoolExecutor, taken: int, kind: str, clients: int, seconds: float) -> Damage:
    """Of one kind to a service that takes so many bytes when idle."""
    Path(f"/proc/{service.process.pid}/clear_refs").write_text("5")  # the peak begins again
    attacking, slowest = pool.submit(attack, kind, service.port, clients, seconds), 0.0
    while not attacking.done():
        start = time.perf_counter()
        assert ask(service, "GET", "/health") == (200, "ok\n")
        slowest = max(slowest, time.perf_counter() - start)
        time.sleep(0.02)
    attacking.result()
    return Damage(memory(service, "VmHWM") - taken, slowest)


def attack_all(
    service: Service, page: bytes, clients: int, seconds: float, kinds: Sequence[str] = tuple(KINDS)
) -> Iterator[tuple[str, Damage]]:
    """One kind after the other; after each, a query is answered."""
    taken = warm_up(service, page)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for kind in kinds:
            yield kind, damage(service, pool, taken, kind, min(clients, FEWER.get(kind, clients)), seconds)
            recover(service)


def main(
    bundle: Annotated[Path, typer.Argument(help="Made by `cembed export`.")],
    program: Annotated[Path, typer.Option(help="The service.")] = Path("build/lib/samples/cembed-service"),
    clients: Annotated[int, typer.Option(min=1, help="Of each kind, at a time.")] = 1000,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each kind.")] = 15,
    kind: Annotated[list[str] | None, typer.Option(help="One that is chosen; else all.")] = None,
) -> None:
    """Attack cembed-service; ends with 1 where it takes over 64 MB more, or /health more than a second."""
    page, wrong = (bundle / "self_test.png").read_bytes(), False
    with Service(program, bundle, "text/plain", b"warranty") as service:
        for name, done in attack_all(service, page, clients, seconds, kind or tuple(KINDS)):
            print(f"{name:20} {done}{'' if done.is_small else ': TOO MUCH'}", flush=True)
            wrong |= not done.is_small
    raise SystemExit(wrong)


if __name__ == "__main__":
    typer.run(main)

"""cembed-service under load, by wrk: all it can do, ten times as much, 500 slow connections beside it, SIGTERM.

    python samples/cpp/load.py bundle --program build/lib/samples/cembed-service --seconds 10

Needs wrk (`apt-get install wrk`), and ONNX Runtime where the service looks for it. Requests are queries, or `--page`.
"""

from __future__ import annotations

import itertools
import json
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated

import typer

CALLERS, QUEUE, PATIENCE = 2, 32, 10
OVERLOAD, SLOW = 10, 500
SLOW_HEAD = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 4000\r\n\r\n"


@dataclass(frozen=True)
class Load:
    """What wrk counted: answers by status, broken connections, latency in ms."""

    seconds: float
    statuses: dict[str, int]
    errors: int
    p50: float
    p99: float

    @property
    def rate(self) -> float:
        """Vectors a second."""
        return self.statuses.get("200", 0) / self.seconds

    def __str__(self) -> str:
        answers = ", ".join(f"{count / self.seconds:.0f} x {status}" for status, count in sorted(self.statuses.items()))
        return f"{answers} a second; median {self.p50:.1f} ms, 99 % {self.p99:.0f} ms; {self.errors} errors"


class Service:
    """One process, and what is asked of it; `arguments` follow the port."""

    def __init__(
        self,
        program: Path,
        bundle: Path,
        kind: str,
        body: bytes,
        arguments: Sequence[object] = (CALLERS, QUEUE, PATIENCE),
    ) -> None:
        self.kind, self.body = kind, body
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [*map(str, (program, bundle, self.port, *arguments))]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        if b"listening" not in self.process.stdout.readline():
            raise SystemExit(f"{program} ended with {self.process.wait()}")

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def load(self, connections: int, seconds: int, rate: float = 0) -> Load:
        """Each connection asks again when it has its answer, or all together so many times a second."""
        pause = 1000 * connections / rate if rate else 0
        with tempfile.NamedTemporaryFile() as body:
            body.write(self.body)
            body.flush()
            command = f"wrk -t1 -c{connections} -d{seconds} --timeout=30 http://127.0.0.1:{self.port}/embed -s".split()
            command += [str(Path(__file__).with_suffix(".lua")), "--", self.kind, body.name, str(pause)]
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        load = Load(**json.loads(lines[-1]))
        if load.errors or not load.statuses.keys() <= {"200", "429", "503"}:
            raise SystemExit(f"not answered, or with an error: {load}")
        return load

    @contextmanager
    def slow_connections(self) -> Iterator[None]:
        """Requests of which one byte a second comes: the headers of half of them, the body of the others.

        Those that the service closes are made again.
        """
        done = threading.Event()
        connections = [self._connect(number % 2 * SLOW_HEAD) for number in range(SLOW)]

        def send() -> None:
            for byte in itertools.cycle(SLOW_HEAD[:-4]):
                if done.wait(1):
                    return
                connections[::2] = [self._send(connection, bytes([byte]), b"") for connection in connections[::2]]
                connections[1::2] = [self._send(connection, b"a", SLOW_HEAD) for connection in connections[1::2]]

        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(send)
            try:
                yield
            finally:
                done.set()
                sending.result()
                for connection in connections:
                    connection.close()

    def _send(self, connection: socket.socket, data: bytes, first: bytes) -> socket.socket:
        """To the connection, or to a new one in its place, which sends something else first."""
        try:
            connection.sendall(data)
        except ConnectionError:
            connection.close()
            return self._connect(first)
        return connection

    def _connect(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall(data)
        return connection

    def drain(self) -> tuple[Counter[int], float]:
        """SIGTERM while as many as have a place wait: the statuses that they get, and seconds until the end."""
        connections = [HTTPConnection("127.0.0.1", self.port, timeout=60) for _ in range(CALLERS + QUEUE)]

        def ask(connection: HTTPConnection) -> int:
            connection.request("POST", "/embed", self.body, {"Content-Type": self.kind})
            answer = connection.getresponse()
            answer.read()
            return answer.status

        with ThreadPoolExecutor(len(connections)) as pool:
            list(pool.map(ask, connections))
            answers = pool.map(ask, connections)
            time.sleep(0.02)
            self.process.send_signal(signal.SIGTERM)
            start = time.perf_counter()
            statuses = Counter(answers)
        if code := self.process.wait(60):
            raise SystemExit(f"the service ended with {code}")
        return statuses, time.perf_counter() - start


def measure(service: Service, seconds: int) -> Iterator[tuple[str, Load]]:
    yield "alone", (alone := service.load(CALLERS, seconds))
    yield "overload", service.load(OVERLOAD * (CALLERS + QUEUE), seconds, OVERLOAD * alone.rate)
    yield "after it", service.load(CALLERS, seconds)
    with service.slow_connections():
        yield "slow ones", service.load(CALLERS, seconds)


def main(
    bundle: Annotated[Path, typer.Argument(help="Made by `cembed export`.")],
    program: Annotated[Path, typer.Option(help="The service.")] = Path("build/lib/samples/cembed-service"),
    page: Annotated[Path | None, typer.Option(help="PNG or JPEG to send instead of a query.")] = None,
    seconds: Annotated[int, typer.Option(min=1, help="Of each load.")] = 10,
) -> None:
    """Put load on cembed-service."""
    kind = "text/plain" if page is None else f"image/{page.suffix[1:].replace('jpg', 'jpeg')}"
    with Service(program, bundle, kind, b"warranty period" if page is None else page.read_bytes()) as service:
        for name, load in measure(service, seconds):
            print(f"{name:10} {load}", flush=True)
        statuses, end = service.drain()
    answers = ", ".join(f"{count} x {status}" for status, count in statuses.items())
    print(f"{'SIGTERM':10} {answers} of {CALLERS + QUEUE} that had asked; the end after {end:.1f} s")


if __name__ == "__main__":
    typer.run(main)

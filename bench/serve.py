"""Queries and pages a second over HTTP, beside the library's own: alone, at half load, overloaded, with slow clients.

    python bench/serve.py --program build/lib/samples/cembed-service

`cembed serve` and, if its program is there, the C++ service answer wrk (`apt-get install wrk`) on loopback, with as
many threads as the library, which embeds the same query and page in a loop in this process. They take turns; medians.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from pages import hardware
from rich.console import Console
from rich.table import Table

from cembed.runtime import Embedder, PageReader

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samples" / "cpp"))
import load

ROOT = Path(__file__).resolve().parents[1]
QUERY = b"notice about the pension seminar with emma foster"
KINDS = {"queries": "text/plain", "pages": "image/jpeg"}
BUSY, MANY, HALF = 4, 340, 8
"""Connections: enough to keep a service busy, ten times what has a place, and at half load."""
OVERLOAD = 10


class Ours(load.Service):
    """`cembed serve`."""

    def __init__(self, bundle: Path, threads: int, workers: int, kind: str, body: bytes, log: Path) -> None:
        self.kind, self.body = kind, body
        command = [sys.executable, "-m", "cembed", "serve", str(bundle), "--port", "0", "--threads", str(threads)]
        with open(log, "w") as file:
            self.process = subprocess.Popen([*command, "--workers", str(workers)], stderr=file)
        while '"ready"' not in (text := log.read_text()):
            if self.process.poll() is not None:
                raise SystemExit(text)
            time.sleep(0.1)
        self.port = int(text.partition(" at http://")[2].split()[0].rpartition(":")[2])

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def library(bundle: Path, threads: int, page: Path) -> dict[str, Callable[[int], float]]:
    """Queries and pages a second in a loop of some seconds, as a program without a service has them."""
    embedder, reader = Embedder.load(bundle, threads=threads), PageReader()

    def queries(seconds: int) -> float:
        return rate(lambda: embedder.embed_query(QUERY.decode()), seconds)

    def pages(seconds: int) -> float:
        with reader as opened:
            stream = opened.read([page] * 100_000)
            found = rate(lambda: embedder.embed_image(next(stream).image), seconds)  # type: ignore[union-attr]
            stream.close()  # type: ignore[attr-defined]
        return found

    return {"queries": queries, "pages": pages}


def rate(work: Callable[[], Any], seconds: int) -> float:
    """Calls a second."""
    work()
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        work()
        count += 1
    return count / spent


def measure(service: load.Service, seconds: int) -> Iterator[tuple[str, load.Load]]:
    yield "alone", (alone := service.load(BUSY, seconds))
    yield "half load", service.load(HALF, seconds, alone.rate / 2)
    yield "overload", service.load(MANY, seconds, OVERLOAD * alone.rate)
    with service.slow_connections():
        yield "500 slow", service.load(BUSY, seconds)


def numbers(found: load.Load) -> dict[str, float]:
    refused = sum(count for status, count in found.statuses.items() if status != "200")
    return {
        "rate": found.rate,
        "refused a second": refused / found.seconds,
        "median ms": found.p50,
        "99 % ms": found.p99,
    }


def main(
    bundle: Annotated[Path, typer.Option(help="Made by `cembed export`.")] = ROOT / "samples" / "bundle",
    page: Annotated[Path, typer.Option(help="JPEG to send.")] = ROOT / "samples/pages/sample/pages/00000.jpg",
    program: Annotated[Path, typer.Option(help="The C++ service.")] = ROOT / "build/lib/samples/cembed-service",
    threads: Annotated[int, typer.Option(min=1, help="Of the library, and of each worker.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processes of `cembed serve`.")] = 1,
    seconds: Annotated[int, typer.Option(min=1, help="Of each load.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are of so many.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write all numbers.")] = None,
) -> None:
    """Measure HTTP beside the library."""
    console, table = (
        Console(width=150),
        Table("what", "side", "load", "a second", "of alone", "refused", "median ms", "99 % ms"),
    )
    results: list[dict[str, Any]] = []
    own = library(bundle, threads, page)
    for what, kind in KINDS.items():
        body = QUERY if what == "queries" else page.read_bytes()
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        for _ in range(rounds):
            found.setdefault(("library", "alone"), []).append({"rate": own[what](seconds)})
            for name, start in services(bundle, threads, workers, kind, body, program).items():
                with ExitStack() as stack:
                    service = stack.enter_context(start())
                    for case, result in measure(service, seconds):
                        found.setdefault((name, case), []).append(numbers(result))
        for (side, case), rows in found.items():
            row = {key: median(r[key] for r in rows) for key in rows[0]}
            results.append({"what": what, "side": side, "load": case, **row})
            alone = median(r["rate"] for r in found[side, "alone"])
            cells = [
                row["rate"],
                row["rate"] / alone,
                *(row.get(k, np.nan) for k in ("refused a second", "median ms", "99 % ms")),
            ]
            table.add_row(what, side, case, *(f"{cell:.4g}" for cell in cells))
    console.print(table)
    if out is not None:
        machine = hardware(threads) | {"load": os.getloadavg()}
        out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def services(
    bundle: Path, threads: int, workers: int, kind: str, body: bytes, program: Path
) -> dict[str, Callable[[], load.Service]]:
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"cembed-bench-{os.getpid()}.log"
    found: dict[str, Callable[[], load.Service]] = {
        "cembed serve": lambda: Ours(bundle, threads, workers, kind, body, log)
    }
    if program.is_file():
        found["C++ service"] = lambda: load.Service(program, bundle, kind, body)
    else:
        print(f"without the C++ service: there is no {program}", file=sys.stderr)
    return found


if __name__ == "__main__":
    typer.run(main)

"""An index of synthetic pages: how fast it is built, searched and opened, what it takes on disk and in memory.

    python bench/index.py --pages 100000 --threads 2
    python bench/index.py --pages 1000000 --storage u8,bits --rounds 5    # 5 GB of disk

Pages are correlated: each is one of some topics with noise. The writing speed of the disk is measured in the same run,
with the same bytes in pieces of the same size, each waited for. Searches run in a process of their own, whose memory is
looked at before and after. The index must fit the disk: 12.9 kB a page.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import pages as pages_bench
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cembed.runtime.disk import Disk
from cembed.runtime.index.index import Index
from cembed.runtime.index.new_pages import BATCH_PAGES, NewPage
from cembed.runtime.index.search import Found, Stage
from cembed.runtime.scoring.storage import STORAGE

QUERY_VECTORS, POOL, TOPICS = 16, 2048, 256
BUNDLE = "synthetic"
Numbers = dict[str, Any]


def normalise(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return unit


class Synthetic:
    """Pages [rows, dim] without end, each another one, made faster than they are added."""

    def __init__(self, rows: int, dim: int) -> None:
        rng = np.random.default_rng(0)
        topics = rng.standard_normal((TOPICS, rows, dim), np.float32)
        pool = topics[rng.integers(0, TOPICS, POOL)] + rng.standard_normal((POOL, rows, dim), np.float32)
        self.pool = pool.astype(np.float32)
        self.noise = rng.standard_normal((1024, rows, dim), np.float32)

    def page(self, number: int) -> NDArray[np.float32]:
        page: NDArray[np.float32] = self.pool[number % POOL] + self.noise[number // POOL % 1024]
        return page

    def pages(self, count: int) -> Iterator[NewPage]:
        for i in range(count):
            source = f"archive/{i // 1000:04}/document {i // 8:07}.pdf"
            yield NewPage(f"{source}#{i % 8 + 1}", self.page(i), source, i % 8 + 1, {"year": 2000 + i // 8 % 25})

    def query(self, number: int, pages: int) -> NDArray[np.float32]:
        """The first vectors of some page, with noise of a page's size."""
        rng = np.random.default_rng([1, number])
        page = self.page(int(rng.integers(0, pages)))[:QUERY_VECTORS]
        return normalise(normalise(page) + normalise(rng.standard_normal(page.shape, np.float32)))


def build(folder: Path, count: int, rows: int, dim: int, storage: tuple[str, ...]) -> Numbers:
    data = Synthetic(rows, dim)
    start = time.perf_counter()
    for _ in data.pages(min(count, 20_000)):
        pass
    making = (time.perf_counter() - start) * count / min(count, 20_000)
    with Index.create(folder, dim=dim, bundle=BUNDLE, storage=storage) as index:
        start = time.perf_counter()
        index.add(data.pages(count), bundle=BUNDLE)
        seconds = time.perf_counter() - start
        stats = index.stats()
    arithmetic = sum(rows * STORAGE[tier].vector_bytes(dim) for tier in storage)
    return {
        "seconds": seconds,
        "seconds of making pages": making,
        "pages a second": count / seconds,
        "disk pages a second": disk_speed(folder.parent, stats.bytes_per_page),
        "bytes a page": stats.bytes_per_page,
        "arithmetic bytes": arithmetic,
        "over arithmetic": stats.bytes_per_page / arithmetic - 1,
        "scanned tier bytes": stats.bytes[storage[-1]],
        "peak rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def disk_speed(folder: Path, page_bytes: float) -> float:
    """Pages a second that the disk takes, when each batch is waited for."""
    disk, data, rounds = Disk(), os.urandom(int(BATCH_PAGES * page_bytes)), 10
    path = folder / "speed"
    handle = disk.create(path)
    start = time.perf_counter()
    for number in range(rounds):
        disk.write(handle, data, number * len(data))
        disk.sync(handle)
    seconds = time.perf_counter() - start
    disk.close(handle)
    path.unlink()
    return rounds * BATCH_PAGES / seconds


def rss() -> int:
    """Bytes of this process in memory, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def search(folder: Path, rows: int, threads: int, rounds: int) -> Numbers:
    """Runs in a process of its own."""
    start = time.perf_counter()
    index = Index.open(folder)
    opened = time.perf_counter() - start
    data, pages = Synthetic(rows, index.dim), len(index)
    queries = [data.query(number, pages) for number in range(rounds + 1)]
    exact = (Stage(index.tiers[0], 10),)
    before = rss()
    first, _ = timed(index, queries[-1], threads)
    found: Numbers = {"open ms": opened * 1000, "first search ms": first, "ms": [], "exact ms": [], "agree": []}
    for query in queries[:-1]:
        milliseconds, coarse = timed(index, query, threads)
        found["ms"].append(milliseconds)
        found["stages"] = [vars(stage) for stage in coarse.stages]
    found["rss growth"] = rss() - before
    for query in queries[: min(rounds, 5)]:  # afterwards: they read the whole exact tier
        start = time.perf_counter()
        best = index.search(query, plan=exact, threads=threads)
        found["exact ms"].append((time.perf_counter() - start) * 1000)
        hits = {hit.id for hit in timed(index, query, threads)[1].hits}
        found["agree"].append(len(hits & {hit.id for hit in best.hits}) / max(1, len(hits)))
    return found


def timed(index: Index, query: NDArray[np.float32], threads: int) -> tuple[float, Found]:
    start = time.perf_counter()
    found = index.search(query, threads=threads)
    return (time.perf_counter() - start) * 1000, found


def report(result: Numbers) -> None:
    built, found, shape = result["build"], result["search"], result["shape"]
    table = Table(title=f"{shape['pages']:,} pages of {shape['rows']} x {shape['dim']}, {','.join(shape['storage'])}")
    table.add_column("")
    table.add_column("", justify="right")
    tier = built["scanned tier bytes"]
    lines = {
        "pages a second, built": f"{built['pages a second']:,.0f}",
        "  making the pages takes of that": f"{built['seconds of making pages'] / built['seconds']:.0%}",
        "  the disk alone would take": f"{built['disk pages a second']:,.0f}",
        "peak RSS while building, MB": f"{built['peak rss'] / 1e6:.0f}",
        "bytes a page": f"{built['bytes a page']:,.1f}, {built['over arithmetic']:.2%} over the arithmetic",
        "opened in ms": f"{found['open ms']:.1f}",
        "first search, CRCs of its bytes included, ms": f"{found['first search ms']:.1f}",
        "search, median ms": f"{median(found['ms']):.1f}",
        "all pages in the exact tier, median ms": f"{median(found['exact ms']):.1f}",
        "best 10 of both agree": f"{np.mean(found['agree']):.3f}",
        "RSS growth, MB": f"{found['rss growth'] / 1e6:.0f}; the scanned tier has {tier / 1e6:.0f}",
    }
    for stage in found["stages"]:
        lines[f"  {stage['tier']}: {stage['pages']:,} pages"] = f"{stage['ms']:.1f} ms, {stage['bytes'] / 1e6:.1f} MB"
    for line in lines.items():
        table.add_row(*line)
    Console().print(table)
    checks = {
        "search at most 60 ms (100,000 pages, 2 threads)": median(found["ms"]) <= 60 * max(1, shape["pages"] / 1e5),
        "RSS growth at most the scanned tier + 200 MB": found["rss growth"] <= tier + 200e6,
        "bytes within 3 % of the arithmetic": abs(built["over arithmetic"]) <= 0.03,
        "20,000 pages a second": built["pages a second"] >= 20_000,
    }
    for what, met in checks.items():
        print("met   " if met else "MISSED", what)


def main(
    pages: Annotated[int, typer.Option(min=1)] = 100_000,
    rows: Annotated[int, typer.Option(min=1)] = 32,
    dim: Annotated[int, typer.Option(min=8)] = 128,
    storage: Annotated[str, typer.Option(help="Storage types, the most exact first.")] = "f16,u8,bits",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    workdir: Annotated[Path | None, typer.Option(help="Where the index is made, and removed again.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Writes every number to this file.")] = None,
    searched: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Build an index of synthetic pages, and search it."""
    if searched is not None:
        print(json.dumps(search(searched, rows, threads, rounds)))
        return
    folder, tiers = Path(tempfile.mkdtemp(prefix="cembed-index-", dir=workdir)), tuple(storage.split(","))
    try:
        built = build(folder / "index", pages, rows, dim, tiers)
        options = ["--rows", rows, "--threads", threads, "--rounds", rounds, "--searched", folder / "index"]
        child = subprocess.run(
            [sys.executable, __file__, *map(str, options)], check=True, capture_output=True, text=True
        )
        found = json.loads(child.stdout)
    finally:
        shutil.rmtree(folder)
    shape = {"pages": pages, "rows": rows, "dim": dim, "storage": tiers}
    result = {"hardware": pages_bench.hardware(threads), "shape": shape, "build": built, "search": found}
    report(result)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

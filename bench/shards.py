"""One index beside the same pages in shards: the same order, and what a search takes.

    python bench/shards.py --pages 1000000 --shards 4

Pages are random unit vectors, the hardest to rank. Exact searches read every vector; those in stages read signs
first. Medians of interleaved rounds, and the memory of all processes (PSS, which counts shared pages once).
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from pages import hardware
from rich.console import Console
from rich.table import Table

from cembed.runtime import Index, NewPage, Shards
from cembed.runtime.index.search import Stage

VECTORS, DIM, TOP = 4, 128, 100


def pages(first: int, last: int) -> Iterator[NewPage]:
    for block in range(first, last, 10_000):
        count = min(10_000, last - block)
        vectors = np.random.default_rng(block).standard_normal((count, VECTORS, DIM)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
        for i in range(count):
            yield NewPage(str(block + i), vectors[i], f"{(block + i) // 100}.pdf", 1 + i % 100)


def make(path: Path, first: int, last: int) -> Path:
    with Index.create(path, dim=DIM, bundle="synthetic") as index:
        index.add(pages(first, last), bundle="synthetic")
    return path


def memory() -> float:
    """MiB of this process and its children."""
    me = psutil.Process()
    return float(sum(process.memory_full_info().pss for process in [me, *me.children(recursive=True)]) / 2**20)


def main(
    count: Annotated[int, typer.Option("--pages", min=1000)] = 1_000_000,
    shards: Annotated[int, typer.Option(min=2)] = 4,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write all numbers.")] = None,
) -> None:
    """Search one index and its shards."""
    folder = Path(tempfile.mkdtemp(prefix="cembed-", dir=os.environ.get("TMPDIR", "/tmp")))
    try:
        start = time.perf_counter()
        whole = make(folder / "whole", 0, count)
        edges = [count * i // shards for i in range(shards + 1)]
        parts = [make(folder / f"shelf-{i}", edges[i], edges[i + 1]) for i in range(shards)]
        print(f"made in {time.perf_counter() - start:.0f} s", flush=True)
        found = measure(whole, parts, rounds)
    finally:
        shutil.rmtree(folder)
    table = Table("what", *found)
    for key in next(iter(found.values())):
        table.add_row(key, *(f"{row[key]:.4g}" for row in found.values()))
    Console().print(table)
    if out is not None:
        machine = hardware(os.cpu_count() or 1) | {"load": os.getloadavg()}
        out.write_text(
            json.dumps({"machine": machine, "pages": count, "shards": shards, "results": found}, indent=1) + "\n"
        )


def measure(whole: Path, parts: list[Path], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a search, seconds to open, MiB, for each side. Their order must be the same."""
    random = np.random.default_rng(10**9)
    start = time.perf_counter()
    index = Index.open(whole)
    opened = {"one index": time.perf_counter() - start}
    before = memory()
    start = time.perf_counter()
    several = Shards(parts)
    opened["shards"] = time.perf_counter() - start
    sides: dict[str, Any] = {"one index": index, "shards": several}
    times: dict[str, dict[str, list[float]]] = {side: {"exact ms": [], "stages ms": []} for side in sides}
    plans = {"exact ms": (Stage(index.tiers[0], TOP),), "stages ms": None}
    same = 0
    for _ in range(rounds):
        query = random.standard_normal((16, DIM)).astype(np.float32)
        for kind, plan in plans.items():
            hits = {}
            for side, searched in sides.items():
                start = time.perf_counter()
                hits[side] = [(hit.id, hit.score) for hit in searched.search(query, TOP, plan=plan).hits]
                times[side][kind].append(1000 * (time.perf_counter() - start))
            if kind == "exact ms":
                assert hits["one index"] == hits["shards"]
                same += 1
    print(f"{same} of {rounds} exact searches gave the same {TOP} pages in the same order")
    used = {"one index": before, "shards": memory() - before}
    several.close()
    return {
        side: {kind: statistics.median(values) for kind, values in times[side].items()}
        | {"opened s": opened[side], "memory MiB": used[side]}
        for side in sides
    }


if __name__ == "__main__":
    typer.run(main)

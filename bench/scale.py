"""Pages a second of actors on a Ray cluster beside the plain command, and rows a second into parts beside pyarrow.

    python bench/scale.py PAGES --bundle samples/bundle

PAGES is a folder of pictures, as `python samples/pages/generate.py` makes. Each side starts anew, and its rate counts
from its first part of the work to its last: starting Ray and opening graphs is told apart. Medians.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from pages import hardware
from pyarrow import parquet
from rich.console import Console
from rich.table import Table

from cembed.runtime import Bundle
from cembed.runtime.page_vectors import embed_documents
from cembed.scale.cluster import connect, stream
from cembed.scale.embed import WorkerOptions
from cembed.scale.parts import Parts, open_store
from cembed.scale.rows import KEY_BYTES, Row, RowSchema

ROOT = Path(__file__).resolve().parents[1]
NOTHING = np.empty(0, f"S{KEY_BYTES}")
ROWS, VECTORS, DIM = 200_000, 8, 128
BATCH = 1000


def steady(counts: Iterator[int], start: float) -> dict[str, float]:
    """Pages a second after the first ones that came, and seconds until these."""
    first = next(counts)
    began, pages = time.perf_counter(), sum(counts)
    return {"first s": began - start, "pages a second": pages / (time.perf_counter() - began), "pages": first + pages}


def plain(options: WorkerOptions, files: list[str], threads: int) -> dict[str, float]:
    start = time.perf_counter()
    embedder = WorkerOptions(options.bundle, threads=threads, schema=options.schema).load()
    return steady((1 for _ in embed_documents(embedder, files)), start)


def actors(options: WorkerOptions, files: list[str], count: int) -> dict[str, float]:
    start = time.perf_counter()
    ray = connect("auto")
    return steady((len(batch) for batch in stream(ray, files, options, NOTHING, count)), start)


def in_a_process(side: str, bundle: Path, files: list[str]) -> dict[str, float]:
    """What a side measures, in a process of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as given:
        json.dump({"side": side, "bundle": str(bundle), "files": files}, given)
        given.flush()
        command = [sys.executable, __file__, "child", given.name]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    found: dict[str, float] = json.loads(lines.splitlines()[-1])
    return found


def child(path: str) -> None:
    given = json.loads(Path(path).read_text())
    options = WorkerOptions(given["bundle"], schema=RowSchema(256, Bundle(given["bundle"], verify=False).hash, "[]"))
    sides: dict[str, Callable[[], dict[str, float]]] = {
        "plain, 2 threads": lambda: plain(options, given["files"], 2),
        "plain, 1 thread": lambda: plain(options, given["files"], 1),
        "1 actor": lambda: actors(options, given["files"], 1),
        "2 actors": lambda: actors(options, given["files"], 2),
    }
    print(json.dumps(sides[given["side"]]()))


def synthetic(schema: RowSchema) -> list[Any]:
    random, batches = np.random.default_rng(0), []
    for first in range(0, ROWS, BATCH):
        vectors = random.standard_normal((BATCH, VECTORS, DIM)).astype(np.float32)
        rows = [Row(f"/corpus/{first + i}.pdf", 1, f"{first + i:064x}", vectors[i]) for i in range(BATCH)]
        batches.append(schema.batch(rows))
    return batches


def sink() -> dict[str, float]:
    """MB/s of rows into parts, and of pyarrow writing the same batches as parts of as many rows; seconds to go on."""
    schema = RowSchema(DIM, "bundle", "[]", "f16")
    batches = synthetic(schema)
    size = sum(batch.nbytes for batch in batches) / 1e6
    folder = Path(tempfile.mkdtemp(prefix="cembed-"))
    try:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        with Parts(open_store(folder / "ours.parquet"), schema) as parts:
            for batch in batches:
                parts.add_batch(batch)
        ours = time.perf_counter() - start
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        start = time.perf_counter()
        (folder / "theirs").mkdir()
        for i in range(0, len(batches), 2):
            path = folder / "theirs" / f"{i}.parquet"
            with open(path, "wb") as file, parquet.ParquetWriter(file, schema.arrow, compression="zstd") as writer:
                for batch in batches[i : i + 2]:
                    writer.write_batch(batch)
                file.flush()
                os.fsync(file.fileno())
        theirs = time.perf_counter() - start
        start = time.perf_counter()
        with Parts(open_store(folder / "ours.parquet"), schema) as parts:
            known = len(parts.done)
        again = time.perf_counter() - start
        assert known == ROWS
    finally:
        shutil.rmtree(folder)
    rates = {"rows MB/s": size / ours, "pyarrow MB/s": size / theirs, "of pyarrow": theirs / ours}
    return {**rates, "resume s": again, "memory MiB": memory, "MB": size}


def main(
    pages: Annotated[str, typer.Argument(help="Folder of pictures.")],
    more: Annotated[str | None, typer.Argument(hidden=True)] = None,
    bundle: Annotated[Path, typer.Option(help="Made by `cembed export`.")] = ROOT / "samples" / "bundle",
    count: Annotated[int, typer.Option(min=10, help="Pages of a run.")] = 600,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are of so many.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write all numbers.")] = None,
) -> None:
    """Measure the ways to many pages."""
    if pages == "child":
        child(str(more))
        return
    files = sorted(str(path.absolute()) for path in Path(pages).iterdir() if path.is_file())[:count]
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for side in ("plain, 2 threads", "plain, 1 thread", "1 actor", "2 actors"):
            found.setdefault(side, []).append(in_a_process(side, bundle.absolute(), files))
    table = Table("side", "pages a second", "of plain, 2 threads", "until the first, s")
    rates = {side: median(row["pages a second"] for row in rows) for side, rows in found.items()}
    for side, rows in found.items():
        first = median(row["first s"] for row in rows)
        table.add_row(side, f"{rates[side]:.1f}", f"{rates[side] / rates['plain, 2 threads']:.3f}", f"{first:.1f}")
    Console().print(table)
    rows_written = sink()
    Console().print({key: round(value, 3) for key, value in rows_written.items()})
    if out is not None:
        result = {"machine": hardware(1) | {"load": os.getloadavg()}, "sides": found, "sink": rows_written}
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

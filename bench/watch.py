"""Days of `cembed watch` in minutes: files come, are moved and deleted, and memory and descriptors are counted.

    python bench/watch.py --files 20000 --json bench/results/watch-2-cores-avx512.json
    python bench/watch.py --files 20000 --keep

A folder has always the same number of files once it has filled: old ones are deleted as new ones come, and the index is
a mirror of it. So what grows does so with what is gone, and is a leak, or waits for a compaction. With `--keep` nothing
is deleted, and what grows is what a page costs. "warm" and "end" are medians of the second and of the last tenth of the
files; "rss" is of the watcher and its children, "anonymous" what of it is not in files.
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from pages import hardware
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.intake.ledger import Ledger, ledger_path
from cembed.runtime.intake.survey import SETTLED

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((96, 64), (64, 96), (128, 96))
BURST, BACKLOG, EVERY = 40, 150, 2.0
"""Files that come at once, files that may wait, and seconds between samples."""
TENTH = 0.1
MAXIMUM = 0.02
"""The growth that is allowed, as a share of the memory after the warm-up."""


@dataclass(frozen=True)
class Sample:
    """One moment: `files` have come, bytes of memory, and counts of the watcher and its children."""

    seconds: float
    files: int
    rss: int
    anonymous: int
    descriptors: int
    threads: int
    processes: int
    ledger: int
    index: int


def family(pid: int) -> list[int]:
    """A process and all below it."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        children += map(int, task.read_text().split())
    return [pid, *(found for child in children for found in family(child))]


def bytes_of(pid: int, field_: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field_}:"):
            return int(line.split()[1]) << 10
    return 0


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@dataclass
class Scans:
    """The folder: `live` are the paths of its files, the oldest first, with their pages; 0 for a broken one."""

    root: Path
    most: int | None
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    count: int = 0
    pages: int = 0
    live: dict[str, int] = field(default_factory=dict)
    recent: deque[tuple[bytes, str, int]] = field(default_factory=lambda: deque(maxlen=20))

    def __post_init__(self) -> None:
        for name in ("in", "sorted"):
            (self.root / name).mkdir(parents=True)

    def add(self) -> None:
        """One page, mostly; three, those of another file, or none."""
        self.count += 1
        kind = self.rng.choices(("page", "pages", "copy", "broken"), (90, 4, 4, 2))[0]
        if kind == "copy" and self.recent:
            data, suffix, pages = self.rng.choice(self.recent)
        elif kind == "broken":
            data, suffix, pages = self.rng.randbytes(500), ".png", 0
        else:
            data, suffix, pages = self._draw(3 if kind == "pages" else 1)
            self.recent.append((data, suffix, pages))
        path = self.root / "in" / f"scan {self.count:06}{suffix}"
        path.with_name(".part").write_bytes(data)
        path.with_name(".part").rename(path)
        self.live[str(path)] = pages
        self.pages += pages

    def _draw(self, pages: int) -> tuple[bytes, str, int]:
        images = [Image.new("RGB", self.rng.choice(SIZES), "white") for _ in range(pages)]
        for number, image in enumerate(images):
            ImageDraw.Draw(image).text((4, 16), f"No. {self.count}.{number}\n{self.rng.random():.9f}", fill="black")
        buffer, suffix = io.BytesIO(), ".png" if pages == 1 else ".pdf"
        images[0].save(buffer, suffix[1:], **({"save_all": True, "append_images": images[1:]} if pages > 1 else {}))
        return buffer.getvalue(), suffix, pages

    def thin_out(self, settled: set[str]) -> None:
        """Deletes the oldest files, and moves some of the others; only those that were looked at."""
        while self.most is not None and len(self.live) > self.most:
            path = next(iter(self.live))
            if path not in settled:
                return
            os.unlink(path)
            del self.live[path]
        for path in [path for path in self.live if path in settled and "/in/" in path and self.rng.random() < 0.005]:
            to = str(self.root / "sorted" / Path(path).name)
            os.rename(path, to)
            self.live[to] = self.live.pop(path)

    def ids(self) -> set[str]:
        return {f"{path}#{number}" for path, pages in self.live.items() for number in range(1, pages + 1)}


@contextmanager
def watching(scans: Scans, index: Path, options: list[str]) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "cembed", "watch", str(scans.root), "--index", str(index), *options]
    with open(index.with_name("log"), "w") as log, subprocess.Popen(command, stderr=log, text=True) as process:
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()


def settled_files(index: Path) -> set[str]:
    try:
        with Ledger.beside(index, write=False) as ledger:
            return {entry.path for entry in ledger.entries(*sorted(SETTLED))}
    except CembedError:  # not made yet
        return set()


def sample(pid: int, scans: Scans, index: Path, start: float) -> Sample:
    processes = family(pid)
    return Sample(
        seconds=time.perf_counter() - start,
        files=scans.count,
        rss=sum(bytes_of(process, "VmRSS") for process in processes),
        anonymous=sum(bytes_of(process, "RssAnon") for process in processes),
        descriptors=sum(len(os.listdir(f"/proc/{process}/fd")) for process in processes),
        threads=sum(len(os.listdir(f"/proc/{process}/task")) for process in processes),
        processes=len(processes),
        ledger=ledger_path(index).stat().st_size,
        index=folder_bytes(index),
    )


def feed(process: "subprocess.Popen[str]", scans: Scans, index: Path, files: int) -> Iterator[Sample]:
    """Files come as fast as they are taken; ends when all of them are."""
    start = last = time.perf_counter()
    while True:
        if process.poll() is not None:
            raise SystemExit(f"the watcher has ended: {index.with_name('log').read_text()[-2000:]}")
        settled = settled_files(index)
        waiting = len(scans.live.keys() - settled)
        for _ in range(min(BURST if waiting < BACKLOG else 0, files - scans.count)):
            scans.add()
        scans.thin_out(settled)
        if settled and time.perf_counter() > last + EVERY:
            last = time.perf_counter()
            yield sample(process.pid, scans, index, start)
        if scans.count == files and settled == scans.live.keys():
            return
        time.sleep(0.3)


def compared(samples: list[Sample], files: int) -> dict[str, dict[str, float]]:
    """Each number after the warm-up and at the end, and the growth in between."""
    parts = [[s for s in samples if low <= s.files / files <= low + TENTH] or samples for low in (TENTH, 1 - TENTH)]
    found = {}
    for name in ("rss", "anonymous", "descriptors", "threads", "processes", "ledger", "index"):
        before, after = (median(getattr(s, name) for s in part) for part in parts)
        found[name] = {"warm": before, "end": after, "growth": after / before - 1}
    return found


def measure(bundle: Path, files: int, live: int | None, options: list[str], place: Path) -> dict[str, Any]:
    scans, index, samples = Scans(place / "scans", live), place / "index", list[Sample]()
    with watching(scans, index, [*options, "--bundle", str(bundle)]) as process:
        for found in feed(process, scans, index, files):
            samples.append(found)
            if len(samples) % 15 == 1:
                print(f"{found.files} files, {found.rss >> 20} MiB, {found.descriptors} descriptors", file=sys.stderr)
    opened = Index.open(index)
    ids, stats = {page.id for page in opened.find()}, opened.stats()
    return {
        "files": files,
        "pages": scans.pages,
        "files a second": files / samples[-1].seconds,
        "live files": len(scans.live),
        "pages found": len(ids),
        "pages expected": len(scans.ids()),
        "as expected": ids == scans.ids(),
        "pages removed, but in the files of the index": stats.removed,
        "numbers": compared(samples, files),
        "samples": [asdict(s) for s in samples[:: max(1, len(samples) // 100)]],
    }


def report(result: dict[str, Any]) -> None:
    table = Table("what", "warm", "end", "growth", title=f"{result['files']} files, {result['pages']} pages")
    for name, row in result["numbers"].items():
        table.add_row(name, f"{row['warm']:,.0f}", f"{row['end']:,.0f}", f"{row['growth']:+.1%}")
    console = Console(width=120, highlight=False)
    console.print(table)
    told = {name: value for name, value in result.items() if isinstance(value, (int, float))}
    console.print(", ".join(f"{name} {value:.4g}" for name, value in told.items()))
    growth = result["numbers"]["rss"]["growth"]
    console.print(f"growth of RSS: {growth:+.2%} (needed: at most {MAXIMUM:.0%})")


def main(
    bundle: Annotated[Path, typer.Option(help="Made by `cembed export`.")] = ROOT / "samples" / "bundle",
    files: Annotated[int, typer.Option(min=100)] = 20_000,
    live: Annotated[int, typer.Option(min=10, help="Files that are in the folder at a time.")] = 500,
    keep: Annotated[bool, typer.Option("--keep", help="Delete nothing.")] = False,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Writes every number to this file.")] = None,
) -> None:
    options = ["--threads", str(threads), "--stable-for", "0.3", "--every", "0.5", *([] if keep else ["--mirror"])]
    with tempfile.TemporaryDirectory(prefix="cembed-watch-") as place:
        result = measure(bundle, files, None if keep else live, options, Path(place))
    report(result)
    if json_path is not None:
        machine = hardware(threads) | {"load": os.getloadavg()}
        json_path.write_text(json.dumps({"hardware": machine, "keep": keep, **result}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

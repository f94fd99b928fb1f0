"""Many embeds at once for long, and a server whose processes, disk and memory fail meanwhile.

    python tests/crash/soak.py embeds BUNDLE --count 50000
    python tests/crash/soak.py server BUNDLE --seconds 600 --disk FOLDER

`embeds`: threads share one Embedder, with a budget drawn for each call, and a decoding process that is killed now and
then. Each answer has to be the one that was given alone, bit by bit; memory, descriptors and children stay.

`server`: clients add pages, embed and search, while workers and decoding processes are killed, workers meet a memory
ceiling, and the disk fills up: FOLDER is a small file system of its own, as `mount -t tmpfs -o size=16m none FOLDER`
makes one. Nothing that was answered may be wrong or lost: each page that was said to be added is found after a restart,
with the vectors that it has alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))
from serving import Server

from cembed.runtime import Embedder
from cembed.runtime.embed.embedder import Budget, Decode
from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.pages.documents import Page, PageReader

THREADS = 16
TENTHS = 10
MAX_GROWTH = 0.02
TEXTS = ("warranty period", "invoice of May", "who signed it?", "a longer question about the third table of page two")
SIZES = ((64, 64), (96, 64), (64, 128), (140, 112))
REFUSALS = (422, 429, 500, 503, 504)
"""What a server may say of a request while something fails; of 422 only what memory and processes are named for."""
LIMITS = {"answer": 20.0}
"""Seconds: a worker whose threads find no memory hangs."""


def picture(number: int) -> bytes:
    """A PNG file of a page that no other number has."""
    noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(SIZES[number % len(SIZES)]).save(file, "PNG")
    return file.getvalue()


class Answers:
    """What a bundle gives when nothing else is under way, computed when it is first asked for."""

    def __init__(self, bundle: Path) -> None:
        self._embedder = Embedder.load(bundle)
        self._lock, self._known = threading.Lock(), dict[tuple[int | str, Budget], NDArray[np.float32]]()

    def get(self, what: int | str, budget: Budget = Budget()) -> NDArray[np.float32]:  # noqa: B008, as it is frozen
        with self._lock:
            if (what, budget) not in self._known:
                embed = self._embedder.embed_query if isinstance(what, str) else self._embedder.embed_image
                given: Any = what if isinstance(what, str) else pixels(picture(what))
                self._known[what, budget] = embed(given, budget)
            return self._known[what, budget]


def pixels(content: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(content)))


def budgets(embedder: Embedder, side: str) -> list[Budget]:
    """Everything that may be asked of a side of the bundle."""
    most = getattr(embedder.manifest, side).num_vectors
    if most is None:
        return [Budget(dim=dim) for dim in (None, embedder.dim // 2)]
    numbers, decodes = (None, *range(1, most + 1)), get_args(Decode)
    found = [Budget(n, dim, how) for n in numbers for dim in (None, embedder.dim // 2) for how in (None, *decodes)]
    return [budget for budget in found if _may(embedder, side, budget)]


def _may(embedder: Embedder, side: str, budget: Budget) -> bool:
    try:
        embedder.check(getattr(embedder.manifest, side), budget)
    except CembedError:
        return False
    return True


# ---- one process, many threads


@dataclass
class Measured:
    rss: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    children: list[int] = field(default_factory=list)

    def take(self) -> None:
        process = psutil.Process()
        self.rss.append(process.memory_info().rss)
        self.descriptors.append(process.num_fds())
        self.children.append(len(process.children(recursive=True)))


class LockedReader:
    """One PageReader for all threads, whose process is killed at random; what was lost is read again."""

    def __init__(self, reader: PageReader, folder: Path, rng: random.Random) -> None:
        self._reader, self._rng, self._lock, self.lost = reader, rng, threading.Lock(), 0
        self._paths = [folder / f"{number}.png" for number in range(len(SIZES))]
        for number, path in enumerate(self._paths):
            path.write_bytes(picture(number))

    def page(self, number: int) -> NDArray[np.uint8]:
        with self._lock:
            if self._rng.random() < 0.002:
                for child in psutil.Process().children():
                    child.kill()
            while True:
                page, _ = self._reader.page(self._paths[number], 1)
                if isinstance(page, Page):
                    return page.image
                assert "died" in page.reason, page.reason
                self.lost += 1


def embeds(bundle: Path, count: int, seed: int) -> Measured:
    """Raises AssertionError: an answer is another one than it was alone, or something grows."""
    embedder, answers, measured = Embedder.load(bundle), Answers(bundle), Measured()
    asked: list[tuple[int | str, Budget]] = [
        (number, budget) for number in range(len(SIZES)) for budget in budgets(embedder, "document")
    ]
    asked += [(text, budget) for text in TEXTS for budget in budgets(embedder, "query")]
    for what, budget in asked:
        answers.get(what, budget)
    with tempfile.TemporaryDirectory() as folder, PageReader() as opened, ThreadPoolExecutor(THREADS) as pool:
        reader = LockedReader(opened, Path(folder), random.Random(seed))
        reader.page(0)

        def embed(number: int) -> None:
            what, budget = random.Random(seed + number).choice(asked)
            if isinstance(what, str):
                vectors = embedder.embed_query(what, budget)
            else:
                vectors = embedder.embed_image(reader.page(what), budget)
            np.testing.assert_array_equal(vectors, answers.get(what, budget), err_msg=f"{what} {budget}")

        for tenth in range(TENTHS):
            for _ in pool.map(embed, range(tenth * count // TENTHS, (tenth + 1) * count // TENTHS)):
                pass
            measured.take()
            print(f"{tenth + 1} of {TENTHS}: {measured.rss[-1]:,} bytes, {measured.descriptors[-1]} descriptors, "
                  f"{measured.children[-1]} children, {reader.lost} pages read again", flush=True)  # fmt: skip
    assert len(set(measured.children)) == 1, measured.children
    assert max(measured.descriptors) <= measured.descriptors[0] + 1, measured.descriptors
    return measured


# ---- a server that everything befalls


class Disk:
    """A small file system, that can be filled."""

    def __init__(self, folder: Path) -> None:
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        with contextlib.suppress(OSError), open(self._ballast, "wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)


class Trouble:
    """Makes one at a time, and ends it."""

    def __init__(self, server: Server, disk: Disk | None, seed: int, ceilings: bool) -> None:
        self._process, self._disk, self._rng = psutil.Process(server.process.pid), disk, random.Random(seed)
        self._kinds = [self._kill_worker, self._kill_decoder]
        self._kinds += [self._limit_memory] * ceilings + [self._fill] * (disk is not None)
        self.made = Counter[str]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Trouble:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._rng.uniform(0.2, 2)):
            kind = self._rng.choice(self._kinds)
            with contextlib.suppress(psutil.Error, IndexError):  # it has just ended by itself
                kind()
                self.made[kind.__name__.strip("_")] += 1

    def _kill_worker(self) -> None:
        self._rng.choice(self._process.children()).kill()

    def _kill_decoder(self) -> None:
        self._rng.choice([child for worker in self._process.children() for child in worker.children()]).kill()

    def _limit_memory(self) -> None:
        # One that is starting would wait for ever for a thread that had no memory to begin.
        worker = self._rng.choice([worker for worker in self._process.children() if worker.children()])
        _, hard = worker.rlimit(psutil.RLIMIT_DATA)
        worker.rlimit(psutil.RLIMIT_DATA, (self._rng.choice((1 << 20, 200 << 20)), hard))
        self._ended.wait(self._rng.uniform(0.1, 1))
        worker.rlimit(psutil.RLIMIT_DATA, (hard, hard))

    def _fill(self) -> None:
        assert self._disk is not None
        self._disk.fill()
        self._ended.wait(self._rng.uniform(0.1, 1))
        self._disk.free()


class Clients:
    """Requests of all kinds; what was answered is compared, or noted in `added`."""

    def __init__(self, server: Server, answers: Answers, all_budgets: dict[str, list[Budget]]) -> None:
        self._server, self._answers, self._budgets = server, answers, all_budgets
        self._numbers = itertools.count(1000)
        self.added: dict[int, str] = {}
        self.told, self.reasons = Counter[str](), Counter[str]()
        self._lock = threading.Lock()

    def run(self, seed: int, until: Callable[[], bool]) -> None:
        rng = random.Random(seed)
        kinds = (self._add, self._embed, self._embed, self._search)
        while not until():
            kind = rng.choice(kinds)
            outcome = kind(rng)
            with self._lock:
                self.told[f"{kind.__name__.strip('_')}: {outcome}"] += 1

    def _post(self, path: str, body: Any) -> tuple[int, Any]:
        answer = self._server.post(path, body)
        if answer.status != 200:
            assert answer.status in REFUSALS, (path, answer)
            message = answer.message
            assert answer.status != 422 or "died" in message or "memory" in message, message
            with self._lock:
                self.reasons[f"{answer.status} {message}"] += 1
        return answer.status, answer

    def _add(self, rng: random.Random) -> int:
        number = next(self._numbers)
        status, answer = self._post(f"/pages?name={number}.png", picture(number))
        if status == 200 and answer.json["added"]:
            with self._lock:
                self.added[number] = answer.json["pages"][0]["id"]
        return status

    def _embed(self, rng: random.Random) -> int:
        what: int | str = rng.choice((rng.choice(TEXTS), rng.randrange(len(SIZES))))
        budget = rng.choice(
            [b for b in self._budgets["query" if isinstance(what, str) else "document"] if not b.decode]
        )
        asked = {"num_vectors": budget.num_vectors, "dim": budget.dim}
        path = "/embed?" + "&".join(f"{name}={value}" for name, value in asked.items() if value)
        status, answer = self._post(path, what if isinstance(what, str) else picture(what))
        if status == 200:
            expected = self._answers.get(what, budget)
            found = np.frombuffer(answer.body, "<f4").reshape(-1, int(answer.headers["cembed-dim"]))
            np.testing.assert_array_equal(found, expected, err_msg=f"{what} {budget}")
        return status

    def _search(self, rng: random.Random) -> int:
        status = self._server.get("/search?q=invoice&top=5").status
        assert status in (200, *REFUSALS), status
        return status


@contextlib.contextmanager
def place(disk: Path | None) -> Iterator[Path]:
    if disk is not None:
        yield disk
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def server(
    bundle: Path, seconds: float, disk: Path | None, seed: int, workers: int = 2, ceilings: bool = True
) -> Clients:
    """A worker that meets a ceiling of memory as it starts may hang for minutes, which short runs have no time for.

    Raises AssertionError: an answer is wrong, or a page that was added is not there or has other vectors."""
    answers = Answers(bundle)
    embedder = Embedder.load(bundle)
    both = {side: budgets(embedder, side) for side in ("query", "document")}
    with place(disk) as folder, tempfile.TemporaryDirectory() as logs:
        index, log = folder / "index", Path(logs) / "log"
        with Server(log, bundle, index=index, workers=workers, limits=LIMITS) as running:
            descriptors = psutil.Process(running.process.pid).num_fds()
            clients, end = Clients(running, answers, both), time.monotonic() + seconds
            with (
                Trouble(running, Disk(folder) if disk else None, seed, ceilings) as trouble,
                ThreadPoolExecutor(THREADS) as pool,
            ):
                try:
                    for _ in pool.map(lambda i: clients.run(seed + i, lambda: time.monotonic() > end), range(THREADS)):
                        pass
                except Exception:
                    print(notes(log))
                    raise
            until = time.monotonic() + 60
            while running.post("/embed", TEXTS[0]).status != 200:
                assert time.monotonic() < until, notes(log)
            assert psutil.Process(running.process.pid).num_fds() <= descriptors + 8  # connections that close
        print(
            json.dumps(
                {
                    "troubles": trouble.made,
                    "answers": clients.told,
                    "reasons": clients.reasons,
                    "added": len(clients.added),
                },
                indent=1,
            )
        )
        print(notes(log))
        check_added(index, clients.added, answers)
        if disk is not None:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return clients


def notes(log: Path) -> str:
    """What the server has written beside a line for each request."""
    return "\n".join(line for line in log.read_text().splitlines() if not line.startswith("{"))


def check_added(index: Path, added: dict[int, str], answers: Answers) -> None:
    with Index.open(index) as opened:
        there = {Path(page.source).stem: page for page in opened.find()}
        missing = [number for number in added if str(number) not in there]
        assert not missing, f"{len(missing)} pages that were added are not there: {missing[:9]}"
        for number in added:
            page = there[str(number)]
            assert str(page.serial) == added[number]
            expected = answers.get(number)
            np.testing.assert_allclose(opened.vectors(page.id), expected, atol=2e-3, err_msg=str(number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("embeds", "server"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--disk", type=Path, help="a small file system, which is emptied")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.kind == "embeds":
        rss = embeds(given.bundle, given.count, given.seed).rss
        growth = rss[-1] / rss[0] - 1
        print(f"{given.count} embeds, {THREADS} threads: memory {growth:+.1%}")
        sys.exit(growth > MAX_GROWTH)
    server(given.bundle, given.seconds, given.disk, given.seed)
    print("nothing was lost")


if __name__ == "__main__":
    main()

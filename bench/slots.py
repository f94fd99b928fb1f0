"""What slots cost: single pass against budget, the loop's steps against memory bandwidth, capacity and the reference.

    python bench/slots.py --threads 2 --rounds 5

A step reads every weight once, so that memory bandwidth limits it: measured here, in the same process and between the
steps, as the fastest way numpy has to read a buffer far larger than the caches. Bundle and checkpoint are those of
bench/pages.py, and so is the reference: transformers with one decode step per slot, in a process of its own.
"""

import os
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pages
import typer
from numpy.typing import NDArray
from pages import NUM_VECTORS, PAUSE, Child, Numbers, ReferenceSide, RuntimeSide
from PIL import Image
from rich.console import Console
from rich.table import Table

from cembed.options import spread

BUDGETS = (1, 8, NUM_VECTORS)
CAPACITIES = (256, 512, 1024, 2048, 4096)
STEPS = 16  # timed one by one, for each capacity and round
BUFFER = 1 << 30  # bytes
QUERY = "invoice total in EUR, VAT included, " * 4
seconds_of = partial(timeit.timeit, number=1)


def draw_page() -> Image.Image:  # takes all of 768 visual tokens, which are 28 pixels wide
    return pages.draw_page().resize((1344, 1792))


class SlotSide(RuntimeSide):
    def __init__(self, bundle: Path, threads: int) -> None:
        super().__init__(bundle, threads)
        self.image, self.pool = draw_page(), ThreadPoolExecutor(threads)
        self.buffer = np.ones(BUFFER // 4, np.float32)
        self.parts = np.array_split(self.buffer, threads)
        self.length = len(self.embedder.inputs.query(QUERY))
        self.states = {size: self.embedder.start_query(QUERY, size - self.length + 1) for size in CAPACITIES}

    def bandwidth(self) -> dict[str, float]:
        """GB/s of reading, by several means; `dot` is spread over threads by OpenBLAS itself."""
        means: dict[str, Callable[[], Any]] = {
            "sum": lambda: list(self.pool.map(np.add.reduce, self.parts)),
            "max": lambda: list(self.pool.map(np.maximum.reduce, self.parts)),
            "dot": lambda: np.dot(self.buffer, self.buffer),
        }
        return {name: BUFFER / 1e9 / min(seconds_of(read) for _ in range(3)) for name, read in means.items()}

    def rewind(self, state: Any) -> None:
        """Forgets all slots; the first vector is the prompt's."""
        state.cache.length -= len(state.states) - 1
        del state.states[1:]

    def steps(self, state: Any, count: int = STEPS) -> list[float]:
        """Seconds of each of `count` steps right after the prompt, and of one before them, which is left out."""
        self.rewind(state)
        state.extend(2)
        return [seconds_of(partial(state.extend, number)) for number in range(3, 3 + count)]

    def flat(self, number: int) -> Numbers:
        """Step times at each capacity, and bandwidth before and after; another capacity begins in each round."""
        time.sleep(PAUSE)
        turn, before = number % len(CAPACITIES), self.bandwidth()
        steps = {size: self.steps(self.states[size]) for size in (*CAPACITIES[turn:], *CAPACITIES[:turn])}
        time.sleep(PAUSE)
        return {"steps": steps, "bandwidth": [before, self.bandwidth()]}

    def loop(self) -> tuple[Numbers, NDArray[np.float32]]:
        """A page through the loop: its start, a budget, twice that budget, and that again from the prompt on."""
        start = time.perf_counter()
        state = self.embedder.start(self.image, 2 * NUM_VECTORS)
        seconds = {"start": time.perf_counter() - start}
        seconds["first"] = seconds_of(lambda: state.extend(NUM_VECTORS))
        seconds["second"] = seconds_of(lambda: state.extend(2 * NUM_VECTORS))
        vectors = state.extend(2 * NUM_VECTORS)
        self.rewind(state)
        seconds["both"] = seconds_of(lambda: state.extend(2 * NUM_VECTORS))
        again = float(np.abs(state.extend(2 * NUM_VECTORS) - vectors).max())
        numbers = seconds | {"again": again, "steps": self.steps(state, NUM_VECTORS)}
        state.close()
        return numbers, vectors[:NUM_VECTORS]

    def growth(self) -> Numbers:
        """MiB that 64 steps at the largest capacity add, at the end and at the most, beside the cache's own."""
        state = self.states[CAPACITIES[-1]]
        self.steps(state, 64)  # the cache's pages are now there
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        places, before = [buffer.ctypes.data for buffer in state.cache.buffers.values()], pages.memory()
        self.steps(state, 64)
        peak, end, _ = (value - before[name] for name, value in pages.memory().items())
        moved = places != [buffer.ctypes.data for buffer in state.cache.buffers.values()]
        return {"cache": state.nbytes / 2**20, "end": end, "peak": peak, "buffers moved": moved}

    def sizes(self) -> Numbers:
        """Bytes that a step reads: all weights, and keys and values of each filled position; the query's length."""
        folder, graph = self.embedder.bundle.graph_path("text_step").parent, self.embedder.manifest.graphs["text_step"]
        sizes = {"weights": sum((folder / name).stat().st_size for name in graph.data), "query": self.length}
        return sizes | {"position": self.states[256].nbytes // 256}


class SlotReference(ReferenceSide):
    def __init__(self, checkpoint: Path, threads: int) -> None:
        super().__init__(checkpoint, threads)
        self.image = draw_page()


def busy_seconds() -> tuple[float, float]:
    """CPU seconds so far: of the whole machine, and of this process and its children that have ended."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def compare(vectors: dict[str, NDArray[np.float32]]) -> dict[str, float]:
    theirs = vectors.pop("reference")
    off = {n: float(np.abs(v - theirs).max()) if v.shape == theirs.shape else np.inf for n, v in vectors.items()}
    if not max(off.values()) <= pages.TOLERANCE:
        raise SystemExit(f"the sides do not compute the same: their vectors differ by {off}")
    return off


def measure(checkpoint: Path, bundle: Path, threads: int, rounds: int) -> Numbers:
    """Everything takes turns, after a page each to warm up and to compare the vectors."""
    start, (busy, own) = time.perf_counter(), busy_seconds()
    reference, runtime = Child(SlotReference, checkpoint, threads), Child(SlotSide, bundle, threads)
    vectors = {"reference": reference.call("page")[1]}
    vectors |= {"single pass": runtime.call("page")[1], "loop": runtime.call("loop")[1]}
    result: Numbers = {"difference": compare(vectors), "lengths": runtime.call("lengths"), **runtime.call("sizes")}
    result |= {"pages": {budget: [] for budget in BUDGETS}, "loop": [], "flat": [], "reference": []}
    for number in range(rounds):
        result["reference"].append(reference.call("page")[0])
        time.sleep(PAUSE)
        for budget in BUDGETS[:: 1 - 2 * (number % 2)]:
            result["pages"][budget].append(runtime.call("page", budget)[0])
        result["loop"].append(runtime.call("loop")[0])
        result["flat"].append(runtime.call("flat", number))
    result["growth"] = runtime.call("growth")
    reference.shutdown()
    runtime.shutdown()
    everything, ours = busy_seconds()
    result["others"] = (everything - busy - ours + own) / (time.perf_counter() - start)
    return result | {"summary": summarise(result)}


def summarise(result: Numbers) -> Numbers:
    """Medians, in seconds, GB/s and ratios."""
    passes = {budget: {p: median(row[p] for row in rows) for p in rows[0]} for budget, rows in result["pages"].items()}
    steps = {size: median(t for row in result["flat"] for t in row["steps"][size]) for size in CAPACITIES}
    readings = [reading for row in result["flat"] for reading in row["bandwidth"]]
    rates = {name: median(reading[name] for reading in readings) for name in readings[0]}
    way = max(rates, key=lambda name: rates[name])
    loop = {part: median(row[part] for row in result["loop"]) for part in ("start", "first", "second", "both")}
    loop["step"] = median(seconds for row in result["loop"] for seconds in row["steps"])
    theirs = median(row["steps"] for row in result["reference"]) / (NUM_VECTORS - 1)
    page = result["lengths"]["positions"] - NUM_VECTORS + 1  # without the slots
    ways = ("query", steps[CAPACITIES[0]], result["query"]), ("page", loop["step"], page)
    rows = [share_row(*prompt, result, rates[way]) for prompt in ways]
    return {"pages": passes, "steps": steps, "rates": rates, "way": way, "loop": loop, "theirs": theirs, "rows": rows}


def share_row(prompt: str, seconds: float, length: int, result: Numbers, rate: float) -> Numbers:
    cache = (length + STEPS // 2) * result["position"]
    row = {"prompt": prompt, "positions": length, "step ms": 1e3 * seconds, "weights MB": result["weights"] / 1e6}
    share = result["weights"] / 1e9 / seconds / rate
    row |= {"cache MB": cache / 1e6, "weights GB/s": share * rate, "measured GB/s": rate, "share": share}
    return row | {"share with cache": share * (1 + cache / result["weights"])}


def judge(result: Numbers) -> list[tuple[str, str, float, bool]]:
    """What is needed, what was got, and whether that is enough."""
    summary, growth = result["summary"], result["growth"]
    steps, loop = summary["steps"], summary["loop"]
    second, more = median(row["second"] / sum(row["steps"]) for row in result["loop"]), steps[4096] / steps[256] - 1
    mib, again = max(growth["end"], growth["peak"]) / growth["cache"], max(row["again"] for row in result["loop"])
    scratch = loop["second"] / (loop["start"] + loop["both"])
    share, turns = summary["rows"][0]["share"], list(zip(result["pages"][NUM_VECTORS], result["pages"][1], strict=True))
    text, page = (median(most[part] / one[part] for most, one in turns) for part in ("text", "page"))
    return [
        (f"single pass, {NUM_VECTORS} vectors / 1 vector: text graph", "at most 1.05", text, text <= 1.05),
        (f"single pass, {NUM_VECTORS} vectors / 1 vector: whole page", "at most 1.05", page, page <= 1.05),
        ("step of a query: share of memory bandwidth", "at least 0.70", share, share >= 0.7),
        ("step at capacity 4096: more than at 256", "at most 0.10", more, more <= 0.1),
        ("memory 64 steps add / cache", "at most 0.10", mib, mib <= 0.1 and not growth["buffers moved"]),
        ("second extend / its 32 steps", "at most 1.10", second, second <= 1.1),
        ("second extend / start and extend from scratch", "below 1", scratch, scratch < 1),
        ("vectors after a rewind: largest difference", "0", again, again == 0),
        ("reference step / step, page", "for comparison", summary["theirs"] / loop["step"], True),
    ]


def show(console: Console, title: str, rows: list[Numbers]) -> None:
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def report(result: Numbers) -> None:
    console, summary = Console(width=160, highlight=False), result["summary"]
    console.print(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))
    off = ", ".join(f"{name} {value:.1e}" for name, value in result["difference"].items())
    console.print(f"page: {result['lengths']['tokens']} visual tokens; vectors against the reference: off by {off}")
    console.print(f"other processes took {result['others']:.2f} cores meanwhile: only near 0 do the times count")
    rates = ", ".join(f"{name} {rate:.1f}" for name, rate in summary["rates"].items())
    console.print(f"reading {BUFFER >> 20} MiB with numpy, GB/s: {rates}; taken: {summary['way']}")
    show(console, "single pass, seconds", [{"vectors": n, **row} for n, row in summary["pages"].items()])
    show(console, "step of the loop", summary["rows"])
    show(console, "step at capacity, ms", [{str(n): 1e3 * s for n, s in summary["steps"].items()}])
    show(console, "page in the loop, s: start, extend(32), then extend(64); both at once", [summary["loop"]])
    show(console, "memory, MiB", [result["growth"]])
    console.print(f"reference step: {1e3 * summary['theirs']:.3f} ms, median of {NUM_VECTORS - 1} steps a page")
    verdicts = Table("what", "needed", "got", "verdict")
    for what, needed, got, enough in judge(result):
        verdicts.add_row(what, needed, f"{got:.3f}", "met" if enough else "MISSED")
    console.print(verdicts)


@spread
def main(run: pages.Run) -> None:
    """Time slots: a single pass at several budgets, the loop's steps, and the reference's."""
    run.measure(measure, report)


if __name__ == "__main__":
    typer.run(main)

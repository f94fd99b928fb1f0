"""maxsim() against its peers, in one run: milliseconds to score all pages, and how near the results are.

    python bench/maxsim.py --threads 1,2 --rounds 15

Shapes: a 32-vector model of dim 128, one of dim 2048, ColPali; fifty pages, and one. cembed is timed through the call
that users make, with a list of arrays, with one array and with stored pages; beside it what the library alone takes,
when it is told where the list's arrays lie. numpy is the fastest of several ways to write it, for a list and for one
array. Rounds are interleaved: each contender once, another first in each round. Every number of threads is a process of
its own that sees as many cores. Results are compared with float64 numpy. The roofline is the larger of the
multiplications at the speed of the machine and the bytes at its bandwidth, both measured between the rounds; g++ is
needed for it. Peers that are not installed are skipped: pip install torch maxsim-cpu numkong qdrant-edge-py.
OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE, where they are set, may slow numpy down: unset them.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cembed.runtime.scoring.arrays import Operand, described
from cembed.runtime.scoring.kernels import kernel_sets, load, top
from cembed.runtime.scoring.storage import STORAGE
from cembed.runtime.scoring.timing import CACHE_ROWS, Case, Floats, Run, Shape, fastest, numpy_ways, our_way, time_round

Numbers = dict[str, Any]
EXACT = ("numpy array", "torch einsum", "maxsim-cpu", "qdrant-edge")
ERROR = 1e-5
RECALL = 0.99
ROOFLINE = 0.75


class SkipError(Exception):
    """Why a peer cannot take part."""


SHAPES = {
    "a": Shape(16, 128, 10_000, 32),
    "b": Shape(16, 2048, 2_000, 32),
    "c": Shape(20, 128, 1_000, 1030),
    "d": Shape(16, 2048, 50, 32),
    "e": Shape(16, 2048, 1, 32),
}


@dataclass(frozen=True)
class Goals:
    """How many times numpy's speed a list and an array are to have, which share of the roofline, and how many
    milliseconds a list may take beside the library's."""

    numpy: float | None = None
    roofline: float | None = None
    overhead_ms: float | None = None


GOALS = {
    "a": Goals(1.8, ROOFLINE),
    "b": Goals(1.4, ROOFLINE),
    "c": Goals(2.2, ROOFLINE),
    "d": Goals(1.5),
    "e": Goals(overhead_ms=0.020),
}


def exact_scores(case: Case) -> NDArray[np.float64]:
    """The definition in float64, some pages at a time."""
    query, step = case.query.astype(np.float64), max(1, CACHE_ROWS // case.shape.rows)
    parts = [case.documents[first : first + step].astype(np.float64) for first in range(0, case.shape.pages, step)]
    return np.concatenate([(part @ query.T).max(axis=1).sum(axis=1) for part in parts])


# Contenders: each makes ready what it needs, and returns what is timed ------------------------------------------------


def ours_as_list(case: Case, threads: int) -> Run:
    return our_way(case.query, separate(case), threads)


def ours_as_array(case: Case, threads: int) -> Run:
    return our_way(case.query, case.documents, threads)


def ours_stored(case: Case, threads: int, storage: str) -> Run:
    return our_way(case.query, case.stored(storage), threads)


def library_alone(case: Case, threads: int) -> Run:
    if (library := load()) is None:
        raise SkipError("not built")
    pages, scores = separate(case), np.empty(case.shape.pages, np.float32)
    query = described(library, Operand("query", [case.query], None), case.shape.dim)
    documents = described(library, Operand("document", pages, None), case.shape.dim)

    def run() -> Floats:
        sides = query.address, query.count, case.shape.dim, documents.address, documents.count
        assert library.maxsim_arrays(*sides, threads, scores.ctypes.data) == len(pages)
        return scores

    return run


@cache
def separate(case: Case) -> list[Floats]:
    """Each page in memory of its own."""
    return [page.copy() for page in case.documents]


def numpy_list_ways(case: Case) -> list[Run]:
    query, pages = case.query, separate(case)
    starts = np.arange(len(pages)) * case.shape.rows
    return [
        lambda: np.array([(query @ page.T).max(axis=1).sum() for page in pages]),
        lambda: np.array([(page @ query.T).max(axis=0).sum() for page in pages]),
        lambda: np.maximum.reduceat(query @ np.concatenate(pages).T, starts, axis=1).sum(axis=0),
        lambda: np.maximum.reduceat(np.concatenate(pages) @ query.T, starts, axis=0).sum(axis=1),
    ]


def torch_way(case: Case, threads: int) -> Run:
    """As colpali-engine scores."""
    torch = needed("torch")
    torch.set_num_threads(threads)
    query, documents = torch.from_numpy(case.query)[None], torch.from_numpy(case.documents)

    def run() -> Floats:
        scores: Floats = torch.einsum("bnd,csd->bcns", query, documents).max(dim=3)[0].sum(dim=2)[0].numpy()
        return scores

    return run


def maxsim_cpu_way(case: Case, threads: int) -> Run:
    library = needed("maxsim_cpu")
    rows, dim = case.shape.rows, case.shape.dim
    code = f"import numpy, maxsim_cpu; d = numpy.ones((4, {rows}, {dim}), 'f4'); maxsim_cpu.maxsim_scores(d[0], d)"
    if status := subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode:
        raise SkipError(f"crashes at this shape (exit status {status})")
    run: Run = partial(library.maxsim_scores, case.query, case.documents)
    return run


def numkong_way(case: Case, threads: int) -> Run:
    library = needed("numkong")
    query, pages = library.maxsim_pack(case.query), [library.maxsim_pack(page) for page in case.documents]
    distance = library.maxsim_packed
    shares = [pages[len(pages) * t // threads : len(pages) * (t + 1) // threads] for t in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def part(share: list[Any]) -> list[float]:
        return [distance(query, page) for page in share]

    def run() -> Floats:
        """A sum of angular distances, 1 - cosine, of each query vector."""
        parts = [part(shares[0])] if threads == 1 else pool.map(part, shares)
        return len(case.query) - np.concatenate([np.array(found) for found in parts])

    return run


def qdrant_way(case: Case, threads: int) -> Run:
    edge = needed("qdrant_edge")
    multi = edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)
    vectors = edge.EdgeVectorParams(case.shape.dim, edge.Distance.Dot, multivector_config=multi)
    optimizers = edge.EdgeOptimizersConfig(default_segment_number=threads)
    config = edge.EdgeConfig({"": vectors}, max_search_threads=threads, optimizers=optimizers, wal_enabled=False)
    folder = tempfile.mkdtemp()
    shard = edge.EdgeShard.create(folder, config)
    step = max(1, CACHE_ROWS // case.shape.rows // 8)
    for first in range(0, case.shape.pages, step):
        points = [
            edge.Point(first + i, {"": page.tolist()}, {})
            for i, page in enumerate(case.documents[first : first + step])
        ]
        shard.update(edge.UpdateOperation.upsert_points(points))
    nearest, exact = edge.Query.Nearest(case.query.tolist()), edge.SearchParams(exact=True)

    def run() -> Floats:
        """The best ten only: other pages count as not found."""
        scores = np.full(case.shape.pages, np.nan)
        for point in shard.query(edge.QueryRequest(limit=10, query=nearest, params=exact)):
            scores[point.id] = point.score
        return scores

    return run


def needed(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise SkipError(f"not installed ({error})") from error


CONTENDERS: Mapping[str, Callable[[Case, int], Run]] = {
    "cembed list": ours_as_list,
    "cembed array": ours_as_array,
    **{f"cembed {name}": partial(ours_stored, storage=name) for name in STORAGE},
    "library alone": library_alone,
    "numpy list": lambda case, threads: fastest(numpy_list_ways(case)),
    "numpy array": lambda case, threads: fastest(numpy_ways(case)),
    "torch einsum": torch_way,
    "maxsim-cpu": maxsim_cpu_way,
    "NumKong": numkong_way,
    "qdrant-edge": qdrant_way,
}


# The machine ----------------------------------------------------------------------------------------------------------


class Machine:
    """What it can do at most, on several threads."""

    ROUNDS = 100_000
    FLOATS_A_ROUND = 24 * 16

    def __init__(self, folder: Path, threads: int) -> None:
        source, library = Path(__file__).with_name("roofline.cpp"), folder / "roofline.so"
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True, capture_output=True)
        self.library, self.threads, self.pool = ctypes.CDLL(str(library)), threads, ThreadPoolExecutor(threads)
        self.library.multiply.argtypes = [ctypes.c_long]
        self.library.read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def flops(self) -> float:
        """Floating-point operations a second."""
        seconds = self._timed([partial(self.library.multiply, self.ROUNDS)] * self.threads)
        return self.threads * self.ROUNDS * self.FLOATS_A_ROUND * 2 / seconds

    def bandwidth(self, data: Floats) -> float:
        """Bytes a second."""
        count = data.size // self.threads // 128 * 128
        parts = [partial(self.library.read, data.ctypes.data + t * count * 4, count) for t in range(self.threads)]
        return self.threads * count * 4 / self._timed(parts)

    def _timed(self, calls: Sequence[Callable[[], Any]]) -> float:
        start = time.perf_counter()
        for future in [self.pool.submit(call) for call in calls]:
            future.result()
        return time.perf_counter() - start


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(threads: int, name: str, rounds: int, shrink: int) -> Numbers:
    """One shape on some threads."""
    full = SHAPES[name]
    case = Case.draw(Shape(full.query_rows, full.dim, max(1, full.pages // shrink), full.rows))
    made = {contender: ready(make, case, threads) for contender, make in CONTENDERS.items()}
    runs = {contender: run for contender, run in made.items() if not isinstance(run, SkipError)}
    skipped = {contender: str(run) for contender, run in made.items() if isinstance(run, SkipError)}
    exact = exact_scores(case)
    found = {contender: {"ms": [], "error": error(run(), exact)} for contender, run in runs.items()}
    machine = roofline_rounds(case, threads, runs, found, rounds)
    return {"shape": name, "threads": threads, "pages": case.shape.pages, "products": case.shape.products()} | {
        "contenders": found,
        "skipped": skipped,
        "machine": machine,
        "quality": quality(case),
    }


def ready(make: Callable[[Case, int], Run], case: Case, threads: int) -> Run | SkipError:
    try:
        return make(case, threads)
    except SkipError as reason:
        return reason


def roofline_rounds(case: Case, threads: int, runs: Mapping[str, Run], found: Numbers, rounds: int) -> Numbers:
    """Times every contender and the machine once a round, another contender first in each."""
    speeds: Numbers = {"flops": [], "bandwidth": []}
    with tempfile.TemporaryDirectory() as folder:
        try:
            machine = Machine(Path(folder), threads)
        except (OSError, subprocess.CalledProcessError):
            machine = None
        for number in range(rounds):
            time_round(runs, number, {name: found[name]["ms"] for name in runs}, case.shape.calls())
            if machine:
                speeds["flops"].append(machine.flops())
                speeds["bandwidth"].append(machine.bandwidth(case.documents))
    return speeds


def error(scores: Floats, exact: Floats) -> float:
    """The largest difference to float64, relative to the scores' mean size; of the pages that a contender names."""
    known = np.isfinite(scores)
    return float(np.abs(scores[known] - exact[known]).max() / np.abs(exact).mean())


def quality(case: Case) -> Numbers:
    """How many of the exact top 10 u8 has in its top 10, and signs in their top 100."""
    depths = {"u8": 10, "bits": 100}
    stored = {name: case.stored(name) for name in ("f32", *depths)}
    kept: dict[str, list[float]] = {name: [] for name in depths}
    for query in case.queries:
        best = {*top(query, stored["f32"], 10)[0].tolist()}
        for name, depth in depths.items():
            kept[name].append(len(best & {*top(query, stored[name], depth)[0].tolist()}) / len(best))
    return {name: round(float(np.mean(values)), 6) for name, values in kept.items()}


def in_process(threads: int, name: str, rounds: int, shrink: int) -> Numbers:
    """Measures in a new process that has as many cores as threads."""
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise typer.BadParameter(f"{threads} threads: this machine has {len(cores)} cores")
    for variable in ("OMP", "OPENBLAS", "MKL", "RAYON"):
        os.environ[f"{variable}_NUM_THREADS"] = str(threads)
    os.sched_setaffinity(0, cores[:threads])
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(measure, threads, name, rounds, shrink).result()
    finally:
        os.sched_setaffinity(0, cores)


# Reporting ------------------------------------------------------------------------------------------------------------


def milliseconds(result: Numbers, name: str) -> float | None:
    found = result["contenders"].get(name)
    return float(median(found["ms"])) if found else None


def roofline(result: Numbers) -> float | None:
    """Milliseconds of f32 on this machine at best."""
    speeds = result["machine"]
    if not speeds["flops"]:
        return None
    shape = SHAPES[result["shape"]]
    numbers, size = 2 * result["products"], result["pages"] * shape.rows * shape.dim * 4
    return float(1000 * max(numbers / median(speeds["flops"]), size / median(speeds["bandwidth"])))


def targets(result: Numbers) -> list[tuple[str, float, float]]:
    """What is asked: its name, the value, and the least that it may be."""
    own = {name: milliseconds(result, f"cembed {name}") or np.nan for name in ("list", "array", *STORAGE)}
    exact, goals = [ms for name in EXACT if (ms := milliseconds(result, name))], GOALS[result["shape"]]
    rows = list[tuple[str, float, float]]()
    if goals.numpy:
        rows.append(("array, times the best exact peer", min(exact) / own["array"], 1.0))
        rows += [(f"{kind}, times numpy", times_numpy(result, kind), goals.numpy) for kind in ("list", "array")]
    if goals.overhead_ms and (alone := milliseconds(result, "library alone")):
        rows.append(("list, allowed overhead over its own", goals.overhead_ms / max(own["list"] - alone, 1e-6), 1.0))
    if goals.roofline and (best := roofline(result)):
        rows.append(("array, of the roofline", best / own["array"], goals.roofline))
    if kong := milliseconds(result, "NumKong"):
        rows += [(f"{name}, times NumKong", kong / own[name], least) for name, least in (("u8", 2.0), ("bits", 8.0))]
    inexact = result["contenders"]["cembed list"]["error"]
    rows.append(("list, accuracy over what is asked", ERROR / max(inexact, 1e-12), 1.0))
    rows.append(("u8, recall at 10", result["quality"]["u8"], RECALL))
    rows.append(("bits, exact top 10 in the top 100", result["quality"]["bits"], RECALL))
    return rows


def times_numpy(result: Numbers, kind: str) -> float:
    """In the median round."""
    ours, numpys = (result["contenders"][f"{who} {kind}"]["ms"] for who in ("cembed", "numpy"))
    return float(median(np.divide(numpys, ours).tolist()))


def report(results: list[Numbers]) -> None:
    table = Table(title=f"milliseconds, medians; kernels: {', '.join(kernel_sets()) or 'numpy'}")
    heads = [f"{result['shape']}, {result['threads']} thr" for result in results]
    for head in ("", *heads):
        table.add_column(head, justify="right")
    for name in CONTENDERS:
        table.add_row(name, *(cell(result, name) for result in results))
    table.add_row("roofline of f32", *(f"{best:.2f}" if (best := roofline(result)) else "no g++" for result in results))
    Console().print(table)
    for result in results:
        for name, reason in result["skipped"].items():
            print(f"skipped {result['shape']}, {result['threads']} threads: {name}: {reason}")
    for result in results:
        for what, value, least in targets(result):
            met = "met   " if value >= least else "MISSED"
            print(f"{met} {result['shape']}, {result['threads']} threads: {what}: {value:.3g}, asked {least}")


def cell(result: Numbers, name: str) -> str:
    ms = milliseconds(result, name)
    return f"{ms:.2f} ({result['contenders'][name]['error']:.0e})" if ms is not None else "skipped"


def main(
    shapes: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}.")] = ",".join(SHAPES),
    threads: Annotated[str, typer.Option(help="Numbers of threads.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    shrink: Annotated[int, typer.Option(min=1, help="Only every n-th page: a try.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Writes every number to this file.")] = None,
) -> None:
    """Time maxsim() beside its peers; check scores and recall."""
    counts = [int(count) for count in threads.split(",")]
    results = [in_process(count, name, rounds, shrink) for name in shapes.split(",") for count in counts]
    report(results)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

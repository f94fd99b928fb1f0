"""Which engine is fastest for each graph of a bundle on this machine: each is tried on pages in its own process."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.embed.embedder import Embedder
from cembed.runtime.engines.openvino import PRECISIONS
from cembed.runtime.engines.operators import BF16
from cembed.runtime.engines.quiet import ort
from cembed.runtime.engines.session import CPU, Array, Session, StepSession
from cembed.runtime.errors import CembedError
from cembed.runtime.pages.images import Pixels

ALWAYS = (*CPU, BF16, *PRECISIONS)
ON_GPU = ("CUDAExecutionProvider",)
STEPS = 8  # slots of the loop that are timed
STEP, PAGE, PIXELS = "text_step", "page", "pixels"
GRAPHS = ("vision", "text", STEP)
SLACK = 1.05  # between two measurements of the same


@dataclass(frozen=True)
class Trial:
    """One way to run a bundle: seconds by graph and of a whole `page`, medians; what it gave; the most memory, in MiB.

    `seconds[STEP]` is one slot of the loop, `seconds[PIXELS]` what stands before the vision graph. `tokens` and
    `positions` are those of the largest page. `failure` says why there is nothing.
    """

    providers: tuple[str, ...]
    seconds: Mapping[str, float]
    vectors: tuple[Vectors, ...] = ()
    memory: float = 0.0
    tokens: int = 0
    positions: int = 0
    failure: str | None = None

    def lowest_cosine(self, right: Trial) -> float:
        """Of a vector with that of another trial."""
        pairs = zip(self.vectors, right.vectors, strict=True)
        return min(float((mine * theirs).sum(axis=1).min()) for mine, theirs in pairs)


class Timed:
    """A session that says how long its runs of a page took, and how many rows they gave."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.start_page()

    def start_page(self) -> None:
        self.seconds, self.rows = 0.0, 0

    def run(self, feeds: Mapping[str, Array]) -> Array:
        start = time.perf_counter()
        output = self._session.run(feeds)
        self.seconds += time.perf_counter() - start
        self.rows += int(np.prod(output.shape[:-1]))
        return output

    def bind(self, cache: Mapping[str, Array]) -> StepSession:
        return self._session.bind(cache)


def candidates() -> tuple[str, ...]:
    """The engines that are tried; some of them may turn out not to be there."""
    available = ort.get_available_providers()
    return (*ALWAYS, *(name for name in ON_GPU if name in available))


@dataclass(frozen=True)
class Way:
    """How a bundle is run; None are the defaults of `Embedder.load`."""

    bundle: Path
    providers: tuple[str, ...] | None = None
    threads: int | None = None
    max_visual_tokens: int | None = None
    skip_blank: bool | None = None


def try_all(way: Way, pages: Sequence[Pixels], rounds: int) -> Iterator[Trial]:
    """Each engine for all graphs, as it is done; the first one is the right one, ONNX Runtime on the CPU."""
    for name in candidates():
        yield attempt(replace(way, providers=(name,)), pages, rounds)


def attempt(way: Way, pages: Sequence[Pixels], rounds: int) -> Trial:
    """One way, in a process of its own; what it cannot do is its `failure`."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawned) as process:
        try:
            return process.submit(_run, way, list(pages), rounds).result()
        except CembedError as error:
            return Trial(way.providers or (), {}, failure=str(error))
        except Exception as error:  # the process ended, as an engine crashed or memory did not suffice
            return Trial(way.providers or (), {}, failure=f"its process ended: {error}")


def _run(way: Way, pages: list[Pixels], rounds: int) -> Trial:
    settings = asdict(way)
    embedder = Embedder.load(settings.pop("bundle"), **settings)
    single = embedder.manifest.document.slots != "feedback"
    timed = {name: Timed(embedder.session(name)) for name in (("vision", "text") if single else ("vision",))}
    embedder.replace_sessions(timed)
    vectors = tuple(embedder.embed_images(pages))  # which also warms up
    rows = [_page(embedder, timed, page) for page in pages * rounds]
    seconds = {name: median(row[name] for row in rows) for name in rows[0] if name not in ("tokens", "positions")}
    tokens, positions = (int(max(row[name] for row in rows)) for name in ("tokens", "positions"))
    return Trial(way.providers or (), seconds, vectors, _peak(), tokens, positions)


def _page(embedder: Embedder, timed: Mapping[str, Timed], page: Pixels) -> dict[str, float]:
    """Seconds of one page, and how many visual tokens and positions it takes."""
    for session in timed.values():
        session.start_page()
    start = time.perf_counter()
    prompt = embedder.inputs.document(page)
    made = time.perf_counter()
    embedder.embed_prompt("document", prompt)
    found = {PAGE: time.perf_counter() - start, PIXELS: made - start - timed["vision"].seconds}
    found |= {name: session.seconds for name, session in timed.items()}
    found |= {"tokens": timed["vision"].rows, "positions": len(prompt)}
    return found | ({STEP: _step(embedder, page)} if STEP in embedder.manifest.graphs else {})


def _step(embedder: Embedder, page: Pixels) -> float:
    """Seconds of one slot of the loop."""
    first = 1 if embedder.manifest.document.first_vector == "prompt_end" else 2
    most = embedder.manifest.document.max_vectors or first + STEPS
    last = max(first, min(first + STEPS, most))
    state = embedder.start(page, last)
    state.extend(first)
    start = time.perf_counter()
    state.extend(last)
    elapsed = time.perf_counter() - start
    state.close()
    return elapsed / max(last - first, 1)


def _peak() -> float:
    """The most memory that this process had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def mixture(trials: Sequence[Trial], min_cosine: float) -> tuple[str, ...]:
    """Providers as `Embedder.load` takes them: of each graph the fastest of the `faithful` ones."""
    good, base = faithful(trials, min_cosine), trials[0].providers[0]
    graphs = [graph for graph in GRAPHS if graph in trials[0].seconds]
    fastest = {graph: min(good, key=lambda trial: trial.seconds[graph]).providers[0] for graph in graphs}
    return (*(f"{graph}={name}" for graph, name in fastest.items() if name != base), base)


def best(trials: Sequence[Trial], min_cosine: float) -> Trial:
    """The fastest page of the `faithful` ones, if a slot of the loop is no slower than in the first."""
    step = trials[0].seconds.get(STEP, 0.0) * SLACK
    even = [trial for trial in faithful(trials, min_cosine) if trial.seconds.get(STEP, 0.0) <= step]
    return min(even, key=lambda trial: trial.seconds[PAGE])


def faithful(trials: Sequence[Trial], min_cosine: float) -> list[Trial]:
    """The first trial, and those whose vectors keep a cosine of `min_cosine` to its."""
    first, *others = trials
    return [first, *(trial for trial in others if not trial.failure and trial.lowest_cosine(first) >= min_cosine)]

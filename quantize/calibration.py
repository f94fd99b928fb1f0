"""The pages and queries that a quantised bundle is judged on, and the judgement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cembed.quantize.activations import Watcher
from cembed.runtime.bundle.bundle import Bundle, OwnBundle
from cembed.runtime.bundle.manifest import Comparison
from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.embed.embedder import FULL, Budget, Embedder
from cembed.runtime.embed.inputs import Prompt
from cembed.runtime.engines.session import EngineSettings
from cembed.runtime.errors import CembedError
from cembed.runtime.evaluate import Dataset, measure, rank, require_ir_measures
from cembed.runtime.pages.documents import Page, PageReader, find_documents
from cembed.runtime.scoring.maxsim import maxsim

MAX_PAGES = 200
DRAWN_PAGES = 12
TOP = 5
WORDS = (
    *("annual", "audit", "boiler", "budget", "cargo", "claims", "dental", "engine", "ferry", "garden", "harbour"),
    *("invoice", "kettle", "ladder", "meeting", "notice", "orders", "parcel", "quarry", "safety", "ticket", "winter"),
)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class CalibrationSet:
    """Pages by their id, and queries by theirs; `dataset` has judgements of them."""

    pages: dict[str, NDArray[np.uint8]]
    queries: dict[str, str]
    dataset: Dataset | None = None

    @classmethod
    def read(cls, paths: Iterable[Path], queries: Iterable[str] = ()) -> CalibrationSet:
        """A data set as `cembed eval` reads it, or documents; without queries of the user, those of the drawn set.

        Raises CembedError: nothing there, a page that cannot be read.
        """
        given = list(paths)
        if not given:
            return drawn_set()
        if len(given) == 1 and (given[0] / "qrels.tsv").exists():
            return cls.judged(Dataset.read(given[0]))
        asked = list(queries) or list(drawn_set().queries.values())
        return cls(dict(read_pages(given)), {str(index): text for index, text in enumerate(asked)})

    @classmethod
    def judged(cls, dataset: Dataset) -> CalibrationSet:
        """The first MAX_PAGES pages and the questions that one of them answers."""
        pages = {name: image for name, image, _ in islice(dataset.pages(), MAX_PAGES)}
        asked = {q: dataset.queries[q] for q in dataset.judged() if pages.keys() & dataset.qrels[q].keys()}
        return cls(pages, asked, dataset)


def read_pages(paths: list[Path]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The first MAX_PAGES pages of documents."""
    with PageReader() as reader:
        for page in islice(reader.read(find_documents(paths)), MAX_PAGES):
            if not isinstance(page, Page):
                raise CembedError(f"the calibration set cannot be read: {page.path}: {page.reason}")
            yield f"{page.path}#{page.number}", page.image


def drawn_set() -> CalibrationSet:
    """A few pages of large type, each with a query for its heading, when the user has none at hand."""
    pages, queries = {}, {}
    for index in range(DRAWN_PAGES):
        random = Random(index)
        heading, lines = " ".join(random.sample(WORDS, 3)), [" ".join(random.sample(WORDS, 4)) for _ in range(9)]
        page = Image.new("RGB", (448, 560), random.choice(("white", "ivory", "lavender")))
        draw = ImageDraw.Draw(page)
        draw.text((24, 24), heading, fill="black", font=ImageFont.load_default(30))
        for row, line in enumerate(lines):
            draw.text(
                (24, 90 + 44 * row), f"{line} {random.randint(10, 999)}", fill="black", font=ImageFont.load_default(20)
            )
        pages[str(index)], queries[str(index)] = np.asarray(page), heading
    return CalibrationSet(pages, queries)


@dataclass(frozen=True)
class Embedded:
    """Vectors of a calibration set's pages and queries, and the median milliseconds of a page on this machine."""

    pages: list[Vectors]
    queries: list[Vectors]
    ms_per_page: float

    @classmethod
    def by(cls, root: Path, calibration: CalibrationSet, engine: EngineSettings, progress: Progress) -> Embedded:
        """With the bundle at `root`, whose files were verified when they were read before."""
        embedder = Embedder(OwnBundle(root, verify=False), engine)
        name = root.name.lstrip(".").split(".")[0]
        found = cls.of(embedder, calibration, lambda n: progress(f"page {n} of {len(calibration.pages)} with {name}"))
        for graph in embedder.manifest.graphs:
            embedder.release(graph)
        return found

    @classmethod
    def of(
        cls, embedder: Embedder, calibration: CalibrationSet, progress: Callable[[int], None] = lambda number: None
    ) -> Embedded:
        prompts, vision = embed_vision(embedder, calibration, progress)
        embedder.release("vision")
        pages, text = embed_text(embedder, prompts, progress)
        queries = embedder.embed_queries(calibration.queries.values())
        return cls(pages, queries, float(np.median(np.add(vision, text))) * 1000)


def embed_vision(
    embedder: Embedder, calibration: CalibrationSet, progress: Callable[[int], None]
) -> tuple[list[Prompt], list[float]]:
    """The prompts of all pages, and seconds: the vision graph's part. One graph at a time halves the memory."""
    prompts, seconds = [], []
    for number, image in enumerate(calibration.pages.values(), 1):
        progress(number)
        start = time.perf_counter()
        prompts.append(embedder.inputs.document(image))
        seconds.append(time.perf_counter() - start)
    return prompts, seconds


def embed_text(
    embedder: Embedder, prompts: list[Prompt], progress: Callable[[int], None], budget: Budget = FULL
) -> tuple[list[Vectors], list[float]]:
    """Vectors of all prompts, and seconds: the text graph's part."""
    pages, seconds = [], []
    for number, prompt in enumerate(prompts, 1):
        progress(number)
        start = time.perf_counter()
        pages.append(embedder.embed_prompt("document", prompt, budget))
        seconds.append(time.perf_counter() - start)
    return pages, seconds


def observe(
    bundle: Bundle,
    watchers: Mapping[str, Watcher],
    calibration: CalibrationSet,
    threads: int | None,
    progress: Progress,
) -> None:
    """Embeds the calibration set by the single pass, with `watchers` in place of the graphs' sessions."""
    embedder = Embedder(bundle, EngineSettings(threads=threads, prepack=False))
    embedder.replace_sessions(watchers)
    count = len(calibration.pages)
    prompts, _ = embed_vision(embedder, calibration, lambda number: progress(f"observing page {number} of {count}"))
    watchers["vision"].close()
    budget = Budget(decode="single-pass" if bundle.manifest.document.num_vectors else None)
    embed_text(embedder, prompts, lambda number: progress(f"observing the text of page {number} of {count}"), budget)
    embedder.embed_queries(calibration.queries.values())
    watchers["text"].close()


def compare(old: Embedded, new: Embedded, calibration: CalibrationSet, sizes: tuple[int, int]) -> Comparison:
    cosines = np.concatenate(
        [(a * b).sum(axis=1) for a, b in zip(old.pages + old.queries, new.pages + new.queries, strict=True)]
    )
    scores = [maxsim(e.queries, e.pages) for e in (old, new)]
    best = [np.argsort(-s, axis=1, kind="stable")[:, :TOP] for s in scores]
    overlap = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(*best, strict=True)])
    return Comparison(
        pages=len(calibration.pages),
        queries=len(calibration.queries),
        min_cosine=float(cosines.min()),
        p1_cosine=float(np.percentile(cosines, 1)),
        median_cosine=float(np.median(cosines)),
        score_error=float(np.abs(scores[0] - scores[1]).mean() / np.abs(scores[0]).mean()),
        top5_overlap=float(overlap),
        ms_per_page=(old.ms_per_page, new.ms_per_page),
        bytes=sizes,
        ndcg5=quality(calibration, scores),
    )


def quality(calibration: CalibrationSet, scores: list[NDArray[np.float32]]) -> tuple[float, float] | None:
    """nDCG@5 before and after, where the calibration set has judgements."""
    if calibration.dataset is None:
        return None
    ir_measures = require_ir_measures()
    old, new = (
        next(
            iter(measure(ir_measures, calibration.dataset, rank(list(calibration.queries), list(calibration.pages), s)))
        )
        for s in scores
    )
    return old[1]["nDCG@5"], new[1]["nDCG@5"]

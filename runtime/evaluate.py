"""Retrieval quality of a bundle on a folder of pages with questions and judgements (BEIR, arXiv 2104.08663; ViDoRe).

    pages/           images and PDF files; a page's id is its path below, for files of several pages with `#` and the
                     number: `a.png`, `reports/b.pdf#3`
    queries.jsonl    {"_id": "q1", "text": "…"} on each line; "part" groups questions that are also scored alone
    qrels.tsv        query-id, corpus-id, score with that header; what is not listed is not relevant

The measures are those of trec_eval, by the library ir-measures; the extra `eval` installs it.
"""

from __future__ import annotations

import csv
import json
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.embed.embedder import Budget, Embedder
from cembed.runtime.errors import CembedError, missing_extra
from cembed.runtime.page_vectors import EmbeddedPage, embed_pages
from cembed.runtime.pages.documents import Page, PageError, PageReader, find_documents, require_pages
from cembed.runtime.plotting import picture
from cembed.runtime.scoring.maxsim import maxsim
from cembed.runtime.scoring.storage import STORAGE

if TYPE_CHECKING:
    from PIL import Image

MEASURES = {"nDCG@5": "nDCG@5", "nDCG@10": "nDCG@10", "recall@1": "R@1", "recall@5": "R@5", "recall@10": "R@10"}
MEASURES |= {"MRR": "RR"}
WHOLE = re.compile(r"-?[0-9]{1,9}")
DEPTH = 100  # pages of a ranking that are looked at
TIMED_PAGES = 20


@dataclass(frozen=True)
class Dataset:
    """Questions and judgements; `parts` has the part of the questions that name one."""

    folder: Path
    queries: Mapping[str, str]
    parts: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]

    @classmethod
    def read(cls, folder: Path) -> Dataset:
        """Raises CembedError: a file that is missing or malformed, a judgement of an unknown question."""
        if not (folder / "pages").is_dir():
            raise CembedError(f"{folder} is no data set: it has no folder pages")
        rows = list(read_queries(folder / "queries.jsonl"))
        queries = {str(row["_id"]): row["text"] for row in rows}
        if len(queries) != len(rows) or not rows:
            raise CembedError(f"{folder / 'queries.jsonl'}: {'an _id comes twice' if rows else 'there is no query'}")
        qrels = read_qrels(folder / "qrels.tsv")
        if unknown := sorted(qrels.keys() - queries.keys()):
            raise CembedError(f"qrels.tsv judges query {unknown[0]!r}, which queries.jsonl does not have")
        parts = {str(row["_id"]): str(row["part"]) for row in rows if "part" in row}
        return cls(folder, queries, parts, qrels)

    def judged(self) -> list[str]:
        """The questions that some page answers."""
        return [query for query in self.queries if any(score > 0 for score in self.qrels.get(query, {}).values())]

    def pages(self) -> Iterator[tuple[str, NDArray[np.uint8], int]]:
        """Id and picture of each page, and how many there are. Raises CembedError for one that cannot be read."""
        with PageReader() as reader:
            corpus = Corpus(self.folder / "pages", reader)
            for page in corpus.read():
                yield corpus.name(page), page.image, corpus.total


class Corpus:
    """The documents of a data set, `total` pages, as long as `reader` is open."""

    def __init__(self, folder: Path, reader: PageReader) -> None:
        self._folder, self._reader = folder, reader
        self._counts = {str(file): reader.count_pages([file]) for file in find_documents([folder])}
        self.total = sum(self._counts.values())

    def name(self, page: Page | EmbeddedPage) -> str:
        """The id of a page."""
        name = Path(page.path).relative_to(self._folder).as_posix()
        return name if self._counts[page.path] == 1 else f"{name}#{page.number}"

    def read(self) -> Iterator[Page]:
        """Every page, with a RuntimeWarning for one in doubt. Raises CembedError for one that cannot be read."""
        for page in require_pages(self._reader.read(self._counts)):
            if page.warning:
                warnings.warn(f"{page.place}: {page.warning}", RuntimeWarning, stacklevel=2)
            yield page
            del page


def read_queries(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CembedError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or "_id" not in row:
            raise CembedError(f'{path}, line {number}: give {{"_id": …, "text": "…"}}')
        yield row


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    try:
        header, *rows = list(csv.reader(read_text(path).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)) or [[]]
    except csv.Error as error:
        raise CembedError(f"{path}: {error}") from error
    if header != ["query-id", "corpus-id", "score"]:
        raise CembedError(f"{path}: the first line must be query-id, corpus-id, score with tabs between")
    for number, row in enumerate(rows, 2):
        if len(row) != 3 or not WHOLE.fullmatch(row[2]):
            raise CembedError(f"{path}, line {number}: give a query, a page and a whole number")
        qrels.setdefault(row[0], {})[row[1]] = int(row[2])
    return qrels


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CembedError(f"cannot read {path}: {error}") from error


@dataclass(frozen=True)
class Row:
    """One line of the result; `part` is `all` or a part of the questions, `vectors` None for bundles without budget."""

    vectors: int | None
    storage: str
    part: str
    questions: int
    measures: Mapping[str, float]
    bytes_per_page: float
    ms_per_page: float


COLUMNS = ("vectors", "storage", "part", "nDCG@5", "nDCG@10", "recall@5", "MRR", "bytes", "ms")


def table_row(row: Row) -> dict[str, str | int | float]:
    """The cells of a row by `COLUMNS`; bytes and milliseconds are those of a page."""
    sizes: dict[str, str | int | float] = {"bytes": round(row.bytes_per_page), "ms": f"{row.ms_per_page:.1f}"}
    measures = {name: f"{value:.3f}" for name, value in row.measures.items()}
    return {"vectors": row.vectors or "all", "storage": row.storage, "part": row.part, **measures, **sizes}


@dataclass(frozen=True)
class Evaluation:
    bundle: str
    pages: int
    rows: tuple[Row, ...]


def evaluate(
    embedder: Embedder,
    dataset: Dataset,
    budgets: Sequence[int] | None = None,
    storage: Sequence[str] = ("f32",),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Embeds every page once, at the largest budget, and scores each budget and storage type.

    A smaller budget is the first vectors of a larger one. Milliseconds are those of embedding a page at that budget on
    this machine, the median of some. Raises CembedError: no ir-measures, judged pages that are not there, an unknown
    storage type, a budget that the bundle does not have.
    """
    ir_measures = require_ir_measures()
    if unknown := [name for name in storage if name not in STORAGE]:
        raise CembedError(f"unknown storage {unknown[0]!r}: cembed has {', '.join(STORAGE)}")
    steps = check_budgets(embedder, budgets)
    questions = dataset.judged()
    if not questions:
        raise CembedError("qrels.tsv names no relevant page: there is nothing to measure")
    embedder.prepare("document", Budget(steps[-1]))
    embedder.prepare("query")
    pages, images = embed_corpus(embedder, dataset, steps[-1], progress)
    queries = [embedder.embed_query(dataset.queries[question]) for question in questions]
    rows: list[Row] = []
    for step in steps:
        elapsed = time_pages(embedder, images, step)
        kept = {name: vectors if step is None else vectors[:step] for name, vectors in pages.items()}
        for name in storage:
            restored = [STORAGE[name].restore(vectors) for vectors in kept.values()]
            run = rank(questions, list(kept), maxsim(queries, restored))
            size = float(np.mean([STORAGE[name].page_size(vectors) for vectors in kept.values()]))
            for part, measures, count in measure(ir_measures, dataset, run):
                rows.append(
                    Row(
                        vectors=step,
                        storage=name,
                        part=part,
                        questions=count,
                        measures=measures,
                        bytes_per_page=size,
                        ms_per_page=elapsed,
                    )
                )
    return Evaluation(embedder.bundle.hash, len(pages), tuple(rows))


def require_ir_measures() -> Any:
    try:
        import ir_measures
    except ImportError as error:
        raise missing_extra("eval", "ir-measures", "eval", error) from error
    return ir_measures


def check_budgets(embedder: Embedder, budgets: Sequence[int] | None) -> Sequence[int | None]:
    """The budgets in rising order: by default powers of two up to the bundle's; None where it has no choice."""
    side = embedder.manifest.document
    if side.num_vectors is None or side.pooling != "none":
        if budgets:
            raise CembedError("this bundle has no budget: leave the budgets out")
        return [None]
    if budgets is None:
        return [*(2**n for n in range(20) if 2**n < side.num_vectors), side.num_vectors]
    for budget in budgets:
        embedder.check(side, Budget(budget))
    return sorted(set(budgets))


def embed_corpus(
    embedder: Embedder, dataset: Dataset, budget: int | None, progress: Callable[[int, int], None]
) -> tuple[dict[str, Vectors], list[NDArray[np.uint8]]]:
    """Each page's vectors by its id, and some pages for timing."""
    vectors: dict[str, Vectors] = {}
    images: list[NDArray[np.uint8]] = []
    with PageReader() as reader:
        corpus = Corpus(dataset.folder / "pages", reader)
        for page in embed_pages(embedder, keep_images(corpus.read(), images), Budget(budget)):
            if isinstance(page, PageError):
                raise CembedError(f"{page.place} cannot be embedded: {page.reason}")
            vectors[corpus.name(page)] = page.vectors
            progress(len(vectors), corpus.total)
    judged = {page for pages in dataset.qrels.values() for page in pages}
    if missing := sorted(judged - vectors.keys()):
        raise CembedError(
            f"qrels.tsv judges page {missing[0]!r}, which pages/ does not have ({len(missing)} are missing)"
        )
    return vectors, images


def keep_images(pages: Iterable[Page], images: list[NDArray[np.uint8]]) -> Iterator[Page]:
    """`pages`; the first TIMED_PAGES leave their images in `images`."""
    for page in pages:
        if len(images) < TIMED_PAGES:
            images.append(page.image)
        yield page
        del page


def time_pages(
    embedder: Embedder, images: Sequence[NDArray[np.uint8]] | Sequence[Image.Image], budget: int | None
) -> float:
    """Median milliseconds of embedding a page."""
    seconds = []
    for image in images:
        start = time.perf_counter()
        embedder.embed_image(image, Budget(budget))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)) * 1000


def rank(questions: Sequence[str], pages: Sequence[str], scores: NDArray[np.float32]) -> dict[str, dict[str, float]]:
    """The best pages of each question with their scores."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
    return {q: {pages[i]: float(row[i]) for i in top} for q, row, top in zip(questions, scores, best, strict=True)}


def measure(
    ir_measures: Any, dataset: Dataset, run: Mapping[str, Mapping[str, float]]
) -> Iterator[tuple[str, dict[str, float], int]]:
    """The means over all questions and over each part: name, measures, number of questions."""
    parsed = {name: ir_measures.parse_measure(spelling) for name, spelling in MEASURES.items()}
    names = {value: name for name, value in parsed.items()}
    values: dict[str, dict[str, float]] = {name: {} for name in MEASURES}
    qrels = {query: dict(pages) for query, pages in dataset.qrels.items() if query in run}
    for result in ir_measures.iter_calc(list(parsed.values()), qrels, {q: dict(pages) for q, pages in run.items()}):
        values[names[result.measure]][result.query_id] = float(result.value)
    named: dict[str, list[str]] = {}
    for query in run:
        if query in dataset.parts:
            named.setdefault(dataset.parts[query], []).append(query)
    parts = {"all": list(run), **(named if len(named) > 1 else {})}
    for part, queries in parts.items():
        yield part, {name: float(np.mean([of[q] for q in queries])) for name, of in values.items()}, len(queries)


def plot(evaluation: Evaluation, out: Path) -> None:
    """nDCG@5 against bytes and against milliseconds a page, a line for each storage type. Raises CembedError."""
    with picture(out, 2, (10, 4)) as axes:
        for name in dict.fromkeys(row.storage for row in evaluation.rows):
            rows = [row for row in evaluation.rows if row.storage == name and row.part == "all"]
            quality = [row.measures["nDCG@5"] for row in rows]
            axes[0].plot([row.bytes_per_page for row in rows], quality, marker="o", label=name)
            axes[1].plot([row.ms_per_page for row in rows], quality, marker="o", label=name)
            for row, value in zip(rows, quality, strict=True):
                axes[0].annotate(
                    str(row.vectors or "all"), (row.bytes_per_page, value), textcoords="offset points", xytext=(4, -10)
                )
        axes[0].set(xscale="log", xlabel="bytes a page (labels: vectors)", ylabel="nDCG@5")
        axes[1].set(xlabel="milliseconds a page")
        for axis in axes:
            axis.grid(alpha=0.3)
        axes[0].legend(title="storage")

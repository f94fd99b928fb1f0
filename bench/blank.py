"""What leaving blank paper unread costs and saves, beside pages made smaller to as few visual tokens.

    python samples/pages/generate.py pages --split test --pages 300
    python bench/blank.py BUNDLE pages --threads 2 --rounds 5

Milliseconds are medians of the first pages of the data set; the three ways to read them take turns.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import pages
import typer
from rich.console import Console
from rich.table import Table

from cembed.runtime import Embedder, maxsim
from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.embed.preprocess import resized_size
from cembed.runtime.evaluate import Dataset, embed_corpus, measure, rank, require_ir_measures, time_pages

Sizes = list[tuple[int, int]]
COLUMNS = ("tokens", "nDCG@5", "recall@5", "ms")


@dataclass(frozen=True)
class Way:
    """To read pages: the share of visual tokens that is read, its quality, and milliseconds of a page by round."""

    tokens: float
    ndcg5: float
    recall5: float
    ms: list[float]


def tokens_of(sizes: Sizes, image: ImageProcessing) -> int:
    """Visual tokens of pages of these heights and widths."""
    return sum(height * width for height, width in (resized_size(*size, image) for size in sizes)) // image.factor**2


def limit_for(sizes: Sizes, image: ImageProcessing, tokens: int) -> int:
    """The largest limit with which the pages have at most so many visual tokens in all."""
    least, most = -(-image.min_pixels // image.factor**2), image.max_visual_tokens
    while least < most:
        middle = (least + most + 1) // 2
        fits = tokens_of(sizes, image.limited(middle)) <= tokens
        least, most = (middle, most) if fits else (least, middle - 1)
    return least


def quality(embedder: Embedder, data: Dataset) -> dict[str, float]:
    vectors, _ = embed_corpus(embedder, data, embedder.manifest.document.num_vectors, lambda done, total: None)
    questions = data.judged()
    queries = embedder.embed_queries([data.queries[question] for question in questions])
    found = rank(questions, list(vectors), maxsim(queries, list(vectors.values())))
    return next(measure(require_ir_measures(), data, found))[1]


def compare(bundle: Path, data: Dataset, threads: int, rounds: int, timed: int) -> dict[str, Way]:
    images = [image for _, image, _ in data.pages()]
    sizes: Sizes = [(image.shape[0], image.shape[1]) for image in images]
    embedders = {
        "all": Embedder.load(bundle, threads=threads, skip_blank=False),
        "skip_blank": Embedder.load(bundle, threads=threads, skip_blank=True),
    }
    measures = {name: quality(embedder, data) for name, embedder in embedders.items()}
    whole, read = embedders["all"].tokens_read.read, embedders["skip_blank"].tokens_read.read
    limit = limit_for(sizes, embedders["all"].inputs.image, read)
    smaller = f"max_visual_tokens {limit}"
    embedders[smaller] = Embedder.load(bundle, threads=threads, skip_blank=False, max_visual_tokens=limit)
    measures[smaller] = quality(embedders[smaller], data)
    tokens = {name: embedder.tokens_read.read / whole for name, embedder in embedders.items()}
    budget = embedders["all"].manifest.document.num_vectors
    times: dict[str, list[float]] = {name: [] for name in embedders}
    for _ in range(rounds):
        for name, embedder in embedders.items():
            times[name].append(time_pages(embedder, images[:timed], budget))
    return {name: Way(tokens[name], m["nDCG@5"], m["recall@5"], times[name]) for name, m in measures.items()}


def report(ways: dict[str, Way]) -> None:
    table = Table("read", *COLUMNS, "of all", title="ms: medians of a page")
    slowest = median(ways["all"].ms)
    for name, way in ways.items():
        ms = median(way.ms)
        numbers = (f"{way.tokens:.3f}", f"{way.ndcg5:.4f}", f"{way.recall5:.4f}", f"{ms:.1f}", f"{ms / slowest:.2f}")
        table.add_row(name, *numbers)
    Console().print(table)


def main(
    bundle: Path,
    dataset: Path,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    timed: Annotated[int, typer.Option(min=1, help="Pages whose time is taken.")] = 40,
    json_path: Annotated[Path | None, typer.Option("--json", help="Writes every number to this file.")] = None,
) -> None:
    ways = compare(bundle, Dataset.read(dataset), threads, rounds, timed)
    report(ways)
    if json_path is not None:
        result = {"hardware": pages.hardware(threads), "ways": {name: asdict(way) for name, way in ways.items()}}
        json_path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

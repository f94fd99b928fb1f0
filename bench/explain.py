"""Where a page matched: how often heat lies on the words that were asked for, and what an explanation costs.

    python bench/explain.py --pages 400
    python bench/explain.py --wide

Pages are those of samples/pages, of the test split; it is known where each word of them was drawn, and which words a
question asks for. A hit is a hottest box that overlaps one of those. Beside it stand what the same box would hit
elsewhere: anywhere on the page, all places alike (`chance`), on the next page (`next page`), and what is hottest for
the next page's question (`other question`). `--wide` times a model of Qwen2-VL-2B's widths with a quarter of its layers
and random weights in int8: an explanation without the vision graph beside the text of a page, by turns.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from pages import draw_page, hardware
from peers import VECTORS, prepare
from rich.console import Console
from rich.table import Table

from cembed.runtime import Budget, Embedder, Explanation

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samples" / "pages"))
from canvas import PUNCTUATION, Word
from generate import Page, make_pages
from layouts import Question

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
Box = tuple[float, float, float, float]
Boxes = NDArray[np.float64]
PLACES = 31  # along each side at which a box is tried, for chance
LINE = 0.7  # of a character's width: half the height of a word, about
QUERY = "3745 EUR"


@dataclass(frozen=True, eq=False)
class Case:
    """A page, one of its questions, and the boxes [n, 4] of the words that it asks for, in shares of the page."""

    page: Page
    question: Question
    boxes: Boxes


def box_of(word: Word, width: int, height: int) -> Box:
    """Around a word, of which the middles of characters are known."""
    xs, ys = [mark.x for mark in word.characters], [mark.y for mark in word.characters]
    step = float(np.hypot(xs[-1] - xs[0], ys[-1] - ys[0])) / (len(xs) - 1) if len(xs) > 1 else 8.0
    left, right = min(xs) - step / 2, max(xs) + step / 2
    return left / width, (min(ys) - LINE * step) / height, right / width, (max(ys) + LINE * step) / height


def cases(count: int, seed: int) -> Iterator[Case]:
    random = Random(seed)
    for page in make_pages("test", count, seed):
        question = random.choice(page.questions)
        keys = {key.strip(",.:") for key in question.keys}
        words = [word for word in page.words if word.text.strip(PUNCTUATION).lower() in keys]
        yield Case(page, question, np.array([box_of(word, *page.image.size) for word in words]))


def hits(box: Box, boxes: Boxes) -> bool:
    """Whether a box overlaps one of several."""
    x0, y0, x1, y1 = boxes.T
    return bool(((x0 < box[2]) & (x1 > box[0]) & (y0 < box[3]) & (y1 > box[1])).any())


def chance(box: Box, boxes: Boxes) -> float:
    """How often a box of this size hits, in all places alike."""
    width, height = box[2] - box[0], box[3] - box[1]
    lefts, tops = np.linspace(0, 1 - width, PLACES), np.linspace(0, 1 - height, PLACES)
    return float(np.mean([hits((x, y, x + width, y + height), boxes) for x in lefts for y in tops]))


def timed(embedder: Embedder, case: Case, text: str, passes: int | None) -> tuple[float, Explanation]:
    start = time.perf_counter()
    found = embedder.explain(case.page.image, text, passes=passes)
    return time.perf_counter() - start, found


def quality(bundle: Path, count: int, seed: int, threads: int, passes: int | None) -> dict[str, float]:
    embedder, asked = Embedder.load(bundle, threads=threads), list(cases(count, seed))
    followers = [*asked[1:], asked[0]]
    embedder.explain(asked[0].page.image, asked[0].question.text, passes=passes)
    outcomes = [timed(embedder, case, case.question.text, passes) for case in asked]
    boxes = [found.hottest for _, found in outcomes]
    others = [timed(embedder, c, o.question.text, passes)[1].hottest for c, o in zip(asked, followers, strict=True)]
    seconds = [taken for taken, _ in outcomes]
    share = float(np.mean([hits(box, case.boxes) for box, case in zip(boxes, asked, strict=True)]))
    by_chance = float(np.mean([chance(box, case.boxes) for box, case in zip(boxes, asked, strict=True)]))
    return {
        "pages": len(asked),
        "share": share,
        "chance": by_chance,
        "share / chance": share / by_chance,
        "next page": float(np.mean([hits(box, case.boxes) for box, case in zip(boxes, followers, strict=True)])),
        "other question": float(np.mean([hits(box, case.boxes) for box, case in zip(others, asked, strict=True)])),
        "area": float(np.mean([(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes])),
        "runs": float(np.mean([found.runs for _, found in outcomes])),
        "seconds": median(seconds),
        "95 %": float(np.quantile(seconds, 0.95)),
    }


class Wide:
    """A page whose visual tokens are there, so that explanations do without the vision graph."""

    def __init__(self, bundle: Path, threads: int) -> None:
        self.embedder, self.image, self.budget = Embedder.load(bundle, threads=threads), draw_page(), Budget(VECTORS)
        self.page = self.embedder.inputs.page(self.image)
        self.query = self.embedder.embed_query(QUERY)
        setattr(self.embedder.inputs, "page", lambda image: self.page)  # noqa: B010  mypy takes methods for fixed

    def text(self) -> float:
        start = time.perf_counter()
        self.embedder.embed_prompt("document", self.page.prompt, self.budget)
        return time.perf_counter() - start

    def explain(self, passes: int | None) -> tuple[float, int]:
        start = time.perf_counter()
        found = self.embedder.explain(self.image, self.query, self.budget, passes=passes)
        return time.perf_counter() - start, found.runs


def costs(root: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Medians of a round's times, and of their ratios."""
    wide = Wide(prepare(root, ("fp32", "int8"))["int8"], threads)
    ways = (None, 12, 24)
    wide.text(), wide.explain(None)
    rows = [(wide.text(), [wide.explain(passes) for passes in ways]) for _ in range(rounds)]
    return [
        {
            "passes": "by default" if passes is None else passes,
            "runs": rows[0][1][way][1],
            "text s": median(text for text, _ in rows),
            "explanation s": median(explained[way][0] for _, explained in rows),
            "ratio": median(explained[way][0] / text for text, explained in rows),
        }
        for way, passes in enumerate(ways)
    ]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=140).print(table)


def main(
    bundle: Annotated[Path, typer.Option(help="Of the sample model.")] = SAMPLES / "bundle",
    pages: Annotated[int, typer.Option(min=2)] = 400,
    seed: int = 0,
    passes: Annotated[list[int] | None, typer.Option(help="Beside the default; may be repeated.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    wide: Annotated[bool, typer.Option("--wide", help="Time the wide model instead.")] = False,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    workdir: Annotated[Path | None, typer.Option(help="Keeps the wide model for the next run.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Writes every number to this file.")] = None,
) -> None:
    load = os.getloadavg()
    if wide:
        with tempfile.TemporaryDirectory() as temporary:
            rows = costs(workdir or Path(temporary), threads, rounds)
        show("Qwen2-VL-2B's widths, 7 layers, int8", rows)
    else:
        rows = [quality(bundle, pages, seed, threads, count) for count in (None, *(passes or ()))]
        show(str(bundle), rows)
    print(f"load before: {load[0]:.2f}")
    if json_path is not None:
        json_path.write_text(json.dumps({"hardware": hardware(threads), "load": load, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

"""Pages of made-up documents with questions about their content, as a data set or one by one while training.

    python samples/pages/generate.py OUT --split test --pages 1200

writes OUT/pages/*.jpg, queries.jsonl and qrels.tsv, the layout that `cembed eval` reads. Needs the Debian packages of
`fonts.py`; the message names what is missing.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Literal

import layouts
import numpy as np
import typer
from canvas import Canvas, Style, Word
from fonts import MissingFontsError
from layouts import Question, Size
from PIL import Image, ImageFilter
from words import Split

HELD_OUT_SHARE = 0.25
"""The share of test pages with layouts and faces that training never shows."""


COLLAGES = 0.65
"""The share of collages in the part `varied`."""
Part = Literal["walls", "seen", "varied", "unseen"]
KINDS: dict[Part, dict[layouts.Layout, tuple[Size, ...]]] = {
    "walls": layouts.WALLS,
    "seen": layouts.TRAINED,
    "varied": layouts.TRAINED | layouts.COLLAGES,
    "unseen": layouts.HELD_OUT,
}


@dataclass(frozen=True)
class Page:
    kind: str
    part: Part
    image: Image.Image
    words: list[Word]
    questions: list[Question]
    vocabulary: frozenset[str]

    def answers(self, question: Question) -> bool:
        return all(key.strip(",.:") in self.vocabulary for key in question.keys)


def make_page(seed: str, split: Split, part: Part = "seen", size: Size | None = None) -> Page:
    """The page of a seed. Tries again until the page bears what is asked about it."""
    random = Random(seed)
    known = KINDS[part]
    choices = [layout for layout, sizes in known.items() if size is None or size in sizes]
    while True:
        picks_collage = part == "varied" and random.random() < COLLAGES
        layout = layouts.collage if picks_collage else random.choice(choices)
        width, height = size or random.choice(known[layout])
        canvas = Canvas(width, height, Style.draw_lots(random, part == "unseen"), random)
        questions = layout(canvas, random, split)
        if part in ("walls", "varied") and random.random() < 0.5:
            canvas.distort(random.uniform(0.85, 1.2), random.uniform(0.9, 1.15), random.uniform(-0.12, 0.12))
        if random.random() < 0.5:
            canvas.rotate(random.gauss(0, 1.2))
        words = canvas.vocabulary()
        image = scan(canvas.image, random)
        page = Page(layout.__name__, part, image, canvas.words, questions, words)
        questions = [question for question in questions if page.answers(question)]
        if questions:
            return replace(page, questions=questions)


def scan(image: Image.Image, random: Random) -> Image.Image:
    """What a scanner or a camera does: uneven light, blur, noise, JPEG. A third of the pages stay as drawn."""
    if random.random() < 0.33:
        return image
    if random.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.2, 0.8)))
    pixels = np.asarray(image, dtype=np.float32)
    noise = np.random.default_rng(random.getrandbits(32))
    if random.random() < 0.5:
        slope = np.linspace(random.uniform(0.75, 1.0), random.uniform(0.75, 1.0), image.width, dtype=np.float32)
        pixels = pixels * slope[None, :, None]
    if random.random() < 0.5:
        pixels = pixels + noise.standard_normal((*pixels.shape[:2], 1), dtype=np.float32) * random.uniform(2, 14)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if random.random() < 0.5:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=random.randint(30, 90))
        image = Image.open(buffer, formats=["JPEG"])
        image.load()
    return image


def make_pages(split: Split, count: int, seed: int = 0) -> Iterator[Page]:
    """`count` pages; in the test split every fourth has layouts and faces that are held out."""
    every = round(1 / HELD_OUT_SHARE)
    for index in range(count):
        yield make_page(
            f"{split}-{seed}-{index}", split, "unseen" if split == "test" and index % every == 0 else "seen"
        )


def write_dataset(
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    split: Annotated[Split, typer.Option()] = "test",
    pages: Annotated[int, typer.Option(min=1)] = 1200,
    seed: int = 0,
) -> None:
    """One question about each page; every page that bears all of its keys is relevant."""
    (out / "pages").mkdir(parents=True)
    made = []
    for index, page in enumerate(make_pages(split, pages, seed)):
        name = f"{index:05}.jpg"
        page.image.save(out / "pages" / name, quality=90)
        made.append((name, page))
    random = Random(seed)
    with (out / "queries.jsonl").open("w") as queries, (out / "qrels.tsv").open("w") as qrels:
        qrels.write("query-id\tcorpus-id\tscore\n")
        for index, (_, page) in enumerate(made):
            question = random.choice(page.questions)
            row = {"_id": f"q{index:05}", "text": question.text, "part": page.part, "kind": page.kind}
            queries.write(json.dumps(row) + "\n")
            relevant = (name for name, other in made if other.answers(question))
            qrels.writelines(f"q{index:05}\t{name}\t1\n" for name in relevant)


if __name__ == "__main__":
    try:
        typer.run(write_dataset)
    except (MissingFontsError, FileExistsError) as error:
        sys.exit(str(error))

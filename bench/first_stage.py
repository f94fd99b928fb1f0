"""What a first stage keeps of the exact ten best pages: sign bits, recurrent ones, and fixed-dimensional encodings.

    python bench/first_stage.py BUNDLE DATASET --cache vectors.npz

Sign bits are also tried centred by the mean vector, rotated at random, and rotated by ITQ, which learns the rotation.
Recurrent ones (after BEBR, arXiv 2302.08714) are the signs of what is left when the signs before were taken off, each
round with one size. Fixed-dimensional encodings are MUVERA's (arXiv 2405.19504): sums of query vectors and means of
page vectors in the cells of random hyperplanes, projected by random signs, side by side; an empty cell of a page has
the page's nearest vector. Letters: N pages, K vectors of a page, D dim, C cells, W width of a projection.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cembed.runtime import Embedder, maxsim
from cembed.runtime.evaluate import Dataset, embed_corpus
from cembed.runtime.scoring.storage import STORAGE

Floats = NDArray[np.float32]
DEPTH = 10


def signs(vectors: Floats) -> Floats:
    return np.where(vectors < 0, -1, 1).astype(np.float32)


def recurrent(pages: Floats, rounds: int) -> Floats:
    rest, found = pages, np.zeros_like(pages)
    for _ in range(rounds):
        step = signs(rest) * np.abs(rest).mean()
        rest, found = rest - step, found + step
    return found


def rotation(dim: int) -> Floats:
    drawn = np.random.default_rng(0).standard_normal((dim, dim))
    return np.asarray(np.linalg.qr(drawn)[0], np.float32)


def learned_rotation(vectors: Floats, rounds: int = 30) -> Floats:
    """ITQ's: by turns the nearest signs, and the rotation that fits them best."""
    found = rotation(vectors.shape[1])
    for _ in range(rounds):
        left, _, right = np.linalg.svd(vectors.T @ signs(vectors @ found))
        found = np.asarray(left @ right, np.float32)
    return found


@dataclass(frozen=True)
class Encoding:
    """Of vectors [N, K, D] one vector each [N, repetitions * C * W]; C is 2 ** `planes`."""

    planes: int
    repetitions: int
    width: int

    def encode(self, vectors: Floats, documents: bool) -> Floats:
        generator = np.random.default_rng(0)
        parts = []
        for _ in range(self.repetitions):
            planes = generator.choice([-1, 1], (vectors.shape[2], self.planes)).astype(np.float32)
            projection = generator.choice([-1, 1], (vectors.shape[2], self.width)) / np.sqrt(self.width)
            cells = ((vectors @ planes > 0) << np.arange(self.planes)).sum(axis=2)
            parts.append(
                self._fill(cells, vectors @ projection.astype(np.float32), documents).reshape(len(vectors), -1)
            )
        return np.concatenate(parts, axis=1)

    def _fill(self, cells: NDArray[np.int64], projected: Floats, documents: bool) -> Floats:
        """Vectors [N, C, W] of cells: sums for queries; means, or the nearest vector, for documents."""
        every = np.arange(1 << self.planes)
        inside = (cells[:, :, None] == every).astype(np.float32)
        sums: Floats = inside.swapaxes(1, 2) @ projected
        if not documents:
            return sums
        counts = inside.sum(axis=1)[:, :, None]
        apart = np.array([number.bit_count() for number in every.tolist()])[cells[:, :, None] ^ every]
        nearest = np.take_along_axis(projected, apart.argmin(axis=1)[:, :, None], axis=1)
        return np.where(counts == 0, nearest, sums / np.maximum(counts, 1)).astype(np.float32)


def encoded_scores(encoding: Encoding, queries: Floats, pages: Floats) -> Floats:
    scores: Floats = encoding.encode(queries, documents=False) @ encoding.encode(pages, documents=True).T
    return scores


def contenders(queries: Floats, pages: Floats) -> Iterator[tuple[str, float, Callable[[], Floats]]]:
    """Name, bytes a page, and scores [queries, N]."""
    rows, dim = pages.shape[1:]
    mean = pages.reshape(-1, dim).mean(axis=0)
    turned, learned = rotation(dim), learned_rotation(pages.reshape(-1, dim)[::2])
    one = rows * dim / 8
    for name in ("f16", "u8"):
        restored = [STORAGE[name].restore(page) for page in pages]
        yield name, STORAGE[name].page_size(pages[0]), partial(maxsim, queries, restored)
    for name, given, stored in (
        ("signs", queries, signs(pages)),
        ("signs, centred", queries, signs(pages - mean)),
        ("signs, rotated", queries @ turned, signs(pages @ turned)),
        ("signs, rotation learned (ITQ)", queries @ learned, signs(pages @ learned)),
    ):
        yield name, one, partial(maxsim, given, stored)
    for rounds in (2, 3):
        yield f"recurrent, {rounds} rounds", rounds * one, partial(maxsim, queries, recurrent(pages, rounds))
        yield (
            f"recurrent, {rounds} rounds, centred",
            rounds * one,
            partial(maxsim, queries, recurrent(pages - mean, rounds)),
        )
    for encoding in (Encoding(3, 20, 16), Encoding(4, 10, 32), Encoding(4, 40, 16)):
        size = encoding.repetitions * encoding.width << encoding.planes
        name = f"MUVERA, {1 << encoding.planes} cells, {encoding.repetitions} x {encoding.width}"
        yield name, 4 * size, partial(encoded_scores, encoding, queries, pages)


def kept(scores: Floats, best: NDArray[np.int64], depth: int) -> tuple[float, float]:
    """Share of the exact ten in the first `depth`, and of questions that have all ten there."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    found = np.array([np.isin(exact, row).mean() for exact, row in zip(best, order, strict=True)])
    return float(found.mean()), float((found == 1).mean())


def vectors_of(bundle: Path, dataset: Path, cache: Path | None) -> tuple[Floats, Floats]:
    """Queries and pages; the latter must have equally many vectors each."""
    if cache is not None and cache.exists():
        with np.load(cache) as file:
            return file["queries"], file["pages"]
    embedder, data = Embedder.load(bundle), Dataset.read(dataset)
    pages, _ = embed_corpus(embedder, data, None, lambda done, total: None)
    found = np.stack([embedder.embed_query(data.queries[name]) for name in data.judged()]), np.stack([*pages.values()])
    if cache is not None:
        np.savez(cache, queries=found[0], pages=found[1])
    return found


def main(
    bundle: Path,
    dataset: Path,
    cache: Annotated[Path | None, typer.Option(help="Vectors are kept here, and taken from here.")] = None,
    depths: Annotated[str, typer.Option(help="Candidates.")] = "10,50,100",
    questions: Annotated[int | None, typer.Option(min=1, help="The first of them; all by default.")] = None,
) -> None:
    """Print what each keeps of the exact ten."""
    queries, pages = vectors_of(bundle, dataset, cache)
    queries, counts = queries[:questions], [int(depth) for depth in depths.split(",")]
    best = np.argsort(-maxsim(queries, pages), axis=1, kind="stable")[:, :DEPTH]
    table = Table(
        title=f"share of the exact {DEPTH}, and of questions with all: {len(pages)} pages, {len(queries)} questions"
    )
    for head in ("", "bytes a page", *(f"in {count}" for count in counts)):
        table.add_column(head, justify="right")
    for name, size, run in contenders(queries, pages):
        scores = run()
        cells = ("{:.4f}, {:.3f}".format(*kept(scores, best, count)) for count in counts)
        table.add_row(name, f"{size:,.0f}", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)

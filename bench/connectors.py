"""Pages in engines that people have: are the best ten those of exact MaxSim, and how fast do they go there?

    python bench/connectors.py DATA --bundle samples/bundle

DATA is a data set as `cembed eval` reads it. Its pages are embedded once, into an index of float32; then each engine is
filled with them in each of its types, and all questions are asked; LanceDB and PostgreSQL, which are slower, are asked
fewer. `equal` counts the questions whose ten best pages are, in this order, those of exact MaxSim of the vectors that
the engine keeps; where they are not, pages have changed places whose scores are `apart`. `overlap` is the share of the
ten best pages by the vectors as they were.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import engines
import numpy as np
import typer
from numpy.typing import NDArray
from pages import hardware
from rich.console import Console
from rich.table import Table

from cembed.runtime import Embedder, maxsim
from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.index.index import Index
from cembed.runtime.index.new_pages import NewPage
from cembed.runtime.page_vectors import EmbeddedPage, embed_documents
from cembed.runtime.scoring.storage import STORAGE
from cembed.scale.connectors.sources import IndexRows
from cembed.scale.connectors.target import Place, Scores, Target, connect
from cembed.scale.connectors.upload import Upload

TOP = 10
SLOW_QUESTIONS = 1200
"""Of engines that take tens of milliseconds each."""
FLOATS = ("f32", "f16")
LEVELS = next(name for name, storage in STORAGE.items() if storage.has_scale)


@dataclass(frozen=True)
class Case:
    """An engine with a type of numbers; `open` makes the target for a place."""

    engine: str
    storage: str
    open: Callable[[Place], Target]
    note: str = ""
    slow: bool = False

    @property
    def loses(self) -> bool:
        """Whether only the overlap is of interest."""
        return bool(self.note) or self.storage not in FLOATS


def cases() -> Iterator[Case]:
    import qdrant_edge as edge

    for storage in FLOATS:
        yield Case("qdrant, local mode", storage, lambda place: connect("qdrant", place))
        yield Case("qdrant-edge", storage, engines.edge)
        yield Case("LanceDB", storage, lambda place: connect("lance", place), slow=True)
        yield Case("pgvector", storage, lambda place: connect("pgvector", place), slow=True)
    yield Case("qdrant, local mode", LEVELS, lambda place: connect("qdrant", place))
    yield Case("qdrant-edge", LEVELS, engines.edge)
    scalar = edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8)
    binary = edge.BinaryQuantizationConfig()
    yield Case("qdrant-edge", "f32", lambda place: engines.edge(place, scalar), "its own int8")
    yield Case("qdrant-edge", "f32", lambda place: engines.edge(place, binary), "its own bits")


def embed(bundle: Path, data: Path, path: Path) -> tuple[IndexRows, list[Vectors]]:
    """An index of all pages in float32, and the questions."""
    embedder = Embedder.load(bundle, threads=1)
    lines = (data / "queries.jsonl").read_text().splitlines()
    with Index.create(path, dim=embedder.dim, bundle=embedder.bundle.hash, storage=["f32"]) as index:
        pages = (page for page in embed_documents(embedder, [data / "pages"]) if isinstance(page, EmbeddedPage))
        index.add((new_page(page) for page in pages), bundle=embedder.bundle.hash)
    return IndexRows(Index.open(path)), embedder.embed_queries([json.loads(line)["text"] for line in lines])


def new_page(page: EmbeddedPage) -> NewPage:
    return NewPage(f"{page.path}#{page.number}", page.vectors, page.path, page.number)


def best(scores: Scores) -> NDArray[np.int64]:
    """Numbers of the best pages, of the one with the lower number first where they are equal."""
    return np.argsort(-scores, kind="stable")[:TOP]


def apart(found: Sequence[int], scores: Scores) -> float:
    """How far the right scores of pages that were found are from those of the pages that belong in their places."""
    order = best(scores)
    return float(np.abs(scores[list(found)] - scores[order]).max()) if len(found) == len(order) else np.inf


def fill(case: Case, source: IndexRows, target: Target) -> tuple[Upload, float]:
    """The run, and its pages a second."""
    run, start = Upload(source, target), time.perf_counter()
    if case.note:
        run._verify = lambda: None  # type: ignore[method-assign] # scores of quantised numbers
    run.run(lambda _: None, lambda _: None)
    return run, run.sent / (time.perf_counter() - start)


def measure(case: Case, source: IndexRows, queries: list[Vectors], folder: Path, dsn: str) -> dict[str, Any]:
    schema = replace(source.schema, storage=case.storage)
    where = dsn if case.engine == "pgvector" else str(folder / "engine")
    asked = queries[:SLOW_QUESTIONS] if case.slow else queries
    with contextlib.closing(case.open(Place(where, schema, f"pages_{case.storage}"))) as target:
        run, rate = fill(case, source, target)
        points = [target.point(row) for row in source.rows()]
        start = time.perf_counter()
        answers = [target.search(query, TOP) or {} for query in asked]
        searched = (time.perf_counter() - start) / len(asked)
        number = {point.id: i for i, point in enumerate(points)}
        found = [[number[page] for page in answer] for answer in answers]
        kept = [] if case.loses else [target.exact(query, points) for query in asked]
    given = maxsim(asked, [page.vectors for page in source.rows() if page.vectors is not None])
    equal = [f == best(k).tolist() for f, k in zip(found, kept, strict=False)]
    others = [apart(f, k) for f, k, same in zip(found, kept, equal, strict=False) if not same]
    overlap = [len({*f} & {*best(g).tolist()}) / TOP for f, g in zip(found, given, strict=True)]
    return {
        "engine": case.engine,
        "type": case.note or case.storage,
        "questions": len(asked),
        "equal": sum(equal) if kept else "",
        "others apart by": f"{max(others):.1e}" if others else "",
        "overlap": f"{np.mean(overlap):.4f}",
        "checked": run.verified,
        "pages/s": f"{rate:.0f}",
        "ms": f"{searched * 1000:.1f}",
    }


def main(
    data: Annotated[Path, typer.Argument(metavar="DATA")],
    bundle: Annotated[Path, typer.Option()],
    out: Annotated[Path | None, typer.Option(metavar="FILE.json")] = None,
) -> None:
    """See the module."""
    rows = []
    with tempfile.TemporaryDirectory() as made, engines.postgres() as dsn:
        source, queries = embed(bundle, data, Path(made) / "index")
        for case in cases():
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(case, source, queries, Path(folder), dsn))
                print(rows[-1], flush=True)
        pages = source.survey().pages
    about = ", ".join(f"{name} {value}" for name, value in hardware(2).items())
    table = Table(title=f"{pages} pages; {about}", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("engine", "type") else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if out is not None:
        out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)

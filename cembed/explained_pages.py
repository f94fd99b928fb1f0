"""`cembed search --explain-pages`: pictures of where the pages that were found match."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cembed.display import complain
from cembed.pictures import make_folder, picture_path, save_picture
from cembed.ranking import Origin, RankedPages, Row
from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.embed.embedder import Budget, Embedder
from cembed.runtime.errors import CembedError
from cembed.runtime.pages.documents import Page, PageError, PageReader, place_of

CHANGED = 0.05  # of a score: by less it differs where vectors are stored rounded, or were merged


def explain_pages(embedder: Embedder, pages: RankedPages, rows: Iterable[Row], query: Vectors, folder: Path) -> bool:
    """Writes a picture of each page in `rows` into a folder; they get its path as `picture`.

    Whether all went well; there is a line on standard error about each page of which that is not so. Raises
    CembedError: a picture cannot be written.
    """
    make_folder(folder)
    with PageReader() as reader:
        outcomes = [explain_page(embedder, pages, row, query, folder, reader) for row in rows]
    for line in filter(None, outcomes):
        complain(line)
    return not any(outcomes)


def explain_page(
    embedder: Embedder, pages: RankedPages, row: Row, query: Vectors, folder: Path, reader: PageReader
) -> str | None:
    """What is wrong with a page."""
    origin = pages.origin(row)
    place = place_of(str(origin.path), origin.number)
    try:
        image = read_page(reader, origin).image
        found = embedder.explain(image, query, budget_of(embedder, origin, pages.dim))
        picture = found.picture(image)
    except CembedError as error:
        return f"not explained: {place}: {error}"
    path = picture_path(folder, row["rank"], row["path"], row["page"])
    save_picture(picture, path)
    row["picture"] = str(path)
    if abs(found.score - row["score"]) <= CHANGED * abs(row["score"]):
        return None
    return (
        f"not the page that was found: {place}: its score is {found.score:.4f} now, and was {row['score']:.4f}: the "
        "file was changed, or embedded with other settings"
    )


def read_page(reader: PageReader, origin: Origin) -> Page:
    """Raises CembedError: it is not there any more, or cannot be read."""
    page, count = reader.page(origin.path, origin.number)
    if 0 < count < origin.number:
        raise CembedError(f"the file has {count} pages now")
    if isinstance(page, PageError):
        raise CembedError(page.reason)
    return page


def budget_of(embedder: Embedder, origin: Origin, dim: int) -> Budget:
    """What the kept vectors were made with, as far as they show it."""
    side = embedder.manifest.document
    shown = side.num_vectors is not None and side.pooling == "none"
    return Budget(origin.vectors if shown else None, dim)

"""`cembed search`: pages are ranked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cembed.display import show_json, show_table
from cembed.options import EXIT_INCOMPLETE, AsJson, DecodeOption, Engine, as_decode, spread
from cembed.runtime.errors import CembedError
from cembed.streams import held_stderr


@spread
def search(
    *,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE_OR_INDEX",
            help="Made by `cembed embed` or `cembed index add`; or a pattern of indexes, as 'shelf-*'.",
        ),
    ],
    bundle: Annotated[Path, typer.Option(metavar="BUNDLE", help="The bundle that made the vectors.")],
    query: Annotated[str | None, typer.Argument(metavar="QUERY", help="What to look for.")] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Look for pages like this one, in place of QUERY.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Pages to show.")] = 5,
    query_vectors: Annotated[int | None, typer.Option(min=1, help="Vectors of the query; all by default.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Index only: pages with this metadata; may be repeated."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Index only: pages of files such as 'scans/2024/*'.")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Index only: pages that the first stage leaves to the next.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Index only: one exact stage over all pages.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Index only: show the stages of the search.")] = False,
    explain_pages: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a picture of each page that is shown, warm where it matches."),
    ] = None,
    decode: DecodeOption = None,
    engine: Engine,
    as_json: AsJson = False,
) -> None:
    """Rank the pages of a vector file or an index by MaxSim with a query.

    Exits with 3 if --explain-pages could not read all of the pages again, or found others in their place.
    """
    from cembed import ranking
    from cembed.explained_pages import explain_pages as write_pictures
    from cembed.runtime.embed.embedder import Budget

    pages = ranking.open_pages(file, ranking.Tuning(tuple(where or ()), source, candidates, exact, explain))
    if query is not None and image is not None:
        raise CembedError("QUERY and --image both say what to look for: give either of them")
    if query is None and image is None:
        raise CembedError("nothing to look for: give either a QUERY or an --image")
    embedder = engine.load(bundle, prepack=None)  # for one query
    if pages.bundle != embedder.bundle.hash:
        raise CembedError(f"{file} was made by another bundle than {bundle}: use that one, or embed the pages again")
    budget = Budget(query_vectors, pages.dim, as_decode(decode))
    with held_stderr():
        vectors = ranking.embed_image(embedder, image, budget) if image else embedder.embed_query(query or "", budget)
    rows, stages = pages.rank(vectors, top, engine.threads)
    whole = explain_pages is None or write_pictures(embedder, pages, rows, vectors, explain_pages)
    if as_json:
        show_json({"pages": rows, "stages": stages} if explain else rows)
    else:
        show_ranked(f"{query or str(image)!r} among {len(pages)} pages", rows, stages if explain else [])
    if not whole:
        raise typer.Exit(EXIT_INCOMPLETE)


def show_ranked(title: str, rows: list[dict[str, Any]], stages: list[dict[str, Any]]) -> None:
    some = [column for column in ("index", "warning") if any(column in row for row in rows)]
    show_table(title, ["rank", "score", "path", "page", *some], rows)
    if stages:
        show_table("stages of the search", ["stage", "pages", "kept", "ms", "bytes"], stages)

"""`cembed upload` and `cembed index export`: pages and their vectors into a database, or files for one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from cembed.display import complain, progress_bar, say
from cembed.options import EXIT_INCOMPLETE, one_of, require_packages, spread
from cembed.scale.connectors import TARGETS
from cembed.signals import Stopped, StopSignals

if TYPE_CHECKING:
    from cembed.scale.connectors.sources import Source
    from cembed.scale.connectors.upload import Upload
    from cembed.scale.rows import Row


@dataclass(frozen=True)
class Uploading:
    """Where pages go."""

    to: Annotated[
        str, typer.Option(metavar=one_of(list(TARGETS)), help="What takes the pages; see docs/connectors.md.")
    ]
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Folder, URL or connection string. For qdrant the key is QDRANT_API_KEY of the environment, for "
            "pgvector PLACE may be CEMBED_POSTGRES.",
        ),
    ] = None
    collection: Annotated[str, typer.Option(metavar="NAME", help="Collection, table or index in it.")] = "pages"
    storage: Annotated[
        str | None, typer.Option(metavar="TYPE", help="f32, f16 or u8, if the target has it; by default as they are.")
    ] = None
    batch: Annotated[int, typer.Option(metavar="MIB", min=1, help="Most bytes of a request or a file.")] = 32


@spread
def upload(
    rows: Annotated[str, typer.Argument(metavar="ROWS", help="Folder of parts, *.parquet or *.lance.")],
    uploading: Uploading,
) -> None:
    """Send the pages of a folder of parts to a database, or write files for one.

    What is there already stays, and a page that is another now takes the place of the old one: run it again to go on.
    Then some pages are queried, and their scores compared. The files of vespa-json and elastic-json are as documented,
    but were not run against an engine. Exits with 3 if some rows have no vectors.
    """
    require_packages("scale", "pyarrow")
    from cembed.scale.connectors.sources import PartRows

    send_pages(PartRows.open(rows), uploading)


def send_pages(source: Source, uploading: Uploading) -> None:
    """Sends what is not there yet, and says what was done, also of a run that ends early."""
    from cembed.scale.connectors.sources import stored_as
    from cembed.scale.connectors.target import MIB, Place, connect
    from cembed.scale.connectors.upload import Upload

    schema = stored_as(source.schema, uploading.storage)
    target = connect(uploading.to, Place(uploading.out, schema, uploading.collection, uploading.batch * MIB))
    run = Upload(source, target)
    try:
        with StopSignals() as signals, progress_bar() as progress:
            task = progress.add_task("sending", total=None)
            run.run(lambda pages: progress.update(task, total=pages), lambda pages: progress.advance(task, pages))
            signals.hold()
    except Stopped as stopped:
        stopped.message = f"interrupted: {counts(run)}; the same command goes on"
        raise
    finally:
        target.close()
        report_failed(run.failed, "sent")
    say(f"{target.where}: {counts(run)}")
    if run.failed:
        raise typer.Exit(EXIT_INCOMPLETE)


def counts(run: Upload) -> str:
    checked = f"; {run.verified} pages queried back, their scores are MaxSim's" if run.verified else ""
    return f"{run.sent} pages sent, {run.there} were there{checked}"


def report_failed(rows: list[Row], done: str) -> None:
    """A line for each row that has no vectors."""
    from cembed.runtime.pages.documents import place_of

    for row in rows:
        complain(f"not {done}: {place_of(row.path, row.page)}: {row.error or 'it has no vectors'}")

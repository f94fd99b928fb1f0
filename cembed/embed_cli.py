"""`cembed embed`: documents become a vector file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cembed.display import complain, progress_bar, say, tokens_text
from cembed.options import EXIT_INCOMPLETE, BundlePath, Engine, Force, PageVectors, Reading, spread
from cembed.runtime.errors import CembedError
from cembed.signals import Stopped, StopSignals

if TYPE_CHECKING:
    from cembed.harvest import Harvest
    from cembed.runtime.embed.embedder import Embedder


@spread
def embed(
    bundle: BundlePath,
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH", help="PDF and image files, or folders of them; with --cluster URIs as well."),
    ],
    out: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Vector file to write, .npz or .safetensors; or a folder of parts, .parquet or .lance."
        ),
    ],
    page_vectors: PageVectors,
    reading: Reading,
    engine: Engine,
    show_kept: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a picture of each page, what --skip-blank leaves unread in grey."),
    ] = None,
    storage: Annotated[
        str, typer.Option(metavar="TYPE", help="Folders of parts only: how vectors are kept: f32, f16 or u8.")
    ] = "f32",
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Folders of parts only: embed on the Ray cluster at this address; 'auto' is that of this machine, or "
            "one that is started.",
        ),
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="With --cluster: processes that embed; as many as there is room for.")
    ] = None,
    force: Force = False,
) -> None:
    """Embed the pages of documents into one vector file, or a folder of parts.

    Exits with 3 if some pages could not be read, or not without doubt. When it is interrupted, the pages so far are
    written; a folder of parts is gone on with by the same command.
    """
    from cembed.parts_run import Work, embed_on_cluster, embed_parts, is_parts

    if not is_parts(out):
        if cluster or actors:
            raise CembedError(f"--cluster writes a folder of parts: give --out {Path(out).with_suffix('.parquet')}")
        local = list(map(Path, paths))
        embed_file(bundle, local, Path(out), page_vectors, reading, engine, show_kept, force)
        return
    if show_kept or force:
        raise CembedError("--show-kept and --force are for vector files: leave them out, or remove the folder yourself")
    work = Work(bundle, paths, page_vectors, reading, engine)
    if cluster is None:
        embed_parts(work, out, storage)
    else:
        embed_on_cluster(work, out, storage, cluster, actors)


def embed_file(
    bundle: Path,
    paths: list[Path],
    out: Path,
    page_vectors: PageVectors,
    reading: Reading,
    engine: Engine,
    show_kept: Path | None,
    force: bool,
) -> None:
    """Embeds into a vector file, which is held in memory until its end."""
    from cembed.harvest import Harvest
    from cembed.kept_pages import kept_folder, shown_pages
    from cembed.parts_run import check_small
    from cembed.runtime.bundle.vectors import check_writable
    from cembed.runtime.page_vectors import embed_pages
    from cembed.runtime.pages.documents import find_documents

    check_writable(out, force)
    files = find_documents(paths)
    embedder = engine.load(bundle, page_vectors.max_visual_tokens, skip_blank=page_vectors.skip_blank)
    folder = kept_folder(show_kept, embedder) if show_kept else None
    budget = page_vectors.budget()
    embedder.prepare("document", budget)
    harvest = Harvest(out, embedder.bundle.hash)
    with StopSignals() as signals:
        with reading.reader() as reader, progress_bar() as progress:
            harvest.total = reader.count_pages(files)
            check_small(harvest.total, out)
            task = progress.add_task("embedding", total=harvest.total)
            read = reader.read(files)
            pages = embed_pages(embedder, shown_pages(embedder, read, folder) if folder else read, budget)
            ended = harvest.run(pages, signals, lambda: progress.advance(task))
        finish(harvest, ended, embedder)


def finish(harvest: Harvest, ended: BaseException | None, embedder: Embedder) -> None:
    """Writes what there is, and says what there is not; `ended` is what ended the run before the last page."""
    try:
        if harvest.pages:
            harvest.save()
    finally:
        harvest.report()
    if isinstance(ended, Stopped):
        ended.message = f"interrupted {harvest.stopped()}"
    elif ended is not None:
        complain(f"ended {harvest.stopped()}")
    if ended is not None:
        raise ended
    if not harvest.pages:
        raise CembedError(f"none of the {harvest.seen} pages could be embedded: {harvest.out} was not written")
    rows, dim = sum(len(page.vectors) for page in harvest.pages), harvest.pages[0].vectors.shape[1]
    size = harvest.out.stat().st_size
    read = tokens_text(embedder, before="; ")
    say(f"{harvest.out}: {len(harvest.pages)} pages, {rows} vectors of {dim}, {size:,} bytes{read}")
    if harvest.doubtful:
        raise typer.Exit(EXIT_INCOMPLETE)

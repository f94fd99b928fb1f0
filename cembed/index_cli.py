"""`cembed index`: adding to an index, removing from it, and looking after it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cembed.display import Cell, complain, progress_bar, say, show_json, show_table, tokens_text
from cembed.inspect_cli import show_checks
from cembed.options import (
    EXIT_INCOMPLETE,
    AsJson,
    Engine,
    PageVectors,
    Paths,
    Reading,
    settings_of,
    split,
    spread,
)
from cembed.runtime.errors import CembedError

if TYPE_CHECKING:
    from cembed.index_job import Job
    from cembed.runtime.embed.embedder import Embedder
    from cembed.runtime.index.index import Index
    from cembed.runtime.index.reader import Stats
    from cembed.runtime.pages.documents import PageReader

MANY_RECORDS = 5000  # take about a third of a second to read on a busy machine

index_app = typer.Typer(
    name="index", help="Keep the vectors of many pages on disk, and search them.", no_args_is_help=True
)
IndexPath = Annotated[Path, typer.Argument(metavar="INDEX", help="Folder made by `cembed index add`.")]


@index_app.command()
@spread
def add(
    *,
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="Folder to add to; made if it is not there.")],
    paths: Paths,
    bundle: Annotated[Path, typer.Option(metavar="BUNDLE", help="Directory made by `cembed export`.")],
    storage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE,…", help="How a new index keeps vectors: f32, f16, u8, bits; by default f16, u8 and bits."
        ),
    ] = None,
    store: Annotated[list[str] | None, typer.Option(hidden=True, help="What --storage was called.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Goes with every page, for filters; may be repeated.")
    ] = None,
    page_vectors: PageVectors,
    reading: Reading,
    engine: Engine,
) -> None:
    """Embed the pages of documents into an index. Pages that are there, unchanged, are skipped.

    What was added stays when the command is interrupted: run it again to go on. A file that cannot be read leaves the
    index as it is. Without --metadata, pages that are there keep theirs. Exits with 3 if some pages could not be read,
    or not without doubt.
    """
    from cembed.index_job import FLUSH_PAGES, Job
    from cembed.ranking import parse_pairs
    from cembed.runtime.index.metadata import check_metadata
    from cembed.runtime.pages.documents import find_documents

    files, pairs = find_documents(paths), parse_pairs("--metadata", tuple(metadata or ()))
    check_metadata(pairs)
    embedder = engine.load(bundle, page_vectors.max_visual_tokens, skip_blank=page_vectors.skip_blank)
    budget = page_vectors.budget()
    embedder.check(embedder.manifest.document, budget)
    kept = split([*(storage or ()), *(store or ())])
    with open_to_add(index, embedder, page_vectors.dim, kept) as opened, reading.reader() as reader:
        job = Job(
            index=opened,
            embedder=embedder,
            budget=budget,
            settings=settings_of(page_vectors, reading, embedder.inputs.image.skip_blank),
            metadata=pairs or None,
        )
        work(job, reader, files)
        stats = opened.stats()
    say(f"{index}: {summary(job, stats)}")
    if stats.records > MANY_RECORDS and stats.pages < FLUSH_PAGES * stats.records:
        complain(f"it opens faster after `cembed index compact {index}`: the log has {stats.records} small records")
    if job.failures or job.warnings:
        raise typer.Exit(EXIT_INCOMPLETE)


def work(job: Job, reader: PageReader, files: Sequence[Path]) -> None:
    """Adds the pages, and tells what is amiss, also of a run that ends early: it is not told again."""
    try:
        with progress_bar() as progress:
            total = job.plan(reader, files)
            if total:
                job.embedder.prepare("document", job.budget)
            task = progress.add_task("embedding", total=total)
            job.run(reader, lambda: progress.advance(task))
    finally:
        report(job)


def report(job: Job) -> None:
    for failure in job.failures:
        complain(f"not embedded: {failure}")
    for warning in job.warnings:
        complain(f"warning: {warning}")
    for note in job.notes:
        complain(note)


def summary(job: Job, stats: Stats) -> str:
    """What was done, and what there is now."""
    parts = {
        f"{job.added} pages added, {job.skipped + job.changed} were there": True,
        f"{stats.pages} pages, {sum(stats.bytes.values()):,} bytes": True,
        f"{job.shared} of the added without embedding, as their content was there": job.shared,
        f"metadata of {job.changed} changed": job.changed,
        f"{job.removed} removed that their files do not have any more": job.removed,
        f"{stats.warnings} with a warning": stats.warnings,
        tokens_text(job.embedder): tokens_text(job.embedder),
    }
    return "; ".join(part for part, there in parts.items() if there)


def open_to_add(path: Path, embedder: Embedder, dim: int | None, storage: Sequence[str]) -> Index:
    """The index at `path`, or a new one for the bundle of `embedder`, in the usual storage types if none are given.

    Raises CembedError: it is of another bundle, or dim.
    """
    from cembed.runtime.index.files import CURRENT
    from cembed.runtime.index.index import DEFAULT_STORAGE, Index

    if not os.path.lexists(path / CURRENT):
        return Index.create(
            path, dim=dim or embedder.dim, bundle=embedder.bundle.hash, storage=storage or DEFAULT_STORAGE
        )
    index = Index.open(path, write=True)
    for note in index.notes:
        complain(note)
    try:
        index.check_bundle(embedder.bundle.hash)
        if index.dim != (dim or embedder.dim):
            raise CembedError(f"{path} has vectors of dim {index.dim}, these would have {dim or embedder.dim}")
    except CembedError:
        index.close()
        raise
    return index


@index_app.command()
def remove(
    index: IndexPath,
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Ids, files, or patterns of files such as 'scans/2019/*'.")
    ],
) -> None:
    """Take pages out of an index. Their bytes go with `cembed index compact`."""
    from cembed.runtime.index.index import Index

    with Index.open(index, write=True) as opened:
        ids = dict.fromkeys(page for name in names for page in find_pages(opened, name))
        count = opened.remove(ids)
    say(f"{index}: {count} pages removed")


def find_pages(index: Index, name: str) -> Iterator[str]:
    """Ids of the pages that `name` means. Raises CembedError: there is none."""
    import glob

    from cembed.index_job import Sources

    if name in index:
        yield name
        return
    found = index.find(source=glob.escape(name)) or index.find(source=name)
    if found:
        yield from (page.id for page in found)
        return
    sources, (path, _, number) = Sources(index), name.rpartition("#")
    file, page = sources.find(name), f"{sources.find(path)}#{number}"
    if file is not None:
        yield from (page.id for page in index.find(source=glob.escape(file)))
    elif page in index:
        yield page
    else:
        raise CembedError(f"{name} is neither a page nor a file in {index.folder}")


@index_app.command()
def compact(
    index: IndexPath,
    drop_damaged: Annotated[
        bool, typer.Option("--drop-damaged", help="Also drop damaged pages, each of which is named.")
    ] = False,
) -> None:
    """Write an index anew without removed pages. Needs room for both; searches go on meanwhile."""
    from cembed.runtime.index.index import Index

    with Index.open(index, write=True, damaged=drop_damaged) as opened:
        done = opened.compact(drop_damaged=drop_damaged)
    for page in done.dropped:
        complain(f"dropped: {page}")
    say(f"{index}: {done.pages} pages, {done.bytes_before:,} to {done.bytes_after:,} bytes")


@index_app.command()
def verify(index: IndexPath, as_json: AsJson = False) -> None:
    """Check every CRC of an index, and say exactly what is damaged."""
    from cembed.runtime.index.verify import verify_index

    show_checks(verify_index(index), as_json)


@index_app.command()
def stats(index: IndexPath, as_json: AsJson = False) -> None:
    """Show what an index holds, and what it takes."""
    from cembed.runtime.index.index import Index

    found = Index.open(index).stats()
    if as_json:
        show_json(asdict(found))
        return
    sizes = [f"{name}  {size:,}" for name, size in found.bytes.items()]
    fields: dict[str, Cell] = {
        "pages": f"{found.pages}, and {found.removed} removed",
        "with a warning": str(found.warnings),
        "vectors": f"{found.vectors} of {found.dim}",
        "bundle": found.bundle,
        "segments": f"{found.segments}, {found.records} records",
        "bytes": sizes,
        "bytes a page": f"{found.bytes_per_page:,.0f}",
    }
    show_table(str(index), ["field", "value"], [{"field": key, "value": value} for key, value in fields.items()])

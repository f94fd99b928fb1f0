"""`cembed index`: adding to an index, removing from it, and looking after it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cembed import __version__
from cembed.display import Cell, complain, progress_bar, say, show_json, show_table, tokens_text
from cembed.inspect_cli import show_checks
from cembed.options import (
    EXIT_INCOMPLETE,
    AsJson,
    Engine,
    PageVectors,
    Reading,
    RetryFailed,
    SkipBlankPages,
    require_packages,
    settings_of,
    split,
    spread,
)
from cembed.runtime.errors import CembedError
from cembed.signals import Stopped, StopSignals
from cembed.upload_cli import Uploading, report_failed, send_pages

if TYPE_CHECKING:
    from cembed.runtime.embed.embedder import Embedder
    from cembed.runtime.index.index import Index
    from cembed.runtime.index.reader import Stats
    from cembed.runtime.intake.job import Job
    from cembed.runtime.intake.ledger import Ledger

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
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="PATH", help="PDF and image files, or folders of them.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Directory made by `cembed export`; PATH needs it.")
    ] = None,
    from_parquet: Annotated[
        str | None,
        typer.Option(
            metavar="ROWS", help="In place of PATH: a folder of parts, *.parquet or *.lance, whose vectors are taken."
        ),
    ] = None,
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
    skip_blank_pages: SkipBlankPages = False,
    retry_failed: RetryFailed = False,
    page_vectors: PageVectors,
    reading: Reading,
    engine: Engine,
) -> None:
    """Embed the pages of documents into an index. Pages that are there, unchanged, are skipped.

    What was added stays when the command is interrupted: run it again to go on. A file that cannot be read leaves the
    index as it is, and is not tried again until it changes. One that was moved keeps its vectors and gets its new path.
    Without --metadata, pages that are there keep theirs. With --from-parquet nothing is embedded, and options of
    embedding do not count. Exits with 3 if some pages could not be read now, or not without doubt.
    """
    from cembed.runtime.index.metadata import check_metadata, parse_pairs
    from cembed.runtime.intake.job import FLUSH_PAGES, Job, LocalPages
    from cembed.runtime.intake.ledger import Ledger
    from cembed.runtime.intake.opening import reading_of
    from cembed.runtime.pages.documents import find_documents

    pairs, kept = parse_pairs("--metadata", tuple(metadata or ())), split([*(storage or ()), *(store or ())])
    check_metadata(pairs)
    check_given(paths, bundle, from_parquet)
    if from_parquet is not None:
        add_rows(index, from_parquet, bundle, kept, pairs or None)
        return
    assert bundle is not None
    files = find_documents(paths or [])
    embedder = engine.load(bundle, page_vectors.max_visual_tokens, skip_blank=page_vectors.skip_blank)
    budget = page_vectors.budget()
    embedder.check(embedder.manifest.document, budget)
    settings = settings_of(page_vectors, reading, embedder.inputs.image.skip_blank)
    with (
        open_to_add(index, embedder, page_vectors.dim, kept) as opened,
        Ledger.beside(index, write=True) as ledger,
        reading.reader() as reader,
    ):
        ledger.adopt(**reading_of(opened, settings, skip_blank_pages, __version__))
        if retry_failed:
            ledger.forget_contents()
        pages = LocalPages(embedder, reader, budget, skip_blank_pages)
        job = Job(index=opened, pages=pages, settings=settings, metadata=pairs or None, known=ledger.content)
        work(job, files, ledger)
        stats = opened.stats()
    say(f"{index}: {summary(job, stats, tokens_text(embedder))}")
    if stats.records > MANY_RECORDS and stats.pages < FLUSH_PAGES * stats.records:
        complain(f"it opens faster after `cembed index compact {index}`: the log has {stats.records} small records")
    if job.failures or job.warnings:
        raise typer.Exit(EXIT_INCOMPLETE)


def work(job: Job, files: Sequence[Path], ledger: Ledger) -> None:
    """Adds the pages, and tells what is amiss, also of a run that ends early: it is not told again."""
    try:
        with progress_bar() as progress:
            total = job.plan(files)
            if total:
                job.pages.prepare()
            task = progress.add_task("embedding", total=total)
            job.run(lambda: progress.advance(task))
        note_results(job, ledger)
    finally:
        report(job)


def note_results(job: Job, ledger: Ledger) -> None:
    with ledger.changing():
        ledger.forget(job.left)
        for result in job.results.values():
            if result.retry is None:
                ledger.learn(result.document.digest, result.content)
                ledger.put(result.entry(job.indexed(result.document), time.time()))


def report(job: Job) -> None:
    for failure in job.failures:
        complain(f"not embedded: {failure}")
    for warning in job.warnings:
        complain(f"warning: {warning}")
    for note in job.notes:
        complain(note)


def summary(job: Job, stats: Stats, tokens: str) -> str:
    """What was done, and what there is now."""
    parts = {
        f"{job.added} pages added, {job.skipped + job.changed} were there": True,
        f"{stats.pages} pages, {sum(stats.bytes.values()):,} bytes": True,
        f"{job.shared} of the added without embedding, as their content was there": job.shared,
        f"metadata of {job.changed} changed": job.changed,
        f"{job.removed} removed that their files do not have any more": job.removed,
        f"{stats.warnings} with a warning": stats.warnings,
        f"{job.moved} files moved": job.moved,
        f"{job.blank} blank pages left out": job.blank,
        f"{job.failed_before} could not be read before (see cembed status, --retry-failed)": job.failed_before,
        tokens: tokens,
    }
    return "; ".join(part for part, there in parts.items() if there)


def open_to_add(path: Path, embedder: Embedder, dim: int | None, storage: Sequence[str]) -> Index:
    """The index at `path`, or a new one for the bundle of `embedder`, in the usual storage types if none are given.

    Raises CembedError: it is of another bundle, or dim.
    """
    return open_for(path, embedder.bundle.hash, dim or embedder.dim, storage)


def open_for(path: Path, bundle: str, dim: int, storage: Sequence[str]) -> Index:
    """`open_to_add` for vectors of a bundle by its hash."""
    from cembed.runtime.intake.opening import open_or_create

    index = open_or_create(path, bundle=bundle, dim=dim, storage=storage)
    for note in index.notes:
        complain(note)
    return index


def check_given(paths: Sequence[Path] | None, bundle: Path | None, rows: str | None) -> None:
    """Raises CembedError: neither documents with a bundle nor rows, or both."""
    if rows is not None and paths:
        raise CembedError(f"--from-parquet {rows} has vectors already: leave out PATH {paths[0]}, or --from-parquet")
    if rows is None and not paths:
        raise CembedError("there is nothing to add: give PATH, documents to embed, or --from-parquet ROWS")
    if rows is None and bundle is None:
        raise CembedError("documents are embedded with a bundle: give --bundle, or --from-parquet in place of PATH")


def add_rows(
    path: Path, rows: str, bundle: Path | None, storage: Sequence[str], metadata: Mapping[str, Any] | None
) -> None:
    """Adds rows to the index at `path`, or a new one. Rows that are there already are skipped.

    Raises CembedError: rows of another bundle than `bundle` or the index.
    """
    require_packages("scale", "pyarrow")
    from cembed.runtime.bundle.bundle import Bundle
    from cembed.scale.connectors.into_index import IntoIndex
    from cembed.scale.connectors.sources import PartRows

    source = PartRows.open(rows)
    survey, schema = source.survey(), source.schema
    if bundle is not None and Bundle(bundle, verify=False).hash != schema.bundle:
        raise CembedError(f"{rows} has vectors of bundle {schema.bundle[:12]}, {bundle} is another: leave out --bundle")
    with open_for(path, schema.bundle, schema.dim, storage) as opened:
        run = IntoIndex(source, opened, metadata)
        try:
            with StopSignals(), progress_bar() as progress:
                task = progress.add_task("adding", total=survey.pages)
                done = run.run(survey, lambda: progress.advance(task))
        except Stopped as stopped:
            stopped.message = "interrupted: what was added stays; the same command goes on"
            raise
        finally:
            report_failed(run.failed, "added")
        stats = opened.stats()
    there = f"{done.skipped} were there" + (f", {done.changed} with other metadata" if done.changed else "")
    say(f"{path}: {done.added} pages added, {there}; {stats.pages} pages, {sum(stats.bytes.values()):,} bytes")
    if run.failed:
        raise typer.Exit(EXIT_INCOMPLETE)


@index_app.command()
@spread
def export(index: IndexPath, uploading: Uploading) -> None:
    """Send the pages of an index to a database, or write them as a folder of parts or files for a database.

    Vectors are those of its most exact storage type. What is there already stays, and a page that is another now takes
    the place of the old one: run it again to go on. Pages that left the index stay there. Then some pages are queried,
    and their scores compared. The files of vespa-json and elastic-json are as documented, but were not run against an
    engine.
    """
    require_packages("scale", "pyarrow")
    from cembed.scale.connectors.sources import open_index

    send_pages(open_index(index), uploading)


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

    from cembed.runtime.intake.sources import Sources

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

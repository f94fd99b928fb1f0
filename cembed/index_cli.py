"""`cembed index`: adding to an index, removing from it, and looking after it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cembed.cli import (
    EXIT_INCOMPLETE,
    MAX_PIXELS,
    AsJson,
    DecodeOption,
    Dpi,
    MaxPixels,
    MaxVisualTokens,
    NumVectors,
    Paths,
    PoolFactor,
    Providers,
    Threads,
    Timeout,
    VectorDim,
    as_decode,
    complain,
    show_checks,
)
from cembed.display import progress_bar, show_table
from cembed.runtime.errors import CembedError

if TYPE_CHECKING:
    from cembed.runtime.documents import Page, PageReader
    from cembed.runtime.embedder import Budget, Embedder
    from cembed.runtime.index import Index
    from cembed.runtime.new_pages import NewPage

FLUSH_SECONDS = 2.0  # of embedding, at most, are lost when the process is killed
FLUSH_PAGES = 64
MANY_RECORDS = 5000  # take about a third of a second to read on a busy machine

index_app = typer.Typer(
    name="index", help="Keep the vectors of many pages on disk, and search them.", no_args_is_help=True
)
IndexPath = Annotated[Path, typer.Argument(metavar="INDEX", help="Folder made by `cembed index add`.")]


@index_app.command()
def add(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="Folder to add to; made if it is not there.")],
    paths: Paths,
    bundle: Annotated[Path, typer.Option(metavar="BUNDLE", help="Directory made by `cembed export`.")],
    store: Annotated[
        str,
        typer.Option(metavar="TYPE,TYPE,…", help="How a new index keeps vectors: f32, f16, u8, bits, one or more."),
    ] = "f16,u8,bits",
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Goes with every page, for filters; may be repeated.")
    ] = None,
    num_vectors: NumVectors = None,
    max_visual_tokens: MaxVisualTokens = None,
    dpi: Dpi = 144,
    timeout: Timeout = 60,
    max_pixels: MaxPixels = MAX_PIXELS,
    dim: VectorDim = None,
    decode: DecodeOption = None,
    pool_factor: PoolFactor = 1,
    provider: Providers = None,
    threads: Threads = None,
) -> None:
    """Embed the pages of documents into an index. Pages that are there, unchanged, are skipped.

    What was added stays when the command is interrupted: run it again to go on. Exits with 3 if some pages could not be
    read.
    """
    from cembed.ranking import parse_pairs
    from cembed.runtime.documents import PageReader, find_documents
    from cembed.runtime.embedder import CPU, Budget, Embedder

    files, pairs = find_documents(paths), parse_pairs("--metadata", tuple(metadata or ()))
    embedder = Embedder.load(bundle, providers=provider or CPU, threads=threads, max_visual_tokens=max_visual_tokens)
    budget = Budget(num_vectors, dim, as_decode(decode), pool_factor)
    embedder.check(embedder.manifest.document, budget)
    settings = [num_vectors, dim, pool_factor, max_visual_tokens, dpi]
    settings += [max_pixels] if max_pixels != MAX_PIXELS else []  # so pages of indexes that are there stay known
    reading = PageReader(dpi=dpi, timeout=timeout, max_pixels=max_pixels)
    with open_to_add(index, embedder, dim, store.split(",")) as opened, reading as reader:
        job = Job(opened, embedder, budget, json.dumps(settings), pairs)
        with progress_bar() as progress:
            total = job.plan(reader, files)
            task = progress.add_task("embedding", total=total)
            job.run(reader, lambda: progress.advance(task))
        for failure in job.failures:
            complain(f"not embedded: {failure}")
        stats = opened.stats()
    typer.echo(
        f"{index}: {job.added} pages added, {job.skipped} were there; {stats.pages} pages, "
        f"{sum(stats.bytes.values()):,} bytes"
    )
    if stats.records > MANY_RECORDS and stats.pages < FLUSH_PAGES * stats.records:
        complain(f"it opens faster after `cembed index compact {index}`: the log has {stats.records} small records")
    if job.failures:
        raise typer.Exit(EXIT_INCOMPLETE)


def open_to_add(path: Path, embedder: Embedder, dim: int | None, store: Sequence[str]) -> Index:
    """The index at `path`, or a new one for the bundle of `embedder`. Raises CembedError: it is of another bundle."""
    from cembed.runtime.index import Index
    from cembed.runtime.index_files import CURRENT

    if not (path / CURRENT).exists():
        return Index.create(path, dim=dim or embedder.dim, bundle=embedder.bundle.hash, store=store)
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


@dataclass
class Job:
    """One run of `add`. A page's content is its file's bytes, its number, and the settings it is embedded with."""

    index: Index
    embedder: Embedder
    budget: Budget
    settings: str
    metadata: dict[str, Any]
    added: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    hashes: dict[str, bytes] = field(default_factory=dict)
    waiting: list[NewPage] = field(default_factory=list)
    flushed: float = field(default_factory=time.monotonic)

    def plan(self, reader: PageReader, files: Sequence[Path]) -> int:
        """Finds the files that have pages to embed, and gives the number of pages in them."""
        total = 0
        for file in files:
            try:
                self.hashes[str(file)] = hash_file(file)
            except OSError as error:
                self.failures.append(f"{file}: {error.strerror}")
                continue
            count = reader.count_pages([file])
            if all(self.knows(str(file), page) for page in range(1, count + 1)):
                self.skipped += count
                del self.hashes[str(file)]
                continue
            total += count
            self.remove_behind(str(file), count)
        return total

    def knows(self, path: str, page: int) -> bool:
        return self.index.knows(f"{path}#{page}", self.content(path, page))

    def content(self, path: str, page: int) -> bytes:
        return hashlib.sha256(self.hashes[path] + f"{page} {self.settings}".encode()).digest()[:16]

    def remove_behind(self, path: str, count: int) -> None:
        """Removes pages that the file does not have any more."""
        page = count + 1
        while f"{path}#{page}" in self.index:
            self.index.remove([f"{path}#{page}"])
            page += 1

    def run(self, reader: PageReader, done: Callable[[], None]) -> None:
        from cembed.runtime.documents import Page

        for page in reader.read(list(self.hashes)):
            if isinstance(page, Page):
                self.embed(page)
            else:
                self.failures.append(f"{name_of(page.path, page.number)}: {page.reason}")
            done()
        self.flush()

    def embed(self, page: Page) -> None:
        from cembed.runtime.new_pages import NewPage

        if self.knows(page.path, page.number):
            self.skipped += 1
            return
        try:
            vectors = self.embedder.embed_image(page.image, self.budget)
        except CembedError as error:
            self.failures.append(f"{name_of(page.path, page.number)}: {error}")
            return
        name, content = f"{page.path}#{page.number}", self.content(page.path, page.number)
        self.waiting.append(NewPage(name, vectors, page.path, page.number, self.metadata, content))
        if len(self.waiting) >= FLUSH_PAGES or time.monotonic() > self.flushed + FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Makes what was embedded durable."""
        done = self.index.add(self.waiting, bundle=self.embedder.bundle.hash)
        self.added, self.skipped = self.added + done.added, self.skipped + done.skipped
        self.waiting, self.flushed = [], time.monotonic()


def name_of(path: str, page: int | None) -> str:
    return path if page is None else f"{path}, page {page}"


def hash_file(path: Path) -> bytes:
    from cembed.runtime.bundle import sha256

    return bytes.fromhex(sha256(path))


@index_app.command()
def remove(
    index: IndexPath,
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Ids, files, or patterns of files such as 'scans/2019/*'.")
    ],
) -> None:
    """Take pages out of an index. Their bytes go with `cembed index compact`."""
    from cembed.runtime.index import Index

    with Index.open(index, write=True) as opened:
        ids = dict.fromkeys(page for name in names for page in find_pages(opened, name))
        count = opened.remove(ids)
    typer.echo(f"{index}: {count} pages removed")


def find_pages(index: Index, name: str) -> Iterator[str]:
    """Ids of the pages that `name` means. Raises CembedError: there is none."""
    import glob

    if name in index:
        yield name
        return
    found = index.find(source=glob.escape(name)) or index.find(source=name)
    if not found:
        raise CembedError(f"{name} is neither a page nor a file in {index.folder}")
    yield from (page.id for page in found)


@index_app.command()
def compact(
    index: IndexPath,
    drop_damaged: Annotated[
        bool, typer.Option("--drop-damaged", help="Also drop damaged pages, each of which is named.")
    ] = False,
) -> None:
    """Write an index anew without removed pages. Needs room for both; searches go on meanwhile."""
    from cembed.runtime.index import Index

    with Index.open(index, write=True, damaged=drop_damaged) as opened:
        done = opened.compact(drop_damaged=drop_damaged)
    for page in done.dropped:
        complain(f"dropped: {page}")
    typer.echo(f"{index}: {done.pages} pages, {done.bytes_before:,} to {done.bytes_after:,} bytes")


@index_app.command()
def verify(index: IndexPath, as_json: AsJson = False) -> None:
    """Check every CRC of an index, and say exactly what is damaged."""
    from cembed.runtime.index_verify import verify_index

    show_checks(verify_index(index), as_json)


@index_app.command()
def stats(index: IndexPath, as_json: AsJson = False) -> None:
    """Show what an index holds, and what it takes."""
    from cembed.runtime.index import Index

    found = Index.open(index).stats()
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
        return
    sizes = "\n".join(f"{name}  {size:,}" for name, size in found.bytes.items())
    fields = {
        "pages": f"{found.pages}, and {found.removed} removed",
        "vectors": f"{found.vectors} of {found.dim}",
        "bundle": found.bundle,
        "segments": f"{found.segments}, {found.records} records",
        "bytes": sizes,
        "bytes a page": f"{found.bytes_per_page:,.0f}",
    }
    show_table(str(index), ["field", "value"], [{"field": key, "value": value} for key, value in fields.items()])

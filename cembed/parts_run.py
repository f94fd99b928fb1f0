"""`cembed embed --out DIR.parquet`: rows in parts, which a run that was ended goes on with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cembed.display import complain, progress_bar, say, tokens_text
from cembed.options import EXIT_INCOMPLETE, Engine, PageVectors, Reading, loading_fields, require_packages, settings_of
from cembed.scale import SUFFIXES
from cembed.signals import StopSignals

if TYPE_CHECKING:
    from cembed.runtime.bundle.bundle import Bundle
    from cembed.runtime.embed.embedder import Embedder
    from cembed.scale.cluster import Progress
    from cembed.scale.embed import WorkerOptions
    from cembed.scale.rows import RowSchema

MANY_PAGES = 50_000


def is_parts(out: str) -> bool:
    return out.rstrip("/").endswith(SUFFIXES)


@dataclass(frozen=True)
class Work:
    """What `cembed embed` was told, but for where rows go."""

    bundle: Path
    paths: list[str]
    page_vectors: PageVectors
    reading: Reading
    engine: Engine

    def load(self) -> Embedder:
        return self.engine.load(
            self.bundle, self.page_vectors.max_visual_tokens, skip_blank=self.page_vectors.skip_blank
        )

    def schema(self, bundle: Bundle, storage: str) -> RowSchema:
        """Of the rows that this makes. Raises CembedError: vectors that the bundle does not make."""
        from cembed.runtime.embed.embedder import check_slots
        from cembed.scale.rows import RowSchema

        side, budget = bundle.manifest.document, self.page_vectors.budget()
        check_slots(side, budget)
        dim = budget.dim or side.vector_dim(bundle.manifest.dim, budget.num_vectors)
        chosen = self.page_vectors.skip_blank
        skips = bundle.manifest.image.skip_blank if chosen is None else chosen
        return RowSchema(dim, bundle.hash, settings_of(self.page_vectors, self.reading, skips), storage)

    def options(self, schema: RowSchema) -> WorkerOptions:
        """For processes that make such rows."""
        from cembed.scale.embed import WorkerOptions

        fields = loading_fields(self.bundle, self.page_vectors, self.reading, self.engine)
        threads = self.engine.threads or 1
        return WorkerOptions(**fields, threads=threads, schema=schema, budget=self.page_vectors.budget())


def embed_parts(work: Work, out: str, storage: str) -> None:
    """Embeds what `out` does not have yet. Raises CembedError: it has rows of another bundle or other settings."""
    require_packages("lance" if out.rstrip("/").endswith(".lance") else "scale", "pyarrow")
    from cembed.runtime.pages.documents import find_documents
    from cembed.scale.embed import LocalRun
    from cembed.scale.parts import Parts, open_store

    files, embedder, budget = find_documents(work.paths), work.load(), work.page_vectors.budget()
    embedder.check(embedder.manifest.document, budget)
    schema = work.schema(embedder.bundle, storage)
    with StopSignals() as signals, Parts(open_store(out), schema) as parts, progress_bar() as progress:
        run = LocalRun(parts, embedder, budget)
        task = progress.add_task("embedding", total=None)
        try:
            with work.reading.reader() as reader, work.reading.reader() as counter:
                embedder.prepare("document", budget)
                run.run(reader, counter, files, lambda: progress.advance(task))
        finally:
            signals.hold()  # what is waiting is written, whatever ended the run
            parts.flush()
            for warning in run.warnings:
                complain(f"warning: {warning}")
            for failure in run.failures:
                complain(f"not embedded: {failure.place}: {failure.reason}")
    there = f", {run.skipped} were there" if run.skipped else ""
    say(f"{out}: {run.new} rows added{there}{tokens_text(embedder, before='; ')}")
    if run.failures or run.warnings:
        raise typer.Exit(EXIT_INCOMPLETE)


def embed_on_cluster(work: Work, out: str, storage: str, address: str, actors: int | None) -> None:
    """`embed_parts` by a Ray cluster. Raises CembedError: there is none at this address."""
    require_packages("ray", "ray", "pyarrow")
    from cembed.scale.cluster import connect, embed_documents
    from cembed.scale.embed import find_sources
    from cembed.scale.parts import Parts, open_store

    paths = find_sources(work.paths)
    schema = work.schema(work.engine.open(work.bundle), storage)
    options = work.options(schema)
    with StopSignals() as signals, Parts(open_store(out), schema) as parts, progress_bar() as progress:
        there, ray = len(parts.done), connect(address)
        task = progress.add_task("embedding", total=len(paths))

        def show(now: Progress) -> None:
            left = "" if now.left is None else f", {now.left / 60:.0f} min left"
            progress.update(task, completed=now.seen, description=f"{now.pages} pages, {now.rate:.1f} a second{left}")

        try:
            ended = embed_documents(ray, paths, options, parts, show, actors)
        finally:
            signals.hold()
    say(f"{out}: {ended.pages} rows added, {ended.errors} of them with an error; {there} were there; "
        f"{ended.rate:.2f} pages a second")  # fmt: skip
    if ended.errors:
        raise typer.Exit(EXIT_INCOMPLETE)


def check_small(pages: int, out: Path) -> None:
    """Says where a vector file is too much to hold: all of it is in memory until the end."""
    if pages > MANY_PAGES:
        complain(
            f"{out} is held in memory until the last of {pages} pages; --out {out.with_suffix('.parquet')} is written "
            "as it goes, and a run that was ended goes on"
        )

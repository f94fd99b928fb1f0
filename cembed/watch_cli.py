"""`cembed watch` and `cembed status`: folders whose files go into an index, and how that goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cembed.display import Cell, complain, say, show_json, show_table
from cembed.options import (
    EXIT_FAILED,
    EXIT_INCOMPLETE,
    AsJson,
    Confined,
    Engine,
    MadeBy,
    PageVectors,
    Reading,
    RetryFailed,
    SkipBlankPages,
    loading_fields,
    settings_of,
    split,
    spread,
)
from cembed.signals import StopSignals

if TYPE_CHECKING:
    from cembed.runtime.intake.status import Status
    from cembed.serve.hosts import Watching
    from cembed.serve.watching import Watch

SHOWN = 20
STALE_SECONDS = 180.0


@dataclass(frozen=True)
class Watched:
    """How folders are watched."""

    mirror: Annotated[
        bool, typer.Option("--mirror", help="Take the pages of files that are deleted out of the index.")
    ] = False
    stable_for: Annotated[
        float, typer.Option(min=0.0, help="Seconds that a file must not have changed before it is read.")
    ] = 2.0
    every: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two looks at the folders, if nothing hints at one.")
    ] = 5.0
    move_done: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Move files there once they are in the index.")
    ] = None
    move_failed: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Move files there of which nothing can be read.")
    ] = None
    skip_blank_pages: SkipBlankPages = False
    retry_failed: RetryFailed = False
    reembed: Annotated[
        bool, typer.Option("--reembed", help="Make the index anew from the files if BUNDLE is another one.")
    ] = False

    @property
    def moved(self) -> list[Path]:
        return [folder for folder in (self.move_done, self.move_failed) if folder is not None]

    def changes(self, folders: Sequence[Path]) -> list[Path]:
        """Where files are moved from and to. The latter are made, if they are not there."""
        for folder in self.moved:
            folder.mkdir(parents=True, exist_ok=True)
        return [*self.moved, *folders] if self.moved else []


def watching(
    folders: Sequence[Path],
    index: Path,
    bundle: Path,
    how: Watched,
    made: tuple[PageVectors, Reading, Engine],
    *,
    once: bool = False,
    storage: Sequence[str] = (),
    metadata: dict[str, Any] | None = None,
) -> Watching:
    """Raises CembedError: something that is no folder, or options that contradict each other."""
    from cembed.runtime.embed.loading import Loading
    from cembed.runtime.intake.folders import Folders
    from cembed.runtime.intake.ledger import ledger_path
    from cembed.serve.hosts import Watching
    from cembed.serve.watcher import Rules

    page_vectors, reading, engine = made
    beside = [index.with_name(f"{index.name}.{suffix}") for suffix in ("next", "before", "pictures")]
    return Watching(
        loading=Loading(**loading_fields(bundle, page_vectors, reading, engine), threads=engine.threads),
        index=index,
        folders=Folders.of(folders, [index, ledger_path(index), bundle, *beside, *how.moved]),
        rules=Rules(how.stable_for, how.every, how.mirror, how.move_done, how.move_failed, once),
        budget=page_vectors.budget(),
        page_settings=settings_of(page_vectors, reading, engine.skips_blank(bundle, page_vectors.skip_blank)),
        storage=storage,
        metadata=metadata,
        skip_blank_pages=how.skip_blank_pages,
        retry_failed=how.retry_failed,
        reembed=how.reembed,
    )


@spread
def watch(
    *,
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders, with all that are in them.")],
    index: Annotated[Path, typer.Option(metavar="INDEX", help="Add to it; made if it is not there.")],
    bundle: MadeBy,
    once: Annotated[bool, typer.Option("--once", help="End when all that is there was looked at.")] = False,
    how: Watched,
    storage: Annotated[
        list[str] | None, typer.Option(metavar="TYPE,…", help="How a new index keeps vectors; see `cembed index add`.")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Goes with every page, for filters; may be repeated.")
    ] = None,
    confined: Confined,
    page_vectors: PageVectors,
    reading: Reading,
    engine: Engine,
) -> None:
    """Watch folders, and keep an index of the documents in them. `cembed status INDEX` says how that goes.

    A file is read when it has been still for a while. One that cannot be opened or is still being written waits, and is
    tried again; one that cannot be read is remembered by its content. A moved file keeps its vectors, and nothing else
    leaves the index without --mirror. Links, and hidden and temporary files, are passed over. If BUNDLE is a link that
    is replaced, as by `cembed deploy`, the new bundle is taken. With --once, exits with 3 if some files could not be
    read now, or a folder could not be listed.
    """
    from cembed.serve.confinement import confine, give_up_little, readable, written

    give_up_little(confined.max_bytes)
    if confined.confine:
        confine(readable(bundle, engine.trusted, *folders), written(index, how.changes(folders)))
    from cembed.runtime.index.metadata import check_metadata, parse_pairs
    from cembed.serve.hosts import LocalHost
    from cembed.serve.watching import Watch

    pairs = parse_pairs("--metadata", tuple(metadata or ()))
    check_metadata(pairs)
    made = (page_vectors, reading, engine)
    told = watching(folders, index, bundle, how, made, once=once, storage=split(storage), metadata=pairs or None)
    run(Watch(told, LocalHost(told), say=complain), once)


def run(watch: Watch, once: bool) -> None:
    try:
        with StopSignals():
            watch.run()
    finally:
        say(f"{watch.told.index}: {summary(watch)}")
    if once and (watch.tally.failed or watch.unfinished or watch.troubles):
        raise typer.Exit(EXIT_INCOMPLETE)


def summary(watch: Watch) -> str:
    tally = watch.tally
    parts = {
        f"{tally.added} pages added": True,
        f"{tally.shared} of them without embedding, as their content was there": tally.shared,
        f"{tally.moved} files moved": tally.moved,
        f"{tally.removed} pages removed": tally.removed,
        f"{tally.blank} blank pages left out": tally.blank,
        f"{tally.failed} could not be read": tally.failed,
        f"{tally.failed_before} could not be read before": tally.failed_before,
        f"{watch.unfinished} files wait": watch.unfinished,
    }
    return "; ".join(part for part, there in parts.items() if there)


def status(
    index: Annotated[
        Path, typer.Argument(metavar="INDEX", help="Folder made by `cembed watch` or `cembed index add`.")
    ],
    as_json: AsJson = False,
    stale_after: Annotated[
        float, typer.Option(min=1.0, help="Seconds without a sign of life after which a watcher is taken for dead.")
    ] = STALE_SECONDS,
) -> None:
    """Show how it goes with an index: pages, files that wait or failed and why, the watcher, disk and memory.

    Exits with 0 if all is well, with 3 if files could not be read, with 1 if there is trouble: a watcher that is dead
    or cannot write, a folder that is not there, a disk that is almost full.
    """
    from cembed.runtime.intake.status import status_of

    found = status_of(index, stale_after)
    if as_json:
        show_json(found.as_dict())
    else:
        show_table(str(index), ["field", "value"], [{"field": k, "value": v} for k, v in rows(found).items()])
    if found.trouble:
        raise typer.Exit(EXIT_FAILED)
    if found.failed:
        raise typer.Exit(EXIT_INCOMPLETE)


def rows(found: Status) -> dict[str, Cell]:
    shown: dict[str, Any] = {
        "state": found.state,
        "trouble": list(found.trouble),
        "pages": f"{found.pages}, {found.warnings} with a warning",
        "files": ", ".join(f"{count} {state}" for state, count in found.files.items()),
        "wait": [f"{file.path}: {', '.join(file.reasons)}" for file in found.waiting[:SHOWN]],
        "failed": [f"{file.path}: {'; '.join(file.reasons)}" for file in found.failed[:SHOWN]],
        "last success": found.succeeded,
        "watcher": found.watcher,
        "bundle": found.bundle,
        "disk": f"{found.index_bytes:,} bytes of the index, {found.disk_free:,} free",
    }
    return {name: cell for name, cell in shown.items() if cell}

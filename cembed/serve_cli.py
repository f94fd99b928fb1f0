"""`cembed serve`: HTTP, and a page in the browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cembed.options import (
    BundlePath,
    Confined,
    Engine,
    PageVectors,
    Reading,
    Trusted,
    loading_fields,
    require_packages,
    settings_of,
    split,
    spread,
)
from cembed.runtime.errors import CembedError
from cembed.watch_cli import Watched, watching

if TYPE_CHECKING:
    from cembed.serve.hosts import Watching

PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus_client")
LEAST_TOKEN = 16


@spread
def serve(
    *,
    bundle: BundlePath,
    index: Annotated[
        Path | None, typer.Option(metavar="INDEX", help="Search it, and add to it; made if it is not there.")
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Only search INDEX, and see what another process adds.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any that is free.")] = 8080,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answer only to clients that send the token in this file.")
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open-to-all", help="Listen at an address that others reach without a token.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,…", help="Answer to these names too, beside localhost; with --open-to-all, beside addresses."
        ),
    ] = None,
    allow_url_hosts: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,…", help="Fetch pictures from URLs of these hosts; none by default."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Processes that embed; weights are mapped, and shared, if more than one.")
    ] = 1,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused with 429.")] = 64,
    name: Annotated[str, typer.Option(help="The model's name; by default that of the bundle's folder.")] = "",
    watch: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Add the files of this folder to INDEX, and what comes into it."),
    ] = None,
    how: Watched,
    confined: Confined,
    page_vectors: PageVectors,
    reading: Reading,
    engine: Engine,
) -> None:
    """Embed, rank and search over HTTP, as clients of OpenAI, vLLM, Cohere, Jina and KServe ask, and in the browser.

    Listens on this machine only, unless told otherwise. Ends with SIGTERM or Ctrl-C, once what was begun is answered.
    If BUNDLE is a link that is replaced, as by `cembed deploy`, the new bundle is taken between two requests. With
    --watch, folders are watched as by `cembed watch`, whose options count here too.
    """
    from cembed.runtime.landlock import CONNECT
    from cembed.serve.confinement import confine, give_up_little, readable, written

    require_packages("serve", *PACKAGES)
    folders = watch or []
    give_up_little()
    if confined.confine:
        reads = readable(bundle, token_file, engine.trusted, *folders)
        confine(reads, written(index, how.changes(folders)), 0 if allow_url_hosts else CONNECT)
    from cembed.runtime.embed.loading import Loading
    from cembed.serve.app import serve as run
    from cembed.serve.settings import Limits, Settings

    fields = loading_fields(bundle, page_vectors, reading, engine)
    worker = Loading(
        **fields,
        threads=engine.threads,
        prepack=True if workers == 1 else None,
        confined=confined.confine,
        reads=tuple(str(folder.absolute()) for folder in folders),
        max_memory=confined.max_bytes,
    )
    settings = Settings(
        worker=worker,
        index=index,
        read_only=read_only,
        name=name,
        host=host,
        port=port,
        workers=workers,
        token=read_token(token_file) if token_file else None,
        allow_hosts=tuple(split(allow_host)),
        url_hosts=tuple(split(allow_url_hosts)),
        budget=page_vectors.budget(),
        page_settings=settings_of(page_vectors, reading, engine.skips_blank(bundle, page_vectors.skip_blank)),
        limits=Limits(queue=queue),
        watch=watched(folders, index, read_only, bundle, how, (page_vectors, reading, engine)),
    )
    if read_only and index is None:
        raise CembedError("--read-only is for an --index: name one")
    if not settings.local and settings.token is None and not open_to_all:
        raise CembedError(f"--host {host} lets others in: give --token-file, or --open-to-all if that is what you want")
    run(settings)


def watched(
    folders: Sequence[Path],
    index: Path | None,
    read_only: bool,
    bundle: Path,
    how: Watched,
    made: tuple[PageVectors, Reading, Engine],
) -> Watching | None:
    """None if no folder is watched. Raises CembedError: options that need one or the other."""
    if not folders and how != Watched():
        raise CembedError("--mirror, --move-done and other options of watching need a folder: give --watch FOLDER")
    if not folders:
        return None
    if index is None or read_only:
        raise CembedError("--watch adds to an index: give --index INDEX, without --read-only")
    return watching(folders, index, bundle, how, made)


def read_token(path: Path) -> str:
    """Raises CembedError: there is none, or one that is guessed too easily."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CembedError(f"{path}: cannot be read as a token: {error}") from None
    if len(token) < LEAST_TOKEN or not token.isprintable() or " " in token:
        raise CembedError(
            f"{path} must have one line of at least {LEAST_TOKEN} characters: openssl rand -hex 32 makes a good one"
        )
    return token


def export_triton(
    bundle: BundlePath,
    repository: Annotated[Path, typer.Argument(metavar="REPO", help="Triton's model repository.")],
    name: Annotated[str, typer.Option(help="The model's name; by default that of the bundle's folder.")] = "",
    instances: Annotated[int, typer.Option(min=1, help="Processes of the model in Triton.")] = 1,
    trusted: Trusted = None,
) -> None:
    """Write a bundle as a model for NVIDIA's Triton, whose Python backend runs it with cembed installed."""
    from cembed.display import say
    from cembed.serve.triton import write_repository

    model = write_repository(bundle, repository, name or bundle.resolve().name, instances, trusted)
    say(f"{model}: tritonserver --model-repository={repository}")

"""`cembed bench`: how fast this machine is."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cembed.display import say, show_json, show_table
from cembed.options import AsJson, BundlePath, SkipBlank, Threads, Trusted, split
from cembed.runtime.errors import CembedError
from cembed.streams import held_stderr

if TYPE_CHECKING:
    from cembed.runtime.scoring.timing import Timing

TOLERANCE = 1e-5

bench_app: typer.Typer = typer.Typer(name="bench", help="Time this machine.", no_args_is_help=True)


@bench_app.command()
def maxsim(
    pages: Annotated[int, typer.Option(min=1, help="Pages that are scored.")] = 10_000,
    vectors: Annotated[int, typer.Option(min=1, help="Vectors of a page.")] = 32,
    dim: Annotated[int, typer.Option(min=1, help="Components of a vector.")] = 128,
    query_vectors: Annotated[int, typer.Option(min=1, help="Vectors of a query.")] = 16,
    storage: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE,…", help="f32, a list of arrays, or stored as f16, u8, bits; all four by default."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are of so many.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="Of numpy too; by default all cores.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time maxsim() with synthetic pages beside numpy's fastest way in float32, and compare scores with float64."""
    if threads is not None:
        limit_threads(threads)
    from cembed.runtime.scoring.kernels import kernel_sets, thread_count
    from cembed.runtime.scoring.storage import STORAGE
    from cembed.runtime.scoring.timing import Shape, try_out

    used, shape = thread_count(threads), Shape(query_vectors, dim, pages, vectors)
    found = try_out(shape, split(storage) or list(STORAGE), used, rounds)
    kernels = next(iter(kernel_sets()), "numpy")
    if as_json:
        timings = [asdict(timing) for timing in found]
        show_json({"kernels": kernels, "threads": used, "shape": asdict(shape), "timings": timings})
    else:
        title = f"{pages:,} pages of {vectors} x {dim}, query {query_vectors} x {dim}; {kernels}, {used} threads"
        show_table(title, COLUMNS, [row(timing, pages) for timing in found])
    if wrong := [timing.storage for timing in found if not timing.error <= TOLERANCE]:
        raise CembedError(f"scores of {', '.join(wrong)} are not those of float64: please report it, with the table")


@bench_app.command()
def page(
    bundle: BundlePath,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PATH]…", help="Pages to time; by default the one that the bundle brings."),
    ] = None,
    pages: Annotated[int, typer.Option(min=1, help="How many pages of PATH at most.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each page is embedded.")] = 5,
    max_visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="Visual tokens a page may take, at most the bundle's limit.")
    ] = None,
    skip_blank: SkipBlank = None,
    provider: Annotated[list[str] | None, typer.Option(metavar="NAME,…", help="Engines, as for embed.")] = None,
    threads: Threads = None,
    trusted: Trusted = None,
    as_json: AsJson = False,
) -> None:
    """Time a bundle's pages by stage: pixels, vision, text, and a slot of the loop; and the memory that it takes."""
    from cembed.runtime.bundle.bundle import Bundle
    from cembed.runtime.tuning import Way, attempt
    from cembed.tune_cli import read_pages

    images = read_pages(Bundle(bundle, trusted=trusted), paths, pages)
    with held_stderr():
        way = Way(bundle, tuple(split(provider)) or None, threads, max_visual_tokens, skip_blank)
        found = attempt(way, images, rounds)
    if found.failure:
        raise CembedError(found.failure)
    counted = {"visual tokens": found.tokens, "positions": found.positions, "peak MiB": round(found.memory)}
    if as_json:
        show_json({"seconds": dict(found.seconds), **counted, "pages": len(images), "rounds": rounds})
    else:
        rows = [{"stage": part, "ms": f"{1000 * seconds:.2f}"} for part, seconds in found.seconds.items()]
        title = f"medians of {rounds} rounds over {len(images)} pages"
        show_table(title, ("stage", "ms"), rows)
        say(", ".join(f"{what}: {number:,}" for what, number in counted.items()))


COLUMNS = ("storage", "bytes a page", "ms", "GB/s", "pages/s", "times numpy", "error")


def row(timing: Timing, pages: int) -> dict[str, str | int | float]:
    seconds = timing.ms / 1000
    return {
        "storage": timing.storage,
        "bytes a page": timing.bytes // pages,
        "ms": f"{timing.ms:.2f}",
        "GB/s": f"{timing.bytes / seconds / 1e9:.2f}",
        "pages/s": f"{pages / seconds:,.0f}",
        "times numpy": f"{timing.times_numpy:.1f}",
        "error": f"{timing.error:.0e}",
    }


def limit_threads(threads: int) -> None:
    """Of the libraries that multiply matrices; to be called before numpy is imported."""
    for variable in ("OMP", "OPENBLAS", "MKL"):
        os.environ[f"{variable}_NUM_THREADS"] = str(threads)

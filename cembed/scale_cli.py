"""`cembed scale`: arithmetic for corpora that need a cluster."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated, Any

import typer

from cembed.display import say, show_json, show_table
from cembed.options import AsJson, Engine, MadeBy, PageVectors, Paths, Reading, require_packages, split, spread
from cembed.runtime.errors import CembedError

scale_app = typer.Typer(name="scale", help="Work for more than one machine.", no_args_is_help=True)
GIB = 1 << 30


@scale_app.callback()
def scale() -> None:
    """Work for more than one machine."""


@scale_app.command()
@spread
def plan(
    *,
    paths: Paths,
    bundle: MadeBy,
    pages: Annotated[int, typer.Option(min=1, help="Pages of the whole corpus.")] = 10_000_000,
    sample: Annotated[int, typer.Option(min=1, help="Pages of PATH to measure with.")] = 20,
    nodes: Annotated[list[str] | None, typer.Option(metavar="N,…", help="Nodes to compare; 1,4,16,64.")] = None,
    cores: Annotated[int, typer.Option(min=1, help="Cores of a node, each as fast as one here.")] = 16,
    storage: Annotated[
        list[str] | None, typer.Option(metavar="TYPE,…", help="How an index keeps vectors; by default as index add.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of a node for an hour, in any currency.")] = None,
    disk_price: Annotated[float | None, typer.Option(min=0, help="Of a GiB of disk for a month.")] = None,
    page_vectors: PageVectors,
    reading: Reading,
    engine: Engine,
    as_json: AsJson = False,
) -> None:
    """Say what a corpus takes: hours, disk, memory, money, from some of its pages that are embedded here.

    Give PATHs that are like the whole. Nothing else should run meanwhile.
    """
    require_packages("scale", "pyarrow")
    from cembed.parts_run import Work
    from cembed.runtime.index.index import DEFAULT_STORAGE
    from cembed.runtime.pages.documents import find_documents
    from cembed.scale.plan import Plan, measure_together
    from cembed.scale.plan import spread as spread_over

    counts = [whole(text) for text in split(nodes) or ["1", "4", "16", "64"]]
    files = spread_over(find_documents(paths), 2 * sample)
    work = Work(bundle, list(map(str, paths)), page_vectors, reading, engine)
    options = work.options(work.schema(engine.open(bundle), "f32"))
    processes = max(1, len(os.sched_getaffinity(0)) // (engine.threads or 1))
    found = Plan(measure_together(options, files, sample, processes), pages, cores, threads=engine.threads or 1)
    kept = split(storage) or list(DEFAULT_STORAGE)
    rows = [row(found, count, price) for count in counts]
    disk = disk_rows(found, kept, disk_price)
    if as_json:
        show_json({"measured": asdict(found.measured), "core_hours": found.core_hours, "nodes": rows, "disk": disk})
        return
    seen = found.measured
    say(
        f"{seen.pages} pages measured: {seen.read_seconds * 1000:.0f} ms to read, "
        f"{seen.embed_seconds * 1000:.0f} ms to embed, {seen.vectors:.0f} vectors of {seen.dim}; "
        f"{seen.failed} could not be embedded"
    )
    show_table(f"{pages:,} pages, {found.core_hours:,.0f} core hours", list(rows[0]), rows)
    show_table("what they take", list(disk[0]), disk)


def whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise CembedError(f"--nodes {text!r}: give numbers of nodes, as 1,4,16")
    return int(text)


def row(plan: Any, nodes: int, price: float | None) -> dict[str, Any]:
    hours = plan.hours(nodes)
    found = {"nodes": nodes, "cores": nodes * plan.cores, "hours": round(hours, 2), "days": round(hours / 24, 2)}
    found["pages a second"] = round(plan.pages / (3600 * hours), 1)
    return found | ({} if price is None else {"cost": round(hours * nodes * price, 2)})


def disk_rows(plan: Any, storage: list[str], price: float | None) -> list[dict[str, Any]]:
    """Rows of Parquet, and an index by storage type: what is searched with first should fit into memory."""
    sizes = {f"rows, {name}": plan.rows_bytes(name) for name in ("f32", "f16")}
    sizes |= {f"index, {name}": size for name, size in plan.index_bytes(storage).items()}
    rows = [{"what": name, "GiB": size / GIB, "bytes a page": round(size / plan.pages)} for name, size in sizes.items()]
    return [each | ({} if price is None else {"a month": round(each["GiB"] * price, 2)}) for each in rows]

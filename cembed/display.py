"""Tables and progress bars. `rich` is imported only when something is drawn."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import typer

from cembed.streams import is_shown, output_named, printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from cembed.runtime.bundle.manifest import LayerDamage, Manifest, Quantisation, Side
    from cembed.runtime.embed.embedder import Embedder


TEXTS = ("path", "field", "value", "warning")
"""Columns that are aligned to the left."""
Cell: TypeAlias = "str | int | float | Sequence[str]"
"""What a table shows; a sequence of strings as lines."""


def say(message: str) -> None:
    """One line on standard output, whatever a file's name has in it."""
    with output_named():
        typer.echo(printable(message))


def complain(message: str) -> None:
    """One line on standard error, whatever a file's name has in it."""
    typer.echo(printable(message), err=True)


def tokens_text(embedder: Embedder, before: str = "") -> str:
    """How many of the visual tokens of pages were read, after `before`; nothing where blank paper is not skipped."""
    tokens = embedder.tokens_read
    if not embedder.inputs.image.skip_blank or not tokens.of:
        return ""
    return f"{before}{tokens.read:,} of {tokens.of:,} visual tokens read, {tokens.read / tokens.of:.0%}"


def show_json(value: Any) -> None:
    """In characters that a terminal shows and its encoding has, others as escapes of JSON."""
    unicode = sys.stdout is None or (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    text = json.dumps(value, indent=1, ensure_ascii=not unicode)
    with output_named():
        typer.echo("".join(c if c == "\n" or is_shown(c) else json.dumps(c)[1:-1] for c in text))


def lines_of(cell: Cell) -> str:
    """The text of a cell; only its own lines are lines."""
    if isinstance(cell, float):
        return f"{cell:.4f}"
    return printable(str(cell)) if isinstance(cell, (str, int)) else "\n".join(map(printable, cell))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Cell]]) -> None:
    """`columns` of `rows`; a row that lacks one leaves it empty."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    class StrictConsole(Console):
        def on_broken_pipe(self) -> None:  # which would end the process without a word
            raise BrokenPipeError

    table = Table(title=Text(printable(title)), title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold", justify="left" if name in TEXTS else "right")
    for row in rows:
        table.add_row(*(Text(lines_of(row.get(name, ""))) for name in columns))
    with output_named():
        StrictConsole().print(table)


def show_manifest(path: Path, manifest: Manifest, signed_by: Mapping[str, bool] | None = None) -> None:
    """`signed_by` says of each key that has a signature whether that was checked, as the key is trusted."""
    from importlib.metadata import version as installed

    files = [f"{name}  {record.size:,} bytes" for name, record in manifest.files.items()]
    parity = [
        f"{p.graph}: off by {p.max_error:.1e} (allowed {p.tolerance:.0e}), cosine {p.min_cosine:.6f}"
        for p in manifest.parity
    ]
    signers = [name if checked else f"{name}, not checked" for name, checked in (signed_by or {}).items()]
    fields: dict[str, Cell] = {
        "backbone": f"{manifest.backbone}, {manifest.head} head",
        "source": ", ".join(manifest.source.values()),
        "document": describe_side(manifest.document, manifest.dim),
        "query": describe_side(manifest.query, manifest.dim),
        "visual tokens": f"at most {manifest.image.max_visual_tokens}"
        + (", blank paper is skipped" if manifest.image.skip_blank else ""),
        "prompt attention": manifest.prompt_attention,
        "graphs": f"{manifest.dtype}, opset {manifest.opset}, for {manifest.target}",
        "parity with torch": parity,
        **(describe_quantisation(manifest.quantisation) if manifest.quantisation else {}),
        "made with": ", ".join(f"{name} {number}" for name, number in manifest.made_with.items()),
        "signed by": signers or "nobody",
        "this runtime": f"onnxruntime {installed('onnxruntime')}",
        "files": files,
        "size": f"{sum(record.size for record in manifest.files.values()):,} bytes",
    }
    show_table(str(path), ["field", "value"], [{"field": key, "value": value} for key, value in fields.items()])


def describe_quantisation(quantisation: Quantisation) -> dict[str, Cell]:
    """What was stored how, and what it cost."""
    found = quantisation.comparison
    counts: dict[str, dict[str, int]] = {}
    for name, scheme in [*quantisation.schemes.items(), *((name, "float") for name in quantisation.kept)]:
        graph = counts.setdefault(name.split("/")[0], {})
        graph[scheme] = graph.get(scheme, 0) + 1
    weights = [f"{name}: {', '.join(f'{n} {s}' for s, n in graph.items())}" for name, graph in counts.items()]
    slower = "" if found.ms_per_page[1] <= found.ms_per_page[0] else ": slower on this machine"
    judged = "" if found.ndcg5 is None else f", nDCG@5 {found.ndcg5[0]:.4f} to {found.ndcg5[1]:.4f}"
    return {
        "quantised": f"{quantisation.weights}, embeddings {quantisation.embeddings}",
        "weights": [*weights, *(f"in float: {name}" for name in quantisation.kept)],
        **({"sensitive": describe_damage(quantisation.sensitivity)} if quantisation.sensitivity else {}),
        "loss": f"on {found.pages} pages and {found.queries} queries: cosine at least {found.min_cosine:.4f}, "
        f"median {found.median_cosine:.4f}; scores off by {found.score_error:.2%}; the best five pages agree by "
        f"{found.top5_overlap:.0%}{judged}",
        "bytes": f"{found.bytes[0]:,} to {found.bytes[1]:,}, {found.bytes[1] / found.bytes[0]:.0%}",
        "ms a page": f"{found.ms_per_page[0]:.1f} to {found.ms_per_page[1]:.1f}{slower}, where it was made",
    }


def describe_damage(sensitivity: Sequence[LayerDamage]) -> list[str]:
    """The layers that do most damage alone."""
    worst = [
        f"{damage.layer}: cosine {damage.min_cosine:.4f}, scores {damage.score_error:.2%}" for damage in sensitivity
    ]
    return [*worst[:5], *([f"and {len(worst) - 5} that do less"] if len(worst) > 5 else [])]


def describe_side(side: Side, dim: int) -> str:
    """What the side can do, and what a page or query of it takes."""
    if side.num_vectors is None and side.pooling == "last":
        return f"one vector of {dim}, of the last token; {4 * dim:,} bytes in float32"
    if side.num_vectors is None:
        return f"one vector of {dim} for every token; {4 * dim:,} bytes each in float32; pool factor"
    count = 1 if side.pooling != "none" else side.num_vectors
    length = side.vector_dim(dim)
    pooled = "" if side.pooling == "none" else f" ({side.pooling} of {side.num_vectors})"
    most = f"up to {side.max_vectors}" if side.max_vectors else "any budget"
    nested = f", trained at {', '.join(map(str, side.nested_budgets))}" if side.nested_budgets else ""
    runs = "loop" if side.slots == "feedback" else "single pass or loop"
    return (
        f"{count} vectors of {length}{pooled}, {4 * length * count:,} bytes in float32; {most}{nested}; "
        f"{side.slots} slots at positions '{side.slot_positions}', {runs}"
    )


@contextlib.contextmanager
def step_bar(first: str) -> Iterator[Callable[[str], None]]:
    """What to call with the name of each step after the first."""
    with progress_bar("{task.description}") as progress:
        task = progress.add_task(first, total=None)
        yield lambda step: progress.update(task, description=printable(step))


def progress_bar(description: str = "") -> Progress:
    """On standard error, and only on a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class Rate(TextColumn):
        def __init__(self) -> None:
            super().__init__("")

        def render(self, task: Task):  # type: ignore[no-untyped-def]
            self.text_format = f"{task.finished_speed or task.speed or 0:.2f} pages/s"
            return super().render(task)

    steps = [SpinnerColumn(), TextColumn(description, markup=False), TimeElapsedColumn()]
    pages = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn()]
    console = Console(stderr=True)
    return Progress(*(steps if description else pages), console=console, disable=not console.is_terminal)

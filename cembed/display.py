"""Tables and progress bars. `rich` is imported only when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from cembed.runtime.manifest import Manifest, Side


def show_table(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, str | int | float]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold", justify="right" if name not in ("path", "field", "value") else "left")
    for row in rows:
        cells = (row[name] for name in columns)
        table.add_row(*(Text(f"{cell:.4f}" if isinstance(cell, float) else str(cell)) for cell in cells))
    Console().print(table)


def show_manifest(path: Path, manifest: Manifest) -> None:
    from importlib.metadata import version as installed

    files = "\n".join(f"{name}  {record.size:,} bytes" for name, record in manifest.files.items())
    parity = "\n".join(
        f"{p.graph}: off by {p.max_error:.1e} (allowed {p.tolerance:.0e}), cosine {p.min_cosine:.6f}"
        for p in manifest.parity
    )
    fields = {
        "backbone": f"{manifest.backbone}, {manifest.head} head",
        "source": ", ".join(manifest.source.values()),
        "document": describe_side(manifest.document, manifest.dim),
        "query": describe_side(manifest.query, manifest.dim),
        "visual tokens": f"at most {manifest.image.max_visual_tokens}",
        "prompt attention": manifest.prompt_attention,
        "graphs": f"{manifest.dtype}, opset {manifest.opset}, for {manifest.target}",
        "parity with torch": parity,
        "made with": ", ".join(f"{name} {number}" for name, number in manifest.made_with.items()),
        "this runtime": f"onnxruntime {installed('onnxruntime')}",
        "files": files,
        "size": f"{sum(record.size for record in manifest.files.values()):,} bytes",
    }
    show_table(str(path), ["field", "value"], [{"field": key, "value": value} for key, value in fields.items()])


def describe_side(side: Side, dim: int) -> str:
    """What the side can do, and what a page or query of it takes."""
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

    steps = [SpinnerColumn(), TextColumn(description), TimeElapsedColumn()]
    pages = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn()]
    console = Console(stderr=True)
    return Progress(*(steps if description else pages), console=console, disable=not console.is_terminal)

"""`cembed eval`: how well a bundle finds judged pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cembed.display import progress_bar, show_json, show_table
from cembed.options import AsJson, BundlePath, Engine, SkipBlank, split, spread
from cembed.runtime.errors import CembedError


@spread
def evaluate(
    *,
    bundle: BundlePath,
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="Folder with pages/, queries.jsonl and qrels.tsv.")
    ],
    budgets: Annotated[
        list[str] | None,
        typer.Option(metavar="N,…", help="Vectors of a page to compare; by default powers of two up to all."),
    ] = None,
    storage: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE,…", help="How vectors are kept: f32 (the default), f16, u8 or bits (one bit)."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw quality against bytes and milliseconds a page.")
    ] = None,
    skip_blank: SkipBlank = None,
    engine: Engine,
    as_json: AsJson = False,
) -> None:
    """Measure how well a bundle finds judged pages: nDCG, recall and MRR by budget and storage type."""
    from cembed.runtime import evaluate as evaluation

    data = evaluation.Dataset.read(dataset)
    embedder = engine.load(bundle, skip_blank=skip_blank)
    with progress_bar() as progress:
        task = progress.add_task("embedding", total=None)
        result = evaluation.evaluate(
            embedder,
            data,
            as_numbers("--budgets", budgets) or None,
            split(storage) or ("f32",),
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        show_json(asdict(result))
    else:
        title = f"{dataset.name}: {result.pages} pages, {result.rows[0].questions} questions; bytes, ms: of a page"
        show_table(title, evaluation.COLUMNS, [evaluation.table_row(row) for row in result.rows])
    if plot is not None:
        evaluation.plot(result, plot)


def as_numbers(option: str, values: Sequence[str] | None) -> list[int]:
    """Raises CembedError: one is no whole number.

    >>> as_numbers("--budgets", ["1,8", "32"])
    [1, 8, 32]
    """
    try:
        return [int(part) for part in split(values)]
    except ValueError as error:
        raise CembedError(f"{option} is {','.join(values or ())!r}: give whole numbers with commas between") from error

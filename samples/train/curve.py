"""Draws a training log: losses and the share of right pages ranked first in the batch, over the pages shown.

python samples/train/curve.py RUN/log.jsonl OUT.png
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

LOSSES = ("reading", "spelling", "causal.page_words", "causal.query_words", "causal.contrast")


def main(log: Annotated[Path, typer.Argument()], out: Annotated[Path, typer.Argument()]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    heads = sorted({name for row in rows for name in row if name.endswith(".first")})
    for axis, names in zip(axes, (LOSSES, heads), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), label=name.removesuffix(".first"))
        for row, following in pairwise(rows):
            if row["stage"] != following["stage"]:
                axis.axvline(row["step"], color="grey", lw=0.5)
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes[0].set(ylabel="loss", yscale="log")
    axes[1].set(ylabel="right page first among 24", ylim=(0, 1))
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    typer.run(main)

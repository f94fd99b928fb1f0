"""Exports every head of a trained model and measures each on a data set, from the bundles, as `cembed eval` does.

    python samples/train/compare.py RUN DATASET OUT

OUT gets checkpoints, bundles, results.json and the table in table.md. Torch's own vectors of the first head are
measured too, in the last line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from model import HEADS, Dims, SampleModel
from PIL import Image
from train import Trainer
from write import read_checkpoint, write_checkpoint

from cembed.export.exporter import export
from cembed.export.plan import ExportOptions
from cembed.runtime import Embedder, maxsim
from cembed.runtime.evaluate import Dataset, Row, evaluate, measure, rank, require_ir_measures

BUDGETS: Mapping[str, list[int] | None] = {
    "causal": [1, 2, 4, 8, 16, 32],
    "feedback": [1, 2, 4, 8, 16],
    "metaembed": [1, 2, 4, 8, 16, 32, 64],
    "btoks": None,
    "colbert": None,
}


def make_bundle(model: SampleModel, head: str, out: Path) -> Path:
    """The checkpoint of a head and its bundle, unless they are there."""
    checkpoint, bundle = out / f"{head}-checkpoint", out / head
    if not bundle.exists():
        write_checkpoint(model, head, checkpoint)
        positions = None if head == "colbert" else "continue"
        vectors = 16 if head == "feedback" else None
        queries = 8 if head == "feedback" else None
        options = ExportOptions(
            "qwen2.5-vl",
            str(checkpoint),
            head=head,
            slot_positions=positions,  # type: ignore[arg-type]
            num_vectors=vectors,
            query_vectors=queries,
        )
        export(options, bundle)
    return bundle


def table(results: Mapping[str, tuple[Row, ...]]) -> str:
    lines = ["| head | vectors | nDCG@5 | seen | unseen | bytes a page | ms a page |", "|---|---|---|---|---|---|---|"]
    for head, rows in results.items():
        for vectors in dict.fromkeys(row.vectors for row in rows):
            parts = {row.part: row for row in rows if row.vectors == vectors}
            quality = " | ".join(f"{parts[name].measures['nDCG@5']:.3f}" for name in ("all", "seen", "unseen"))
            size, speed = f"{parts['all'].bytes_per_page:,.0f}", f"{parts['all'].ms_per_page:.1f}"
            lines.append(f"| {head} | {vectors or 'all'} | {quality} | {size} | {speed} |")
    return "\n".join(lines) + "\n"


@torch.no_grad()
def torch_quality(model: SampleModel, dataset: Dataset, head: str) -> float:
    """nDCG@5 of torch's vectors, from the weights as they are stored: bfloat16, widened."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16).float())
    pages: dict[str, Any] = {}
    for name, image, _ in dataset.pages():
        prefix = model.prefill(model.page_prompt(Image.fromarray(image)))
        pages[name] = model.embed(prefix, "document")[head][0].numpy()
    questions = dataset.judged()
    queries = [
        model.embed(model.prefill(model.query_prompt([dataset.queries[question]])), "query")[head][0].numpy()
        for question in questions
    ]
    run = rank(questions, list(pages), maxsim(queries, list(pages.values())))
    found = {part: measures["nDCG@5"] for part, measures, _ in measure(require_ir_measures(), dataset, run)}
    return float(found["all"])


def read_model(source: Path) -> SampleModel:
    """Of a run of train.py, or of a checkpoint."""
    if not (source / "state").exists():
        model = SampleModel(Dims(), source / "tokenizer.json")
        read_checkpoint(model, source)
        return model
    trainer = Trainer(Dims(), source / "tokenizer.json", compiled=False)
    print(f"step {trainer.load(source)}")
    return trainer.master


def main(
    run: Annotated[Path, typer.Argument(help="What train.py wrote, or a checkpoint of write.py or distil.py.")],
    dataset: Annotated[Path, typer.Argument(help="Folder with pages/, queries.jsonl and qrels.tsv.")],
    out: Annotated[Path, typer.Argument(help="Folder for checkpoints, bundles and results.")],
) -> None:
    model = read_model(run)
    data, results = Dataset.read(dataset), {}
    out.mkdir(parents=True, exist_ok=True)
    for head in HEADS:
        embedder = Embedder.load(make_bundle(model, head, out))
        results[head] = evaluate(embedder, data, BUDGETS[head]).rows
        print(table({head: results[head]}), flush=True)
    (out / "table.md").write_text(table(results))
    rows = {head: [asdict(row) for row in of] for head, of in results.items()}
    (out / "results.json").write_text(json.dumps(rows, indent=1))
    best = max(row.measures["nDCG@5"] for row in results[HEADS[0]] if row.vectors == 32 and row.part == "all")
    print(f"bundle {best:.4f}, torch {torch_quality(model, data, HEADS[0]):.4f}")


if __name__ == "__main__":
    typer.run(main)

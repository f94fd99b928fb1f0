"""The last stage of the sample model: pages without their blank paper get the vectors that the whole pages have.

    python samples/train/distil.py samples/model OUT

What blank paper is needed for is the decoder alone: with holes in what the vision tower reads, and none in what the
decoder reads, nothing is lost. So the decoder alone is trained, in float32, to be what it was where it read all.
OUT gets a checkpoint of each head, as from `write.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from data import Batch, prefetched
from model import Dims, Prompt, SampleModel
from torch import Tensor, nn
from train import head_losses, note
from write import read_checkpoint, write_all

STEPS, PAGES, RATE, WARMUP = 300, 24, 4e-5, 20
HEADS = ("causal", "metaembed", "btoks", "colbert")
WEIGHTS = {"causal": 2.4, "metaembed": 0.8, "btoks": 0.4, "colbert": 0.4, "query": 0.8, "contrast": 0.1}
"""Of the distance of a head's page vectors, of a query's vectors, and of contrast."""
LOG_EVERY = 25


def without_holes(prompt: Prompt) -> tuple[Prompt, Tensor]:
    """The positions that are there side by side, as the runtime has them, and where each was [B, S]."""
    lengths = prompt.there.sum(1)
    places = torch.argsort(prompt.there.logical_not().int(), dim=1, stable=True)[:, : int(lengths.max())]
    embeds = prompt.embeds.gather(1, places[..., None].expand(-1, -1, prompt.embeds.shape[2]))
    positions = prompt.positions.gather(2, places[None].expand(len(prompt.positions), -1, -1))
    return Prompt(embeds, positions, lengths, torch.arange(places.shape[1]) < lengths[:, None]), places


def distance(vectors: Tensor, targets: Tensor, there: Tensor | None = None) -> Tensor:
    """1 - cosine, on average over the vectors [B, K, D] that are `there` [B, K]."""
    found = 1 - (vectors * targets).sum(-1)
    return found.mean() if there is None else (found * there).sum() / there.sum()


def losses_of(model: SampleModel, teacher: SampleModel, batch: Batch) -> dict[str, Tensor]:
    read, patches = torch.from_numpy(batch.read), torch.from_numpy(batch.patches)
    with torch.no_grad():
        whole = torch.ones_like(read)
        seen = teacher.document_prompt(teacher.see(patches, whole, batch.size), whole, batch.size)
        targets = teacher.embed(teacher.prefill(seen), "document")
        asked = teacher.query_prompt(batch.questions)
        query_targets = teacher.embed(teacher.prefill(asked), "query")
        prompt, places = without_holes(
            teacher.document_prompt(teacher.see(patches, read, batch.size), read, batch.size)
        )
        targets["colbert"] = targets["colbert"].gather(1, places[..., None].expand(-1, -1, targets["colbert"].shape[2]))
    prefix = model.prefill(asked)
    documents, queries = model.embed(model.prefill(prompt), "document"), model.embed(prefix, "query")
    terms = {}
    for head in HEADS:
        terms[head] = distance(documents[head], targets[head], prompt.there if head == "colbert" else None)
        if head != "colbert":
            terms[f"{head}.query"] = distance(queries[head], query_targets[head])
    for head in ("causal", "metaembed"):
        terms[f"{head}.contrast"] = head_losses(head, queries[head], documents[head], prefix, model)["contrast"]
    return terms


def distil(model: SampleModel, supply: Iterator[Batch], steps: int, log: Path, rate: float = RATE) -> None:
    """Trains the decoder of a model; a line of the log for every LOG_EVERY steps."""
    teacher = copy.deepcopy(model)
    parameters = list(model.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    sums: dict[str, list[float]] = {}
    for step in range(steps):
        terms = losses_of(model, teacher, next(supply))
        optimizer.zero_grad()
        torch.stack([WEIGHTS[name.split(".")[-1]] * value for name, value in terms.items()]).sum().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
        optimizer.step()
        for name, value in terms.items():
            sums.setdefault(name, []).append(float(value.detach()))
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            note(log, "distilled", step + 1, sums)
            sums = {}


def main(
    start: Annotated[Path, typer.Argument(help="A checkpoint that write.py made.")],
    out: Annotated[Path, typer.Argument(help="A folder; each head gets one in it.")],
    steps: int = STEPS,
) -> None:
    model = SampleModel(Dims(), start / "tokenizer.json")
    read_checkpoint(model, start)
    out.mkdir(parents=True, exist_ok=True)
    supply = prefetched(start / "tokenizer.json", "varied", PAGES, "distil", holes="runtime")
    distil(model, supply, steps, out / "log.jsonl")
    write_all(model, out)


if __name__ == "__main__":
    typer.run(main)

"""Trains the sample model on pages that are drawn while it trains; resumes where it was stopped.

    python samples/train/train.py OUT

Five stages, each the start of the next: letters on pages full of words (vision tower alone), words through the
decoder, pages and questions with all heads at once, then half of the pages as collages, against leaning on layouts, and
last pages with holes, where blank paper is not read.
OUT keeps log.jsonl, the state to resume from (files of 15 MB at most) and the tokenizer; `write.py` makes a checkpoint
of each head from it. Weights are float32, the arithmetic is bfloat16.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import losses
import torch
import typer
from data import Batch, Holes, prefetched, window_order
from generate import Part
from model import Dims, Prefix, SampleModel
from torch import Tensor, nn
from vocabulary import write_tokenizer
from write import read_checkpoint

from cembed.export.decoder import AttentionLayer

CHUNK = 15 * 10**6
LOG_EVERY, SAVE_EVERY = 50, 250
FEEDBACK_EVERY = 6  # its slots run one after the other: a step with them takes almost twice as long
WARMUP = 30
WALLS = 16
WEIGHTS = {"reading": 2.0, "spelling": 3.0, "page_words": 1.0, "query_words": 1.0, "diversity": 0.02}
CONTRAST_WEIGHT = 0.6  # of every other term: dense losses carry more than a contrast of a few pages
NAMED = ("causal", "metaembed", "btoks", "feedback")


@dataclass(frozen=True)
class Stage:
    """Steps of `batch` pages of one part, at a share `rate` of the peak learning rates; what runs besides the tower.

    Every step of number `walls_every` reads a wall of words instead, without heads, so that reading goes on improving.
    """

    name: str
    part: Part
    steps: int
    batch: int
    rate: float
    decoder: bool = False
    heads: bool = False
    walls_every: int = 0
    holes: Holes = "none"


STAGES = (
    Stage("letters", "walls", 1500, 16, 1.0),
    Stage("words", "walls", 1250, 16, 0.7, decoder=True),
    Stage("pages", "seen", 1950, 24, 0.5, decoder=True, heads=True, walls_every=3),
    Stage("collages", "varied", 2500, 24, 0.4, decoder=True, heads=True, walls_every=4),
    Stage("holes", "varied", 800, 24, 0.2, decoder=True, heads=True, walls_every=4, holes="mixed"),
)


def read_page(model: SampleModel, batch: Batch, decoder: bool) -> tuple[dict[str, Tensor], Prefix | None]:
    """The losses of reading: characters under each visual token, and the words that end in it."""
    read = torch.from_numpy(batch.read)
    features = model.see(torch.from_numpy(batch.patches), read, batch.size)
    terms = {"reading": losses.reading(model.read_cells(features), torch.from_numpy(batch.cells))}
    if not decoder:
        return terms, None
    prefix = model.prefill(model.document_prompt(features, read, batch.size))
    order = torch.from_numpy(window_order(batch.size))
    hidden = prefix.hidden[:, model.image_start : model.image_start + len(order)][:, order]
    terms["spelling"] = losses.spelling(
        hidden, model.embed_tokens, torch.from_numpy(batch.pieces), model.scales["pieces"]
    )
    return terms, prefix


def compare_heads(model: SampleModel, batch: Batch, pages: Prefix, feedback: bool) -> dict[str, Tensor]:
    """The losses of each head's vectors, and how often the right page comes first in the batch."""
    asked = model.prefill(model.query_prompt(batch.questions))
    documents, queries = model.embed(pages, "document", feedback), model.embed(asked, "query", feedback)
    terms: dict[str, Tensor] = {}
    for head, vectors in documents.items():
        terms |= {
            f"{head}.{name}": value for name, value in head_losses(head, queries[head], vectors, asked, model).items()
        }
    tokens, keys = torch.from_numpy(batch.tokens), torch.from_numpy(batch.keys)
    for head in NAMED:
        if head in documents:
            table, scale = model.embed_tokens, model.scales["words"]
            terms[f"{head}.page_words"] = losses.naming(documents[head], table, tokens, scale)
            terms[f"{head}.query_words"] = losses.naming(queries[head], table, keys, scale)
    return terms


def head_losses(head: str, queries: Tensor, documents: Tensor, asked: Prefix, model: SampleModel) -> dict[str, Tensor]:
    cosines = losses.interactions(queries, documents)
    lengths = asked.prompt.lengths if head == "colbert" else torch.full((len(queries),), queries.shape[1])
    scores, scale = losses.late_interaction(cosines, lengths), model.scales[head]
    terms = {"contrast": losses.contrast(scores, scale)}
    if head == "metaembed":
        nested = [
            losses.late_interaction(cosines[:, :, :q, :k], torch.full_like(lengths, q)) for q, k in losses.NESTED[:-1]
        ]
        terms["nested"] = sum((losses.contrast(s, scale) for s in nested), torch.zeros(())) / len(nested)
    if head in ("causal", "feedback"):
        terms["margins"] = losses.margins(cosines)
        terms["diversity"] = losses.diversity(queries)
    right = scores.argmax(1) == losses.pages_of(scores)
    return terms | {"first": right.float().mean().detach()}


def total(terms: dict[str, Tensor]) -> Tensor:
    """The weighted sum; `first` is only watched."""
    weights = {name: WEIGHTS.get(name.split(".")[-1], CONTRAST_WEIGHT) for name in terms}
    return torch.stack([weights[n] * value.float() for n, value in terms.items() if not n.endswith("first")]).sum()


class Trainer:
    """Float32 weights with their optimisers, and the bfloat16 copy that runs."""

    def __init__(self, dims: Dims, tokenizer: Path, compiled: bool) -> None:
        self.master = SampleModel(dims, tokenizer)
        self.model = SampleModel(dims, tokenizer).to(torch.bfloat16)
        self.pairs = list(zip(self.model.parameters(), self.master.parameters(), strict=True))
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.master.named_parameters():
            hidden = parameter.dim() == 2 and not name.startswith(
                ("embed_tokens", "slots", "read_cells", "decoder.custom")
            )
            (matrices if hidden else others).append(parameter)
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(matrices, lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), 4e-3),
            (torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0), 2e-3),
        ]
        self.copy_down()
        if compiled:
            self.compile()

    def compile(self) -> None:
        for block in self.model.visual.blocks:
            block.compile(dynamic=True)
        for layer in self.model.decoder.layers:
            assert isinstance(layer, AttentionLayer)
            layer.finish = torch.compile(layer.finish, dynamic=True)  # type: ignore[method-assign]
            layer.self_attn.project = torch.compile(layer.self_attn.project, dynamic=True)  # type: ignore[method-assign]
            layer.input_layernorm.compile(dynamic=True)

    def copy_down(self) -> None:
        with torch.no_grad():
            for low, high in self.pairs:
                low.copy_(high)

    def step(self, loss: Tensor, rate: float) -> None:
        loss.backward()
        for low, high in self.pairs:
            high.grad = None if low.grad is None else low.grad.float()
            low.grad = None
        torch.nn.utils.clip_grad_norm_([high for _, high in self.pairs], 1.0)
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
        self.copy_down()

    def save(self, folder: Path, step: int) -> None:
        """The state in chunks, written whole before the old one goes."""
        buffer = io.BytesIO()
        state = {
            "step": step,
            "model": self.master.state_dict(),
            "optimizers": [o.state_dict() for o, _ in self.optimizers],
        }
        torch.save(state, buffer)
        data = buffer.getvalue()
        new = folder / "state.new"
        new.mkdir(exist_ok=True)
        for index, start in enumerate(range(0, len(data), CHUNK)):
            (new / f"{index:03}").write_bytes(data[start : start + CHUNK])
        old = folder / "state"
        if old.exists():
            for chunk in old.iterdir():
                chunk.unlink()
            old.rmdir()
        new.rename(old)

    def load(self, folder: Path) -> int:
        """The steps done, 0 without a state."""
        chunks = sorted((folder / "state").glob("*"))
        if not chunks:
            return 0
        state = torch.load(io.BytesIO(b"".join(chunk.read_bytes() for chunk in chunks)), weights_only=True)
        self.master.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.copy_down()
        return int(state["step"])


def learning_rate(step: int, stages: tuple[Stage, ...]) -> float:
    """As a share of the peak: a warm-up at each stage's start; with heads, down to zero at its end."""
    for stage in stages:
        if step < stage.steps:
            break
        step -= stage.steps
    rise = min(1.0, (step + 1) / WARMUP) * stage.rate
    return rise * (1 - step / stage.steps) if stage.heads else rise


def schedule(stages: tuple[Stage, ...], start: int) -> Iterator[tuple[int, Stage, int]]:
    """Stages with the steps already done in each."""
    first = 0
    for stage in stages:
        done = min(max(start - first, 0), stage.steps)
        if done < stage.steps:
            yield first, stage, done
        first += stage.steps


def note(log: Path, stage: str, step: int, sums: Mapping[str, Sequence[float]], **more: float) -> None:
    """Prints and logs the means of what was seen since the last time."""
    row: dict[str, Any] = {"stage": stage, "step": step}
    row |= {name: round(sum(values) / len(values), 4) for name, values in sums.items()} | more
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def train(
    trainer: Trainer,
    out: Path,
    tokenizer: Path,
    stages: tuple[Stage, ...],
    supply: Callable[..., Iterator[Batch]],
    seed: int = 0,
) -> None:
    """Every seed has other pages."""
    start = trainer.load(out)
    for first, stage, done in schedule(stages, start):
        name = f"{stage.name}-{done}" + (f"-{seed}" if seed else "")
        supplied = supply(tokenizer, stage.part, stage.batch, name, stage.holes)
        walls = supply(tokenizer, "walls", WALLS, f"{name}-walls")
        sums: dict[str, list[float]] = {}
        clock, pages = time.perf_counter(), 0
        for step in range(done, stage.steps):
            wall = stage.walls_every > 0 and step % stage.walls_every == 1
            batch = next(walls if wall else supplied)
            terms, prefix = read_page(trainer.model, batch, stage.decoder)
            if stage.heads and prefix is not None and not wall:
                terms |= compare_heads(trainer.model, batch, prefix, feedback=step % FEEDBACK_EVERY == 0)
            trainer.step(total(terms), learning_rate(first + step, stages))
            pages += len(batch.patches)
            for name, value in terms.items():
                sums.setdefault(name, []).append(float(value.detach()))
            if (step + 1) % LOG_EVERY == 0 or step + 1 == stage.steps:
                speed = round(pages / (time.perf_counter() - clock), 1)
                note(out / "log.jsonl", stage.name, first + step + 1, sums, pages_per_second=speed)
                clock, sums, pages = time.perf_counter(), {}, 0
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.steps:
                trainer.save(out, first + step + 1)


def main(
    out: Annotated[Path, typer.Argument(help="Where state, log and tokenizer are kept; an earlier run goes on.")],
    scale: Annotated[float, typer.Option(help="Share of the steps of each stage.")] = 1.0,
    seed: int = 0,
    start: Annotated[
        Path | None, typer.Option(help="A checkpoint that write.py made, to train further in the last stage.")
    ] = None,
    compiled: Annotated[bool, typer.Option(help="torch.compile: half the time, needs a C++ compiler.")] = True,
) -> None:
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = out / "tokenizer.json"
    dims = Dims()
    if start and not tokenizer.exists():
        tokenizer.write_bytes((start / "tokenizer.json").read_bytes())
    if not tokenizer.exists():
        write_tokenizer(tokenizer, dims.vocab)
    stages = tuple(replace(stage, steps=max(1, round(stage.steps * scale))) for stage in STAGES)
    trainer = Trainer(dims, tokenizer, compiled)
    if start and not (out / "state").exists():
        read_checkpoint(trainer.master, start)
        trainer.save(out, sum(stage.steps for stage in stages[:-1]))
    train(trainer, out, tokenizer, stages, prefetched, seed)


if __name__ == "__main__":
    typer.run(main)

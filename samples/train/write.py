"""Writes a trained model as checkpoints in Hugging Face layout, one for each head.

    python samples/train/write.py RUN OUT [--head causal …]

`cembed export --backbone qwen2.5-vl --model OUT/causal --slot-positions continue` takes it from there; the other heads
are named with --head. Weights are stored as bfloat16.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Annotated

import torch
import typer
from data import IMAGE
from model import HEADS, LEARNED, Dims, SampleModel
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from random_checkpoint import FILES, TOKENS, write_json

REST = "training/rest.safetensors"  # beside a checkpoint: what goes on training needs, and no export
ARCHITECTURE = {"colbert": "ColQwen2_5"}


def checkpoint_tensors(model: SampleModel, head: str) -> dict[str, Tensor]:
    """The weights that a head needs, under the names and in the shapes of released checkpoints."""
    tensors: dict[str, Tensor] = {f"visual.{name}": tensor for name, tensor in model.visual.named_parameters()}
    tensors |= {f"model.{name}": tensor for name, tensor in model.decoder.named_parameters() if "custom" not in name}
    if head == "colbert":
        tensors |= {name: tensor for name, tensor in model.decoder.named_parameters() if "custom" in name}
    tensors = {name: tensor.t() if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
    patch = tensors["visual.patch_embed.proj.weight"].unflatten(1, (3, 1, 14, 14)) / 2  # two frames that are the same
    tensors["visual.patch_embed.proj.weight"] = patch.expand(-1, -1, 2, -1, -1)
    tensors["model.embed_tokens.weight"] = model.embed_tokens
    if head in LEARNED:
        tensors |= {f"slot_embeddings.{side}": model.slots[f"{head}_{side}"] for side in ("document", "query")}
    return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def rest_tensors(model: SampleModel) -> dict[str, Tensor]:
    """What training has besides the backbone: the other heads, the reader of characters, the scales."""
    backbone = ("visual.", "decoder.layers.", "decoder.norm.", "embed_tokens")
    return {n: tensor.detach().contiguous() for n, tensor in model.named_parameters() if not n.startswith(backbone)}


def configuration(model: SampleModel, head: str) -> list[dict[str, object]]:
    """Contents of tokenizer_config.json, preprocessor_config.json and config.json."""
    dims: Dims = model.dims
    values = {
        **vars(dims),
        **{token.strip("<|>"): model.token(token) for token in TOKENS["qwen2.5-vl"]},
        "dtype": "bfloat16",
        "family": "qwen2_5_vl",
        "architecture": ARCHITECTURE.get(head, "CausalQwen2_5"),
        "mrope": list(dims.mrope),
        "layer_types": json.dumps(["full_attention"] * dims.layers),
        "full_attention": [],
        "max_pixels": IMAGE.max_pixels,
    }
    files = [json.loads(Template(text).substitute(values)) for text in FILES["qwen2.5-vl"]]
    text = files[2]["text_config"]
    text["rope_theta"], text["max_position_embeddings"] = dims.decoder().rope_theta, dims.decoder().max_positions
    return files


@torch.no_grad()
def read_checkpoint(model: SampleModel, folder: Path) -> None:
    """The opposite of writing one: fills a model to go on training."""
    tensors = load_file(folder / "model.safetensors")
    patch = tensors["visual.patch_embed.proj.weight"]
    tensors["visual.patch_embed.proj.weight"] = patch.float().sum(dim=2).flatten(1)
    found = {name.replace("model.", "decoder.", 1): t.t() if t.dim() == 2 else t for name, t in tensors.items()}
    found["embed_tokens"] = tensors["model.embed_tokens.weight"]
    found |= load_file(folder / REST)
    for name, parameter in model.named_parameters():
        parameter.copy_(found[name])


def write_checkpoint(model: SampleModel, head: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint_tensors(model, head), out / "model.safetensors", {"format": "pt"})
    model.tokenizer.save(str(out / "tokenizer.json"))
    for name, content in zip(
        ("tokenizer_config", "preprocessor_config", "config"), configuration(model, head), strict=True
    ):
        write_json(out / f"{name}.json", content)


def write_all(model: SampleModel, out: Path, heads: Iterable[str] = HEADS) -> None:
    """A checkpoint of each head, with what goes on training besides."""
    for name in heads:
        write_checkpoint(model, name, out / name)
        (out / name / REST).parent.mkdir(exist_ok=True)
        save_file(rest_tensors(model), out / name / REST)


def main(
    run: Annotated[Path, typer.Argument(help="What train.py wrote.")],
    out: Annotated[Path, typer.Argument(help="A folder; each head gets one in it.")],
    head: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(HEADS)}; by default all.")] = None,
) -> None:
    from train import Trainer

    trainer = Trainer(Dims(), run / "tokenizer.json", compiled=False)
    print(f"step {trainer.load(run)}")
    write_all(trainer.master, out, head or HEADS)


if __name__ == "__main__":
    typer.run(main)

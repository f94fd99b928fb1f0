"""The table of README.md beside this: what fits on which Jetson, by the arithmetic of `cembed build-engine`.

python samples/jetson/memory.py
"""

import sys
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from random_checkpoint import COLUMNS, SIZES, tensor_shapes

from cembed.runtime.engines.memory import EngineLimits, Fit, Model

Backbone = Literal["qwen2-vl", "qwen2.5-vl"]
MODELS: dict[str, Backbone] = {"Qwen2-VL-2B": "qwen2-vl", "Qwen2.5-VL-3B": "qwen2.5-vl"}
BYTES = {"fp16": 2.0, "W8A8, int8": 1.0, "int4": 0.5 + 4 / 32}  # of a weight; a float32 scale for 32 int4 ones
VALUE = {"fp16": 2}  # of an activation; quantised bundles compute in float32
LIMITS = EngineLimits(
    batch=1, visual_tokens=768, prompt=785, positions=849, vectors=64, patches=3072, windows=192, capacity=896
)
BOARDS = (8, 16, 32, 64)
SYSTEM = 2  # GiB that the system and its desktop keep: an allowance


def model_of(backbone: Backbone, precision: str, decomposed: bool) -> Model:
    """Of the published shapes; the token table stays on disk."""
    dims = dict(zip(COLUMNS.split(), SIZES[backbone, "2b"], strict=True))
    sizes = {name: prod(shape) for name, shape in tensor_shapes(backbone, "causal", "2b").items()}
    vision = sum(size for name, size in sizes.items() if name.startswith("visual."))
    text = sum(size for name, size in sizes.items() if not name.startswith("visual.") and "embed_tokens" not in name)
    weights = {name: int(size * BYTES[precision]) for name, size in (("vision", vision), ("text", text))}
    return Model(dims["hidden"], weights, 0, VALUE.get(precision, 4), decomposed)


def boards(fit: Fit) -> str:
    """The smallest board on which engines can be built, and on which pages can be embedded if that is another one."""
    build, embed = (smallest(need) for need in (fit.needed, sum(fit.needs.values())))
    return build if embed == build else f"{build} (only to embed, {embed})"


def smallest(need: int) -> str:
    return next((f"{size} GB" for size in BOARDS if size - SYSTEM >= need / 2**30), "none")


def row(name: str, precision: str, tokens: int) -> str:
    limits = replace(LIMITS, visual_tokens=tokens, patches=4 * tokens, positions=tokens + 81)
    models = [model_of(MODELS[name], precision, decomposed) for decomposed in (False, True)]
    fits = [Fit(model.needs(limits), model.build(limits, integrated=True), None) for model in models]
    embed = " / ".join(f"{sum(fit.needs.values()) / 2**30:.1f}" for fit in fits)
    build = " / ".join(f"{fit.build / 2**30:.1f}" for fit in fits)
    return f"| {' | '.join([name, precision, str(tokens), embed, build, *map(boards, fits)])} |"


def table() -> list[str]:
    """To embed and to build: with JetPack 7 / with JetPack 6, where attention is decomposed."""
    head = [
        "| model | precision | visual tokens | to embed, GiB | to build, GiB | JetPack 7 | JetPack 6 |",
        "|---" * 7 + "|",
    ]
    return [*head, *(row(*key) for key in product(MODELS, BYTES, (768, 256)))]


if __name__ == "__main__":
    print("\n".join(table()))

"""The values that flags of `cembed export` take. No heavy imports: the command line shows them in its help."""

from __future__ import annotations

from collections.abc import Iterable

from cembed.runtime.errors import CembedError

BACKBONES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "paligemma", "idefics3", "modernvbert")
"""Module names are these with underscores, and are what checkpoints call their `model_type`."""
HEADS = ("causal", "feedback", "metaembed", "btoks", "colbert")
POOLING = ("none", "mean", "last", "concat")
DTYPES = ("fp32", "fp16", "bf16")
TARGETS = ("onnxruntime", "onnx", "tensorrt")
SLOT_POSITIONS = ("zero", "continue")
PROMPT_ATTENTION = ("causal", "bidirectional")
WEIGHTS = ("int8", "int4", "fp16")
ROUNDINGS = ("nearest", "gptq")
RANGES = ("mse", "percentile", "minmax")
EMBEDDINGS = ("fp32", "fp16", "int8")


def require_choice(what: str, given: str, known: Iterable[str]) -> None:
    """Raises CembedError that lists what is known, if `given` is not."""
    if given not in known:
        raise CembedError(f"unknown {what} {given!r}: cembed has {', '.join(known)}")

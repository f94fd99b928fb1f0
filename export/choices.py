"""The values that flags of `cembed export` take. No heavy imports: the command line shows them in its help."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cembed.runtime.errors import CembedError


@dataclass(frozen=True)
class Known:
    """What names a backbone outside of its module: the released checkpoint that people use, as a hub id, and the model
    type of transformers' retrieval class around it, if there is one."""

    checkpoint: str
    wrapper: str | None = None


BACKBONES = {
    "qwen2-vl": Known("vidore/colqwen2-v1.0", "colqwen2"),
    "qwen2.5-vl": Known("vidore/colqwen2.5-v0.2", "colqwen2"),
    "qwen3-vl": Known("TomoroAI/tomoro-colqwen3-embed-4b"),
    "qwen3.5": Known("athrael-soju/colqwen3.5-4.5B-v3"),
    "paligemma": Known("vidore/colpali-v1.3", "colpali"),
    "idefics3": Known("vidore/colSmol-256M"),
    "modernvbert": Known("ModernVBERT/colmodernvbert", "colmodernvbert"),
}
"""Module names are these with underscores, and are what checkpoints call their `model_type`."""
HEADS = ("causal", "feedback", "metaembed", "btoks", "colbert", "single")
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

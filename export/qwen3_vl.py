"""Qwen3-VL (arXiv 2511.21631): norms of heads, position axes that take turns, features of images in several layers."""

from __future__ import annotations

from dataclasses import replace

from cembed.export.backbones import MAX_LAYERS, Backbone
from cembed.export.qwen3_5 import attending_config, qwen3_backbone, vision_config
from cembed.export.settings import Settings
from cembed.runtime.bundle.manifest import MAX_DEEPSTACK

EMBEDDING_PROMPTS = (
    "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{image}<|vision_end|><|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nRetrieve images or text relevant to the user's query.<|im_end|>\n<|im_start|>user\n"
    "{text}<|im_end|>\n<|im_start|>assistant\n",
)
"""Of Qwen3-VL-Embedding's own code: its default instruction, and for queries the one of its examples of retrieval."""


def from_hf(config: Settings, processor: Settings) -> Backbone:
    v, text = config.section("vision_config"), config.section("text_config")
    tower, side = vision_config(v)
    rope = text.section("rope_parameters").over({"rope_type": "default", "mrope_interleaved": True})
    decoder = attending_config(text, rope, text.count("head_dim"))
    vision = replace(tower, deepstack_layers=deepstack_layers(v, decoder.num_layers))
    backbone = qwen3_backbone("qwen3-vl", config, processor, decoder, vision, side)
    return replace(backbone, single_prompts=EMBEDDING_PROMPTS)


def deepstack_layers(v: Settings, num_layers: int) -> tuple[int, ...]:
    """Layers of the tower, in order; the features after each are for one of the decoder's first layers."""
    found, depth = v.counts("deepstack_visual_indexes", least=0), v.count("depth", most=MAX_LAYERS)
    most = min(num_layers, MAX_DEEPSTACK)
    if list(found) != sorted(set(found)) or any(index >= depth for index in found) or len(found) > most:
        v.refuse("deepstack_visual_indexes", f"up to {most} growing numbers below depth, {depth}")
    return found

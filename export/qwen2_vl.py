"""Qwen2-VL (arXiv 2409.12191): the decoder of `decoder.py`, the vision tower of `qwen_vision.py`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cembed.export.backbones import MAX_LAYERS, MAX_SIDE, Backbone, decoder_config, require_parts
from cembed.export.decoder import DecoderConfig
from cembed.export.image_settings import Geometry, smart_image
from cembed.export.layers import ACTIVATIONS
from cembed.export.qwen_vision import ROPE_THETA, QwenVisionConfig, QwenVisionTower
from cembed.export.settings import Settings
from cembed.runtime.bundle.manifest import Positions, Tensor

DOCUMENT_PROMPT = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>Describe the image.<|im_end|><|endoftext|>"
MAX_RATIO = 64
QUERY_PROMPT = "{text}" + 10 * "<|endoftext|>"
GME_PROMPTS = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{image}<|vision_end|><|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "{text}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
)
"""Of the own code of GME (arXiv 2412.16855), with its default instruction."""


def qwen_config(text: Settings) -> DecoderConfig:
    rope = text.section("rope_parameters").over({"rope_type": "default"})
    text.require("use_sliding_window", False)
    rope.require("rope_type", "default", "mrope")
    head_dim, sections = require_parts(text, "hidden_size", "num_attention_heads"), rope.counts("mrope_section")
    if len(sections) != 3 or 2 * sum(sections) != head_dim:
        rope.refuse("mrope_section", f"three numbers with the sum {head_dim // 2}")
    return decoder_config(text, rope, head_dim, sections=sections, bias=True)


def check_vision(vision: Settings, width: str) -> None:
    """What both towers have in common; `width` is what the rows of their blocks are called."""
    vision.require("in_channels", 3)
    if require_parts(vision, width, "num_heads") % 4:
        vision.refuse("num_heads", f"a number that leaves multiples of 4 of {width}")
    if vision.has("rope_parameters"):
        vision.section("rope_parameters").over({"rope_theta": ROPE_THETA}).require("rope_theta", ROPE_THETA)


def tower_config(vision: Settings) -> QwenVisionConfig:
    """The fields that towers since Qwen2.5-VL have under the same names."""
    return QwenVisionConfig(
        hidden_size=vision.count("hidden_size"),
        out_hidden_size=vision.count("out_hidden_size"),
        num_layers=vision.count("depth", most=MAX_LAYERS),
        num_heads=vision.count("num_heads"),
        intermediate_size=vision.count("intermediate_size"),
        activation=vision.text("hidden_act"),
        patch_size=vision.count("patch_size", most=MAX_SIDE),
        merge_size=vision.count("spatial_merge_size", most=MAX_SIDE),
    )


def qwen_backbone(
    name: str, config: Settings, processor: Settings, vision: QwenVisionConfig, windows: tuple[Tensor, ...] = ()
) -> Backbone:
    geometry = Geometry("smart", vision.patch_size, vision.merge_size, vision.window_size)
    frames = config.section("vision_config").count("temporal_patch_size")
    return Backbone(
        name=name,
        decoder=qwen_config(config.section("text_config")),
        image=smart_image(processor, geometry, frames),
        image_token_id=config.count("image_token_id", least=0),
        positions=Positions(axes=3, first=0),
        prompts=(DOCUMENT_PROMPT, QUERY_PROMPT),
        slot_positions="zero",
        prompt_attention="causal",
        vision_inputs=(
            Tensor("pixel_values", "float32", ("batch_size", "num_patches", 3 * vision.patch_size**2)),
            Tensor("patch_positions", "int64", ("num_patches", 2)),
            *windows,
        ),
        vision_prefix="visual.",
        build_vision=partial(QwenVisionTower, vision),
    )


def from_hf(config: Settings, processor: Settings) -> Backbone:
    v = config.section("vision_config")
    check_vision(v, "embed_dim")
    v.require("hidden_act", *ACTIVATIONS)
    if v.positive("mlp_ratio") > MAX_RATIO:
        v.refuse("mlp_ratio", f"a number up to {MAX_RATIO}")
    vision = QwenVisionConfig(
        hidden_size=v.count("embed_dim"),
        out_hidden_size=v.count("hidden_size"),
        num_layers=v.count("depth", most=MAX_LAYERS),
        num_heads=v.count("num_heads"),
        intermediate_size=int(v.count("embed_dim") * v.positive("mlp_ratio")),
        activation=v.text("hidden_act"),
        patch_size=v.count("patch_size", most=MAX_SIDE),
        merge_size=v.count("spatial_merge_size", most=MAX_SIDE),
    )
    return replace(qwen_backbone("qwen2-vl", config, processor, vision), single_prompts=GME_PROMPTS)

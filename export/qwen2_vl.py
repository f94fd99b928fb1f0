"""Qwen2-VL (arXiv 2409.12191): the decoder of `decoder.py`, the vision tower of `qwen_vision.py`."""

from __future__ import annotations

from functools import partial

from cembed.export.backbones import MAX_LAYERS, MAX_SIDE, Backbone, require_parts
from cembed.export.decoder import DecoderConfig
from cembed.export.image_settings import Geometry, smart_image
from cembed.export.layers import ACTIVATIONS
from cembed.export.qwen_vision import ROPE_THETA, QwenVisionConfig, QwenVisionTower
from cembed.export.settings import Settings
from cembed.runtime.bundle.manifest import Positions, Tensor

DOCUMENT_PROMPT = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>Describe the image.<|im_end|><|endoftext|>"
MAX_RATIO = 64
QUERY_PROMPT = "{text}" + 10 * "<|endoftext|>"


def decoder_config(text: Settings) -> DecoderConfig:
    rope = text.section("rope_parameters").over({"rope_type": "default"})
    text.require("use_sliding_window", False)
    text.require("hidden_act", "silu")
    rope.require("rope_type", "default", "mrope")
    head_dim, sections = require_parts(text, "hidden_size", "num_attention_heads"), rope.counts("mrope_section")
    require_parts(text, "num_attention_heads", "num_key_value_heads")
    if len(sections) != 3 or 2 * sum(sections) != head_dim:
        rope.refuse("mrope_section", f"three numbers with the sum {head_dim // 2}")
    return DecoderConfig(
        hidden_size=text.count("hidden_size"),
        num_layers=text.count("num_hidden_layers", most=MAX_LAYERS),
        num_heads=text.count("num_attention_heads"),
        num_kv_heads=text.count("num_key_value_heads"),
        head_dim=head_dim,
        intermediate_size=text.count("intermediate_size"),
        activation="silu",
        rms_norm_eps=text.positive("rms_norm_eps"),
        rope_theta=rope.positive("rope_theta"),
        mrope_section=sections,
        attention_bias=True,
        gemma=False,
        max_positions=text.count("max_position_embeddings"),
    )


def check_vision(vision: Settings, width: str) -> None:
    """What both towers have in common; `width` is what the rows of their blocks are called."""
    vision.require("in_channels", 3)
    if require_parts(vision, width, "num_heads") % 4:
        vision.refuse("num_heads", f"a number that leaves multiples of 4 of {width}")
    if vision.has("rope_parameters"):
        vision.section("rope_parameters").over({"rope_theta": ROPE_THETA}).require("rope_theta", ROPE_THETA)


def qwen_backbone(
    name: str, config: Settings, processor: Settings, vision: QwenVisionConfig, windows: tuple[Tensor, ...] = ()
) -> Backbone:
    geometry = Geometry("smart", vision.patch_size, vision.merge_size, vision.window_size)
    frames = config.section("vision_config").count("temporal_patch_size")
    return Backbone(
        name=name,
        decoder=decoder_config(config.section("text_config")),
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
    return qwen_backbone("qwen2-vl", config, processor, vision)

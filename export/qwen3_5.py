"""Qwen3.5: Gated DeltaNet layers and gated attention in turns, after the vision tower of `qwen3_vision.py`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import isqrt

from cembed.export.backbones import Backbone, decoder_config
from cembed.export.decoder import DecoderConfig
from cembed.export.delta_net import DeltaConfig
from cembed.export.image_settings import Geometry, smart_image
from cembed.export.qwen2_vl import DOCUMENT_PROMPT, QUERY_PROMPT, check_vision, tower_config
from cembed.export.qwen3_vision import Qwen3VisionTower, vision_inputs
from cembed.export.qwen_vision import QwenVisionConfig
from cembed.export.settings import Settings
from cembed.runtime.bundle.manifest import Positions

LINEAR, FULL = "linear_attention", "full_attention"
MAX_KERNEL = 64


def from_hf(config: Settings, processor: Settings) -> Backbone:
    vision, side = vision_config(config.section("vision_config"))
    decoder = recurring_config(config.section("text_config"))
    return qwen3_backbone("qwen3.5", config, processor, decoder, vision, side)


def qwen3_backbone(
    name: str, config: Settings, processor: Settings, decoder: DecoderConfig, vision: QwenVisionConfig, side: int
) -> Backbone:
    """Qwen3-VL too; `side` is that of the square which the tower's positions are for."""
    frames = config.section("vision_config").count("temporal_patch_size")
    return Backbone(
        name=name,
        decoder=decoder,
        image=smart_image(processor, Geometry("smart", vision.patch_size, vision.merge_size), frames),
        image_token_id=config.count("image_token_id", least=0),
        positions=Positions(axes=3, first=0),
        prompts=(DOCUMENT_PROMPT, QUERY_PROMPT),
        slot_positions="continue",
        prompt_attention="causal",
        vision_inputs=vision_inputs(vision),
        vision_prefix="visual.",
        build_vision=partial(Qwen3VisionTower, vision, side),
        deepstack=len(vision.deepstack_layers),
    )


def vision_config(v: Settings) -> tuple[QwenVisionConfig, int]:
    """The tower, and the side of the square that its learned positions are for."""
    check_vision(v, "hidden_size")
    v.require("hidden_act", "gelu_pytorch_tanh")
    places = v.count("num_position_embeddings")
    side = isqrt(places)
    if side * side != places:
        v.refuse("num_position_embeddings", "a square number")
    return tower_config(v), side


def recurring_config(text: Settings) -> DecoderConfig:
    rope = text.section("rope_parameters").over({"rope_type": "default"})
    text.over({"attn_output_gate": True}).require("attn_output_gate", True)
    attending = attending_config(text, rope, rotary_dim(rope, text.count("head_dim")))
    layers = delta_layers(text, attending.num_layers)
    return replace(attending, gemma=True, output_gate=True, delta=delta_config(text), delta_layers=layers)


def attending_config(text: Settings, rope: Settings, turning: int) -> DecoderConfig:
    """What Qwen3-VL has too: layers that attend, with norms of heads; `turning` components of a head turn."""
    rope.require("rope_type", "default")
    rope.require("mrope_interleaved", True)
    config = decoder_config(text, rope, text.count("head_dim"), sections=sections(rope, turning // 2))
    return replace(config, qk_norm=True, mrope_interleaved=True, rotary_dim=turning)


def rotary_dim(rope: Settings, head_dim: int) -> int:
    """Components of a head that turn."""
    factor = rope.positive("partial_rotary_factor")
    turning = int(head_dim * factor)
    if factor > 1 or turning % 2 or turning < 2:
        rope.refuse("partial_rotary_factor", f"a share of head_dim, {head_dim}, that is a multiple of 2")
    return turning


def sections(rope: Settings, frequencies: int) -> tuple[int, ...]:
    """Frequencies of time, height and width; the last two take turns from the second one on."""
    found = rope.counts("mrope_section")
    if len(found) != 3 or sum(found) != frequencies:
        rope.refuse("mrope_section", f"three numbers with the sum {frequencies}")
    if 3 * found[1] - 2 >= frequencies or 3 * found[2] - 1 >= frequencies:
        rope.refuse(
            "mrope_section", f"as many of height and width as find a place among {frequencies} in turns of three"
        )
    return found


def delta_layers(text: Settings, num_layers: int) -> frozenset[int]:
    """The numbers of the layers that recur; at least one must attend, and say how long the prompt was."""
    kinds = text.values.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {LINEAR, FULL}:
        text.refuse("layer_types", f"a list of {num_layers} times {LINEAR} or {FULL}")
    if FULL not in kinds:
        text.refuse("layer_types", f"a list with {FULL} in it")
    return frozenset(index for index, kind in enumerate(kinds) if kind == LINEAR)


def delta_config(text: Settings) -> DeltaConfig:
    keys, values = text.count("linear_num_key_heads"), text.count("linear_num_value_heads")
    if values % keys:
        text.refuse("linear_num_value_heads", f"a multiple of linear_num_key_heads, {keys}")
    return DeltaConfig(
        key_heads=keys,
        value_heads=values,
        key_dim=text.count("linear_key_head_dim"),
        value_dim=text.count("linear_value_head_dim"),
        kernel=text.count("linear_conv_kernel_dim", least=2, most=MAX_KERNEL),
    )

"""Qwen3.5: Gated DeltaNet layers and gated attention in turns, after the vision tower of `qwen3_vision.py`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import isqrt

from cembed.export.backbones import MAX_LAYERS, MAX_SIDE, Backbone
from cembed.export.decoder import DecoderConfig
from cembed.export.delta_net import DeltaConfig
from cembed.export.image_settings import Geometry, smart_image
from cembed.export.qwen2_vl import DOCUMENT_PROMPT, QUERY_PROMPT, check_vision
from cembed.export.qwen3_vision import Qwen3VisionTower, vision_inputs
from cembed.export.qwen_vision import QwenVisionConfig
from cembed.export.settings import Settings
from cembed.runtime.bundle.manifest import Positions

LINEAR, FULL = "linear_attention", "full_attention"
MAX_KERNEL = 64


def from_hf(config: Settings, processor: Settings) -> Backbone:
    vision, side = vision_config(config.section("vision_config"))
    frames = config.section("vision_config").count("temporal_patch_size")
    return Backbone(
        name="qwen3.5",
        decoder=decoder_config(config.section("text_config")),
        image=smart_image(processor, Geometry("smart", vision.patch_size, vision.merge_size), frames),
        image_token_id=config.count("image_token_id", least=0),
        positions=Positions(axes=3, first=0),
        prompts=(DOCUMENT_PROMPT, QUERY_PROMPT),
        slot_positions="continue",
        prompt_attention="causal",
        vision_inputs=vision_inputs(vision),
        vision_prefix="visual.",
        build_vision=partial(Qwen3VisionTower, vision, side),
    )


def vision_config(v: Settings) -> tuple[QwenVisionConfig, int]:
    """The tower, and the side of the square that its learned positions are for."""
    check_vision(v, "hidden_size")
    v.require("hidden_act", "gelu_pytorch_tanh")
    places = v.count("num_position_embeddings")
    side = isqrt(places)
    if side * side != places:
        v.refuse("num_position_embeddings", "a square number")
    config = QwenVisionConfig(
        hidden_size=v.count("hidden_size"),
        out_hidden_size=v.count("out_hidden_size"),
        num_layers=v.count("depth", most=MAX_LAYERS),
        num_heads=v.count("num_heads"),
        intermediate_size=v.count("intermediate_size"),
        activation=v.text("hidden_act"),
        patch_size=v.count("patch_size", most=MAX_SIDE),
        merge_size=v.count("spatial_merge_size", most=MAX_SIDE),
    )
    return config, side


def decoder_config(text: Settings) -> DecoderConfig:
    rope = text.section("rope_parameters").over({"rope_type": "default"})
    text.over({"attn_output_gate": True}).require("attn_output_gate", True)
    attending = attending_config(text, rope, rotary_dim(rope, text.count("head_dim")))
    layers = delta_layers(text, attending.num_layers)
    return replace(attending, gemma=True, output_gate=True, delta=delta_config(text), delta_layers=layers)


def attending_config(text: Settings, rope: Settings, turning: int) -> DecoderConfig:
    """What Qwen3-VL has too: layers that attend, with norms of heads; `turning` components of a head turn."""
    text.require("hidden_act", "silu")
    text.require("attention_bias", False)
    rope.require("rope_type", "default")
    rope.require("mrope_interleaved", True)
    heads, num_kv_heads = text.count("num_attention_heads"), text.count("num_key_value_heads")
    if heads % num_kv_heads:
        text.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    return DecoderConfig(
        hidden_size=text.count("hidden_size"),
        num_layers=text.count("num_hidden_layers", most=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=text.count("head_dim"),
        intermediate_size=text.count("intermediate_size"),
        activation="silu",
        rms_norm_eps=text.positive("rms_norm_eps"),
        rope_theta=rope.positive("rope_theta"),
        mrope_section=sections(rope, turning // 2),
        attention_bias=False,
        gemma=False,
        max_positions=text.count("max_position_embeddings"),
        qk_norm=True,
        mrope_interleaved=True,
        rotary_dim=turning,
    )


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

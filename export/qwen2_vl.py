"""Qwen2-VL (arXiv 2409.12191): the decoder of `decoder.py`, the vision tower of `qwen_vision.py`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from cembed.export.backbones import Backbone, image_processing, require_value, required
from cembed.export.decoder import DecoderConfig
from cembed.export.qwen_vision import QwenVisionConfig, QwenVisionTower
from cembed.runtime.manifest import ImageProcessing, Positions, Tensor

DOCUMENT_PROMPT = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>Describe the image.<|im_end|><|endoftext|>"
QUERY_PROMPT = "{text}" + 10 * "<|endoftext|>"


def decoder_config(text: Any) -> DecoderConfig:
    rope = text.rope_parameters
    require_value("use_sliding_window", bool(text.use_sliding_window), False)
    require_value("rope_type", rope.get("rope_type", "default"), "default", "mrope")
    require_value("hidden_act", text.hidden_act, "silu")
    return DecoderConfig(
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=text.hidden_size // text.num_attention_heads,
        intermediate_size=text.intermediate_size,
        activation=text.hidden_act,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        mrope_section=tuple(rope["mrope_section"]),
        attention_bias=True,
        gemma=False,
        max_positions=text.max_position_embeddings,
    )


def smart_image(processor: Mapping[str, Any], vision: QwenVisionConfig) -> ImageProcessing:
    """Pixel limits are called min_pixels and max_pixels, or shortest_edge and longest_edge, which are areas too."""
    limits = {**(processor.get("size") or {}), **{k: v for k, v in processor.items() if v is not None}}
    smallest, largest = (
        required(limits, *names) for names in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    )
    return image_processing(
        processor,
        resize="smart",
        patch_size=vision.patch_size,
        merge_size=vision.merge_size,
        min_pixels=int(smallest),
        max_pixels=int(largest),
        window_size=vision.window_size,
    )


def qwen_backbone(
    name: str, config: Any, image: ImageProcessing, vision: QwenVisionConfig, windows: tuple[Tensor, ...] = ()
) -> Backbone:
    require_value("in_channels", config.vision_config.in_channels, 3)
    return Backbone(
        name=name,
        decoder=decoder_config(config.text_config),
        image=image,
        image_token_id=config.image_token_id,
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


def from_hf(config: Any, processor: Mapping[str, Any]) -> Backbone:
    v = config.vision_config
    vision = QwenVisionConfig(
        hidden_size=v.embed_dim,
        out_hidden_size=v.hidden_size,
        num_layers=v.depth,
        num_heads=v.num_heads,
        intermediate_size=int(v.embed_dim * v.mlp_ratio),
        activation=v.hidden_act,
        patch_size=v.patch_size,
        merge_size=v.spatial_merge_size,
    )
    return qwen_backbone("qwen2-vl", config, smart_image(processor, vision), vision)

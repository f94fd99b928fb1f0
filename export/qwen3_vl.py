"""Qwen3-VL (arXiv 2511.21631): norms of heads, position axes that take turns, features of images in several layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cembed.export.backbones import MAX_LAYERS, Backbone
from cembed.export.decoder import DecoderConfig
from cembed.export.image_settings import Geometry, smart_image
from cembed.export.qwen2_vl import DOCUMENT_PROMPT, QUERY_PROMPT
from cembed.export.qwen3_5 import attending_config, vision_config
from cembed.export.qwen3_vision import Qwen3VisionTower, vision_inputs
from cembed.export.settings import Settings
from cembed.runtime.bundle.manifest import MAX_DEEPSTACK, Positions


def from_hf(config: Settings, processor: Settings) -> Backbone:
    v = config.section("vision_config")
    tower, side = vision_config(v)
    decoder = decoder_config(config.section("text_config"))
    vision = replace(tower, deepstack_layers=deepstack_layers(v, decoder.num_layers))
    geometry = Geometry("smart", vision.patch_size, vision.merge_size)
    return Backbone(
        name="qwen3-vl",
        decoder=decoder,
        image=smart_image(processor, geometry, v.count("temporal_patch_size")),
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


def deepstack_layers(v: Settings, num_layers: int) -> tuple[int, ...]:
    """Layers of the tower, in order; the features after each are for one of the decoder's first layers."""
    found, depth = v.counts("deepstack_visual_indexes", least=0), v.count("depth", most=MAX_LAYERS)
    most = min(num_layers, MAX_DEEPSTACK)
    if list(found) != sorted(set(found)) or any(index >= depth for index in found) or len(found) > most:
        v.refuse("deepstack_visual_indexes", f"up to {most} growing numbers below depth, {depth}")
    return found


def decoder_config(text: Settings) -> DecoderConfig:
    rope = text.section("rope_parameters").over({"rope_type": "default", "mrope_interleaved": True})
    return attending_config(text, rope, text.count("head_dim"))

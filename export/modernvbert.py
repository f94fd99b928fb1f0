"""ModernVBERT (arXiv 2510.01149): the tiles of `tiled.py` before ModernBERT, the encoder of `encoder.py`."""

from __future__ import annotations

from cembed.export.backbones import MAX_LAYERS, Backbone, require_parts
from cembed.export.encoder import EncoderConfig
from cembed.export.layers import ACTIVATIONS
from cembed.export.settings import Settings
from cembed.export.tiled import MAX_MERGE, TiledVision, in_order, tiled_backbone

DOCUMENT_PROMPT = "<|begin_of_text|>User:{image}Describe the image.<end_of_utterance>\nAssistant:"
FULL, SLIDING = "full_attention", "sliding_attention"


def encoder_config(text: Settings) -> EncoderConfig:
    text.require("model_type", "modernbert")
    text.require("hidden_activation", *ACTIVATIONS)
    head_dim = require_parts(text, "hidden_size", "num_attention_heads")
    if head_dim % 2:
        text.refuse("num_attention_heads", "a number that leaves heads of an even size")
    thetas = {}
    for kind in (FULL, SLIDING):
        rope = text.section("rope_parameters").section(kind).over({"rope_type": "default"})
        rope.require("rope_type", "default")
        thetas[kind] = rope.positive("rope_theta")
    return EncoderConfig(
        hidden_size=text.count("hidden_size"),
        num_layers=text.count("num_hidden_layers", most=MAX_LAYERS),
        num_heads=text.count("num_attention_heads"),
        intermediate_size=text.count("intermediate_size"),
        activation=text.text("hidden_activation"),
        norm_eps=text.positive("norm_eps"),
        norm_bias=text.flag("norm_bias", False),
        attention_bias=text.flag("attention_bias", False),
        mlp_bias=text.flag("mlp_bias", False),
        local=local_layers(text),
        window=text.count("local_attention") // 2,
        rope_theta=thetas[FULL],
        local_rope_theta=thetas[SLIDING],
        max_positions=text.count("max_position_embeddings"),
    )


def local_layers(text: Settings) -> tuple[bool, ...]:
    """Which layers see a window only."""
    kinds, layers = text.values.get("layer_types"), text.count("num_hidden_layers", most=MAX_LAYERS)
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        text.refuse("layer_types", f"{FULL} or {SLIDING} for each of {layers} layers")
    return tuple(kind == SLIDING for kind in kinds)


def from_hf(config: Settings, processor: Settings) -> Backbone:
    encoder = encoder_config(config.section("text_config"))
    v = config.section("vision_config")
    v.require("model_type", "siglip_vision_model")
    merge_size = config.count("pixel_shuffle_factor", most=MAX_MERGE)
    vision = TiledVision.of(v, processor, merge_size, encoder.hidden_size, in_order)
    return tiled_backbone("modernvbert", config, encoder, vision, DOCUMENT_PROMPT, "bidirectional")

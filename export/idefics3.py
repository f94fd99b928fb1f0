"""Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): the tiles of `tiled.py` before Llama, in `decoder.py`."""

from __future__ import annotations

from cembed.export.backbones import MAX_LAYERS, Backbone, require_parts
from cembed.export.decoder import DecoderConfig
from cembed.export.settings import Settings
from cembed.export.tiled import MAX_MERGE, QUERY_PROMPT, TiledVision, in_buckets
from cembed.runtime.bundle.manifest import Positions

DOCUMENT_PROMPT = "<|im_start|>User:{image}Describe the image.<end_of_utterance>\nAssistant:"


def decoder_config(text: Settings) -> DecoderConfig:
    text.require("model_type", "llama")
    rope = text.section("rope_parameters").over({"rope_type": "default"})
    for name, known in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        text.require(name, known)
    rope.require("rope_type", "default")
    require_parts(text, "num_attention_heads", "num_key_value_heads")
    if text.count("head_dim") % 2:
        text.refuse("head_dim", "an even number")
    return DecoderConfig(
        hidden_size=text.count("hidden_size"),
        num_layers=text.count("num_hidden_layers", most=MAX_LAYERS),
        num_heads=text.count("num_attention_heads"),
        num_kv_heads=text.count("num_key_value_heads"),
        head_dim=text.count("head_dim"),
        intermediate_size=text.count("intermediate_size"),
        activation="silu",
        rms_norm_eps=text.positive("rms_norm_eps"),
        rope_theta=rope.positive("rope_theta"),
        mrope_section=(),
        attention_bias=False,
        gemma=False,
        max_positions=text.count("max_position_embeddings"),
    )


def from_hf(config: Settings, processor: Settings) -> Backbone:
    decoder = decoder_config(config.section("text_config"))
    v = config.section("vision_config")
    v.require("model_type", "idefics3_vision", "idefics3")
    merge_size = config.count("scale_factor", most=MAX_MERGE)
    vision = TiledVision.of(v, processor, merge_size, decoder.hidden_size, in_buckets)
    return Backbone(
        name="idefics3",
        decoder=decoder,
        image=vision.image,
        image_token_id=config.count("image_token_id", least=0),
        positions=Positions(axes=1, first=0),
        prompts=(DOCUMENT_PROMPT, QUERY_PROMPT),
        slot_positions="continue",
        prompt_attention="causal",
        vision_inputs=vision.inputs,
        vision_prefix="",
        build_vision=vision.build,
        tokenizer_adds=True,
    )

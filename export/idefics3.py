"""Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): the tiles of `tiled.py` before Llama, in `decoder.py`."""

from __future__ import annotations

from cembed.export.backbones import Backbone, decoder_config, even_head_dim
from cembed.export.decoder import DecoderConfig
from cembed.export.settings import Settings
from cembed.export.tiled import MAX_MERGE, TiledVision, in_buckets, tiled_backbone

DOCUMENT_PROMPT = "<|im_start|>User:{image}Describe the image.<end_of_utterance>\nAssistant:"


def from_hf(config: Settings, processor: Settings) -> Backbone:
    decoder = llama_config(config.section("text_config"))
    v = config.section("vision_config")
    v.require("model_type", "idefics3_vision", "idefics3")
    merge_size = config.count("scale_factor", most=MAX_MERGE)
    vision = TiledVision.of(v, processor, merge_size, decoder.hidden_size, in_buckets)
    return tiled_backbone("idefics3", config, decoder, vision, DOCUMENT_PROMPT, "causal")


def llama_config(text: Settings) -> DecoderConfig:
    text.require("model_type", "llama")
    text.require("mlp_bias", False)
    rope = text.section("rope_parameters").over({"rope_type": "default"})
    rope.require("rope_type", "default")
    return decoder_config(text, rope, even_head_dim(text))

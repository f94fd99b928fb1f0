"""PaliGemma (arXiv 2407.07726): the SigLIP encoder of `siglip.py` before Gemma, the decoder of `decoder.py`.

Graph contract of `vision.onnx` (B images, P patches = visual tokens):

    pixel_values      float32 [B, P, 3 * patch**2]
    image_features    float32 [B, P, hidden]    scaled as Gemma's input embeddings are
"""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn

from cembed.export.backbones import MAX_LAYERS, Backbone, require_parts
from cembed.export.decoder import DecoderConfig
from cembed.export.image_settings import Geometry, fixed_image
from cembed.export.layers import Dialect, Linear
from cembed.export.settings import Settings
from cembed.export.siglip import SiglipConfig, SiglipModel, siglip_config
from cembed.runtime.bundle.manifest import Positions
from cembed.runtime.bundle.manifest import Tensor as TensorSpec

# The processor of transformers 4.57, which the checkpoints were trained with, put one <bos> before the prompt's own.
DOCUMENT_PROMPT = "{image}<bos><bos>Describe the image.\n"
QUERY_PROMPT = "<bos>{text}" + 10 * "<pad>"


class Projector(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.linear = Linear(config.hidden_size, config.out_hidden_size, bias=True)


class SiglipTower(nn.Module):
    def __init__(self, config: SiglipConfig, dialect: Dialect) -> None:
        super().__init__()
        self.dialect = dialect
        self.vision_tower = SiglipModel(config)
        self.multi_modal_projector = Projector(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.multi_modal_projector.linear(self.vision_tower(pixel_values, self.dialect)).float()


def decoder_config(text: Settings) -> DecoderConfig:
    rope = text.section("rope_parameters").over({"rope_type": "default"})
    text.require("attention_bias", False)
    text.require("hidden_act", "gelu_pytorch_tanh")
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
        activation="gelu_pytorch_tanh",
        rms_norm_eps=text.positive("rms_norm_eps"),
        rope_theta=rope.positive("rope_theta"),
        mrope_section=(),
        attention_bias=False,
        gemma=True,
        max_positions=text.count("max_position_embeddings"),
    )


def from_hf(config: Settings, processor: Settings) -> Backbone:
    text = config.section("text_config")
    text.require("model_type", "gemma")
    decoder = decoder_config(text)
    v = config.section("vision_config")
    v.require("model_type", "siglip_vision_model")
    vision = siglip_config(v, decoder.hidden_size)
    token = "image_token_index" if config.has("image_token_index") else "image_token_id"
    return Backbone(
        name="paligemma",
        decoder=decoder,
        image=fixed_image(processor, Geometry("fixed", vision.patch_size, merge_size=1), vision.image_size),
        image_token_id=config.count(token, least=0),
        positions=Positions(axes=1, first=1),
        prompts=(DOCUMENT_PROMPT, QUERY_PROMPT),
        slot_positions="continue",
        prompt_attention="bidirectional",
        vision_inputs=(
            TensorSpec("pixel_values", "float32", ("batch_size", vision.num_patches, 3 * vision.patch_size**2)),
        ),
        vision_prefix="",
        build_vision=partial(SiglipTower, vision),
        # Gemma multiplies its input embeddings by sqrt(hidden); PaliGemma divides image features by it first.
        embedding_scale=math.sqrt(decoder.hidden_size),
    )

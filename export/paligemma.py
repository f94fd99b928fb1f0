"""PaliGemma (arXiv 2407.07726): the SigLIP encoder of `siglip.py` before Gemma, the decoder of `decoder.py`.

Graph contract of `vision.onnx` (B images, P patches = visual tokens):

    pixel_values      float32 [B, P, 3 * patch**2]
    patch_positions   int64   [P, 2]                row and column of each patch
    image_features    float32 [B, P, hidden]    scaled as Gemma's input embeddings are
"""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn

from cembed.export.backbones import Backbone, decoder_config, even_head_dim
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

    def forward(self, pixel_values: Tensor, patch_positions: Tensor) -> Tensor:
        features = self.vision_tower(pixel_values, self.dialect, patch_positions)
        return self.multi_modal_projector.linear(features).float()


def from_hf(config: Settings, processor: Settings) -> Backbone:
    text = config.section("text_config")
    text.require("model_type", "gemma")
    rope = text.section("rope_parameters").over({"rope_type": "default"})
    rope.require("rope_type", "default")
    decoder = decoder_config(text, rope, even_head_dim(text), activation="gelu_pytorch_tanh", gemma=True)
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
            TensorSpec("pixel_values", "float32", ("batch_size", "num_patches", 3 * vision.patch_size**2)),
            TensorSpec("patch_positions", "int64", ("num_patches", 2)),
        ),
        vision_prefix="",
        build_vision=partial(SiglipTower, vision),
        # Gemma multiplies its input embeddings by sqrt(hidden); PaliGemma divides image features by it first.
        embedding_scale=math.sqrt(decoder.hidden_size),
    )

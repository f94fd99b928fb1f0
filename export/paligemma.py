"""PaliGemma (arXiv 2407.07726): a SigLIP tower (arXiv 2303.15343) before Gemma, the decoder of `decoder.py`.

Graph contract of `vision.onnx` (B images, P patches = visual tokens):

    pixel_values      float32 [B, P, 3 * patch**2]
    image_features    float32 [B, P, hidden]    scaled as Gemma's input embeddings are
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cembed.export.backbones import MAX_LAYERS, MAX_SIDE, Backbone, require_parts
from cembed.export.decoder import DecoderConfig
from cembed.export.image_settings import Geometry, fixed_image
from cembed.export.layers import ACTIVATIONS, MLP, Dialect, LayerNorm, Linear, PatchEmbedding
from cembed.export.settings import Settings
from cembed.runtime.bundle.manifest import Positions
from cembed.runtime.bundle.manifest import Tensor as TensorSpec

# The processor of transformers 4.57, which the checkpoints were trained with, put one <bos> before the prompt's own.
DOCUMENT_PROMPT = "{image}<bos><bos>Describe the image.\n"
QUERY_PROMPT = "<bos>{text}" + 10 * "<pad>"


@dataclass(frozen=True)
class SiglipConfig:
    hidden_size: int
    out_hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    image_size: int
    patch_size: int
    layer_norm_eps: float

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class PositionEmbedding(nn.Module):
    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size), requires_grad=False)


class Embeddings(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(3 * config.patch_size**2, config.hidden_size, bias=True)
        self.position_embedding = PositionEmbedding(config.num_patches, config.hidden_size)


class SiglipAttention(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(config.hidden_size, config.hidden_size, bias=True) for _ in range(4)
        )
        self.heads = (config.num_heads, config.num_heads)

    def forward(self, x: Tensor, dialect: Dialect) -> Tensor:
        return self.out_proj(dialect.attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class EncoderLayer(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.activation)

    def forward(self, x: Tensor, dialect: Dialect) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), dialect)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))


class SiglipModel(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)


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
        tower = self.vision_tower
        positions = tower.embeddings.position_embedding.weight
        x = tower.embeddings.patch_embedding(pixel_values.to(positions.dtype)) + positions
        for layer in tower.encoder.layers:
            x = layer(x, self.dialect)
        return self.multi_modal_projector.linear(tower.post_layernorm(x)).float()


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


def siglip_config(v: Settings, out_hidden_size: int) -> SiglipConfig:
    v.require("model_type", "siglip_vision_model")
    v.require("num_channels", 3)
    v.require("hidden_act", *ACTIVATIONS)
    require_parts(v, "hidden_size", "num_attention_heads")
    require_parts(v, "image_size", "patch_size")
    return SiglipConfig(
        hidden_size=v.count("hidden_size"),
        out_hidden_size=out_hidden_size,
        num_layers=v.count("num_hidden_layers", most=MAX_LAYERS),
        num_heads=v.count("num_attention_heads"),
        intermediate_size=v.count("intermediate_size"),
        activation=v.text("hidden_act"),
        image_size=v.count("image_size", most=MAX_SIDE),
        patch_size=v.count("patch_size", most=MAX_SIDE),
        layer_norm_eps=v.positive("layer_norm_eps"),
    )


def from_hf(config: Settings, processor: Settings) -> Backbone:
    text = config.section("text_config")
    text.require("model_type", "gemma")
    decoder = decoder_config(text)
    vision = siglip_config(config.section("vision_config"), decoder.hidden_size)
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

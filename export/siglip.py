"""The encoder of SigLIP (arXiv 2303.15343), which PaliGemma and the tiles of Idefics3 and ModernVBERT go through.

Letters: B images, P patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cembed.export.backbones import MAX_LAYERS, MAX_SIDE, require_parts
from cembed.export.layers import ACTIVATIONS, MLP, Dialect, LayerNorm, Linear, PatchEmbedding
from cembed.export.settings import Settings


@dataclass(frozen=True)
class SiglipConfig:
    """`patch_order` says which of the checkpoint's positions each patch has; they follow each other if it is empty."""

    hidden_size: int
    out_hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    image_size: int
    patch_size: int
    layer_norm_eps: float
    patch_order: tuple[int, ...] = ()

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class PositionEmbedding(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_patches, config.hidden_size), requires_grad=False)
        self._config = config

    def at(self, patch_positions: Tensor | None) -> Tensor:
        """Rows [P, hidden] of patches in these rows and columns [P, 2]; of all of them without."""
        if patch_positions is None:
            return self.weight
        side = self._config.image_size // self._config.patch_size
        return self.weight.index_select(0, patch_positions[:, 0] * side + patch_positions[:, 1])

    def convert(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.shape != self.weight.shape or not self._config.patch_order:
            return tensor
        return torch.stack([tensor[row] for row in self._config.patch_order])


class Embeddings(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(3 * config.patch_size**2, config.hidden_size, bias=True)
        self.position_embedding = PositionEmbedding(config)


class SiglipAttention(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(config.hidden_size, config.hidden_size, bias=True) for _ in range(4)
        )
        self.heads = (config.num_heads, config.num_heads)

    def forward(self, x: Tensor, dialect: Dialect) -> Tensor:
        return self.out_proj(dialect.attention((self.q_proj(x), self.k_proj(x), self.v_proj(x)), self.heads))


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

    def forward(self, pixel_values: Tensor, dialect: Dialect, patch_positions: Tensor | None = None) -> Tensor:
        """Rows [B, P, hidden] of images [B, P, 3 * patch**2]; of some patches with their `patch_positions`."""
        positions = self.embeddings.position_embedding.at(patch_positions)
        x = self.embeddings.patch_embedding(pixel_values.to(positions.dtype)) + positions
        for layer in self.encoder.layers:
            x = layer(x, dialect)
        return self.post_layernorm(x)


def siglip_config(v: Settings, out_hidden_size: int) -> SiglipConfig:
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

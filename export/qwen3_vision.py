"""The vision tower of Qwen3-VL (arXiv 2511.21631) and Qwen3.5: learned positions of a square, resampled for each page.

Graph contract of `vision.onnx` (B images of one size, P patches, V = P / merge_size**2 visual tokens):

    pixel_values      float32 [B, P, 3 * patch**2]
    patch_positions   int64   [P, 2]   row and column of each patch, in merge groups
    patch_fractions   float32 [P, 2]   the same from 0 at the first to 1 at the last row and column
    image_features    float32 [B, V, (1 + L) * hidden]   for the positions, then for each of L layers of the decoder
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cembed.export.layers import ACTIVATIONS, Dialect, LayerNorm, Linear, PatchEmbedding
from cembed.export.qwen_vision import NORM_EPS, QwenVisionConfig, VisionAttention, vision_rotary_tables
from cembed.runtime.bundle.manifest import Tensor as TensorSpec


class LearnedPositions(nn.Module):
    """Rows of a table for `side` x `side` places, blended where a patch lies between them."""

    def __init__(self, side: int, hidden: int) -> None:
        super().__init__()
        self.side = side
        self.weight = nn.Parameter(torch.empty(side * side, hidden), requires_grad=False)

    def forward(self, fractions: Tensor) -> Tensor:
        """[P, H] for places [P, 2]."""
        places = fractions * (self.side - 1)
        first = places.floor().clamp(0, self.side - 1)
        share = (places - first).to(self.weight.dtype)
        rows, columns = first.long().unbind(1)
        down, right = ((n + 1).clamp(max=self.side - 1) for n in (rows, columns))
        below, beside = share[:, :1], share[:, 1:]
        upper = self.at(rows, columns) * (1 - beside) + self.at(rows, right) * beside
        lower = self.at(down, columns) * (1 - beside) + self.at(down, right) * beside
        return upper * (1 - below) + lower * below

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        return torch.index_select(self.weight, 0, rows * self.side + columns)


class VisionMLP(nn.Module):
    def __init__(self, inputs: int, inner: int, outputs: int, activation: str) -> None:
        super().__init__()
        self.linear_fc1 = Linear(inputs, inner, bias=True)
        self.linear_fc2 = Linear(inner, outputs, bias=True)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(self.activation(self.linear_fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = (LayerNorm(config.hidden_size, NORM_EPS) for _ in range(2))
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size, config.hidden_size, config.activation)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dialect: Dialect) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, dialect, None)
        return x + self.mlp(self.norm2(x))


class PatchMerger(VisionMLP):
    """Four neighbouring patches become one visual token; the norm is of each patch, or of all of them (`grouped`)."""

    def __init__(self, config: QwenVisionConfig, *, grouped: bool = False) -> None:
        self.width = config.hidden_size * config.merge_size**2
        super().__init__(self.width, self.width, config.out_hidden_size, "gelu")
        self.norm, self.grouped = LayerNorm(self.width if grouped else config.hidden_size, NORM_EPS), grouped

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], -1, self.width)
        return super().forward(self.norm(x.reshape(shape)) if self.grouped else self.norm(x).reshape(shape))


class PatchProjection(nn.Module):
    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.proj = PatchEmbedding(3 * config.patch_size**2, config.hidden_size, bias=True)


class Qwen3VisionTower(nn.Module):
    def __init__(self, config: QwenVisionConfig, side: int, dialect: Dialect) -> None:
        super().__init__()
        self.config, self.dialect = config, dialect
        self.patch_embed = PatchProjection(config)
        self.pos_embed = LearnedPositions(side, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        self.merger = PatchMerger(config)
        self.deepstack_merger_list = nn.ModuleList(PatchMerger(config, grouped=True) for _ in config.deepstack_layers)

    def forward(self, pixel_values: Tensor, patch_positions: Tensor, patch_fractions: Tensor) -> Tensor:
        x = self.patch_embed.proj(pixel_values.to(self.pos_embed.weight.dtype))
        x = x + self.pos_embed(patch_fractions)
        cos, sin = vision_rotary_tables(self.config, patch_positions, x.shape[0], x.dtype)
        deep: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, self.dialect)
            if index in self.config.deepstack_layers:
                deep.append(self.deepstack_merger_list[len(deep)](x))
        merged: Tensor = self.merger(x)
        return (torch.cat([merged, *deep], dim=-1) if deep else merged).float()


def vision_inputs(config: QwenVisionConfig) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec("pixel_values", "float32", ("batch_size", "num_patches", 3 * config.patch_size**2)),
        TensorSpec("patch_positions", "int64", ("num_patches", 2)),
        TensorSpec("patch_fractions", "float32", ("num_patches", 2)),
    )

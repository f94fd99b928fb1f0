"""ModernBERT (arXiv 2412.13663): an encoder whose layers see all positions, or a window, each with rotary positions.

Graph contract of `text.onnx` (B inputs, S positions, K positions read, H hidden):

    inputs_embeds     float32 [B, S, H]   a whole prompt: there is no mask, and nothing is filled up
    position_ids      int64   [1, B, S]   rotary positions
    slot_indices      int64   [B, K]      the positions whose state is returned
    slot_states       float32 [B, K, dim] after the final norm and the projection, not yet L2-normalised
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cembed.export.layers import ACTIVATIONS, Dialect, LayerNorm, Linear, inverse_frequencies, rotary_tables

Rotary = tuple[Tensor, Tensor]
"""cos and sin [B, S, D / 2]."""


@dataclass(frozen=True)
class EncoderConfig:
    """`local` layers see `window` positions to each side, and turn by `local_rope_theta`."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    norm_eps: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    local: tuple[bool, ...]
    window: int
    rope_theta: float
    local_rope_theta: float
    max_positions: int

    @property
    def position_axes(self) -> Literal[1]:
        return 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def norm(self) -> LayerNorm:
        return LayerNorm(self.hidden_size, self.norm_eps, self.norm_bias)


class EncoderAttention(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.Wqkv = Linear(config.hidden_size, 3 * config.hidden_size, config.attention_bias)
        self.Wo = Linear(config.hidden_size, config.hidden_size, config.attention_bias)
        self.heads = config.num_heads, config.num_heads

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None, dialect: Dialect) -> Tensor:
        """What each position attends to, before `Wo`."""
        q, k, v = self.Wqkv(x).chunk(3, dim=-1)
        q, k = (dialect.rotary(t, *rotary, self.heads[0]) for t in (q, k))
        return dialect.attention((q, k, v), self.heads, mask=mask)


class EncoderMLP(nn.Module):
    """Gated, with both halves in one matrix (GeGLU, arXiv 2002.05202)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.Wi = Linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias)
        self.Wo = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.Wi(x).chunk(2, dim=-1)
        return self.Wo(self.activation(x) * gate)


class EncoderLayer(nn.Module):
    """The first layer has no norm before its attention: its input was normalised just before."""

    def __init__(self, config: EncoderConfig, first: bool) -> None:
        super().__init__()
        self.attn_norm = nn.Identity() if first else config.norm()
        self.mlp_norm = config.norm()
        self.attn, self.mlp = EncoderAttention(config), EncoderMLP(config)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        x = residual + self.attn.Wo(attended)
        return x + self.mlp(self.mlp_norm(x))


class Embeddings(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.norm = config.norm()


class Encoder(nn.Module):
    """Parameter names are those of the checkpoints, prefixes stripped."""

    def __init__(self, config: EncoderConfig, projection: int | None, dialect: Dialect) -> None:
        super().__init__()
        self.config, self.dialect = config, dialect
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(EncoderLayer(config, first=index == 0) for index in range(config.num_layers))
        self.final_norm = config.norm()
        self.custom_text_proj = Linear(config.hidden_size, projection, bias=True) if projection else None

    def rotary(self, position_ids: Tensor, theta: float, dtype: torch.dtype) -> Rotary:
        return rotary_tables(position_ids[0].unsqueeze(-1), inverse_frequencies(theta, self.config.head_dim), dtype)

    def window(self, length: int) -> Tensor:
        """Bool [1, 1, S, S]: how far a local layer sees."""
        places = torch.arange(length)
        return ((places[:, None] - places[None, :]).abs() <= self.config.window)[None, None]

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, slot_indices: Tensor) -> Tensor:
        x = self.embeddings.norm(inputs_embeds.to(self.final_norm.weight.dtype))
        turns = [self.rotary(position_ids, t, x.dtype) for t in (self.config.rope_theta, self.config.local_rope_theta)]
        window, rows = self.window(x.shape[1]), slot_indices.unsqueeze(-1)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, EncoderLayer)
            local = self.config.local[index]
            attended = layer.attn(layer.attn_norm(x), turns[local], window if local else None, self.dialect)
            if index == len(self.layers) - 1:  # nothing but the rows read is needed after the last attention
                x, attended = (torch.gather(t, 1, rows.expand(-1, -1, t.shape[-1])) for t in (x, attended))
            x = layer.finish(x, attended)
        x = self.final_norm(x)
        return (x if self.custom_text_proj is None else self.custom_text_proj(x)).float()

"""The text decoder of every backbone so far: pre-norm, rotary positions, grouped key-value heads, gated MLP.

Graph contract of `text.onnx` (B inputs, S positions, K positions read, H hidden, A position axes):

    inputs_embeds     float32 [B, S, H]   prompt and latent slots; shorter inputs are filled up behind their last slot
    position_ids      int64   [A, B, S]   rotary positions
    slot_indices      int64   [B, K]      the positions whose state is returned
    prompt_length     int64   [1]         only where the prompt attends bidirectionally and slots follow it
    slot_states       float32 [B, K, dim] after the final norm and the projection, not yet L2-normalised

and of `text_step.onnx`, the same weights over a static cache of C positions (S = n: prefill, S = 1: decode step):

    inputs_embeds, position_ids, slot_indices as above
    cache_position    int64   [B]         positions that the cache holds already
    past_key_values.{i}.key, .value       [B, kv_heads, C, head_dim] in the type of the arithmetic
    slot_states       as above
    hidden_states     float32 [B, K, H]   before the projection; only where there is one
    present.{i}.key, .value               bound to the buffers of past_key_values
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cembed.export.layers import Dialect, GatedMLP, GemmaRMSNorm, Linear, RMSNorm, inverse_frequencies, rotary_tables

Attending = Literal["causal", "bidirectional", "bidirectional-prompt"]
"""`bidirectional-prompt`: the prompt attends to all of itself, each slot to the prompt and the slots up to itself."""


QKV = tuple[Tensor, Tensor, Tensor]
Attend = Callable[[int, QKV], Tensor]


@dataclass(frozen=True)
class DecoderConfig:
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: str
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    attention_bias: bool
    gemma: bool
    max_positions: int

    @property
    def position_axes(self) -> Literal[1, 3]:
        return 3 if len(self.mrope_section) == 3 else 1

    @property
    def heads(self) -> tuple[int, int]:
        return self.num_heads, self.num_kv_heads


class SelfAttention(nn.Module):
    """Query, key and value projections and rotary positions; what attends to what is the caller's."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query, config.attention_bias)
        self.k_proj = Linear(config.hidden_size, key, config.attention_bias)
        self.v_proj = Linear(config.hidden_size, key, config.attention_bias)
        self.o_proj = Linear(query, config.hidden_size, bias=False)
        self.heads = config.heads

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, dialect: Dialect) -> QKV:
        q = dialect.rotary(self.q_proj(x), cos, sin, self.heads[0])
        k = dialect.rotary(self.k_proj(x), cos, sin, self.heads[1])
        return q, k, self.v_proj(x)


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        norm = GemmaRMSNorm if config.gemma else RMSNorm
        self.self_attn = SelfAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.activation)
        self.input_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = norm(config.hidden_size, config.rms_norm_eps)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        x = residual + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Layers and norm without attention's wiring; parameter names are those of the checkpoints, prefixes stripped."""

    def __init__(self, config: DecoderConfig, attending: Attending, projection: int | None, dialect: Dialect) -> None:
        super().__init__()
        self.config, self.attending, self.dialect = config, attending, dialect
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = (GemmaRMSNorm if config.gemma else RMSNorm)(config.hidden_size, config.rms_norm_eps)
        self.custom_text_proj = Linear(config.hidden_size, projection, bias=True) if projection else None

    def rotary_tables(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [B, S, D / 2]. With M-RoPE each frequency belongs to one of the axes (arXiv 2409.12191, 2.1)."""
        sections = self.config.mrope_section or (self.config.head_dim // 2,)
        axis = torch.tensor([axis for axis, count in enumerate(sections) for _ in range(count)])
        positions = position_ids.permute(1, 2, 0).index_select(-1, axis)  # B S D/2
        return rotary_tables(positions, inverse_frequencies(self.config.rope_theta, self.config.head_dim), dtype)

    def run(self, inputs_embeds: Tensor, position_ids: Tensor, slot_indices: Tensor, attend: Attend) -> Tensor:
        """Hidden states [B, K, H] after the final norm; `attend` is told the layer's number and its q, k and v."""
        x = inputs_embeds.to(self.norm.weight.dtype)
        cos, sin = self.rotary_tables(position_ids, x.dtype)
        rows = slot_indices.unsqueeze(-1)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            attended = attend(index, layer.self_attn.project(layer.input_layernorm(x), cos, sin, self.dialect))
            if index == len(self.layers) - 1:  # nothing but the slots is needed behind the last attention
                attended = torch.gather(attended, 1, rows.expand(-1, -1, attended.shape[-1]))
                x = torch.gather(x, 1, rows.expand(-1, -1, x.shape[-1]))
            x = layer.finish(x, attended)
        return self.norm(x)

    def project(self, x: Tensor) -> Tensor:
        return (x if self.custom_text_proj is None else self.custom_text_proj(x)).float()


class SinglePass(Decoder):
    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, slot_indices: Tensor, prompt_length: Tensor | None = None
    ) -> Tensor:
        def attend(_: int, qkv: QKV) -> Tensor:
            if prompt_length is None:
                return self.dialect.attention(*qkv, self.config.heads, causal=self.attending == "causal")
            return self.attend_prompt_and_slots(*qkv, prompt_length)

        return self.project(self.run(inputs_embeds, position_ids, slot_indices, attend))

    def attend_prompt_and_slots(self, q: Tensor, k: Tensor, v: Tensor, prompt_length: Tensor) -> Tensor:
        """In two parts, cut before the prompt's last position, which sees the prompt either way.

        So no part is ever empty, and the mask has K rows instead of S.
        """
        cut = prompt_length.item() - 1
        torch._check(cut >= 1)
        torch._check(cut < q.shape[1])
        prompt_end = cut + 1
        heads = self.config.heads
        prompt = self.dialect.attention(q[:, :cut], k[:, :prompt_end], v[:, :prompt_end], heads)
        columns = torch.arange(q.shape[1])
        mask = columns[None, :] <= columns[cut:, None]
        slots = self.dialect.attention(q[:, cut:], k, v, heads, mask=mask[None, None])
        return torch.cat([prompt, slots], dim=1)


class Step(Decoder):
    """Prefill and decode step over a static cache; a bidirectional prompt comes in one call, slots one at a time."""

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        slot_indices: Tensor,
        cache_position: Tensor,
        past: dict[str, Tensor],
    ) -> tuple[Tensor, ...]:
        present: list[Tensor] = []
        causal = self.attending == "causal"

        def attend(index: int, qkv: QKV) -> Tensor:
            held = past[f"past_key_values.{index}.key"], past[f"past_key_values.{index}.value"]
            out, *cache = self.dialect.cached_attention(qkv, held, cache_position, self.config.heads, causal)
            present.extend(cache)
            return out

        hidden = self.run(inputs_embeds, position_ids, slot_indices, attend)
        fed_back = () if self.custom_text_proj is None else (hidden.float(),)
        return (self.project(hidden), *fed_back, *present)

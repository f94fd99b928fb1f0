"""The text decoder of every backbone so far: pre-norm, rotary positions, grouped key-value heads, gated MLP.

Layers attend, or are Gated DeltaNets, which keep a state in place of keys and values.

Graph contract of `text.onnx` (B inputs, S positions, K positions read, H hidden, A position axes):

    inputs_embeds     float32 [B, S, H]   prompt and latent slots; shorter inputs are filled up after their last slot
    position_ids      int64   [A, B, S]   rotary positions
    slot_indices      int64   [B, K]      the positions whose state is returned
    prompt_length     int64   [1]         only where the prompt attends bidirectionally and slots follow it
    deepstack_embeds  float32 [B, S, L * H]  only of Qwen3-VL: what is added after each of the first L layers
    slot_states       float32 [B, K, dim] after the final norm and the projection, not yet L2-normalised

and of `text_step.onnx`, the same weights over a static cache of C positions (S = n: prefill, S = 1: decode step):

    inputs_embeds, position_ids, slot_indices, deepstack_embeds as above
    cache_position    int64   [B]         positions that the cache holds already
    past_key_values.{i}.key, .value       [B, kv_heads, C, head_dim] in the type of the arithmetic; of other layers
    past_states.{i}.conv                  float32 [B, channels, kernel - 1] and
    past_states.{i}.recurrent             float32 [B, value_heads, key_dim, value_dim]
    slot_states       as above
    hidden_states     float32 [B, K, H]   before the projection; only where there is one
    present.{i}.key, .value               bound to the buffers of past_key_values
    present_states.{i}.conv, .recurrent   as the past, in buffers of their own
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cembed.export.delta_net import DeltaConfig, DeltaNet
from cembed.export.layers import (
    QKV,
    Dialect,
    GatedMLP,
    GemmaRMSNorm,
    Linear,
    RMSNorm,
    inverse_frequencies,
    rotary_tables,
)
from cembed.runtime.bundle.manifest import Tensor as GraphTensor

Attending = Literal["causal", "bidirectional", "bidirectional-prompt"]
"""`bidirectional-prompt`: the prompt attends to all of itself, each slot to the prompt and the slots up to itself."""


Attend = Callable[[int, QKV], Tensor]
Recur = Callable[[int, DeltaNet, Tensor], Tensor]


@dataclass(frozen=True)
class Wiring:
    """How layers reach other positions: attention on a layer's q, k and v, and a DeltaNet's recurrence on its input."""

    attend: Attend
    recur: Recur | None = None


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
    qk_norm: bool = False
    output_gate: bool = False
    mrope_interleaved: bool = False
    rotary_dim: int | None = None
    """Components of a head that turn, the first ones; None: all."""
    delta: DeltaConfig | None = None
    delta_layers: frozenset[int] = frozenset()

    @property
    def position_axes(self) -> Literal[1, 3]:
        return 3 if len(self.mrope_section) == 3 else 1

    @property
    def heads(self) -> tuple[int, int]:
        return self.num_heads, self.num_kv_heads

    @property
    def turning(self) -> int:
        return self.rotary_dim or self.head_dim

    @property
    def axes_of_frequencies(self) -> list[int]:
        """The position axis that each frequency belongs to (arXiv 2409.12191, 2.1): in runs, or taking turns."""
        sections = self.mrope_section or (self.turning // 2,)
        if not self.mrope_interleaved:
            return [axis for axis, count in enumerate(sections) for _ in range(count)]
        return [n % 3 if n < 3 * sections[n % 3] else 0 for n in range(self.turning // 2)]

    def norm(self, size: int) -> RMSNorm:
        return (GemmaRMSNorm if self.gemma else RMSNorm)(size, self.rms_norm_eps)

    def kept(self, layer: int, capacity: int | str, cache_type: str) -> list[GraphTensor]:
        """What a layer keeps for later positions, as inputs of the step."""
        if layer in self.delta_layers:
            assert self.delta is not None
            return self.delta.kept(layer)
        shape = ("batch_size", self.num_kv_heads, capacity, self.head_dim)
        return [GraphTensor(f"past_key_values.{layer}.{part}", cache_type, shape) for part in ("key", "value")]


class SelfAttention(nn.Module):
    """Projections, norms of heads, rotary positions and gate; what attends to what is the caller's."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query * (1 + config.output_gate), config.attention_bias)
        self.k_proj = Linear(config.hidden_size, key, config.attention_bias)
        self.v_proj = Linear(config.hidden_size, key, config.attention_bias)
        self.o_proj = Linear(query, config.hidden_size, bias=False)
        self.q_norm = config.norm(config.head_dim) if config.qk_norm else None
        self.k_norm = config.norm(config.head_dim) if config.qk_norm else None
        self.heads, self.gated = config.heads, config.output_gate

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, dialect: Dialect) -> tuple[QKV, Tensor | None]:
        """What attends, and the gate of what comes of it, before the sigmoid."""
        q, gate = self.q_proj(x), None
        if self.gated:  # each head's query and gate are side by side
            q, gate = (part.flatten(2) for part in q.unflatten(-1, (self.heads[0], -1)).chunk(2, dim=-1))
        q = dialect.rotary(normed(q, self.q_norm, self.heads[0]), cos, sin, self.heads[0])
        k = dialect.rotary(normed(self.k_proj(x), self.k_norm, self.heads[1]), cos, sin, self.heads[1])
        return (q, k, self.v_proj(x)), gate


def normed(x: Tensor, norm: nn.Module | None, heads: int) -> Tensor:
    """x [B, S, N * D] with each head normed, where there is a norm."""
    if norm is None:
        return x
    result: Tensor = norm(x.unflatten(-1, (heads, -1))).flatten(2)
    return result


def rows_at(x: Tensor, indices: Tensor) -> Tensor:
    """The rows `indices` [B, K] of x [B, S, H]."""
    return torch.gather(x, 1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class DecoderLayer(nn.Module, ABC):
    """Norms and MLP of the layer number `index`; how it reaches other positions is its kind's."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.activation)
        self.input_layernorm = config.norm(config.hidden_size)
        self.post_attention_layernorm = config.norm(config.hidden_size)

    @abstractmethod
    def mix(self, x: Tensor, tables: tuple[Tensor, Tensor], dialect: Dialect, wiring: Wiring) -> Tensor:
        """What the layer takes from the positions of its normed input, for `output`."""

    @abstractmethod
    def output(self, mixed: Tensor) -> Tensor:
        """Back to the hidden size."""

    def finish(self, residual: Tensor, mixed: Tensor) -> Tensor:
        x = residual + self.output(mixed)
        return x + self.mlp(self.post_attention_layernorm(x))


class AttentionLayer(DecoderLayer):
    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__(config, index)
        self.self_attn = SelfAttention(config)

    def mix(self, x: Tensor, tables: tuple[Tensor, Tensor], dialect: Dialect, wiring: Wiring) -> Tensor:
        qkv, gate = self.self_attn.project(x, *tables, dialect)
        attended = wiring.attend(self.index, qkv)
        return attended if gate is None else attended * torch.sigmoid(gate)

    def output(self, mixed: Tensor) -> Tensor:
        return self.self_attn.o_proj(mixed)


class DeltaLayer(DecoderLayer):
    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__(config, index)
        assert config.delta is not None
        self.linear_attn = DeltaNet(config.hidden_size, config.delta, config.rms_norm_eps)

    def mix(self, x: Tensor, tables: tuple[Tensor, Tensor], dialect: Dialect, wiring: Wiring) -> Tensor:
        assert wiring.recur is not None, "nothing was said of recurrence"
        return wiring.recur(self.index, self.linear_attn, x)

    def output(self, mixed: Tensor) -> Tensor:
        return self.linear_attn.out_proj(mixed)


class Decoder(nn.Module):
    """Layers and norm without attention's wiring; parameter names are those of the checkpoints, prefixes stripped."""

    def __init__(self, config: DecoderConfig, attending: Attending, projection: int | None, dialect: Dialect) -> None:
        super().__init__()
        self.config, self.attending, self.dialect = config, attending, dialect
        self.layers = nn.ModuleList(
            (DeltaLayer if index in config.delta_layers else AttentionLayer)(config, index)
            for index in range(config.num_layers)
        )
        self.norm = config.norm(config.hidden_size)
        self.custom_text_proj = Linear(config.hidden_size, projection, bias=True) if projection else None

    def rotary_tables(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [B, S, D / 2], of the components that turn."""
        axis = torch.tensor(self.config.axes_of_frequencies)
        positions = position_ids.permute(1, 2, 0).index_select(-1, axis)  # B S D/2
        return rotary_tables(positions, inverse_frequencies(self.config.rope_theta, self.config.turning), dtype)

    def run(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        slot_indices: Tensor,
        attend: Attend,
        recur: Recur | None = None,
        deepstack_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, K, H] after the final norm; `attend` and `recur` are told a layer's number."""
        wiring = Wiring(attend, recur)
        x = inputs_embeds.to(self.norm.weight.dtype)
        tables = self.rotary_tables(position_ids, x.dtype)
        added = [] if deepstack_embeds is None else list(deepstack_embeds.to(x.dtype).split(x.shape[-1], dim=-1))
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            mixed = layer.mix(layer.input_layernorm(x), tables, self.dialect, wiring)
            if index == len(self.layers) - 1:  # nothing but the slots is needed after the last attention
                mixed, x, *added[index:] = (rows_at(t, slot_indices) for t in (mixed, x, *added[index:]))
            x = layer.finish(x, mixed)
            x = x + added[index] if index < len(added) else x
        return self.norm(x)

    def project(self, x: Tensor) -> Tensor:
        return (x if self.custom_text_proj is None else self.custom_text_proj(x)).float()


class SinglePass(Decoder):
    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        slot_indices: Tensor,
        prompt_length: Tensor | None = None,
        deepstack_embeds: Tensor | None = None,
    ) -> Tensor:
        def attend(_: int, qkv: QKV) -> Tensor:
            if prompt_length is None:
                return self.dialect.attention(qkv, self.config.heads, causal=self.attending == "causal")
            return self.attend_prompt_and_slots(*qkv, prompt_length)

        def recur(_: int, net: DeltaNet, x: Tensor) -> Tensor:
            return net.mix(x, None, self.dialect)[0]

        return self.project(self.run(inputs_embeds, position_ids, slot_indices, attend, recur, deepstack_embeds))

    def attend_prompt_and_slots(self, q: Tensor, k: Tensor, v: Tensor, prompt_length: Tensor) -> Tensor:
        """In two parts, cut before the prompt's last position, which sees the prompt either way.

        So no part is ever empty, and the mask has K rows instead of S.
        """
        cut = prompt_length.item() - 1
        torch._check(cut >= 1)
        torch._check(cut < q.shape[1])
        prompt_end = cut + 1
        heads = self.config.heads
        prompt = self.dialect.attention((q[:, :cut], k[:, :prompt_end], v[:, :prompt_end]), heads)
        columns = torch.arange(q.shape[1])
        mask = columns[None, :] <= columns[cut:, None]
        slots = self.dialect.attention((q[:, cut:], k, v), heads, mask=mask[None, None])
        return torch.cat([prompt, slots], dim=1)


class Step(Decoder):
    """Prefill and decode step over a static cache; a bidirectional prompt comes in one call, slots one at a time."""

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        slot_indices: Tensor,
        cache_position: Tensor,
        deepstack_embeds: Tensor | None = None,
        *,
        past: dict[str, Tensor],
    ) -> tuple[Tensor, ...]:
        present: list[Tensor] = []
        causal = self.attending == "causal"

        def held(kind: str, index: int, *names: str) -> tuple[Tensor, Tensor]:
            first, second = (past[f"{kind}.{index}.{name}"] for name in names)
            return first, second

        def attend(index: int, qkv: QKV) -> Tensor:
            out, *cache = self.dialect.cached_attention(
                qkv, held("past_key_values", index, "key", "value"), cache_position, self.config.heads, causal
            )
            present.extend(cache)
            return out

        def recur(index: int, net: DeltaNet, x: Tensor) -> Tensor:
            out, memory = net.mix(x, held("past_states", index, "conv", "recurrent"), self.dialect)
            present.extend(memory)
            return out

        hidden = self.run(inputs_embeds, position_ids, slot_indices, attend, recur, deepstack_embeds)
        fed_back = () if self.custom_text_proj is None else (hidden.float(),)
        return (self.project(hidden), *fed_back, *present)

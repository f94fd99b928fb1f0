"""Torch layers shared by the backbones, and the operator dialects they are traced in.

Letters: B batch, S positions, T positions attended to, K slots read, N heads, D head dimension, H hidden size.
A module that stores a weight otherwise than the checkpoint does says how in `convert`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cembed.export.recurrence import DeltaInputs, in_chunks, linear_attention, stepwise

Heads = tuple[int, int]
"""Query heads and key-value heads."""
QKV = tuple[Tensor, Tensor, Tensor]
"""Query [B, S, N * D], key and value [B, T, N_kv * D]."""


def apart(qkv: QKV, heads: Heads) -> QKV:
    """Heads on an axis of their own: [B, N, S, D] from [B, S, N * D]."""
    q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in zip(qkv, (heads[0], *2 * heads[1:]), strict=True))
    return q, k, v


class Dialect(Protocol):
    """How rotary embedding and attention are written. Heads are side by side: query is [B, S, N * D]."""

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        """Rotate x [B, S, N * D] by cos and sin [B, S, R / 2]: the first R of a head, their halves paired."""

    def attention(self, qkv: QKV, heads: Heads, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        """Scaled dot-product attention; heads is (query, key-value); mask is bool, [B or 1, 1, S, T], True attends."""

    def cached_attention(
        self, qkv: QKV, past: tuple[Tensor, Tensor], start: Tensor, heads: Heads, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention over a static cache [B, N_kv, C, D], written from position start [B] on: output, key and value.

        Causal, each of the S positions sees the cache up to itself; otherwise up to the last of them.
        """

    def delta_rule(self, x: DeltaInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gated delta rule from a state, or from nothing: the output [B, S, N * E], and the state after it."""


class Decomposed:
    """Plain torch: the graphs for opsets below 23."""

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        x = x.unflatten(-1, (heads, -1))  # B S N D
        half = cos.shape[-1]
        first, second, *rest = x.split(
            [half, half, *([x.shape[-1] - 2 * half] if x.shape[-1] > 2 * half else [])], dim=-1
        )
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, *rest], dim=-1).flatten(2)

    def attention(self, qkv: QKV, heads: Heads, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        q, k, v = apart(qkv, heads)
        grouped = heads[0] != heads[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)

    def cached_attention(
        self, qkv: QKV, past: tuple[Tensor, Tensor], start: Tensor, heads: Heads, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = apart(qkv, heads)
        key, value = (self.update_cache(cache, new, start) for cache, new in zip(past, (k, v), strict=True))
        rows = start[:, None] + torch.arange(q.shape[2])  # B S
        limit = rows if causal else rows[:, -1:].expand(-1, q.shape[2])
        mask = torch.arange(key.shape[2])[None, None, None] <= limit[:, None, :, None]  # B 1 S C
        return self.attend_heads(q, key, value, mask).transpose(1, 2).flatten(2), key, value

    def update_cache(self, cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
        rows = start[:, None] + torch.arange(new.shape[2])  # B S
        return cache.scatter(2, rows[:, None, :, None].expand_as(new), new)

    def attend_heads(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q [B, N, S, D] on k and v [B, N_kv, C, D]."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    def delta_rule(self, x: DeltaInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return in_chunks(x, state)


class Reference(Decomposed):
    """What torch runs in the parity check."""

    def delta_rule(self, x: DeltaInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return stepwise(x, state)


class Standard(Decomposed):
    """The standard operators of ONNX opset 23 and later."""

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        turning = 2 * cos.shape[-1]
        part = 0 if turning * heads == x.shape[-1] else turning
        return torch.onnx.ops.rotary_embedding(x, cos, sin, num_heads=heads, rotary_embedding_dim=part)

    def attention(self, qkv: QKV, heads: Heads, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        return torch.onnx.ops.attention(
            *qkv, attn_mask=mask, is_causal=causal, q_num_heads=heads[0], kv_num_heads=heads[1]
        )[0]

    def attend_heads(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.onnx.ops.attention(q, k, v, attn_mask=mask)[0]


class Scattering(Standard):
    """With TensorScatter, of opset 24: an engine may update the cache in place."""

    def update_cache(self, cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "TensorScatter", (cache, new, start), attrs={"axis": 2}, dtype=cache.dtype, shape=cache.shape, version=24
        )


class OnnxRuntime(Scattering):
    """Standard operators, but for attention without a mask: ONNX Runtime's own kernels never hold an S x S matrix.

    Measured (2 threads): 31 ms instead of 51 for 1024 positions with 12/2 heads of 128, causal; 276 ms and 94 MB
    instead of 414 ms and 654 MB for 3072 positions with 16 heads of 80. These nodes can be traced, not run by torch.
    """

    def attention(self, qkv: QKV, heads: Heads, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return super().attention(qkv, heads, causal=causal, mask=mask)
        q, k, v = qkv
        if causal:
            lengths = torch.scalar_tensor(q.shape[1], dtype=torch.int32).expand(q.shape[0])
            present = (q.shape[0], heads[1], q.shape[1], q.shape[2] // heads[0])
            return grouped_query_attention(q, k, v, (None, None), lengths, heads, present)[0]
        if heads[0] != heads[1]:
            k, v = (repeat_heads(x, heads) for x in (k, v))
        return torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (q, k, v),
            attrs={"num_heads": heads[0]},
            dtype=q.dtype,
            shape=q.shape,
            version=1,
        )

    def cached_attention(
        self, qkv: QKV, past: tuple[Tensor, Tensor], start: Tensor, heads: Heads, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not causal:
            return super().cached_attention(qkv, past, start, heads, causal)
        lengths = (start + qkv[0].shape[1]).int()  # B
        return grouped_query_attention(*qkv, past, lengths, heads, past[0].shape)

    def delta_rule(self, x: DeltaInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return linear_attention(x, state)


def grouped_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor | None, Tensor | None],
    lengths: Tensor,
    heads: Heads,
    present: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """`lengths` int32 [B]: positions filled after this call. The present is written in place if it is the past."""
    out, key, value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (q, k, v, *past, lengths - 1, lengths.max().reshape(1)),
        attrs={"num_heads": heads[0], "kv_num_heads": heads[1]},
        dtypes=(q.dtype, q.dtype, q.dtype),
        shapes=(q.shape, present, present),
        version=1,
    )
    return out, key, value


def repeat_heads(x: Tensor, heads: Heads) -> Tensor:
    """Key or value heads [B, T, N_kv * D] as many as the query's: [B, T, N * D]."""
    x = x.unflatten(-1, (heads[1], 1, -1))
    return x.expand(-1, -1, -1, heads[0] // heads[1], -1).flatten(2)


class Linear(nn.Module):
    """x @ weight + bias with weight [in, out], as a MatMul node wants it; checkpoints hold [out, in]."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight.to(x.dtype)  # a weight stored narrower than the arithmetic is widened here
        return x if self.bias is None else x + self.bias

    @staticmethod
    def convert(name: str, tensor: Tensor) -> Tensor:
        return tensor.t() if name == "weight" else tensor


class PatchEmbedding(Linear):
    """A convolution over whole patches as a Linear [3 * patch**2, out].

    Temporal slices [out, 3, frames, patch, patch] are summed: a still image is the same frame each time.
    """

    @staticmethod
    def convert(name: str, tensor: Tensor) -> Tensor:
        if name != "weight":
            return tensor
        if tensor.dim() == 5:
            tensor = tensor.float().sum(dim=2)
        return tensor.flatten(1).t()


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)

    @staticmethod
    def convert(name: str, tensor: Tensor) -> Tensor:
        return tensor


class GemmaRMSNorm(RMSNorm):
    """Gemma stores the weight minus one."""

    @staticmethod
    def convert(name: str, tensor: Tensor) -> Tensor:
        return tensor.float() + 1.0


class LayerNorm(nn.Module):
    def __init__(self, size: int, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class GatedMLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias)
        self.up_proj = Linear(hidden, intermediate, bias)
        self.down_proj = Linear(intermediate, hidden, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int, activation: str) -> None:
        super().__init__()
        self.fc1 = Linear(hidden, intermediate, bias=True)
        self.fc2 = Linear(intermediate, hidden, bias=True)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def rotary_tables(positions: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of positions times frequencies, computed in float32; positions broadcast against the frequencies."""
    angles = positions.float() * inverse_frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def inverse_frequencies(theta: float, dim: int) -> Tensor:
    """1 / theta**(2i / dim) for i < dim / 2."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


@dataclass(frozen=True)
class Arithmetic:
    """What `--dtype` means: the type activations have in the graph, and the type the large weights are stored in.

    bf16 is a storage type: ONNX Runtime's CPU provider has no bfloat16 kernels, and widening is exact.
    """

    compute: torch.dtype
    storage: torch.dtype


DTYPES = {
    "fp32": Arithmetic(torch.float32, torch.float32),
    "fp16": Arithmetic(torch.float16, torch.float16),
    "bf16": Arithmetic(torch.float32, torch.bfloat16),
}

"""A Gated DeltaNet layer (arXiv 2412.06464): a memory of fixed size in place of keys and values that grow.

Convolution, decay and recurrence are computed in float32, whatever the type of the arithmetic is.

Letters as in `recurrence.py`; M = 2 N D + N E, the channels of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cembed.export.layers import Dialect, Linear, RMSNorm, repeat_heads
from cembed.export.recurrence import DeltaInputs
from cembed.runtime.bundle.manifest import Tensor as GraphTensor

UNIT_EPS = 1e-6  # added to a squared length

Memory = tuple[Tensor, Tensor]
"""The last inputs of the convolution [B, M, kernel - 1], and the state [B, N, D, E]."""


@dataclass(frozen=True)
class DeltaConfig:
    """Each of `key_heads` queries and keys serves as many consecutive value heads as there are times more of these."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def keys(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        return 2 * self.keys + self.values

    def kept(self, layer: int) -> list[GraphTensor]:
        """What is kept for later positions, as inputs of the step."""
        state = ("batch_size", self.value_heads, self.key_dim, self.value_dim)
        return [
            GraphTensor(f"past_states.{layer}.conv", "float32", ("batch_size", self.channels, self.kernel - 1)),
            GraphTensor(f"past_states.{layer}.recurrent", "float32", state),
        ]


class CausalConvolution(nn.Module):
    """Each channel over its own last `kernel` positions, then SiLU."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, S, M] after the positions `past` [B, M, kernel - 1], or after nothing: the result, and the new past."""
        more = self.weight.shape[-1] - 1
        x = x.transpose(1, 2)
        x = F.pad(x, (more, 0)) if past is None else torch.cat([past, x], dim=2)
        result = F.silu(F.conv1d(x, self.weight, groups=self.weight.shape[0]))
        return result.transpose(1, 2), x[:, :, x.shape[2] - more :]


class DeltaNet(nn.Module):
    """Parameter names are those of the checkpoints; `A_log` is stored as the factor of the decay, -exp(A_log)."""

    def __init__(self, hidden: int, config: DeltaConfig, eps: float) -> None:
        super().__init__()
        self.config = config
        self.in_proj_qkv = Linear(hidden, config.channels, bias=False)
        self.in_proj_z = Linear(hidden, config.values, bias=False)
        self.in_proj_b = Linear(hidden, config.value_heads, bias=False)
        self.in_proj_a = Linear(hidden, config.value_heads, bias=False)
        self.conv1d = CausalConvolution(config.channels, config.kernel)
        self.A_log = nn.Parameter(torch.empty(config.value_heads, dtype=torch.float32), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(config.value_heads, dtype=torch.float32), requires_grad=False)
        self.norm = RMSNorm(config.value_dim, eps)
        self.out_proj = Linear(config.values, hidden, bias=False)

    @staticmethod
    def convert(name: str, tensor: Tensor) -> Tensor:
        return -tensor.float().exp() if name == "A_log" else tensor

    def mix(self, x: Tensor, past: Memory | None, dialect: Dialect) -> tuple[Tensor, Memory]:
        """x [B, S, H] after `past`: what `out_proj` takes, [B, S, N * E], and the memory after it."""
        gate = self.in_proj_z(x)
        rate = torch.sigmoid(self.in_proj_b(x).float())
        decay = self.A_log * F.softplus(self.in_proj_a(x).float() + self.dt_bias)
        before, state = (None, None) if past is None else past
        convolved, recent = self.conv1d(self.in_proj_qkv(x).float(), before)
        sizes = [self.config.keys, self.config.keys, self.config.values]
        query, key, value = convolved.split(sizes, dim=-1)
        inputs = DeltaInputs(self.unit(query, self.config.key_dim**-0.5), self.unit(key, 1.0), value, decay, rate)
        output, present = dialect.delta_rule(inputs, state)
        normed = self.norm(output.to(x.dtype).unflatten(-1, (self.config.value_heads, -1))).flatten(2)
        return normed * F.silu(gate), (recent, present)

    def unit(self, x: Tensor, scale: float) -> Tensor:
        """Heads of x [B, S, keys] with the length `scale`, each as often as value heads share it: [B, S, N * D].

        As an RMS norm, which is one operator: x / |x| is x / rms(x) / sqrt(D).
        """
        size = self.config.key_dim
        weight = torch.full((size,), scale * size**-0.5)
        x = F.rms_norm(x.unflatten(-1, (self.config.key_heads, size)), (size,), weight, UNIT_EPS / size)
        heads = (self.config.value_heads, self.config.key_heads)
        return x.flatten(2) if heads[0] == heads[1] else repeat_heads(x.flatten(2), heads)

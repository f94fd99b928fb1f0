"""The gated delta rule (arXiv 2412.06464) in three forms: position by position, in chunks, as ONNX Runtime's operator.

A head's state is a matrix [D, E] that maps keys to values. Position t, with key k, value v, decay g <= 0 and rate b:

    state = exp(g) state;   state += k (b (v - state^T k))^T;   output = state^T q

Letters: B batch, S positions, N heads, D length of a key, E length of a value, C positions of a chunk, G chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 32  # of 16, 32 and 64 the fastest on a CPU; what a single step computes too much grows with it


@dataclass(frozen=True)
class DeltaInputs:
    """query and key [B, S, N * D], value [B, S, N * E], decay and rate [B, S, N]; in float32, keys of length 1."""

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    rate: Tensor

    @property
    def heads(self) -> int:
        return self.decay.shape[-1]

    def zeros(self) -> Tensor:
        """The state [B, N, D, E] before the first position."""
        widths = (tensor.shape[-1] // self.heads for tensor in (self.key, self.value))
        return self.query.new_zeros(self.query.shape[0], self.heads, *widths)


def stepwise(x: DeltaInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output [B, S, N * E] and the state [B, N, D, E], by the definition: what the other forms are checked against."""
    state = x.zeros() if state is None else state
    query, key, value = (t.unflatten(-1, (x.heads, -1)).unsqueeze(-1) for t in (x.query, x.key, x.value))  # B S N D 1
    outputs = []
    for t in range(x.query.shape[1]):
        state = state * x.decay[:, t, :, None, None].exp()
        known = state.transpose(-1, -2) @ key[:, t]
        state = state + key[:, t] @ (x.rate[:, t, :, None, None] * (value[:, t] - known)).transpose(-1, -2)
        outputs.append((state.transpose(-1, -2) @ query[:, t]).flatten(1))
    return torch.stack(outputs, dim=1), state


def in_chunks(x: DeltaInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same in products of matrices: what happens inside of chunks at once, then one chunk after the other.

    Within a chunk, what each position writes depends on what those before it wrote: a triangular system, solved for
    all chunks together. It can be traced, not run by torch.
    """
    query, key, value, decay, rate = (chunked(t, x.heads) for t in (x.query, x.key, x.value, x.decay, x.rate))
    lower = torch.ones(CHUNK, CHUNK).tril()
    within = (lower @ (decay * lower.tril(-1))).exp() * lower  # what is left of column j in row i
    left = (lower @ decay).exp()  # G B N C 1: of the state before the chunk
    solve = unit_lower_inverse(key * rate @ key.transpose(-1, -2) * within)
    parts = (
        solve @ (value * rate),  # what would be written if the state were empty
        solve @ (key * rate * left),  # what is known of it already, of the state
        query @ key.transpose(-1, -2) * within,
        query * left,
        key.transpose(-1, -2) * within[..., -1:, :],
        left[..., -1:, :],
    )
    last, outputs = scan_chunks(x.zeros() if state is None else state, parts)  # outputs: G B N C E
    return outputs.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : x.query.shape[1]].flatten(2), last


def chunked(x: Tensor, heads: int) -> Tensor:
    """[B, S, N * X] as [G, B, N, C, X], filled up with zeros, which change no state."""
    count = (x.shape[1] + CHUNK - 1) // CHUNK
    x = torch.cat([x, x.new_zeros(x.shape[0], CHUNK - 1, x.shape[2])], dim=1)[:, : count * CHUNK]
    return x.unflatten(1, (count, CHUNK)).unflatten(-1, (heads, -1)).permute(1, 0, 3, 2, 4)


def unit_lower_inverse(matrix: Tensor) -> Tensor:
    """The inverse of a unit triangular matrix [..., C, C], of which what is below the diagonal is read.

    Blocks on the diagonal are inverted, in sizes that double: [[A, 0], [X, B]] has the inverse
    [[A', 0], [-B' X A', B']]. Powers of the matrix, which need fewer products, overflow where keys repeat.
    """
    inverse = torch.eye(CHUNK) - matrix * below_blocks(1)
    for doubling in range(1, CHUNK.bit_length() - 1):
        inverse = inverse - inverse @ (matrix * below_blocks(1 << doubling)) @ inverse
    return inverse


def below_blocks(size: int) -> Tensor:
    """Ones in every second block of `size` below the diagonal ones, [C, C].

    >>> below_blocks(CHUNK // 2).sum().item() == (CHUNK // 2) ** 2, below_blocks(1)[:4, :4].nonzero().tolist()
    (True, [[1, 0], [3, 2]])
    """
    block = torch.arange(CHUNK) // size
    return ((block[:, None] == block + 1) & (block[:, None] % 2 == 1)).float()


def scan_chunks(state: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The state after the last chunk, and the outputs of all chunks; parts [G, …] are what `in_chunks` made of them."""
    from torch._higher_order_ops.scan import scan

    def step(state: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        written, known, within, query, key, left = parts
        written = written - known @ state
        return state * left + key @ written, query @ state + within @ written

    last, outputs = scan(step, state, parts)
    return last, outputs


def linear_attention(x: DeltaInputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """ONNX Runtime's own kernel, which is in 1.26 and later; it can be traced, not run by torch."""
    past = x.zeros() if state is None else state
    output, present = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        (x.query, x.key, x.value, state, x.decay, x.rate),
        attrs={"q_num_heads": x.heads, "kv_num_heads": x.heads, "update_rule": "gated_delta", "scale": 1.0},
        dtypes=(x.value.dtype, past.dtype),
        shapes=(x.value.shape, past.shape),
        version=1,
    )
    return output, present

"""The vision towers of Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923).

Graph contract of `vision.onnx` (B images of one size, P patches, V = P / merge_size**2 visual tokens, W windows of L):

    pixel_values      float32 [B, P, 3 * patch**2]
    patch_positions   int64   [P, 2]   row and column of each patch, in merge groups
    window_index      int64   [W, L]   Qwen2.5-VL only: patches of a window, -1 where it is not full
    window_restore    int64   [P]      Qwen2.5-VL only: where in the flattened windows a patch stands
    image_features    float32 [B, V, hidden]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cembed.export.layers import (
    MLP,
    Dialect,
    GatedMLP,
    LayerNorm,
    Linear,
    PatchEmbedding,
    RMSNorm,
    inverse_frequencies,
    rotary_tables,
)

ROPE_THETA = 10_000.0
NORM_EPS = 1e-6


@dataclass(frozen=True)
class QwenVisionConfig:
    """`windowed` towers (Qwen2.5-VL) have RMS norms, gated MLPs, and windows but for `full_attention_layers`."""

    hidden_size: int
    out_hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    patch_size: int
    merge_size: int
    windowed: bool = False
    window_size: int = 0
    full_attention_layers: tuple[int, ...] = ()
    deepstack_layers: tuple[int, ...] = ()
    """Layers after which there are features for the decoder's first layers (Qwen3-VL)."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def norm(self) -> nn.Module:
        return RMSNorm(self.hidden_size, NORM_EPS) if self.windowed else LayerNorm(self.hidden_size, NORM_EPS)

    def mlp(self) -> nn.Module:
        if self.windowed:
            return GatedMLP(self.hidden_size, self.intermediate_size, self.activation, bias=True)
        return MLP(self.hidden_size, self.intermediate_size, self.activation)


@dataclass
class Windows:
    """Gathers rows [B, P, X] into windows [B * W, L, X], attends inside them, and puts the rows back."""

    index: Tensor
    restore: Tensor

    def gather(self, x: Tensor) -> Tensor:
        length = self.index.shape[1]
        rows = torch.index_select(x, 1, self.index.clamp(min=0).flatten())  # B W*L X
        return rows.unflatten(1, (-1, length)).flatten(0, 1)

    def mask(self, batch: int) -> Tensor:
        """Bool [B * W, 1, L, L]: a row attends to its window's patches."""
        length = self.index.shape[1]
        return (self.index >= 0)[:, None, None, :].expand(-1, 1, length, -1).repeat(batch, 1, 1, 1)

    def scatter(self, x: Tensor, batch: int) -> Tensor:
        return torch.index_select(x.unflatten(0, (batch, -1)).flatten(1, 2), 1, self.restore)


class VisionAttention(nn.Module):
    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.proj = Linear(config.hidden_size, config.hidden_size, bias=True)
        self.num_heads = config.num_heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dialect: Dialect, windows: Windows | None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = (dialect.rotary(t, cos, sin, self.num_heads) for t in (q, k))
        heads = (self.num_heads, self.num_heads)
        if windows is None:
            return self.proj(dialect.attention((q, k, v), heads))
        q, k, v = (windows.gather(t) for t in (q, k, v))
        attended = dialect.attention((q, k, v), heads, mask=windows.mask(x.shape[0]))
        return self.proj(windows.scatter(attended, x.shape[0]))


class VisionBlock(nn.Module):
    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = config.norm(), config.norm()
        self.attn = VisionAttention(config)
        self.mlp = config.mlp()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dialect: Dialect, windows: Windows | None) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, dialect, windows)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Four neighbouring patches become one visual token."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.width = config.hidden_size * config.merge_size**2
        self.ln_q = config.norm()
        self.mlp = nn.ModuleList(
            [
                Linear(self.width, self.width, bias=True),
                nn.Identity(),
                Linear(self.width, config.out_hidden_size, bias=True),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_q(x).reshape(x.shape[0], -1, self.width)
        return self.mlp[2](F.gelu(self.mlp[0](x)))


class PatchProjection(nn.Module):
    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.proj = PatchEmbedding(3 * config.patch_size**2, config.hidden_size, bias=False)


def vision_rotary_tables(
    config: QwenVisionConfig, patch_positions: Tensor, batch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [B, P, D / 2]: the first half of the frequencies turn by row, the second by column."""
    frequencies = inverse_frequencies(ROPE_THETA, config.head_dim // 2)
    tables = rotary_tables(patch_positions.unsqueeze(-1), frequencies, dtype)  # P 2 D/4
    cos, sin = (table.flatten(1).unsqueeze(0).expand(batch, -1, -1) for table in tables)
    return cos, sin


class QwenVisionTower(nn.Module):
    def __init__(self, config: QwenVisionConfig, dialect: Dialect) -> None:
        super().__init__()
        self.config, self.dialect = config, dialect
        self.patch_embed = PatchProjection(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        self.merger = PatchMerger(config)

    def rotary_tables(self, patch_positions: Tensor, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return vision_rotary_tables(self.config, patch_positions, batch, dtype)

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        window_index: Tensor | None = None,
        window_restore: Tensor | None = None,
    ) -> Tensor:
        x = self.patch_embed.proj(pixel_values.to(self.merger.mlp[0].get_parameter("bias").dtype))
        cos, sin = self.rotary_tables(patch_positions, x.shape[0], x.dtype)
        windows = None
        if window_index is not None and window_restore is not None:
            windows = Windows(window_index, window_restore)
        for index, block in enumerate(self.blocks):
            full = index in self.config.full_attention_layers
            x = block(x, cos, sin, self.dialect, None if full else windows)
        return self.merger(x).float()

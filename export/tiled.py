"""What Idefics3 (arXiv 2408.12637) and ModernVBERT (arXiv 2510.01149) have in common: tiles, each seen by SigLIP alone.

Graph contract of `vision.onnx` (T tiles of a page, P patches of a tile, V = P / merge_size**2 visual tokens of a tile):

    pixel_values      float32 [T, P, 3 * patch**2]
    image_features    float32 [T, V, hidden]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cembed.export.backbones import Backbone
from cembed.export.decoder import DecoderConfig
from cembed.export.encoder import EncoderConfig
from cembed.export.image_settings import Geometry, tiled_image
from cembed.export.layers import Dialect, Linear
from cembed.export.settings import Settings
from cembed.export.siglip import SiglipConfig, SiglipModel, siglip_config
from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.manifest import Positions, PromptAttention
from cembed.runtime.bundle.manifest import Tensor as TensorSpec

MAX_ROW, MAX_MERGE = 256, 16
"""Patches along a tile (released ones have 32), and along a visual token."""
QUERY_PROMPT = "{text}" + 10 * "<end_of_utterance>"


class Connector(nn.Module):
    def __init__(self, config: SiglipConfig, merge_size: int) -> None:
        super().__init__()
        self.modality_projection = Linear(config.hidden_size * merge_size**2, config.out_hidden_size, bias=False)


class TiledTower(nn.Module):
    """Patches come in merge groups: what the sources call pixel shuffle only puts the rows of a group side by side."""

    def __init__(self, config: SiglipConfig, merge_size: int, dialect: Dialect) -> None:
        super().__init__()
        self.dialect, self.width = dialect, config.hidden_size * merge_size**2
        self.vision_tower = SiglipModel(config)
        self.connector = Connector(config, merge_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.vision_tower(pixel_values, self.dialect)
        return self.connector.modality_projection(x.reshape(x.shape[0], -1, self.width)).float()


@dataclass(frozen=True)
class TiledVision:
    """A tower and how pages are prepared for it."""

    config: SiglipConfig
    image: ImageProcessing

    @classmethod
    def of(
        cls, vision: Settings, processor: Settings, merge_size: int, hidden_size: int, places: Callable[[int], Tensor]
    ) -> TiledVision:
        """`places` gives the positions [side, side] of a tile's patches, by the number of patches along it."""
        siglip = siglip_config(vision, hidden_size)
        side = siglip.image_size // siglip.patch_size
        if side > MAX_ROW or side % merge_size or siglip.image_size % 2:
            vision.refuse("image_size", f"an even number of up to {MAX_ROW} patches, in groups of {merge_size}")
        groups = places(side).reshape(side // merge_size, merge_size, side // merge_size, merge_size)
        order = tuple(groups.transpose(1, 2).flatten().tolist())
        geometry = Geometry("tiles", siglip.patch_size, merge_size)
        return cls(replace(siglip, patch_order=order), tiled_image(processor, geometry, siglip.image_size))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        shape = ("batch_size", self.config.num_patches, 3 * self.config.patch_size**2)
        return (TensorSpec("pixel_values", "float32", shape),)

    def build(self, dialect: Dialect) -> nn.Module:
        return TiledTower(self.config, self.image.merge_size, dialect)


def tiled_backbone(
    name: str,
    config: Settings,
    text: DecoderConfig | EncoderConfig,
    vision: TiledVision,
    prompt: str,
    attention: PromptAttention,
) -> Backbone:
    """`prompt` is the document's; the tokenizer's own first and last tokens are around both."""
    return Backbone(
        name=name,
        decoder=text,
        image=vision.image,
        image_token_id=config.count("image_token_id", least=0),
        positions=Positions(axes=1, first=0),
        prompts=(prompt, QUERY_PROMPT),
        slot_positions="continue",
        prompt_attention=attention,
        vision_inputs=vision.inputs,
        vision_prefix="",
        build_vision=vision.build,
        tokenizer_adds=True,
    )


def in_order(side: int) -> Tensor:
    """Positions row by row."""
    return torch.arange(side**2).reshape(side, side)


def in_buckets(side: int) -> Tensor:
    """Idefics3's: where row / side and column / side fall between multiples of 1 / side, rounded as it rounds them.

    >>> torch.equal(in_buckets(32), in_order(32)), torch.equal(in_buckets(49), in_order(49))
    (True, False)
    """
    bounds = torch.arange(1 / side, 1.0, 1 / side)
    shares = (torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))).clamp(max=1.0 - 1e-6)
    buckets = torch.bucketize(shares, bounds, right=True)
    return buckets[:, None] * side + buckets[None, :]

"""Qwen2.5-VL (arXiv 2502.13923): as Qwen2-VL, with window attention in most layers of the vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cembed.export.backbones import Backbone
from cembed.export.qwen2_vl import qwen_backbone, smart_image
from cembed.export.qwen_vision import QwenVisionConfig
from cembed.runtime.manifest import Tensor


def from_hf(config: Any, processor: Mapping[str, Any]) -> Backbone:
    v = config.vision_config
    vision = QwenVisionConfig(
        hidden_size=v.hidden_size,
        out_hidden_size=v.out_hidden_size,
        num_layers=v.depth,
        num_heads=v.num_heads,
        intermediate_size=v.intermediate_size,
        activation=v.hidden_act,
        patch_size=v.patch_size,
        merge_size=v.spatial_merge_size,
        windowed=True,
        window_size=v.window_size,
        full_attention_layers=tuple(v.fullatt_block_indexes),
    )
    merged = v.patch_size * v.spatial_merge_size
    windows = (
        Tensor("window_index", "int64", ("num_windows", (v.window_size // merged * v.spatial_merge_size) ** 2)),
        Tensor("window_restore", "int64", ("num_patches",)),
    )
    return qwen_backbone("qwen2.5-vl", config, smart_image(processor, vision), vision, windows)

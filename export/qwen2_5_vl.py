"""Qwen2.5-VL (arXiv 2502.13923): as Qwen2-VL, with window attention in most layers of the vision tower."""

from __future__ import annotations

from dataclasses import replace

from cembed.export.backbones import Backbone
from cembed.export.layers import ACTIVATIONS
from cembed.export.qwen2_vl import check_vision, qwen_backbone, tower_config
from cembed.export.settings import Settings
from cembed.runtime.bundle.manifest import Tensor


def from_hf(config: Settings, processor: Settings) -> Backbone:
    v = config.section("vision_config")
    check_vision(v, "hidden_size")
    v.require("hidden_act", *ACTIVATIONS)
    vision = replace(
        tower_config(v),
        windowed=True,
        window_size=v.count("window_size"),
        full_attention_layers=v.counts("fullatt_block_indexes", least=0),
    )
    side = vision.window_size // (vision.patch_size * vision.merge_size) * vision.merge_size
    if side == 0:
        v.refuse("window_size", f"{vision.patch_size * vision.merge_size} pixels or more")
    windows = (
        Tensor("window_index", "int64", ("num_windows", side**2)),
        Tensor("window_restore", "int64", ("num_patches",)),
    )
    return qwen_backbone("qwen2.5-vl", config, processor, vision, windows)

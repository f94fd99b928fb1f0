"""What the exporter knows of a backbone, and how the configuration files of a checkpoint become it.

A new backbone is one module with a `from_hf(config, processor) -> Backbone`, and one line in `choices.BACKBONES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cembed.export.checkpoint import read_json
from cembed.export.choices import BACKBONES, require_choice
from cembed.export.decoder import DecoderConfig
from cembed.export.layers import Dialect
from cembed.runtime.errors import CembedError
from cembed.runtime.manifest import ImageProcessing, Positions, PromptAttention, SlotPositions, Tensor


@dataclass(frozen=True)
class Backbone:
    """One checkpoint's architecture and the conventions it was trained with.

    `prompts` are (document, query), with `{image}` and `{text}`; `vision_prefix` is where the checkpoint has the tower;
    `embedding_scale` is folded into the embedding table.
    """

    name: str
    decoder: DecoderConfig
    image: ImageProcessing
    image_token_id: int
    positions: Positions
    prompts: tuple[str, str]
    slot_positions: SlotPositions
    prompt_attention: PromptAttention
    vision_inputs: tuple[Tensor, ...]
    vision_prefix: str
    build_vision: Callable[[Dialect], nn.Module]
    embedding_scale: float = 1.0


def load_backbone(name: str, root: Path) -> Backbone:
    """The backbone `name` as the configuration files in `root` describe it.

    Raises CembedError: an unknown name, a checkpoint of another architecture, a configuration that is not supported.
    """
    require_choice("backbone", name, BACKBONES)
    config = read_config(root)
    module = module_name(name)
    if config.model_type != module:
        known = [backbone for backbone in BACKBONES if module_name(backbone) == config.model_type]
        hint = f"use --backbone {known[0]}" if known else f"cembed has {', '.join(BACKBONES)}"
        raise CembedError(f"{root} is a {config.model_type} checkpoint, not {name}: {hint}")
    processor = read_processor(root)
    backbone: Backbone = importlib.import_module(f"cembed.export.{module}").from_hf(config, processor)
    return backbone


def module_name(backbone: str) -> str:
    """The backbone's module here, which is also what checkpoints call their `model_type`."""
    return backbone.replace("-", "_").replace(".", "_")


def read_processor(root: Path) -> Mapping[str, Any]:
    """The image processor's settings; transformers 5 writes them into `processor_config.json`."""
    newer = root / "processor_config.json"
    if not (root / "preprocessor_config.json").exists() and newer.exists():
        settings: Mapping[str, Any] = required(read_json(newer), "image_processor")
        return settings
    return read_json(root / "preprocessor_config.json")


def required(settings: Mapping[str, Any], *names: str) -> Any:
    """The first of `names` that is there. Raises CembedError if none is."""
    for name in names:
        if settings.get(name) is not None:
            return settings[name]
    raise CembedError(f"the image processor's configuration has no {' or '.join(names)}")


def read_config(root: Path) -> Any:
    """The transformers configuration of the vision-language model."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    read_json(root / "config.json")
    try:
        config = AutoConfig.from_pretrained(root, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CembedError(f"{root / 'config.json'}: {str(error).strip().splitlines()[0]}") from error
    if hasattr(config, "vlm_config"):
        raise CembedError(
            f"{root} is a transformers {config.model_type} wrapper, whose prompts differ from those of the original "
            "checkpoints: export the original one (colpali-engine's layout)"
        )
    return config


def require_value(what: str, given: object, *supported: object) -> None:
    """Raises CembedError for a setting of a checkpoint that would change its numbers and is not implemented."""
    if given not in supported:
        raise CembedError(f"the checkpoint has {what} {given!r}: supported is {' or '.join(map(repr, supported))}")


def image_processing(processor: Mapping[str, Any], **geometry: Any) -> ImageProcessing:
    """The part of a `preprocessor_config.json` that every backbone shares, checked, around a backbone's `geometry`."""
    for switch in ("do_resize", "do_rescale", "do_normalize"):
        require_value(switch, processor.get(switch, True), True)
    require_value("resample", processor.get("resample", 3), 3)
    return ImageProcessing(
        rescale_factor=float(processor.get("rescale_factor", 1 / 255)),
        mean=tuple(required(processor, "image_mean")),
        std=tuple(required(processor, "image_std")),
        **geometry,
    )

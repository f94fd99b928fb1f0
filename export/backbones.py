"""What the exporter knows of a backbone, and how the configuration files of a checkpoint become it.

A new backbone is one module with a `from_hf(config, processor) -> Backbone`, and one row of `choices.BACKBONES`.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from cembed.export.choices import BACKBONES, require_choice
from cembed.export.decoder import DecoderConfig
from cembed.export.encoder import EncoderConfig
from cembed.export.image_settings import find_settings, warn_of_others
from cembed.export.layers import Dialect
from cembed.export.settings import Settings, is_number, one_line
from cembed.export.wrappers import Wrapped, unwrapped
from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.manifest import Positions, PromptAttention, SlotPositions, Tensor
from cembed.runtime.errors import CembedError

MAX_PARTS, MAX_LAYERS, MAX_SIDE = 1 << 16, 1 << 10, 1 << 12


@dataclass(frozen=True)
class Backbone:
    """One checkpoint's architecture and the conventions it was trained with.

    `prompts` are (document, query), with `{image}` and `{text}`, between what the tokenizer itself adds where
    `tokenizer_adds`; `vision_prefix` is where the checkpoint has the tower; `embedding_scale` is folded into the
    embedding table; the decoder's first `deepstack` layers take more of an image; `single_prompts` stand in place of
    `prompts` under the head `single`, between what the tokenizer adds; `dim` is the width that the configuration gives
    its projection, if it does.
    """

    name: str
    decoder: DecoderConfig | EncoderConfig
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
    tokenizer_adds: bool = False
    deepstack: int = 0
    single_prompts: tuple[str, str] | None = None
    dim: int | None = None


def load_backbone(
    name: str | None, root: Path, adapter: Path | None = None, over: Mapping[str, Any] = MappingProxyType({})
) -> Backbone:
    """The backbone `name` as the configuration files in `root`, and the image settings of `adapter`, describe it.

    Without a name it is the one that the configuration says; `over` are image settings that count before all others.
    Raises CembedError: an unknown name, a checkpoint of another architecture, a configuration that is not supported.
    """
    if name is not None:
        require_choice("backbone", name, BACKBONES)
    given = Settings.read(root / "config.json")
    wrapped = unwrapped(given, root)
    given = wrapped.config if wrapped else given
    name = check_model_type(name, root, given)
    if wrapped and BACKBONES[name].wrapper != wrapped.kind:
        raise CembedError(f"{root} is a {wrapped.kind} wrapper around a {name} model: transformers has no such class")
    config = read_config(name, given)
    from_hf = importlib.import_module(f"cembed.export.{module_name(name)}").from_hf
    images = find_settings([place for place in (adapter, root) if place is not None])
    images[0] = Settings(images[0].where, {**images[0].values, **over})
    warn_of_others(images, lambda settings: from_hf(config, settings).image)
    backbone: Backbone = from_hf(config, images[0])
    return as_wrapped(backbone, wrapped) if wrapped else backbone


def as_wrapped(backbone: Backbone, wrapped: Wrapped) -> Backbone:
    """A backbone under the conventions of the class that wraps it."""
    backbone = replace(backbone, prompts=wrapped.prompts, single_prompts=None, dim=wrapped.dim)
    if not (wrapped.plain_positions and isinstance(backbone.decoder, DecoderConfig)):
        return backbone
    return replace(
        backbone, decoder=replace(backbone.decoder, mrope_section=()), positions=replace(backbone.positions, axes=1)
    )


def module_name(backbone: str) -> str:
    """The backbone's module here, which is also what checkpoints call their `model_type`."""
    return backbone.replace("-", "_").replace(".", "_")


def read_config(name: str, given: Settings) -> Settings:
    """The configuration of a checkpoint, with transformers' defaults for what it does not say."""
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    logging.set_verbosity_error()
    check_sizes(given.where, given.values)
    if given.has("text_config") and given.section("text_config").has("text_model_name"):
        given.section("text_config").refuse("text_model_name", "none: save it with a colpali-engine of 0.3.18 or later")
    try:
        config = CONFIG_MAPPING[module_name(name)].from_dict(copy.deepcopy(dict(given.values))).to_dict()
    except Exception as error:  # whatever its own checks raise, and what they did not think of
        raise CembedError(f"{given.where}: {one_line(error)}") from error
    return Settings(given.where, config)


def check_model_type(name: str | None, root: Path, config: Settings) -> str:
    """The backbone of a checkpoint. Raises CembedError: there is none, or it is not the one that was named."""
    kind = config.text("model_type")
    found = next((backbone for backbone in BACKBONES if module_name(backbone) == kind), None)
    if found is None:
        raise CembedError(
            f"{root} is a {kind:.80} checkpoint, and cembed has {', '.join(BACKBONES)}: see docs/models.md"
        )
    if name not in (None, found):
        raise CembedError(f"{root} is a {kind:.80} checkpoint, not {name}: use --backbone {found}, or leave it out")
    return found


def check_sizes(where: str, values: Mapping[str, Any]) -> None:
    """Raises CembedError for numbers of layers and the like that transformers would fill the memory with."""
    for name, value in values.items():
        if isinstance(value, dict):
            check_sizes(f"{where}: {name}", value)
        elif (name.startswith("num_") or name == "depth") and is_number(value) and value > MAX_PARTS:
            raise CembedError(f"{where}: {name} is {value!r:.80}: supported are up to {MAX_PARTS}")


def require_parts(settings: Settings, whole: str, parts: str) -> int:
    """The quotient of two counts. Raises CembedError if there is none."""
    total, number = settings.count(whole), settings.count(parts)
    if total % number:
        settings.refuse(parts, f"a divisor of {whole}, {total}")
    return total // number


def even_head_dim(text: Settings) -> int:
    """Raises CembedError for heads that cannot turn by halves."""
    head_dim = text.count("head_dim")
    if head_dim % 2:
        text.refuse("head_dim", "an even number")
    return head_dim


def decoder_config(
    text: Settings,
    rope: Settings,
    head_dim: int,
    *,
    activation: str = "silu",
    sections: tuple[int, ...] = (),
    bias: bool = False,
    gemma: bool = False,
) -> DecoderConfig:
    """What the configurations of all decoders say under the same names; `sections` are those of M-RoPE."""
    text.require("hidden_act", activation)
    if not bias:
        text.require("attention_bias", False)
    require_parts(text, "num_attention_heads", "num_key_value_heads")
    return DecoderConfig(
        hidden_size=text.count("hidden_size"),
        num_layers=text.count("num_hidden_layers", most=MAX_LAYERS),
        num_heads=text.count("num_attention_heads"),
        num_kv_heads=text.count("num_key_value_heads"),
        head_dim=head_dim,
        intermediate_size=text.count("intermediate_size"),
        activation=activation,
        rms_norm_eps=text.positive("rms_norm_eps"),
        rope_theta=rope.positive("rope_theta"),
        mrope_section=sections,
        attention_bias=bias,
        gemma=gemma,
        max_positions=text.count("max_position_embeddings"),
    )

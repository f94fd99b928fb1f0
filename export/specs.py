"""The graphs of a bundle: what is traced of a backbone, its inputs and outputs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cembed.export.backbones import Backbone
from cembed.export.decoder import Attending, DecoderConfig, SinglePass, Step
from cembed.export.encoder import Encoder, EncoderConfig
from cembed.export.graph import GraphSpec
from cembed.export.layers import DTYPES
from cembed.runtime.bundle.contract import DEEPSTACK
from cembed.runtime.bundle.graph_tensors import present_of
from cembed.runtime.bundle.manifest import PromptAttention, Side, SlotKind, Tensor
from cembed.runtime.errors import CembedError


def attending(prompt_attention: PromptAttention, kinds: set[SlotKind]) -> Attending:
    if prompt_attention == "causal":
        return "causal"
    return "bidirectional" if kinds == {"all_tokens"} else "bidirectional-prompt"


def graph_specs(
    backbone: Backbone,
    attention: PromptAttention | None,
    dtype: str,
    both: tuple[Side, Side],
    projection: int | None,
    capacity: int | str,
) -> tuple[GraphSpec, ...]:
    """The image encoder; the single pass, unless every slot is fed back; the step, if there are any slots.

    Raises CembedError: an encoder with slots or a mask.
    """
    kinds: set[SlotKind] = {side.slots for side in both}
    attends = attending(attention or backbone.prompt_attention, kinds)
    refuse_slots(backbone, attention, kinds)
    text = text_spec(backbone, attends, projection)
    specs = [vision_spec(backbone)]
    if kinds != {"feedback"}:
        specs.append(text)
    if kinds != {"all_tokens"}:
        specs.append(step_spec(backbone, attends, projection, dtype, capacity))
    return tuple(specs)


def refuse_slots(backbone: Backbone, attention: PromptAttention | None, kinds: set[SlotKind]) -> None:
    """Raises CembedError for what an encoder does not have: slots after the prompt, a mask."""
    if isinstance(backbone.decoder, EncoderConfig) and (kinds != {"all_tokens"} or attention == "causal"):
        raise CembedError(
            f"{backbone.name} is an encoder, where every position sees all others: it has no slots after the prompt "
            "and no causal mask; use --head colbert"
        )


def vision_spec(backbone: Backbone) -> GraphSpec:
    width = backbone.decoder.hidden_size * (1 + backbone.deepstack)
    output = Tensor("image_features", "float32", ("batch_size", "num_visual_tokens", width))
    return GraphSpec(
        "vision", backbone.build_vision, backbone.vision_prefix, backbone.vision_inputs, (output,), "vision.data"
    )


def text_spec(backbone: Backbone, attends: Attending, projection: int | None) -> GraphSpec:
    config = backbone.decoder
    axes = ("batch_size", "sequence_length")
    inputs = [
        Tensor("inputs_embeds", "float32", (*axes, config.hidden_size)),
        Tensor("position_ids", "int64", (config.position_axes, *axes)),
        Tensor("slot_indices", "int64", ("batch_size", "num_vectors")),
    ]
    if attends == "bidirectional-prompt":
        inputs.append(Tensor("prompt_length", "int64", (1,)))
    if backbone.deepstack:
        inputs.append(Tensor(DEEPSTACK, "float32", (*axes, backbone.deepstack * config.hidden_size)))
    output = Tensor("slot_states", "float32", ("batch_size", "num_vectors", projection or config.hidden_size))
    if isinstance(config, EncoderConfig):
        return GraphSpec("text", partial(Encoder, config, projection), "", tuple(inputs), (output,), "text.data")
    build = partial(SinglePass, config, attends, projection)
    return GraphSpec("text", build, "", tuple(inputs), (output,), "text.data")


def step_spec(
    backbone: Backbone, attends: Attending, projection: int | None, dtype: str, capacity: int | str
) -> GraphSpec:
    config, text = backbone.decoder, text_spec(backbone, attends, projection)
    assert isinstance(config, DecoderConfig), "encoders have no slots"
    cache_type = str(DTYPES[dtype].compute).removeprefix("torch.")

    past = [tensor for layer in range(config.num_layers) for tensor in config.kept(layer, capacity, cache_type)]
    present = [replace(tensor, name=present_of(tensor.name)) for tensor in past]

    outputs = list(text.outputs)
    if projection:
        outputs.append(Tensor("hidden_states", "float32", ("batch_size", "num_vectors", config.hidden_size)))
    inputs = [tensor for tensor in text.inputs if tensor.name != "prompt_length"]
    inputs[3:3] = [Tensor("cache_position", "int64", ("batch_size",))]
    build = partial(Step, config, attends, projection)
    return GraphSpec("text_step", build, "", (*inputs, *past), (*outputs, *present), "text.data")

"""The check every export ends in: the graph, run by ONNX Runtime, against the torch modules, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cembed.export.backbones import Backbone
from cembed.export.graph import GraphSpec, empty_module
from cembed.export.layers import Arithmetic, Reference
from cembed.runtime.bundle.graph_tensors import row_tensors, row_width, state_tensors
from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.manifest import Parity, Side
from cembed.runtime.embed.positions import prompt_positions, slot_positions
from cembed.runtime.embed.preprocess import resized_size
from cembed.runtime.embed.vision_feeds import vision_feeds
from cembed.runtime.engines.session import EngineSettings, OrtSession
from cembed.runtime.errors import CembedError

Array = NDArray[Any]
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
"""Of outputs scaled to a largest value of 1. Torch computes with the checkpoint's own values in float32."""


def reference_module(spec: GraphSpec, load: Callable[[str], torch.Tensor]) -> nn.Module:
    """The module of `spec` in float32, with the values the graph was written from."""
    arithmetic = Arithmetic(torch.float32, torch.float32)
    with torch.device("meta"):
        module = empty_module(spec, Reference(), arithmetic)
    for name, _ in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(load(name).float(), requires_grad=False))
    return module


def run_reference(module: nn.Module, spec: GraphSpec, feeds: Mapping[str, Array]) -> Array:
    """The first output, computed in float32."""
    tensors = {tensor.name: torch.from_numpy(feeds[tensor.name]) for tensor in spec.inputs}
    with torch.inference_mode():
        floats = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        outputs = module(**spec.arguments(floats))
    first: torch.Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return first.numpy()


def compare(graph: str, expected: Array, actual: Array, tolerance: float) -> Parity:
    """Differences in units of the largest expected value; the cosine is per row.

    Raises CembedError: another shape, NaN or infinity, a difference over the tolerance.
    """
    if expected.shape != actual.shape:
        raise CembedError(f"parity check of {graph}: the graph gives {actual.shape}, torch gives {expected.shape}")
    if not np.isfinite(actual).all():
        raise CembedError(f"parity check of {graph}: the graph gives NaN or infinity: export with --dtype fp32")
    error = float(np.abs(expected - actual).max() / max(np.abs(expected).max(), 1e-30))
    norms = np.linalg.norm(expected, axis=-1) * np.linalg.norm(actual, axis=-1)
    cosine = float(((expected * actual).sum(-1) / np.maximum(norms, 1e-30)).min())
    if error > tolerance:
        raise CembedError(
            f"parity check of {graph}: off by {error:.1e}, allowed is {tolerance:.0e}: nothing was written"
        )
    return Parity(graph, error, min(cosine, 1.0), tolerance)


def check_parity(
    spec: GraphSpec, path: Path, load: Callable[[str], torch.Tensor], cases: Sequence[Mapping[str, Array]], dtype: str
) -> Parity:
    """The worst of the cases. Torch's weights are freed before the engine loads its own."""
    module = reference_module(spec, load)
    expected = [run_reference(module, spec, case) for case in cases]
    del module
    session = OrtSession(path, EngineSettings(prepack=False))
    results = [
        compare(spec.name, want, session.run(case), TOLERANCES[dtype])
        for want, case in zip(expected, cases, strict=True)
    ]
    return Parity(
        spec.name,
        max(result.max_error for result in results),
        min(result.min_cosine for result in results),
        TOLERANCES[dtype],
    )


def parity_inputs(backbone: Backbone, side: Side, spec: GraphSpec) -> list[dict[str, Array]]:
    """Random inputs of a graph in several sizes: square, long, smallest; short and long prompts."""
    rng = np.random.default_rng(0)
    if spec.name == "vision":
        return [vision_case(backbone.image, spec, size, rng) for size in ((112, 140), (60, 400), (28, 28))]
    return [text_case(backbone, side, spec, length, rng) for length in (5, 40)]


def vision_case(
    image: ImageProcessing, spec: GraphSpec, size: tuple[int, int], rng: np.random.Generator
) -> dict[str, Array]:
    """Random inputs of the vision graph, for an image of about `size` (height, width) pixels."""
    small = replace(image, min_pixels=1, max_pixels=min(image.max_pixels, 112 * 140))
    height, width = resized_size(*size, small if image.resize == "smart" else image)
    grid = (height // image.patch_size, width // image.patch_size)
    patches = image.input_patches or grid[0] * grid[1]
    images = 1 if image.tiles is None else max(1, size[0] // 28 - 1)
    pixels = rng.standard_normal((images * patches, 3 * image.patch_size**2), np.float32)
    return vision_feeds(spec.inputs, pixels, grid, image)


def text_case(
    backbone: Backbone, side: Side, spec: GraphSpec, length: int, rng: np.random.Generator
) -> dict[str, Array]:
    """Random inputs of a text graph: a prompt of `length` positions and four slots.

    The step gets the prompt into an empty cache if it is short, and one slot after a filled part of it if it is long.
    """
    prompt = prompt_positions(np.zeros(length, bool), None, backbone.positions, 1)
    positions = np.concatenate([prompt, slot_positions(prompt, 4, side.slot_positions)], axis=1)
    rows = {
        tensor.name: rng.standard_normal((1, length + 4, row_width(tensor)), np.float32)
        for tensor in row_tensors(spec.graph)
    }
    values: dict[str, Array] = {
        **rows,
        "position_ids": positions[:, None],
        "slot_indices": np.arange(length - 1, length + 4)[None],
        "prompt_length": np.array([length]),
    }
    if spec.name == "text_step":
        new = slice(0, length) if length < 10 else slice(length, length + 1)
        count = new.stop - new.start
        values |= {name: array[:, new] for name, array in rows.items()} | {"position_ids": positions[:, None, new]}
        values["slot_indices"] = np.array([[count - 1]])
        values["cache_position"] = np.array([new.start])
        for tensor in state_tensors(spec.graph):
            shape = [
                length + 8 if axis == "capacity" else 1 if isinstance(axis, str) else axis for axis in tensor.shape
            ]
            values[tensor.name] = rng.standard_normal(shape, np.float32).astype(tensor.dtype)
    return {tensor.name: values[tensor.name] for tensor in spec.inputs}

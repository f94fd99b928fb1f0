"""The check every export ends in: the graph, run by ONNX Runtime, against the torch modules, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cembed.export.graph import GraphSpec, empty_module
from cembed.export.layers import Arithmetic, Decomposed
from cembed.runtime.bundle import Parity
from cembed.runtime.errors import CembedError
from cembed.runtime.session import OrtSession

Array = NDArray[Any]
TOLERANCES = {"fp32": 1e-4, "bf16": 1e-4, "fp16": 5e-2}
"""Of outputs scaled to a largest value of 1. bf16 is only stored; fp16 is compared with torch in float32."""


def reference_module(spec: GraphSpec, load: Callable[[str], torch.Tensor]) -> nn.Module:
    """The module of `spec` in float32, with the values the graph was written from."""
    arithmetic = Arithmetic(torch.float32, torch.float32)
    with torch.device("meta"):
        module = empty_module(spec, Decomposed(), arithmetic)
    for name, _ in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(load(name).float(), requires_grad=False))
    return module


def run_reference(module: nn.Module, feeds: Mapping[str, Array]) -> Array:
    with torch.inference_mode():
        output: torch.Tensor = module(*(torch.from_numpy(feed) for feed in feeds.values()))
    return output.numpy()


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
        raise CembedError(f"parity check of {graph}: off by {error:.1e}, allowed is {tolerance:.0e}: nothing was written")
    return Parity(graph, error, min(cosine, 1.0), tolerance)


def check_parity(
    spec: GraphSpec, path: Path, load: Callable[[str], torch.Tensor], cases: Sequence[Mapping[str, Array]], dtype: str
) -> Parity:
    """The worst of the cases. Torch's weights are freed before the engine loads its own."""
    module = reference_module(spec, load)
    expected = [run_reference(module, case) for case in cases]
    del module
    session = OrtSession(path, ["CPUExecutionProvider"], None)
    results = [
        compare(spec.name, want, session.run(case), TOLERANCES[dtype]) for want, case in zip(expected, cases, strict=True)
    ]
    return Parity(
        spec.name,
        max(result.max_abs_error for result in results),
        min(result.min_cosine for result in results),
        TOLERANCES[dtype],
    )

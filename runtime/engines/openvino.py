"""OpenVINO behind the interface every engine has: for processors with bfloat16 arithmetic, where it pays most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.graph_tensors import is_present, present_of
from cembed.runtime.engines.quiet import import_openvino
from cembed.runtime.engines.session import Array, EngineSettings
from cembed.runtime.errors import CembedError, missing_extra

PRECISIONS = {"openvino": "f32", "openvino-bf16": "bf16"}
"""The arithmetic of each provider. In bfloat16, weights of a float bundle are rounded to 8 bits as well."""
READABLE = "OpenVINO reads bundles exported with --target onnx --opset 20"


def openvino_sessions(bundle: Bundle, settings: EngineSettings) -> Callable[[str], OpenVinoSession]:
    """What opens the session of a graph. Raises CembedError: OpenVINO, or bfloat16 arithmetic, is not there, or the
    bundle is for another engine."""
    try:
        openvino = import_openvino()
    except ImportError as error:
        raise missing_extra(f"provider {settings.providers[0]}", "OpenVINO", "openvino") from error
    precision = PRECISIONS[settings.providers[0]]
    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise CembedError("this processor has no bfloat16 arithmetic: --provider openvino computes in float32")
    if bundle.manifest.target == "onnxruntime":
        raise CembedError(f"this bundle is for onnxruntime: {READABLE}")
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    options |= {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}  # activations stay what the bundle says
    if settings.threads is not None:
        options |= {"INFERENCE_NUM_THREADS": str(settings.threads)}
    compiled = partial(core.compile_model, device_name="CPU", config=options)
    return lambda name: OpenVinoSession(compiled, bundle.graph_path(name))


class OpenVinoSession:
    """Runs one graph; `compiled` makes OpenVINO's model of a path."""

    def __init__(self, compiled: Callable[[str], Any], path: Path) -> None:
        try:
            self._model = compiled(str(path))
        except Exception as error:  # its exceptions share no other base class
            reason = str(error).strip().splitlines()[-1].strip(" -")
            raise CembedError(f"OpenVINO cannot load {path}: {reason}. {READABLE}") from error
        self._idle: list[Any] = []  # requests, each with the memory of its activations: as many as run at once

    def run(self, feeds: Mapping[str, Array]) -> Array:
        request = self._idle.pop() if self._idle else self._model.create_infer_request()
        output = np.array(infer(request, feeds)[self._model.output(0)])
        self._idle.append(request)
        return output

    def bind(self, cache: Mapping[str, Array]) -> OpenVinoStep:
        return OpenVinoStep(self._model, cache)


class OpenVinoStep:
    """A request over two copies of the cache: one is read, the other written, and then they change places."""

    def __init__(self, model: Any, cache: Mapping[str, Array]) -> None:
        self._request, self._cache = model.create_infer_request(), cache
        self._tensor = import_openvino().Tensor
        self._past = {name: array.copy() for name, array in cache.items()}
        self._present = {name: np.empty_like(array) for name, array in cache.items()}
        self._states = {output.any_name: output for output in model.outputs if not named_present(output)}

    def pull(self) -> None:
        for name, array in self._cache.items():
            np.copyto(array, self._past[name])

    def push(self) -> None:
        for name, array in self._cache.items():
            np.copyto(self._past[name], array)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        for name in self._cache:
            self._request.set_tensor(name, self._tensor(self._past[name], shared_memory=True))
            written = present_of(name)
            self._request.set_tensor(written, self._tensor(self._present[name], shared_memory=True))
        outputs = infer(self._request, feeds)
        self._past, self._present = self._present, self._past
        return {name: np.array(outputs[output]) for name, output in self._states.items()}


def named_present(output: Any) -> bool:
    return any(is_present(name) for name in output.names)


def infer(request: Any, feeds: Mapping[str, Array]) -> Any:
    try:
        return request.infer(dict(feeds))
    except Exception as error:  # its exceptions share no other base class
        raise CembedError(f"OpenVINO failed: {str(error).strip().splitlines()[-1]}") from error

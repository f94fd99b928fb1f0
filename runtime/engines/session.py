"""Engines: an ONNX Runtime session behind the interface every engine has."""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.graph_tensors import grows, is_present, present_of
from cembed.runtime.bundle.manifest import Manifest
from cembed.runtime.engines.quiet import ort
from cembed.runtime.errors import CembedError

Array = NDArray[Any]
DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
"""Where ONNX Runtime keeps a cache, by provider; others are given the host's memory."""
UNKNOWN_OPERATOR = "is not a registered function/op"
TOO_OLD = "this is version {}, and the bundle has an operator of a later one: upgrade it, or export with --target onnx"
MANY_ROWS = 256
"""More are the prompt of a page, whose activations are given back."""
PACKED_SCHEMES = ("int8", "int4")
"""Weights that ONNX Runtime multiplies as they are where it may pack them, and else widens in every run."""


class Session(Protocol):
    """One loaded graph. `run` is safe to call from several threads."""

    def run(self, feeds: Mapping[str, Array]) -> Array:
        """The graph's first output for the inputs named in `feeds`."""

    def bind(self, cache: Mapping[str, Array]) -> StepSession:
        """Runs over `cache`, arrays by the names of the past_key_values inputs.

        Caches are updated in place; states of fixed size are in their arrays after `pull`.
        """


class StepSession(Protocol):
    """Where the cache is the engine's: the arrays that were bound are all up to date only after `pull`."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs other than the cache, by name."""

    def pull(self) -> None:
        """Brings the cache into the arrays that were bound."""

    def push(self) -> None:
        """Takes the cache over from the arrays that were bound."""


def check_providers(providers: Sequence[str]) -> None:
    """Raises CembedError for an execution provider this build of ONNX Runtime does not have."""
    available = ort.get_available_providers()
    if unknown := [name for name in providers if name not in available]:
        raise CembedError(
            f"execution provider {', '.join(unknown)} is not in this build of ONNX Runtime, which has "
            f"{', '.join(available)}: to change it, pip uninstall onnxruntime, then install onnxruntime-gpu"
        )


@dataclass(frozen=True)
class EngineSettings:
    """`providers` in order of preference; `threads` per operator, None for all cores.

    `prepack` copies the weights into the layout the kernels like best. Without it they stay memory-mapped: a session
    opens at once and shares them with other processes, and long inputs run about 4 % slower (measured with AVX-512).
    None is for a single query: what gives the first result soonest, and the second one as fast or nearly so.
    """

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    threads: int | None = None
    prepack: bool | None = True

    def packs(self, manifest: Manifest, graph: str) -> bool:
        """Whether the weights of a graph are packed: with None if they are slow where they are not."""
        found = manifest.quantisation
        if self.prepack is not None or found is None:
            return bool(self.prepack)
        slow = PACKED_SCHEMES[1:] if found.rows else PACKED_SCHEMES
        return not found.schemes_of(graph).isdisjoint(slow)


CPU = EngineSettings().providers


class OrtSession:
    """Runs one graph with ONNX Runtime.

    The first provider must be obtained: if it is not, and a later one was named, that is a RuntimeWarning; if none was,
    a CembedError. `operators` is a library of operators that come before ONNX Runtime's.
    """

    def __init__(self, path: Path, settings: EngineSettings, operators: Path | None = None) -> None:
        providers = settings.providers
        check_providers(providers)
        options = ort.SessionOptions()
        options.intra_op_num_threads = settings.threads or 0
        if providers[0] == "CPUExecutionProvider":  # else each shape leaves a plan for ever, and a page is a new block
            options.enable_mem_pattern = False
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_prepacking", str(int(not settings.prepack)))
        try:
            if operators is not None:
                options.register_custom_ops_library(str(operators))
            self._session = ort.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # its exceptions share no other base class
            reason = str(error).strip().splitlines()[0]
            hint = f"; {TOO_OLD.format(ort.__version__)}" if UNKNOWN_OPERATOR in reason else ""
            raise CembedError(f"ONNX Runtime cannot load {path}: {reason}{hint}") from error
        return_freed()
        obtained = self._session.get_providers()
        if providers[0] not in obtained:
            message = f"{path.name} does not run on {providers[0]}, which could not be started, but on {obtained[0]}"
            if len(providers) == 1:
                raise CembedError(f"{message}: name a second provider to allow that, or repair the first")
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        self._output = self._session.get_outputs()[0].name
        self._options = ort.RunOptions()
        if obtained[0] == "CPUExecutionProvider":  # gives activations back after each page: 270 MB of 1360 at mid size
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.providers = tuple(obtained)

    def run(self, feeds: Mapping[str, Array]) -> Array:
        with failures_named():
            (output,) = self._session.run([self._output], dict(feeds), self._options)
        return np.asarray(output)

    def bind(self, cache: Mapping[str, Array]) -> OrtStep:
        return OrtStep(self._session, cache, DEVICES.get(self.providers[0], "cpu"), self._options)

    def signature(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Type and shape of every input and output, as the graph itself states them."""
        nodes = [*self._session.get_inputs(), *self._session.get_outputs()]
        return {node.name: (node.type, tuple(node.shape)) for node in nodes}


def opened_while_hashed(
    bundle: Bundle, name: str, settings: EngineSettings, operators: Path | None = None
) -> OrtSession:
    """A session whose weights are hashed while it is made. Raises CembedError, in place of it, if they are damaged."""
    path, verify_data = bundle.open_graph(name)
    try:
        return OrtSession(path, replace(settings, prepack=settings.packs(bundle.manifest, name)), operators)
    finally:
        verify_data()


class OrtStep:
    """A session bound to one cache on `device`: past and present are the same buffers, so a step copies none of them.

    On the CPU these are the arrays of the cache themselves. Several nodes may read a state, and one may write the next
    before all have: states have two buffers, which change places after each run.
    """

    def __init__(
        self, session: ort.InferenceSession, cache: Mapping[str, Array], device: str, after_prompt: ort.RunOptions
    ) -> None:
        self._session, self._binding, self._after_prompt = session, session.io_binding(), after_prompt
        outputs = [output.name for output in session.get_outputs()]
        self._states = [name for name in outputs if not is_present(name)]
        for name in self._states:
            self._binding.bind_output(name, "cpu")
        self._arrays = {name: array for name, array in cache.items() if device != "cpu" or not grows(name)}
        self._buffers = {name: ort.OrtValue.ortvalue_from_numpy(array, device) for name, array in cache.items()}
        self._spare = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros_like(array), device)
            for name, array in cache.items()
            if not grows(name)
        }
        for name, buffer in self._buffers.items():
            self._bind(name, buffer, self._spare.get(name, buffer))

    def _bind(self, name: str, past: ort.OrtValue, present: ort.OrtValue) -> None:
        self._binding.bind_ortvalue_input(name, past)
        self._binding.bind_ortvalue_output(present_of(name), present)

    def _turn(self) -> None:
        """What was written of each state is read next."""
        for name, written in self._spare.items():
            self._spare[name], self._buffers[name] = self._buffers[name], written
            self._bind(name, written, self._spare[name])

    def pull(self) -> None:
        for name, array in self._arrays.items():
            np.copyto(array, self._buffers[name].numpy())

    def push(self) -> None:
        for name, array in self._arrays.items():
            self._buffers[name].update_inplace(array)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        long = feeds["inputs_embeds"].shape[1] > MANY_ROWS
        for name, feed in feeds.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(feed))
        for name in self._states:
            self._binding.bind_output(name, "cpu")
        with failures_named():
            self._session.run_with_iobinding(self._binding, self._after_prompt if long else None)
        outputs = dict(zip(self._states, self._binding.get_outputs(), strict=False))
        self._turn()
        return {name: output.numpy() for name, output in outputs.items()}


def return_freed() -> None:
    """What is free goes back to the system. glibc keeps what the tensors of a graph leave when they are packed: 300 MiB
    of 1,200 with int4 weights in Qwen2-VL-2B's widths."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def failures_named() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # its exceptions share no other base class
        raise CembedError(f"ONNX Runtime failed: {str(error).strip().splitlines()[0]}") from error

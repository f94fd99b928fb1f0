"""A CUDA runtime and a TensorRT without a GPU: what is put into the stream happens when the stream is waited for.

An engine computes what ONNX Runtime does with the bundle's graph; every rule that TensorRT has is an assertion here.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cembed.runtime.bundle.manifest import Graph
from cembed.runtime.engines.quiet import ort

Work = Callable[[], None]
STREAM = 7


class FakeCuda:
    """What `cuda.bindings.runtime` has, as far as it is used; `log` has what went to the stream or into a graph."""

    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamNonBlocking = 1  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeRelaxed=2)  # noqa: N815

    def __init__(self) -> None:
        self.device: dict[int, ctypes.Array[Any]] = {}
        self.pinned: dict[int, ctypes.Array[Any]] = {}
        self.queue: list[Work] = []
        self.captured: list[Work] | None = None
        self.graphs: dict[int, list[Work]] = {}
        self.log: list[str] = []
        self.numbers = itertools.count(100)
        self.error = 0
        self.capturable = True

    def enqueue(self, name: str, work: Work) -> None:
        self.log.append(name if self.captured is None else f"capture {name}")
        (self.queue if self.captured is None else self.captured).append(work)

    def allocate(self, place: dict[int, Any], size: int) -> tuple[int, int]:
        assert self.captured is None, "memory cannot be allocated during a capture"
        content = (ctypes.c_uint8 * size)()
        ctypes.memset(content, 0xFF, size)  # NaN, in every type of float
        place[ctypes.addressof(content)] = content
        return 0, ctypes.addressof(content)

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        return self.allocate(self.device, size)

    def cudaMallocHost(self, size: int) -> tuple[int, int]:  # noqa: N802
        return self.allocate(self.pinned, size)

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self.device[address]
        return (0,)

    def cudaFreeHost(self, address: int) -> tuple[int]:  # noqa: N802
        del self.pinned[address]
        return (0,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:  # noqa: N802
        assert stream == STREAM
        for address, is_device in ((target, kind != 2), (source, kind != 1)):
            assert (address in self.device) == is_device, "an address of the other memory"
            assert not is_device or size <= len(self.device[address])
        self.enqueue("copy", lambda: ctypes.memmove(target, source, size))
        return (0,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[int]:  # noqa: N802
        assert stream == STREAM
        assert size <= len(self.device[address])
        self.enqueue("clear", lambda: ctypes.memset(address, value, size))
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:  # noqa: N802
        assert flags == self.cudaStreamNonBlocking, "the default stream must not spoil a capture"
        return 0, STREAM

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        self.log.append("destroy")
        return (0,)

    def cudaGetLastError(self) -> tuple[int]:  # noqa: N802
        found, self.error = self.error, 0
        return (found,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        assert stream == STREAM
        assert self.captured is None, "a stream cannot be waited for during a capture"
        while self.queue:
            self.queue.pop(0)()
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:  # noqa: N802
        assert self.captured is None
        self.captured = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, list[Work]]:  # noqa: N802
        assert self.captured is not None
        work, self.captured = self.captured, None
        self.error = 0 if self.capturable else 901
        return self.error, work

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[int, int]:  # noqa: N802
        number = next(self.numbers)
        self.graphs[number] = graph
        self.log.append("instantiate")
        return 0, number

    def cudaGraphDestroy(self, graph: list[Work]) -> tuple[int]:  # noqa: N802
        return (0,)

    def cudaGraphExecDestroy(self, number: int) -> tuple[int]:  # noqa: N802
        del self.graphs[number]
        return (0,)

    def cudaGraphLaunch(self, number: int, stream: int) -> tuple[int]:  # noqa: N802
        self.log.append("launch")
        self.queue.extend(self.graphs[number])
        return (0,)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:  # noqa: N802
        return 0, 1 << 30, 1 << 31

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:  # noqa: N802
        return 0, SimpleNamespace(name=b"Fake GPU", major=8, minor=7, integrated=0)

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, b"a fake error"


class FakeTrt:
    """What the module `tensorrt` has, as far as sessions use it; a plan is the path of an ONNX file."""

    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    TensorLocation = SimpleNamespace(DEVICE="device", HOST="host")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    __version__ = "10.16.1"

    class Logger:
        ERROR = 0

        def __init__(self, level: int) -> None:
            pass

    def __init__(self, cuda: FakeCuda, graphs: Mapping[Path, Graph], aliased: bool = True) -> None:
        self.cuda, self.graphs, self.aliased = cuda, graphs, aliased
        self.engines: dict[str, FakeEngine] = {}
        self.profiles: dict[str, list[dict[str, tuple[int, int, int]]]] = {}

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=self.load)

    def load(self, plan: Any) -> FakeEngine:
        path = Path(bytes(plan).decode())
        engine = FakeEngine(self.cuda, path, self.graphs[path], self.profiles[path.stem], self.aliased)
        self.engines[path.stem] = engine
        return engine


class FakeEngine:
    device_memory_size_v2 = 4096

    def __init__(
        self,
        cuda: FakeCuda,
        path: Path,
        graph: Graph,
        profiles: list[dict[str, tuple[int, int, int]]],
        aliased: bool,
    ) -> None:
        self.cuda, self.graph, self.profiles, self.aliased = cuda, graph, profiles, aliased
        self.tensors = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), len(profiles)
        self.runs: list[dict[str, tuple[int, ...]]] = []

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if self.tensors[name] in self.graph.inputs else "out"

    def get_tensor_location(self, name: str) -> str:
        return "host" if name == "prompt_length" else "device"

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert name != "prompt_length", "its profile has values, not shapes"
        ranges = [
            self.profiles[index][axis] if isinstance(axis, str) else (axis,) * 3 for axis in self.tensors[name].shape
        ]
        return [tuple(sizes) for sizes in zip(*ranges, strict=True)]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present.", "past_key_values.") if self.aliased and name.startswith("present.") else None

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "user"
        return FakeContext(self)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.profile = engine, -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        assert address in self.engine.cuda.device
        self.memory = address

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == STREAM
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        assert self.profile >= 0, "shapes come after the profile"
        assert self.engine.get_tensor_mode(name) == "in"
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = tuple(shape)
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        on_host = self.engine.get_tensor_location(name) == "host"
        assert address in (self.engine.cuda.pinned if on_host else self.engine.cuda.device)
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return [
            tensor.name
            for tensor in self.engine.graph.inputs
            if tensor.name not in (self.addresses if tensor.name == "prompt_length" else self.shapes)
        ]

    def shape(self, name: str) -> tuple[int, ...]:
        axes = {
            axis: size
            for tensor in self.engine.graph.inputs
            for axis, size in zip(tensor.shape, self.shapes.get(tensor.name, (1,)), strict=True)
        }
        group = self.engine.profiles[0]["num_patches"][0] if "patch_positions" in self.engine.tensors else 1
        axes["num_visual_tokens"] = axes.get("num_patches", self.shapes.get("pixel_values", (0, 0))[1]) // group
        return tuple(axes[axis] if isinstance(axis, str) else axis for axis in self.engine.tensors[name].shape)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert not self.infer_shapes()
        return self.shape(name)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        assert not self.engine.cuda.error, "an error that was left behind"
        assert self.memory in self.engine.cuda.device
        assert self.addresses.keys() == self.engine.tensors.keys(), "every tensor has an address"
        for name, past in ((n, n.replace("present.", "past_key_values.")) for n in self.addresses if "present." in n):
            assert (self.addresses[name] == self.addresses[past]) == self.engine.aliased
        baked = {name: self.view(name).copy() for name in self.addresses if name == "prompt_length"}
        self.engine.cuda.enqueue("engine", lambda: self.compute(baked))
        return True

    def view(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor where it is."""
        shape, dtype = self.shape(name), np.dtype(self.engine.tensors[name].dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        content = (ctypes.c_uint8 * size).from_address(self.addresses[name])
        return np.frombuffer(content, dtype).reshape(shape)

    def compute(self, baked: dict[str, np.ndarray[Any, Any]]) -> None:
        """`baked`: inputs of the host count as they were when the run was put into the stream."""
        self.engine.runs.append(dict(self.shapes))
        feeds = {tensor.name: self.view(tensor.name) for tensor in self.engine.graph.inputs} | baked
        names = [tensor.name for tensor in self.engine.graph.outputs]
        for name, value in zip(names, self.engine.session.run(names, feeds), strict=True):
            np.copyto(self.view(name), value)

"""The few calls of the CUDA runtime that engines need: memory, one stream, graphs. By cuda-python, without torch."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from cembed.runtime.engines.session import Array
from cembed.runtime.errors import CembedError, missing_extra

MODULES = ("cuda.bindings.runtime", "cuda.cudart")  # the latter in cuda-python before 12.6


@dataclass(frozen=True)
class GpuInfo:
    """A device. One that is `integrated` shares the memory of the processor."""

    name: str
    capability: tuple[int, int]
    integrated: bool

    @property
    def tag(self) -> str:
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.name)}-sm{self.capability[0]}{self.capability[1]}"


class Cuda:
    """The first device and one stream on it; everything asynchronous is in the stream's order.

    Raises CembedError: no cuda-python, no driver, no device, or whatever a call says.
    """

    def __init__(self, api: Any = None) -> None:
        self.api = load_api() if api is None else api
        try:  # what others put into the default stream meanwhile would spoil a capture in a blocking one
            self.stream = self.call("StreamCreateWithFlags", self.api.cudaStreamNonBlocking)
        except CembedError as error:
            raise CembedError(f"no NVIDIA GPU can be used: {error}") from error
        weakref.finalize(self, self.api.cudaStreamDestroy, self.stream)

    def call(self, name: str, *arguments: Any) -> Any:
        """What `cudaNAME` gives, or raises what it says."""
        status, *values = getattr(self.api, f"cuda{name}")(*arguments)
        if int(status):
            self.api.cudaGetLastError()  # else TensorRT takes it for its own
            raise CembedError(f"CUDA cannot do {name}: {describe(self.api, status)}")
        return values[0] if len(values) == 1 else tuple(values)

    def gpu(self) -> GpuInfo:
        found = self.call("GetDeviceProperties", 0)
        name = found.name.decode() if isinstance(found.name, bytes) else found.name
        return GpuInfo(name.strip("\0 "), (found.major, found.minor), bool(found.integrated))

    def free_memory(self) -> int:
        """Bytes that can still be allocated."""
        free: int = self.call("MemGetInfo")[0]
        return free

    def device_buffer(self, nbytes: int) -> DeviceBuffer:
        return DeviceBuffer(self, nbytes)

    def pinned(self, shape: Sequence[int], dtype: Any) -> PinnedArray:
        return PinnedArray(self, shape, np.dtype(dtype))

    def copy(self, target: int, source: int, nbytes: int, way: str) -> None:
        """Copies in the stream; `way` is HostToDevice, DeviceToHost or DeviceToDevice."""
        kind = getattr(self.api.cudaMemcpyKind, f"cudaMemcpy{way}")
        self.call("MemcpyAsync", target, source, nbytes, kind, self.stream)

    def clear(self, buffer: DeviceBuffer) -> None:
        self.call("MemsetAsync", buffer.address, 0, buffer.nbytes, self.stream)

    def synchronize(self) -> None:
        self.call("StreamSynchronize", self.stream)

    def capture(self, record: Callable[[], None]) -> CudaGraph:
        """What `record` puts into the stream, as a graph that has not run. Raises CembedError if it cannot be one."""
        mode = self.api.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed  # memory may be freed meanwhile
        self.call("StreamBeginCapture", self.stream, mode)
        try:
            record()
        finally:
            graph = self.call("StreamEndCapture", self.stream)
        try:
            return CudaGraph(self, self.call("GraphInstantiate", graph, 0))
        finally:
            self.call("GraphDestroy", graph)


class CudaGraph:
    def __init__(self, cuda: Cuda, executable: Any) -> None:
        self._cuda, self._executable = cuda, executable
        weakref.finalize(self, cuda.api.cudaGraphExecDestroy, executable)

    def launch(self) -> None:
        self._cuda.call("GraphLaunch", self._executable, self._cuda.stream)


class DeviceBuffer:
    """Memory of the device, given back when the buffer is dropped."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = int(cuda.call("Malloc", max(nbytes, 1)))
        weakref.finalize(self, cuda.api.cudaFree, self.address)


class PinnedArray:
    """An array of the host in pinned memory, which the device reads and writes by itself: `array`."""

    def __init__(self, cuda: Cuda, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        self.nbytes = prod(shape) * dtype.itemsize
        self.address = int(cuda.call("MallocHost", max(self.nbytes, 1)))
        weakref.finalize(self, cuda.api.cudaFreeHost, self.address)
        content = memoryview((ctypes.c_uint8 * self.nbytes).from_address(self.address))
        self.array: Array = np.frombuffer(content, dtype).reshape(shape)


def load_api() -> Any:
    for name in MODULES:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise missing_extra("GPU memory", "cuda-python", "gpu")


def describe(api: Any, status: Any) -> str:
    text = api.cudaGetErrorString(status)[1]
    return text.decode() if isinstance(text, bytes) else str(text)

"""TensorRT engines behind the `Session` protocol: one stream, pinned buffers, caches that stay on the device.

Inputs of the same shapes share a `ShapeContext`: an execution context with its buffers. Its first run is put into the
stream call by call, its second is captured as a CUDA graph, and from then on one launch does all of it.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from cembed.runtime.bundle.graph_tensors import is_present, past_of
from cembed.runtime.bundle.manifest import Graph
from cembed.runtime.engines.cuda import Cuda, CudaGraph, DeviceBuffer, PinnedArray
from cembed.runtime.engines.session import Array
from cembed.runtime.errors import CembedError

BUCKETS = {"sequence_length": 64, "num_vectors": 16}  # inputs are filled up to multiples of these
MAX_CONTEXTS = 8  # of a session or a cache: the one that was used longest ago goes first
Key = tuple[tuple[str, tuple[int, ...], bytes], ...]


class Device:
    """What the engines of one embedder share: a stream, and a lock, since one thing runs at a time."""

    def __init__(self, trt: Any, cuda: Cuda) -> None:
        self.trt, self.cuda, self.lock = trt, cuda, threading.Lock()
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))

    def load(self, plan: Any, name: str) -> Any:
        """The engine in a buffer."""
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise CembedError(f"TensorRT cannot load the engine of {name}: build it again with --force")
        return engine


class DeviceCache:
    """A cache on the device and the contexts that are bound to it; used again by the next state once one is done."""

    def __init__(self, cuda: Cuda, cache: Mapping[str, Array]) -> None:
        self.buffers = {name: cuda.device_buffer(array.nbytes) for name, array in cache.items()}
        self.contexts: OrderedDict[Key, ShapeContext] = OrderedDict()


class TrtSession:
    """Runs one engine.

    `padded`: shorter inputs may be filled up behind their last position, which causal attention does not see.
    """

    def __init__(self, device: Device, engine: Any, graph: Graph, name: str, padded: bool) -> None:
        self.device, self.engine, self.graph, self.name = device, engine, graph, name
        self._buckets = BUCKETS if padded else {}
        trt = device.trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if n not in self.inputs]
        self.on_host = {n for n in names if engine.get_tensor_location(n) == trt.TensorLocation.HOST}
        self.types = {tensor.name: np.dtype(tensor.dtype) for tensor in (*graph.inputs, *graph.outputs)}
        self.scratch = device.cuda.device_buffer(engine.device_memory_size_v2)
        self._contexts: OrderedDict[Key, ShapeContext] = OrderedDict()
        self._free: list[DeviceCache] = []

    def run(self, feeds: Mapping[str, Array]) -> Array:
        axes = {axis: size for t in self.graph.inputs for axis, size in zip(t.shape, feeds[t.name].shape, strict=True)}
        filled = {tensor.name: self._fill(tensor.shape, feeds[tensor.name]) for tensor in self.graph.inputs}
        with self.device.lock:
            output = self.context_for(filled, self._contexts, {}).run(filled)[self.graph.outputs[0].name]
        rows = axes.get("num_vectors", output.shape[1])
        return output[:, :rows]

    def _fill(self, shape: tuple[int | str, ...], feed: Array) -> Array:
        """With zeros behind, up to the next bucket that the engine still takes."""
        if not self._buckets:
            return feed
        wanted = [self._bucket(axis, size) for axis, size in zip(shape, feed.shape, strict=True)]
        return np.pad(feed, [(0, more - size) for more, size in zip(wanted, feed.shape, strict=True)])

    def _bucket(self, axis: int | str, size: int) -> int:
        step = self._buckets.get(axis, 1) if isinstance(axis, str) else 1
        return max(size, min(-(-size // step) * step, self.most(axis))) if step > 1 else size

    def most(self, axis: int | str) -> int:
        """The largest size of an axis that any profile takes."""
        tensor, place = next((t, t.shape.index(axis)) for t in self.graph.inputs if axis in t.shape)
        profiles = range(self.engine.num_optimization_profiles)
        return max(int(self.engine.get_tensor_profile_shape(tensor.name, index)[2][place]) for index in profiles)

    def bind(self, cache: Mapping[str, Array]) -> TrtStep:
        return TrtStep(self, cache)

    def take(self, cache: Mapping[str, Array]) -> DeviceCache:
        """A cleared cache on the device, shaped as the arrays are: engines have one shape of it."""
        held = self._free.pop() if self._free else DeviceCache(self.device.cuda, cache)
        for buffer in held.buffers.values():
            self.device.cuda.clear(buffer)
        return held

    def give_back(self, held: DeviceCache) -> None:
        self._free.append(held)

    def context_for(
        self, feeds: Mapping[str, Array], contexts: OrderedDict[Key, ShapeContext], cache: Mapping[str, DeviceBuffer]
    ) -> ShapeContext:
        """The context for these shapes, and for these values of inputs that shapes depend on."""
        key = tuple((n, f.shape, f.tobytes() if n in self.on_host else b"") for n, f in sorted(feeds.items()))
        if key not in contexts:
            if len(contexts) == MAX_CONTEXTS:
                contexts.popitem(last=False)
            contexts[key] = ShapeContext(self, feeds, cache)
        contexts.move_to_end(key)
        return contexts[key]

    def profile_for(self, feeds: Mapping[str, Array]) -> int:
        """The first profile that takes the shapes. Raises CembedError that names the input none takes."""
        worst = ""
        for index in range(self.engine.num_optimization_profiles):
            wrong = [n for n, f in feeds.items() if n not in self.on_host and not self._takes(n, f.shape, index)]
            if not wrong:
                return index
            worst = wrong[0]
        least, _, most = self.engine.get_tensor_profile_shape(worst, self.engine.num_optimization_profiles - 1)
        raise CembedError(
            f"the engine of {self.name} takes {worst} from {tuple(least)} to {tuple(most)}, not "
            f"{feeds[worst].shape}: build it with larger limits"
        )

    def _takes(self, name: str, shape: tuple[int, ...], index: int) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, index)
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))


class ShapeContext:
    """An execution context for inputs of one shape, its buffers, and, once it has run, its CUDA graph."""

    def __init__(self, session: TrtSession, feeds: Mapping[str, Array], cache: Mapping[str, DeviceBuffer]) -> None:
        self._session: TrtSession = weakref.proxy(session)  # without a circle, memory is given back at once
        self._cuda, self._cache, self._runs = session.device.cuda, cache, 0
        self._graph: CudaGraph | None = None
        self._context = self._make_context(session.profile_for(feeds))
        self._inputs = {name: self._bind_input(name, feeds[name]) for name in session.inputs if name not in cache}
        for name, buffer in cache.items():
            shape = next(tensor.shape for tensor in session.graph.inputs if tensor.name == name)
            self._set(name, buffer.address, tuple(1 if isinstance(axis, str) else axis for axis in shape))
        if missing := self._context.infer_shapes():
            raise AssertionError(f"{session.name} still wants {missing}")
        self._outputs = {n: self._bind_output(n) for n in session.outputs if not is_present(n)}
        self._presents = [pair for n in session.outputs if is_present(n) for pair in self._bind_present(n)]

    def _make_context(self, profile: int) -> Any:
        """Contexts of a session run one after the other, in the same scratch memory."""
        strategy = self._session.device.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._session.engine.create_execution_context(strategy)
        if context is None:
            raise CembedError(f"TensorRT has no memory for another context of {self._session.name}")
        context.set_device_memory(self._session.scratch.address, self._session.scratch.nbytes)
        self._done(context.set_optimization_profile_async(profile, int(self._cuda.stream)), "take the profile")
        self._cuda.synchronize()
        return context

    def _done(self, success: bool, what: str) -> None:
        if not success:
            raise CembedError(f"TensorRT cannot {what} of {self._session.name}: its reason is above")

    def _set(self, name: str, address: int, shape: tuple[int, ...] | None = None) -> None:
        if shape is not None and name not in self._session.on_host:
            self._done(self._context.set_input_shape(name, shape), f"take the shape of {name}")
        self._done(self._context.set_tensor_address(name, address), f"take the address of {name}")

    def _bind_input(self, name: str, feed: Array) -> tuple[PinnedArray, DeviceBuffer | None]:
        pinned = self._cuda.pinned(feed.shape, self._session.types[name])
        np.copyto(pinned.array, feed)
        device = None if name in self._session.on_host else self._cuda.device_buffer(pinned.nbytes)
        self._set(name, device.address if device else pinned.address, feed.shape)
        return pinned, device

    def _bind_output(self, name: str) -> tuple[PinnedArray, DeviceBuffer]:
        pinned = self._cuda.pinned(tuple(self._context.get_tensor_shape(name)), self._session.types[name])
        device = self._cuda.device_buffer(pinned.nbytes)
        self._set(name, device.address)
        return pinned, device

    def _bind_present(self, name: str) -> list[tuple[DeviceBuffer, DeviceBuffer]]:
        """Onto the past, if the engine updates that in place; else beside it, to be copied over the past each time."""
        past = self._cache[past_of(name)]
        aliased = getattr(self._session.engine, "get_aliased_input_tensor", lambda _: None)(name)
        present = past if aliased else self._cuda.device_buffer(past.nbytes)
        self._set(name, present.address)
        return [] if aliased else [(present, past)]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        for name, (pinned, _) in self._inputs.items():
            np.copyto(pinned.array, feeds[name])
        if self._runs == 1:
            self._graph = self._capture()
        if self._graph is None:
            self._record()
        else:
            self._graph.launch()
        self._cuda.synchronize()
        self._runs += 1
        return {name: pinned.array.copy() for name, (pinned, _) in self._outputs.items()}

    def _capture(self) -> CudaGraph | None:
        """A run as a graph; none if the engine does what a graph cannot hold, which costs time only."""
        try:
            return self._cuda.capture(self._record)
        except CembedError as error:
            warnings.warn(f"{self._session.name} runs without a CUDA graph: {error}", RuntimeWarning, stacklevel=2)
            return None

    def _record(self) -> None:
        """Puts a run into the stream: inputs up, the engine, outputs down."""
        for pinned, device in self._inputs.values():
            if device is not None:
                self._cuda.copy(device.address, pinned.address, pinned.nbytes, "HostToDevice")
        self._done(self._context.execute_async_v3(int(self._cuda.stream)), "run the engine")
        for present, past in self._presents:
            self._cuda.copy(past.address, present.address, past.nbytes, "DeviceToDevice")
        for pinned, device in self._outputs.values():
            self._cuda.copy(pinned.address, device.address, pinned.nbytes, "DeviceToHost")


class TrtStep:
    """An engine over one cache, which lives on the device: the arrays are brought up to date by `pull` only."""

    def __init__(self, session: TrtSession, cache: Mapping[str, Array]) -> None:
        self._session, self._arrays = session, cache
        with session.device.lock:
            self._held = session.take(cache)
        weakref.finalize(self, session.give_back, self._held)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with self._session.device.lock:
            return self._session.context_for(feeds, self._held.contexts, self._held.buffers).run(feeds)

    def pull(self) -> None:
        self._copy("DeviceToHost")

    def push(self) -> None:
        self._copy("HostToDevice")

    def _copy(self, way: str) -> None:
        cuda = self._session.device.cuda
        with self._session.device.lock:
            for name, array in self._arrays.items():
                ends = (array.ctypes.data, self._held.buffers[name].address)
                target, source = ends if way == "DeviceToHost" else ends[::-1]
                cuda.copy(target, source, array.nbytes, way)
            cuda.synchronize()

"""TensorRT engines: built on the device they are for, from a bundle, and kept in a folder beside it.

An engine belongs to one bundle, one version of TensorRT and one kind of GPU; its name says which. What an engine holds
is native code: it is never part of a bundle, and never shipped.
"""

from __future__ import annotations

import importlib
import json
import mmap
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cembed.runtime.bundle.bundle import Bundle, sha256
from cembed.runtime.bundle.manifest import Graph, Manifest
from cembed.runtime.bundle.vectors import write_whole
from cembed.runtime.engines.cuda import GpuInfo
from cembed.runtime.engines.memory import EngineLimits, usual_windows
from cembed.runtime.errors import CembedError

LIBRARIES = ("tensorrt", "tensorrt_rtx")  # the latter is TensorRT for RTX, which builds without a GPU
OLDEST = (10, 1)  # it counts scratch memory in 64 bits
ATTENTION_SINCE = (10, 15)  # with it came rotary embedding, norms and caches, which opset 24 graphs have
SHORT = 128  # positions that queries seldom exceed: they have a profile of their own

Range = tuple[int, int, int]
"""Least, usual and most."""


@dataclass(frozen=True)
class Library:
    """TensorRT as it is installed."""

    trt: Any
    name: str

    @classmethod
    def load(cls) -> Library:
        """Raises CembedError: none is installed, or one that is too old."""
        for name in LIBRARIES:
            try:
                found = cls(importlib.import_module(name), name)
            except ModuleNotFoundError:
                continue
            except (ImportError, OSError) as error:
                raise CembedError(f"{name} is installed but cannot be loaded: {str(error).splitlines()[0]}") from error
            if name == "tensorrt" and found.version < OLDEST:
                raise CembedError(f"TensorRT is version {found.trt.__version__}: 10.1 or later is needed")
            return found
        raise CembedError("TensorRT is not installed: it comes with JetPack, or with `pip install tensorrt`")

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", self.trt.__version__)[:3])

    @property
    def tag(self) -> str:
        return f"{self.name}-{'.'.join(map(str, self.version))}"

    def check(self, manifest: Manifest) -> None:
        """Raises CembedError if the bundle's graphs are not for this TensorRT."""
        if manifest.target != "tensorrt":
            raise CembedError(f"this bundle is for {manifest.target}: export it with --target tensorrt")
        if self.name == "tensorrt" and manifest.opset >= 23 and self.version < ATTENTION_SINCE:
            raise CembedError(
                f"opset {manifest.opset} needs TensorRT {'.'.join(map(str, ATTENTION_SINCE))}, this is "
                f"{self.trt.__version__}: export the bundle with --opset 20"
            )


@dataclass(frozen=True)
class EngineCache:
    """The folder beside a bundle where its engines are, and their names for one library and GPU."""

    bundle: Bundle
    library: Library
    gpu: GpuInfo | None

    @property
    def folder(self) -> Path:
        root = self.bundle.root.resolve()
        return root.with_name(f"{root.name}.engines")

    @property
    def device(self) -> str:
        return f"{self.library.tag}-{self.gpu.tag if self.gpu else 'no-gpu'}"

    def path(self, graph: str) -> Path:
        return self.folder / f"{graph}-{self.bundle.hash[:16]}-{self.device}.engine"

    def timing(self) -> Path:
        return self.folder / f"{self.device}.timing"

    def describes(self, graph: str, built: Mapping[str, Any]) -> bool:
        """Whether there is an engine that was built so."""
        path = self.path(graph)
        try:
            found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return path.exists() and {name: found.get(name) for name in built} == built

    def write(self, graph: str, plan: Any, about: Mapping[str, Any]) -> None:
        """The engine, then what it is; the description of another engine never stands beside it."""
        path = self.path(graph)
        path.with_suffix(".json").unlink(missing_ok=True)
        write_whole(path, lambda file: file.write(plan))
        text = json.dumps({**about, "sha256": sha256(path)}, indent=1) + "\n"
        write_whole(path.with_suffix(".json"), lambda file: file.write(text.encode()))

    def require(self, graph: str) -> Any:
        """What the engine's description says. Raises CembedError: there is none for this bundle, TensorRT and GPU."""
        path = self.path(graph)
        try:
            path.stat()
            return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CembedError(f"there is no engine of {graph} for {self.device}: {self.advice(graph)}") from error

    def advice(self, graph: str) -> str:
        return f"run `cembed build-engine {self.bundle.root}{' --loop' if graph == 'text_step' else ''}` on this device"

    def read(self, graph: str) -> mmap.mmap:
        """The engine's bytes, mapped. Raises CembedError: there is none, or it is damaged."""
        about, path = self.require(graph), self.path(graph)
        if sha256(path) != about.get("sha256"):
            raise CembedError(f"{path} is damaged: {self.advice(graph)}")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@dataclass(frozen=True)
class BuildOptions:
    """`workspace` in MiB; `tf32` lets float32 products round their inputs to 10 bits."""

    limits: EngineLimits
    workspace: int | None = None
    tf32: bool = False

    def key(self) -> dict[str, Any]:
        return {"limits": asdict(self.limits), "workspace": self.workspace, "tf32": self.tf32}


def needed_graphs(manifest: Manifest, loop: bool) -> list[str]:
    """The image encoder and what each side runs on; the step only if slots are fed back, or if it is asked for."""
    fed_back = any(side.slots == "feedback" for side in (manifest.document, manifest.query))
    return [name for name in manifest.graphs if name != "text_step" or fed_back or loop]


def build_engines(
    cache: EngineCache, graphs: list[str], options: BuildOptions, tell: Callable[[str], None], force: bool = False
) -> list[Path]:
    """Builds the engines that are not there yet, or all of them, and gives the paths of all."""
    cache.library.check(cache.bundle.manifest)
    cache.folder.mkdir(exist_ok=True)
    for graph in graphs:
        if not force and cache.describes(graph, options.key()):
            tell(f"{graph} is there already")
            continue
        tell(f"building {graph}")
        plan = Build(cache, graph, options).run()
        cache.write(graph, plan, {**options.key(), "graph": graph, "bytes": plan.nbytes})
    return [cache.path(graph) for graph in graphs]


class Build:
    """One engine: parsed, given its profiles, and built with the timings of earlier builds."""

    def __init__(self, cache: EngineCache, graph: str, options: BuildOptions) -> None:
        self.cache, self.name, self.options, self.trt = cache, graph, options, cache.library.trt
        self.graph: Graph = cache.bundle.manifest.graphs[graph]
        self.logger = self.trt.Logger(self.trt.Logger.ERROR)
        self.builder = self.trt.Builder(self.logger)

    def run(self) -> Any:
        """The serialised engine, a buffer. Raises CembedError with TensorRT's reason."""
        network = self.parse()
        decompose_attention(self.trt, network)
        config = self.builder.create_builder_config()
        for axes in profiles(self.name, self.options.limits, self.cache.bundle.manifest):
            config.add_optimization_profile(self.profile(network, axes))
        if self.options.workspace is not None:
            config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, self.options.workspace << 20)
        if not self.options.tf32:
            config.clear_flag(self.trt.BuilderFlag.TF32)
        timing = self.cache.timing() if self.cache.library.name == "tensorrt" else None  # RTX takes no timings
        if timing is not None:
            use_timings(config, timing)
        plan = self.builder.build_serialized_network(network, config)
        if plan is None:
            raise CembedError(f"TensorRT cannot build {self.name}: its reason is above")
        if timing is not None:
            write_whole(timing, lambda file: file.write(config.get_timing_cache().serialize()))
        return plan

    def parse(self) -> Any:
        """A strongly typed network: types are those of the graph."""
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 has no other kind
        network = self.builder.create_network(0 if flag is None else 1 << int(flag))
        parser = self.trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(self.cache.bundle.graph_path(self.name))):
            reason = str(parser.get_error(0).desc()).strip().splitlines()[0]
            raise CembedError(f"TensorRT cannot read {self.name}: {reason}")
        return network

    def profile(self, network: Any, axes: Mapping[str, Range]) -> Any:
        found = self.builder.create_optimization_profile()
        shapes = {tensor.name: tensor.shape for tensor in self.graph.inputs}
        for tensor in (network.get_input(index) for index in range(network.num_inputs)):
            if tensor.is_shape_tensor:
                found.set_shape_input(tensor.name, *((size,) for size in axes[tensor.name]))
            elif -1 in tuple(tensor.shape):
                found.set_shape(tensor.name, *tensor_range(shapes[tensor.name], axes))
        return found


def use_timings(config: Any, path: Path) -> None:
    """Those of earlier builds; none if the file is not for this device and driver, or damaged."""
    for known in (path.read_bytes() if path.exists() else b"", b""):
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return


def tensor_range(shape: tuple[int | str, ...], axes: Mapping[str, Range]) -> list[tuple[int, ...]]:
    """The least, usual and largest shape of a tensor.

    >>> tensor_range((3, "batch_size", "sequence_length"), {"batch_size": (1, 1, 2), "sequence_length": (1, 64, 128)})
    [(3, 1, 1), (3, 1, 64), (3, 2, 128)]
    """
    ranges = [axes[axis] if isinstance(axis, str) else (axis,) * 3 for axis in shape]
    return [tuple(sizes) for sizes in zip(*ranges, strict=True)]


def profiles(graph: str, limits: EngineLimits, manifest: Manifest) -> list[dict[str, Range]]:
    """Ranges of a graph's axes, the narrow profile first: queries before pages. A step is tuned for one slot."""
    if graph == "vision":
        images = limits.batch * (limits.patches // (manifest.image.input_patches or limits.patches))
        batch, group = (1, images, images), manifest.image.merge_size**2
        windows = (1, max(1, usual_windows(manifest.image, limits.visual_tokens)), max(1, limits.windows))
        return [{"batch_size": batch, "num_patches": (group, limits.patches, limits.patches), "num_windows": windows}]
    if graph == "text_step":
        prompts = min(limits.positions, limits.capacity)  # one profile: a second one doubled the engine's weights
        return [{"batch_size": (1, 1, 1), "sequence_length": (1, 1, prompts), "num_vectors": (1, 1, 1)}]
    pages = text_profile(limits, limits.positions, limits.prompt, limits.batch)
    return [text_profile(limits, SHORT, SHORT // 2, 1), pages] if limits.positions > SHORT else [pages]


def text_profile(limits: EngineLimits, most: int, usual: int, batch: int) -> dict[str, Range]:
    vectors, usual = min(limits.vectors, most), min(usual, most)
    return {
        "batch_size": (1, batch, batch),
        "sequence_length": (3, max(usual, 3), most),
        "num_vectors": (1, max(1, vectors // 2), vectors),
        "prompt_length": (2, max(2, usual - 1), most - 1),  # a shape tensor: its value, not its shape
    }


def decompose_attention(trt: Any, network: Any) -> None:
    """Where there is no fused kernel for a head size, attention may be built from products and softmax."""
    boundary = getattr(trt, "IAttentionBoundaryLayer", None)
    for layer in (network.get_layer(index) for index in range(network.num_layers if boundary else 0)):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = boundary
            layer.attention.decomposable = True

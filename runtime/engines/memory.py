"""Does it fit: what engines take of a device's memory, from a bundle's limits, before anything is built.

Weights and caches are counted; activations are estimated from what the widest decoder layers hold for a row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path

import numpy as np

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.graph_tensors import grows, state_tensors
from cembed.runtime.bundle.image_processing import MAX_ASPECT_RATIO, ImageProcessing
from cembed.runtime.bundle.manifest import Manifest
from cembed.runtime.bundle.prompts import QUERY_POSITIONS, Prompter, load_tokenizer, longest_page
from cembed.runtime.errors import CembedError

ROW_WIDTHS = 32  # values a layer holds for a row, in hidden sizes: Qwen2.5-VL-3B has 18, PaliGemma-3B 26
NUM_HEADS = 16  # of the towers and decoders of these sizes, where attention is decomposed and its scores are kept
BUILD_COPIES = 3  # of a graph's weights while its engine is built: read, on the device, and in the engine
RESERVE = 512 << 20  # for CUDA and TensorRT themselves: an allowance


@dataclass(frozen=True)
class EngineLimits:
    """What engines take at most: B inputs at once, positions of prompt and slots, vectors, patches, windows.

    `prompt` is the length of the largest page's prompt, which engines are tuned for; `attended` are the patches that
    one of them sees, those of its image, and None if that is all.
    """

    batch: int
    visual_tokens: int
    prompt: int
    positions: int
    vectors: int
    patches: int
    windows: int
    capacity: int
    attended: int | None = None

    @classmethod
    def of(cls, bundle: Bundle, batch: int = 1, max_visual_tokens: int | None = None) -> EngineLimits:
        """Raises CembedError for visual tokens that the bundle does not take."""
        manifest = bundle.manifest
        image = manifest.image.limited(max_visual_tokens, manifest.image.max_visual_tokens)
        prompter = Prompter(load_tokenizer(bundle.path(manifest.tokenizer)), manifest.image_token_id)
        prompt = longest_page(prompter, manifest.document.prompt, image)
        return cls.from_prompt(manifest, image, prompt, batch)

    @classmethod
    def from_prompt(cls, manifest: Manifest, image: ImageProcessing, prompt: int, batch: int) -> EngineLimits:
        sides = ((prompt, manifest.document), (QUERY_POSITIONS, manifest.query))
        room = {side: 0 if side.num_vectors is None else side.room for _, side in sides}
        positions = min(max(length + room[side] for length, side in sides), manifest.max_sequence_length)
        step = manifest.graphs.get("text_step")
        capacity = next((t.shape[2] for t in state_tensors(step) if grows(t.name)), 0) if step else 0
        return cls(
            batch=batch,
            visual_tokens=image.max_visual_tokens,
            prompt=prompt,
            positions=positions,
            vectors=positions if 0 in room.values() else max(room.values()),
            patches=longest_row(image) * image.merge_size**2,
            windows=max_windows(image),
            capacity=capacity if isinstance(capacity, int) else positions,
            attended=image.input_patches,
        )


def longest_row(image: ImageProcessing) -> int:
    """The most visual tokens: a strip that is one token high may be over the limit, if that is below 200."""
    most = image.max_visual_tokens
    return most if image.resize != "smart" else max(most, isqrt(MAX_ASPECT_RATIO * most) + 1)


def max_windows(image: ImageProcessing) -> int:
    """Windows of the page with the most: a single row of visual tokens."""
    return -(-longest_row(image) * image.factor // image.window_size) if image.window_size else 0


def usual_windows(image: ImageProcessing, visual_tokens: int) -> int:
    """Windows of a square page."""
    side = isqrt(visual_tokens) * image.factor
    return (-(-side // image.window_size)) ** 2 if image.window_size else 0


@dataclass(frozen=True)
class Model:
    """What memory depends on: bytes of weights by graph, of a cache, and of a value of the arithmetic."""

    hidden_size: int
    weights: Mapping[str, int]
    cache: int
    value: int
    decomposed: bool

    @classmethod
    def of(cls, manifest: Manifest, graphs: Collection[str]) -> Model:
        widened = 2 if manifest.dtype == "bf16" else 1  # its weights are float32 in an engine
        weights = {
            name: widened * sum(manifest.files[data].size for data in manifest.graphs[name].data) for name in graphs
        }
        past = state_tensors(manifest.graphs["text_step"]) if "text_step" in graphs else ()
        sizes = [
            prod(axis for axis in tensor.shape if isinstance(axis, int)) * np.dtype(tensor.dtype).itemsize
            for tensor in past
        ]
        value = 2 if manifest.dtype == "fp16" else 4
        return cls(manifest.hidden_size, weights, sum(sizes), value, manifest.opset < 23)

    def activations(self, graph: str, limits: EngineLimits) -> int:
        """An estimate of what an engine's layers hold at once."""
        rows = limits.patches if graph == "vision" else limits.positions
        batch = 1 if graph == "text_step" else limits.batch
        seen = {"vision": limits.attended or rows, "text_step": limits.capacity}.get(graph, rows)
        scores = 2 * NUM_HEADS * rows * seen * self.value if self.decomposed else 0
        return batch * (rows * ROW_WIDTHS * self.hidden_size * self.value + scores)

    def needs(self, limits: EngineLimits) -> dict[str, int]:
        """Bytes while pages are embedded, by what they are for."""
        needs: dict[str, int] = {}
        for graph, size in self.weights.items():
            needs |= {f"weights of {graph}": size, f"activations of {graph}": self.activations(graph, limits)}
        if self.cache:
            needs["cache"] = self.cache * (2 if self.decomposed else 1)
        return needs | {"CUDA and TensorRT": RESERVE}

    def build(self, limits: EngineLimits, integrated: bool) -> int:
        """Bytes of the device while the largest engine is built; where memory is shared, the host's are its too."""
        copies = BUILD_COPIES if integrated else 1
        return max(copies * size + self.activations(graph, limits) for graph, size in self.weights.items()) + RESERVE


@dataclass(frozen=True)
class Fit:
    """Bytes needed, and free; None where there is no device to ask."""

    needs: Mapping[str, int]
    build: int
    free: int | None

    @property
    def needed(self) -> int:
        return max(sum(self.needs.values()), self.build)

    def rows(self) -> list[dict[str, str | int | float]]:
        parts = {**self.needs, "to embed": sum(self.needs.values()), "to build": self.build}
        parts |= {} if self.free is None else {"free": self.free}
        return [{"for": name, "MiB": f"{size / 2**20:,.0f}"} for name, size in parts.items()]

    def check(self) -> None:
        """Raises CembedError if there is less memory than is needed."""
        if self.free is not None and self.free < self.needed:
            raise CembedError(
                f"{self.needed / 2**20:,.0f} MiB are needed and {self.free / 2**20:,.0f} are free: lower "
                "--max-visual-tokens or --max-batch, quantise the bundle, or build anyway with --force"
            )


def available_memory() -> int:
    """Bytes of the host that can be had without swapping."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024

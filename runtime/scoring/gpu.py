"""MaxSim over pages in the memory of a GPU: the kernels of native/cuda, without TensorRT and torch.

    with GpuPages.upload(pages, "u8") as stored:
        numbers, scores = stored.search(query, top=10)

NVRTC compiles the kernels for the device at first use. Products of levels (u8) are exact, and scores those of the CPU
bit for bit for queries of up to 64 vectors. For half floats (f16) the query is rounded to half floats, too.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError
from cembed.runtime.scoring.cuda_driver import DeviceLimits, DeviceMemory, Driver, Module, compile_kernels
from cembed.runtime.scoring.kernels import Numbers, Pages, Scores, checked_query
from cembed.runtime.scoring.storage import STORAGE, by_exactness

SOURCES = Path(__file__).parents[1] / "native" / "cuda"
STORED = tuple(name for name in by_exactness() if STORAGE[name].on_gpu)
FILES = ("maxsim.cu", "maxsim.h", "warp.cuh")
_WARPS, _RING, _STEP, _SORTED = 8, 1 << 16, 64, 2048  # of native/cuda/maxsim.h
_ALIGNED = 16  # bytes, to which rows are filled up
_UNIT = 1 << 16  # bytes that a warp takes at once
_RESIDENT = 2  # blocks for which the kernels are compiled
_MOST = _SORTED // 2  # pages that search() finds


class _Pages(ctypes.Structure):
    """MaxSimPages of native/cuda/maxsim.h."""

    _fields_ = (
        ("rows", c_void_p),
        ("offsets", c_void_p),
        ("scales", c_void_p),
        ("count", c_int64),
        ("row_bytes", c_int32),
        ("unit", c_int32),
    )


class _Query(ctypes.Structure):
    """MaxSimQuery of native/cuda/maxsim.h."""

    _fields_ = (
        ("fragments", c_void_p),
        ("scales", c_void_p),
        ("biases", c_void_p),
        ("blocks", c_int32),
        ("held", c_int32),
    )


@dataclass(frozen=True)
class LaunchPlan:
    """How a query of `num` vectors runs over pages of `row_bytes` a row."""

    storage: str
    num: int
    row_bytes: int
    most_shared: int

    @property
    def at_once(self) -> int:
        """Blocks of 16 query vectors that a kernel multiplies in one pass over the pages."""
        return next((n for n in (1, 2) if self.num <= 16 * n), 4)

    @property
    def blocks(self) -> int:
        return -(-self.num // (16 * self.at_once)) * self.at_once

    @property
    def fragment_bytes(self) -> int:
        return self.blocks * 16 * -(-self.row_bytes // _STEP) * _STEP

    @property
    def held(self) -> bool:
        return _RING + self.fragment_bytes <= self.most_shared

    @property
    def shared(self) -> int:
        return _RING + self.fragment_bytes * self.held

    @property
    def kernel(self) -> str:
        return f"maxsim_{self.storage}_{self.at_once}"

    def unit(self, pages: int, nbytes: int, warps: int) -> int:
        """Pages that a warp takes at once: few, so that all end together, but enough bytes to hide their start. With
        several passes they should still be in L2."""
        passes = self.blocks // self.at_once
        return max(1, min(_UNIT // passes * pages // max(nbytes, 1), pages // (4 * warps)))


class GpuKernels:
    """The first device with the kernels on it, and memory that calls share. Raises CembedError where there is none."""

    def __init__(self, driver: Driver | None = None, image: bytes | None = None) -> None:
        self.driver = Driver() if driver is None else driver
        self.module: Module = self.driver.load(cubin(self.driver.limits) if image is None else image)
        self.lock = Lock()  # of the memory that calls share
        self._memory: dict[str, DeviceMemory] = {}

    def memory(self, name: str, nbytes: int) -> DeviceMemory:
        """Kept from call to call."""
        found = self._memory.get(name)
        if found is None or found.nbytes < nbytes:
            self._memory[name] = found = self.driver.allocate(nbytes)
        return found


@cache
def gpu() -> GpuKernels:
    return GpuKernels()


def cubin(limits: DeviceLimits) -> bytes:
    """The kernels for a device of sm_80 or later, compiled once on a machine. Raises CembedError as compile_kernels."""
    if limits.architecture < 80:
        raise CembedError(f"{limits.name} is sm_{limits.architecture}: the kernels need sm_80 or later")
    source, *headers = ((SOURCES / name).read_text(encoding="utf-8") for name in FILES)
    key = hashlib.sha256("\0".join([source, *headers]).encode()).hexdigest()[:16]
    cached = cache_folder() / f"maxsim-{key}-cuda{limits.cuda}-sm{limits.architecture}.cubin"
    if not cached.exists():
        made = compile_kernels(source, dict(zip(FILES[1:], headers, strict=True)), limits.architecture, limits.cuda)
        cached.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cached.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(made)
        unfinished.replace(cached)
    return cached.read_bytes()


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cembed"


class GpuPages:
    """Many pages' vectors in device memory: rows [N, row_bytes], offsets int64 [P + 1], scales float32 [P] of u8.

    `memory` is what is kept alive and given back with them; the three addresses may lie in it, or be another's.
    """

    def __init__(
        self,
        device: GpuKernels,
        storage: str,
        dim: int,
        shape: tuple[int, int],  # P pages, N rows altogether
        addresses: Sequence[int],  # rows, offsets, and for u8 scales
        memory: Sequence[DeviceMemory] = (),
    ) -> None:
        self._gpu, self.storage, self.dim, self._shape, self._memory = device, storage, dim, shape, memory
        self._row_bytes = _row_bytes(storage, dim)
        self._addresses = (*addresses, None)[:3]
        assert shape[0] < 1 << 32, f"{shape = }"

    @classmethod
    def upload(
        cls, pages: Pages | Sequence[Vectors], storage: str = "f16", device: GpuKernels | None = None
    ) -> GpuPages:
        """Stored pages as they are, or vectors [K, D] of each page to be stored as f16 or u8.

        Raises CembedError: a storage type without kernels, no GPU, or too little memory on it.
        """
        stored = pages if isinstance(pages, Pages) else store(pages, storage)
        if stored.storage not in STORED:
            raise CembedError(f"pages in {stored.storage} on a GPU: there are kernels for {', '.join(STORED)}")
        device = gpu() if device is None else device
        offsets = np.concatenate([[0], np.cumsum(stored.rows, dtype=np.int64)])
        arrays = [_matrix(stored, int(offsets[-1])), offsets, *([stored.scales] if stored.kind.has_scale else [])]
        memory = [device.driver.upload(array) for array in arrays]
        shape = len(stored), int(offsets[-1])
        return cls(device, stored.storage, stored.dim, shape, [part.address for part in memory], memory)

    def __len__(self) -> int:
        return self._shape[0]

    def __enter__(self) -> GpuPages:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Gives the memory back."""
        for part in self._memory:
            part.close()

    def score(self, query: Vectors) -> Scores:
        """Scores float32 [P] of a query [Q, D]. Raises CembedError as kernels.score does."""
        query = checked_query(query, self.dim)
        with self._gpu.lock:
            return self._enqueue(query).read(len(self), np.float32)

    def search(self, query: Vectors, top: int) -> tuple[Numbers, Scores]:
        """Numbers and scores [<= top] of the best pages, best first, of equal ones the smaller number."""
        if not 1 <= top <= _MOST:
            raise CembedError(f"the best {top} pages: a GPU finds 1 to {_MOST}; score() gives all")
        query, k = checked_query(query, self.dim), min(top, len(self))
        if k == 0:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        with self._gpu.lock:
            return _decoded(self._best(self._enqueue(query), k).read(k, np.uint64))

    def _enqueue(self, query: Vectors) -> DeviceMemory:
        return self.launch(self.prepare(query), len(query))

    def prepare(self, query: Vectors) -> _Query:
        """Levels and scales of a query [Q, D], as the kernels read them."""
        plan, memory = self._plan(len(query)), self._gpu.memory
        values = memory("query", query.nbytes)
        values.write(query)
        fragments = memory("fragments", plan.fragment_bytes)
        scales, biases = (memory(name, plan.blocks * 64) for name in ("scales", "biases"))
        prepared = _Query(fragments.address, scales.address, biases.address, plan.blocks, plan.held)
        sizes = (c_int32(len(query)), c_int32(self.dim), c_int32(self._row_bytes))
        arguments = (c_void_p(values.address), *sizes, prepared)
        self._gpu.module.launch(f"maxsim_prepare_{self.storage}", plan.blocks * 16, 32, 0, *arguments)
        return prepared

    def launch(self, query: _Query, num: int) -> DeviceMemory:
        """Where the scores of a prepared query of `num` vectors will be; the next launch takes their place."""
        plan, count = self._plan(num), len(self)
        resident = self._gpu.module.resident(plan.kernel, _WARPS * 32, plan.shared, _RESIDENT)
        unit = plan.unit(count, self._shape[1] * self._row_bytes, resident * _WARPS)
        scores, claimed = self._gpu.memory("scores", count * 4), self._gpu.memory("claimed", 4)
        claimed.clear()
        pages = _Pages(*self._addresses, count, self._row_bytes, unit)
        arguments = (pages, query, c_void_p(scores.address), c_void_p(claimed.address))
        grid = max(1, min(resident, -(-count // unit)))
        self._gpu.module.launch(plan.kernel, grid, _WARPS * 32, plan.shared, *arguments)
        return scores

    def _plan(self, num: int) -> LaunchPlan:
        return LaunchPlan(self.storage, num, self._row_bytes, self._gpu.driver.limits.shared_of_block)

    def _best(self, scores: DeviceMemory, k: int) -> DeviceMemory:
        """Keys of the k best: blocks keep theirs, until one block is left."""
        count, source, step = len(self), (c_void_p(scores.address), c_void_p()), 0
        while True:
            blocks = -(-count // _SORTED)
            kept = self._gpu.memory(f"keys {step % 2}", blocks * k * 8)
            arguments = (*source, c_int64(count), c_int32(k), c_void_p(kept.address))
            self._gpu.module.launch("maxsim_top", blocks, 256, _SORTED * 8, *arguments)
            if blocks == 1:
                return kept
            count, source, step = blocks * k, (c_void_p(), c_void_p(kept.address)), step + 1


def _row_bytes(storage: str, dim: int) -> int:
    return -(-STORAGE[storage].vector_bytes(dim) // _ALIGNED) * _ALIGNED


def store(pages: Sequence[Vectors], storage: str) -> Pages:
    """Vectors [K, D] of each page, in a storage type that has kernels."""
    if storage not in STORED:
        raise CembedError(f"pages in {storage!r} on a GPU: there are kernels for {', '.join(STORED)}")
    for number, page in enumerate(pages):
        checked_query(page, pages[0].shape[-1], f"page {number}")
    encoded = [STORAGE[storage].encode(page) for page in pages]
    sizes = np.array([len(data) for data, _ in encoded], np.int64)
    scales = np.array([scale for _, scale in encoded], np.float32)
    rows = np.array([len(page) for page in pages], np.int32)
    data = np.concatenate([np.empty(0, np.uint8), *(data for data, _ in encoded)])
    return Pages(storage, pages[0].shape[1] if len(pages) else 1, data, np.cumsum(sizes) - sizes, rows, scales)


def _matrix(pages: Pages, rows: int) -> NDArray[np.uint8]:
    """Bytes [N, row_bytes] of pages that may lie anywhere; what fills up a row meets zeros of the query."""
    size = pages.kind.vector_bytes(pages.dim)
    matrix, row = np.zeros((rows, _row_bytes(pages.storage, pages.dim)), np.uint8), 0
    for start, count in zip(pages.starts.tolist(), pages.rows.tolist(), strict=True):
        matrix[row : row + count, :size] = pages.data[start : start + count * size].reshape(count, size)
        row += count
    return matrix


def _decoded(keys: NDArray[Any]) -> tuple[Numbers, Scores]:
    """Page numbers and scores of keys that maxsim_top sorted: the order of floats is that of their bits, once those of
    negative ones are turned over."""
    ordered = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(ordered >> np.uint32(31), ordered ^ np.uint32(0x80000000), ~ordered)
    numbers = np.uint64(0xFFFFFFFF) - (keys & np.uint64(0xFFFFFFFF))
    return numbers.astype(np.int64), bits.astype(np.uint32).view(np.float32)

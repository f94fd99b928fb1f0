"""MaxSim on a GPU: exact first, then the share of the bandwidth of a copy that is measured in the same run.

    python bench/gpu_maxsim.py

Needs torch with CUDA; the kernels are those of cembed.runtime.scoring.gpu, over memory that torch fills. Without NVRTC
they are compiled by nvcc. Takes about two minutes; prints every number as JSON. bench/gpu.py shows it as a table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent))  # where cembed is not installed

from cembed.runtime import CembedError
from cembed.runtime.scoring import kernels
from cembed.runtime.scoring.cuda_driver import Driver
from cembed.runtime.scoring.gpu import SOURCES, GpuKernels, GpuPages, store
from cembed.runtime.scoring.storage import STORAGE

Run = Callable[[], object]
DIM = 128
QUERY_VECTORS = (16, 32)
ROUNDS, LAUNCHES, WARM_UP = 7, 10, 3
COPIED = 4 << 30  # bytes
RAGGED = ((3, 24), (16, 64), (32, 128), (40, 320), (64, 2048), (200, 128))  # query vectors, dim
PUBLISHED = {  # of H100 bandwidth, as flash-maxsim and TileMaxSim claim
    "half floats, pages of 64 vectors and more": "60-93 %",
    "half floats, pages of 32 vectors": "25 %",
    "int8": "27 %",
}


@dataclass(frozen=True)
class Case:
    storage: str
    pages: int
    vectors: int  # of each page
    least: float  # the share that is asked for

    @property
    def name(self) -> str:
        return f"{self.storage}, {self.pages} x {self.vectors} x {DIM}"

    @property
    def nbytes(self) -> int:
        """Read and written: rows, offsets, scales, scores."""
        row = STORAGE[self.storage].vector_bytes(DIM)
        return self.pages * (self.vectors * row + 8 + 4 + STORAGE[self.storage].page_bytes)


CASES = (
    Case("f16", 1_000_000, 32, 0.85),
    Case("f16", 31_000, 1030, 0.90),
    Case("u8", 1_000_000, 32, 0.85),
    Case("u8", 31_000, 1030, 0.85),
)


def measure(shrink: int = 1) -> dict[str, Any]:
    """Everything, as numbers; `shrink` takes every n-th page only: a try."""
    device = open_device()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "errors": errors(device)}
    found["copy"] = {"bytes_per_second": copy_bandwidth()}
    cases = [Case(case.storage, case.pages // shrink, case.vectors, case.least) for case in CASES]
    found["cases"] = {case.name: times(device, case, found["copy"]["bytes_per_second"]) for case in cases}
    return found | {"published": PUBLISHED}


def open_device() -> GpuKernels:
    driver = Driver()
    try:
        return GpuKernels(driver)
    except CembedError as reason:
        print(f"{reason}; nvcc is tried", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "maxsim.cubin"
        flags = ["-std=c++17", "-cubin", f"-arch=sm_{driver.limits.architecture}"]
        subprocess.run(["nvcc", *flags, str(SOURCES / "maxsim.cu"), "-o", str(made)], check=True)
        return GpuKernels(driver, made.read_bytes())


# Exactness -----------------------------------------------------------------------------------------------------------


def errors(device: GpuKernels, most: int = 300) -> dict[str, Any]:
    """Ragged pages of up to `most` vectors. Of half floats the largest difference to float64 for each query vector; of
    levels how many scores differ from the CPU's in any bit; of both whether search() and a page alone agree."""
    found: dict[str, Any] = {"f16": 0.0, "u8": 0, "other_pages": 0, "search": 0}
    for seed, (num, dim) in enumerate(RAGGED):
        random = np.random.default_rng(seed)
        query = unit(random.standard_normal((num, dim)))
        vectors = [unit(random.standard_normal((count, dim))) for count in random.integers(1, most, 40)]
        for storage in ("f16", "u8"):
            with (
                GpuPages.upload(vectors, storage, device) as pages,
                GpuPages.upload(vectors[7:8], storage, device) as one,
            ):
                scores, numbers = pages.score(query), pages.search(query, 10)[0]
                found["other_pages"] += int(one.score(query)[0] != scores[7])
            found["search"] += int(numbers.tolist() != np.argsort(-scores, kind="stable")[:10].tolist())
            if storage == "f16":
                found["f16"] = max(found["f16"], float(np.abs(scores - exact(query, vectors)).max() / num))
            elif num <= 64:
                found["u8"] += int((scores != on_cpu(query, vectors)).sum())
    return found


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def exact(query: NDArray[np.float32], vectors: list[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Float64 over what half floats hold; a query vector has a power of two beside them."""
    scales = np.exp2(np.floor(np.log2(np.abs(query).max(axis=1, keepdims=True))))
    rounded = (query / scales).astype(np.float16) * scales.astype(np.float64)
    return np.array([(rounded @ page.astype(np.float16).astype(np.float64).T).max(axis=1).sum() for page in vectors])


def on_cpu(query: NDArray[np.float32], vectors: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that numpy takes over where there is no library
        return kernels.score(query, store(vectors, "u8"))


# Speed ---------------------------------------------------------------------------------------------------------------


def seconds(run: Run) -> float:
    """Of one call among `LAUNCHES` that the device does one after the other; the median of rounds."""
    for _ in range(WARM_UP):
        run()
    event: Any = torch.cuda.Event
    found = list[float]()
    for _ in range(ROUNDS):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        for _ in range(LAUNCHES):
            run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000 / LAUNCHES)
    return median(found)


def on_the_clock(run: Run) -> float:
    found = list[float]()
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return median(found)


def copy_bandwidth() -> float:
    """Bytes that a copy on the device reads and writes a second."""
    source = torch.ones(COPIED // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / seconds(lambda: target.copy_(source))


def times(device: GpuKernels, case: Case, bandwidth: float) -> dict[str, Any]:
    count = case.pages * case.vectors
    found = dict[str, Any]()
    if case.storage == "f16":
        rows = torch.randn((count, DIM), device="cuda", dtype=torch.float16)
    else:
        rows = torch.randint(0, 256, (count, DIM), device="cuda", dtype=torch.uint8)
    offsets = torch.arange(0, count + 1, case.vectors, device="cuda")
    scales = torch.ones(case.pages, device="cuda")
    places = [tensor.data_ptr() for tensor in (rows, offsets, scales)]
    pages = GpuPages(device, case.storage, DIM, (case.pages, count), places[: 2 + (case.storage == "u8")])
    torch.cuda.synchronize()
    for num in QUERY_VECTORS:
        query = unit(np.random.default_rng(num).standard_normal((num, DIM)))
        prepared = pages.prepare(query)
        spent = {"cembed": seconds(partial(pages.launch, prepared, num))}
        spent["search, from query to numbers"] = on_the_clock(partial(pages.search, query, 10))
        if case.storage == "f16":
            spent |= with_torch(rows.view(case.pages, case.vectors, DIM), query)
        found[f"{num} query vectors"] = {
            "milliseconds": {name: value * 1000 for name, value in spent.items()},
            "gigabytes_per_second": case.nbytes / spent["cembed"] / 1e9,
            "share_of_copy": case.nbytes / spent["cembed"] / bandwidth,
            "asked": case.least,
        }
    return found


def with_torch(pages: torch.Tensor, query: NDArray[np.float32]) -> dict[str, float]:
    """As colpali-engine scores, a share of the pages at once so that all similarities have room; and compiled."""
    asked = torch.from_numpy(query).to("cuda", torch.float16)

    def score(part: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nd,csd->cns", asked, part).amax(dim=2).sum(dim=1)

    parts = pages.chunk(10)
    found = {"torch einsum": seconds(lambda: [score(part) for part in parts])}
    try:
        compiled = torch.compile(score)
        found["torch.compile"] = seconds(lambda: [compiled(part) for part in parts])
    except Exception as error:  # a compiler may be missing; its own failures have many types
        print(f"torch.compile: {error}", file=sys.stderr)
    return found


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What measure() found, a row for each case and query."""
    return [
        {
            "pages": name,
            "query": query,
            "GB/s": result["gigabytes_per_second"],
            "of a copy": result["share_of_copy"],
            "asked": result["asked"],
            **{f"{way}, ms": spent for way, spent in result["milliseconds"].items()},
        }
        for name, by_query in found["cases"].items()
        for query, result in by_query.items()
    ]


if __name__ == "__main__":
    try:
        print(json.dumps(measure(), indent=1))
    except CembedError as error:
        sys.exit(str(error))

"""MaxSim on a GPU, without one: the kernels run on the CPU, behind what looks like CUDA's driver library.

tests/native/gpu_on_host.cpp compiles runtime/native/cuda/maxsim.cu as it is, coroutine for thread; copies that are not
waited for leave NaN, and reads outside of allocations are errors.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cembed.runtime import CembedError
from cembed.runtime.scoring import cuda_driver, gpu, kernels
from cembed.runtime.scoring.cuda_driver import DeviceLimits, Driver
from cembed.runtime.scoring.gpu import GpuKernels, GpuPages, LaunchPlan
from cembed.runtime.scoring.storage import STORAGE

ROOT = Path(__file__).parent.parent
ON_HOST = Path(__file__).parent / "native" / "gpu_on_host.cpp"
CUDA = ROOT / "runtime" / "native" / "cuda"
ARCHITECTURES = (87, 90, 120)
Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    made = tmp_path_factory.mktemp("gpu") / "gpu_on_host.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"]
    subprocess.run([compiler, *flags, "-shared", "-fPIC", str(ON_HOST), "-o", str(made)], check=True)
    found = ctypes.CDLL(str(made))
    found.launched.restype = ctypes.c_char_p
    return found


@pytest.fixture(scope="module")
def device(library: ctypes.CDLL) -> GpuKernels:
    return GpuKernels(Driver(library), b"the kernels are in the library")


def unit(seed: int, rows: int, dim: int) -> Floats:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    lengths: Floats = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / lengths


def stored(storage: str, rows: list[int], dim: int) -> kernels.Pages:
    return gpu.store([unit(i, count, dim) for i, count in enumerate(rows, 1)], storage)


def exact(query: Floats, pages: kernels.Pages) -> NDArray[np.float64]:
    """In float64, of the query as half floats hold it beside a power of two."""
    scales = np.exp2(np.floor(np.log2(np.abs(query).max(axis=1, keepdims=True))))
    rounded = (query / scales).astype(np.float16).astype(np.float64) * scales
    return np.array([(rounded @ pages.vectors(i).T).max(axis=1).sum() for i in range(len(pages))])


@contextmanager
def units(pages: int) -> Iterator[None]:
    """A warp takes so many pages at once; few pages are planned one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LaunchPlan, "unit", lambda plan, *sizes: pages)
        yield


UNITS = st.integers(1, 9)
ROWS = st.lists(st.one_of(st.integers(1, 3), st.integers(1, 70), st.sampled_from([31, 32, 33])), min_size=1, max_size=9)


@settings(max_examples=15, deadline=None)
@given(num=st.integers(1, 40), dim=st.integers(1, 150), rows=ROWS, pages_at_once=UNITS)
def test_half_floats_equal_float64(device: GpuKernels, num: int, dim: int, rows: list[int], pages_at_once: int) -> None:
    query, pages = unit(0, num, dim), stored("f16", rows, dim)
    with GpuPages.upload(pages, device=device) as there, units(pages_at_once):
        np.testing.assert_allclose(there.score(query), exact(query, pages), rtol=0, atol=2e-6 * num)


@settings(max_examples=15, deadline=None)
@given(num=st.integers(1, 64), dim=st.integers(1, 150), rows=ROWS, pages_at_once=UNITS)
def test_levels_equal_the_cpu_bit_for_bit(
    device: GpuKernels, num: int, dim: int, rows: list[int], pages_at_once: int
) -> None:
    query, pages = unit(0, num, dim), stored("u8", rows, dim)
    with GpuPages.upload(pages, device=device) as there, units(pages_at_once):
        assert np.array_equal(there.score(query), kernels.score(query, pages))


@pytest.mark.parametrize(
    ("num", "dim", "rows"), [(16, 2048, [5, 40]), (5, 4096, [33]), (130, 64, [3, 40]), (1024, 64, [9])]
)
@pytest.mark.parametrize("storage", gpu.STORED)
def test_large_shapes(device: GpuKernels, storage: str, num: int, dim: int, rows: list[int]) -> None:
    """Long rows, and queries that take several passes; the largest do not fit into shared memory."""
    query, pages = unit(0, num, dim), stored(storage, rows, dim)
    needed = exact(query, pages) if storage == "f16" else kernels.score(query, pages)
    with GpuPages.upload(pages, device=device) as there, units(2):
        np.testing.assert_allclose(there.score(query), needed, rtol=2e-6)


@pytest.mark.parametrize("storage", gpu.STORED)
def test_a_score_depends_on_nothing_else(device: GpuKernels, storage: str) -> None:
    query, rows = unit(0, 20, 96), [3, 32, 40, 1, 1, 7, 100, 32]
    vectors = [unit(i, count, 96) for i, count in enumerate(rows)]
    with GpuPages.upload(vectors, storage, device) as together, units(5):
        scores = together.score(query)
    for index, page in enumerate(vectors):
        with GpuPages.upload([page], storage, device) as alone:
            assert alone.score(query)[0] == scores[index]


@pytest.mark.parametrize("pages_at_once", [1, 2, 6])
def test_pages_without_vectors(device: GpuKernels, pages_at_once: int) -> None:
    """At the start, between others, at the end, and nothing else in a unit: minus infinity, also without any rows."""
    rows, query = [0, 0, 3, 0, 40, 0], unit(0, 5, 64)
    vectors = np.concatenate([unit(i, count, 64) for i, count in enumerate(rows)]).astype(np.float16)
    memory = [device.driver.upload(array) for array in (vectors, np.cumsum([0, *rows], dtype=np.int64))]
    there = GpuPages(device, "f16", 64, (6, 43), [part.address for part in memory], memory)
    with units(pages_at_once):
        scores = there.score(query)
    np.testing.assert_allclose(scores[[2, 4]], exact(query, gpu.store([unit(2, 3, 64), unit(4, 40, 64)], "f16")), 2e-6)
    assert np.isneginf(scores).tolist() == [True, True, False, True, False, True]
    assert there.search(query, 6)[0].tolist()[2:] == [0, 1, 3, 5]
    nothing = device.driver.upload(np.zeros(3, np.int64))
    empty = GpuPages(device, "f16", 64, (2, 0), [memory[0].address, nothing.address], [*memory, nothing])
    assert np.isneginf(empty.score(query)).all()
    empty.close()


@pytest.mark.parametrize("storage", gpu.STORED)
def test_rows_are_counted_in_64_bits(device: GpuKernels, storage: str) -> None:
    """As the last of many pages: only they are there, the row before them would be number 2^33 - 1."""
    query, rows, first = unit(0, 5, 128), [3, 40, 1, 32], 1 << 33
    pages = stored(storage, rows, 128)
    matrix, offsets = gpu._matrix(pages, sum(rows)), first + np.cumsum([0, *rows], dtype=np.int64)
    memory = [device.driver.upload(array) for array in (matrix, offsets, pages.scales)]
    addresses = [part.address for part in memory][: 3 if storage == "u8" else 2]
    addresses[0] -= first * matrix.shape[1]
    there = GpuPages(device, storage, 128, (len(rows), sum(rows)), addresses, memory)
    needed = exact(query, pages) if storage == "f16" else kernels.score(query, pages)
    with there, units(2):
        np.testing.assert_allclose(there.score(query), needed, rtol=2e-6)


def test_similarities_that_are_all_negative(device: GpuKernels) -> None:
    """Neither filled-up rows nor filled-up components nor filled-up query vectors take part."""
    for storage in gpu.STORED:
        with GpuPages.upload([-np.ones((k, 24), np.float32) for k in (1, 5, 33)], storage, device) as there:
            np.testing.assert_allclose(there.score(np.ones((3, 24), np.float32)), -72, rtol=1e-6)


def test_queries_beyond_half_floats(device: GpuKernels) -> None:
    vectors = [unit(1, 4, 32)]
    with GpuPages.upload(vectors, device=device) as there:
        scores = [there.score(unit(0, 3, 32) * np.float32(2.0**power)) for power in (-100, 0, 100)]
    assert scores[0] * 2.0**100 == scores[1] == scores[2] / 2.0**100


@settings(max_examples=8, deadline=None)
@given(data=st.data(), k=st.integers(1, 12))
def test_search_is_the_sorted_scores(device: GpuKernels, data: st.DataObject, k: int) -> None:
    """Ties too: pages come several times."""
    kinds = [unit(i, 2, 16) for i in range(3)]
    pages = [kinds[i] for i in data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=20))]
    with GpuPages.upload(pages, "u8", device) as there:
        scores = there.score(unit(9, 2, 16))
        numbers, found = there.search(unit(9, 2, 16), k)
    assert numbers.tolist() == np.argsort(-scores, kind="stable")[:k].tolist()
    assert np.array_equal(found, scores[numbers])
    assert (numbers.dtype, found.dtype) == (np.int64, np.float32)


def test_search_among_many(device: GpuKernels) -> None:
    """Three rounds of blocks."""
    query, pages = unit(0, 1, 16), [unit(i, 1, 16) for i in range(5000)]
    with GpuPages.upload(pages, "u8", device) as there:
        scores = there.score(query)
        numbers, found = there.search(query, 1000)
        assert np.array_equal(scores, kernels.score(query, gpu.store(pages, "u8")))
    assert numbers.tolist() == np.argsort(-scores, kind="stable")[:1000].tolist()
    assert np.array_equal(found, scores[numbers])


def test_nothing_to_search(device: GpuKernels) -> None:
    with GpuPages.upload([], device=device) as there:
        assert len(there) == len(there.score(unit(0, 1, 1))) == len(there.search(unit(0, 1, 1), 3)[0]) == 0


def test_threads_share_a_device(device: GpuKernels) -> None:
    query, found = unit(0, 3, 32), dict[int, Floats]()
    with GpuPages.upload([unit(i, 5, 32) for i in range(20)], "u8", device) as there:
        needed = there.score(query)
        workers = [threading.Thread(target=lambda i=i: found.update({i: there.score(query)})) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert all(np.array_equal(scores, needed) for scores in found.values())
    assert len(found) == 4


def test_order_of_launches(device: GpuKernels, library: ctypes.CDLL) -> None:
    before = len(library.launched())
    with GpuPages.upload([unit(0, 2, 16)], "u8", device) as there:
        there.search(unit(0, 40, 16), 1)
    assert library.launched()[before:].split() == [b"maxsim_prepare_u8", b"maxsim_u8_4", b"maxsim_top"]


def test_memory_is_given_back(device: GpuKernels, library: ctypes.CDLL) -> None:
    before = library.allocations()
    with GpuPages.upload([unit(0, 2, 16)], "u8", device):
        assert library.allocations() == before + 3
    assert library.allocations() == before
    there = GpuPages.upload([unit(0, 2, 16)], "f16", device)
    assert library.allocations() == before + 2
    del there
    assert library.allocations() == before


@settings(max_examples=200, deadline=None)
@given(num=st.integers(1, 1024), row=st.integers(1, 512), pages=st.integers(1, 10**7), rows=st.integers(1, 10**9))
def test_plans(num: int, row: int, pages: int, rows: int) -> None:
    """A launch asks for no more than there is, and leaves no query vector out."""
    plan = LaunchPlan("f16", num, row * 16, 101_376)
    assert plan.shared <= plan.most_shared
    assert plan.blocks * 16 >= num
    assert plan.blocks % plan.at_once == 0
    assert plan.held == (plan.shared > gpu._RING)
    assert 1 <= plan.unit(pages, rows * row * 16, 1000) <= max(1, pages)


def test_the_structs_and_numbers_are_those_of_the_kernels(library: ctypes.CDLL) -> None:
    assert ctypes.sizeof(gpu._Pages) == library.size_of_pages()
    assert ctypes.sizeof(gpu._Query) == library.size_of_query()
    text = (CUDA / "maxsim.h").read_text()
    for name, value in (("Warps", "8"), ("Ring", "1 << 16"), ("Step", "64"), ("Sorted", "2048")):
        assert f"kMaxSim{name} = {value};" in text
        assert eval(value) == getattr(gpu, f"_{name.upper()}")


@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize(("num", "dim"), [(1, 16), (20, 128), (50, 64), (70, 1024)])
def test_what_the_tensorrt_plugin_launches(
    device: GpuKernels, library: ctypes.CDLL, levels: bool, num: int, dim: int
) -> None:
    """Its query is in half floats, its levels have zero point 0; the same sums follow."""
    rows, query = [3, 0, 40, 1, 32, 7], unit(0, num, dim).astype(np.float16)
    vectors = [unit(i, count, dim) for i, count in enumerate(rows, 1) if count]
    pages = gpu.store(vectors, "u8" if levels else "f16")
    matrix = gpu._matrix(pages, sum(rows)) ^ np.uint8(128 * levels)
    offsets, scales = np.cumsum([0, *rows], dtype=np.int64), np.insert(pages.scales, 1, 0)
    there = [device.driver.upload(array) for array in (query, matrix, offsets, scales)]
    scores, work = device.driver.allocate(6 * 4), device.driver.allocate(library.plugin_workspace(levels, num, dim))
    places = [ctypes.c_uint64(part.address) for part in (*there, scores, work)]
    sizes = ctypes.c_longlong(6), ctypes.c_longlong(sum(rows))
    assert (
        library.plugin(
            int(levels), places[0], num, dim, *places[1:3], places[3] if levels else None, *sizes, *places[4:]
        )
        == 0
    )
    found, wide = scores.read(6, np.float32), query.astype(np.float32)
    needed = kernels.score(wide, pages) if levels else exact(wide, pages)
    np.testing.assert_allclose(np.delete(found, 1), needed, rtol=2e-6)
    assert np.isneginf(found[1])


# What users are told -------------------------------------------------------------------------------------------------


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_DRIVERS", ("libnocuda.so.1",))
    gpu.gpu.cache_clear()
    with pytest.raises(CembedError, match=r"^a GPU needs NVIDIA's driver$"):
        GpuPages.upload([unit(0, 2, 16)])


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_driver, "_compilers", lambda cuda: [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(CembedError, match="need NVRTC of CUDA 13: install cembed's extra 'gpu', or CUDA"):
        gpu.cubin(DeviceLimits("a GPU", 13, 90, 1, 1, 1))


def test_a_device_that_is_too_old() -> None:
    with pytest.raises(CembedError, match="Tesla T4 is sm_75: the kernels need sm_80"):
        gpu.cubin(DeviceLimits("Tesla T4", 13, 75, 1, 1, 1))


def test_too_little_memory(device: GpuKernels) -> None:
    with pytest.raises(CembedError, match="cannot do cuMemAlloc_v2: out of memory"):
        device.driver.allocate(1 << 31)


@pytest.mark.parametrize("storage", ["f32", "bits", "f8"])
def test_storage_without_kernels(device: GpuKernels, storage: str) -> None:
    with pytest.raises(CembedError, match="there are kernels for f16, u8"):
        GpuPages.upload([unit(0, 2, 16)], storage, device)
    if storage in STORAGE:
        data, _ = STORAGE[storage].encode(unit(0, 2, 16))
        arrays = data, np.zeros(1, np.int64), np.full(1, 2, np.int32), np.ones(1, np.float32)
        with pytest.raises(CembedError, match="there are kernels for f16, u8"):
            GpuPages.upload(kernels.Pages(storage, 16, *arrays), device=device)


def test_queries_and_numbers_that_cannot_be_searched(device: GpuKernels) -> None:
    with GpuPages.upload([unit(0, 2, 16)], device=device) as there:
        for query, words in ((unit(0, 2, 8), "dim 8"), (np.full((1, 16), np.nan, np.float32), "NaN")):
            with pytest.raises(CembedError, match=words):
                there.score(query)
        for top in (0, 1025):
            with pytest.raises(CembedError, match="finds 1 to 1024"):
                there.search(unit(0, 2, 16), top)
    with pytest.raises(CembedError, match="page 1 has dim 8, the pages have 16"):
        GpuPages.upload([unit(0, 2, 16), unit(0, 2, 8)], device=device)


# Compilers -----------------------------------------------------------------------------------------------------------


def test_nvrtc_compiles_the_kernels_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From their text, without headers of CUDA."""
    limits = DeviceLimits("a GPU", 13, 90, 1, 1, 1)
    try:
        cuda_driver._load(cuda_driver._compilers(13), "")
    except CembedError:
        pytest.skip("needs NVRTC: pip install '.[gpu]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = gpu.cubin(limits)
    assert made.startswith(b"\x7fELF")
    assert all(f"maxsim_{kind}".encode() in made for kind in ("f16_1", "f16_4", "u8_2", "prepare_u8", "top"))
    monkeypatch.setattr(cuda_driver, "_compilers", lambda cuda: [])
    assert gpu.cubin(limits) == made
    assert [path.suffix for path in gpu.cache_folder().iterdir()] == [".cubin"]


def test_nvcc_compiles_the_kernels_without_spilling(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    kinds = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES if f"sm_{n}" in listed]
    flags = ["-std=c++17", "-fatbin", "--threads=2", "-Xptxas=-v", *kinds]
    command = [nvcc, *flags, str(CUDA / "maxsim.cu"), "-o", str(tmp_path / "maxsim.fatbin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    spills = re.findall("([0-9]+) bytes spill stores", done.stderr)
    assert len(spills) == 14 * len(kinds)
    assert {*spills} == {"0"}


def test_the_benchmark_finds_the_kernels_exact(device: GpuKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    import gpu_maxsim

    monkeypatch.setattr(gpu_maxsim, "RAGGED", gpu_maxsim.RAGGED[:2])
    found = gpu_maxsim.errors(device, most=20)
    assert found.pop("f16") < 2e-6
    assert found == {"u8": 0, "other_pages": 0, "search": 0}

"""The kernels: every set that this machine runs equals numpy, and numpy equals the definition."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cembed.runtime import CembedError, compiled, maxsim
from cembed.runtime.scoring import kernels
from cembed.runtime.scoring.kernels import Pages, kernel_sets, matches, score, top, use_kernels
from cembed.runtime.scoring.storage import STORAGE

NATIVE = Path(__file__).parent / "native" / "test_maxsim.cpp"
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
Floats = NDArray[np.float32]
needs_library = pytest.mark.skipif(kernels.load() is None, reason="the library was not built")


def unit(seed: int, rows: int, dim: int) -> Floats:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    lengths: Floats = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / lengths


def store(name: str, vectors: Sequence[Floats], gap: int = 0) -> Pages:
    """Pages with `gap` bytes of ones before each: they lie anywhere, and nothing of the gap may be read."""
    encoded = [STORAGE[name].encode(page) for page in vectors]
    parts = [np.concatenate([np.full(gap, 255, np.uint8), data]) for data, _ in encoded]
    starts = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)[:-1] + gap
    rows, scales = np.array([len(page) for page in vectors], np.int32), np.array([s for _, s in encoded], np.float32)
    return Pages(name, vectors[0].shape[1], np.concatenate(parts), starts, rows, scales)


@pytest.fixture
def fastest() -> Iterator[None]:
    """Puts the fastest kernels back."""
    yield
    if kernel_sets():
        use_kernels(kernel_sets()[0])


SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 20).map(lambda n: n * 8), st.integers(0, 99))
ROWS = st.lists(st.one_of(st.integers(1, 70), st.sampled_from([16, 31, 32, 33])), min_size=1, max_size=5)
NAMES = st.sampled_from(list(STORAGE))


@settings(max_examples=100, deadline=None)
@given(name=NAMES, shape=SHAPES, rows=ROWS, gap=st.integers(0, 5))
def test_numpy_equals_the_definition(name: str, shape: tuple[int, int, int], rows: list[int], gap: int) -> None:
    """Over what is stored; the query is rounded for levels and signs, each component by half a step at most."""
    num, dim, seed = shape
    query = unit(seed, num, dim)
    pages = store(name, [unit(seed + i, k, dim) for i, k in enumerate(rows, 1)], gap)
    needed = [(query.astype(np.float64) @ pages.vectors(i).T).max(axis=1).sum() for i in range(len(pages))]
    steps = {"u8": 127, "bits": 31}
    half_step = np.abs(query).max(axis=1).sum() / steps[name] / 2 if name in steps else 0.0
    sizes = np.array([np.abs(pages.vectors(i)).sum(axis=1).max() for i in range(len(pages))])
    found = kernels._score_with_numpy(query, pages, np.arange(len(pages)))
    assert (np.abs(found - needed) <= 1e-5 * num + half_step * sizes).all()


@needs_library
@settings(max_examples=150, deadline=None)
@given(name=NAMES, shape=SHAPES, rows=ROWS, gap=st.integers(0, 5), data=st.data())
def test_every_set_equals_numpy(
    name: str, shape: tuple[int, int, int], rows: list[int], gap: int, data: st.DataObject
) -> None:
    """Bit for bit where the sums are of integers."""
    num, dim, seed = shape
    query = unit(seed, num, dim)
    pages = store(name, [unit(seed + i, k, dim) for i, k in enumerate(rows, 1)], gap)
    which = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8)), np.int64)
    needed = kernels._score_with_numpy(query, pages, which)
    try:
        for kernel_set in kernel_sets():
            use_kernels(kernel_set)
            np.testing.assert_allclose(score(query, pages, which), needed, rtol=0, atol=1e-5 if name[0] == "f" else 0)
    finally:
        use_kernels(kernel_sets()[0])


@needs_library
@pytest.mark.parametrize(
    ("name", "dim"),
    [(name, dim) for name in STORAGE for dim in (1, 3, 65, 511, 513, 2048, 4096) if name != "bits" or dim % 8 == 0],
)
def test_dims(name: str, dim: int, fastest: None) -> None:
    query, pages = unit(0, 5, dim), store(name, [unit(1, 35, dim), unit(2, 1, dim)], 1)
    needed = kernels._score_with_numpy(query, pages, np.arange(2))
    for kernel_set in kernel_sets():
        use_kernels(kernel_set)
        np.testing.assert_allclose(score(query, pages), needed, rtol=0, atol=1e-5 if name[0] == "f" else 0)


@pytest.mark.parametrize("name", STORAGE)
def test_neither_threads_nor_other_pages_change_a_score(name: str, fastest: None) -> None:
    """Bit for bit. The pages are enough work for several threads."""
    query = unit(0, 60, 512)
    pages = store(name, [unit(i, 1 + i * 7 % 40, 512) for i in range(100)])
    for kernel_set in kernel_sets() or [None]:
        if kernel_set:
            use_kernels(kernel_set)
        together = score(query, pages, threads=1)
        assert np.array_equal(score(query, pages, threads=4), together)
        assert np.array_equal(score(query, pages), together)
        some = np.random.default_rng(0).permutation(100)[:17]
        assert np.array_equal(score(query, pages, some, threads=3), together[some])
        assert all(score(query, pages, some[i : i + 1])[0] == together[some[i]] for i in range(5))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), k=st.integers(-1, 30), threads=st.integers(1, 4))
def test_top_is_the_sorted_scores(data: st.DataObject, k: int, threads: int) -> None:
    """Ties too: pages come several times."""
    kinds = [unit(i, 4, 8) for i in range(3)]
    pages = store("u8", [kinds[i] for i in data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=25))])
    which = np.array(data.draw(st.permutations(range(len(pages)))), np.int64)
    which = which[: data.draw(st.integers(0, len(pages)))]
    query = unit(9, 3, 8)
    scores = score(query, pages)
    numbers, found = top(query, pages, k, which, threads)
    assert numbers.tolist() == sorted(which.tolist(), key=lambda page: (-scores[page], page))[: max(k, 0)]
    assert np.array_equal(found, scores[numbers])
    assert (numbers.dtype, found.dtype) == (np.int64, np.float32)


def test_top_by_many_threads() -> None:
    query, pages = unit(0, 32, 512), store("f32", [unit(i, 16, 512) for i in range(200)])
    numbers, found = top(query, pages, 10, threads=4)
    scores = score(query, pages, threads=1)
    assert numbers.tolist() == np.argsort(-scores, kind="stable")[:10].tolist()
    assert np.array_equal(found, scores[numbers])


@pytest.mark.parametrize("name", STORAGE)
def test_matches(name: str) -> None:
    """A vector finds itself; of two equal ones the first."""
    vectors = unit(0, 40, 64)
    pages = store(name, [unit(1, 3, 64), np.concatenate([vectors, vectors])])
    found = matches(vectors[[7, 33]], pages, 1)
    assert found.tolist() == [7, 33]
    assert found.dtype == np.int32


@pytest.mark.parametrize("name", STORAGE)
def test_memory_mapped(name: str, tmp_path: Path) -> None:
    pages = store(name, [unit(i, 5, 64) for i in range(9)], 3)
    pages.data.tofile(tmp_path / "data")
    mapped = Pages(name, 64, np.memmap(tmp_path / "data", np.uint8, "r"), pages.starts, pages.rows, pages.scales)
    assert np.array_equal(score(unit(0, 4, 64), mapped), score(unit(0, 4, 64), pages))


def test_similarities_that_are_all_negative() -> None:
    """Neither filled-up rows nor filled-up components take part."""
    query = np.ones((3, 24), np.float32)
    for name in STORAGE:
        pages = store(name, [-np.ones((k, 24), np.float32) for k in (1, 5, 33)])
        needed = -3 * 24 / (np.sqrt(24) if name == "bits" else 1)
        np.testing.assert_allclose(score(query, pages), needed, rtol=1e-3)


def test_zeros() -> None:
    for name in STORAGE:
        pages = store(name, [np.zeros((4, 16), np.float32)])
        assert score(np.zeros((2, 16), np.float32), pages).tolist() == [0.0]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (np.ones((0, 8), np.float32), "shape (0, 8)"),
        (np.ones(8, np.float32), "shape (8,)"),
        (np.ones((2, 9), np.float32), "dim 9, the pages have 8"),
        (np.full((2, 8), np.nan, np.float32), "NaN"),
        (np.full((2, 8), 1e300), "float32 cannot hold"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_queries_that_cannot_be_scored(query: Floats, words: str) -> None:
    pages = store("f16", [unit(0, 2, 8)])
    for ask in (lambda: score(query, pages), lambda: top(query, pages, 1), lambda: matches(query, pages, 0)):
        with pytest.raises(CembedError) as raised:
            ask()
        assert words in str(raised.value)


@pytest.mark.parametrize("which", [[-1], [2], [0, 1, 2]])
def test_pages_that_are_not_there(which: list[int]) -> None:
    pages = store("bits", [unit(0, 2, 8), unit(1, 1, 8)])
    with pytest.raises(CembedError, match="pages 0 to 1"):
        score(unit(0, 1, 8), pages, np.array(which))


def test_no_threads() -> None:
    if kernels.load() is not None:
        with pytest.raises(CembedError, match="0 threads"):
            score(unit(0, 1, 8), store("u8", [unit(0, 1, 8)]), threads=0)


@pytest.mark.parametrize(
    ("start", "rows", "size", "words"),
    [(1, 1, 32, "outside"), (-1, 1, 64, "outside"), (0, 0, 64, "empty"), (0, 2**31 - 1, 64, "outside")],
)
def test_pages_outside_of_their_data(start: int, rows: int, size: int, words: str) -> None:
    starts, counts = np.array([0, start], np.int64), np.array([1, rows], np.int32)
    with pytest.raises(CembedError, match=words):
        Pages("f32", 8, np.zeros(size, np.uint8), starts, counts, np.ones(2, np.float32))


def test_storage_that_is_not_there() -> None:
    nothing = np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
    with pytest.raises(CembedError, match="unknown storage 'f8'"):
        Pages("f8", 8, *nothing)
    with pytest.raises(CembedError, match="multiple of 8"):
        Pages("bits", 12, *nothing)
    with pytest.raises(CembedError, match="multiple of 8"):
        STORAGE["bits"].encode(unit(0, 1, 12))
    assert score(unit(0, 1, 8), Pages("u8", 8, *nothing)).shape == (0,)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 70), dim=st.integers(1, 9).map(lambda n: n * 8), seed=st.integers(0, 99))
def test_bytes_of_a_page_and_back(rows: int, dim: int, seed: int) -> None:
    vectors = unit(seed, rows, dim)
    worst = {"f32": 0, "f16": 1e-3, "u8": np.abs(vectors).max() / 250}
    for name, storage in STORAGE.items():
        data, _ = storage.encode(vectors)
        assert len(data) == rows * storage.vector_bytes(dim) == storage.page_size(vectors) - storage.page_bytes
        if name == "bits":
            assert np.array_equal(storage.restore(vectors) < 0, vectors < 0)
        else:
            np.testing.assert_allclose(storage.restore(vectors), vectors, rtol=0, atol=worst[name])


def test_numpy_takes_over_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query, pages = unit(0, 3, 32), store("u8", [unit(i, 4, 32) for i in range(5)])
    needed = score(query, pages), top(query, pages, 2)
    monkeypatch.setattr(compiled, "EXTENSION_SUFFIXES", [".none"])
    kernels.load.cache_clear()
    try:
        with pytest.warns(UserWarning, match="MaxSim runs in numpy"):
            assert np.array_equal(score(query, pages), needed[0])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for found, before in zip(top(query, pages, 2), needed[1], strict=True):
                assert np.array_equal(found, before)
            maxsim([query], [unit(0, 2, 32)])
    finally:
        kernels.load.cache_clear()


@pytest.mark.parametrize(("rows", "lengths"), [(7, [3, 7, 1]), (40, [40, 33, 1])])
def test_padded_arrays_equal_lists(rows: int, lengths: list[int]) -> None:
    """The padding is NaN: it would be noticed."""
    documents = np.full((3, rows, 16), np.nan, np.float32)
    for document, length in zip(documents, lengths, strict=True):
        document[:length] = unit(length, length, 16)
    ragged = [document[:length] for document, length in zip(documents, lengths, strict=True)]
    needed = maxsim(ragged, ragged)
    assert np.array_equal(
        maxsim(documents, documents, query_lengths=lengths, document_lengths=np.array(lengths)), needed
    )
    assert np.array_equal(maxsim(ragged, store("f32", ragged)), needed)
    assert np.array_equal(maxsim(np.ones((2, 3, 4)), np.ones((1, 2, 4))), [[12.0], [12.0]])


@pytest.mark.parametrize("lengths", [[1, 2], [0, 1, 1], [1, 1, 5], [1.0, 1.0, 1.0], [[1, 1, 1]]])
def test_lengths_that_do_not_fit(lengths: list[int]) -> None:
    array = np.ones((3, 4, 8), np.float32)
    with pytest.raises(CembedError, match="document_lengths"):
        maxsim(array, array, document_lengths=lengths)
    with pytest.raises(CembedError, match="query_lengths"):
        maxsim(list(array), array, query_lengths=[1, 1, 1])


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_library
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_native_program(tmp_path: Path) -> None:
    """From C++, over the C interface."""
    (library,) = (Path(kernels.__file__).parent / f"libmaxsim{compiled.EXTENSION_SUFFIXES[0]}",)
    program = tmp_path / "program"
    run("g++", "-std=c++17", "-O1", NATIVE, library, f"-Wl,-rpath,{library.parent}", "-o", program)
    assert run(program).split() == [*kernel_sets(), "right"]


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no g++-aarch64-linux-gnu")
@pytest.mark.skipif(QEMU is None, reason="no qemu-user")
def test_arm(tmp_path: Path) -> None:
    sources = sorted((NATIVE.parents[2] / "runtime" / "native").glob("*.cpp"))
    program = tmp_path / "program"
    run("aarch64-linux-gnu-g++", "-std=c++17", "-static", "-pthread", *sources, NATIVE, "-o", program)
    assert run(QEMU, program, "quick").split() == ["neon", "scalar", "right"]

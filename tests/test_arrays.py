"""Arrays are scored where they lie, of any type and strides, and what is not finite is found and named."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cembed.runtime import CembedError, maxsim
from cembed.runtime.scoring import arrays, kernels
from cembed.runtime.scoring.arrays import MOST_ROWS
from cembed.runtime.scoring.kernels import Pages, kernel_sets, use_kernels

Floats = NDArray[Any]
needs_library = pytest.mark.skipif(kernels.load() is None, reason="the library was not built")
FLOATS = (np.float16, np.float32, np.float64)


@pytest.fixture(params=["library", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library, and as where it was not built."""
    if request.param == "numpy":
        monkeypatch.setattr(arrays, "load", lambda: None)


@pytest.fixture(params=kernel_sets() or ["numpy"])
def kernel_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every set that this machine runs."""
    if kernel_sets():
        use_kernels(request.param)
    yield request.param
    if kernel_sets():
        use_kernels(kernel_sets()[0])


def draw(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(pages: list[NDArray[np.float32]]) -> Pages:
    rows = np.array([len(page) for page in pages], np.int32)
    starts = (np.cumsum(rows, dtype=np.int64) - rows) * pages[0].shape[1] * 4
    data = np.concatenate(pages).reshape(-1).view(np.uint8)
    return Pages("f32", pages[0].shape[1], data, starts, rows, np.ones(len(pages), np.float32))


# Types and strides ----------------------------------------------------------------------------------------------------


def unaligned(page: Floats) -> Floats:
    room = np.empty(page.nbytes + 1, np.uint8)
    moved = room[1:].view(page.dtype).reshape(page.shape)
    moved[:] = page
    return moved


WAYS_TO_LIE: dict[str, Callable[[Floats], Floats]] = {
    "packed": lambda page: page,
    "Fortran": np.asfortranarray,
    "rows backwards": lambda page: page[::-1].copy()[::-1],
    "components backwards": lambda page: page[:, ::-1].copy()[:, ::-1],
    "part of wider rows": lambda page: np.concatenate([page, page], axis=1)[:, : page.shape[1]],
    "every second row": lambda page: np.repeat(page, 2, axis=0)[::2],
    "every third component": lambda page: np.repeat(page, 3, axis=1)[:, ::3],
    "unaligned": unaligned,
    "read only": lambda page: np.frombuffer(page.tobytes(), page.dtype).reshape(page.shape),
    "another byte order": lambda page: page.astype(page.dtype.newbyteorder()),
}


@pytest.mark.parametrize("dim", [1, 3, 16, 65, 512, 520])
@pytest.mark.parametrize("kind", FLOATS)
def test_every_type_and_every_way_to_lie(kind: type, dim: int, kernel_set: str) -> None:
    """Bit for bit what stored pages of the same numbers in float32 score."""
    query, pages = draw(0, 5, dim), [draw(i, 1 + i * 6, dim).astype(kind) for i in range(4)]
    wanted = maxsim([query], stored([page.astype(np.float32) for page in pages]))
    for name, lie in WAYS_TO_LIE.items():
        lying = [lie(page) for page in pages]
        assert all(np.array_equal(a, b) for a, b in zip(lying, pages, strict=True))
        assert np.array_equal(maxsim([query], lying), wanted), name


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("lie", WAYS_TO_LIE)
def test_queries_lie_anywhere_too(lie: str, kind: type, way: None) -> None:
    queries, page = [draw(i, 2 + i, 24).astype(kind) for i in range(3)], draw(9, 7, 24)
    wanted = maxsim([query.astype(np.float32) for query in queries], [page])
    assert np.array_equal(maxsim([WAYS_TO_LIE[lie](query) for query in queries], [page]), wanted)


@pytest.mark.parametrize("kind", [*FLOATS, ml_dtypes.bfloat16, np.dtype(np.float32).newbyteorder(), np.int8])
def test_one_array_is_a_list_of_its_pages(kind: type, way: None) -> None:
    """Whatever part of a larger one it is, with padding and without."""
    whole, query = (8 * draw(0, 6, 20, 20)).astype(kind), [draw(1, 4, 10)]
    turned = whole.transpose(0, 2, 1)
    for stack in (whole[:, :, :10], whole[::-1, ::-1, ::-2], turned[:, :, :10], turned[:, 1:, 5:15], whole[:1, :, 10:]):
        lengths = np.array([1, 12, 3, 7, 2, 5])[: len(stack)]
        for counts in (lengths, None):
            kept = [20] * 6 if counts is None else counts
            pages = [page[:n].astype(np.float32) for page, n in zip(stack, kept, strict=False)]
            assert np.array_equal(maxsim(query, stack, document_lengths=counts), maxsim(query, pages))


def test_types_may_be_mixed(way: None) -> None:
    """Other numbers than floats of the machine are converted, each array by itself."""
    kinds = [np.float16, np.float64, ml_dtypes.bfloat16, np.int32, np.float32, np.longdouble, np.bool_, np.uint8, ">f8"]
    pages = [(3 * draw(i, 1 + i, 9)).astype(np.int8).astype(kind) for i, kind in enumerate(kinds)]
    query = [draw(50, 3, 9)]
    assert np.array_equal(maxsim(query, pages), maxsim(query, [page.astype(np.float32) for page in pages]))


class Tensor:
    """Something else that numpy makes an array of."""

    def __init__(self, content: Floats) -> None:
        self.content = content

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Floats:
        return self.content


def test_what_numpy_makes_an_array_of(way: None) -> None:
    page = draw(0, 3, 5)
    kinds = (page, page.tolist(), Tensor(page), memoryview(page), Tensor(page.astype(">f8")), Tensor(page.T.copy().T))
    assert len(np.unique(maxsim([draw(1, 4, 5)], kinds))) == 1
    assert maxsim([[[1, 2]]], [[[1, 1], [0, 3]]]).tolist() == [[6.0]]


@pytest.mark.parametrize("place", ["query", "document"])
def test_what_numpy_makes_no_array_of(place: str, way: None) -> None:
    sides: dict[str, list[Any]] = {"query": [draw(0, 2, 3)], "document": [draw(1, 2, 3)]}
    sides[place].append([[1.0, 2.0, 3.0], [1.0]])
    with pytest.raises(CembedError, match=f"{place} 1 cannot be made an array: .*inhomogeneous"):
        maxsim(sides["query"], sides["document"])


@pytest.mark.parametrize("bad", [np.ones((2, 3), complex), np.full((2, 3), "x"), np.full((2, 3), None)])
@pytest.mark.parametrize("place", ["query", "document"])
def test_what_is_no_number(bad: Floats, place: str, way: None) -> None:
    sides = {"query": [draw(0, 2, 3)], "document": [draw(1, 2, 3)]}
    sides[place].append(bad)
    with pytest.raises(CembedError, match=f"{place} 1 is of type {bad.dtype}: floats are needed"):
        maxsim(sides["query"], sides["document"])


def test_more_vectors_than_are_possible(way: None) -> None:
    endless = np.broadcast_to(np.float32(1), (MOST_ROWS + 1, 1))
    with pytest.raises(CembedError, match=f"document 1 has {MOST_ROWS + 1} vectors"):
        maxsim([np.ones((1, 1))], [np.ones((1, 1)), endless])
    with pytest.raises(CembedError, match="document 0 has"):
        maxsim([np.ones((1, 1))], endless[None])


@needs_library
@pytest.mark.parametrize("kind", FLOATS)
def test_nothing_is_copied(kind: type) -> None:
    """numpy tells tracemalloc of all that it allocates."""
    stack, query = np.ones((8, 512, 256), kind), [np.ones((2, 256), np.float32)]
    maxsim(query, stack)
    for documents in (stack, list(stack), list(stack[:, :, ::2]), [Tensor(page) for page in stack]):
        tracemalloc.start()
        maxsim([query[0][:, : np.shape(documents[0])[1]]], documents)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < stack[0].nbytes / 4


# Independence ---------------------------------------------------------------------------------------------------------


def test_neither_threads_nor_company_change_a_score(kernel_set: str) -> None:
    """Bit for bit; the work is enough for several threads, and for several blocks of documents."""
    queries = [draw(i, 1 + 7 * i % 40, 512) for i in range(9)]
    pages = [draw(100 + i, 1 + i * 7 % 60, 512).astype(FLOATS[i % 3]) for i in range(80)]
    together = maxsim(queries, pages, threads=1)
    assert np.array_equal(maxsim(queries, pages, threads=4), together)
    assert np.array_equal(maxsim(queries, pages), together)
    some = np.random.default_rng(0).permutation(80)[:13]
    assert np.array_equal(maxsim(queries[4:6], [pages[i] for i in some], threads=3), together[4:6, some])
    assert all(maxsim([queries[3]], [pages[i]])[0, 0] == together[3, i] for i in some)


@needs_library
def test_no_threads() -> None:
    with pytest.raises(CembedError, match="0 threads"):
        maxsim([draw(0, 1, 4)], [draw(1, 1, 4)], threads=0)


# NaN and infinity -----------------------------------------------------------------------------------------------------

NAMES = {
    np.nan: "NaN",
    np.inf: "infinity",
    -np.inf: "-infinity",
    1e300: r"1e\+300 \(infinity: float32 cannot hold it\)",
}


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from(FLOATS), rows=st.integers(1, 40), num=st.integers(1, 40))
def test_whatever_is_not_finite_is_found(data: st.DataObject, kind: type, rows: int, num: int) -> None:
    """Wherever it is, whatever the query has there: with zeros, too, and where the maximum is another row's."""
    dim = data.draw(st.one_of(st.integers(1, 70), st.sampled_from([128, 511, 512, 513, 2048])))
    value = data.draw(st.sampled_from([*NAMES][: 4 if kind is np.float64 else 3]))
    vector, component = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, dim - 1))
    query, page = draw(rows, num, dim), (100 * draw(num, rows, dim)).astype(kind)
    query[:, component] = data.draw(st.sampled_from([0.0, 1.0, -1.0, 1e-45]))
    page[vector, component] = value
    fine, words = page.copy(), f"document 1 contains {NAMES[value]}.* in component {component} of vector {vector}"
    fine[vector, component] = 0
    try:
        for name in kernel_sets():
            use_kernels(name)
            assert np.isfinite(maxsim([query], [fine, fine])).all()
            for lying in (page, page[:, ::-1].copy()[:, ::-1]):
                with pytest.raises(CembedError, match=words):
                    maxsim([query], [fine, lying, fine])
            with pytest.raises(CembedError, match=words):
                maxsim([query], np.stack([fine, page, page]))
    finally:
        if kernel_sets():
            use_kernels(kernel_sets()[0])


@pytest.mark.parametrize("value", NAMES)
def test_their_names(value: float, way: None) -> None:
    page = np.ones((3, 4))
    page[2, 1] = value
    with pytest.raises(CembedError, match=f"document 1 contains {NAMES[value]}.* in component 1 of vector 2$"):
        maxsim([np.ones((1, 4))], [np.ones((1, 4)), page])
    with pytest.raises(CembedError, match=f"query 1 contains {NAMES[value]}.* in component 1 of vector 2$"):
        maxsim([np.ones((1, 4)), page], [np.ones((1, 4))])
    with pytest.raises(CembedError, match=f"document 0 contains {NAMES[value]}"):
        maxsim([], [page])


@needs_library
@pytest.mark.parametrize("threads", [1, 4])
def test_the_first_of_several_is_named(threads: int) -> None:
    """Of all, not of those that a thread happens to meet; the padding takes no part."""
    queries, stack = [draw(0, 32, 512), draw(1, 3, 512)], draw(2, 200, 16, 512)
    lengths = np.full(200, 15)
    stack[:, 15] = np.nan
    assert np.isfinite(maxsim(queries, stack, document_lengths=lengths, threads=threads)).all()
    for index in (199, 120, 64, 3):
        stack[index, 14, 511] = -np.inf
        with pytest.raises(CembedError, match=f"document {index} contains -infinity"):
            maxsim(queries, stack, document_lengths=lengths, threads=threads)
    with pytest.raises(CembedError, match="query 1 contains NaN, in component 0 of vector 0"):
        maxsim([queries[0], np.full((1, 512), np.nan)], stack, document_lengths=lengths, threads=threads)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
def test_products_that_overflow_are_no_error(kernel_set: str) -> None:
    """Components are finite; scores are those of stored pages."""
    query, pages = 3e30 * draw(0, 3, 32), [1e30 * draw(i, 5, 32) for i in range(1, 5)]
    found = maxsim([query], pages)
    assert not np.isfinite(found).all()
    np.testing.assert_array_equal(found, maxsim([query], stored(pages)))


def test_float64_is_rounded_as_numpy_rounds(kernel_set: str) -> None:
    """Also the largest that is still a float32, and what becomes a subnormal or zero."""
    edge = float(np.finfo(np.float32).max) * (1 + 2.0**-26)
    page = np.array([[1 + 2.0**-24, 1e-40, 1e-50, edge]])
    with np.errstate(over="ignore"):
        wanted = maxsim([np.eye(4)], [page.astype(np.float32)])
    assert np.array_equal(maxsim([np.eye(4)], [page]), wanted)

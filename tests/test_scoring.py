"""MaxSim equals its definition, whatever the shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cembed.runtime import CembedError, maxsim

Floats = NDArray[np.floating[Any]]


def naive(queries: Sequence[Floats], documents: Sequence[Floats]) -> NDArray[np.float64]:
    """The definition, in float64, one pair of vectors at a time."""
    scores = np.zeros((len(queries), len(documents)))
    for i, query in enumerate(queries):
        for j, document in enumerate(documents):
            for q in query:
                scores[i, j] += max(sum(float(a) * float(b) for a, b in zip(q, d, strict=True)) for d in document)
    return scores


def ragged(seed: int, lengths: Sequence[int], dim: int) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((length, dim)).astype(np.float32) for length in lengths]


LENGTHS = st.lists(st.integers(1, 7), max_size=6)


@settings(max_examples=60, deadline=None)
@given(queries=LENGTHS, documents=LENGTHS, dim=st.integers(1, 5), seed=st.integers(0, 99))
def test_equals_the_definition(queries: list[int], documents: list[int], dim: int, seed: int) -> None:
    q, d = ragged(seed, queries, dim), ragged(seed + 1, documents, dim)
    scores = maxsim(q, d)
    assert scores.dtype == np.float32
    assert scores.shape == (len(q), len(d))
    np.testing.assert_allclose(scores, naive(q, d), rtol=0, atol=1e-4)


def test_long_and_short_documents() -> None:
    queries = ragged(0, [3, 5], 2)
    documents = ragged(1, [8193, 1, 8192, 2, 16387, 8191, 1, 4], 2)
    expected = np.array([[(q.astype(np.float64) @ d.T).max(axis=1).sum() for d in documents] for q in queries])
    np.testing.assert_allclose(maxsim(queries, documents), expected, rtol=0, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_permutations_follow(data: st.DataObject, lengths: list[int]) -> None:
    """Of documents and queries: the scores move along. Of vectors within one: nothing changes."""
    queries, documents = ragged(0, [2, 4, 1], 4), ragged(1, lengths, 4)
    scores = maxsim(queries, documents)
    order = data.draw(st.permutations(range(len(documents))))
    np.testing.assert_allclose(maxsim(queries, [documents[i] for i in order]), scores[:, order], atol=1e-6)
    np.testing.assert_allclose(maxsim(queries[::-1], documents), scores[::-1], atol=1e-6)
    np.testing.assert_allclose(maxsim([q[::-1] for q in queries], [d[::-1] for d in documents]), scores, atol=1e-5)


def test_a_neighbour_does_not_change_a_score() -> None:
    query, page = ragged(0, [4], 8), ragged(1, [9], 8)
    neighbours = ragged(2, [1, 30, 2], 8)
    alone = maxsim(query, page)
    np.testing.assert_allclose(maxsim(query, [neighbours[0], *page, *neighbours[1:]])[:, 1:2], alone, atol=1e-6)


def test_nothing_is_padded_with_zeros() -> None:
    query = [np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)]
    documents = [np.array([[-1.0, -1.0]], np.float32), np.array([[-0.5, -0.25], [-1, -1], [-2, -2]], np.float32)]
    np.testing.assert_array_equal(maxsim(query, documents), [[-2.0, -0.75]])


def test_repeating_a_document_vector_changes_nothing_and_repeating_a_query_vector_counts_twice() -> None:
    (query,), (page,) = ragged(0, [3], 4), ragged(1, [5], 4)
    once = maxsim([query], [page])
    np.testing.assert_allclose(maxsim([query], [np.concatenate([page, page])]), once, atol=1e-6)
    np.testing.assert_allclose(maxsim([np.concatenate([query, query])], [page]), 2 * once, atol=1e-5)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_float_types(kind: type[np.floating[Any]]) -> None:
    query, page = [np.array([[0.5, 0.25]], kind)], [np.array([[1, 2], [2, 1]], kind)]
    scores = maxsim(query, page)
    assert scores.dtype == np.float32
    assert scores.tolist() == [[1.25]]


def test_views_that_are_not_contiguous() -> None:
    (query,), (page,) = ragged(0, [6], 4), ragged(1, [8], 4)
    expected = maxsim([query[::2].copy()], [page[:, ::-1].copy()])
    assert np.array_equal(maxsim([query[::2]], [page[:, ::-1]]), expected)


@pytest.mark.parametrize(("queries", "documents"), [(0, 0), (0, 3), (3, 0)])
def test_empty_lists(queries: int, documents: int) -> None:
    scores = maxsim(ragged(0, [2] * queries, 4), ragged(1, [2] * documents, 4))
    assert scores.shape == (queries, documents)
    assert scores.dtype == np.float32


GOOD = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.ones((0, 3), np.float32), "(0, 3)"),
        (np.ones((2, 0), np.float32), "(2, 0)"),
        (np.ones(3, np.float32), "(3,)"),
        (np.float32(1), "()"),
        (np.ones((1, 2, 3), np.float32), "(1, 2, 3)"),
        (np.ones((2, 4), np.float32), "dim 4"),
        (np.full((2, 3), np.nan, np.float32), "NaN"),
        (np.array([[1, 2, np.inf]], np.float32), "infinity"),
        (np.array([[1, 2, -np.inf]]), "infinity"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("place", ["query", "document"])
def test_what_cannot_be_scored(bad: Floats, words: str, place: str) -> None:
    """The message says which item it is; an item may be wrong on its own or beside the others."""
    queries, documents = [GOOD], [GOOD]
    (queries if place == "query" else documents).append(bad)
    with pytest.raises(CembedError) as raised:
        maxsim(queries, documents)
    assert f"{place} 1" in str(raised.value)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_dim_that_differs_between_the_sides() -> None:
    with pytest.raises(CembedError, match="document 0 has dim 4, the others have 3"):
        maxsim([GOOD], [np.ones((1, 4), np.float32)])


def test_values_that_only_float64_can_hold() -> None:
    with pytest.raises(CembedError, match="infinity"):
        maxsim([np.array([[1e300, 1.0]])], [np.array([[1.0, 1.0]])])

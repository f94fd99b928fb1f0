"""The C library against the Python runtime: the same vectors, states and scores. Skipped where it cannot be built."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import libcembed
import numpy as np
import pytest
from conftest import BACKBONE_OF, CAUSAL, GOLDEN, BundleMaker
from libcembed import Bundle, CallError, Library
from PIL import Image
from reference import Zoo

from cembed.export.plan import ExportOptions
from cembed.quantize.plan import QuantiseOptions
from cembed.quantize.quantizer import quantise
from cembed.runtime import CembedError, Embedder, maxsim
from cembed.runtime.embed.embedder import Budget
from cembed.runtime.evaluate import Dataset

SAMPLES = libcembed.ROOT / "samples"
IMAGES = ("page", "wide", "small")
TEXT = "warranty period"


def page() -> Image.Image:
    return Image.open(GOLDEN / "causalqwen2_5" / "page.png")


def close(actual: Any, expected: Any) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


# Vectors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONE_OF)
def test_vectors_are_those_of_python(library: Library, name: str, bundle_of: BundleMaker) -> None:
    embedder, bundle = Embedder.load(bundle_of(name)), library.open(bundle_of(name))
    for image in IMAGES:
        picture = Image.open(GOLDEN / name / f"{image}.png").convert("RGB")
        close(bundle.embed_image(picture), embedder.embed_image(picture))
    for text in json.loads((GOLDEN / name / "queries.json").read_text()):
        close(bundle.embed_query(text), embedder.embed_query(text))
    if name in CAUSAL:
        close(bundle.embed_image(picture, loop=1), embedder.embed_image(picture, Budget(decode="loop")))
        close(bundle.embed_image(picture, num_vectors=3, dim=16), embedder.embed_image(picture, Budget(3, 16)))
        close(bundle.embed_query(TEXT, num_vectors=9), embedder.embed_query(TEXT, Budget(9)))
    bundle.close()


@pytest.mark.parametrize("head", ["causal", "feedback"])
def test_slots_behind_features_for_several_layers(
    library: Library, exported: Callable[[ExportOptions], Path], head: str
) -> None:
    """Qwen3-VL: only visual tokens have them, whichever way slots run."""
    checkpoint = str(GOLDEN / "colqwen3")
    path = exported(ExportOptions("qwen3-vl", checkpoint, head=head, latent_token="<|video_pad|>"))
    embedder, bundle = Embedder.load(path), library.open(path)
    picture = page().resize((90, 60))
    if head == "causal":
        close(bundle.embed_image(picture, num_vectors=9), embedder.embed_image(picture, Budget(9)))
        close(bundle.embed_query(TEXT, num_vectors=9), embedder.embed_query(TEXT, Budget(9)))
    close(bundle.embed_image(picture, num_vectors=9, loop=1), embedder.embed_image(picture, Budget(9, decode="loop")))
    state = bundle.start(TEXT)
    for budget in (1, 2, 5):
        close(state.extend(budget), embedder.embed_query(TEXT, Budget(budget, decode="loop")))
    state.close()
    bundle.close()


@pytest.mark.parametrize("name", ["projected", "shallow", "qwen2-vl"])
def test_heads_are_those_of_python(library: Library, name: str, zoo: Zoo) -> None:
    """Fed-back slots behind a projection and without one, learned slots, pooled ones."""
    embedder = zoo.model(name).embedder
    bundle = library.open(embedder.bundle.root)
    picture = page().resize((90, 60))
    close(bundle.embed_image(picture), embedder.embed_image(picture))
    close(bundle.embed_query(TEXT), embedder.embed_query(TEXT))
    close(bundle.embed_query(TEXT, num_vectors=2, dim=8), embedder.embed_query(TEXT, Budget(2, 8)))
    state = bundle.start(TEXT)
    close(state.extend(3), embedder.embed_query(TEXT, Budget(3)))
    state.close()
    bundle.close()


def test_states_of_fixed_size_are_those_of_python(library: Library, exported: Callable[[ExportOptions], Path]) -> None:
    """Qwen3.5 in the loop: after odd and even numbers of steps, and in several states beside each other."""
    options = ExportOptions("qwen3.5", str(GOLDEN / "colqwen3_5"), head="causal", latent_token="<|video_pad|>")
    embedder, bundle = Embedder.load(exported(options)), library.open(exported(options))
    pictures = [page().resize(size) for size in ((90, 60), (64, 200))]
    for picture in pictures:
        close(bundle.embed_image(picture, num_vectors=9), embedder.embed_image(picture, Budget(9)))
        close(
            bundle.embed_image(picture, num_vectors=9, loop=1), embedder.embed_image(picture, Budget(9, decode="loop"))
        )
    texts = [TEXT, "a longer question about something else, with more words"]
    states = [bundle.start(text) for text in texts]
    for budget in (1, 2, 3, 6, 16):
        for state, text in zip(states, texts, strict=True):
            close(state.extend(budget), embedder.embed_query(text, Budget(budget, decode="loop")))
    for state in states:
        state.close()
    bundle.close()


@pytest.mark.parametrize("embeddings", ["fp16", "int8"])
def test_stored_rows_are_those_of_python(
    library: Library, causal_bundle: Path, embeddings: str, tmp_path: Path
) -> None:
    options = QuantiseOptions("int8", embeddings=embeddings, accept_loss=True)
    quantise(causal_bundle, options, tmp_path / "q")
    bundle = library.open(tmp_path / "q")
    close(bundle.embed_query(TEXT), Embedder.load(tmp_path / "q").embed_query(TEXT))
    bundle.close()


def test_the_sample_model_finds_the_same_pages(library: Library, sample_bundle: Path) -> None:
    data = Dataset.read(SAMPLES / "pages" / "sample")
    files = sorted((SAMPLES / "pages" / "sample" / "pages").iterdir())
    assert len(files) >= 60
    images = [Image.open(file).convert("RGB") for file in files]
    texts = list(data.queries.values())
    embedder, bundle = Embedder.load(sample_bundle), library.open(sample_bundle)
    theirs, ours = embedder.embed_images(images), [bundle.embed_image(image) for image in images]
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    for text in texts:
        query = bundle.embed_query(text)
        close(query, embedder.embed_query(text))
        scores = library.maxsim(query, ours)
        expected = maxsim([embedder.embed_query(text)], theirs)[0]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
        assert np.argsort(-scores)[:5].tolist() == np.argsort(-expected)[:5].tolist()
    bundle.close()


def test_rows_of_an_image_may_lie_apart(causal: Bundle) -> None:
    whole = np.asarray(page().convert("RGB"))
    part = whole[3:60, 5:70]
    assert not part.flags.c_contiguous
    close(causal.embed_image(part), causal.embed_image(np.ascontiguousarray(part)))


def test_fewer_visual_tokens(library: Library, causal_bundle: Path) -> None:
    bundle = library.open(causal_bundle, max_visual_tokens=20, threads=1, mapped_weights=1)
    assert bundle.info.max_visual_tokens == 20
    close(bundle.embed_image(page()), Embedder.load(causal_bundle, max_visual_tokens=20).embed_image(page()))
    bundle.close()


def test_sixteen_callers_get_what_one_gets(library: Library, causal_bundle: Path) -> None:
    bundle = library.open(causal_bundle)
    jobs: list[Any] = [f"question {i}" for i in range(60)] + [page().resize((60 + i, 50)) for i in range(20)]

    def embed(job: Any) -> Any:
        return bundle.embed_query(job) if isinstance(job, str) else bundle.embed_image(job)

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(embed, jobs))
    for job, vectors in zip(jobs, together, strict=True):
        np.testing.assert_array_equal(vectors, embed(job))
    bundle.close()


# Buffers, states, scores ----------------------------------------------------------------------------------------------


def test_a_callers_buffer(library: Library, causal: Bundle) -> None:
    expected, raw = causal.embed_query(TEXT), TEXT.encode()
    memory = np.full(expected.size + 1, 7, np.float32)
    place = memory.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    arguments = causal.handle, raw, ctypes.c_size_t(len(raw)), None
    small = libcembed.VectorBuffer(place, expected.size - 1)
    with pytest.raises(CallError) as error:
        library.call("cembed_embed_query", *arguments, ctypes.byref(small))
    assert error.value.status == libcembed.CAPACITY
    assert (small.rows, small.dim) == expected.shape
    assert (memory == 7).all()
    enough = libcembed.VectorBuffer(place, expected.size)
    library.call("cembed_embed_query", *arguments, ctypes.byref(enough))
    np.testing.assert_array_equal(memory[:-1].reshape(expected.shape), expected)
    assert memory[-1] == 7
    assert not enough.owned


def test_states_grow(causal: Bundle, causal_bundle: Path) -> None:
    embedder = Embedder.load(causal_bundle)
    state, theirs = causal.start(page(), 12), embedder.start(page(), 12)
    for budget in (3, 12, 5):
        close(state.extend(budget), theirs.extend(budget))
    with pytest.raises(CallError, match="room for 12"):
        state.extend(13)
    causal.close()  # a state may outlive the handle of its bundle
    close(state.extend(4), theirs.extend(4))
    state.close()


def test_states_are_bounded(library: Library, causal_bundle: Path) -> None:
    bundle = library.open(causal_bundle, state_memory=Embedder.load(causal_bundle).start(TEXT_PAGE).nbytes)
    first = bundle.start(TEXT_PAGE)
    with pytest.raises(CallError, match="state_memory") as error:
        bundle.start(TEXT_PAGE)
    assert error.value.status == libcembed.MEMORY
    first.close()
    bundle.start(TEXT_PAGE).close()
    bundle.close()


TEXT_PAGE = Image.new("RGB", (80, 60), "white")


def test_maxsim_is_that_of_python(library: Library) -> None:
    random = np.random.default_rng(0)
    pages = [random.standard_normal((rows, 24)).astype(np.float32) for rows in (1, 40, 3)]
    query = random.standard_normal((5, 24)).astype(np.float32)
    np.testing.assert_array_equal(library.maxsim(query, pages), maxsim([query], pages)[0])
    assert library.maxsim(query, []).shape == (0,)
    with pytest.raises(CallError, match="the query contains NaN, in component 0 of vector 0"):
        library.maxsim(query * np.nan, pages)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 39, 23), (2, 1, 7)])
@pytest.mark.parametrize("many", [1, 400])
def test_maxsim_names_what_is_not_finite(library: Library, bad: float, place: tuple[int, int, int], many: int) -> None:
    """As Python does, and the first of several pages; with many pages several threads look at them."""
    random = np.random.default_rng(0)
    pages = [random.standard_normal((rows, 24)).astype(np.float32) for rows in (1, 40, 3)] * many
    query = random.standard_normal((5, 24)).astype(np.float32)
    pages = [page.copy() for page in pages]
    pages[place[0]][place[1:]] = bad
    pages[-1][-1, -1] = np.nan
    with pytest.raises(CembedError) as theirs:
        maxsim([query], pages)
    with pytest.raises(CallError) as ours:
        library.maxsim(query, pages)
    assert ours.value.status == libcembed.ARGUMENT
    assert ours.value.message == str(theirs.value).replace("document", "page")
    assert f"page {place[0]} contains " in ours.value.message


def test_maxsim_of_products_that_are_too_large(library: Library) -> None:
    """Infinite products of finite components are no mistake of the caller."""
    query, pages = np.full((1, 4), 1e30, np.float32), [np.full((2, 4), 1e30, np.float32)]
    assert library.maxsim(query, pages)[0] == maxsim([query], pages)[0, 0] == np.inf

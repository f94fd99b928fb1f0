"""What must hold for any page, query, budget and batch."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKBONE_OF, BundleMaker
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cembed.runtime import Bundle, CembedError, Embedder, Index, NewPage
from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.manifest import MANIFEST, Quantisation
from cembed.runtime.bundle.manifest_file import write_manifest
from cembed.runtime.embed.embedder import CPU, Budget
from cembed.runtime.embed.pooling import normalise
from cembed.runtime.embed.positions import patch_positions, window_index, window_restore
from cembed.runtime.embed.preprocess import smart_resize
from cembed.runtime.engines.quiet import ort
from cembed.runtime.engines.session import EngineSettings

SPEC = ImageProcessing("smart", 14, 2, 3136, 75264, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), window_size=112)


def page(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


MATES = [page(420, 560, 1), page(9, 7, 2), Image.new("RGB", (300, 300), "white"), page(900, 60, 3), page(640, 640, 4)]


@pytest.mark.parametrize("name", BACKBONE_OF)
def test_batch_mates_do_not_change_a_page(name: str, bundle_of: BundleMaker) -> None:
    embedder = Embedder.load(bundle_of(name))
    subject = page(333, 222, 0)
    alone = embedder.embed_image(subject)
    rng = np.random.default_rng(0)
    for size in (2, 4, 8):
        place = int(rng.integers(size))
        batch = [MATES[int(i)] for i in rng.integers(len(MATES), size=size)]
        batch[place] = subject
        assert np.array_equal(embedder.embed_images(batch)[place], alone)


def test_several_threads_share_an_embedder(causal_bundle: Path) -> None:
    embedder = Embedder.load(causal_bundle)
    texts = [f"query number {i}" for i in range(12)]
    expected = [*embedder.embed_queries(texts), *embedder.embed_images(MATES)]
    shared = Embedder.load(causal_bundle)
    with ThreadPoolExecutor(4) as pool:
        actual = [*pool.map(shared.embed_query, texts), *pool.map(shared.embed_image, MATES)]
    for a, b in zip(expected, actual, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("name", ["causalqwen2_5", "causalpali"])
def test_a_budget_is_the_start_of_a_larger_one(name: str, bundle_of: BundleMaker) -> None:
    embedder = Embedder.load(bundle_of(name))
    full, query = embedder.embed_image(MATES[0]), embedder.embed_query("total of the invoice")
    assert full.shape == (8, embedder.dim)
    assert query.shape == (4, embedder.dim)
    for n in (1, 2, 7, 8):
        vectors = embedder.embed_image(MATES[0], Budget(n))
        assert len(vectors) == n
        np.testing.assert_allclose(vectors, full[:n], rtol=0, atol=1e-6)
    np.testing.assert_allclose(embedder.embed_query("total of the invoice", Budget(2)), query[:2], rtol=0, atol=1e-6)


def test_a_smaller_budget_runs_fewer_positions(causal_bundle: Path) -> None:
    embedder = Embedder.load(causal_bundle)
    lengths = []
    run = embedder.session("text").run
    embedder.session("text").run = lambda feeds: lengths.append(feeds["inputs_embeds"].shape[1]) or run(feeds)  # type: ignore[method-assign]
    embedder.embed_image(MATES[0], Budget(1))
    embedder.embed_image(MATES[0], Budget(8))
    assert lengths[1] - lengths[0] == 7


def test_vectors_have_length_one(causal_bundle: Path) -> None:
    vectors = Embedder.load(causal_bundle).embed_images(MATES)
    assert all(v.dtype == np.float32 for v in vectors)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate(vectors), axis=-1), 1, atol=1e-6)


def test_lists_generators_and_arrays(causal_bundle: Path) -> None:
    embedder = Embedder.load(causal_bundle)
    expected = embedder.embed_images(MATES[:2])
    for same in ((image for image in MATES[:2]), tuple(MATES[:2]), [np.asarray(image) for image in MATES[:2]]):
        for a, b in zip(expected, embedder.embed_images(same), strict=True):
            assert np.array_equal(a, b)
    assert embedder.embed_images([]) == []


def test_a_generator_is_consumed_one_page_at_a_time(causal_bundle: Path) -> None:
    embedder, alive = Embedder.load(causal_bundle), []
    embed_image = embedder.embed_image
    embedder.embed_image = lambda *args: alive.append(len(handed)) or embed_image(*args)  # type: ignore[method-assign]
    handed: list[int] = []
    embedder.embed_images(handed.append(i) or MATES[i] for i in range(3))  # type: ignore[func-returns-value]
    assert alive == [1, 2, 3]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: e.embed_queries("one"), "brackets"),
        (lambda e: e.embed_images(MATES[0]), "brackets"),
        (lambda e: e.embed_queries([7]), "int"),
        (lambda e: e.embed_query("  "), "empty"),
        (lambda e: e.embed_query("look <|image_pad|> here"), "<|image_pad|>"),
        (lambda e: e.embed_query("long " * 5000), "positions"),
        (lambda e: e.embed_image(np.zeros((4, 4), np.uint8)), "[4, 4]"),
        (lambda e: e.embed_image(Image.new("RGB", (3000, 10))), "3000 x 10"),
        (lambda e: e.embed_images(MATES[:1], 0), "at least 1"),
        (lambda e: e.embed_queries(["x"], 9000), "positions"),
        (lambda e: e.embed_queries(["x"], dim=97), "have 96"),
        (lambda e: e.embed_queries(["x"], dim=0), "have 96"),
        (lambda e: e.embed_queries(["x"], decode="twice"), "single-pass, loop"),
        (lambda e: e.embed_images(MATES[:1], pool_factor=2), "pool_factor"),
    ],
)
def test_mistakes_are_named(causal_bundle: Path, call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(CembedError, match=words.replace("[", r"\[").replace("|", r"\|")) as raised:
        call(Embedder.load(causal_bundle))
    assert "\n" not in str(raised.value)


def test_a_head_of_all_tokens_has_no_budget(bundle_of: BundleMaker) -> None:
    with pytest.raises(CembedError, match="every token"):
        Embedder.load(bundle_of("colqwen2")).embed_query("x", Budget(2))


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        (np.nan, "NaN"),
        (np.inf, "infinity"),
        (-np.inf, "infinity"),
        (3e38, "infinity"),
        ([np.nan, np.inf, 0, 0], "NaN"),
        (0.0, "zeros"),
    ],
)
def test_nan_infinity_and_zeros_never_become_vectors(bad: Any, name: str) -> None:
    states = np.ones((3, 4), np.float32)
    states[1] = bad
    with pytest.raises(CembedError, match=f"^graph text, of this query, gave {name}: "):
        normalise(states, "graph text, of this query,")


class Spoiler:
    """A session that gives one bad value."""

    def __init__(self, session: Any, bad: float) -> None:
        self.session, self.bad = session, bad

    def run(self, feeds: Any) -> Any:
        output = self.session.run(feeds)
        if isinstance(output, dict):
            return {name: self.spoilt(value) for name, value in output.items()}
        return self.spoilt(output)

    def spoilt(self, value: Any) -> Any:
        value = value.copy()
        value[..., -1, 0] = self.bad
        return value

    def bind(self, cache: Any) -> Any:
        return Spoiler(self.session.bind(cache), self.bad)


@pytest.mark.parametrize(("bad", "name"), [(np.nan, "NaN"), (np.inf, "infinity")])
@pytest.mark.parametrize(
    ("graph", "what", "decode"),
    [
        ("vision", "image", None),
        ("vision", "image", "loop"),
        ("text", "image", None),
        ("text", "query", None),
        ("text_step", "image", "loop"),
        ("text_step", "query", "loop"),
    ],
)
def test_what_gave_nan_is_named(causal_bundle: Path, bad: float, name: str, graph: str, what: str, decode: Any) -> None:
    embedder = Embedder.load(causal_bundle)
    embedder.replace_sessions({graph: Spoiler(embedder.session(graph), bad)})
    given: Any = MATES[1] if what == "image" else "x"
    embed: Any = embedder.embed_image if what == "image" else embedder.embed_query
    with pytest.raises(CembedError, match=f"^graph {graph}, of this {what}, gave {name}: "):
        embed(given, Budget(decode=decode))


# Pickled: as its path and options.


def same_vectors(a: Embedder, b: Embedder) -> bool:
    return bool(np.array_equal(a.embed_query("total"), b.embed_query("total")))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_embedder_is_pickled(
    causal_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.chdir(causal_bundle.parent)
    embedder = Embedder.load(causal_bundle.name, threads=1, max_visual_tokens=24, state_memory=1234, verify=False)
    expected = embedder.embed_image(MATES[0])
    written = pickle.dumps(embedder, protocol)
    assert len(written) < 1000
    monkeypatch.chdir(tmp_path)  # whoever loads it is somewhere else
    again = pickle.loads(written)
    assert np.array_equal(again.embed_image(MATES[0]), expected)
    assert again.bundle.root == causal_bundle
    with pytest.raises(CembedError, match="state_memory"):
        again.start_query("x")


def test_an_embedder_goes_to_another_process(causal_bundle: Path) -> None:
    embedder = Embedder.load(causal_bundle)
    expected = embedder.embed_query("total")  # which has opened a session, locks and all
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert np.array_equal(pool.submit(embedder.embed_query, "total").result(), expected)


def test_copies_of_an_embedder(causal_bundle: Path) -> None:
    embedder = Embedder.load(causal_bundle, threads=1)
    for same in (copy.copy(embedder), copy.deepcopy([embedder])[0]):
        assert same is not embedder
        assert same_vectors(same, embedder)


def test_a_pickled_embedder_whose_bundle_is_another_by_now(causal_bundle: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(causal_bundle, tmp_path / "bundle"))
    written = pickle.dumps(Embedder.load(root))
    write_manifest(root, (root / MANIFEST).read_text() + "\n")
    with pytest.raises(CembedError, match="is not the bundle that was pickled"):
        pickle.loads(written)
    shutil.rmtree(root)
    with pytest.raises(CembedError, match="is not a bundle"):
        pickle.loads(written)


def test_what_is_not_pickled_says_what_to_do(causal_bundle: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(causal_bundle)
    with pytest.raises(CembedError, match=r"save\(\)"):
        pickle.dumps(embedder.start_query("x"))
    embedder.replace_sessions({"text": embedder.session("text")})
    with pytest.raises(CembedError, match="load one in each process"):
        pickle.dumps(embedder)
    with Index.create(tmp_path / "index", dim=8, bundle="b") as index:
        index.add([NewPage("a", np.ones((1, 8), np.float32))], bundle="b")
        with pytest.raises(CembedError, match="open for writing"):
            pickle.dumps(index)
    again = pickle.loads(pickle.dumps(Index.open(tmp_path / "index")))
    assert again.search(np.ones((1, 8), np.float32), top=1).hits[0].id == "a"


# Graphs that are opened before they are needed, and weights that are packed where that pays.


@pytest.mark.parametrize(
    ("side", "decode", "graphs"),
    [
        ("document", None, ["vision", "text"]),
        ("document", "loop", ["vision", "text_step"]),
        ("query", None, ["text"]),
        ("query", "loop", ["text_step"]),
    ],
)
def test_prepare_opens_what_is_needed(
    causal_bundle: Path, monkeypatch: pytest.MonkeyPatch, side: Any, decode: Any, graphs: list[str]
) -> None:
    opened: list[str] = []
    path = Bundle.open_graph
    monkeypatch.setattr(Bundle, "open_graph", lambda self, name: opened.append(name) or path(self, name))  # type: ignore[func-returns-value]
    embedder, budget = Embedder.load(causal_bundle), Budget(2, decode=decode)
    embedder.prepare(side, budget)
    assert sorted(opened) == sorted(graphs)
    embedder.embed_image(MATES[1], budget) if side == "document" else embedder.embed_query("x", budget)
    assert sorted(opened) == sorted(graphs)
    with pytest.raises(CembedError, match="at least 1"):
        embedder.prepare(side, Budget(0))


@pytest.mark.parametrize(
    ("schemes", "rows", "packed"),
    [
        (None, False, []),
        (("fp16", "fp16"), False, []),
        (("w8a8", "w8a8"), False, []),
        (("int8", "int8"), False, ["vision", "text", "text_step"]),
        (("int8", "int8"), True, []),
        (("int4", "int4"), False, ["vision", "text", "text_step"]),
        (("int4", "int8"), True, ["text", "text_step"]),
        (("w8a8", "int8"), False, ["vision"]),
    ],
)
def test_weights_that_only_packing_makes_fast(causal_bundle: Path, schemes: Any, rows: bool, packed: list[str]) -> None:
    manifest = Bundle(causal_bundle).manifest
    if schemes is not None:
        comparison: Any = None
        weights = dict(zip(("text/a", "vision/b"), schemes, strict=True))
        manifest = replace(manifest, quantisation=Quantisation("", "", "", "", weights, (), comparison, rows=rows))
    graphs = ["vision", "text", "text_step"]
    assert [graph for graph in graphs if EngineSettings(prepack=None).packs(manifest, graph)] == packed
    assert all(EngineSettings(prepack=True).packs(manifest, graph) for graph in graphs)
    assert not any(EngineSettings(prepack=False).packs(manifest, graph) for graph in graphs)


@pytest.mark.parametrize(("prepack", "disabled"), [(None, "1"), (True, "0"), (False, "1")])
def test_the_session_is_told(causal_bundle: Path, monkeypatch: pytest.MonkeyPatch, prepack: Any, disabled: str) -> None:
    told: list[str] = []
    make = ort.InferenceSession

    def record(path: str, options: Any, **more: Any) -> Any:
        told.append(options.get_session_config_entry("session.disable_prepacking"))
        return make(path, options, **more)

    monkeypatch.setattr(ort, "InferenceSession", record)
    Embedder.load(causal_bundle, prepack=prepack).embed_query("x")
    assert told == [disabled]


def test_fewer_visual_tokens_at_call_time(causal_bundle: Path) -> None:
    embedder = Embedder.load(causal_bundle, max_visual_tokens=24)
    lengths = []
    run = embedder.session("vision").run
    embedder.session("vision").run = lambda feeds: lengths.append(feeds["pixel_values"].shape[1]) or run(feeds)  # type: ignore[method-assign]
    embedder.embed_image(MATES[0])
    assert 12 <= lengths[0] // 4 <= 24
    for wrong in (1, 97):
        with pytest.raises(CembedError, match="smallest page takes 4, the largest 96"):
            Embedder.load(causal_bundle, max_visual_tokens=wrong)


def test_fixed_images_have_fixed_visual_tokens(bundle_of: BundleMaker) -> None:
    with pytest.raises(CembedError, match="always take 64"):
        Embedder.load(bundle_of("colpali"), max_visual_tokens=10)


def test_a_missing_provider_is_an_error(causal_bundle: Path) -> None:
    with pytest.raises(CembedError, match=r"CUDAExecutionProvider.*CPUExecutionProvider"):
        Embedder.load(causal_bundle, providers=["CUDAExecutionProvider"])


def test_a_provider_that_does_not_start_is_said_loudly(causal_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the GPU build finds no driver: the session comes back on another provider."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    make = ort.InferenceSession
    monkeypatch.setattr(ort, "get_available_providers", lambda: names)
    monkeypatch.setattr(ort, "InferenceSession", lambda path, options, providers: make(path, options, providers=CPU))
    with pytest.warns(RuntimeWarning, match="CUDAExecutionProvider"):
        Embedder.load(causal_bundle, providers=names).embed_query("x")
    with pytest.raises(CembedError, match="CUDAExecutionProvider"):
        Embedder.load(causal_bundle, providers=names[:1]).embed_query("x")


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_smart_resize_properties(height: int, width: int) -> None:
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(CembedError):
            smart_resize(height, width, SPEC)
        return
    new_height, new_width = smart_resize(height, width, SPEC)
    assert new_height % 28 == new_width % 28 == 0
    narrowest = min(new_height, new_width)
    assert narrowest >= 28
    assert new_height * new_width <= SPEC.max_pixels or narrowest == 28  # strips may be over it


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 12))
def test_windows_partition_the_patches(rows: int, columns: int) -> None:
    grid = (2 * rows, 2 * columns)
    num_patches = grid[0] * grid[1]
    windows = window_index(grid, SPEC)
    assert sorted(windows[windows >= 0]) == list(range(num_patches))
    assert np.array_equal(windows.reshape(-1)[window_restore(windows, num_patches)], np.arange(num_patches))
    positions = patch_positions(grid, 2)
    for window in windows:
        assert len({tuple(positions[patch] // 8) for patch in window[window >= 0]}) == 1

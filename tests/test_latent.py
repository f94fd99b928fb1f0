"""The loop over a static cache: it equals the single pass, grows, stops, is saved, and never moves its buffers.

Letters: K vectors, S positions of the prompt, H hidden, C positions of capacity.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from reference import BACKBONES, HIDDEN, Model, Zoo
from safetensors import safe_open
from safetensors.numpy import load_file

from cembed.runtime import CembedError, Embedder
from cembed.runtime.bundle.manifest import Side, SlotPositions, Tensor
from cembed.runtime.embed.embedder import Budget
from cembed.runtime.embed.kv_cache import StaticKVCache
from cembed.runtime.embed.latent import LatentState, StateMemory
from cembed.runtime.embed.pooling import normalise, pool_states

POLICIES = get_args(SlotPositions)
TEXT = "source code form of the work"
TEXTS = [TEXT, "x", "a longer query, with many more words than the others have: " * 4, "7 8"]


def page(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


PAGES = [page(90, 150, 1), page(30, 30, 2), page(300, 60, 3), Image.new("RGB", (64, 64), "white")]


@pytest.fixture(scope="session")
def feedback(zoo: Zoo) -> Embedder:
    return zoo.under("qwen2-vl", "feedback").embedder


def close(actual: NDArray[np.float32], expected: NDArray[np.float32], atol: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def under(zoo: Zoo, backbone: str, kind: str, policy: SlotPositions) -> Model:
    """A backbone with slots of one kind on both sides."""
    head = {"constant": "causal", "learned": "metaembed", "feedback": "feedback"}[kind]
    return zoo.under(backbone, head).with_both(lambda side: replace(side, slot_positions=policy))


# The loop is the single pass


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["constant", "learned"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_loop_equals_the_single_pass(zoo: Zoo, backbone: str, kind: str, policy: SlotPositions) -> None:
    embedder = under(zoo, backbone, kind, policy).embedder
    single, loop = (embedder.embed_images(PAGES[:1], decode=decode) for decode in ("single-pass", "loop"))
    assert single[0].shape == ((64, HIDDEN) if kind == "learned" else (32, HIDDEN))
    close(loop[0], single[0], 1e-5)
    single, loop = (embedder.embed_queries([TEXT], decode=decode) for decode in ("single-pass", "loop"))
    assert single[0].shape == (16, HIDDEN)
    close(loop[0], single[0], 1e-5)


@pytest.mark.parametrize("kind", ["constant", "learned"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_policies_differ(zoo: Zoo, backbone: str, kind: str) -> None:
    """Or the test above would say little of them; the prompt's own state is the same in both."""
    zero, onward = (under(zoo, backbone, kind, policy).embedder.embed_query(TEXT) for policy in POLICIES)
    if kind == "constant":
        assert np.array_equal(zero[0], onward[0])
    assert np.abs(zero[1:] - onward[1:]).max() > 1e-2


@pytest.mark.parametrize("budget", [1, 2, 5])
@pytest.mark.parametrize("kind", ["constant", "learned", "feedback"])
def test_small_budgets(zoo: Zoo, kind: str, budget: int) -> None:
    embedder = under(zoo, "paligemma", kind, "continue").embedder
    full = embedder.embed_query(TEXT, Budget(8, decode="loop"))
    close(embedder.embed_query(TEXT, Budget(budget, decode="loop")), full[:budget], 1e-6)
    if kind != "feedback":
        close(embedder.embed_query(TEXT, Budget(budget)), full[:budget], 1e-5)


@pytest.mark.parametrize("kind", ["constant", "learned", "feedback"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_batch_mates_do_not_change_a_loop(zoo: Zoo, backbone: str, kind: str) -> None:
    embedder = under(zoo, backbone, kind, "continue").embedder
    batch = embedder.embed_queries(TEXTS, decode="loop"), embedder.embed_images(PAGES, 6, decode="loop")
    for text, vectors in zip(TEXTS, batch[0], strict=True):
        assert np.array_equal(embedder.embed_queries([text], decode="loop")[0], vectors)
    for image, vectors in zip(PAGES, batch[1], strict=True):
        assert np.array_equal(embedder.embed_images([image], 6, decode="loop")[0], vectors)


@pytest.mark.parametrize("kind", ["constant", "learned", "feedback"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_prompt_of_one_token(zoo: Zoo, backbone: str, kind: str) -> None:
    model = under(zoo, backbone, kind, "continue")
    model = model.with_sides(
        query=replace(model.embedder.manifest.query, prompt="{text}", num_vectors=5, nested_budgets=())
    )
    embeds, positions = model.query("x")
    assert embeds.shape[:2] == (1, 1)
    expected = {
        "constant": lambda: model.reference.single_pass(embeds, positions, model.latent(4), "continue"),
        "learned": lambda: model.reference.single_pass(embeds, positions, model.rows("query", 5), "continue")[1:],
        "feedback": lambda: model.reference.feedback(embeds, positions, 5, "continue"),
    }[kind]()
    close(model.embedder.embed_query("x"), normalise(expected.numpy()), 1e-5)
    close(model.embedder.embed_query("x", Budget(decode="loop")), normalise(expected.numpy()), 1e-5)


def test_several_threads_run_loops(feedback: Embedder) -> None:
    expected = feedback.embed_queries(3 * TEXTS, 6)
    with ThreadPoolExecutor(4) as pool:
        actual = pool.map(lambda text: feedback.embed_query(text, Budget(6)), 3 * TEXTS)
        for a, b in zip(expected, actual, strict=True):
            assert np.array_equal(a, b)


# Growing, saving, resuming


def starts(embedder: Embedder, most: int | None) -> Iterator[tuple[str, LatentState]]:
    yield "document", embedder.start(PAGES[0], most)
    yield "query", embedder.start_query(TEXT, most)


@pytest.mark.parametrize("kind", ["constant", "learned", "feedback"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_extending_equals_all_at_once(zoo: Zoo, tmp_path: Path, backbone: str, kind: str) -> None:
    """32, then 64, with and without a file in between; queries of learned slots have 16."""
    embedder = under(zoo, backbone, kind, "continue").embedder
    for name, state in starts(embedder, None):
        few, many = (8, 16) if (kind, name) == ("learned", "query") else (32, 64)
        budget = Budget(many, decode="loop")
        at_once = embedder.embed_image(PAGES[0], budget) if name == "document" else embedder.embed_query(TEXT, budget)
        first = state.extend(few)
        kept = first.copy()
        state.save(tmp_path / "state.safetensors")
        grown = state.extend(many)
        close(grown, at_once, 1e-6)
        close(first, at_once[:few], 1e-6)
        assert np.array_equal(first, kept)
        assert np.array_equal(state.extend(few), first)
        assert np.array_equal(state.extend(1), first[:1])
        assert np.array_equal(state.extend(many), grown)
        resumed = embedder.resume(tmp_path / "state.safetensors")
        assert resumed.loop.name == name
        assert np.array_equal(resumed.extend(few), first)
        close(resumed.extend(many), at_once, 1e-6)


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("kind", ["constant", "learned", "feedback"])
def test_a_state_is_saved_at_any_time(zoo: Zoo, tmp_path: Path, kind: str, first: int) -> None:
    """Right behind the prompt too, where a learned head has no vector yet; and once more after it was resumed."""
    embedder = under(zoo, "paligemma", kind, "zero").embedder
    state = embedder.start_query(TEXT, 9)
    if first:
        state.extend(first)
    state.save(tmp_path / "state.safetensors")
    resumed = embedder.resume(tmp_path / "state.safetensors", 9)
    assert resumed.cache.capacity == state.cache.capacity
    resumed.save(tmp_path / "again.safetensors")
    saved, again = (load_file(tmp_path / f"{name}.safetensors") for name in ("state", "again"))
    assert saved.keys() == again.keys()
    assert all(np.array_equal(saved[name], again[name]) for name in saved)
    close(resumed.extend(9), state.extend(9), 1e-6)
    small = embedder.resume(tmp_path / "again.safetensors", max(first, 1))
    assert len(small.extend(max(first, 1))) == max(first, 1)
    with pytest.raises(CembedError, match="capacity"):
        small.extend(9)


def test_a_projection_in_a_file(zoo: Zoo, tmp_path: Path) -> None:
    """What is fed back is not what comes out, so the file has both."""
    embedder = zoo.model("projected").embedder
    state = embedder.start(PAGES[0], 6)
    state.extend(2)
    state.save(tmp_path / "state.safetensors")
    close(embedder.resume(tmp_path / "state.safetensors").extend(6), state.extend(6), 1e-6)
    close(state.extend(6), embedder.embed_image(PAGES[0]), 1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last", "concat"])
def test_pooled_states_grow_too(zoo: Zoo, pooling: Any) -> None:
    model = zoo.under("qwen2.5-vl", "btoks").with_both(lambda side: replace(side, pooling=pooling))
    state = model.embedder.start_query(TEXT)
    for budget in (2, 7, 3, 16):
        close(state.extend(budget), model.embedder.embed_query(TEXT, Budget(budget)), 1e-5)


def test_states_beside_each_other(feedback: Embedder) -> None:
    """Each has a cache of its own."""
    expected = [feedback.embed_query(text, Budget(6)) for text in TEXTS]
    states = [feedback.start_query(text, 6) for text in TEXTS]
    for budget in (1, 3, 6):
        for state, vectors in zip(states, expected, strict=True):
            close(state.extend(budget), vectors[:budget], 1e-6)


# What states refuse


def test_the_capacity(feedback: Embedder) -> None:
    state = feedback.start_query(TEXT, 5)
    assert len(state.extend(5)) == 5
    for wrong in (6, 1000):
        with pytest.raises(
            CembedError, match=rf"num_vectors is {wrong}: .*{state.cache.capacity} positions.* 5 vectors"
        ):
            state.extend(wrong)
    for wrong in (0, -1):
        with pytest.raises(CembedError, match="at least 1"):
            state.extend(wrong)
    assert len(state.extend(5)) == 5


@pytest.mark.parametrize("kind", ["constant", "learned", "feedback"])
def test_capacity_is_exactly_what_was_asked_for(zoo: Zoo, kind: str) -> None:
    embedder = under(zoo, "qwen2-vl", kind, "zero").embedder
    state = embedder.start_query(TEXT, 7)
    state.extend(7)
    assert state.cache.length == state.cache.capacity


def test_the_default_capacity(zoo: Zoo) -> None:
    """Twice the budget, at least 64; all rows of a learned head, and not one more."""
    embedder = zoo.under("qwen2-vl", "causal", 40).embedder
    assert len(embedder.start_query(TEXT).extend(80)) == 80
    assert len(zoo.under("qwen2-vl", "causal", 8).embedder.start_query(TEXT).extend(64)) == 64
    learned = zoo.model("qwen2-vl").embedder.start_query(TEXT)
    assert len(learned.extend(16)) == 16
    with pytest.raises(CembedError, match="1 to 16"):
        learned.extend(17)


def test_no_more_positions_than_the_model_has(feedback: Embedder, tmp_path: Path) -> None:
    most = feedback.manifest.max_sequence_length
    with pytest.raises(CembedError, match=f"the model has {most}"):
        feedback.start_query(TEXT, most)
    feedback.start_query(TEXT, 2).save(tmp_path / "state.safetensors")
    with pytest.raises(CembedError, match=f"the model has {most}"):
        feedback.resume(tmp_path / "state.safetensors", most)


def test_a_closed_state(feedback: Embedder, tmp_path: Path) -> None:
    state = feedback.start_query(TEXT, 4)
    vectors = state.extend(3)
    kept = vectors.copy()
    state.close()
    assert state.nbytes == 0
    for use in (lambda: state.extend(1), lambda: state.extend(4), lambda: state.save(tmp_path / "state.safetensors")):
        with pytest.raises(CembedError, match="closed"):
            use()
    assert not list(tmp_path.iterdir())
    assert np.array_equal(vectors, kept)


def test_closing_twice_is_allowed(feedback: Embedder) -> None:
    state = feedback.start_query(TEXT, 4)
    state.close()
    state.close()


def test_the_memory_of_states_is_bounded(zoo: Zoo, tmp_path: Path) -> None:
    bundle = zoo.model("qwen2-vl").bundle
    size = Embedder.load(bundle, threads=1).start_query(TEXT, 16).nbytes
    embedder = Embedder.load(bundle, threads=1, state_memory=2 * size)
    one, two = (embedder.start_query(TEXT, 16) for _ in range(2))
    two.save(tmp_path / "state.safetensors")
    for more in (
        lambda: embedder.start_query(TEXT, 16),
        lambda: embedder.start(PAGES[0], 1),
        lambda: embedder.resume(tmp_path / "state.safetensors", 16),
    ):
        with pytest.raises(CembedError, match=r"2 others hold .* MiB.*state_memory"):
            more()
    one.close()
    three = embedder.start_query(TEXT, 16)
    assert np.array_equal(three.extend(16), two.extend(16))
    del three
    gc.collect()
    assert len(embedder.resume(tmp_path / "state.safetensors", 16).extend(2)) == 2


def test_many_threads_start_states(zoo: Zoo) -> None:
    """An embedder may be used from several threads: none finds the register of states half changed."""

    @dataclass(eq=False)
    class Stub:
        nbytes: int = 1

    memory, failed = StateMemory(1 << 30), []
    together = threading.Barrier(4)

    def work() -> None:
        together.wait()
        mine = []
        try:
            for _ in range(300):
                mine.append(memory.add(Stub()))  # type: ignore[arg-type]  # noqa: PERF401
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed


def test_a_state_of_another_bundle(zoo: Zoo, feedback: Embedder, tmp_path: Path) -> None:
    feedback.start_query(TEXT, 2).save(tmp_path / "state.safetensors")
    with pytest.raises(CembedError, match=r"state\.safetensors is not a state of this bundle"):
        zoo.under("qwen2.5-vl", "feedback").embedder.resume(tmp_path / "state.safetensors")


KEY = "past_key_values.1.key"


def test_a_state_is_written_whole_or_not_at_all(feedback: Embedder, tmp_path: Path) -> None:
    state = feedback.start_query(TEXT, 2)
    with pytest.raises(CembedError, match="cannot write"):
        state.save(tmp_path / "nowhere" / "state.safetensors")
    state.save(tmp_path / "state.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    with safe_open(tmp_path / "state.safetensors", framework="numpy") as file:
        assert file.metadata()["side"] == "query"
        assert file.get_tensor(KEY).shape[2] == state.cache.length < state.cache.capacity


def test_a_head_of_all_tokens_has_no_states(zoo: Zoo) -> None:
    def all_tokens(side: Side) -> Side:
        return replace(side, slots="all_tokens", num_vectors=None, slot_rows=None, nested_budgets=())

    embedder = zoo.model("qwen2-vl").with_both(all_tokens).embedder
    for start in (lambda: embedder.start(PAGES[0]), lambda: embedder.start_query(TEXT, 4)):
        with pytest.raises(CembedError, match="every token"):
            start()


def test_a_step_that_failed_is_not_half_done(feedback: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine fails once: the state goes on from where it was."""
    expected = feedback.embed_query(TEXT, Budget(5))
    state = feedback.start_query(TEXT, 20)
    state.extend(2)

    def fail(*_: object) -> None:
        raise CembedError("ONNX Runtime failed")

    with monkeypatch.context() as patch:
        patch.setattr(type(state._step), "run", fail)
        with pytest.raises(CembedError, match="ONNX Runtime failed"):
            state.extend(3)
    close(state.extend(5), expected, 1e-6)


# The cache


@pytest.mark.parametrize("name", [*BACKBONES, "projected", "shallow"])
def test_buffers_are_updated_in_place(zoo: Zoo, name: str) -> None:
    model = zoo.model(name)
    state = model.embedder.start(PAGES[0], 5)
    buffers = dict(state.cache.buffers)
    assert len(buffers) == 2 * {"shallow": 2, "qwen3-vl": 4}.get(name, 3)
    addresses = {key: buffer.ctypes.data for key, buffer in buffers.items()}
    for budget in (1, 2, 3, 5):
        state.extend(budget)
        filled = state.cache.length
        for key, buffer in state.cache.buffers.items():
            assert buffer is buffers[key]
            assert buffer.ctypes.data == addresses[key]
            assert (np.abs(buffer[:, :, :filled]).max(axis=(0, 1, 3)) > 0).all()
            assert not buffer[:, :, filled:].any()
    assert filled == state.cache.capacity
    outputs = state._open()._binding._iobinding.get_outputs()
    names = [output.name for output in model.embedder.session("text_step")._session.get_outputs()]
    bound = {key: value.data_ptr() for key, value in zip(names, outputs, strict=True) if key.startswith("present.")}
    assert bound == {key.replace("past_key_values.", "present."): address for key, address in addresses.items()}


def test_a_step_changes_no_earlier_position(feedback: Embedder) -> None:
    state = feedback.start_query(TEXT, 6)
    state.extend(2)
    before = {name: buffer.copy() for name, buffer in state.cache.buffers.items()}
    filled = state.cache.length
    state.extend(6)
    for name, buffer in state.cache.buffers.items():
        assert np.array_equal(buffer[:, :, :filled], before[name][:, :, :filled])


def test_capacity_does_not_change_the_vectors(feedback: Embedder) -> None:
    small, large = feedback.start_query(TEXT, 4), feedback.start_query(TEXT, 900)
    close(large.extend(4), small.extend(4), 1e-6)


@pytest.mark.parametrize("backbone", ["qwen2-vl", "paligemma"])
def test_the_cache_holds_the_keys_of_torch(zoo: Zoo, backbone: str) -> None:
    """The cache of transformers after its own prefill, layer by layer."""
    from transformers import DynamicCache

    model = under(zoo, backbone, "feedback", "continue")
    state = model.embedder.start_query(TEXT, 3)
    cache = DynamicCache(config=model.reference.model.language_model.config)
    with torch.inference_mode():
        model.reference.step(*model.query(TEXT), cache)
    length = state.cache.length
    for index, layer in enumerate(cache.layers):
        for part, expected in (("key", layer.keys), ("value", layer.values)):
            actual = state.cache.buffers[f"past_key_values.{index}.{part}"][:, :, :length]
            close(actual, expected.numpy(), 1e-4)


def tensors(dtype: str = "float32") -> list[Tensor]:
    shape = ("batch_size", 2, "capacity", 8)
    return [Tensor(f"past_key_values.{layer}.{part}", dtype, shape) for layer in (0, 1) for part in ("key", "value")]


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2)])
def test_a_cache_is_made_as_the_graph_wants_it(dtype: str, size: int) -> None:
    cache = StaticKVCache(tensors(dtype), 10)
    assert (cache.capacity, cache.length) == (10, 0)
    assert list(cache.buffers) == [tensor.name for tensor in tensors()]
    for buffer in cache.buffers.values():
        assert buffer.shape == (1, 2, 10, 8)
        assert buffer.dtype == dtype
        assert buffer.flags.c_contiguous
        assert not buffer.any()
    assert cache.nbytes == 4 * 2 * 10 * 8 * size


def taken(cache: StaticKVCache, positions: int) -> int:
    start = cache.require(positions)
    cache.length += positions
    return start


def test_positions_are_reserved_one_after_the_other() -> None:
    cache = StaticKVCache(tensors(), 10)
    assert [taken(cache, n) for n in (7, 1, 1, 1)] == [0, 7, 8, 9]
    assert cache.length == 10


def test_a_cache_is_never_overfilled() -> None:
    cache = StaticKVCache(tensors(), 10)
    with pytest.raises(CembedError, match=r"capacity of 10 positions and holds 0: 11 more"):
        cache.require(11)
    assert taken(cache, 9) == 0
    with pytest.raises(CembedError, match=r"capacity of 10 positions and holds 9: 2 more"):
        cache.require(2)
    assert cache.require(1) == 9


# Any head


@dataclass(frozen=True)
class Drawn:
    """A head on one side of a bundle, and what it is asked."""

    backbone: str
    side: dict[str, Any]
    head: str
    budget: int


@st.composite
def heads(draw: st.DrawFn) -> Drawn:
    kind = draw(st.sampled_from(["constant", "learned", "feedback"]))
    first = "prompt_end" if kind == "feedback" else draw(st.sampled_from(["prompt_end", "slot"]))
    budget = draw(st.integers(1, 7))
    fields = {
        "first_vector": first,
        "pooling": draw(st.sampled_from(["none", "none", "mean", "last", "concat"])),
        "slot_positions": draw(st.sampled_from(POLICIES)),
        "prompt": draw(st.sampled_from(["{text}", "find {text}", "{text} ?", None])),
        "nested_budgets": (),
        "num_vectors": budget,
    }
    head = {"constant": "causal", "learned": "metaembed", "feedback": "feedback"}[kind]
    return Drawn(draw(st.sampled_from(BACKBONES)), fields, head, budget)


texts = st.lists(st.text("abc xyz", min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=3)
light = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def embedder_of(zoo: Zoo, drawn: Drawn) -> Embedder:
    """Head and prompt of the query, and the head of the document."""

    def change(side: Side) -> Side:
        prompt = drawn.side["prompt"] if drawn.side["prompt"] and "{text}" in side.prompt else side.prompt
        return replace(side, **(drawn.side | {"prompt": prompt}))

    return zoo.under(drawn.backbone, drawn.head).with_both(change).embedder


@light
@given(heads(), texts, st.integers(1, HIDDEN))
def test_any_query_under_any_head(zoo: Zoo, drawn: Drawn, queries: list[str], dim: int) -> None:
    embedder, pooling = embedder_of(zoo, drawn), drawn.side["pooling"]
    alone = [embedder.embed_query(text) for text in queries]
    loop = embedder.embed_queries(queries, decode="loop")
    short = embedder.embed_queries(queries, dim=dim)
    shape = (1 if pooling != "none" else drawn.budget, HIDDEN * (drawn.budget if pooling == "concat" else 1))
    for one, mate, looped, cut_off in zip(alone, embedder.embed_queries(queries), loop, short, strict=True):
        assert one.shape == shape
        assert np.array_equal(one, mate)
        close(looped, one, 1e-5)
        close(np.linalg.norm(one, axis=-1), np.ones(len(one), np.float32), 1e-6)
        length = np.linalg.norm(one[:, :dim], axis=-1, keepdims=True)
        close(cut_off, one[:, :dim] / length, 1e-5 / float(length.min()))


@light
@given(heads(), texts, st.integers(1, 7), st.integers(1, 7))
def test_a_budget_is_the_start_of_a_larger_one(zoo: Zoo, drawn: Drawn, queries: list[str], few: int, many: int) -> None:
    few, many = min(few, many), max(few, many)
    embedder, pooling = embedder_of(zoo, drawn), drawn.side["pooling"]
    for text in queries:
        state = embedder.start_query(text, many)
        small, large = state.extend(few), state.extend(many)
        close(embedder.embed_query(text, Budget(few)), small, 1e-5)
        close(embedder.embed_query(text, Budget(many)), large, 1e-5)
        if pooling == "none":
            assert np.array_equal(large[:few], small)
        else:
            close(small, normalise(pool_states(np.concatenate(state.states[:few]), pooling)), 0)


@settings(light, max_examples=40)
@given(heads(), st.lists(st.tuples(st.integers(1, 120), st.integers(1, 120)), min_size=1, max_size=3))
def test_any_page_under_any_head(zoo: Zoo, drawn: Drawn, sizes: list[tuple[int, int]]) -> None:
    embedder = embedder_of(zoo, drawn)
    pages = [page(width, height, seed) for seed, (width, height) in enumerate(sizes)]
    loop = embedder.embed_images(pages, decode="loop")
    for image, vectors, looped in zip(pages, embedder.embed_images(pages), loop, strict=True):
        assert np.array_equal(embedder.embed_image(image), vectors)
        close(looped, vectors, 1e-5)
        close(np.linalg.norm(vectors, axis=-1), np.ones(len(vectors), np.float32), 1e-6)

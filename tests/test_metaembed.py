"""MetaEmbed as its public code lays it out: one table, the query's rows first, all of it fed after every input.

Letters: S positions of the prompt, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import libcembed
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from reference import HIDDEN, Model, Reference, Zoo
from safetensors.torch import load_file, save_file

from cembed.export.head_weights import JOINT
from cembed.export.plan import ExportOptions, ExportPlan
from cembed.runtime import CembedError, Embedder
from cembed.runtime.bundle.manifest import Side

PAGE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (100, 150, 3), np.uint8))
TEXT = "source code form of the work"
NESTED = ((1, 1), (2, 4), (4, 8), (8, 16), (16, 64))  # query, document


def joint(rows: int = 80, hidden: int = HIDDEN) -> torch.Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(3)) / hidden**0.5


def head_weights(path: Path, table: torch.Tensor) -> Path:
    save_file({JOINT: table}, path)
    return path


@pytest.fixture(scope="module")
def bundle(zoo: Zoo, shared: Callable[[str], Path], exported: Callable[[ExportOptions], Path]) -> Path:
    weights = head_weights(shared("metaembed") / "head.safetensors", joint())
    return exported(ExportOptions(model=str(zoo.checkpoint("qwen2.5-vl")), head_weights=weights))


@pytest.fixture(scope="module")
def model(zoo: Zoo, bundle: Path) -> Model:
    return Model(bundle, Embedder.load(bundle, threads=1), Reference(zoo.checkpoint("qwen2.5-vl")), {JOINT: joint()})


def unit(states: torch.Tensor) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = torch.nn.functional.normalize(states, dim=-1).numpy()
    return vectors


def expected(model: Model) -> dict[str, NDArray[np.float32]]:
    """All rows after the input, as the public code has it: a query reads the first 16, a document the last 64."""
    prompts = {"document": model.document(PAGE), "query": model.query(TEXT)}
    states = {
        name: model.reference.single_pass(*prompt, model.head[JOINT], "continue")[prompt[0].shape[1] :]
        for name, prompt in prompts.items()
    }
    return {"document": unit(states["document"][16:]), "query": unit(states["query"][:16])}


def calls(embedder: Embedder) -> dict[str, Callable[..., NDArray[np.float32]]]:
    return {
        "document": lambda *a, **k: embedder.embed_images([PAGE], *a, **k)[0],
        "query": lambda *a, **k: embedder.embed_queries([TEXT], *a, **k)[0],
    }


@pytest.mark.parametrize("decode", ["single-pass", "loop"])
def test_both_sides_at_every_budget(model: Model, decode: Any) -> None:
    right = expected(model)
    for side, (name, embed) in enumerate(calls(model.embedder).items()):
        for budget in (pair[1 - side] for pair in NESTED):
            np.testing.assert_allclose(embed(budget, decode=decode), right[name][:budget], rtol=0, atol=1e-5)
        np.testing.assert_allclose(embed(decode=decode), right[name], rtol=0, atol=1e-5)


def test_what_the_manifest_says(model: Model) -> None:
    document, query = model.embedder.manifest.document, model.embedder.manifest.query
    assert model.embedder.manifest.head == "metaembed"
    assert (document.slot_rows, document.unread_slots, document.num_vectors) == ((0, 80), 16, 64)
    assert (query.slot_rows, query.unread_slots, query.num_vectors) == ((0, 16), 0, 16)
    assert tuple(zip(query.nested_budgets, document.nested_budgets, strict=True)) == NESTED


def test_a_document_depends_on_the_query_rows(model: Model) -> None:
    """Which is why the table split by side gives other vectors."""
    side = replace(model.embedder.manifest.document, slot_rows=(16, 64), unread_slots=0)
    (alone,), right = model.with_sides(side).embedder.embed_images([PAGE]), expected(model)["document"]
    assert (alone * right).sum(-1).min() < 0.99


def test_growing_saving_and_going_on(model: Model, tmp_path: Path) -> None:
    right = expected(model)
    for name, start in (("document", model.embedder.start(PAGE)), ("query", model.embedder.start_query(TEXT))):
        start.save(tmp_path / "before.safetensors")
        few = start.extend(4)
        start.save(tmp_path / "after.safetensors")
        grown = start.extend(16)
        np.testing.assert_allclose(grown, right[name][:16], rtol=0, atol=1e-5)
        assert np.array_equal(grown[:4], few)
        for file in ("before", "after"):
            resumed = model.embedder.resume(tmp_path / f"{file}.safetensors")
            assert np.array_equal(resumed.extend(16), grown)


def test_the_c_library(library: libcembed.Library, model: Model) -> None:
    opened, right = library.open(model.bundle), expected(model)
    embed = {"document": lambda **k: opened.embed_image(PAGE, **k), "query": lambda **k: opened.embed_query(TEXT, **k)}
    for name, item in (("document", PAGE), ("query", TEXT)):
        for decode in (0, 1):
            vectors = embed[name](num_vectors=8, loop=decode)
            np.testing.assert_allclose(vectors, right[name][:8], rtol=0, atol=1e-5)
        state = opened.start(item)
        np.testing.assert_allclose(state.extend(16), right[name][:16], rtol=0, atol=1e-5)
        state.close()
    opened.close()


def test_after_a_prompt_that_attends_to_all_of_itself(zoo: Zoo) -> None:
    """The unread slots are slots: they see the prompt, which does not see them."""
    pali = zoo.model("paligemma")
    side = pali.embedder.manifest.document
    pali = pali.with_sides(replace(side, unread_slots=16, num_vectors=48, nested_budgets=()))
    prompt = pali.document(PAGE)
    states = pali.reference.single_pass(*prompt, pali.rows("document", 64), side.slot_positions)
    for decode in ("single-pass", "loop"):
        (vectors,) = pali.embedder.embed_images([PAGE], decode=decode)
        np.testing.assert_allclose(vectors, unit(states[prompt[0].shape[1] + 16 :]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [16, 64, 79, 81, 160])
def test_other_numbers_of_rows(zoo: Zoo, tmp_path: Path, rows: int) -> None:
    weights = head_weights(tmp_path / "head.safetensors", joint(rows))
    model = zoo.checkpoint("qwen2.5-vl")
    with pytest.raises(CembedError, match=rf"{JOINT} has {rows} rows: 16 of queries and 64 of documents"):
        ExportPlan.make(ExportOptions(model=str(model), head_weights=weights), model)


def test_other_numbers_of_rows_that_are_described(zoo: Zoo, tmp_path: Path) -> None:
    weights = head_weights(tmp_path / "head.safetensors", joint(12))
    spec, model = tmp_path / "spec.json", zoo.checkpoint("qwen2.5-vl")
    side = '{"slots": "learned", "first_vector": "slot", "slot_positions": "continue", "nested_budgets": '
    spec.write_text(f'{{"document": {side}[2, 8]}}, "query": {side}[1, 4]}}}}')
    plan = ExportPlan.make(ExportOptions(model=str(model), head_spec=spec, head_weights=weights), model)
    assert (plan.document.slot_rows, plan.document.unread_slots, plan.document.num_vectors) == ((0, 12), 4, 8)
    assert (plan.query.slot_rows, plan.query.unread_slots, plan.query.num_vectors) == ((0, 4), 0, 4)


def test_a_head_without_learned_rows(zoo: Zoo, tmp_path: Path) -> None:
    weights, model = head_weights(tmp_path / "head.safetensors", joint()), zoo.checkpoint("qwen2.5-vl")
    with pytest.raises(CembedError, match=f"unexpected {JOINT}"):
        ExportPlan.make(ExportOptions(model=str(model), head="causal", head_weights=weights), model)


def test_two_layouts_at_once(zoo: Zoo, tmp_path: Path) -> None:
    both = load_file(zoo.head_weights()) | {JOINT: joint()}
    save_file(both, tmp_path / "head.safetensors")
    model = zoo.checkpoint("qwen2.5-vl")
    options = ExportOptions(model=str(model), head="metaembed", head_weights=tmp_path / "head.safetensors")
    with pytest.raises(CembedError, match="unexpected slot_embeddings"):
        ExportPlan.make(options, model)


@pytest.mark.parametrize(
    "change",
    [
        {"first_vector": "prompt_end"},
        {"slots": "constant", "slot_rows": None, "latent_token_id": 3},
        {"unread_slots": 80},
        {"unread_slots": 17},
    ],
)
def test_unread_slots_that_contradict_the_side(change: dict[str, Any]) -> None:
    side = Side("{image}", "learned", 64, "continue", "slot", None, (0, 80), 16)
    with pytest.raises(CembedError, match=r"unread_slots|num_vectors"):
        replace(side, **change)

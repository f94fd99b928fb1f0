"""Every head against its definition, written out on the models of transformers, and every way to get one wrong.

Letters: K vectors, S positions of the prompt, H hidden.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from reference import BACKBONES, HIDDEN, PROJECTED, SPEC, Model, Reference, Zoo
from safetensors.torch import load_file, save_file
from scipy.cluster.hierarchy import fcluster, linkage

from cembed.export import exporter
from cembed.export.heads import HEADS, HeadSide, read_head
from cembed.export.plan import ExportOptions, ExportPlan
from cembed.runtime import CembedError, Embedder, maxsim
from cembed.runtime.bundle.manifest import Pooling, Side, SlotKind, SlotPositions
from cembed.runtime.embed.pooling import pool_tokens

POLICIES = get_args(SlotPositions)
NESTED = ((1, 1), (2, 4), (4, 8), (8, 16), (16, 64))  # query, document
TEXT = "source code form of the work"
QWEN = "qwen2.5-vl"
Prompt = tuple[torch.Tensor, NDArray[np.int64]]
Tensors = Mapping[str, torch.Tensor]


def page(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


PAGE = page(150, 100, 1)


def unit(states: torch.Tensor) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = torch.nn.functional.normalize(states, dim=-1).numpy()
    return vectors


def close(actual: NDArray[np.float32], expected: NDArray[np.float32], atol: float = 1e-5) -> None:
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def slot_states(reference: Reference, prompt: Prompt, rows: torch.Tensor, policy: SlotPositions) -> torch.Tensor:
    """The last hidden states of `rows` behind a prompt."""
    return reference.single_pass(*prompt, rows, policy)[prompt[0].shape[1] :]


def from_prompt_end(reference: Reference, prompt: Prompt, rows: torch.Tensor, policy: SlotPositions) -> torch.Tensor:
    """Those of the prompt's last position and of `rows` behind it."""
    return reference.single_pass(*prompt, rows, policy)[prompt[0].shape[1] - 1 :]


def on_both_sides(model: Model) -> list[tuple[str, Prompt, Callable[..., NDArray[np.float32]]]]:
    """Each side's name, the reference's prompt, and the embedder's call with a budget."""
    embedder = model.embedder
    return [
        ("document", model.document(PAGE), lambda *a, **k: embedder.embed_images([PAGE], *a, **k)[0]),
        ("query", model.query(TEXT), lambda *a, **k: embedder.embed_queries([TEXT], *a, **k)[0]),
    ]


# What the heads are


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_constant_slots(zoo: Zoo, backbone: str, policy: SlotPositions) -> None:
    model = zoo.under(backbone, "causal", 12).with_both(lambda side: replace(side, slot_positions=policy))
    for _, prompt, embed in on_both_sides(model):
        expected = unit(from_prompt_end(model.reference, prompt, model.latent(11), policy))
        close(embed(), expected)
        assert expected.shape == (12, HIDDEN)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_metaembed_at_every_budget(zoo: Zoo, backbone: str, policy: SlotPositions) -> None:
    model = zoo.model(backbone).with_both(lambda side: replace(side, slot_positions=policy))
    manifest = model.embedder.manifest
    assert tuple(zip(manifest.query.nested_budgets, manifest.document.nested_budgets, strict=True)) == NESTED
    assert (manifest.query.num_vectors, manifest.document.num_vectors) == (16, 64)
    for name, prompt, embed in on_both_sides(model):
        for budget in (document if name == "document" else query for query, document in NESTED):
            expected = unit(slot_states(model.reference, prompt, model.rows(name, budget), policy))
            assert len(expected) == budget
            close(embed(budget), expected)
        close(embed(), expected)


@pytest.mark.parametrize("pooling", ["mean", "last", "concat"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_btoks(zoo: Zoo, backbone: str, pooling: Pooling) -> None:
    model = zoo.under(backbone, "btoks")
    if pooling != "mean":  # which is the default
        model = model.with_both(lambda side: replace(side, pooling=pooling))
    policy = model.embedder.manifest.document.slot_positions
    for name, prompt, embed in on_both_sides(model):
        for budget in (None, 3):
            count = budget or {"document": 64, "query": 16}[name]
            states = slot_states(model.reference, prompt, model.rows(name, count), policy)
            pooled = {"mean": states.mean(0), "last": states[-1], "concat": states.flatten()}[pooling]
            close(embed(budget), unit(pooled[None]))


def test_btoks_scores_are_cosines(zoo: Zoo) -> None:
    embedder = zoo.under("qwen2-vl", "btoks").embedder
    pages = embedder.embed_images([page(90, 60, seed) for seed in range(4)])
    queries = embedder.embed_queries(["warranty period", TEXT])
    assert {vectors.shape for vectors in (*pages, *queries)} == {(1, HIDDEN)}
    assert embedder.dim == HIDDEN
    close(maxsim(queries, pages), np.concatenate(queries) @ np.concatenate(pages).T, 1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_feedback(zoo: Zoo, backbone: str, policy: SlotPositions) -> None:
    """Not more than 8 vectors: rounding grows from slot to slot, in torch too (float32 to float64: 5e-5 at 16)."""
    model = zoo.under(backbone, "feedback", 8).with_both(lambda side: replace(side, slot_positions=policy))
    for _, prompt, embed in on_both_sides(model):
        close(embed(), unit(model.reference.feedback(*prompt, 8, policy)))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [*BACKBONES, "shallow"])
def test_every_step_of_feedback(zoo: Zoo, name: str, policy: SlotPositions) -> None:
    """Each slot from the states before it as they came out here, in one pass: rounding cannot grow."""
    model = zoo.model(name) if name == "shallow" else zoo.under(name, "feedback")
    model = model.with_both(lambda side: replace(side, slot_positions=policy))
    for prompt, state in (
        (model.document(PAGE), model.embedder.start(PAGE, 32)),
        (model.query(TEXT), model.embedder.start_query(TEXT, 32)),
    ):
        vectors = state.extend(32)
        states = torch.from_numpy(np.concatenate(state.states))
        close(vectors, unit(states), 1e-6)
        close(vectors, unit(from_prompt_end(model.reference, prompt, states[:-1], policy)))


def project(model: Model, states: torch.Tensor) -> torch.Tensor:
    return states @ model.head["custom_text_proj.weight"].T + model.head["custom_text_proj.bias"]


def test_a_projection_and_sides_that_differ_in_everything(zoo: Zoo) -> None:
    """Feedback is fed the unprojected state; learned slots come out projected, then pooled."""
    model = zoo.model("projected")
    (_, document, embed_document), (_, query, embed_query) = on_both_sides(model)
    expected = unit(project(model, model.reference.feedback(*document, 6, "zero")))
    assert expected.shape == (6, PROJECTED)
    close(embed_document(), expected)
    close(embed_document(3), expected[:3])
    for budget in (5, 2, 1):
        states = slot_states(model.reference, query, model.rows("query", budget), "continue")
        expected = unit(project(model, states).mean(0, keepdim=True))
        close(embed_query(budget), expected)
        close(embed_query(budget, decode="loop"), expected)
    close(embed_query(5), embed_query())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_projection_on_the_other_sides(zoo: Zoo, policy: SlotPositions) -> None:
    """Learned slots behind a page, feedback behind a query."""
    model = zoo.model("projected")
    manifest = model.embedder.manifest
    model = model.with_sides(
        replace(manifest.query, prompt=manifest.document.prompt, pooling="none", slot_positions=policy),
        replace(manifest.document, prompt=manifest.query.prompt, slot_positions=policy),
    )
    (_, document, embed_document), (_, query, embed_query) = on_both_sides(model)
    close(embed_query(), unit(project(model, model.reference.feedback(*query, 6, policy))))
    states = slot_states(model.reference, document, model.rows("query", 5), policy)
    close(embed_document(), unit(project(model, states)))
    close(embed_document(decode="loop"), unit(project(model, states)))


def test_the_manifest_says_what_the_spec_says(zoo: Zoo) -> None:
    manifest = zoo.model("projected").embedder.manifest
    assert manifest.head == "spec"
    assert manifest.dim == PROJECTED
    for name, side in (("document", manifest.document), ("query", manifest.query)):
        for field, value in SPEC[name].items():
            assert getattr(side, field) == (tuple(value) if isinstance(value, list) else value)
    assert manifest.query.slot_rows == (0, 16)
    assert manifest.document.slot_rows is None
    assert manifest.document.prompt.startswith("{image}")


def test_mean_pooled_learned_documents_and_constant_queries(zoo: Zoo) -> None:
    learned, constant = zoo.sides(QWEN, "btoks")[0], zoo.sides(QWEN, "causal", 9)[1]
    model = zoo.model(QWEN).with_sides(
        replace(learned, slot_positions="continue", num_vectors=7, first_vector="prompt_end"),
        replace(constant, slot_positions="zero", prompt="<|im_start|>{text}?<|im_end|>"),
    )
    (_, document, embed_document), (_, query, embed_query) = on_both_sides(model)
    states = from_prompt_end(model.reference, document, model.rows("document", 6), "continue")
    close(embed_document(), unit(states.mean(0, keepdim=True)))
    close(embed_query(), unit(from_prompt_end(model.reference, query, model.latent(8), "zero")))


def test_the_first_layers_only(zoo: Zoo) -> None:
    """Also the loop on the operators of opset 20, and a bundle without a single pass."""
    model = zoo.model("shallow")
    manifest = model.embedder.manifest
    assert set(manifest.graphs) == {"vision", "text_step"}
    assert sum(tensor.name.startswith("past") for tensor in manifest.graphs["text_step"].inputs) == 2 * 2
    assert len(model.reference.model.language_model.layers) == 2
    (_, document, embed_document), (_, query, embed_query) = on_both_sides(model)
    close(embed_document(8), unit(model.reference.feedback(*document, 8, "zero")))
    close(embed_query(8), unit(model.reference.feedback(*query, 8, "zero")))
    assert (len(embed_document()), len(embed_query())) == (32, 16)


@pytest.mark.parametrize("num_layers", [-1, 0, 4])
def test_layers_out_of_range(zoo: Zoo, num_layers: int) -> None:
    with pytest.raises(CembedError, match=rf"--num-layers {num_layers}: .* 1 to 3"):
        plan(zoo, num_layers=num_layers)


def test_as_many_layers_as_there_are(zoo: Zoo) -> None:
    assert plan(zoo, num_layers=3).backbone.decoder.num_layers == 3


def all_tokens(side: Side) -> Side:
    return replace(side, slots="all_tokens", num_vectors=None, slot_rows=None, nested_budgets=(), pooling="none")


@pytest.mark.parametrize("name", ["qwen2-vl", "projected"])
def test_all_tokens(zoo: Zoo, name: str) -> None:
    model = zoo.model(name).with_both(all_tokens)
    for _, prompt, embed in on_both_sides(model):
        states = model.reference.single_pass(*prompt, torch.empty(0, HIDDEN), "zero")
        close(embed(), unit(project(model, states) if name == "projected" else states))


# What a caller may choose


@pytest.mark.parametrize("head", ["causal", "feedback", "metaembed", "btoks", "colbert"])
def test_the_first_components_normalised_again(zoo: Zoo, head: str) -> None:
    model = zoo.model(QWEN).with_both(all_tokens) if head == "colbert" else zoo.under(QWEN, head)
    for _, _, embed in on_both_sides(model):
        full = embed()
        for dim in (1, 17, HIDDEN):
            expected = full[:, :dim] / np.linalg.norm(full[:, :dim], axis=-1, keepdims=True)
            close(embed(dim=dim), expected, 1e-6)
        close(embed(dim=HIDDEN), full, 1e-6)


@pytest.mark.parametrize("decode", ["single-pass", "loop"])
def test_the_first_components_of_states_side_by_side(zoo: Zoo, decode: Any) -> None:
    model = zoo.under(QWEN, "causal", 4).with_both(lambda side: replace(side, pooling="concat"))
    assert model.embedder.dim == 4 * HIDDEN
    for _, _, embed in on_both_sides(model):
        full = embed()
        assert full.shape == (1, 4 * HIDDEN)
        expected = full[:, :250] / np.linalg.norm(full[:, :250], axis=-1, keepdims=True)
        close(embed(dim=250, decode=decode), expected)


def test_a_dim_that_the_chosen_budget_does_not_have(zoo: Zoo) -> None:
    """States side by side are as long as the budget of the call makes them."""
    model = zoo.under(QWEN, "causal", 4).with_both(lambda side: replace(side, pooling="concat"))
    for _, _, embed in on_both_sides(model):
        with pytest.raises(CembedError, match=f"have {2 * HIDDEN}"):
            embed(2, dim=3 * HIDDEN)
        assert embed(8, dim=6 * HIDDEN).shape == (1, 6 * HIDDEN)


def merged(vectors: NDArray[np.float32], factor: int) -> NDArray[np.float64]:
    """Hierarchical clustering as in arXiv 2409.14683, from its definition."""
    distances = 1 - vectors @ vectors.T
    labels = fcluster(linkage(distances, "ward"), max(len(vectors) // factor, 1), "maxclust")
    means = [vectors[labels == label].astype(np.float64).mean(0) for label in range(1, labels.max() + 1)]
    return np.stack([mean / np.sqrt(mean @ mean) for mean in means])


@pytest.mark.parametrize("factor", [1, 2, 3, 5, 1000])
def test_pool_factor(zoo: Zoo, factor: int) -> None:
    embedder = zoo.model("qwen2-vl").with_both(all_tokens).embedder
    (full,) = embedder.embed_images([PAGE])
    (pooled,) = embedder.embed_images([PAGE], pool_factor=factor)
    assert len(pooled) <= max(len(full) // factor, 1)
    if factor == 1:
        assert np.array_equal(pooled, full)
    else:
        close(pooled, merged(full, factor).astype(np.float32), 1e-6)
    (short,) = embedder.embed_images([PAGE], pool_factor=factor, dim=20)
    cut = full[:, :20] / np.linalg.norm(full[:, :20], axis=-1, keepdims=True)
    close(short, merged(cut, factor).astype(np.float32) if factor > 1 else cut, 1e-5)


def test_pooling_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scipy", "scipy.cluster", "scipy.cluster.hierarchy"):
        monkeypatch.setitem(sys.modules, name, None)
    vectors = np.eye(4, dtype=np.float32)
    with pytest.raises(CembedError, match=r"scipy.*pip install"):
        pool_tokens(vectors, 2)
    assert np.array_equal(pool_tokens(vectors, 1), vectors)


@pytest.mark.parametrize("factor", [0, -1])
def test_a_pool_factor_below_one(zoo: Zoo, factor: int) -> None:
    embedder = zoo.model("qwen2-vl").with_both(all_tokens).embedder
    with pytest.raises(CembedError, match="pool_factor"):
        embedder.embed_images([PAGE], pool_factor=factor)


def test_decoding_that_a_head_does_not_have(zoo: Zoo) -> None:
    feedback, tokens = zoo.under(QWEN, "feedback"), zoo.model(QWEN).with_both(all_tokens)
    for _, _, embed in on_both_sides(feedback):
        with pytest.raises(CembedError, match="single pass"):
            embed(decode="single-pass")
    for _, _, embed in on_both_sides(tokens):
        with pytest.raises(CembedError, match="every token"):
            embed(decode="loop")
        with pytest.raises(CembedError, match="every token"):
            embed(2)


def test_budgets_beyond_the_learned_rows(zoo: Zoo) -> None:
    embedder = zoo.model(QWEN).embedder
    for start in (embedder.embed_images, lambda pages, n: embedder.start(pages[0], n)):
        with pytest.raises(CembedError, match="1 to 64"):
            start([PAGE], 65)
    with pytest.raises(CembedError, match="1 to 16"):
        embedder.embed_queries(["x"], 17)
    with pytest.raises(CembedError, match="1 to 16"):
        embedder.start_query("x", 17)


# Where heads come from


def plan(zoo: Zoo, backbone: str = "qwen2-vl", model: Path | None = None, **options: Any) -> ExportPlan:
    root = model or zoo.checkpoint(backbone)
    return ExportPlan.make(ExportOptions(backbone, str(root), **options), root)


@pytest.mark.parametrize("head", HEADS)
def test_named_heads_become_sides(zoo: Zoo, head: str) -> None:
    weights: dict[str, Any] = {"head_weights": zoo.head_weights()} if head in ("metaembed", "btoks") else {}
    if head == "colbert":
        with pytest.raises(CembedError, match="custom_text_proj"):
            plan(zoo, head=head)
        return
    made = plan(zoo, head=head, **weights)
    assert made.head == head
    if head == "single":
        assert {(side.slots, side.pooling, side.num_vectors) for side in (made.document, made.query)} == {
            ("all_tokens", "last", None)
        }
        return
    kinds = {"causal": "constant", "feedback": "feedback", "metaembed": "learned", "btoks": "learned"}
    for side, rows, count in ((made.document, (0, 64), 64), (made.query, (64, 16), 16)):
        learned = kinds[head] == "learned"
        assert side.slots == kinds[head]
        assert side.first_vector == ("slot" if learned else "prompt_end")
        assert side.slot_rows == (rows if learned else None)
        assert side.num_vectors == (count if learned else count // 2 if count == 64 else count)
        assert side.pooling == ("mean" if head == "btoks" else "none")
        assert (side.latent_token_id is not None) == (head == "causal")


def test_budgets_and_pooling_of_the_command_line(zoo: Zoo) -> None:
    weights = zoo.head_weights()
    made = plan(zoo, head="metaembed", head_weights=weights, num_vectors=9, query_vectors=2, pooling="last")
    assert (made.document.num_vectors, made.document.nested_budgets) == (9, (1, 4, 8))
    assert (made.query.num_vectors, made.query.nested_budgets) == (2, (1, 2))
    assert made.document.pooling == made.query.pooling == "last"
    assert plan(zoo, head="btoks", head_weights=weights, pooling="none").document.pooling == "none"
    with pytest.raises(CembedError, match="1 to 64"):
        plan(zoo, head="metaembed", head_weights=weights, num_vectors=65)


def test_states_of_all_tokens_are_not_put_side_by_side(zoo: Zoo) -> None:
    """Vectors would be as long as the page, and could be compared with no others."""
    weights = zoo.root / "projection-only.safetensors"
    head = zoo.head_weights(projected=True)
    tensors = {k: v for k, v in load_file(head).items() if k.startswith("custom_text_proj")}
    save_file(tensors, weights)
    assert plan(zoo, head_weights=weights).document.slots == "all_tokens"
    with pytest.raises(CembedError, match="concat"):
        plan(zoo, head_weights=weights, pooling="concat")


def test_rows_in_the_checkpoint_are_those_beside_it(zoo: Zoo) -> None:
    inside = plan(zoo, QWEN, zoo.with_rows(QWEN), head="metaembed")
    beside = plan(zoo, QWEN, head="metaembed", head_weights=zoo.head_weights())
    assert (inside.document, inside.query) == (beside.document, beside.query)
    for name in inside.slot_tables:
        assert torch.equal(inside.checkpoint.load(name), beside.checkpoint.load(name))
    assert zoo.model(QWEN).embedder.manifest.document == inside.document


def test_learned_rows_without_a_head(zoo: Zoo) -> None:
    for model, weights in ((zoo.with_rows(QWEN), None), (zoo.checkpoint(QWEN), zoo.head_weights())):
        with pytest.raises(CembedError, match=r"--head metaembed .* --head btoks"):
            plan(zoo, QWEN, model, head_weights=weights)


def table(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


DOCUMENT, QUERY = "slot_embeddings.document", "slot_embeddings.query"
WEIGHT, BIAS = "custom_text_proj.weight", "custom_text_proj.bias"


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({QUERY: table(4, HIDDEN)}, DOCUMENT),
        ({DOCUMENT: table(4, HIDDEN)}, QUERY),
        ({DOCUMENT: table(4, HIDDEN - 1), QUERY: table(4, HIDDEN)}, DOCUMENT),
        ({DOCUMENT: table(4, HIDDEN), QUERY: table(4, HIDDEN + 1)}, QUERY),
        ({DOCUMENT: table(4, HIDDEN), QUERY: table(HIDDEN)}, QUERY),
        ({DOCUMENT: table(HIDDEN), QUERY: table(4, HIDDEN)}, DOCUMENT),
        ({DOCUMENT: table(), QUERY: table(4, HIDDEN)}, DOCUMENT),
        ({DOCUMENT: table(4, 2, HIDDEN), QUERY: table(4, HIDDEN)}, DOCUMENT),
        ({DOCUMENT: table(4, HIDDEN), QUERY: table(4, HIDDEN), "slot_embeddings.answer": table(1)}, "answer"),
        ({DOCUMENT: table(4, HIDDEN), QUERY: table(4, HIDDEN), "something": table(1)}, "something"),
        ({DOCUMENT: table(4, HIDDEN), QUERY: table(4, HIDDEN), WEIGHT: table(8, HIDDEN)}, "custom_text_proj"),
        ({DOCUMENT: table(4, HIDDEN), QUERY: table(4, HIDDEN), BIAS: table(8)}, WEIGHT),
        ({DOCUMENT: table(4, HIDDEN), QUERY: table(4, HIDDEN), WEIGHT: table(8, HIDDEN), BIAS: table()}, BIAS),
        (
            {DOCUMENT: table(4, HIDDEN), QUERY: table(4, HIDDEN), "model.norm.weight": table(HIDDEN)},
            "model.norm.weight",
        ),
    ],
)
def test_head_weights_are_read_strictly(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: Tensors, named: str
) -> None:
    """Without tracing: whether the shape is checked before or after the graphs is the exporter's choice."""
    save_file(dict(tensors), tmp_path / "head.safetensors")
    monkeypatch.setattr(exporter, "write_graphs", lambda *_: ({}, ()))
    model = str(zoo.checkpoint("qwen2-vl"))
    options = ExportOptions("qwen2-vl", model, head="metaembed", head_weights=tmp_path / "head.safetensors")
    with pytest.raises(CembedError) as raised:
        exporter.export(options, tmp_path / "bundle")
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "bundle").exists()


def test_a_projection_of_another_width(zoo: Zoo, tmp_path: Path) -> None:
    rows = {DOCUMENT: table(4, HIDDEN), QUERY: table(4, HIDDEN)}
    save_file(rows | {WEIGHT: table(8, HIDDEN - 1), BIAS: table(8)}, tmp_path / "head.safetensors")
    with pytest.raises(CembedError, match=rf"{WEIGHT} has shape \(8, {HIDDEN - 1}\): \[8, {HIDDEN}\] is needed"):
        plan(zoo, head="metaembed", head_weights=tmp_path / "head.safetensors")


def test_the_same_weight_in_both(zoo: Zoo) -> None:
    with pytest.raises(CembedError, match=r"slot_embeddings\.\w+ and slot_embeddings\.\w+ are the same weight"):
        plan(zoo, QWEN, zoo.with_rows(QWEN), head="metaembed", head_weights=zoo.head_weights())


def test_head_weights_that_the_head_does_not_use(zoo: Zoo) -> None:
    with pytest.raises(CembedError, match=r"unexpected slot_embeddings\.document, slot_embeddings\.query"):
        plan(zoo, head="causal", head_weights=zoo.head_weights())


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x08\0\0\0\0\0\0\0{}      "])
def test_head_weights_that_are_no_safetensors(zoo: Zoo, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "head.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CembedError, match=r"head\.safetensors|slot_embeddings\.document") as raised:
        plan(zoo, head="metaembed", head_weights=path)
    assert "\n" not in str(raised.value)


def test_fewer_rows_make_fewer_vectors(zoo: Zoo, tmp_path: Path) -> None:
    save_file({DOCUMENT: table(8, HIDDEN), QUERY: table(2, HIDDEN)}, tmp_path / "head.safetensors")
    made = plan(zoo, head="metaembed", head_weights=tmp_path / "head.safetensors")
    assert (made.document.num_vectors, made.document.nested_budgets) == (8, (1, 4, 8))
    assert (made.query.num_vectors, made.query.nested_budgets, made.query.slot_rows) == (2, (1, 2), (8, 2))


CONSTANT = {"slots": "constant", "num_vectors": 4}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing"),
        ("{", "JSON"),
        ("\udcff", "JSON"),
        ("[" * 100_000, "JSON"),
        ([], "object"),
        (None, "spec.json"),
        ({"document": CONSTANT}, "missing fields: query"),
        ({"document": CONSTANT, "query": CONSTANT, "answer": CONSTANT}, "unknown fields: answer"),
        ({"document": CONSTANT, "query": CONSTANT | {"budget": 3}}, r"query has unknown fields: budget"),
        ({"document": CONSTANT, "query": CONSTANT | {"latent_token_id": 3}}, "unknown fields: latent_token_id"),
        ({"document": CONSTANT, "query": CONSTANT | {"slot_rows": [0, 3]}}, "unknown fields: slot_rows"),
        ({"document": {"num_vectors": 4}, "query": CONSTANT}, "document has missing fields: slots"),
        ({"document": CONSTANT | {"slots": "random"}, "query": CONSTANT}, "document.slots is 'random'"),
        ({"document": CONSTANT | {"pooling": "max"}, "query": CONSTANT}, "document.pooling is 'max'"),
        ({"document": CONSTANT | {"first_vector": "end"}, "query": CONSTANT}, "first_vector is 'end'"),
        ({"document": CONSTANT | {"slot_positions": "one"}, "query": CONSTANT}, "slot_positions"),
        ({"document": CONSTANT | {"num_vectors": "4"}, "query": CONSTANT}, "num_vectors is '4'"),
        ({"document": CONSTANT | {"num_vectors": 4.5}, "query": CONSTANT}, "num_vectors is 4.5"),
        ({"document": CONSTANT | {"num_vectors": True}, "query": CONSTANT}, "num_vectors is True"),
        ({"document": CONSTANT | {"num_vectors": 0}, "query": CONSTANT}, "at least 1"),
        ({"document": CONSTANT | {"num_vectors": None}, "query": CONSTANT}, "num_vectors None"),
        ({"document": CONSTANT | {"nested_budgets": 3}, "query": CONSTANT}, "nested_budgets is 3"),
        ({"document": CONSTANT | {"prompt": "no place"}, "query": CONSTANT}, "{image} exactly once"),
        ({"document": CONSTANT | {"prompt": ""}, "query": CONSTANT}, "{image} exactly once"),
        ({"document": CONSTANT, "query": CONSTANT | {"prompt": "{text}{text}"}}, "{text} exactly once"),
        ({"document": {"slots": "all_tokens", "num_vectors": 4}, "query": CONSTANT}, "all_tokens"),
        ({"document": {"slots": "learned"}, "query": CONSTANT}, "slot_embeddings.document"),
        ({"document": CONSTANT | {"slots": "feedback", "first_vector": "slot"}, "query": CONSTANT}, "feedback"),
    ],
)
def test_mistakes_in_a_spec(zoo: Zoo, tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "spec.json"
    if isinstance(content, str):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    elif content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(CembedError) as raised:
        plan(zoo, head_spec=path)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_only_the_kind_of_slots_is_required(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    for kind in get_args(SlotKind):
        path.write_text(json.dumps({"document": {"slots": kind}, "query": {"slots": kind}}))
        assert read_head(path).document == HeadSide(kind)


def test_a_head_and_a_spec(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(CembedError, match="give one of them"):
        plan(zoo, head="causal", head_spec=tmp_path / "spec.json")


def test_a_bundle_of_feedback_needs_no_latent_token(zoo: Zoo) -> None:
    made = plan(zoo, head="feedback", latent_token="<|nothing|>")
    assert [spec.name for spec in made.graphs] == ["vision", "text_step"]
    with pytest.raises(CembedError, match="--latent-token"):
        plan(zoo, head="causal", latent_token="<|nothing|>")


def test_a_reloaded_bundle_is_the_same(zoo: Zoo) -> None:
    """What the tests above change in memory is not what makes their bundles work."""
    model = zoo.model("projected")
    embedder = Embedder.load(model.bundle, threads=1)
    assert np.array_equal(embedder.embed_image(PAGE), model.embedder.embed_image(PAGE))
    assert np.array_equal(embedder.embed_query(TEXT), model.embedder.embed_query(TEXT))

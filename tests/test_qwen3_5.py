"""Qwen3.5: states of fixed size beside caches, in the loop, in files, and in every target's graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from conftest import GOLDEN
from numpy.typing import NDArray
from PIL import Image
from reference import Model, Reference, Zoo
from row_products import overflows
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors

from cembed.export.exporter import export
from cembed.export.plan import ExportOptions
from cembed.quantize.graph import SourceGraph
from cembed.quantize.plan import QuantiseOptions
from cembed.quantize.quantizer import quantise
from cembed.runtime import CembedError, Embedder
from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.graph_tensors import grows, is_past, is_present, state_tensors
from cembed.runtime.bundle.manifest import Side, SlotKind, SlotPositions
from cembed.runtime.embed.embedder import Budget
from cembed.runtime.embed.pooling import normalise
from cembed.runtime.embed.state_files import digest
from cembed.runtime.engines.session import EngineSettings

Exported = Callable[[ExportOptions], Path]
CHECKPOINT = GOLDEN / "colqwen3_5"
ROUNDING = 2e-4  # of two orders of sums: this checkpoint's own float32 is 4e-5 from its float64
KINDS: tuple[SlotKind, ...] = ("constant", "learned", "feedback")
TEXT = "source code form of the work"
TEXTS = [TEXT, "x", "a longer query, with many more words than the others have: " * 4, "7 8"]


def page(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


PAGES = [page(90, 150, 1), page(30, 70, 2), page(300, 60, 3)]


def close(actual: NDArray[np.float32], expected: NDArray[np.float32], atol: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def options(zoo: Zoo, **fields: Any) -> ExportOptions:
    """The golden checkpoint with learned rows, and the projection it has anyway."""
    return ExportOptions("qwen3.5", str(CHECKPOINT), head="metaembed", head_weights=zoo.head_weights(), **fields)


@pytest.fixture(scope="module")
def model(zoo: Zoo, exported: Exported) -> Model:
    bundle = exported(options(zoo))
    reference = Reference(CHECKPOINT)
    weights = load_tensors(zoo.head_weights()) | load_tensors(CHECKPOINT / "model.safetensors")
    return Model(bundle, Embedder(Bundle(bundle), EngineSettings(threads=1)), reference, weights)


def under(model: Model, kind: SlotKind, policy: SlotPositions = "continue") -> Model:
    """The bundle with slots of one kind on both sides."""
    latent = json.loads((CHECKPOINT / "config.json").read_text())["video_token_id"]

    def change(side: Side) -> Side:
        learned = kind == "learned"
        return replace(
            side,
            slots=kind,
            slot_positions=policy,
            first_vector="slot" if learned else "prompt_end",
            num_vectors=16 if learned else 12,
            slot_rows=side.slot_rows if learned else None,
            nested_budgets=(),
            latent_token_id=latent if kind == "constant" else None,
        )

    return model.with_both(change)


def projected(model: Model, hidden: torch.Tensor) -> NDArray[np.float32]:
    weight, bias = (model.head[f"custom_text_proj.{name}"] for name in ("weight", "bias"))
    return normalise((hidden @ weight.T + bias).numpy())


# Against transformers


@pytest.mark.parametrize("policy", get_args(SlotPositions))
@pytest.mark.parametrize("kind", KINDS)
def test_slots_equal_those_of_transformers(model: Model, kind: SlotKind, policy: SlotPositions) -> None:
    """Its own cache for slots that are fed back; else one pass without a cache."""
    slotted, reference = under(model, kind, policy), model.reference
    latent = reference.embeddings(np.array([599]))[0].expand(7, -1)
    for (embeds, positions), side, vectors in (
        (slotted.document(PAGES[0]), "document", slotted.embedder.embed_image(PAGES[0], Budget(8, decode="loop"))),
        (slotted.query(TEXT), "query", slotted.embedder.embed_query(TEXT, Budget(8, decode="loop"))),
    ):
        if kind == "feedback":
            expected = reference.feedback(embeds, positions, 8, policy)
        else:
            rows = latent if kind == "constant" else slotted.rows(side, 8)
            expected = reference.single_pass(embeds, positions, rows, policy)[-8:]
        close(vectors, projected(model, expected), ROUNDING)


# The loop is the single pass


@pytest.mark.parametrize("policy", get_args(SlotPositions))
@pytest.mark.parametrize("kind", ["constant", "learned"])
def test_the_loop_equals_the_single_pass(model: Model, kind: SlotKind, policy: SlotPositions) -> None:
    embedder = under(model, kind, policy).embedder
    for budget in (1, 2, 5, 12):
        single, loop = (embedder.embed_images(PAGES, budget, decode=how) for how in ("single-pass", "loop"))
        for a, b in zip(single, loop, strict=True):
            close(b, a, 1e-5)
        single, loop = (embedder.embed_queries(TEXTS, budget, decode=how) for how in ("single-pass", "loop"))
        for a, b in zip(single, loop, strict=True):
            close(b, a, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_mates_and_budgets_change_nothing(model: Model, kind: SlotKind) -> None:
    embedder = under(model, kind).embedder
    batch = embedder.embed_images(PAGES, 10, decode="loop")
    for image, vectors in zip(PAGES, batch, strict=True):
        for budget in (1, 4, 10):
            alone = embedder.embed_images([image], budget, decode="loop")[0]
            assert np.array_equal(alone, vectors[:budget])


@pytest.mark.parametrize("kind", KINDS)
def test_growing_and_resuming_equal_all_at_once(model: Model, tmp_path: Path, kind: SlotKind) -> None:
    """After odd and even numbers of steps: states have two buffers."""
    embedder, path = under(model, kind).embedder, tmp_path / "state.safetensors"
    at_once = embedder.embed_image(PAGES[0], Budget(12, decode="loop"))
    state = embedder.start(PAGES[0], 12)
    for budget in (1, 2, 3, 6, 11):
        assert np.array_equal(state.extend(budget), at_once[:budget])
        state.save(path)
        resumed = embedder.resume(path, 12)
        assert np.array_equal(resumed.extend(budget), at_once[:budget])
        assert np.array_equal(resumed.extend(12), at_once)
        resumed = embedder.resume(path, 12)
        resumed.save(tmp_path / "again.safetensors")
        saved, again = load_file(path), load_file(tmp_path / "again.safetensors")
        assert saved.keys() == again.keys()
        assert all(np.array_equal(saved[name], again[name]) for name in saved)
    assert np.array_equal(state.extend(12), at_once)


def test_a_step_that_failed_is_not_half_done(model: Model) -> None:
    embedder = under(model, "feedback").embedder
    expected = embedder.embed_query(TEXT, Budget(5))
    state = embedder.start_query(TEXT, 20)
    state.extend(2)
    hidden = state.hidden
    state.hidden = hidden[:, :-1]  # type: ignore[index]
    with pytest.raises(CembedError, match="ONNX Runtime failed"):
        state.extend(3)
    state.hidden = hidden
    assert np.array_equal(state.extend(5), expected)


def test_states_and_caches_are_counted(model: Model) -> None:
    state = under(model, "feedback").embedder.start_query(TEXT, 5)
    buffers = state.cache.buffers
    assert sorted({name.split(".")[2] for name in buffers}) == ["conv", "key", "recurrent", "value"]
    assert state.nbytes == sum(array.nbytes * (1 if grows(name) else 2) for name, array in buffers.items())
    twice = under(model, "feedback").embedder.start_query(TEXT, 64)
    assert all(buffers[name].shape == twice.cache.buffers[name].shape for name in buffers if not grows(name))


# Files of states

STATE = "past_states.0.recurrent"


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.pop(name)


def changed(name: str, new: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.update({name: np.ascontiguousarray(new(arrays[name]))})


def broken(array: Any) -> Any:
    array = array.copy()
    array.flat[3] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(STATE), f"{STATE} is missing"),
        (without("past_states.2.conv"), "past_states.2.conv is missing"),
        (changed(STATE, lambda a: a[:, :, :-1]), STATE),
        (changed(STATE, lambda a: a.astype(np.float16)), "F16"),
        (changed(STATE, broken), f"{STATE} has NaN"),
        (changed(STATE, lambda a: np.concatenate([a, a])), STATE),
        (without("past_key_values.3.key"), "past_key_values.3.key is missing"),
    ],
)
def test_forged_states_are_refused(model: Model, tmp_path: Path, change: Any, words: str) -> None:
    embedder, path = under(model, "feedback").embedder, tmp_path / "state.safetensors"
    state = embedder.start_query(TEXT, 6)
    state.extend(3)
    state.save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = dict(file.metadata())
    arrays = load_file(path)
    change(arrays)
    metadata["sha256"] = digest(arrays, {name: metadata[name] for name in metadata if name != "sha256"})
    save_file(arrays, path, metadata)
    with pytest.raises(CembedError, match="damaged state") as raised:
        embedder.resume(path)
    assert words in str(raised.value)


# Other targets


@pytest.mark.parametrize(("target", "opset"), [("onnx", 20), ("tensorrt", 24)])
def test_other_targets_give_the_same_vectors(
    model: Model, zoo: Zoo, exported: Exported, target: str, opset: int
) -> None:
    bundle = exported(options(zoo, target=target, opset=opset))
    for path in bundle.glob("*.onnx"):
        graph = onnx.load(str(path), load_external_data=False)
        assert {node.domain for node in graph.graph.node} == {""}
        assert b"/cembed/" not in path.read_bytes()
    other = replace(model, embedder=Embedder(Bundle(bundle), EngineSettings(threads=1)))
    for kind in KINDS:
        mine, theirs = under(model, kind).embedder, under(other, kind).embedder
        for decode in ("loop",) if kind == "feedback" else ("single-pass", "loop"):
            budget = Budget(
                4 if kind == "feedback" else 9, decode=decode
            )  # what is fed back is rounded again and again
            close(theirs.embed_image(PAGES[0], budget), mine.embed_image(PAGES[0], budget), ROUNDING)
            close(theirs.embed_query(TEXT, budget), mine.embed_query(TEXT, budget), ROUNDING)


def test_half_floats(model: Model, zoo: Zoo, exported: Exported) -> None:
    """States stay in float32."""
    embedder = Embedder(Bundle(exported(options(zoo, dtype="fp16"))), EngineSettings(threads=1))
    kept = {t.name: t.dtype for t in state_tensors(embedder.manifest.graphs["text_step"])}
    assert {dtype for name, dtype in kept.items() if not grows(name)} == {"float32"}
    assert {dtype for name, dtype in kept.items() if grows(name)} == {"float16"}
    close(embedder.embed_query(TEXT, Budget(8)), under(model, "learned").embedder.embed_query(TEXT, Budget(8)), 5e-2)
    close(embedder.embed_query(TEXT, Budget(8, decode="loop")), embedder.embed_query(TEXT, Budget(8)), 5e-2)


def test_an_onnxruntime_without_the_operator_is_told(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What 1.25 says of it, word for word."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Fatal error: com.microsoft:LinearAttention(-1) is not a registered function/op")

    monkeypatch.setattr("cembed.runtime.engines.session.ort.InferenceSession", fail)
    with pytest.raises(CembedError, match=r"LinearAttention.*upgrade it, or export with --target onnx"):
        Embedder(Bundle(model.bundle), EngineSettings()).embed_query(TEXT)


# Configurations


def edited(root: Path, section: str | None, **fields: Any) -> Path:
    shutil.copytree(CHECKPOINT, root)
    config = json.loads((root / "config.json").read_text())
    place = config
    for part in (section or "").split("."):
        place = place[part] if part else place
    place.update(fields)
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        ("text_config", {"attention_bias": True}, "attention_bias is True"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("text_config", {"attn_output_gate": False}, "attn_output_gate is False"),
        ("text_config", {"layer_types": 4 * ["linear_attention"]}, "layer_types"),
        ("text_config", {"layer_types": [*3 * ["linear_attention"], "sliding_attention"]}, "layer_types"),
        ("text_config", {"layer_types": ["full_attention"]}, "layer_types"),
        ("text_config", {"linear_num_value_heads": 6}, "linear_num_value_heads is 6"),
        ("text_config", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1"),
        ("text_config", {"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ("text_config.rope_parameters", {"rope_type": "yarn", "factor": 4.0}, "rope"),
        ("text_config.rope_parameters", {"mrope_interleaved": False}, "mrope_interleaved is False"),
        ("text_config.rope_parameters", {"mrope_section": [1, 1, 1]}, "mrope_section"),
        ("text_config.rope_parameters", {"mrope_section": [1, 2, 1]}, "mrope_section"),
        ("text_config.rope_parameters", {"partial_rotary_factor": 0.1}, "partial_rotary_factor is 0.1"),
        ("text_config.rope_parameters", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ("vision_config", {"num_position_embeddings": 60}, "num_position_embeddings is 60"),
        ("vision_config", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ("vision_config", {"in_channels": 1}, "in_channels is 1"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, section: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(CembedError) as raised:
        export(ExportOptions("qwen3.5", str(edited(tmp_path / "model", section, **fields))), tmp_path / "out")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_the_first_layers_must_attend_somewhere(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(CembedError, match="--num-layers 3: none of these layers attends"):
        export(options(zoo, num_layers=3), tmp_path / "out")


# Quantised bundles

KEPT = ("in_proj_a.weight", "in_proj_b.weight", "conv1d.weight", "A_log", "dt_bias")


@pytest.mark.parametrize(
    ("scheme", "rounding", "cosine"),
    [("int8", "nearest", 0.98), ("int4", "gptq", 0.6), ("w8a8", "nearest", 0.85), ("fp16", "nearest", 0.995)],
)
def test_quantised_bundles_recur_in_float(
    model: Model, tmp_path: Path, scheme: str, rounding: str, cosine: float
) -> None:
    quantise(model.bundle, QuantiseOptions(scheme, rounding=rounding, accept_loss=True), tmp_path / "small")
    other = replace(model, embedder=Embedder(Bundle(tmp_path / "small"), EngineSettings(threads=1)))
    for kind in KINDS[:2]:  # slots that are fed back would show the loss many times over
        mine, theirs = under(model, kind).embedder, under(other, kind).embedder
        expected = mine.embed_image(PAGES[0], Budget(9))
        for decode in ("loop", "single-pass"):
            found = theirs.embed_image(PAGES[0], Budget(9, decode=decode))
            loss = 1 - np.median((found * expected).sum(axis=1))  # random weights magnify rounding for some
            assert loss < (1 - cosine) * (2 if overflows() else 1)
    for graph in ("text", "text_step"):
        source = SourceGraph(Bundle(tmp_path / "small").graph_path(graph))
        stored = {name: tensor.data_type for name, tensor in source.initializers.items()}
        for layer in range(3):
            for name in KEPT:
                assert stored[f"layers.{layer}.linear_attn.{name}"] == onnx.TensorProto.FLOAT
        values = [*source.model.graph.input, *source.model.graph.output]
        states = [v for v in values if (is_past(v.name) or is_present(v.name)) and not grows(v.name)]
        assert all(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for value in states)
        assert len(states) == (12 if graph == "text_step" else 0)


def test_the_gate_of_quantisation_works_on_it(model: Model, tmp_path: Path) -> None:
    with pytest.raises(CembedError, match="cosine"):
        quantise(model.bundle, QuantiseOptions("int4", min_cosine=0.9999), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    quantise(model.bundle, QuantiseOptions("int4", min_cosine=0.99, mixed=True), tmp_path / "mixed")
    report = Bundle(tmp_path / "mixed").manifest.quantisation
    assert report is not None
    assert report.comparison.min_cosine >= 0.99

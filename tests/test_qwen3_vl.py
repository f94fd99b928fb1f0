"""Qwen3-VL: features of images in several layers, in the loop, in every target's graphs and in quantised bundles.

`test_latent.py` and `test_heads.py` compare its slots with transformers, on a checkpoint without a projection.
"""

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
from conftest import GOLDEN
from numpy.typing import NDArray
from PIL import Image
from reference import Zoo

from cembed.export.backbones import load_backbone
from cembed.export.exporter import export
from cembed.export.plan import ExportOptions
from cembed.quantize.plan import QuantiseOptions
from cembed.quantize.quantizer import quantise
from cembed.runtime import CembedError, Embedder
from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.manifest import Side, SlotKind, SlotPositions
from cembed.runtime.embed.embedder import Budget
from cembed.runtime.engines.session import EngineSettings

Exported = Callable[[ExportOptions], Path]
CHECKPOINT = GOLDEN / "colqwen3"
HIDDEN, LAYERS = 96, 3
KINDS: tuple[SlotKind, ...] = ("constant", "learned", "feedback")
TEXT = "source code form of the work"


def page(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


PAGES = [page(90, 150, 1), page(30, 70, 2), page(300, 60, 3)]


def close(actual: NDArray[np.float32], expected: NDArray[np.float32], atol: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def options(zoo: Zoo, **fields: Any) -> ExportOptions:
    """The golden checkpoint with learned rows, and the projection it has anyway."""
    return ExportOptions("qwen3-vl", str(CHECKPOINT), head="metaembed", head_weights=zoo.head_weights(), **fields)


def opened(bundle: Path, kind: SlotKind | None = None, policy: SlotPositions = "continue") -> Embedder:
    """The bundle, with slots of one kind on both sides."""
    loaded = Bundle(bundle)
    latent = json.loads((CHECKPOINT / "config.json").read_text())["video_token_id"]

    def change(side: Side) -> Side:
        learned = kind == "learned"
        return replace(
            side,
            slots=kind or side.slots,
            slot_positions=policy,
            first_vector="slot" if learned else "prompt_end",
            num_vectors=16 if learned else 12,
            slot_rows=side.slot_rows if learned else None,
            nested_budgets=(),
            latent_token_id=latent if kind == "constant" else None,
        )

    if kind is not None:
        manifest = loaded.manifest
        loaded.manifest = replace(manifest, document=change(manifest.document), query=change(manifest.query))
    return Embedder(loaded, EngineSettings(threads=1))


@pytest.fixture(scope="module")
def bundle(zoo: Zoo, exported: Exported) -> Path:
    return exported(options(zoo))


# What positions are fed


def test_only_images_have_features_for_the_first_layers(bundle: Path) -> None:
    embedder = opened(bundle)
    prompt, query = embedder.inputs.document(PAGES[0]), embedder.inputs.query(TEXT)
    ids = embedder.inputs.prompter.document(
        embedder.manifest.document.prompt, int(np.abs(prompt.rows["deepstack_embeds"]).any(axis=1).sum())
    )
    is_image = ids == embedder.manifest.image_token_id
    assert prompt.rows["deepstack_embeds"].shape == (len(ids), LAYERS * HIDDEN)
    assert np.array_equal(np.abs(prompt.rows["deepstack_embeds"]).any(axis=1), is_image)
    assert query.rows["deepstack_embeds"].shape == (len(query), LAYERS * HIDDEN)
    assert not query.rows["deepstack_embeds"].any()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_each_layer_takes_its_own(bundle: Path, layer: int) -> None:
    """Or a lost layer would show in the golden vectors only."""
    embedder = opened(bundle)
    prompt = embedder.inputs.document(PAGES[0])
    before = embedder.embed_prompt("document", prompt)
    prompt.rows["deepstack_embeds"][:, layer * HIDDEN : (layer + 1) * HIDDEN] = 0
    assert np.abs(embedder.embed_prompt("document", prompt) - before).max() > 1e-3


# The loop


@pytest.mark.parametrize("policy", get_args(SlotPositions))
@pytest.mark.parametrize("kind", ["constant", "learned"])
def test_the_loop_equals_the_single_pass(bundle: Path, kind: SlotKind, policy: SlotPositions) -> None:
    embedder = opened(bundle, kind, policy)
    for budget in (1, 2, 5, 12):
        for image in PAGES:
            single, loop = (embedder.embed_image(image, Budget(budget, decode=how)) for how in ("single-pass", "loop"))
            close(loop, single, 1e-5)
        single, loop = (embedder.embed_query(TEXT, Budget(budget, decode=how)) for how in ("single-pass", "loop"))
        close(loop, single, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_growing_resuming_and_mates_equal_all_at_once(bundle: Path, tmp_path: Path, kind: SlotKind) -> None:
    embedder, path = opened(bundle, kind), tmp_path / "state.safetensors"
    batch = embedder.embed_images(PAGES, 12, decode="loop")
    state = embedder.start(PAGES[0], 12)
    for budget in (1, 2, 6, 11):
        assert np.array_equal(state.extend(budget), batch[0][:budget])
        state.save(path)
        assert np.array_equal(embedder.resume(path, 12).extend(12), batch[0])
    for image, vectors in zip(PAGES, batch, strict=True):
        assert np.array_equal(embedder.embed_image(image, Budget(12, decode="loop")), vectors)


# Targets and types


@pytest.mark.parametrize(("target", "opset"), [("onnx", 20), ("tensorrt", 24)])
def test_other_targets_give_the_same_vectors(
    bundle: Path, zoo: Zoo, exported: Exported, target: str, opset: int
) -> None:
    other = exported(options(zoo, target=target, opset=opset))
    for path in other.glob("*.onnx"):
        assert {node.domain for node in onnx.load(str(path), load_external_data=False).graph.node} == {""}
    for kind in KINDS:
        mine, theirs = opened(bundle, kind), opened(other, kind)
        for decode in ("loop",) if kind == "feedback" else ("single-pass", "loop"):
            budget = Budget(9, decode=decode)
            close(theirs.embed_image(PAGES[0], budget), mine.embed_image(PAGES[0], budget), 1e-5)
            close(theirs.embed_query(TEXT, budget), mine.embed_query(TEXT, budget), 1e-5)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_first_layers_take_what_is_theirs(bundle: Path, zoo: Zoo, tmp_path: Path, num_layers: int) -> None:
    """The last one too, of which only the slots go on; the export has compared it with torch."""
    export(options(zoo, num_layers=num_layers), tmp_path / "out")
    embedder = opened(tmp_path / "out")
    prompt = embedder.inputs.document(PAGES[0])
    before = embedder.embed_prompt("document", prompt, Budget(4, decode="loop"))
    close(embedder.embed_prompt("document", prompt, Budget(4)), before, 1e-5)
    prompt.rows["deepstack_embeds"][:, num_layers * HIDDEN :] = 7  # of layers that are not there
    assert np.array_equal(embedder.embed_prompt("document", prompt, Budget(4, decode="loop")), before)


@pytest.mark.parametrize(("scheme", "cosine"), [("int8", 0.99), ("w8a8", 0.9), ("fp16", 0.999)])
def test_quantised_bundles(bundle: Path, tmp_path: Path, scheme: str, cosine: float) -> None:
    """Where slots are fed back, what 8 bits lose grows from one to the next."""
    quantise(bundle, QuantiseOptions(scheme, accept_loss=True), tmp_path / "small")
    for kind in KINDS:
        mine, theirs = opened(bundle, kind), opened(tmp_path / "small", kind)
        budget = Budget(9, decode="loop")
        loop = theirs.embed_image(PAGES[0], budget)
        same = (loop * mine.embed_image(PAGES[0], budget)).sum(axis=1)
        assert same[: 1 if kind == "feedback" else None].min() > cosine
        if kind != "feedback":
            assert (loop * theirs.embed_image(PAGES[0], Budget(9))).sum(axis=1).min() > cosine


# Configurations


def edited(root: Path, section: str, **fields: Any) -> Path:
    """A copy of the checkpoint with other settings, None for those that are not there."""
    shutil.copytree(CHECKPOINT, root)
    config = json.loads((root / "config.json").read_text())
    place = config
    for part in section.split("."):
        place = place[part]
    place.update(fields)
    for name in [name for name, value in place.items() if value is None]:
        del place[name]
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        ("text_config", {"attention_bias": True}, "attention_bias is True"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("text_config", {"head_dim": 15}, "head_dim"),
        ("text_config", {"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        ("text_config.rope_parameters", {"rope_type": "yarn", "factor": 4.0}, "rope_type is 'yarn'"),
        ("text_config.rope_parameters", {"mrope_interleaved": False}, "mrope_interleaved is False"),
        ("text_config.rope_parameters", {"mrope_section": [4, 4]}, "mrope_section"),
        ("text_config.rope_parameters", {"mrope_section": [2, 2, 2]}, "mrope_section"),
        ("text_config.rope_parameters", {"mrope_section": [0, 4, 4]}, "mrope_section"),
        ("text_config.rope_parameters", {"mrope_section": [1, 4, 3]}, "mrope_section"),
        ("text_config.rope_parameters", {"mrope_section": None}, "mrope_section is missing"),
        ("vision_config", {"deepstack_visual_indexes": [0, 2, 1]}, "deepstack_visual_indexes"),
        ("vision_config", {"deepstack_visual_indexes": [0, 0, 1]}, "deepstack_visual_indexes"),
        ("vision_config", {"deepstack_visual_indexes": [0, 1, 4]}, "deepstack_visual_indexes"),
        ("vision_config", {"deepstack_visual_indexes": [0, 1, -1]}, "deepstack_visual_indexes"),
        ("vision_config", {"deepstack_visual_indexes": [0, 1, 2, 3, 4], "depth": 5}, "up to 4 growing numbers"),
        ("vision_config", {"num_position_embeddings": 60}, "num_position_embeddings is 60"),
        ("vision_config", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ("vision_config", {"in_channels": 1}, "in_channels is 1"),
        ("vision_config", {"num_heads": 5}, "num_heads is 5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, section: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(CembedError) as raised:
        export(ExportOptions("qwen3-vl", str(edited(tmp_path / "model", section, **fields))), tmp_path / "out")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_switch_that_transformers_does_not_read_need_not_be_there(tmp_path: Path) -> None:
    root = edited(tmp_path / "model", "text_config.rope_parameters", mrope_interleaved=None)
    assert load_backbone("qwen3-vl", root).decoder == load_backbone("qwen3-vl", CHECKPOINT).decoder


def test_no_layer_need_take_features(tmp_path: Path) -> None:
    backbone = load_backbone("qwen3-vl", edited(tmp_path / "model", "vision_config", deepstack_visual_indexes=[]))
    assert backbone.deepstack == 0

"""Names of weights as colpali-engine and transformers have written them over time: all mean the same tensors.

Each row was read off a checkpoint that the peer itself had saved; their vectors were compared with the bundle's then.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

from cembed.export.checkpoint import Checkpoint
from cembed.export.plan import ExportOptions, ExportPlan
from cembed.runtime import CembedError

Names = dict[str, str]


@dataclass(frozen=True)
class Layout:
    """A golden checkpoint, and what stands in place of its own prefixes; the first that fits counts."""

    golden: str
    names: Names


SAME: Names = {"": ""}
LAYOUTS = {
    "ColQwen2, 0.3.8 and 0.3.13": Layout("colqwen2", SAME),
    "ColQwen2, 0.3.18": Layout("colqwen2", {"model.": "language_model."}),
    "ColQwen2.5, 0.3.13": Layout("colqwen2_5", SAME),
    "ColQwen2.5, 0.3.18": Layout("colqwen2_5", {"model.": "language_model."}),
    "ColPali, 0.3.8 and 0.3.13": Layout("colpali", SAME),
    "ColPali, 0.3.18": Layout("colpali", {"model.vision_tower.vision_model.": "model.vision_tower."}),
    "ColIdefics3": Layout("colidefics3", SAME),
    "ColQwen2ForRetrieval, transformers 4.57": Layout(
        "colqwen2",
        {
            "model.": "vlm.model.language_model.",
            "visual.": "vlm.model.visual.",
            "custom_text_proj.": "embedding_proj_layer.",
        },
    ),
    "ColQwen2ForRetrieval, transformers 5.24": Layout(
        "colqwen2",
        {"model.": "vlm.language_model.", "visual.": "vlm.visual.", "custom_text_proj.": "embedding_proj_layer."},
    ),
    "ColPaliForRetrieval, transformers 4.57": Layout(
        "colpali", {"model.": "vlm.", "custom_text_proj.": "embedding_proj_layer."}
    ),
    "ColPaliForRetrieval, transformers 5.24": Layout(
        "colpali",
        {
            "model.language_model.model.": "vlm.language_model.",
            "model.vision_tower.vision_model.": "vlm.vision_tower.",
            "model.": "vlm.",
            "custom_text_proj.": "embedding_proj_layer.",
        },
    ),
    "ColQwen3, 0.3.18": Layout("colqwen3", SAME),
    "ColQwen3, without its class": Layout("colqwen3", {"model.": ""}),
}
ADAPTERS = {
    "ColQwen2, 0.3.8": ("colqwen2", "base_model.model.model."),
    "ColQwen2, 0.3.13 and 0.3.18": ("colqwen2", "base_model.model.language_model."),
    "ColQwen2ForRetrieval": ("colqwen2", "base_model.model.vlm.language_model."),
    "ColPali, 0.3.8": ("colpali", "base_model.model.model.language_model.model."),
    "ColPali, 0.3.13 and 0.3.18": ("colpali", "base_model.model.model.model.language_model."),
    "ColIdefics3": ("colidefics3", "base_model.model.model.text_model."),
    "ColModernVBert": ("colmodernvbert", "base_model.model.model.text_model."),
    "ColQwen3": ("colqwen3", "base_model.model.language_model."),
    "ColQwen3.5": ("colqwen3_5", "base_model.model.language_model."),
}
"""A golden checkpoint, and what stands before the names of its decoder's layers."""


def renamed(key: str, names: Names) -> str:
    return next((new + key.removeprefix(old) for old, new in names.items() if key.startswith(old)), key)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_all_names_mean_the_same_weights(tmp_path: Path, layout: Layout) -> None:
    weights = load_file(GOLDEN / layout.golden / "model.safetensors")
    save_file({renamed(key, layout.names): tensor for key, tensor in weights.items()}, tmp_path / "model.safetensors")
    expected, found = Checkpoint.open(GOLDEN / layout.golden, None), Checkpoint.open(tmp_path, None)
    assert found.unused == expected.unused
    assert all(torch.equal(found.load(name), expected.load(name)) for name in sorted(found.unused))


@pytest.mark.parametrize(("golden", "prefix"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_are_merged_under_all_names(tmp_path: Path, golden: str, prefix: str) -> None:
    """A pair for a weight of the decoder, and one for the projection."""
    base = Checkpoint.open(GOLDEN / golden, None)
    names = {"custom_text_proj.weight", next(n for n in sorted(base.unused) if n.startswith("layers.") and "mlp" in n)}
    pairs, expected = {}, {}
    for name in names:
        rows, columns = base.shape(name)
        a, b = torch.randn(4, columns), torch.randn(rows, 4)
        key = "base_model.model." + name if name.startswith("custom") else prefix + name
        pairs |= {key.replace(".weight", f".lora_{half}.weight"): t for half, t in (("A", a), ("B", b))}
        expected[name] = base.load(name) + 2 * b @ a
    save_file(pairs, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    merged = Checkpoint.open(GOLDEN / golden, tmp_path)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged.load(name), tensor, rtol=0, atol=1e-5)


def test_a_layout_that_names_its_parts_is_refused(tmp_path: Path) -> None:
    """ColModernVBert up to colpali-engine 0.3.13: the configuration of the encoder is another repository's."""
    root = Path(shutil.copytree(GOLDEN / "colmodernvbert", tmp_path / "model"))
    config = json.loads((root / "config.json").read_text())
    config["text_config"] = {"model_type": "modernvbert_text", "text_model_name": "someone/encoder", "hidden_size": 96}
    (root / "config.json").write_text(json.dumps(config))
    with pytest.raises(CembedError, match=r"text_model_name is 'someone/encoder': supported is none: save it with"):
        ExportPlan.make(ExportOptions(model=str(root)), root)

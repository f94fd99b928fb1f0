"""What is exported where little is said: a backbone alone, a checkpoint without one, an adapter as the model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import BACKBONE_OF, GOLDEN
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from cembed.export.backbones import load_backbone
from cembed.export.choices import BACKBONES
from cembed.export.exporter import export
from cembed.export.plan import ExportOptions
from cembed.export.sources import find_source
from cembed.export_cli import ExportFlags, default_out
from cembed.runtime import CembedError

Hub = Callable[..., None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that has these folders by id, and nothing else."""
    folders: dict[str, Path] = {}

    def download(name: str, **_: object) -> str:
        if name not in folders:
            raise LocalEntryNotFoundError("no network")
        return str(folders[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return lambda name, root: folders.update({name: root})


def adapter(root: Path, base: object) -> Path:
    """Of the projection of a golden checkpoint, saved whole."""
    root.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": base}
    (root / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{name}A.weight": torch.ones(4, 96), f"{name}B.weight": torch.ones(96, 4)}, root / "adapter_model.safetensors"
    )
    return root


@pytest.mark.parametrize("name", BACKBONE_OF)
def test_a_checkpoint_says_what_it_is(name: str) -> None:
    assert load_backbone(None, GOLDEN / name).name == BACKBONE_OF[name]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_without_a_model_it_is_the_one_that_people_use(backbone: str, hub: Hub) -> None:
    used = BACKBONES[backbone].checkpoint
    with pytest.raises(CembedError, match=f"{used} of the hub, which could not be had: give a copy with --model DIR"):
        find_source(backbone, None)
    hub(used, GOLDEN / "colqwen2")
    found = find_source(backbone, None)
    assert (found.model.name, found.model.revision, found.adapter) == (used, "colqwen2", None)


def test_what_is_missing_is_said(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CembedError, match=r"give a checkpoint with --model, or a --backbone: qwen2-vl, "):
        find_source(None, None)
    with pytest.raises(CembedError, match="'someone/else' is no directory, and the hub did not give it"):
        find_source(None, "someone/else")
    with pytest.raises(CembedError, match="--base x: colqwen2 is no adapter"):
        find_source(None, str(GOLDEN / "colqwen2"), base="x")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(CembedError, match=r"is a llava checkpoint, and cembed has qwen2-vl, .*: see docs/models.md"):
        load_backbone(None, tmp_path)


@pytest.mark.parametrize("base", ["someone/base", "/home/of/someone/else", ["x"], None])
def test_an_adapter_whose_base_is_not_found(base: object, hub: Hub, tmp_path: Path) -> None:
    root = adapter(tmp_path / "adapter", base)
    words = (
        f"on {base!r}, which was not found: give it with --base" if isinstance(base, str) else "does not say of what"
    )
    with pytest.raises(CembedError, match=f"{re.escape(str(root))} is a LoRA adapter .*{re.escape(words)}"):
        find_source(None, str(root))
    found = find_source(None, str(root), base=str(GOLDEN / "colqwen2"))
    assert (found.model.root, found.adapter and found.adapter.root) == (GOLDEN / "colqwen2", root)


def test_an_adapter_is_exported_with_its_base(hub: Hub, tmp_path: Path) -> None:
    hub("someone/base", GOLDEN / "colqwen2")
    hub("someone/adapter", adapter(tmp_path / "pinned", "someone/base"))
    told: list[str] = []
    manifest = export(ExportOptions(model="someone/adapter"), tmp_path / "bundle", progress=told.append)
    assert told[0] == "someone/adapter is a LoRA adapter, merged into someone/base"
    assert manifest.source == {
        "model": "someone/base", "revision": "colqwen2", "adapter": "someone/adapter", "adapter_revision": "pinned",
    }  # fmt: skip
    given = ExportOptions("qwen2-vl", str(GOLDEN / "colqwen2"), adapter=tmp_path / "pinned")
    both = export(given, tmp_path / "both")
    assert both.files["text.data"] == manifest.files["text.data"]
    assert both.source == {"model": "colqwen2", "adapter": "pinned"}


def test_the_bundle_is_named_as_the_checkpoint() -> None:
    assert default_out(ExportFlags(backbone="qwen2-vl")) == Path("colqwen2-v1.0")
    assert default_out(ExportFlags(model="someone/else")) == Path("else")
    assert default_out(ExportFlags(model=str(GOLDEN / "colqwen2"))) == Path("colqwen2-bundle")

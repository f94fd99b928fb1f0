"""Every layout a checkpoint comes in, every flag, and every mistake."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKBONE_OF, GOLDEN, BundleMaker
from PIL import Image
from safetensors.torch import load_file, save_file

from cembed.export.checkpoint import canonical_name
from cembed.export.exporter import export
from cembed.export.plan import ExportOptions, ExportPlan
from cembed.runtime import Bundle, CembedError, Embedder

QWEN = ExportOptions("qwen2.5-vl", str(GOLDEN / "causalqwen2_5"), num_vectors=8, query_vectors=4)
PALI = ExportOptions("paligemma", str(GOLDEN / "causalpali"), num_vectors=8, query_vectors=4)
COLQWEN = ExportOptions("qwen2-vl", str(GOLDEN / "colqwen2"))


def copy(name: str, to: Path) -> Path:
    shutil.copytree(GOLDEN / name, to)
    return to


def plan(options: ExportOptions, root: Path) -> ExportPlan:
    return ExportPlan.make(replace(options, model=str(root)), root)


def edit(root: Path, change: Any) -> None:
    """Rewrites the weights of a checkpoint: `change` gets and returns a dict of tensors."""
    save_file(change(load_file(root / "model.safetensors")), root / "model.safetensors")


def vectors(bundle: Path) -> tuple[np.ndarray, np.ndarray]:
    embedder = Embedder.load(bundle)
    return embedder.embed_image(Image.open(GOLDEN / "colqwen2" / "wide.png")), embedder.embed_query("source code form")


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.mlp.up_proj.weight",
        "language_model.layers.0.mlp.up_proj.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "vlm.model.language_model.layers.0.mlp.up_proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.weight",
    ],
)
def test_text_keys(key: str) -> None:
    assert canonical_name(key) == "layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("vlm.model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("model.vision_tower.vision_model.post_layernorm.bias", "vision_tower.post_layernorm.bias"),
        ("model.model.vision_tower.vision_model.post_layernorm.bias", "vision_tower.post_layernorm.bias"),
        ("vlm.embedding_proj_layer.bias", "custom_text_proj.bias"),
        ("embedding_proj_layer.bias", "custom_text_proj.bias"),
    ],
)
def test_other_keys(key: str, name: str) -> None:
    assert canonical_name(key) == name


def test_renamed_sharded_and_tied_checkpoints_give_the_same_bundle(tmp_path: Path, bundle_of: BundleMaker) -> None:
    """Keys as transformers 5 writes them, two shards, and the table stored only as the output head's."""
    root = copy("causalqwen2_5", tmp_path / "model")
    weights = load_file(root / "model.safetensors")
    renamed = {
        ("model." + key if key.startswith("visual.") else key.replace("model.", "model.language_model.", 1)): value
        for key, value in weights.items()
    }
    renamed["lm_head.weight"] = renamed.pop("model.language_model.embed_tokens.weight")
    names = sorted(renamed)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: renamed[key] for key in keys}, root / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "model.safetensors").unlink()
    export(replace(QWEN, model=str(root)), tmp_path / "bundle")
    files, expected = Bundle(tmp_path / "bundle").manifest.files, Bundle(bundle_of("causalqwen2_5")).manifest.files
    for name in ("vision.data", "text.data", "token_embeddings.bin"):
        assert files[name] == expected[name]


def drop(name: str) -> Any:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def add(name: str) -> Any:
    return lambda weights: weights | {name: torch.zeros(2)}


def reshape(name: str) -> Any:
    return lambda weights: weights | {name: weights[name][:-1].clone()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), "missing layers.1.mlp.up_proj.weight"),
        (drop("visual.merger.mlp.2.bias"), "missing visual.merger.mlp.2.bias"),
        (drop("model.embed_tokens.weight"), "missing embed_tokens.weight"),
        (add("model.layers.3.input_layernorm.weight"), "unexpected layers.3.input_layernorm.weight"),
        (add("model.visual.merger.ln_q.weight"), "same weight"),
        (add("something.else"), "unexpected something.else"),
    ],
)
def test_weights_are_loaded_strictly(tmp_path: Path, change: Any, words: str) -> None:
    root = copy("causalqwen2_5", tmp_path / "model")
    edit(root, change)
    with pytest.raises(CembedError, match=words):
        plan(QWEN, root)


@pytest.mark.parametrize("name", ["model.norm.weight", "visual.blocks.0.attn.qkv.weight", "model.embed_tokens.weight"])
def test_a_weight_of_another_shape_is_named_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    root = copy("causalqwen2_5", tmp_path / "model")
    edit(root, reshape(name) if "embed" not in name else lambda w: w | {name: w[name][:, :-1].clone()})
    with pytest.raises(CembedError, match=f"{canonical_name(name)} has shape"):
        export(replace(QWEN, model=str(root)), tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (replace(QWEN, model="no/such/model/here"), "no checkpoint"),
        (replace(QWEN, model=str(GOLDEN / "colpali")), "use --backbone paligemma"),
        (replace(QWEN, latent_token="<|nothing|>"), "--latent-token"),
        (replace(QWEN, head="colbert"), "use --head causal"),
        (replace(COLQWEN, head="causal"), "no token"),
        (replace(QWEN, max_visual_tokens=3), "the smallest page takes 4"),
        (replace(PALI, max_visual_tokens=30), "always take 64"),
        (replace(QWEN, query_prefix="{text}"), "exactly once"),
        (replace(QWEN, opset=26), "18 to 25"),
        (replace(QWEN, adapter=GOLDEN), "adapter_config.json is missing"),
    ],
)
def test_mistakes_in_the_options(tmp_path: Path, options: ExportOptions, words: str) -> None:
    with pytest.raises(CembedError, match=words) as raised:
        export(options, tmp_path / "bundle")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["backbone", "head", "dtype", "target", "slot_positions", "prompt_attention"])
def test_unknown_values_list_the_known(field: str) -> None:
    with pytest.raises(CembedError, match=r"nonsense.*cembed has"):
        replace(QWEN, **{field: "nonsense"})


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]"])
def test_damaged_or_missing_files_of_a_checkpoint(tmp_path: Path, file: str, content: bytes | None) -> None:
    root = copy("causalqwen2_5", tmp_path / "model")
    (root / file).unlink()
    if content is not None:
        (root / file).write_bytes(content)
    with pytest.raises(CembedError) as raised:
        plan(QWEN, root)
    assert file in str(raised.value) or "safetensors" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_pickles_are_refused(tmp_path: Path) -> None:
    root = copy("causalqwen2_5", tmp_path / "model")
    (root / "model.safetensors").rename(root / "pytorch_model.bin")
    with pytest.raises(CembedError, match=r"pytorch_model\.bin, a pickle"):
        plan(QWEN, root)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_config": {"use_sliding_window": True}}, "use_sliding_window"),
        (
            {"text_config": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mrope_section": [2, 3, 3]}}},
            "rope_type",
        ),
        ({"text_config": {"hidden_act": "relu"}}, "hidden_act"),
        ({"vision_config": {"in_channels": 1}}, "in_channels"),
    ],
)
def test_settings_that_would_change_the_numbers_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    root = copy("causalqwen2_5", tmp_path / "model")
    config = json.loads((root / "config.json").read_text())
    for section, values in change.items():
        config[section] |= values
    (root / "config.json").write_text(json.dumps(config))
    with pytest.raises(CembedError, match=words):
        plan(QWEN, root)


def test_an_existing_output_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "keep").write_text("mine")
    with pytest.raises(CembedError, match="--force"):
        export(COLQWEN, out)
    with pytest.raises(CembedError, match="not a bundle"):
        export(COLQWEN, out, force=True)
    assert (out / "keep").read_text() == "mine"
    (out / "manifest.json").touch()
    with pytest.raises(CembedError, match="no token"):
        export(replace(COLQWEN, head="causal"), out, force=True)
    assert (out / "keep").read_text() == "mine"
    export(COLQWEN, out, force=True)
    assert not (out / "keep").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_a_tokenizer_is_freed_from_what_training_left_in_it(tmp_path: Path) -> None:
    from cembed.runtime.bundle.prompts import Prompter, load_tokenizer

    content = json.loads((GOLDEN / "causalqwen2_5" / "tokenizer.json").read_text())
    plain = Prompter(load_tokenizer(GOLDEN / "causalqwen2_5" / "tokenizer.json"), 597).query("{text}", "a long query")
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 40},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 591,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    trained = Prompter(load_tokenizer(tmp_path / "tokenizer.json"), 597)
    assert np.array_equal(trained.query("{text}", "a long query"), plain)


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"use_qalora": True}, {"peft_type": "LOHA"}])
def test_adapters_that_change_more_than_lora_does(tmp_path: Path, settings: dict[str, Any]) -> None:
    lora(tmp_path / "adapter", {"r": 4, "lora_alpha": 8})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(CembedError, match=next(iter(settings))):
        ExportPlan.make(replace(COLQWEN, adapter=tmp_path / "adapter"), GOLDEN / "colqwen2")


def test_public_configurations(tmp_path: Path) -> None:
    """As the first checkpoints were published: flat, without the fields that later versions of transformers write."""
    from cembed.export.backbones import load_backbone

    root = copy("colpali", tmp_path / "pali")
    config = json.loads((root / "config.json").read_text())
    for field in ("hidden_activation", "hidden_act", "head_dim", "attention_bias", "rope_theta", "use_cache"):
        config["text_config"].pop(field, None)
    config["text_config"]["head_dim"] = 16
    (root / "config.json").write_text(json.dumps(config))
    assert load_backbone("paligemma", root).decoder.activation == "gelu_pytorch_tanh"
    root = copy("colqwen2", tmp_path / "qwen")
    processor = json.loads((root / "preprocessor_config.json").read_text())
    limits = processor.pop("min_pixels"), processor.pop("max_pixels")
    (root / "preprocessor_config.json").write_text(json.dumps(processor))
    image = load_backbone("qwen2-vl", root).image
    assert (image.min_pixels, image.max_pixels) == limits
    (root / "preprocessor_config.json").rename(root / "processor_config.json")
    (root / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    assert load_backbone("qwen2-vl", root).image == image


@pytest.mark.parametrize(
    ("options", "golden", "tolerance"),
    [
        (replace(QWEN, target="onnx", opset=24), "causalqwen2_5", 1e-4),
        (replace(QWEN, target="onnx", opset=20), "causalqwen2_5", 1e-4),
        (replace(PALI, opset=18), "causalpali", 1e-4),
        (replace(COLQWEN, opset=25), "colqwen2", 1e-4),
        (replace(COLQWEN, dtype="bf16"), "colqwen2", 2e-2),
        (replace(PALI, dtype="fp16"), "causalpali", 2e-2),
    ],
)
def test_targets_opsets_and_types(tmp_path: Path, options: ExportOptions, golden: str, tolerance: float) -> None:
    manifest = export(options, tmp_path / "bundle")
    assert (manifest.opset, manifest.target, manifest.dtype) == (options.opset, options.target, options.dtype)
    graph = (tmp_path / "bundle" / "text.onnx").read_bytes()
    assert (b"com.microsoft" in graph) == (options.target == "onnxruntime" and options.opset >= 24)
    embedder, expected = Embedder.load(tmp_path / "bundle"), np.load(GOLDEN / golden / "expected.npz")
    page = embedder.embed_image(Image.open(GOLDEN / golden / "page.png"))
    np.testing.assert_allclose(page, expected["page.vectors"], rtol=0, atol=tolerance)
    query = embedder.embed_query("source code form")
    np.testing.assert_allclose(query, expected["query1.vectors"], rtol=0, atol=tolerance)
    if options.dtype != "fp32":
        full = sum(value.numel() * 4 for value in load_file(GOLDEN / golden / "model.safetensors").values())
        assert sum(record.size for name, record in manifest.files.items() if name.endswith(".data")) < 0.6 * full


def test_slot_positions_and_prompt_attention_change_the_vectors(tmp_path: Path, bundle_of: BundleMaker) -> None:
    (page, query), (pali_page, pali_query) = vectors(bundle_of("causalqwen2_5")), vectors(bundle_of("causalpali"))
    export(replace(QWEN, slot_positions="continue"), tmp_path / "continue")
    other_page, other_query = vectors(tmp_path / "continue")
    np.testing.assert_allclose(other_page[0], page[0], atol=1e-6)  # the last prompt position is no slot
    assert np.abs(other_page[1:] - page[1:]).max() > 1e-2
    assert np.abs(other_query[1:] - query[1:]).max() > 1e-2
    export(replace(PALI, prompt_attention="causal"), tmp_path / "causal")
    causal_page, causal_query = vectors(tmp_path / "causal")
    assert np.abs(causal_page - pali_page).max() > 1e-3
    assert np.abs(causal_query - pali_query).max() > 1e-3


def test_query_prefix_and_visual_tokens(tmp_path: Path, bundle_of: BundleMaker) -> None:
    export(replace(COLQWEN, query_prefix="Query: ", max_visual_tokens=30), tmp_path / "bundle")
    embedder, plain = Embedder.load(tmp_path / "bundle"), Embedder.load(bundle_of("colqwen2"))
    assert np.array_equal(embedder.embed_query("fee"), plain.embed_query("Query: fee"))
    page = embedder.embed_image(Image.open(GOLDEN / "colqwen2" / "page.png"))
    assert len(page) <= 30 + 14
    assert np.array_equal(
        page,
        Embedder.load(bundle_of("colqwen2"), max_visual_tokens=30).embed_image(
            Image.open(GOLDEN / "colqwen2" / "page.png")
        ),
    )


def lora(root: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Writes an adapter over two linears and a module saved whole; returns what PEFT's own merge gives."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    weights = load_file(GOLDEN / "colqwen2" / "model.safetensors")
    shapes = {"q_proj": "model.layers.0.self_attn.q_proj", "down_proj": "model.layers.2.mlp.down_proj"}
    model = torch.nn.ModuleDict()
    for name, key in shapes.items():
        out, inputs = weights[f"{key}.weight"].shape
        model[name] = torch.nn.Linear(inputs, out, bias=False)
        model[name].weight.data = weights[f"{key}.weight"].clone()
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=list(shapes), **config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    halves = {
        key.replace(".default", "").replace(f"base_model.model.{name}", f"base_model.model.{path}"): value.clone()
        for key, value in adapted.state_dict().items()
        for name, path in shapes.items()
        if "lora_" in key and f".{name}." in key
    }
    whole = {"base_model.model.custom_text_proj.bias": torch.randn(128)}
    root.mkdir()
    save_file(halves | whole, root / "adapter_model.safetensors")
    adapted.peft_config["default"].save_pretrained(root)
    merged = adapted.merge_and_unload()
    return {f"{shapes[name]}.weight": merged[name].weight.data for name in shapes} | {
        "custom_text_proj.bias": whole["base_model.model.custom_text_proj.bias"]
    }


RSLORA = {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"down_proj": 2}}


@pytest.mark.parametrize("config", [{"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 8, **RSLORA}])
def test_an_adapter_is_merged_as_peft_does(tmp_path: Path, config: dict[str, Any]) -> None:
    expected = lora(tmp_path / "adapter", config)
    merged = ExportPlan.make(replace(COLQWEN, adapter=tmp_path / "adapter"), GOLDEN / "colqwen2").checkpoint
    for key, value in expected.items():
        torch.testing.assert_close(merged.load(canonical_name(key)), value, rtol=0, atol=1e-6)
    base = load_file(GOLDEN / "colqwen2" / "model.safetensors")
    assert torch.equal(merged.load("layers.1.self_attn.q_proj.weight"), base["model.layers.1.self_attn.q_proj.weight"])


def test_adapters_that_cannot_be_merged(tmp_path: Path) -> None:
    lora(tmp_path / "adapter", {"r": 4, "lora_alpha": 8})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    options = replace(COLQWEN, adapter=tmp_path / "adapter")
    with pytest.raises(CembedError, match="use_dora"):
        ExportPlan.make(options, GOLDEN / "colqwen2")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CembedError, match=r"custom_text_proj\.bias only"):  # this one has no projection
        ExportPlan.make(replace(QWEN, adapter=tmp_path / "adapter"), GOLDEN / "causalqwen2_5")
    with pytest.raises(CembedError, match="LoRA adapter"):
        export(replace(COLQWEN, model=str(tmp_path / "adapter")), tmp_path / "bundle")


def test_a_hub_id_is_resolved_from_the_cache_and_its_commit_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle_of: BundleMaker
) -> None:
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--colqwen"
    copy("colqwen2", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    manifest = export(replace(COLQWEN, model="someone/colqwen"), tmp_path / "bundle")
    assert manifest.source == {"model": "someone/colqwen", "revision": commit}
    assert manifest.files["text.data"] == Bundle(bundle_of("colqwen2")).manifest.files["text.data"]
    with pytest.raises(CembedError, match="the hub did not give it"):
        export(replace(COLQWEN, model="someone/else"), tmp_path / "other")


def test_a_bundle_says_nothing_of_the_machine_it_was_made_on(bundle_of: BundleMaker) -> None:
    for name in BACKBONE_OF:
        root = bundle_of(name)
        for file in ("manifest.json", "vision.onnx", "text.onnx"):
            content = (root / file).read_bytes()
            assert str(GOLDEN).encode() not in content
            assert b"site-packages" not in content


def test_nan_in_a_checkpoint_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    root = copy("colqwen2", tmp_path / "model")
    edit(root, lambda weights: weights | {"model.norm.weight": weights["model.norm.weight"] * float("nan")})
    with pytest.raises(CembedError, match="NaN"):
        export(replace(COLQWEN, model=str(root)), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()

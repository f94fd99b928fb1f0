"""Checkpoints, adapters and heads with odd files: a plan, or one line that says what is wrong; never anything else."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BACKBONE_OF, GOLDEN
from mutations import mutations
from safetensors.torch import load_file, save_file

from cembed.export.exporter import write_embeddings, write_slot_rows
from cembed.export.plan import ExportOptions, ExportPlan
from cembed.export.tokens import read_tokenizer
from cembed.runtime import CembedError

LATENT = "<|latent|>"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
Json = dict[str, Any]


def copy(name: str, to: Path) -> Path:
    shutil.copytree(GOLDEN / name, to, ignore=shutil.ignore_patterns("*.png", "*.npz"))
    return to


def read(path: Path) -> Json:
    content: Json = json.loads(path.read_text())
    return content


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def plan(root: Path, name: str, **options: Any) -> ExportPlan:
    return ExportPlan.make(ExportOptions(BACKBONE_OF[name], str(root), **options), root)


def refused(words: str, make: Callable[[], object]) -> None:
    with pytest.raises(CembedError) as raised:
        make()
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700


def survive(path: Path, make: Callable[[], object]) -> tuple[int, int]:
    """Changes every field of a file: how many changes were taken, and how many refused."""
    taken, original = 0, path.read_text()
    changes = list(mutations(json.loads(original)))
    for change, content in changes:
        path.write_text(content)
        try:
            make()
        except CembedError as error:
            if "\n" in str(error):
                pytest.fail(f"{change}: {error}")
        except Exception as error:
            pytest.fail(f"{change}: {error!r}")
        else:
            taken += 1
    path.write_text(original)
    return taken, len(changes) - taken


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Settings


@pytest.mark.parametrize("name", ["colqwen2", "colqwen2_5", "colpali"])
def test_every_field_of_a_configuration(tmp_path: Path, name: str) -> None:
    root = copy(name, tmp_path / "model")
    taken, refused = survive(root / "config.json", lambda: plan(root, name))
    assert taken > 100  # dropout rates, token numbers of the language model, …
    assert refused > 300


@pytest.mark.parametrize("name", ["causalqwen2_5", "causalpali"])
def test_every_field_beside_a_tokenizer(tmp_path: Path, name: str) -> None:
    root = copy(name, tmp_path / "model")
    taken, refused = survive(root / "tokenizer_config.json", lambda: read_tokenizer([root]))
    assert min(taken, refused) > 30


CONFIGURATIONS: dict[str, tuple[Json, str]] = {
    "no text": ({"text_config": None}, "mrope_section"),
    "a list": ({"text_config": []}, "text_config"),
    "no kind": ({"model_type": None}, "model_type is None"),
    "a foreign kind": ({"model_type": "bert"}, "bert checkpoint, and cembed has qwen2-vl"),
    "a wrapper": ({"model_type": "colqwen2"}, "vlm_config is missing: supported is an object"),
    "a wrapper of old": ({"vlm_config": {}}, "wrapper"),
    "many layers": ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000"),
    "more layers than any": ({"vision_config": {"depth": 2000}}, "depth is 2000"),
    "many labels": ({"num_labels": 10**9}, "num_labels"),
    "heads that divide nothing": ({"text_config": {"num_attention_heads": 5}}, "a divisor of hidden_size, 96"),
    "groups that divide nothing": ({"text_config": {"num_key_value_heads": 4}}, "a divisor of num_attention_heads, 6"),
    "short sections": ({"text_config": {"rope_scaling": {"mrope_section": [2, 3]}}}, "three numbers with the sum 8"),
    "scaled positions": ({"text_config": {"rope_scaling": {"type": "yarn", "factor": 2.0}}}, "rope_type is 'yarn'"),
    "no scaling": ({"text_config": {"rope_scaling": None}}, "mrope_section is missing"),
    "another theta of pixels": ({"vision_config": {"rope_parameters": {"rope_theta": 5.0}}}, "rope_theta is 5.0"),
    "an unknown activation": ({"vision_config": {"hidden_act": "relu"}}, "hidden_act is 'relu'"),
    "a wide tower": ({"vision_config": {"mlp_ratio": 10**6}}, "mlp_ratio is 1000000"),
    "an image token that is none": ({"image_token_id": 3}, "image token 3 is no added token"),
    "a text for a number": ({"text_config": {"hidden_size": "96"}}, "hidden_size"),
    "null for a number": ({"text_config": {"intermediate_size": None}}, "intermediate_size"),
    "another width": ({"text_config": {"intermediate_size": 161}}, "its config asks for"),
}


@pytest.mark.parametrize(("change", "words"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_configurations(tmp_path: Path, change: Json, words: str) -> None:
    root = copy("colqwen2", tmp_path / "model")
    content = read(root / "config.json")
    for name, value in change.items():
        content[name] = content[name] | value if isinstance(value, dict) and name in content else value
    write(root / "config.json", content)
    refused(words, lambda: plan(root, "colqwen2"))


NO_JSON = {
    "empty": b"",
    "cut": b"{",
    "a list": b"[]",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "not UTF-8": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "a long number": b"9" * 10_000,
}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", INDEX])
def test_files_that_are_no_objects(tmp_path: Path, file: str, content: bytes) -> None:
    root = copy("colqwen2", tmp_path / "model")
    if file == INDEX:
        (root / SINGLE).rename(root / "model-1.safetensors")
    (root / file).write_bytes(content)
    refused(file, lambda: plan(root, "colqwen2"))


def test_a_folder_or_a_pipe_in_place_of_a_file(tmp_path: Path) -> None:
    for file in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", SINGLE):
        for make in (Path.mkdir, os.mkfifo):
            root = copy("colqwen2", tmp_path / make.__name__ / file)
            (root / file).unlink()
            make(root / file)
            refused(f"{file} is no file", lambda root=root: plan(root, "colqwen2"))


def test_a_file_of_settings_of_any_length(tmp_path: Path) -> None:
    root = copy("colqwen2", tmp_path / "model")
    with (root / "config.json").open("r+b") as file:
        file.truncate(1 << 40)
    refused(f"config.json has {1 << 40} bytes", lambda: plan(root, "colqwen2"))


# Weights


def sharded(root: Path) -> Json:
    """Two shards in place of one file; the index that names them."""
    weights = load_file(root / SINGLE)
    (root / SINGLE).unlink()
    files = {"model-1.safetensors": sorted(weights)[::2], "model-2.safetensors": sorted(weights)[1::2]}
    for file, keys in files.items():
        save_file({key: weights[key] for key in keys}, root / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {key: file for file, keys in files.items() for key in keys}}
    write(root / INDEX, index)
    return index


def test_every_field_of_an_index(tmp_path: Path) -> None:
    root = copy("colqwen2", tmp_path / "model")
    index = sharded(root)
    key = next(iter(index["weight_map"]))
    write(root / INDEX, index | {"weight_map": {key: "model-1.safetensors", "more": "model-2.safetensors"}})
    taken, _ = survive(root / INDEX, lambda: plan(root, "colqwen2"))
    assert taken


INDICES: dict[str, tuple[Any, str]] = {
    "no map": ({}, "no weight_map"),
    "null": ({"weight_map": None}, "no weight_map"),
    "a list": ({"weight_map": ["model-1.safetensors"]}, "no weight_map"),
    "nothing": ({"weight_map": {}}, "no weight_map"),
    "a number": ({"weight_map": {"a": 1}}, "names 1"),
    "null file": ({"weight_map": {"a": None}}, "names None"),
    "above": ({"weight_map": {"a": "../other.safetensors"}}, "names '../other.safetensors', which is no"),
    "from the root": ({"weight_map": {"a": "/etc/other.safetensors"}}, "which is no *.safetensors file beside it"),
    "backwards": ({"weight_map": {"a": "..\\\\other.safetensors"}}, "which is no *.safetensors file beside it"),
    "a pickle": ({"weight_map": {"a": "pytorch_model.bin"}}, "which is no *.safetensors file beside it"),
    "nobody": ({"weight_map": {"a": "model-3.safetensors"}}, "model-3.safetensors, which is missing: 1 of 1"),
}


@pytest.mark.parametrize(("index", "words"), INDICES.values(), ids=INDICES)
def test_indices(tmp_path: Path, index: Any, words: str) -> None:
    root = copy("colqwen2", tmp_path / "model")
    sharded(root)
    write(root / INDEX, index)
    refused(words, lambda: plan(root, "colqwen2"))


def test_one_file_goes_before_shards_as_in_transformers(tmp_path: Path) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    root = copy("colqwen2", tmp_path / "model")
    weights = load_file(root / SINGLE)
    sharded(root)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name] + 1}, root / SINGLE)
    with pytest.warns(RuntimeWarning, match=f"{SINGLE} is read, not the shards"):
        made = plan(root, "colqwen2")
    assert torch.equal(made.checkpoint.load("layers.0.mlp.up_proj.weight"), weights[name] + 1)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(root).state_dict()
    assert torch.equal(theirs["model.language_model.layers.0.mlp.up_proj.weight"], weights[name] + 1)


ODD_WEIGHTS: dict[str, tuple[str, torch.Tensor, str]] = {
    "three axes": (
        "model.layers.0.mlp.up_proj.weight",
        torch.zeros(160, 96, 1),
        "layers.0.mlp.up_proj.weight has shape",
    ),
    "no axes": ("model.layers.0.mlp.up_proj.weight", torch.zeros(()), "layers.0.mlp.up_proj.weight has shape ()"),
    "turned": ("model.layers.0.mlp.up_proj.weight", torch.zeros(96, 160), "has shape (96, 160)"),
    "no pixels": ("visual.patch_embed.proj.weight", torch.zeros(48), "visual.patch_embed.proj.weight has shape"),
    "few rows": ("model.embed_tokens.weight", torch.zeros(300, 96), "embed_tokens.weight has shape (300, 96)"),
    "flat rows": ("model.embed_tokens.weight", torch.zeros(600), "embed_tokens.weight has shape (600,)"),
    "a projection of another width": ("custom_text_proj.weight", torch.zeros(128, 95), "[128, 96] is needed"),
    "a bias of two axes": ("custom_text_proj.bias", torch.zeros(128, 1), "[dim] is needed"),
}


@pytest.mark.parametrize(("key", "value", "words"), ODD_WEIGHTS.values(), ids=ODD_WEIGHTS)
def test_weights_of_other_shapes_are_found_before_the_first_graph(
    tmp_path: Path, key: str, value: torch.Tensor, words: str
) -> None:
    root = copy("colqwen2", tmp_path / "model")
    weights = load_file(root / SINGLE)
    assert key in weights
    save_file(weights | {key: value}, root / SINGLE)
    refused(words, lambda: plan(root, "colqwen2"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool, torch.int64])
def test_quantised_checkpoints(tmp_path: Path, dtype: torch.dtype) -> None:
    root, key = copy("colqwen2", tmp_path / "model"), "model.layers.0.mlp.up_proj.weight"
    weights = load_file(root / SINGLE)
    save_file(weights | {key: torch.ones(weights[key].shape).to(dtype)}, root / SINGLE)
    made = plan(root, "colqwen2")
    refused("a checkpoint that is not quantised", lambda: made.checkpoint.load("layers.0.mlp.up_proj.weight"))


def test_a_weight_in_two_files(tmp_path: Path) -> None:
    root = copy("colqwen2", tmp_path / "model")
    shutil.copy(root / SINGLE, root / "older.safetensors")
    refused("older.safetensors: remove the stale file", lambda: plan(root, "colqwen2"))


NOT_FINITE = {
    "NaN": (float("nan"), "fp32", "holds NaN or infinity"),
    "infinity": (float("-inf"), "fp32", "holds NaN or infinity"),
    "too large": (1e6, "fp16", "holds NaN or infinity, or numbers that half floats cannot hold: try --dtype fp32"),
}


@pytest.mark.parametrize(("value", "dtype", "words"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float, dtype: str, words: str) -> None:
    """In the embedding table too, most of which no check of the graphs meets."""
    root, layer = copy("colqwen2", tmp_path / "model"), "layers.1.mlp.up_proj.weight"
    weights = load_file(root / SINGLE)
    weights[f"model.{layer}"][3, 4] = value
    weights["model.embed_tokens.weight"][3, 4] = value
    save_file(weights, root / SINGLE)
    made = plan(root, "colqwen2", dtype=dtype)
    (spec,) = [spec for spec in made.graphs if spec.name == "text"]
    refused(f"{layer} {words}", lambda: made.loader(spec, stored=True)(layer))
    refused(f"embed_tokens.weight {words}", lambda: write_embeddings(made, tmp_path))


# Adapters

Q, DOWN = "layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"
LORA: Json = {
    "peft_type": "LORA",
    "base_model_name_or_path": "someone/base",
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": False,
    "rank_pattern": {"down_proj": 2},
    "alpha_pattern": {"down_proj": 3},
    "init_lora_weights": True,
    "use_dora": False,
    "bias": "none",
    "modules_to_save": ["custom_text_proj"],
}


def halves(module: str, outputs: int, inputs: int, rank: int) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.model.{module}.lora_"
    return {f"{prefix}A.weight": torch.ones(rank, inputs), f"{prefix}B.weight": torch.ones(outputs, rank)}


PAIRS = halves(Q, 96, 96, 4) | halves(DOWN, 96, 160, 2)
A, B = (f"base_model.model.model.{Q}.lora_{half}.weight" for half in "AB")


def adapter(root: Path, config: Json | None = None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    write(root / "adapter_config.json", LORA if config is None else config)
    given = PAIRS if tensors is None else tensors
    save_file({name: tensor.clone() for name, tensor in given.items()}, root / "adapter_model.safetensors")
    return root


def merged(root: Path) -> ExportPlan:
    return plan(GOLDEN / "colqwen2", "colqwen2", adapter=root)


def test_every_field_of_an_adapter(tmp_path: Path) -> None:
    root = adapter(tmp_path / "adapter")

    def load() -> None:
        checkpoint = merged(root).checkpoint
        for module in (Q, DOWN):
            assert checkpoint.load(f"{module}.weight").isfinite().all()

    taken, refused = survive(root / "adapter_config.json", load)
    assert min(taken, refused) > 50


ADAPTERS: dict[str, tuple[Json, str]] = {
    "no rank": ({"r": None}, "r is None"),
    "rank 0": ({"r": 0}, "r is 0"),
    "another rank": ({"r": 8}, "have another rank than 8"),
    "a rank of text": ({"r": "4"}, "r is '4'"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is None"),
    "an alpha of text": ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    "NaN for alpha": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "another rank of some": ({"rank_pattern": {"down_proj": 3}}, "have another rank than 3"),
    "no rank of some": ({"rank_pattern": {"down_proj": None}}, "down_proj is None"),
    "rank 0 of some": ({"rank_pattern": {"down_proj": 0}}, "down_proj is 0"),
    "a list of ranks": ({"rank_pattern": ["down_proj"]}, "rank_pattern"),
    "no expression": ({"alpha_pattern": {"(": 3}}, "'(' is no regular expression"),
    "an alpha of some as text": ({"alpha_pattern": {"down_proj": "3"}}, "down_proj is '3'"),
    "a text for a flag": ({"use_rslora": "false"}, "use_rslora is 'false'"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "block-diagonal": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "another kind": ({"peft_type": "LOHA"}, "LOHA"),
    "a start that changes the base": ({"init_lora_weights": "olora"}, "olora"),
}


@pytest.mark.parametrize(("change", "words"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapter_configurations(tmp_path: Path, change: Json, words: str) -> None:
    refused(words, lambda: merged(adapter(tmp_path / "adapter", LORA | change)))


def test_what_an_adapter_leaves_out_is_as_in_peft(tmp_path: Path) -> None:
    from peft import LoraConfig

    defaults = LoraConfig()
    root = adapter(tmp_path / "adapter", {"rank_pattern": None, "alpha_pattern": None}, halves(Q, 96, 96, defaults.r))
    made = merged(root).checkpoint.adapter
    assert made is not None
    assert made.pairs[f"{Q}.weight"].scale == defaults.lora_alpha / defaults.r


def other(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return PAIRS | {name: tensor}


PREFIX = "base_model.model."
ODD_PAIRS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "only A": ({A: PAIRS[A]}, "only one half of a LoRA pair"),
    "only B": ({B: PAIRS[B]}, "only one half of a LoRA pair"),
    "A of another width": (other(A, torch.ones(4, 95)), "do not fit layers.0.self_attn.q_proj.weight (96, 96)"),
    "B of another height": (other(B, torch.ones(95, 4)), "do not fit layers.0.self_attn.q_proj.weight (96, 96)"),
    "halves of different ranks": (other(B, torch.ones(96, 3)), "another rank than 4"),
    "no rank": (PAIRS | {A: torch.ones(0, 96), B: torch.ones(96, 0)}, "another rank than 4"),
    "three axes": (other(A, torch.ones(4, 96, 1)), "another rank than 4"),
    "no axes": (other(A, torch.ones(())), "another rank than 4"),
    "a layer that is not there": (halves("layers.7.self_attn.q_proj", 96, 96, 4), "give --model someone/base"),
    "a projection that is not there": (halves("custom_text_projection", 128, 96, 4), "which the model does not have"),
    "pixels": (
        {f"{PREFIX}visual.patch_embed.proj.lora_{h}.weight": PAIRS[k] for h, k in (("A", A), ("B", B))},
        "do not fit visual.patch_embed.proj.weight",
    ),
    "a bias of B": (other(B.replace("weight", "bias"), torch.ones(96)), "cannot be merged here"),
    "a magnitude": (other(f"{PREFIX}model.{Q}.lora_magnitude_vector", torch.ones(96)), "cannot be merged here"),
    "embeddings": (other(f"{PREFIX}model.embed_tokens.lora_embedding_A", torch.ones(4, 600)), "cannot be merged here"),
    "the same twice": (
        PAIRS | {key.replace("weight", "default.weight"): PAIRS[key] for key in (A,)},
        "the same weight",
    ),
    "the same with another prefix": (
        PAIRS | {k.replace("model.model.", "model."): PAIRS[k] for k in (A, B)},
        "same weight",
    ),
    "a pair and the whole": (
        other(f"{PREFIX}model.{Q}.base_layer.weight", torch.ones(96, 96)),
        "whole and a LoRA pair",
    ),
    "the whole twice": (
        PAIRS | {f"{PREFIX}{name}custom_text_proj.bias": torch.ones(128) for name in ("", "model.")},
        "the same weight",
    ),
    "the whole of another shape": (
        other(f"{PREFIX}custom_text_proj.weight", torch.ones(128, 95)),
        "[128, 96] is needed",
    ),
    "a whole of nothing": (other(f"{PREFIX}classifier.weight", torch.ones(1)), "unexpected classifier.weight"),
}


@pytest.mark.parametrize(("tensors", "words"), ODD_PAIRS.values(), ids=ODD_PAIRS)
def test_adapter_weights(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    refused(words, lambda: merged(adapter(tmp_path / "adapter", tensors=tensors)))


def test_biases_and_output_heads_of_an_adapter(tmp_path: Path) -> None:
    """Biases that were trained replace those of the base; an output head is not used, whatever is done to it."""
    bias = torch.full((96,), 3.0)
    head = halves("lm_head", 600, 96, 4) | {f"{PREFIX}lm_head.weight": torch.ones(600, 96)}
    tensors = PAIRS | head | {f"{PREFIX}model.{Q}.bias": bias}
    checkpoint = merged(adapter(tmp_path / "adapter", tensors=tensors)).checkpoint
    assert torch.equal(checkpoint.load(f"{Q}.bias"), bias)


def test_files_of_an_adapter(tmp_path: Path) -> None:
    root = tmp_path / "adapter"
    refused("is no directory: give one with adapter_config.json", lambda: merged(root))
    root.mkdir()
    refused("adapter_config.json is missing", lambda: merged(root))
    write(root / "adapter_config.json", LORA)
    refused("adapter_model.safetensors is missing", lambda: merged(root))
    (root / "adapter_model.bin").touch()
    refused("adapter_model.bin, a pickle", lambda: merged(root))
    for content in NO_JSON.values():
        (root / "adapter_config.json").write_bytes(content)
        refused("adapter", lambda: merged(root))


def test_an_adapter_in_place_of_a_model(tmp_path: Path) -> None:
    """Alone, with the configuration that some repositories have beside it, and among a model's own files."""
    root = adapter(tmp_path / "adapter")
    command = f"--model someone/base --adapter {root}"
    refused(f"is a LoRA adapter: give {command}", lambda: plan(root, "colqwen2"))
    for file in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        shutil.copy(GOLDEN / "colqwen2" / file, root / file)
    refused(command, lambda: plan(root, "colqwen2"))
    write(root / "adapter_config.json", LORA | {"base_model_name_or_path": ["x"]})
    refused("--model the model that it was trained on", lambda: plan(root, "colqwen2"))
    both = adapter(copy("colqwen2", tmp_path / "both"))
    refused(f"holds a model and a LoRA adapter: merge it with --adapter {both}", lambda: plan(both, "colqwen2"))
    made = plan(both, "colqwen2", adapter=both)
    assert torch.equal(made.checkpoint.load(f"{Q}.weight"), merged(both).checkpoint.load(f"{Q}.weight"))


# Tokenizers


def retoken(root: Path, change: Callable[[Json], object]) -> None:
    content = read(root / "tokenizer.json")
    change(content)
    write(root / "tokenizer.json", content)


def bpe(content: Json, **fields: Any) -> None:
    content["model"] |= fields


PANICS: dict[str, Callable[[Json], object]] = {
    "a prefix": lambda content: bpe(content, continuing_subword_prefix="xxxx"),
    "a prefix that ends the process": lambda content: bpe(
        content, continuing_subword_prefix="x", vocab={"a": 0, "é": 2, "aé": 3}, merges=["a é"]
    ),
    "a map that is none": lambda content: content.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "a map that panics later": lambda content: content.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "CAAAAAAAAAAAAAAA"}
    ),
    "pieces of no length": lambda content: content.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "lots": lambda content: bpe(content, dropout=0.5),
    "no model": lambda content: content.pop("model"),
    "an unknown model": lambda content: bpe(content, type="unknown"),
    "no image token": lambda content: content.update(added_tokens=content["added_tokens"][:3]),
    "no vocabulary": lambda content: bpe(content, vocab={}, merges=[]),
}


@pytest.mark.parametrize("change", PANICS.values(), ids=PANICS)
def test_tokenizers_that_panic(tmp_path: Path, change: Callable[[Json], object]) -> None:
    root = copy("causalqwen2_5", tmp_path / "model")
    (root / "tokenizer_config.json").unlink()
    retoken(root, change)
    refused("token", lambda: plan(root, "causalqwen2_5"))


def test_tokens_that_only_the_configuration_names(tmp_path: Path) -> None:
    """As transformers does; so is a change of a token's flags."""
    from transformers import AutoTokenizer

    root = copy("causalqwen2_5", tmp_path / "model")
    retoken(root, lambda content: content["added_tokens"].pop())
    ours, theirs = read_tokenizer([root]), AutoTokenizer.from_pretrained(root)
    assert ours.token_to_id(LATENT) == theirs.convert_tokens_to_ids(LATENT) == 599
    assert plan(root, "causalqwen2_5").document.latent_token_id == 599
    roles = read(root / "tokenizer_config.json")
    roles["added_tokens_decoder"]["599"] |= {"lstrip": True, "special": False, "normalized": True}
    write(root / "tokenizer_config.json", roles)
    ours, theirs = read_tokenizer([root]), AutoTokenizer.from_pretrained(root)
    text = f"a  {LATENT} b"
    assert repr(ours.get_added_tokens_decoder()[599]) == repr(theirs.added_tokens_decoder[599])
    assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False)


def test_tokens_of_the_older_file(tmp_path: Path) -> None:
    root = copy("causalqwen2_5", tmp_path / "model")
    retoken(root, lambda content: content["added_tokens"].pop())
    (root / "tokenizer_config.json").unlink()
    refused("no token '<|latent|>'", lambda: plan(root, "causalqwen2_5"))
    write(root / "added_tokens.json", {LATENT: 599})
    assert plan(root, "causalqwen2_5").document.latent_token_id == 599
    for value in (598, "599", None, -1, 10**30):
        write(root / "added_tokens.json", {LATENT: value})
        refused("added", lambda: plan(root, "causalqwen2_5"))


def test_tokens_that_contradict_each_other(tmp_path: Path) -> None:
    root = copy("causalqwen2_5", tmp_path / "model")
    roles = read(root / "tokenizer_config.json")
    decoder = roles["added_tokens_decoder"]
    decoder["598"], decoder["599"] = decoder["599"], decoder["598"]
    write(root / "tokenizer_config.json", roles)
    refused("has number 598, but 599 in", lambda: plan(root, "causalqwen2_5"))


def test_the_tokenizer_of_an_adapter_counts(tmp_path: Path) -> None:
    base, root = copy("causalqwen2_5", tmp_path / "base"), tmp_path / "adapter"
    root.mkdir()
    shutil.copy(base / "tokenizer.json", root)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_tokenizer([root, base])
    retoken(
        root,
        lambda content: content["added_tokens"].append(content["added_tokens"][-1] | {"id": 600, "content": "<new>"}),
    )
    with pytest.warns(
        RuntimeWarning, match=rf"of {root} is used, not that of {base}: it has 1 tokens more \('<new>'\)"
    ):
        assert read_tokenizer([root, base]).token_to_id("<new>") == 600
    retoken(
        root,
        lambda content: content.update(added_tokens=content["added_tokens"][:-1], normalizer={"type": "Lowercase"}),
    )
    with pytest.warns(RuntimeWarning, match="the same tokens, and other rules"):
        read_tokenizer([root, base])


def test_an_adapter_that_names_its_tokens_only(tmp_path: Path) -> None:
    """Without a tokenizer of its own: the base's, with what was added to it."""
    base, root = copy("causalqwen2_5", tmp_path / "base"), tmp_path / "adapter"
    write(root / "added_tokens.json", {"<new>": 600})
    with pytest.warns(RuntimeWarning, match="<new>"):
        assert read_tokenizer([root, base]).token_to_id("<new>") == 600
    write(root / "added_tokens.json", {"<new>": 700})
    refused("has number 700, but 600 in", lambda: read_tokenizer([root, base]))


# Heads


ROWS = {"slot_embeddings.document": torch.ones(64, 96), "slot_embeddings.query": torch.ones(16, 96)}
D, QUERY = ROWS


def with_head(path: Path, tensors: dict[str, torch.Tensor], **options: Any) -> ExportPlan:
    save_file(tensors, path)
    options = {"head": "metaembed"} | options
    return plan(GOLDEN / "causalqwen2_5", "causalqwen2_5", head_weights=path, **options)


JOINT = "prompt_embed_tokens.weight"
TABLE = {JOINT: torch.ones(80, 96)}
HEADS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "MetaEmbed's table beside rows": (ROWS | TABLE, "unexpected slot_embeddings.document"),
    "half of MetaEmbed's table": ({JOINT: torch.ones(64, 96)}, "64 rows: 16 of queries and 64 of documents are needed"),
    "MetaEmbed's table, another width": ({JOINT: torch.ones(80, 128)}, "[slots, 96] is needed"),
    "NaN in MetaEmbed's table": ({JOINT: torch.full((80, 96), torch.nan)}, f"{JOINT} holds NaN"),
    "the whole table for pages": (ROWS | {D: torch.ones(80, 96)}, "80 rows, for 80 vectors: metaembed is trained with"),
    "the whole table for queries": (ROWS | {QUERY: torch.ones(80, 96)}, "80 rows, for 80 vectors"),
    "the sides exchanged": ({D: ROWS[QUERY], QUERY: ROWS[D]}, f"{QUERY} has 64 rows"),
    "rows of no group": (ROWS | {D: torch.ones(63, 96)}, "one of 1, 4, 8, 16, 64; describe another head"),
    "no rows": (ROWS | {D: torch.ones(0, 96)}, "[slots, 96] is needed"),
    "another width": (ROWS | {D: torch.ones(64, 128)}, "[slots, 96] is needed"),
    "integers": (ROWS | {D: torch.ones(64, 96).to(torch.int8)}, "not quantised"),
    "NaN": (ROWS | {D: torch.full((64, 96), torch.nan)}, f"{D} holds NaN"),
}


@pytest.mark.parametrize(("tensors", "words"), HEADS.values(), ids=HEADS)
def test_rows_of_a_head(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    refused(words, lambda: write_slot_rows(with_head(tmp_path / "head.safetensors", tensors), tmp_path))


@pytest.mark.parametrize(
    ("head", "words"),
    [("causal", f"unexpected {JOINT}"), ("colbert", "no custom_text_proj"), ("btoks", "--head metaembed")],
)
def test_heads_without_rows_leave_no_table_over(tmp_path: Path, head: str, words: str) -> None:
    refused(words, lambda: with_head(tmp_path / "head.safetensors", TABLE, head=head))


def test_the_table_of_metaembed_under_a_prefix_says_its_head(tmp_path: Path) -> None:
    made = with_head(tmp_path / "head.safetensors", {f"model.{JOINT}": TABLE[JOINT]}, head=None)
    assert (made.head, made.document.slot_rows, made.query.slot_rows) == ("metaembed", (0, 80), (0, 16))


def test_the_table_of_metaembed_in_an_adapter(tmp_path: Path) -> None:
    tensors = {f"base_model.model.{name}": rows for name, rows in TABLE.items()}
    root = adapter(tmp_path / "adapter", tensors=PAIRS | tensors)
    made = plan(GOLDEN / "colqwen2", "colqwen2", adapter=root)
    assert (made.head, made.document.unread_slots, made.graphs[1].outputs[0].shape[-1]) == ("metaembed", 16, 128)


def test_as_many_rows_as_metaembed_has(tmp_path: Path) -> None:
    """They may have been trained as they are used here, or not: nothing in the file says it."""
    path = tmp_path / "head.safetensors"
    with pytest.warns(RuntimeWarning, match="64 document and 16 query rows") as caught:
        with_head(path, ROWS)
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_head(path, ROWS, head="btoks")
        with_head(path, {D: ROWS[D][:16], QUERY: ROWS[QUERY][:4]})


SIDE = {"slots": "learned", "first_vector": "slot"}
CONSTANT = {"slots": "constant", "num_vectors": 4}
SPECS: dict[str, tuple[Json, str]] = {
    "more vectors than rows": ({"num_vectors": 65}, "num_vectors is 65: this bundle makes 1 to 64"),
    "budgets beyond the rows": ({"nested_budgets": [1, 80]}, "this head is trained with 80 or more"),
    "budgets that fall": ({"nested_budgets": [4, 1]}, "give rising numbers"),
    "a budget twice": ({"nested_budgets": [4, 4]}, "give rising numbers"),
    "a budget of 0": ({"nested_budgets": [0, 4]}, "give rising numbers"),
    "a budget of NaN": ({"nested_budgets": [float("nan")]}, "nested_budgets"),
    "many vectors": (CONSTANT | {"num_vectors": 10**12}, "positions"),
    "infinity": (CONSTANT | {"num_vectors": float("inf")}, "num_vectors is inf"),
    "half a pair": (CONSTANT | {"prompt": "\ud800 {image}"}, "not UTF-8"),
    "a long prompt": (CONSTANT | {"prompt": "{image}" + 9000 * " word"}, "positions"),
}


@pytest.mark.parametrize(("side", "words"), SPECS.values(), ids=SPECS)
def test_specs(tmp_path: Path, side: Json, words: str) -> None:
    side = side if "slots" in side else SIDE | side
    write(tmp_path / "spec.json", {"document": side, "query": CONSTANT})
    tensors = {D: ROWS[D]} if side["slots"] == "learned" else {"custom_text_proj.bias": torch.ones(8)}
    refused(words, lambda: with_head(tmp_path / "h.safetensors", tensors, head=None, head_spec=tmp_path / "spec.json"))


def test_a_spec_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(" " * (1 << 20) + "{}")
    refused("bytes: at most", lambda: with_head(tmp_path / "h.safetensors", ROWS, head=None, head_spec=path))


def test_budgets_longer_than_the_model(tmp_path: Path) -> None:
    for budget in ({"num_vectors": 10**6}, {"query_vectors": 10**30}):
        refused("positions", lambda budget=budget: plan(GOLDEN / "causalqwen2_5", "causalqwen2_5", **budget))


def test_a_prompt_with_the_image_token_in_it(tmp_path: Path) -> None:
    spec = {"document": CONSTANT | {"prompt": "<|image_pad|>{image}"}, "query": CONSTANT}
    write(tmp_path / "spec.json", spec)
    options = replace(ExportOptions("qwen2.5-vl", str(GOLDEN / "causalqwen2_5")), head_spec=tmp_path / "spec.json")
    refused("one image token", lambda: ExportPlan.make(options, GOLDEN / "causalqwen2_5"))

"""Directories of sentence-transformers: modules, prompts and chat templates become a head and its prompts.

The settings are as sentence-transformers 6.2.0 writes them; states come from transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from mutations import mutations
from numpy.typing import NDArray
from PIL import Image
from reference import HIDDEN, Model, Reference, Zoo
from safetensors.torch import save_file

from cembed.export.exporter import export
from cembed.export.plan import ExportOptions, ExportPlan
from cembed.export.sources import find_source
from cembed.runtime import CembedError, Embedder

PAGE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (100, 150, 3), np.uint8))
TEXT = "source code form of the work"
TEMPLATE = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You help.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if task == 'query' %}<|endoftext|>{% endif %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SYSTEM, ASSISTANT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n"
IDENTITY = "torch.nn.modules.linear.Identity"
PACKAGE = "sentence_transformers."
Settings = dict[str, Any]

DENSE = {"in_features": HIDDEN, "out_features": 24, "bias": False, "activation_function": IDENTITY}
ON_TOKENS = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
LAST = {"embedding_dimension": HIDDEN, "pooling_mode": "lasttoken", "include_prompt": True}
OLD_MEAN = {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
MASK = {"skiplist_words": [], "skiplist_tasks": ["document"], "keep_only_token_ids": None}
MESSAGE = {"text": {"method": "forward"}, "message": {"method": "forward", "format": "structured"}}
CHAT = {"transformer_task": "feature-extraction", "modality_config": MESSAGE, "module_output_name": "token_embeddings"}
SPEAKS = CHAT | {"processing_kwargs": {"chat_template": {"add_generation_prompt": True}}}
PROMPTS = {"prompts": {"query": "Find.", "document": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine"}

SINGLE = (("Pooling", LAST), ("Normalize", {}))
MEAN = (("Pooling", OLD_MEAN), ("Dense", DENSE))
MULTI = (("Dense", DENSE | ON_TOKENS), ("MultiVectorMask", MASK), ("Normalize", ON_TOKENS))
Modules = tuple[tuple[str, Settings], ...]


def weights() -> dict[str, torch.Tensor]:
    return {"linear.weight": torch.randn(24, HIDDEN, generator=torch.Generator().manual_seed(3)) / HIDDEN**0.5}


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def arrange(
    root: Path,
    checkpoint: Path,
    modules: Modules,
    transformer: Settings = CHAT,
    sentences: Settings = PROMPTS,
    folder: str = "",
) -> Path:
    """A checkpoint with modules after it, as sentence-transformers lays them out."""
    shutil.copytree(checkpoint, root / folder)
    (root / folder / "chat_template.jinja").write_text(TEMPLATE)
    write(root / folder / "sentence_bert_config.json", transformer)
    write(root / "config_sentence_transformers.json", sentences)
    listed = [{"idx": 0, "name": "0", "path": folder, "type": f"{PACKAGE}base.modules.transformer.Transformer"}]
    for i, (kind, settings) in enumerate(modules, 1):
        listed.append({"idx": i, "name": str(i), "path": f"{i}_{kind}", "type": f"{PACKAGE}models.{kind}"})
        write(root / f"{i}_{kind}" / "config.json", settings)
        if kind == "Dense":
            save_file(weights(), root / f"{i}_{kind}" / "model.safetensors")
    write(root / "modules.json", listed)
    return root


@pytest.fixture
def planned(zoo: Zoo, tmp_path: Path) -> Callable[..., ExportPlan]:
    """What would be exported of such a directory, before anything is traced."""

    def plan(*given: Any, **named: Any) -> ExportPlan:
        root = arrange(tmp_path / "model", zoo.checkpoint("qwen2-vl"), *given, **named)
        return ExportPlan.make(ExportOptions(model=str(root)), root)

    return plan


def expected(model: Model, prompt: tuple[torch.Tensor, NDArray[np.int64]], head: str) -> torch.Tensor:
    states = model.reference.single_pass(*prompt, torch.empty(0, HIDDEN), "continue")
    if head == "single":
        return torch.nn.functional.normalize(states[-1:], dim=-1)
    projected = states @ weights()["linear.weight"].T
    rows = projected if head == "multi" else projected.mean(dim=0, keepdim=True)
    return torch.nn.functional.normalize(rows, dim=-1)


@pytest.mark.parametrize(("head", "modules"), [("single", SINGLE), ("mean", MEAN), ("multi", MULTI)])
def test_vectors(zoo: Zoo, tmp_path: Path, head: str, modules: Modules) -> None:
    """The last state, the mean of projected states, a projection of every state; a projection without a bias."""
    checkpoint = zoo.checkpoint("qwen2-vl")
    root = arrange(tmp_path / "model", checkpoint, modules, folder="0_Transformer" if head == "mean" else "")
    manifest = export(ExportOptions(model=str(root)), tmp_path / "bundle")
    assert manifest.head == ("colbert" if head == "multi" else "single")
    model = Model(tmp_path / "bundle", Embedder.load(tmp_path / "bundle", threads=1), Reference(checkpoint), {})
    page, query = model.embedder.embed_image(PAGE), model.embedder.embed_query(TEXT)
    np.testing.assert_allclose(page, expected(model, model.document(PAGE), head), rtol=0, atol=1e-5)
    np.testing.assert_allclose(query, expected(model, model.query(TEXT), head), rtol=0, atol=1e-5)


def test_a_projection_that_is_no_module_is_not_read(tmp_path: Path) -> None:
    """An adapter that sentence-transformers trained on a model of colpali-engine's, without its projection."""
    root = tmp_path / "adapter"
    arrange(root, GOLDEN / "colqwen2", SINGLE)
    for file in ("model.safetensors", "config.json"):
        (root / file).unlink()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": str(GOLDEN / "colqwen2")}
    write(root / "adapter_config.json", config)
    name = "base_model.model.language_model.layers.0.self_attn.q_proj.lora_"
    pair = {f"{name}A.weight": torch.ones(4, HIDDEN), f"{name}B.weight": torch.ones(HIDDEN, 4)}
    save_file(pair, root / "adapter_model.safetensors")
    source = find_source(None, str(root))
    plan = ExportPlan.make(ExportOptions(adapter=root), source.model.root)
    assert source.model.root == GOLDEN / "colqwen2"
    assert (plan.head, plan.query.prompt[:24]) == ("single", SYSTEM.format("Find.")[:24])
    assert plan.graphs[-1].outputs[0].shape[-1] == HIDDEN


def test_prompts_are_rendered_from_the_chat_template(planned: Callable[..., ExportPlan]) -> None:
    """A prompt by name is a system message; a template may tell queries from pages."""
    plan = planned(SINGLE)
    page = "<|vision_start|>{image}<|vision_end|>"
    assert plan.document.prompt == SYSTEM.format("You help.") + page + ASSISTANT
    assert plan.query.prompt == SYSTEM.format("Find.") + "{text}" + ASSISTANT + "<|endoftext|>"


def test_what_the_template_is_given(planned: Callable[..., ExportPlan]) -> None:
    plan = planned(SINGLE, SPEAKS, {"prompts": {"any": "Embed."}, "default_prompt_name": "any"})
    assert plan.document.prompt.startswith(SYSTEM.format("Embed."))
    assert plan.query.prompt == SYSTEM.format("Embed.") + "{text}" + ASSISTANT + "<|endoftext|><|im_start|>assistant\n"


def test_with_a_head_it_is_a_checkpoint_like_others(zoo: Zoo, tmp_path: Path) -> None:
    """Modules may be code of the repository's own, which is not run; what is lost is said."""
    root = arrange(tmp_path / "model", zoo.checkpoint("qwen2-vl"), SINGLE)
    listed = json.loads((root / "modules.json").read_text())
    listed[0]["type"] = "custom_st.Transformer"
    write(root / "modules.json", listed)
    with pytest.raises(CembedError, match=r"type is 'custom_st\.Transformer'.* with --head no modules are read"):
        ExportPlan.make(ExportOptions(model=str(root)), root)
    with pytest.warns(RuntimeWarning, match=r"modules\.json is not read, as the head is given"):
        plan = ExportPlan.make(ExportOptions(model=str(root), head="single"), root)
    assert plan.query.prompt.startswith(SYSTEM.format("You are a helpful assistant."))


def test_image_settings_of_the_processor_are_overruled(planned: Callable[..., ExportPlan]) -> None:
    given = CHAT | {"processing_kwargs": {"image": {"max_pixels": 28 * 28 * 9}, "text": {"padding": True}}}
    assert planned(SINGLE, given).backbone.image.max_pixels == 28 * 28 * 9


def test_settings_of_old(planned: Callable[..., ExportPlan]) -> None:
    """They say nothing of messages: a chat template does."""
    plan = planned(SINGLE, {"max_seq_length": 512, "do_lower_case": False}, {"prompts": {}})
    assert plan.query.prompt == SYSTEM.format("You help.") + "{text}" + ASSISTANT + "<|endoftext|>"


def test_the_tokenizers_own_tokens_go_around(zoo: Zoo, tmp_path: Path) -> None:
    """Unless the template begins with the first of them: so processors decide it."""
    checkpoint = Path(shutil.copytree(GOLDEN / "colidefics3", tmp_path / "checkpoint"))
    roles = json.loads((checkpoint / "tokenizer_config.json").read_text())
    for first, adds in (("<|im_start|>", False), ("<end_of_utterance>", True)):
        write(checkpoint / "tokenizer_config.json", roles | {"bos_token": first})
        root = arrange(tmp_path / str(adds), checkpoint, SINGLE)
        template = "<|im_start|>{% for m in messages %}{% for p in m['content'] %}{{ p['text'] or '<image>' }}"
        (root / "chat_template.jinja").write_text(template + "{% endfor %}{% endfor %}")
        plan = ExportPlan.make(ExportOptions(model=str(root)), root)
        assert plan.backbone.tokenizer_adds == adds
        assert plan.document.prompt.endswith("<|im_start|>{image}")


REFUSED: dict[str, tuple[Modules, Settings, Settings, str]] = {
    "max": ((("Pooling", LAST | {"pooling_mode": "max"}),), CHAT, PROMPTS, "pooling_mode is 'max'"),
    "two": ((("Pooling", LAST | {"pooling_mode": ["mean", "max"]}),), CHAT, PROMPTS, "pooling_mode is ['mean'"),
    "old cls": ((("Pooling", {"pooling_mode_cls_token": True}),), CHAT, PROMPTS, "is 'pooling_mode_cls_token'"),
    "no prompt": ((("Pooling", LAST | {"include_prompt": False}),), CHAT, PROMPTS, "include_prompt is False"),
    "tanh": (
        (("Pooling", LAST), ("Dense", DENSE | {"activation_function": "torch.nn.modules.activation.Tanh"})),
        CHAT,
        PROMPTS,
        "activation_function is 'torch.nn.modules.activation.Tanh'",
    ),
    "residual": ((("Pooling", LAST), ("Dense", DENSE | {"use_residual": True})), CHAT, PROMPTS, "use_residual is True"),
    "other rows": ((("Pooling", LAST), ("Dense", DENSE | ON_TOKENS)), CHAT, PROMPTS, "is 'token_embeddings'"),
    "no bias": ((("Pooling", LAST), ("Dense", DENSE | {"bias": True})), CHAT, PROMPTS, "custom_text_proj.weight only"),
    "order": ((("Normalize", {}), ("Dense", DENSE | ON_TOKENS)), CHAT, PROMPTS, "has Transformer, Normalize, Dense:"),
    "two projections": ((*MEAN, ("Dense", DENSE)), CHAT, PROMPTS, "has Transformer, Pooling, Dense, Dense:"),
    "another module": ((("LayerNorm", {}),), CHAT, PROMPTS, "type is 'sentence_transformers.models.LayerNorm'"),
    "some tokens": (
        (*MULTI[:1], ("MultiVectorMask", MASK | {"keep_only_token_ids": [3]}), MULTI[2]),
        CHAT,
        PROMPTS,
        "keep_only_token_ids is [3]",
    ),
    "lengths": (MEAN, CHAT, PROMPTS | {"similarity_fn_name": "dot"}, "add a Normalize module"),
    "distance": (SINGLE, CHAT, PROMPTS | {"similarity_fn_name": "euclidean"}, "similarity_fn_name is 'euclidean'"),
    "lengths of others": ((("Pooling", LAST), ("Normalize", ON_TOKENS)), CHAT, PROMPTS, "is 'token_embeddings'"),
    "lengths of none": ((MULTI[0], ("Normalize", {})), CHAT, PROMPTS, "supported is 'token_embeddings'"),
    "truncated": (SINGLE, CHAT, PROMPTS | {"truncate_dim": 32}, "truncate_dim is 32"),
    "a prompt that is none": (SINGLE, CHAT, {"prompts": {"query": 3}}, "query is 3: supported is a text"),
    "expansion": (MULTI, CHAT | {"query_expansion": {"length": 32}}, PROMPTS, "query_expansion is {'length': 32}"),
    "another task": (SINGLE, CHAT | {"transformer_task": "fill-mask"}, PROMPTS, "transformer_task is 'fill-mask'"),
    "flat": (
        SINGLE,
        CHAT | {"modality_config": {"message": {"format": "flat"}}},
        PROMPTS,
        "format is 'flat'",
    ),
    "no messages": (SINGLE, CHAT | {"modality_config": {"text": {}}}, PROMPTS, "has no chat template"),
    "special tokens": (
        SINGLE,
        CHAT | {"processing_kwargs": {"text": {"add_special_tokens": False}}},
        PROMPTS,
        "add_special_tokens is False",
    ),
}


@pytest.mark.parametrize(("modules", "transformer", "sentences", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_expressed_is_named(
    planned: Callable[..., ExportPlan], modules: Modules, transformer: Settings, sentences: Settings, words: str
) -> None:
    with pytest.raises(CembedError) as raised:
        planned(modules, transformer, sentences)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "file", ["sentence_bert_config.json", "1_Pooling/config.json", "tokenizer_config.json", "modules.json"]
)
def test_every_field_of_a_file(zoo: Zoo, tmp_path: Path, file: str) -> None:
    """A plan, or one line that says what is wrong."""
    root = arrange(tmp_path / "model", zoo.checkpoint("qwen2-vl"), SINGLE, SPEAKS)
    taken, refused = 0, []
    for _, content in mutations(json.loads((root / file).read_text())):
        (root / file).write_text(content)
        try:
            ExportPlan.make(ExportOptions(model=str(root)), root)
            taken += 1
        except CembedError as error:
            refused.append(str(error))
    assert not any("\n" in message for message in refused)
    assert taken > 10


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0]['content'][0]['text'] | upper }}", "one prompt around it is needed"),
        ("{{ messages[0]['content'] }}", "of a page: one <|image_pad|> is needed"),
        ("{% for", "cannot be rendered"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered"),
        ("{{ raise_exception('no') }}", "cannot be rendered: no"),
        ("", "has no chat template"),
    ],
)
def test_templates_that_are_no_prompt(zoo: Zoo, tmp_path: Path, template: str, words: str) -> None:
    root = arrange(tmp_path / "model", zoo.checkpoint("qwen2-vl"), SINGLE, sentences={})
    text = "<|image_pad|>" if words.startswith("one") else ""
    (root / "chat_template.jinja").write_text(template + text)
    with pytest.raises(CembedError, match=words.replace("|", r"\|")):
        ExportPlan.make(ExportOptions(model=str(root)), root)


@pytest.mark.parametrize("content", ["{}", "[]", "[3]", "[", '[{"type": "sentence_transformers.models.Transformer"}]'])
def test_lists_of_modules_that_are_none(zoo: Zoo, tmp_path: Path, content: str) -> None:
    root = arrange(tmp_path / "model", zoo.checkpoint("qwen2-vl"), SINGLE)
    (root / "modules.json").write_text(content)
    with pytest.raises(CembedError, match=r"modules\.json"):
        ExportPlan.make(ExportOptions(model=str(root)), root)


def test_modules_are_beside_their_list(zoo: Zoo, tmp_path: Path) -> None:
    root = arrange(tmp_path / "model", zoo.checkpoint("qwen2-vl"), SINGLE)
    listed = json.loads((root / "modules.json").read_text())
    for path in ("../other", "/tmp", "a\\..\\..\\b"):
        listed[1]["path"] = path
        write(root / "modules.json", listed)
        with pytest.raises(CembedError, match="supported is a folder beside it"):
            ExportPlan.make(ExportOptions(model=str(root)), root)

"""Directories of sentence-transformers: modules in a row, prompts by name, and a chat template around every input."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cembed.export.backbones import Backbone
from cembed.export.chat import ChatTemplate, system
from cembed.export.settings import MAX_BYTES, Settings, one_line, require_file
from cembed.export.weights import SINGLE
from cembed.runtime.bundle.manifest import Pooling
from cembed.runtime.errors import CembedError

MODULES, PROMPTS, TRANSFORMER = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
PACKAGE = "sentence_transformers."
TOKENS, VECTOR = "token_embeddings", "sentence_embedding"
LETTERS = {"Transformer": "T", "Pooling": "P", "Dense": "D", "Normalize": "N", "MultiVectorMask": "M"}
ORDER = re.compile(r"T(?:PD?|DP)N?|TD?(?:MN?|NM?)")
"""A pooled vector, or one for every token; a projection before or after the pooling."""
POOLINGS: Mapping[str, Pooling] = {"lasttoken": "last", "mean": "mean"}
OLD_POOLINGS = {"pooling_mode_lasttoken": "lasttoken", "pooling_mode_mean_tokens": "mean"}
IDENTITY = "torch.nn.modules.linear.Identity"
TASKS = ("feature-extraction", "retrieval")
PAGE_PROMPTS, QUERY_PROMPTS = ("document", "passage", "corpus"), ("query",)
TEXT_SETTINGS = {"padding", "truncation", "max_length"}


@dataclass(frozen=True)
class Module:
    """One module: its kind and its settings, in its folder."""

    kind: str
    folder: Path
    settings: Settings


@dataclass(frozen=True)
class Pipeline:
    """What the modules say of a head, and their prompts of a page and a query.

    `folder` has the transformer; `dense` is the file of a projection; `images` goes over the image settings; `names`
    are given to the chat template; `wraps` says that the transformer is a retrieval class with its own projection.
    """

    folder: Path
    head: str
    pooling: Pooling | None
    dense: Path | None
    bias: bool
    images: Mapping[str, Any]
    names: Mapping[str, Any]
    document: str
    query: str
    chats: bool
    wraps: bool

    @classmethod
    def read(cls, root: Path) -> Pipeline | None:
        """None where there is no `modules.json`. Raises CembedError that names what cannot be expressed."""
        if not (root / MODULES).exists():
            return None
        modules = read_modules(root)
        first, pooling, dense = modules[0], of_kind(modules, "Pooling"), of_kind(modules, "Dense")
        sentences = Settings.read(root / PROMPTS) if (root / PROMPTS).exists() else Settings(str(root / PROMPTS), {})
        check_transformer(first.settings)
        check_vectors(modules, sentences)
        processing = Settings(first.settings.where, first.settings.values.get("processing_kwargs") or {})
        return cls(
            folder=first.folder,
            head="single" if pooling else "colbert",
            pooling=pooling_of(pooling.settings) if pooling else None,
            dense=dense.folder / SINGLE if dense else None,
            bias=check_dense(dense.settings, VECTOR if pooling_first(modules) else TOKENS) if dense else True,
            images=part_of(processing, "image"),
            names=part_of(processing, "chat_template"),
            document=prompt_of(sentences, PAGE_PROMPTS),
            query=prompt_of(sentences, QUERY_PROMPTS),
            chats=chats(first),
            wraps=wraps(first),
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """Safetensors beside those of the transformer."""
        return (self.dense,) if self.dense else ()

    def dress(self, backbone: Backbone, tokenizer: Tokenizer) -> Backbone:
        """The backbone with the prompts that are rendered here; those of a wrapper's processor stay.

        Raises CembedError: no chat template, or one that is no prompt around one image or text.
        """
        if not self.chats and backbone.dim is not None:
            page, query = backbone.prompts
            return replace(backbone, prompts=(page, query.replace("{text}", self.query + "{text}")))
        template = ChatTemplate.of(self.folder, self.names) if self.chats else None
        if template is None:
            raise CembedError(
                f"{self.folder} has no chat template, and what stands around a page is not known without one"
            )
        token = tokenizer.id_to_token(backbone.image_token_id)
        if token is None:
            raise CembedError(f"the config's image token {backbone.image_token_id} is no token of the tokenizer")
        given = [[system(prompt)] if prompt else [] for prompt in (self.document, self.query)]
        prompts = (
            template.of_task("document").page(given[0], token),
            template.of_task("query").query(given[1]),
        )
        return replace(backbone, prompts=prompts, single_prompts=None, tokenizer_adds=adds(template, prompts))


def adds(template: ChatTemplate, prompts: tuple[str, str]) -> bool:
    """Whether the tokenizer's own first and last tokens go around what is rendered, as processors decide it."""
    first = template.names.get("bos_token")
    found = {first is None or not prompt.startswith(first) for prompt in prompts}
    if len(found) > 1:
        raise CembedError(f"{template.where} starts either pages or queries with {first}: both are needed, or none")
    return found.pop()


def transformer_folder(root: Path) -> Path:
    """Where the transformer is; `root` itself where it is no directory of sentence-transformers."""
    return folder_of(root, listed_modules(root)[0]) if (root / MODULES).exists() else root


def listed_modules(root: Path) -> list[Settings]:
    """At least one. Raises CembedError for anything else than a list of objects."""
    path = root / MODULES
    require_file(path)
    try:
        listed = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise CembedError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise CembedError(f"{path} holds no list of modules")
    return [Settings(f"{path}: {i}", entry) for i, entry in enumerate(listed)]


def read_modules(root: Path) -> list[Module]:
    """Raises CembedError: modules that cembed does not have, or in another order."""
    modules = [read_module(root, entry) for entry in listed_modules(root)]
    if not ORDER.fullmatch("".join(LETTERS[module.kind] for module in modules)):
        names = ", ".join(module.kind for module in modules)
        raise CembedError(
            f"{root / MODULES} has {names}: cembed has Transformer, Pooling or none, Dense or none, Normalize"
        )
    return modules


def read_module(root: Path, entry: Settings) -> Module:
    kind = entry.text("type")
    name = kind.rpartition(".")[2]
    if not kind.startswith(PACKAGE) or name not in LETTERS:
        known = ", ".join(LETTERS)
        entry.refuse("type", f"one of {known} of sentence_transformers; with --head no modules are read")
    folder = folder_of(root, entry)
    file = folder / (TRANSFORMER if name == "Transformer" else "config.json")
    return Module(name, folder, Settings.read(file) if file.exists() else Settings(str(file), {}))


def folder_of(root: Path, entry: Settings) -> Path:
    path = entry.values.get("path")
    if not isinstance(path, str) or path.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", path):
        entry.refuse("path", "a folder beside it")
    return root / path


def of_kind(modules: list[Module], kind: str) -> Module | None:
    return next((module for module in modules if module.kind == kind), None)


def pooling_first(modules: list[Module]) -> bool:
    return modules[1].kind == "Pooling"


def check_transformer(settings: Settings) -> None:
    """Raises CembedError for what is done to inputs here and not there."""
    settings.over({"transformer_task": TASKS[0]}).require("transformer_task", *TASKS)
    settings.over({"query_expansion": None}).require("query_expansion", None)
    processing = settings.values.get("processing_kwargs") or {}
    if not isinstance(processing, dict):
        settings.refuse("processing_kwargs", "an object")
    found = Settings(f"{settings.where}: processing_kwargs", processing)
    for unknown in sorted(part_of(found, "text").keys() - TEXT_SETTINGS):
        found.section("text").refuse(unknown, ", ".join(sorted(TEXT_SETTINGS)))
    for unknown in sorted(part_of(found, "common")):
        found.section("common").refuse(unknown, "none of these")


def part_of(settings: Settings, name: str) -> Mapping[str, Any]:
    return settings.section(name).values if settings.has(name) else {}


def check_vectors(modules: list[Module], sentences: Settings) -> None:
    """Raises CembedError: tokens that give no vector, vectors that are not compared by their cosines."""
    if mask := of_kind(modules, "MultiVectorMask"):
        for name in ("skiplist_words", "keep_only_token_ids"):
            if mask.settings.values.get(name):
                mask.settings.refuse(name, "none, as every token has a vector here")
    if normalize := of_kind(modules, "Normalize"):
        check_place(normalize.settings, VECTOR if of_kind(modules, "Pooling") else TOKENS)
    sentences.over({"truncate_dim": None}).require("truncate_dim", None)
    similarity = sentences.over({"similarity_fn_name": None})
    similarity.require("similarity_fn_name", None, "cosine", "dot", "maxsim")
    whole = of_kind(modules, "Normalize") or similarity.values["similarity_fn_name"] in (None, "cosine")
    if not whole and not wraps(modules[0]):
        raise CembedError(f"{similarity.where}: vectors are compared with their lengths: add a Normalize module")


def pooling_of(settings: Settings) -> Pooling:
    """Raises CembedError for another one than the last token's state, or the mean."""
    old = [name for name, value in settings.values.items() if name.startswith("pooling_mode_") and value is True]
    mode = settings.values.get("pooling_mode", OLD_POOLINGS.get(old[0], old[0]) if len(old) == 1 else old)
    if not isinstance(mode, str) or mode not in POOLINGS:
        raise CembedError(f"{settings.where}: pooling_mode is {mode!r:.80}: supported is {' or '.join(POOLINGS)}")
    settings.over({"include_prompt": True}).require("include_prompt", True)
    return POOLINGS[mode]


def check_dense(settings: Settings, before: str) -> bool:
    """Whether it has a bias. Raises CembedError: more than a projection of `before`."""
    settings.require("activation_function", IDENTITY)
    settings.over({"use_residual": False}).require("use_residual", False)
    check_place(settings, before)
    return settings.flag("bias", True)


def check_place(settings: Settings, what: str) -> None:
    """Raises CembedError: another thing than `what` is taken, or put elsewhere."""
    named = settings.over({"module_input_name": VECTOR})
    named.require("module_input_name", what)
    named.over({"module_output_name": what}).require("module_output_name", what, None)


def prompt_of(sentences: Settings, names: tuple[str, ...]) -> str:
    """The prompt of a side: by its name, or the one that is used by default."""
    prompts = part_of(sentences, "prompts")
    name = next((name for name in names if name in prompts), sentences.values.get("default_prompt_name"))
    prompt = prompts.get(name) if isinstance(name, str) else None
    if not isinstance(prompt, str | None):
        Settings(f"{sentences.where}: prompts", prompts).refuse(str(name), "a text")
    return prompt or ""


def wraps(transformer: Module) -> bool:
    return transformer.settings.values.get("transformer_task") == TASKS[1]


def chats(transformer: Module) -> bool:
    """Whether inputs become messages; settings of old say nothing of that, and a chat template decides."""
    if transformer.settings.has("modality_config"):
        modalities = transformer.settings.section("modality_config")
        if modalities.has("message"):
            modalities.section("message").over({"format": "structured"}).require("format", "structured")
        return modalities.has("message")
    return ChatTemplate.of(transformer.folder, {}) is not None

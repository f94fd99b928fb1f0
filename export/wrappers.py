"""transformers' own retrieval classes, names in `-hf`: what is in them, and what their processors put around inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cembed.export.settings import Settings
from cembed.runtime.errors import CembedError

PROCESSOR, ROLES = "processor_config.json", "tokenizer_config.json"
PLAIN_POSITIONS, LINE_BREAKS = (5, 2), (5, 15)
"""The versions of transformers from which on ColQwen2ForRetrieval counts the positions of a page one by one, in place
of M-RoPE, and its processor ends queries with a line break."""


@dataclass(frozen=True)
class Wrapper:
    """A class of transformers, by its processor's conventions.

    `prompt` and `prefix` are what its processor says unless told; where `image_token` is empty the image and the first
    token go before `prompt`, otherwise `image_token` is a part of it. `augmentation` follows a query ten times; without
    one it is the tokenizer's padding.
    """

    prompt: str
    prefix: str
    image_token: str = ""
    augmentation: str = ""
    line_breaks: tuple[int, int] | None = None
    plain_positions: tuple[int, int] | None = None


WRAPPERS: Mapping[str, Wrapper] = {
    "colpali": Wrapper("Describe the image.", "Question: ", line_breaks=(4, 0)),
    "colqwen2": Wrapper(
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|><|endoftext|>",
        "Query: ",
        image_token="<|image_pad|>",
        line_breaks=LINE_BREAKS,
        plain_positions=PLAIN_POSITIONS,
    ),
    "colmodernvbert": Wrapper(
        "<|begin_of_text|>User:<image>Describe the image.<end_of_utterance>\nAssistant:",
        "",
        image_token="<image>",
        augmentation="<end_of_utterance>",
    ),
}
"""By model type."""


@dataclass(frozen=True)
class Wrapped:
    """What a wrapper's files say beside the configuration `config` of the model in it; `kind` is its model type."""

    kind: str
    config: Settings
    prompts: tuple[str, str]
    dim: int
    plain_positions: bool


def unwrapped(given: Settings, root: Path) -> Wrapped | None:
    """What is in a wrapper; None for the configuration of another model.

    Raises CembedError: a wrapper that cembed does not know, a processor whose prompt is not one text around one image.
    """
    kind = given.text("model_type")
    if not given.has("vlm_config") and kind not in WRAPPERS:
        return None
    if kind not in WRAPPERS:
        raise CembedError(f"{root} is a {kind:.80} wrapper, and cembed has {', '.join(WRAPPERS)}: see docs/models.md")
    wrapper, config = WRAPPERS[kind], given.section("vlm_config")
    version = saved_by(given)
    prompts = page_prompt(wrapper, root), query_prompt(wrapper, root, version)
    return Wrapped(kind, config, prompts, given.count("embedding_dim"), since(version, wrapper.plain_positions))


def saved_by(given: Settings) -> tuple[int, int]:
    """The version of transformers that wrote a configuration; 4.0 where it is not said."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})", str(given.values.get("transformers_version")))
    return (int(found[1]), int(found[2])) if found else (4, 0)


def since(version: tuple[int, int], first: tuple[int, int] | None) -> bool:
    return first is not None and version >= first


def page_prompt(wrapper: Wrapper, root: Path) -> str:
    prompt = spoken(root, "visual_prompt_prefix", wrapper.prompt)
    if not wrapper.image_token:
        return "{image}" + role(root, "bos_token") + prompt + "\n"
    if prompt.count(wrapper.image_token) != 1:
        raise CembedError(
            f"{root / PROCESSOR}: visual_prompt_prefix is {prompt!r:.200}: one {wrapper.image_token} is needed"
        )
    return prompt.replace(wrapper.image_token, "{image}")


def query_prompt(wrapper: Wrapper, root: Path, version: tuple[int, int]) -> str:
    start = "" if wrapper.image_token else role(root, "bos_token")
    end = 10 * (wrapper.augmentation or role(root, "pad_token"))
    line = "\n" if since(version, wrapper.line_breaks) else ""
    return start + spoken(root, "query_prefix", wrapper.prefix) + "{text}" + end + line


def spoken(root: Path, name: str, default: str) -> str:
    """A text of the processor; its own default where it is not there or empty."""
    settings = Settings.read(root / PROCESSOR) if (root / PROCESSOR).exists() else Settings(str(root / PROCESSOR), {})
    return settings.text(name) if settings.values.get(name) else default


def role(root: Path, name: str) -> str:
    """A token's text by its part in the tokenizer, which may come with flags. Raises CembedError: there is none."""
    settings = Settings.read(root / ROLES)
    if isinstance(settings.values.get(name), dict):
        return settings.section(name).text("content")
    return settings.text(name)

"""Chat templates: what is rendered around a page or a query, as prompts with `{image}` and `{text}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cembed.export.settings import Settings, one_line, require_file
from cembed.export.wrappers import PROCESSOR, ROLES, role
from cembed.runtime.errors import CembedError

LEGACY, FILE = "chat_template.json", "chat_template.jinja"
MAX_TEMPLATE = 1 << 20
"""Bytes of a template."""
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
PROBES = ("a question", "Some other words")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and the names that it is rendered with: tokens by their parts, and what its user set."""

    where: Path
    source: str
    names: Mapping[str, Any]

    @classmethod
    def of(cls, root: Path, names: Mapping[str, Any]) -> ChatTemplate | None:
        """That of the processor, or of the tokenizer, as transformers looks for it; None if there is none."""
        for file in (PROCESSOR, LEGACY, FILE, ROLES):
            source = source_in(root / file) if (root / file).exists() else ""
            if source:
                return cls(root / file, source, {**token_names(root), **names})
        return None

    def of_task(self, task: str) -> ChatTemplate:
        """The template as it is rendered for a page, `document`, or a `query`: some tell them apart."""
        return replace(self, names={"task": task, **self.names})

    def page(self, before: Sequence[Message], image_token: str) -> str:
        """The prompt of a page. Raises CembedError: not one image in it, a template that fails."""
        text = self.render([*before, user({"type": "image", "image": "page"})])
        if text.count(image_token) != 1:
            raise CembedError(f"{self.where} makes {text!r:.200} of a page: one {image_token} is needed")
        return text.replace(image_token, "{image}")

    def query(self, before: Sequence[Message]) -> str:
        """The prompt of a query. Raises CembedError: what is around a text depends on it, a template that fails."""
        texts = [self.render([*before, user({"type": "text", "text": probe})]) for probe in PROBES]
        first, second = (text.split(probe) for text, probe in zip(texts, PROBES, strict=True))
        if len(first) != 2 or first != second:
            raise CembedError(f"{self.where} makes {texts[0]!r:.200} of {PROBES[0]!r}: one prompt around it is needed")
        return "{text}".join(first)

    def render(self, messages: Sequence[Message]) -> str:
        """In transformers' sandbox."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, _ = render_jinja_template([list(messages)], chat_template=self.source, **self.names)
        except Exception as error:  # whatever a template does
            raise CembedError(f"{self.where} cannot be rendered: {one_line(error)}") from error
        return str(texts[0])


def user(part: Message) -> Message:
    return {"role": "user", "content": [part]}


def system(text: str) -> Message:
    return {"role": "system", "content": [{"type": "text", "text": text}]}


def source_in(path: Path) -> str:
    """The template in a file of settings, or a file that is one; nothing if there is none."""
    if path.suffix == ".json":
        settings = Settings.read(path)
        return settings.text("chat_template") if settings.has("chat_template") else ""
    require_file(path)
    try:
        if path.stat().st_size > MAX_TEMPLATE:
            raise CembedError(f"{path} has {path.stat().st_size} bytes: at most {MAX_TEMPLATE} are read")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CembedError(f"{path} cannot be read: {one_line(error)}") from error


def token_names(root: Path) -> dict[str, str]:
    """Texts of tokens by their parts in the tokenizer."""
    roles = Settings.read(root / ROLES) if (root / ROLES).exists() else Settings(str(root / ROLES), {})
    return {name: role(root, name) for name in TOKENS if roles.has(name)}

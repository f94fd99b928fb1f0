"""Where a checkpoint comes from: a folder or the hub, a model or an adapter on one, or what people take without one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cembed.export.adapter import base_name, is_adapter
from cembed.export.choices import BACKBONES, require_choice
from cembed.export.pipelines import transformer_folder
from cembed.export.settings import one_line
from cembed.runtime.errors import CembedError

HUB_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.jinja")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Place:
    """A folder in Hugging Face layout, and the commit to which a hub id was pinned."""

    name: str
    root: Path
    revision: str | None

    @classmethod
    def of(cls, name: str, revision: str | None = None) -> Place:
        """A directory, or what the hub has of that id: safetensors, JSON and tokenizer files only.

        Raises CembedError where there is neither.
        """
        if Path(name).is_dir():
            return cls(Path(name).resolve().name, Path(name), None)
        if Path(name).exists() or not _HUB_ID.fullmatch(name):
            raise CembedError(f"no checkpoint at {name!r}: give a directory or a hub id such as Z1zs/CausalQwen2.5")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            root = Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES)))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise CembedError(f"{name!r} is no directory, and the hub did not give it: {one_line(error)}") from error
        return cls(name, root, root.name)

    def about(self, what: str) -> dict[str, str]:
        """For the manifest."""
        pinned = {} if self.revision is None else {"revision" if what == "model" else f"{what}_revision": self.revision}
        return {what: self.name, **pinned}


@dataclass(frozen=True)
class Source:
    """A model, and the adapter that is merged into it."""

    model: Place
    adapter: Place | None

    def about(self) -> dict[str, str]:
        return self.model.about("model") | (self.adapter.about("adapter") if self.adapter else {})


def find_source(
    backbone: str | None,
    model: str | None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    base: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Source:
    """What `model` names; an adapter comes with the model that it was trained on, or with `base`.

    Without `model` it is the checkpoint that people use of the backbone.
    Raises CembedError: nothing to look for, or it was not found.
    """
    given = Place.of(model, revision) if model is not None else _usual(backbone, revision)
    merged = None if adapter is None else Place.of(str(adapter))
    if merged is None and is_adapter(transformer_folder(given.root)):
        found = _base_of(given, base)
        tell(f"{given.name} is a LoRA adapter, merged into {found.name}")
        return Source(found, given)
    if base is not None:
        raise CembedError(
            f"--base {base}: {given.name} is no adapter; a model and an adapter are --model and --adapter"
        )
    return Source(given, merged)


def usual_checkpoint(backbone: str | None) -> str:
    """The hub id of what people use. Raises CembedError: no backbone, an unknown one."""
    if backbone is None:
        raise CembedError(f"give a checkpoint with --model, or a --backbone: {', '.join(BACKBONES)}")
    require_choice("backbone", backbone, BACKBONES)
    return BACKBONES[backbone].checkpoint


def _usual(backbone: str | None, revision: str | None) -> Place:
    name = usual_checkpoint(backbone)
    try:
        return Place.of(name, revision)
    except CembedError as error:
        raise CembedError(
            f"without --model, {backbone} is {name} of the hub, which could not be had: give a copy with --model DIR "
            f"({error})"
        ) from error


def _base_of(adapter: Place, base: str | None) -> Place:
    name = base or base_name(transformer_folder(adapter.root))
    if name is None:
        raise CembedError(f"{adapter.root} is a LoRA adapter that does not say of what: give the model with --base")
    try:
        return Place.of(name)
    except CembedError as error:
        raise CembedError(
            f"{adapter.root} is a LoRA adapter on {name!r}, which was not found: give it with --base ({error})"
        ) from error

"""Checkpoints in Hugging Face layout: found, read strictly, one tensor at a time.

Keys come with many prefixes (`model.`, `language_model.`, `base_model.model.`, …); `canonical_name` strips them to

    layers.N.…  embed_tokens.weight  norm.weight      the text decoder
    visual.…    vision_tower.…  multi_modal_projector.…  connector.…   the image encoder
    custom_text_proj.{weight,bias}                    a projection of the last hidden states, [dim, hidden] and [dim]
    slot_embeddings.{document,query}                  rows fed into latent slots, [slots, hidden]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from cembed.export.adapter import Adapter, Shape, refuse_alone
from cembed.export.weights import Weights, canonical_name, weight_files
from cembed.runtime.errors import CembedError

_NOT_USED = re.compile(r"^lm_head\.|^mtp\.|\.rotary_emb\.inv_freq$|\.position_ids$|^vision_tower\.head\.")


def named_weights(
    root: Path, sources: Sequence[Sequence[Path]], unread: Sequence[str] = ()
) -> dict[str, tuple[Weights, str]]:
    """Where each weight is, by its canonical name; those called `unread` count in all sources but the first.

    Raises CembedError: damaged files, two weights of one name.
    """
    keys: dict[str, tuple[Weights, str]] = {}
    for i, weights in enumerate(map(Weights, sources)):
        for key in weights:
            name = canonical_name(key)
            if i == 0 and name in unread:
                continue
            if name in keys:
                raise CembedError(f"{root}: {key} and {keys[name][1]} are the same weight")
            keys[name] = (weights, key)
    return keys


@dataclass
class Checkpoint:
    """Tensors by canonical name; `unused` shrinks as they are loaded, so that left-over weights can be named.

    `zeros` are weights that no file has, by their shapes.
    """

    root: Path
    adapter: Adapter | None
    keys: dict[str, tuple[Weights, str]]
    unused: set[str]
    zeros: dict[str, Shape] = field(default_factory=dict)

    @classmethod
    def open(
        cls, root: Path, adapter: Path | None, head_weights: Sequence[Path] = (), unread: Sequence[str] = ()
    ) -> Checkpoint:
        """The weights in `root` but for those called `unread`, with those of other files.

        Raises CembedError: an adapter in place of a model, damaged files, two weights of one name, an adapter that
        does not fit."""
        if adapter is None:
            refuse_alone(root)
        keys = named_weights(root, [weight_files(root), *([path] for path in head_weights)], unread)
        merged = Adapter(adapter) if adapter else None
        names = keys.keys() | (merged.whole.keys() if merged else set())
        opened = cls(root, merged, keys, {name for name in names if not _NOT_USED.search(name)})
        if merged:
            merged.check(lambda name: opened.shape(name) if name in keys else None)
        return opened

    def __contains__(self, name: str) -> bool:
        return name in self.keys or name in self.zeros or (self.adapter is not None and name in self.adapter.whole)

    def shape(self, name: str) -> Shape:
        """The shape of a weight that is there."""
        whole = self.adapter.shape(name) if self.adapter else None
        if whole is not None:
            return whole
        if name in self.zeros:
            return self.zeros[name]
        weights, key = self.keys[name]
        return weights.shape(key)

    def load(self, name: str) -> Tensor:
        """One tensor, the adapter merged in. Raises CembedError if the checkpoint has none of that name."""
        weights, key = self.keys.get(name, (None, name))
        tensor = weights.load(key) if weights else None
        if name in self.zeros:
            tensor = torch.zeros(self.zeros[name])
        if self.adapter:
            tensor = self.adapter.apply(name, tensor)
        if tensor is None:
            raise CembedError(f"{self.root} has no weight {name}")
        self.unused.discard(name)
        return tensor

    @property
    def embeddings_name(self) -> str:
        """The input embedding table [vocabulary, hidden]; where only the output table is stored, they are tied."""
        tied = "embed_tokens.weight" not in self and "lm_head.weight" in self
        return "lm_head.weight" if tied else "embed_tokens.weight"

    def drop(self, pattern: re.Pattern[str]) -> None:
        """Do not miss the weights whose names match."""
        self.unused = {name for name in self.unused if not pattern.search(name)}

    def require(self, names: Iterable[str]) -> None:
        """Raises CembedError that names what is missing and what is left over, all at once."""
        wanted = set(names)
        missing = sorted(name for name in wanted if name not in self)
        extra = sorted(self.unused - wanted)
        if missing or extra:
            parts = [f"{what} {_few(found)}" for what, found in (("missing", missing), ("unexpected", extra)) if found]
            raise CembedError(f"{self.root} does not fit the backbone: {'; '.join(parts)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_shape(module: nn.Module, checkpoint: Checkpoint, prefix: str, name: str) -> None:
    """Raises CembedError if the weight that becomes the parameter `name` of `module` has another shape than it."""
    given, target = checkpoint.shape(prefix + name), module.get_parameter(name)
    try:
        found = convert(module, name, torch.empty(given, device="meta")).shape
    except (RuntimeError, IndexError):  # too few axes, or too many
        found = None
    if found != target.shape:
        gives = "" if found is None else f", which gives {tuple(found)}"
        raise CembedError(
            f"{checkpoint.root}: {prefix}{name} has shape {given}{gives}, but its config asks for {tuple(target.shape)}"
        )


def convert(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A weight of the checkpoint as the owner of the parameter `name` stores it."""
    owner_name, _, leaf = name.rpartition(".")
    conversion = getattr(module.get_submodule(owner_name), "convert", None)
    converted: Tensor = conversion(leaf, tensor) if conversion else tensor
    return converted


def parameter(module: nn.Module, checkpoint: Checkpoint, prefix: str, name: str, *, finite: bool) -> Tensor:
    """The parameter `name` of `module` as the module wants it: converted, contiguous, its dtype.

    Raises CembedError if it shall be `finite` and is not.
    """
    tensor = convert(module, name, checkpoint.load(prefix + name))
    result = tensor.to(module.get_parameter(name).dtype).contiguous()
    return require_finite(result, prefix + name) if finite else result


def require_finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor. Raises CembedError if it holds NaN or infinity, which half floats also make of numbers over 65504."""
    if tensor.numel() and not all(bound.isfinite() for bound in torch.aminmax(tensor)):
        narrow = ", or numbers that half floats cannot hold: try --dtype fp32" if tensor.dtype == torch.float16 else ""
        raise CembedError(f"{name} holds NaN or infinity{narrow}")
    return tensor

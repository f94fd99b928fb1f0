"""Checkpoints in Hugging Face layout: found, read strictly, one tensor at a time.

Keys come with many prefixes (`model.`, `language_model.`, `base_model.model.`, …); `canonical_name` strips them to

    layers.N.…  embed_tokens.weight  norm.weight      the text decoder
    visual.…    vision_tower.…  multi_modal_projector.…   the image encoder
    custom_text_proj.{weight,bias}                    a projection of the last hidden states, [dim, hidden] and [dim]
    slot_embeddings.{document,query}                  rows fed into latent slots, [slots, hidden]
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cembed.runtime.errors import CembedError

HUB_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.jinja")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_WRAPPERS = re.compile(r"^(?:(?:base_model|model|language_model|vlm|module)\.)+")
_SPELLINGS = (("embedding_proj_layer.", "custom_text_proj."), ("vision_tower.vision_model.", "vision_tower."))
_NOT_USED = re.compile(r"^lm_head\.|\.rotary_emb\.inv_freq$|\.position_ids$|^vision_tower\.head\.")
_LORA = re.compile(r"^(.*)\.lora_(A|B)(?:\.default)?\.weight$")
_NOT_MERGED = (
    "use_dora",
    "fan_in_fan_out",
    "use_qalora",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
_PLAIN_STARTS = (True, False, "gaussian", "eva")  # the others change the base weights
_SAVED_MODULE = re.compile(r"\.modules_to_save(?:\.default)?\.|\.base_layer\.")


def canonical_name(key: str) -> str:
    """The name of a checkpoint key without the prefixes of the classes that wrapped it.

    >>> canonical_name("model.language_model.layers.0.self_attn.q_proj.weight")
    'layers.0.self_attn.q_proj.weight'
    >>> canonical_name("base_model.model.custom_text_proj.weight")
    'custom_text_proj.weight'
    """
    name = _WRAPPERS.sub("", key)
    for spelling, ours in _SPELLINGS:
        if name.startswith(spelling):
            name = ours + name.removeprefix(spelling)
    return name


def resolve(model: str, revision: str | None) -> tuple[Path, str | None]:
    """The directory of a checkpoint and, for a hub id, the commit it was pinned to.

    Only safetensors, JSON and tokenizer files are fetched. Raises CembedError where there is neither.
    """
    if Path(model).is_dir():
        return Path(model), None
    if Path(model).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise CembedError(f"no checkpoint at {model!r}: give a directory or a hub id such as Z1zs/CausalQwen2.5")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        root = Path(snapshot_download(model, revision=revision, allow_patterns=list(HUB_FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CembedError(f"{model!r} is no directory, and the hub did not give it: {reason}") from error
    return root, root.name


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CembedError(f"{path} is missing") from error
    except ValueError as error:
        raise CembedError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CembedError(f"{path} holds no JSON object")
    return value


def weight_files(root: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises CembedError if there are none; pickles are never opened."""
    index = root / "model.safetensors.index.json"
    if index.exists():
        return sorted({root / name for name in read_json(index)["weight_map"].values()})
    files = sorted(root.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for suffix in _PICKLES for path in root.glob(suffix))
        refused = f"found {pickles[0]}, a pickle, which can run code: convert it to safetensors" if pickles else ""
        raise CembedError(f"{root} has no *.safetensors file: {refused or 'found none'}")
    return files


class Weights:
    """All tensors of some safetensors files, by key."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[str, Any] = {}
        for path in files:
            try:
                opened = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise CembedError(f"{path} cannot be read as safetensors: {error}") from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def load(self, key: str) -> Tensor:
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor


@dataclass(frozen=True)
class LoraPair:
    a: str
    b: str
    scale: float


class Adapter:
    """A LoRA directory as PEFT writes it (arXiv 2106.09685); its modules saved whole replace those of the base."""

    def __init__(self, root: Path) -> None:
        config = read_json(root / "adapter_config.json")
        if unsupported := [name for name in _NOT_MERGED if config.get(name)]:
            raise CembedError(
                f"{root}: an adapter with {', '.join(unsupported)} cannot be merged here: merge it with PEFT"
            )
        for name, known in (("peft_type", ("LORA",)), ("init_lora_weights", _PLAIN_STARTS)):
            if config.get(name, known[0]) not in known:
                raise CembedError(
                    f"{root}: an adapter with {name} {config[name]!r} cannot be merged here: merge it with PEFT"
                )
        self._config = config
        self._weights = Weights([root / "adapter_model.safetensors"])
        self.pairs: dict[str, LoraPair] = {}
        self.whole: dict[str, str] = {}
        halves: dict[str, dict[str, str]] = {}
        for key in self._weights:
            if match := _LORA.match(key):
                halves.setdefault(match[1], {})[match[2]] = key
            elif "lora_" in key:
                raise CembedError(
                    f"{root}: {key} is a kind of LoRA weight that cannot be merged here: merge it with PEFT"
                )
            elif ".original_module." not in key:
                self.whole[canonical_name(_SAVED_MODULE.sub(".", key))] = key
        for module, pair in halves.items():
            if len(pair) != 2:
                raise CembedError(f"{root}: {module} has only one half of a LoRA pair")
            self.pairs[canonical_name(module) + ".weight"] = LoraPair(
                pair["A"], pair["B"], self._scale(module, pair["A"])
            )

    def _scale(self, module: str, a: str) -> float:
        alpha = _pattern(
            self._config.get("alpha_pattern"), module.removeprefix("base_model.model."), self._config["lora_alpha"]
        )
        rank = self._weights.load(a).shape[0]
        return float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def apply(self, name: str, base: Tensor | None) -> Tensor | None:
        """The tensor `name` after the adapter; None where neither has it."""
        if name in self.whole:
            return self._weights.load(self.whole[name])
        pair = self.pairs.get(name)
        if pair is None or base is None:
            return base
        a, b = self._weights.load(pair.a).float(), self._weights.load(pair.b).float()
        if base.dim() != 2 or b.shape[0] != base.shape[0] or a.shape[1] != base.shape[1]:
            raise CembedError(f"the adapter's {pair.a} and {pair.b} do not fit {name} {tuple(base.shape)}")
        return torch.addmm(base.float(), b, a, alpha=pair.scale)


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that is the module's name or a suffix of it."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


@dataclass
class Checkpoint:
    """Tensors by canonical name; `unused` shrinks as they are loaded, so that left-over weights can be named."""

    root: Path
    adapter: Adapter | None
    keys: dict[str, tuple[Weights, str]]
    unused: set[str]

    @classmethod
    def open(cls, root: Path, adapter: Path | None, head_weights: Path | None = None) -> Checkpoint:
        if adapter is None and (root / "adapter_config.json").exists() and not (root / "config.json").exists():
            raise CembedError(f"{root} is a LoRA adapter: give its base with --model and it with --adapter")
        keys: dict[str, tuple[Weights, str]] = {}
        sources = [weight_files(root), *([[head_weights]] if head_weights else [])]
        for weights in map(Weights, sources):
            for key in weights:
                name = canonical_name(key)
                if name in keys:
                    raise CembedError(f"{root}: {key} and {keys[name][1]} are the same weight")
                keys[name] = (weights, key)
        merged = Adapter(adapter) if adapter else None
        names = keys.keys() | (merged.whole.keys() | merged.pairs.keys() if merged else set())
        return cls(root, merged, keys, {name for name in names if not _NOT_USED.search(name)})

    def __contains__(self, name: str) -> bool:
        return name in self.keys or (self.adapter is not None and name in self.adapter.whole)

    def load(self, name: str) -> Tensor:
        """One tensor, the adapter merged in. Raises CembedError if the checkpoint has none of that name."""
        weights, key = self.keys.get(name, (None, name))
        tensor = weights.load(key) if weights else None
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


def parameter(module: nn.Module, checkpoint: Checkpoint, prefix: str, name: str) -> Tensor:
    """The parameter `name` of `module` as the module wants it: converted, checked for shape, contiguous, its dtype."""
    owner_name, _, leaf = name.rpartition(".")
    owner, target = module.get_submodule(owner_name), module.get_parameter(name)
    tensor = checkpoint.load(prefix + name)
    convert = getattr(owner, "convert", None)
    converted = convert(leaf, tensor) if convert else tensor
    if converted.shape != target.shape:
        raise CembedError(
            f"{checkpoint.root}: {prefix}{name} has shape {tuple(tensor.shape)}, which gives {tuple(converted.shape)}, "
            f"but its config asks for {tuple(target.shape)}"
        )
    result: Tensor = converted.to(target.dtype).contiguous()
    return result

"""LoRA adapters as PEFT writes them (arXiv 2106.09685), merged into a weight when it is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cembed.export.settings import Settings, one_line
from cembed.export.weights import ADAPTER, Weights, canonical_name, refused_pickle
from cembed.runtime.errors import CembedError

CONFIG = "adapter_config.json"
UNKNOWN_BASE = "the model that it was trained on"
Shape = tuple[int, ...]
_PAIR = re.compile(r"^(.*)\.lora_(A|B)(?:\.default)?\.weight$")
_SAVED_MODULE = re.compile(r"\.modules_to_save(?:\.default)?\.|\.base_layer\.")
_OUTPUT_HEAD = "lm_head."
_NOT_MERGED = (
    "use_dora",
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
_DEFAULTS: Mapping[str, Any] = {  # PEFT's
    "peft_type": "LORA",
    "init_lora_weights": True,
    "r": 8,
    "lora_alpha": 8,
}
_PLAIN_STARTS = (True, False, "gaussian", "eva")  # the others change the base weights


def base_of(config: Settings) -> str | None:
    """The model that an adapter says it was trained on: a hub id or a folder."""
    name = config.values.get("base_model_name_or_path")
    return name if isinstance(name, str) and re.fullmatch(r"[\w./~-]+", name) else None


def base_name(root: Path) -> str | None:
    """`base_of` the adapter in `root`."""
    return base_of(Settings.read(root / CONFIG))


def is_adapter(root: Path) -> bool:
    """Whether a folder holds an adapter and no model. Raises CembedError: both."""
    if not (root / CONFIG).exists() or not any(root.glob("adapter_model.*")):
        return False
    if any(path.name != ADAPTER for path in root.glob("*.safetensors")):
        raise CembedError(f"{root} holds a model and a LoRA adapter: merge it with --adapter {root}, or take it away")
    return True


def refuse_alone(root: Path) -> None:
    """Raises CembedError if `root` is given as a model and is, or holds, an adapter that nobody asked to merge."""
    if is_adapter(root):
        base = base_name(root) or UNKNOWN_BASE
        raise CembedError(f"{root} is a LoRA adapter: give --model {base} --adapter {root}")


@dataclass(frozen=True)
class Scaling:
    """How much the pairs of an adapter count: `ranks` and `alphas` by pattern, before `rank` and `alpha`."""

    rank: int
    alpha: float
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    root_of_rank: bool

    @classmethod
    def of(cls, config: Settings) -> Scaling:
        full = config.over(_DEFAULTS)
        ranks, alphas = (
            full.section(name) if full.has(name) else Settings("", {}) for name in ("rank_pattern", "alpha_pattern")
        )
        for pattern in ranks.values:
            check_pattern(ranks, pattern)
            ranks.count(pattern)
        for pattern in alphas.values:
            check_pattern(alphas, pattern)
            alphas.number(pattern)
        rslora = full.flag("use_rslora", False)
        return cls(full.count("r"), full.number("lora_alpha"), ranks.values, alphas.values, rslora)

    def rank_of(self, module: str) -> int:
        return int(first_match(self.ranks, module, self.rank))

    def factor(self, module: str) -> float:
        rank = self.rank_of(module)
        return float(first_match(self.alphas, module, self.alpha)) / (math.sqrt(rank) if self.root_of_rank else rank)


def check_pattern(patterns: Settings, pattern: str) -> None:
    try:
        re.compile(f"(.*\\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise CembedError(f"{patterns.where}: {pattern!r:.80} is no regular expression: {one_line(error)}") from error


def first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that is the module's name or a suffix of it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


@dataclass(frozen=True)
class LoraPair:
    """Keys of the halves, A [rank, in] and B [out, rank], and what their product is multiplied with."""

    a: str
    b: str
    rank: int
    scale: float


class Adapter:
    """A LoRA directory; its modules saved whole replace those of the base.

    `pairs` and `whole` are by canonical name. Raises CembedError: damaged, another kind than plain LoRA.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise CembedError(f"--adapter {root} is no directory: give one with {CONFIG} and {ADAPTER}")
        config = Settings.read(root / CONFIG)
        check_kind(root, config)
        pickle = refused_pickle(root, "adapter_model.bin")
        if pickle and not (root / ADAPTER).exists():
            raise CembedError(f"{root} has no {ADAPTER}: {pickle}")
        self.root, self.base = root, base_of(config) or UNKNOWN_BASE
        self._weights = Weights([root / ADAPTER])
        halves, self.whole = sort_keys(root, self._weights)
        self.pairs = self._pair_up(halves, Scaling.of(config))
        if both := sorted(self.pairs.keys() & self.whole.keys()):
            raise CembedError(f"{root} has {both[0]} whole and a LoRA pair for it: merge it with PEFT")

    def _pair_up(self, halves: Mapping[str, Mapping[str, str]], scaling: Scaling) -> dict[str, LoraPair]:
        pairs: dict[str, LoraPair] = {}
        for module, pair in halves.items():
            if len(pair) != 2:
                raise CembedError(f"{self.root}: {module} has only one half of a LoRA pair")
            place, name = module.removeprefix("base_model.model."), canonical_name(f"{module}.weight")
            if name in pairs:
                raise CembedError(f"{self.root}: {pair['A']} and {pairs[name].a} are for the same weight")
            pairs[name] = LoraPair(pair["A"], pair["B"], scaling.rank_of(place), scaling.factor(place))
        return pairs

    def shape(self, name: str) -> Shape | None:
        """The shape of a module saved whole; None if the adapter has none of that name."""
        return self._weights.shape(self.whole[name]) if name in self.whole else None

    def check(self, base: Callable[[str], Shape | None]) -> None:
        """Raises CembedError for a pair that does not fit the weight it changes; `base` gives shapes by name."""
        for name, pair in self.pairs.items():
            shape, a, b = base(name), self._weights.shape(pair.a), self._weights.shape(pair.b)
            if shape is None:
                raise CembedError(
                    f"{self.root}: {pair.a} changes {name}, which the model does not have: give --model {self.base}"
                )
            if len(a) != 2 or len(b) != 2 or a[0] != pair.rank or b[1] != pair.rank:
                raise CembedError(
                    f"{self.root}: {pair.a} {a} and {pair.b} {b} have another rank than {pair.rank}, as {CONFIG} says"
                )
            if shape != (b[0], a[1]):
                raise CembedError(f"{self.root}: {pair.a} {a} and {pair.b} {b} do not fit {name} {shape}")

    def apply(self, name: str, base: Tensor | None) -> Tensor | None:
        """The tensor `name` after the adapter; None where neither has it."""
        if name in self.whole:
            return self._weights.load(self.whole[name])
        pair = self.pairs.get(name)
        if pair is None or base is None:
            return base
        a, b = self._weights.load(pair.a).float(), self._weights.load(pair.b).float()
        return torch.addmm(base.float(), b, a, alpha=pair.scale)


def check_kind(root: Path, config: Settings) -> None:
    """Raises CembedError for an adapter that does more than add products of pairs."""
    if unsupported := [name for name in _NOT_MERGED if config.values.get(name)]:
        raise CembedError(f"{root}: an adapter with {', '.join(unsupported)} cannot be merged here: merge it with PEFT")
    full = config.over(_DEFAULTS).values
    for name, known in (("peft_type", ("LORA",)), ("init_lora_weights", _PLAIN_STARTS)):
        if full[name] not in known:
            raise CembedError(
                f"{root}: an adapter with {name} {full[name]!r:.80} cannot be merged here: merge it with PEFT"
            )


def sort_keys(root: Path, keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The keys of halves by module, and those of whole tensors by canonical name; the output head is not used."""
    halves: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in keys:
        name = canonical_name(_SAVED_MODULE.sub(".", key))
        if name.startswith(_OUTPUT_HEAD) or ".original_module." in key:
            continue
        if match := _PAIR.match(key):
            if match[2] in halves.setdefault(match[1], {}):
                raise CembedError(f"{root}: {key} and {halves[match[1]][match[2]]} are the same weight")
            halves[match[1]][match[2]] = key
        elif "lora_" in key:
            raise CembedError(f"{root}: {key} is a kind of LoRA weight that cannot be merged here: merge it with PEFT")
        elif name in whole:
            raise CembedError(f"{root}: {key} and {whole[name]} are the same weight")
        else:
            whole[name] = key
    return halves, whole

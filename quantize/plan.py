"""What is done to each weight of a bundle: the options, the choice by name, and what a calibration set shows."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from cembed.quantize.activations import Observed, Observer, balance
from cembed.quantize.calibration import CalibrationSet, observe
from cembed.quantize.graph import Recipe, SourceGraph
from cembed.quantize.weights import SCHEMES
from cembed.runtime.bundle import Bundle
from cembed.runtime.errors import CembedError

FLOAT, FALLBACK = "float", "int8"
KEPT = ("patch_embed.*", "embeddings.*")  # the first look at the pixels: small, and everything hangs on it
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """What a quantised bundle may lose: the lowest cosine of a vector, and the fall of nDCG@5 if pages are judged."""

    min_cosine: float
    max_ndcg_drop: float


LIMITS = {"int8": Limits(0.995, 0.002), "int4": Limits(0.95, 0.01), "w8a8": Limits(0.95, 0.005)}


@dataclass(frozen=True)
class QuantiseOptions:
    """The flags of `cembed quantize`; limits that are None are those of the scheme."""

    weights: str
    embeddings: str = "fp16"
    ranges: str = "mse"
    keep: tuple[str, ...] = ()
    calibration: tuple[Path, ...] = ()
    queries: tuple[str, ...] = ()
    min_cosine: float | None = None
    max_ndcg_drop: float | None = None
    mixed: bool = False
    report: Path | None = None
    accept_loss: bool = False
    threads: int | None = None

    def limits(self, judged: bool) -> Limits:
        """Where pages are judged, nDCG says more than the worst of many cosines, whose limit must be asked for then."""
        usual = LIMITS[self.weights]
        lowest = -1.0 if judged else usual.min_cosine
        return Limits(
            lowest if self.min_cosine is None else self.min_cosine,
            usual.max_ndcg_drop if self.max_ndcg_drop is None else self.max_ndcg_drop,
        )


@dataclass(frozen=True)
class QuantisePlan:
    """The graphs of a bundle, the scheme of each weight by graph and name, and the activations that were seen."""

    bundle: Bundle
    options: QuantiseOptions
    sources: Mapping[str, SourceGraph]
    schemes: Mapping[str, Mapping[str, str]]
    seen: Mapping[str, Mapping[str, Observed]]

    @classmethod
    def make(
        cls, bundle: Bundle, options: QuantiseOptions, calibration: CalibrationSet, progress: Progress
    ) -> QuantisePlan:
        """Raises CembedError: a graph that is quantised, W8A8 without a single pass."""
        graphs = bundle.manifest.graphs
        sources = {name: SourceGraph(bundle.graph_path(name)) for name in graphs}
        if broken := [name for name, source in sources.items() if source.is_quantised()]:
            raise CembedError(f"{bundle.root}: {graphs[broken[0]].file} has quantised nodes already")
        schemes = {name: choose(source, options) for name, source in sources.items()}
        plan = cls(bundle, options, sources, schemes, {})
        return plan.observed(calibration, progress) if SCHEMES[options.weights].activations else plan

    def observed(self, calibration: CalibrationSet, progress: Progress) -> QuantisePlan:
        """With the activations of the calibration set; the loop takes those of the single pass."""
        if "text" not in self.sources:
            raise CembedError("w8a8 needs a bundle with a single pass: slots that are fed back have none")
        watched = {name: [w for w, s in self.schemes[name].items() if s != FLOAT] for name in ("vision", "text")}
        observers = {name: Observer(self.sources[name], w, self.options.threads) for name, w in watched.items()}
        observe(self.bundle, observers, calibration, self.options.threads, progress)
        seen = {name: observer.seen for name, observer in observers.items()}
        return QuantisePlan(self.bundle, self.options, self.sources, self.schemes, seen)

    def outcome(self, keep: Collection[str]) -> dict[str, str]:
        """Scheme of each weight, by `full_name`; those in `keep` stay in float."""
        named = {full_name(g, w): s for g, schemes in self.schemes.items() for w, s in schemes.items()}
        return {name: FLOAT if name in keep else scheme for name, scheme in sorted(named.items())}

    def recipes(self, keep: Collection[str]) -> dict[str, Recipe]:
        outcome = self.outcome(keep)
        return {
            graph: self.recipe(graph, {w: s for w in weights if (s := outcome[full_name(graph, w)]) != FLOAT})
            for graph, weights in self.schemes.items()
        }

    def recipe(self, graph: str, schemes: Mapping[str, str], balanced: bool = True) -> Recipe:
        """Of some weights of a graph; `balanced` moves outliers of activations into them."""
        chosen = {weight: SCHEMES[scheme] for weight, scheme in schemes.items()}
        seen = {w: found for w, found in self.seen.get(part_of(graph), {}).items() if w in schemes}
        if not seen:
            return Recipe(chosen)
        moved = balance(self.sources[part_of(graph)], seen if balanced else {})
        ranges = {w: found.range(self.options.ranges, moved.rows.get(w, 1.0)) for w, found in seen.items()}
        return Recipe(chosen, ranges, moved.rows, moved.columns)


def part_of(graph: str) -> str:
    """`text` for `text_step` too: they have the same weights."""
    return graph.split("_")[0]


def full_name(graph: str, weight: str) -> str:
    return f"{part_of(graph)}/{weight}"


def choose(source: SourceGraph, options: QuantiseOptions) -> dict[str, str]:
    """Weight name → scheme. Weights whose inputs do not fill the scheme's blocks are stored as int8."""
    chosen = {}
    for _, name in source.weights():
        inputs = source.initializers[name].dims[0]
        block = SCHEMES[options.weights].block
        if any(fnmatch.fnmatch(name, pattern) for pattern in (*KEPT, *options.keep)):
            chosen[name] = FLOAT
        else:
            chosen[name] = FALLBACK if block and inputs % block else options.weights
    return chosen

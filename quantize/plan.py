"""What is done to each weight of a bundle: the options, the choice by name, and what a calibration set shows."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import onnx

from cembed.quantize.activations import Observed, Observer, balance
from cembed.quantize.calibration import CalibrationSet, observe
from cembed.quantize.graph import DataFile, Recipe, SourceGraph, rewrite
from cembed.quantize.half import Halver, OverflowScan, segments
from cembed.quantize.weights import FLOAT, SCHEMES
from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.manifest import part_of
from cembed.runtime.errors import CembedError

FALLBACK, HALF = "int8", "fp16"
SINGLE_PASS = ("vision", "text")
KEPT = (
    *("patch_embed.*", "embeddings.*"),  # the first look at the pixels: small, and everything hangs on it
    *("*.in_proj_a.weight", "*.in_proj_b.weight"),  # what a recurrence forgets and takes in: a few columns
)
RANGE_ROWS = 24  # of each input
GPTQ_ROWS = 8192  # of all inputs of a weight, and bytes of all weights' rows
GPTQ_BYTES = 2**31
Progress = Callable[[str], None]


@dataclass(frozen=True)
class LossLimits:
    """What a quantised bundle may lose: the lowest cosine of a vector, and the fall of nDCG@5 if pages are judged."""

    min_cosine: float
    max_ndcg_drop: float


LIMITS = {
    "fp16": LossLimits(0.999, 0.002),
    "int8": LossLimits(0.995, 0.002),
    "int4": LossLimits(0.95, 0.01),
    "w8a8": LossLimits(0.95, 0.005),
}


@dataclass(frozen=True)
class QuantiseOptions:
    """The flags of `cembed quantize`; limits that are None are those of the scheme, and so is the embedding table."""

    weights: str
    embeddings: str | None = None
    ranges: str = "mse"
    keep: tuple[str, ...] = ()
    calibration: tuple[Path, ...] = ()
    queries: tuple[str, ...] = ()
    min_cosine: float | None = None
    max_ndcg_drop: float | None = None
    rounding: str = "nearest"
    mixed: bool = False
    report: Path | None = None
    accept_loss: bool = False
    threads: int | None = None

    @property
    def table(self) -> str:
        """How the embedding table is stored: in int8 beside integers, unless layers may be spared."""
        return self.embeddings or (HALF if self.weights == HALF or self.mixed else "int8")

    def limits(self, judged: bool) -> LossLimits:
        """Where pages are judged, nDCG says more than the worst of many cosines, whose limit must be asked for then."""
        usual = LIMITS[self.weights]
        lowest = -1.0 if judged else usual.min_cosine
        return LossLimits(
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
    islands: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Segments of fp16 graphs that stay in float32, by `part_of` the graph."""

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
        if options.weights == HALF:
            return plan.scanned(calibration, progress)
        looks = SCHEMES[options.weights].activations or options.rounding == "gptq"
        return plan.observed(calibration, progress) if looks else plan

    def scanned(self, calibration: CalibrationSet, progress: Progress) -> QuantisePlan:
        """With the islands that the calibration set shows."""
        self.require_single_pass()
        scans = {name: OverflowScan(self.sources[name], self.options.threads) for name in SINGLE_PASS}
        observe(self.bundle, scans, calibration, self.options.threads, progress)
        return replace(self, islands={name: scan.islands() for name, scan in scans.items()})

    def require_single_pass(self) -> None:
        if "text" not in self.sources:
            raise CembedError(
                "fp16, W8A8 and GPTQ look at a bundle's single pass, which slots that are fed back do not have"
            )

    def observed(self, calibration: CalibrationSet, progress: Progress) -> QuantisePlan:
        """With the activations of the calibration set; the loop takes those of the single pass."""
        self.require_single_pass()
        watched = {name: [w for w, s in self.schemes[name].items() if s != FLOAT] for name in SINGLE_PASS}
        share = self.rows_of_each(watched, len(calibration.pages) + len(calibration.queries))
        observers = {name: Observer(self.sources[name], w, share, self.options.threads) for name, w in watched.items()}
        observe(self.bundle, observers, calibration, self.options.threads, progress)
        seen = {name: observer.seen for name, observer in observers.items()}
        return replace(self, seen=seen)

    def rows_of_each(self, watched: Mapping[str, list[str]], runs: int) -> int:
        """How many rows of each input are kept: few for ranges, for GPTQ as many as fit into its memory."""
        if self.options.rounding != "gptq":
            return RANGE_ROWS
        width = sum(
            self.sources[graph].initializers[name].dims[0] for graph, names in watched.items() for name in names
        )
        return max(1, min(GPTQ_ROWS, GPTQ_BYTES // (2 * width)) // runs)

    def outcome(self, finer: Mapping[str, int]) -> dict[str, str]:
        """Scheme of each weight, by `full_name`, as many times finer than chosen as `finer` says."""
        named = {
            full_name(g, w): FLOAT if w in self.islands.get(part_of(g), ()) else s
            for g, schemes in self.schemes.items()
            for w, s in schemes.items()
        }
        return {name: finer_scheme(scheme, finer.get(name, 0)) for name, scheme in sorted(named.items())}

    def write(self, graph: str, outcome: Mapping[str, str], data: DataFile) -> onnx.ModelProto:
        """The graph with its weights in the schemes of `outcome`, which go to `data`."""
        source = self.sources[graph]
        if self.options.weights == HALF:
            return Halver(source, self.islands[part_of(graph)], data).graph()
        schemes = {w: s for w in self.schemes[graph] if (s := outcome[full_name(graph, w)]) != FLOAT}
        return rewrite(source, self.recipe(graph, schemes), data)

    @property
    def fused(self) -> bool:
        """Whether ONNX Runtime's own operators may be there; TensorRT knows none, and signed levels only."""
        return self.bundle.manifest.target == "onnxruntime"

    def recipe(self, graph: str, schemes: Mapping[str, str], balanced: bool = True) -> Recipe:
        """Of some weights of a graph; `balanced` moves outliers of activations into them."""
        chosen = {weight: SCHEMES[scheme] for weight, scheme in schemes.items()}
        seen = self.seen_by(graph, schemes)
        in_bytes = {weight: found for weight, found in seen.items() if chosen[weight].activations}
        moved = balance(self.sources[part_of(graph)], in_bytes if balanced else {})
        divisors = {weight: moved.rows.get(weight, 1.0) for weight in seen}
        ranges = {w: found.range(self.options.ranges, divisors[w], not self.fused) for w, found in in_bytes.items()}
        rounded = seen if self.options.rounding == "gptq" else {}
        inputs = {weight: partial(found.rows, divisors[weight]) for weight, found in rounded.items()}
        return Recipe(chosen, ranges, moved.rows, moved.columns, inputs, fuse=self.fused)

    def seen_by(self, graph: str, weights: Collection[str]) -> dict[str, Observed]:
        """What was seen of the inputs of some weights of a graph."""
        return {weight: found for weight, found in self.seen.get(part_of(graph), {}).items() if weight in weights}


def full_name(graph: str, weight: str) -> str:
    return f"{part_of(graph)}/{weight}"


def finer_scheme(scheme: str, times: int) -> str:
    """
    >>> finer_scheme("int4", 1), finer_scheme("int4", 2), finer_scheme("int8", 2)
    ('int8', 'float', 'float')
    """
    return scheme if scheme == FLOAT or not times else finer_scheme(SCHEMES[scheme].finer, times - 1)


def choose(source: SourceGraph, options: QuantiseOptions) -> dict[str, str]:
    """Weight name → scheme. Weights whose inputs do not fill the scheme's blocks are stored as int8."""
    if options.weights == HALF:
        return {segment: HALF for _, segment in segments(source)}
    chosen = {}
    for _, name in source.weights():
        inputs = source.initializers[name].dims[0]
        block = SCHEMES[options.weights].block
        if any(fnmatch.fnmatch(name, pattern) for pattern in (*KEPT, *options.keep)):
            chosen[name] = FLOAT
        else:
            chosen[name] = FALLBACK if block and inputs % block else options.weights
    return chosen

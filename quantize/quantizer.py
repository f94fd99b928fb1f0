"""Bundle in, smaller bundle out: weights and embedding table to integers, the loss measured before it is written."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from cembed.quantize.calibration import CalibrationSet, Embedded, compare
from cembed.quantize.graph import DataFile
from cembed.quantize.plan import HALF, LossLimits, QuantiseOptions, QuantisePlan
from cembed.quantize.sensitivity import draw, layers, rank_layers
from cembed.quantize.weights import FLOAT, SCHEMES, Floats, nonzero
from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.manifest import Comparison, EmbeddingTable, LayerDamage, Manifest, Quantisation, Tensor
from cembed.runtime.engines.session import EngineSettings
from cembed.runtime.errors import CembedError
from cembed.runtime.writer import check_replaceable, directory, write_self_test

STORED: dict[str, Literal["float32", "float16"]] = {"fp32": "float32", "fp16": "float16"}
ADVICE = "spare sensitive layers with --mixed, round with --rounding gptq, or take it with --accept-loss"
MOST_STEPS = 2  # from the coarsest scheme to float
SELF_TEST_TOLERANCE = 0.02  # integer kernels differ between CPUs
_ROWS = 8192
Progress = Callable[[str], None]


def quantise(
    source: Path, options: QuantiseOptions, out: Path, *, force: bool = False, progress: Progress = lambda step: None
) -> Manifest:
    """Write the bundle `out` from the float bundle `source` and return its manifest.

    Raises CembedError: a bundle that is quantised already, no usable calibration set, an `out` that exists without
    `force`, a loss beyond the limits without `accept_loss`. Nothing is left of it then.
    """
    check_replaceable(out, force)
    bundle = Bundle(source)
    check_source(bundle)
    check_options(options)
    calibration = CalibrationSet.read(options.calibration, options.queries)
    check_calibration(calibration)
    with directory(out.resolve()) as partial:
        plan = QuantisePlan.make(bundle, options, calibration, progress)
        mapped = EngineSettings(threads=options.threads, prepack=False)  # the float weights need not fit in memory
        trials = Trials(plan, Embedded.by(source, calibration, mapped, progress), calibration, partial, progress)
        damages: list[LayerDamage] = []
        if options.report:
            damages = trials.ranked()
            draw(damages, options.report)
        attempt, damages = trials.search(damages)
        return write_self_test(partial, replace(attempt.manifest, quantisation=trials.report(attempt, damages)))


@dataclass(frozen=True)
class Attempt:
    """A bundle that was written: the scheme of each weight, and `loss`, what is lost beyond the limits, if anything."""

    outcome: Mapping[str, str]
    manifest: Manifest
    comparison: Comparison
    loss: str


@dataclass(frozen=True)
class Trials:
    """What all attempts have in common: the plan, the float bundle's vectors, and the folder that they are written to,
    each over the one before."""

    plan: QuantisePlan
    old: Embedded
    calibration: CalibrationSet
    root: Path
    progress: Progress

    def search(self, damages: list[LayerDamage]) -> tuple[Attempt, list[LayerDamage]]:
        """The first attempt within the limits, where layers may be mixed with more and more of the worst ones spared;
        and the layers by their damage, if that was asked for or needed. Raises CembedError: a loss beyond the limits.
        """
        for spared in doubled(MOST_STEPS * len(layers(self.plan))):
            attempt = self.attempt(spare(damages, spared))
            if not attempt.loss:
                return attempt, damages
            if not self.plan.options.mixed:
                raise CembedError(f"{attempt.loss}; {ADVICE}")
            if set(attempt.outcome.values()) == {FLOAT}:
                break
            damages = damages or self.ranked()
        raise CembedError(f"{attempt.loss}, even with every layer in float")

    def ranked(self) -> list[LayerDamage]:
        return rank_layers(self.plan, self.calibration, self.progress)

    def attempt(self, finer: Mapping[str, int]) -> Attempt:
        """With some weights in finer schemes than the plan has."""
        options, outcome = self.plan.options, self.plan.outcome(finer)
        manifest = write_self_test(self.root, write(self.plan, outcome, self.root, self.progress))
        found = judge(self.plan.bundle, self.old, self.root, self.calibration, options, self.progress)
        loss = "" if options.accept_loss else describe_loss(found, options.limits(found.ndcg5 is not None))
        return Attempt(outcome, manifest, found, loss)

    def report(self, attempt: Attempt, damages: list[LayerDamage]) -> Quantisation:
        """What the manifest says of an attempt."""
        options = self.plan.options
        return Quantisation(
            weights=options.weights,
            embeddings=options.table,
            rounding=options.rounding,
            source=self.plan.bundle.hash,
            schemes={name: scheme for name, scheme in attempt.outcome.items() if scheme != FLOAT},
            kept=tuple(name for name, scheme in attempt.outcome.items() if scheme == FLOAT),
            comparison=attempt.comparison,
            sensitivity=tuple(damages),
            rows=any(SCHEMES[scheme].rows for scheme in attempt.outcome.values() if scheme in SCHEMES)
            and self.plan.fused,
        )


def doubled(most: int) -> list[int]:
    """0, 1, 2, 4 and so on, up to the first that is not below `most`.

    >>> doubled(5), doubled(4)
    ([0, 1, 2, 4, 8], [0, 1, 2, 4])
    """
    return [0, *(1 << power for power in range(max(0, most - 1).bit_length() + 1))]


def export_quantised(
    export: Callable[[Path], object],
    weights: str,
    out: Path,
    *,
    force: bool = False,
    progress: Progress = lambda step: None,
) -> Manifest:
    """`export` writes a float bundle beside `out`, which is made from it; the float bundle goes again."""
    check_replaceable(out, force)
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.float.", dir=out.resolve().parent) as folder:
        export(Path(folder) / "float")
        return quantise(Path(folder) / "float", QuantiseOptions(weights), out, force=force, progress=progress)


def spare(damages: list[LayerDamage], count: int) -> dict[str, int]:
    """How many times the weights of the worst layers get a finer scheme: every layer once, then the worst again."""
    return dict(Counter(name for damage in (damages * MOST_STEPS)[:count] for name in damage.weights))


def write(plan: QuantisePlan, outcome: Mapping[str, str], root: Path, progress: Progress) -> Manifest:
    """Writes all files of the bundle but the self-test's vectors, over those of an earlier try."""
    for old in root.iterdir():
        old.unlink()
    bundle, graphs = plan.bundle, plan.bundle.manifest.graphs
    files = {data: DataFile(root / data) for graph in graphs.values() for data in graph.data}
    written = {}
    for name, graph in graphs.items():
        progress(f"quantising {name}")
        model = plan.write(name, outcome, files[graph.data[0]])
        onnx.save(model, str(root / graph.file))
        written[name] = replace(graph, inputs=typed(graph.inputs, model), outputs=typed(graph.outputs, model))
    for file in files.values():
        file.close()
    progress("writing the embedding table")
    table = write_table(bundle, plan.options.table, root)
    for name in unchanged(bundle):
        shutil.copyfile(bundle.path(name), root / name)
    test = replace(bundle.manifest.self_test, tolerance=SELF_TEST_TOLERANCE)
    dtype = HALF if plan.options.weights == HALF else bundle.manifest.dtype
    return replace(bundle.manifest, dtype=dtype, graphs=written, token_embeddings=table, self_test=test)


def typed(tensors: Iterable[Tensor], model: onnx.ModelProto) -> tuple[Tensor, ...]:
    """The tensors with the types that they have in the graph: KV caches may have become half."""
    values = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    return tuple(replace(t, dtype=str(onnx.helper.tensor_dtype_to_np_dtype(values[t.name]))) for t in tensors)


def judge(
    bundle: Bundle, old: Embedded, root: Path, calibration: CalibrationSet, options: QuantiseOptions, progress: Progress
) -> Comparison:
    """The bundle that is being written at `root` against the one it is made from.

    With weights packed, as pages are embedded: ONNX Runtime then rounds what int8 and int4 weights are multiplied with
    to int8, in blocks, which loses more and is as fast as it gets.
    """
    size = sum(path.stat().st_size for path in root.iterdir())
    before = sum(record.size for record in bundle.manifest.files.values())
    new = Embedded.by(root, calibration, EngineSettings(threads=options.threads), progress)
    return compare(old, new, calibration, (before, size))


def check_source(bundle: Bundle) -> None:
    done = bundle.manifest.quantisation
    if done is not None:
        raise CembedError(f"{bundle.root} is quantised already, to {done.weights}: start from the float bundle")
    if bundle.manifest.dtype == "fp16":
        raise CembedError(f"{bundle.root} computes in fp16: start from an fp32 bundle")


def check_options(options: QuantiseOptions) -> None:
    if options.weights == HALF and (options.mixed or options.report or options.keep):
        raise CembedError("fp16 finds what must stay in float32 by itself: leave out --mixed, --report and --keep")


def check_calibration(calibration: CalibrationSet) -> None:
    """Raises CembedError for a set that nothing can be judged on."""
    if all(np.ptp(page) < 8 for page in calibration.pages.values()):
        raise CembedError("every page of the calibration set is blank: give pages like those that will be embedded")


def write_table(bundle: Bundle, dtype: str, root: Path) -> EmbeddingTable:
    """The token table as float32, float16, or int8 with a scale for each row."""
    spec = bundle.manifest.token_embeddings
    rows = bundle.table(spec)
    with (root / spec.file).open("wb") as file:
        scales = [write_rows(rows[start : start + _ROWS], dtype, file.write) for start in range(0, spec.rows, _ROWS)]
    if dtype != "int8":
        return replace(spec, dtype=STORED[dtype])
    np.concatenate(scales).tofile(root / "token_embeddings.scales.bin")
    return replace(spec, dtype="int8", scales="token_embeddings.scales.bin")


def write_rows(rows: Floats, dtype: str, write: Callable[[memoryview], object]) -> Floats:
    """Writes some rows; returns what each is multiplied with."""
    if dtype != "int8":
        write(rows.astype(STORED[dtype]).data)
        return np.ones((len(rows), 1), np.float32)
    scales = nonzero(np.abs(rows).max(axis=1, keepdims=True) / 127)
    write(np.rint(rows / scales).astype(np.int8).data)
    return scales


def unchanged(bundle: Bundle) -> list[str]:
    """The files that are copied."""
    m = bundle.manifest
    made = {name for graph in m.graphs.values() for name in (graph.file, *graph.data)}
    return [name for name in m.files if name not in made | {m.token_embeddings.file, m.token_embeddings.scales}]


def describe_loss(found: Comparison, limits: LossLimits) -> str:
    """What was lost beyond the limits; empty if nothing was."""
    if found.min_cosine < limits.min_cosine:
        return f"nothing was written: the lowest cosine is {found.min_cosine:.4f}, under {limits.min_cosine}"
    if found.ndcg5 is not None and found.ndcg5[0] - found.ndcg5[1] > limits.max_ndcg_drop:
        drop = f"from {found.ndcg5[0]:.4f} to {found.ndcg5[1]:.4f}, by more than {limits.max_ndcg_drop}"
        return f"nothing was written: nDCG@5 falls {drop}"
    return ""

"""Bundle in, smaller bundle out: weights and embedding table to integers, the loss measured before it is written."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from cembed.quantize.calibration import CalibrationSet, Embedded, compare
from cembed.quantize.graph import DataFile, SourceGraph, rewrite
from cembed.quantize.weights import SCHEMES, Floats, Scheme, nonzero
from cembed.runtime.bundle import Bundle
from cembed.runtime.errors import CembedError
from cembed.runtime.manifest import Comparison, EmbeddingTable, Manifest, Quantisation
from cembed.runtime.writer import check_replaceable, directory, write_self_test

FALLBACK = "int8"
KEPT = ("patch_embed.*", "embeddings.*")  # the first look at the pixels: small, and everything hangs on it
STORED: dict[str, Literal["float32", "float16"]] = {"fp32": "float32", "fp16": "float16"}
_ROWS = 8192
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """What a quantised bundle may lose: the lowest cosine of a vector, and the fall of nDCG@5 if pages are judged."""

    min_cosine: float
    max_ndcg_drop: float


LIMITS = {"int8": Limits(0.995, 0.002), "int4": Limits(0.95, 0.01)}


@dataclass(frozen=True)
class QuantiseOptions:
    """The flags of `cembed quantize`; limits that are None are those of the scheme."""

    weights: str
    embeddings: str = "fp16"
    keep: tuple[str, ...] = ()
    calibration: tuple[Path, ...] = ()
    queries: tuple[str, ...] = ()
    min_cosine: float | None = None
    max_ndcg_drop: float | None = None
    accept_loss: bool = False
    threads: int | None = None

    def limits(self) -> Limits:
        usual = LIMITS[self.weights]
        return Limits(
            usual.min_cosine if self.min_cosine is None else self.min_cosine,
            usual.max_ndcg_drop if self.max_ndcg_drop is None else self.max_ndcg_drop,
        )


def quantise(
    source: Path, options: QuantiseOptions, out: Path, *, force: bool = False, progress: Progress = lambda step: None
) -> Manifest:
    """Write the bundle `out` from the float bundle `source` and return its manifest.

    Raises CembedError: a bundle that is quantised already, no usable calibration set, an `out` that exists without
    `force`, a loss beyond the limits without `accept_loss`. Nothing is left behind then.
    """
    check_replaceable(out, force)
    bundle = Bundle(source)
    check_source(bundle)
    calibration = CalibrationSet.read(options.calibration, options.queries)
    check_calibration(calibration, progress)
    with directory(out.resolve()) as partial:
        schemes = write_graphs(bundle, options, partial, progress)
        progress("writing the embedding table")
        table = write_table(bundle, options.embeddings, partial)
        for name in unchanged(bundle):
            shutil.copyfile(bundle.path(name), partial / name)
        manifest = replace(bundle.manifest, token_embeddings=table)
        size = sum(path.stat().st_size for path in partial.iterdir())
        old = Embedded.by(source, calibration, options.threads, progress)
        write_self_test(partial, manifest)
        new = Embedded.by(partial, calibration, options.threads, progress)
        before = sum(record.size for record in bundle.manifest.files.values())
        comparison = compare(old, new, calibration, (before, size))
        if not options.accept_loss:
            check_loss(comparison, options.limits())
        kept = tuple(sorted(name for name, scheme in schemes.items() if scheme == "float"))
        chosen = {name: scheme for name, scheme in sorted(schemes.items()) if scheme != "float"}
        report = Quantisation(options.weights, options.embeddings, bundle.hash, chosen, kept, comparison)
        return write_self_test(partial, replace(manifest, quantisation=report))


def check_source(bundle: Bundle) -> None:
    done = bundle.manifest.quantisation
    if done is not None:
        raise CembedError(f"{bundle.root} is quantised already, to {done.weights}: start from the float bundle")
    if bundle.manifest.dtype == "fp16":
        raise CembedError(f"{bundle.root} computes in fp16: start from an fp32 bundle")


def check_calibration(calibration: CalibrationSet, progress: Progress) -> None:
    """Raises CembedError for a set that nothing can be judged on."""
    if all(np.ptp(page) < 8 for page in calibration.pages.values()):
        raise CembedError("every page of the calibration set is blank: give pages like those that will be embedded")


def write_graphs(bundle: Bundle, options: QuantiseOptions, root: Path, progress: Progress) -> dict[str, str]:
    """Writes the graphs and their data; returns what became of each weight: a scheme's name or `float`."""
    outcome: dict[str, str] = {}
    files = {name: DataFile(root / name) for graph in bundle.manifest.graphs.values() for name in graph.data}
    for name, graph in bundle.manifest.graphs.items():
        progress(f"quantising {name}")
        source = SourceGraph(bundle.graph_path(name))
        if source.is_quantised():
            raise CembedError(f"{bundle.root}: {graph.file} has quantised nodes already")
        schemes = choose(source, options)
        outcome |= {f"{name.split('_')[0]}/{weight}": scheme for weight, scheme in schemes.items()}
        rows: dict[str, Scheme] = {weight: SCHEMES[s] for weight, s in schemes.items() if s != "float"}
        onnx.save(rewrite(source, rows, files[graph.data[0]]), str(root / graph.file))
    for file in files.values():
        file.close()
    return outcome


def choose(source: SourceGraph, options: QuantiseOptions) -> dict[str, str]:
    """Weight name → scheme. Weights whose inputs do not fill the scheme's blocks are stored as int8."""
    chosen = {}
    for _, name in source.weights():
        inputs = source.initializers[name].dims[0]
        block = SCHEMES[options.weights].block
        if any(fnmatch.fnmatch(name, pattern) for pattern in (*KEPT, *options.keep)):
            chosen[name] = "float"
        else:
            chosen[name] = FALLBACK if block and inputs % block else options.weights
    return chosen


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


def check_loss(found: Comparison, limits: Limits) -> None:
    """Raises CembedError if more was lost than may be."""
    if found.min_cosine < limits.min_cosine:
        raise CembedError(
            f"the lowest cosine of a vector is {found.min_cosine:.4f}, under {limits.min_cosine}: nothing was written; "
            "keep sensitive weights in float with --keep, lower --min-cosine, or take it with --accept-loss"
        )
    if found.ndcg5 is not None and found.ndcg5[0] - found.ndcg5[1] > limits.max_ndcg_drop:
        raise CembedError(
            f"nDCG@5 falls from {found.ndcg5[0]:.4f} to {found.ndcg5[1]:.4f}, by more than {limits.max_ndcg_drop}: "
            "nothing was written; keep sensitive weights in float with --keep, raise --max-ndcg-drop, or --accept-loss"
        )

"""Checkpoint in, bundle out.

The graphs are traced without weights, and the weights streamed into the bundle one tensor at a time. Then the graphs
are checked against torch, a page and a query are embedded for the self-test, and only then the directory gets its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cembed.export.checkpoint import require_finite
from cembed.export.graph import WeightFile, choose_dialect, seldom_collecting, trace, write_graph
from cembed.export.layers import DTYPES, Dialect
from cembed.export.parity import check_parity, parity_inputs
from cembed.export.plan import ExportOptions, ExportPlan
from cembed.export.sources import find_source
from cembed.runtime.bundle.manifest import EmbeddingTable, Graph, Manifest, Parity
from cembed.runtime.writer import check_replaceable, directory, write_self_test

Progress = Callable[[str], None]


def export(
    options: ExportOptions, out: Path, *, force: bool = False, progress: Progress = lambda step: None
) -> Manifest:
    """Write the bundle `out` and return its manifest; `progress` is told of each step.

    Raises CembedError: whatever is wrong with the options or the checkpoint, an `out` that exists without `force`, a
    graph that does not equal torch. Nothing is left behind then.
    """
    check_replaceable(out, force)
    dialect = choose_dialect(options.target, options.opset)
    given = options.backbone, options.model, options.revision, options.adapter, options.base
    source = find_source(*given, tell=progress)
    adapter = source.adapter.root if source.adapter else None
    plan = ExportPlan.make(replace(options, adapter=adapter), source.model.root)
    with directory(out.resolve()) as partial:
        graphs, parity = write_graphs(plan, dialect, partial, progress)
        progress("writing the embedding tables")
        tables = write_embeddings(plan, partial), write_slot_rows(plan, partial)
        plan.tokenizer.save(str(partial / "tokenizer.json"))
        progress("embedding the self-test page")
        return write_self_test(partial, plan.manifest(graphs, parity, tables, source.about()))


@seldom_collecting()
def write_graphs(
    plan: ExportPlan, dialect: Dialect, root: Path, progress: Progress
) -> tuple[dict[str, Graph], tuple[Parity, ...]]:
    """Traces, writes and checks each graph; graphs with the same data file share their weights."""
    graphs, parity = {}, []
    files = {name: WeightFile(root / name) for name in dict.fromkeys(spec.data for spec in plan.graphs)}
    for spec in plan.graphs:
        progress(f"tracing {spec.name}")
        model = trace(spec, dialect, DTYPES[plan.options.dtype], plan.options.opset)
        progress(f"writing {spec.name} and its weights")
        graphs[spec.name] = write_graph(model, spec, files[spec.data], plan.loader(spec, stored=True))
        progress(f"checking {spec.name} against torch")
        inputs = parity_inputs(plan.backbone, plan.query, spec)
        path = root / graphs[spec.name].file
        parity.append(check_parity(spec, path, plan.loader(spec, stored=False), inputs, plan.options.dtype))
    for file in files.values():
        file.close()
    return graphs, tuple(parity)


def write_embeddings(plan: ExportPlan, root: Path) -> EmbeddingTable:
    """The token table in float32 (fp16 bundles: float16), scaled as the backbone scales it, a slice at a time."""
    dtype = torch.float16 if plan.options.dtype == "fp16" else torch.float32
    return write_table(plan, root / "token_embeddings.bin", [plan.checkpoint.embeddings_name], dtype)


def write_slot_rows(plan: ExportPlan, root: Path) -> EmbeddingTable | None:
    """The learned rows of both sides in float32, the document's first; scaled like the embeddings they stand beside."""
    names = plan.slot_tables
    return write_table(plan, root / "slot_embeddings.bin", names, torch.float32) if names else None


def write_table(plan: ExportPlan, path: Path, names: Sequence[str], dtype: torch.dtype) -> EmbeddingTable:
    count = 0
    with path.open("wb") as file:
        for name in names:
            for rows in plan.checkpoint.load(name).split(8192):
                scaled = (rows.float() * plan.backbone.embedding_scale).to(dtype)
                file.write(require_finite(scaled, name).contiguous().numpy().data)
                count += len(rows)
    return EmbeddingTable(path.name, "float16" if dtype == torch.float16 else "float32", count)

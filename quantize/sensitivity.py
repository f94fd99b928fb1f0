"""Which layers a scheme damages: each is quantised alone, and the vectors are compared with the float bundle's."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx

from cembed.quantize.calibration import CalibrationSet, Embedded, compare
from cembed.quantize.graph import DataFile, Recipe, rewrite
from cembed.quantize.plan import QuantisePlan, full_name
from cembed.quantize.weights import FLOAT
from cembed.runtime.bundle.manifest import LayerDamage, part_of
from cembed.runtime.embed.embedder import Embedder
from cembed.runtime.engines.session import EngineSettings, OrtSession
from cembed.runtime.plotting import picture

PAGES = 8
_LAYER = re.compile(r"^(.*?(?:layers|blocks)\.\d+\.(?:self_attn|attn|mlp))\.")
Progress = Callable[[str], None]


def layer_of(weight: str) -> str:
    """The attention or MLP block of a weight, or the weight itself outside the layers.

    >>> layer_of("layers.3.self_attn.q_proj.weight"), layer_of("merger.mlp.0.weight")
    ('layers.3.self_attn', 'merger.mlp.0.weight')
    """
    found = _LAYER.match(weight)
    return found[1] if found else weight


def rank_layers(plan: QuantisePlan, calibration: CalibrationSet, progress: Progress) -> list[LayerDamage]:
    """The layers by falling damage, on the first PAGES pages and queries of a calibration set."""
    few = CalibrationSet(dict(list(calibration.pages.items())[:PAGES]), dict(list(calibration.queries.items())[:PAGES]))
    engine = EngineSettings(threads=plan.options.threads, prepack=False)
    embedder = Embedder(plan.bundle, engine)
    clean = Embedded.of(embedder, few)
    found = []
    for graph, layer, schemes in layers(plan):
        progress(f"quantising {graph}/{layer} alone")
        with tempfile.TemporaryDirectory(prefix=".sensitivity.", dir=plan.bundle.root.resolve().parent) as folder:
            path = write_alone(plan, graph, plan.recipe(graph, schemes, balanced=False), Path(folder))
            original = embedder.session(graph)
            embedder.replace_sessions({graph: OrtSession(path, engine)})
            loss = compare(clean, Embedded.of(embedder, few), few, (0, 0))
            embedder.replace_sessions({graph: original})
        names = tuple(full_name(graph, weight) for weight in schemes)
        found.append(LayerDamage(f"{part_of(graph)}/{layer}", names, loss.min_cosine, loss.score_error))
    return sorted(found, key=lambda damage: damage.min_cosine)


def layers(plan: QuantisePlan) -> list[tuple[str, str, dict[str, str]]]:
    """Graph, layer, and the schemes of its quantised weights; the loop has the layers of the single pass."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for graph in ("vision", "text" if "text" in plan.schemes else "text_step"):
        for weight, scheme in plan.schemes[graph].items():
            if scheme != FLOAT:
                found.setdefault((graph, layer_of(weight)), {})[weight] = scheme
    return [(graph, layer, schemes) for (graph, layer), schemes in found.items()]


def write_alone(plan: QuantisePlan, graph: str, recipe: Recipe, folder: Path) -> Path:
    """The graph with the float weights it has, linked, and the quantised ones beside it."""
    source = plan.sources[graph]
    for name in {
        entry.value for t in source.initializers.values() for entry in t.external_data if entry.key == "location"
    }:
        os.link(plan.bundle.path(name), folder / name)
    data = DataFile(folder / "levels.data")
    onnx.save(rewrite(source, recipe, data, move=False), str(folder / "graph.onnx"))
    data.close()
    return folder / "graph.onnx"


def draw(damages: list[LayerDamage], out: Path) -> None:
    """Bars of the cosine that each layer loses alone. Raises CembedError."""
    shown = damages[:40][::-1]
    with picture(out, 1, (8, 1 + 0.25 * len(shown))) as (axis,):
        axis.barh([damage.layer for damage in shown], [1 - damage.min_cosine for damage in shown])
        axis.set(xscale="log", xlabel="1 - lowest cosine of a vector when this layer alone is quantised")

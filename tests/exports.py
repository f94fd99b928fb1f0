"""Every kind of graph that cembed exports and quantises: what runtime/bundle/graph_check.py has to let pass.

    python tests/exports.py FOLDER        exports what is not there yet, minutes each on a small machine
    python tests/exports.py --list FOLDER prints the operators of all graphs there, as OPERATORS has them

Weights are thrown away: what is left in FOLDER is graphs and manifests.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx
from conftest import BACKBONE_OF, golden

from cembed.export.exporter import export
from cembed.quantize.plan import QuantiseOptions
from cembed.quantize.quantizer import quantise

KINDS = (
    ("onnxruntime", "fp32", 24),
    ("onnx", "fp32", 24),
    ("onnx", "fp32", 18),
    ("tensorrt", "fp32", 24),
    ("onnxruntime", "fp16", 24),
    ("onnx", "fp16", 20),
    ("tensorrt", "fp16", 20),
    ("onnxruntime", "bf16", 24),
    ("onnx", "fp32", 25),
    ("tensorrt", "fp16", 24),
    ("onnxruntime", "fp32", 20),
)
"""Target, dtype and opset."""
QUANTISED = (("int8", "int8"), ("int4", "int8"), ("w8a8", "fp32"), ("fp16", "fp16"))


def makers() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """The name of each bundle and what makes it, those that differ most first."""
    for target, dtype, opset in KINDS:
        for name in BACKBONE_OF:
            counts = (8, 4) if name.startswith("causal") else (None, None)
            options = replace(golden(name, *counts), target=target, dtype=dtype, opset=opset)
            yield f"{name}-{target}-{dtype}-{opset}", lambda to, options=options: export(options, to)  # type: ignore[misc]


def strip(root: Path) -> None:
    for path in root.iterdir():
        if path.suffix not in (".onnx", ".json"):
            path.unlink()


def make_all(folder: Path) -> None:
    for name, make in makers():
        if (folder / name).exists():
            continue
        made = folder / f".{name}"
        shutil.rmtree(made, ignore_errors=True)
        try:
            make(made)
            if name.endswith("onnxruntime-fp32-24"):
                quantise_all(made, folder, name)
        except Exception as error:  # some kinds are refused
            print(name, type(error).__name__, str(error)[:200], flush=True)
            continue
        strip(made)
        made.rename(folder / name)
        print(name, flush=True)


def quantise_all(source: Path, folder: Path, name: str) -> None:
    for weights, table in QUANTISED:
        to = folder / f"{name}-{weights}"
        if not to.exists():
            quantise(source, QuantiseOptions(weights, table, accept_loss=True), to)
            strip(to)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from nodes_of(body)


def operators(folder: Path) -> list[str]:
    """Of all graphs in a folder, or of the bundles in it."""
    found = set()
    for path in (*folder.glob("*.onnx"), *folder.glob("*/*.onnx")):
        model = onnx.load(path, load_external_data=False)
        found |= {f"{node.domain}:{node.op_type}".lstrip(":") for node in nodes_of(model.graph)}
    return sorted(found)


if __name__ == "__main__":
    if sys.argv[1] == "--list":
        print(*operators(Path(sys.argv[2])), sep="\n")
    else:
        make_all(Path(sys.argv[1]))

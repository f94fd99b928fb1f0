"""Quantised bundles against the float one, in one run: milliseconds of a page and of a step, bytes, cosine.

    python bench/quantised.py --threads 2 --rounds 5

The checkpoint is the random mid-size one of bench/pages.py. Where the processor multiplies bfloat16, bundles are run
with `onnxruntime-bf16` as well. With OpenVINO installed, the float bundle and the best W8A8 one are run by it, too, in
bfloat16 where the processor has it. Beside ours stand ONNX Runtime's own
`quantize_dynamic` of the same two graphs, MatMul nodes only, and OpenVINO with static int8 by nncf (`pip install nncf`;
skipped without), by its default settings, on the same model in standard operators of opset 20 and with the same
calibration pages. Rounds are interleaved: each variant once, another first in each round.
"""

import json
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import pages
import typer
from pages import hardware, prepare
from rich.console import Console
from rich.table import Table

from cembed.export.exporter import export
from cembed.export.plan import ExportOptions
from cembed.quantize.calibration import drawn_set
from cembed.quantize.plan import QuantiseOptions
from cembed.quantize.quantizer import quantise
from cembed.runtime import Embedder
from cembed.runtime.embed.embedder import Budget
from cembed.runtime.engines.openvino import OpenVinoSession
from cembed.runtime.engines.operators import BF16
from cembed.runtime.engines.quiet import import_openvino
from cembed.runtime.engines.session import Array, EngineSettings, OrtSession, Session, StepSession
from cembed.runtime.errors import CembedError

VARIANTS = {
    "int8": QuantiseOptions("int8", accept_loss=True),
    "int4": QuantiseOptions("int4", accept_loss=True),
    "w8a8": QuantiseOptions("w8a8", accept_loss=True),
    "w8a8 gptq": QuantiseOptions("w8a8", rounding="gptq", accept_loss=True),
}
IN_BFLOAT16 = ("fp32", "int8", "w8a8 gptq")
STEPS = 16
QUERY = "invoice total in EUR, VAT included"
TARGETS = {"page": {"int8": 0.62, "w8a8": 0.65}, "step": {"int8": 0.45, "int4": 0.35}}


def make_bundles(root: Path) -> dict[str, Path]:
    """The float bundle and ours, where they are not there yet."""
    bundles = {name: root / name.replace(" ", "-") for name in ("fp32", *VARIANTS)}
    if not bundles["fp32"].exists():
        prepare(root / "checkpoint", bundles["fp32"], "qwen2.5-vl", "mid")
    for name, options in VARIANTS.items():
        if not bundles[name].exists():
            quantise(bundles["fp32"], options, bundles[name])
    return bundles


def dynamic(bundle: Path, out: Path, threads: int) -> Embedder:
    """The float bundle with its graphs put through ONNX Runtime's dynamic quantisation."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    embedder = Embedder.load(bundle, threads=threads)
    out.mkdir(exist_ok=True)
    for graph in ("vision", "text"):
        path = out / f"{graph}.onnx"
        if not path.exists():
            quantize_dynamic(
                bundle / f"{graph}.onnx",
                path,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
            )
        embedder.replace_sessions({graph: OrtSession(path, EngineSettings(threads=threads))})
    return embedder


class Recording:
    """A session that keeps what it was fed."""

    def __init__(self, session: Session) -> None:
        self._session, self.feeds = session, list[dict[str, Array]]()

    def run(self, feeds: Mapping[str, Array]) -> Array:
        self.feeds.append(dict(feeds))
        return self._session.run(feeds)

    def bind(self, cache: Mapping[str, Array]) -> StepSession:
        return self._session.bind(cache)


def standard_bundles(root: Path) -> dict[str, Path]:
    """The float bundle in standard operators, and what W8A8 makes of it."""
    plain, quantised = root / "standard", root / "standard-w8a8-gptq"
    if not plain.exists():
        export(ExportOptions("qwen2.5-vl", str(root / "checkpoint"), num_vectors=32, target="onnx", opset=20), plain)
    if not quantised.exists():
        quantise(plain, VARIANTS["w8a8 gptq"], quantised)
    return {"fp32": plain, "w8a8 gptq": quantised}


def with_bfloat16(bundles: Mapping[str, Path], threads: int) -> dict[str, Embedder]:
    """The bundles with attention in bfloat16, or none and a line that says why."""
    try:
        opened = {name: Embedder.load(bundles[name], providers=[BF16], threads=threads) for name in IN_BFLOAT16}
    except CembedError as error:
        print(error)
        return {}
    return {f"{name}, {BF16}": embedder for name, embedder in opened.items()}


def with_openvino(root: Path, threads: int) -> dict[str, Embedder]:
    """The standard bundles with OpenVINO, in the fastest arithmetic that is there."""
    try:
        provider = "openvino-bf16"
        Embedder.load(standard_bundles(root)["fp32"], providers=[provider])
    except CembedError as error:
        print(error)
        provider = "openvino"
    return {
        f"{name}, {provider}": Embedder.load(path, providers=[provider], threads=threads)
        for name, path in standard_bundles(root).items()
    }


def openvino_int8(root: Path, threads: int) -> Embedder:
    """The checkpoint in standard operators, quantised by nncf and run by OpenVINO as it is set by default."""
    openvino = import_openvino()
    import nncf

    bundle, core = standard_bundles(root)["fp32"], openvino.Core()
    embedder = Embedder.load(bundle, threads=threads)
    recorded = {name: Recording(embedder.session(name)) for name in ("vision", "text")}
    embedder.replace_sessions(recorded)
    embedder.embed_images(list(drawn_set().pages.values()))
    hints = {"INFERENCE_NUM_THREADS": str(threads), "PERFORMANCE_HINT": "LATENCY"}
    for name, recording in recorded.items():
        path = root / f"nncf-{name}.xml"
        if not path.exists():
            model, calibration = core.read_model(bundle / f"{name}.onnx"), nncf.Dataset(recording.feeds)
            kind, count = nncf.ModelType.TRANSFORMER, len(recording.feeds)
            openvino.save_model(nncf.quantize(model, calibration, model_type=kind, subset_size=count), path)
        embedder.replace_sessions({name: OpenVinoSession(lambda path: core.compile_model(path, "CPU", hints), path)})
    return embedder


def step_times(embedder: Embedder) -> list[float]:
    """Milliseconds of single slots after a query."""
    state = embedder.start_query(QUERY, STEPS + 2)
    state.extend(2)
    times = []
    for count in range(3, STEPS + 3):
        start = time.perf_counter()
        state.extend(count)
        times.append((time.perf_counter() - start) * 1000)
    state.close()
    return times


def measure(root: Path, threads: int, rounds: int) -> dict[str, Any]:
    bundles = make_bundles(root)
    embedders = {name: Embedder.load(path, threads=threads) for name, path in bundles.items()}
    sizes = {name: sum(file.size for file in e.manifest.files.values()) for name, e in embedders.items()}
    embedders |= with_bfloat16(bundles, threads)
    if find_spec("openvino"):
        embedders |= with_openvino(root, threads)
    ours = list(embedders)
    embedders["ort dynamic"] = dynamic(bundles["fp32"], root / "dynamic", threads)
    if find_spec("openvino") and find_spec("nncf"):
        embedders["openvino nncf int8"] = openvino_int8(root, threads)
    else:
        print("without OpenVINO's own quantisation: openvino and nncf are not installed")
    image = pages.draw_page()
    vectors = {name: embedder.embed_image(image) for name, embedder in embedders.items()}
    found: dict[str, dict[str, Any]] = {name: {"page": [], "step": []} for name in embedders}
    for number in range(rounds):
        names = list(embedders)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            time.sleep(pages.PAUSE)
            start = time.perf_counter()
            embedders[name].embed_image(image, Budget(32))
            found[name]["page"].append((time.perf_counter() - start) * 1000)
            if name in ours:
                found[name]["step"] += step_times(embedders[name])
    for name, numbers in found.items():
        numbers["ours"], numbers["bytes"] = name in ours, sizes.get(name)
        numbers["min_cosine"] = float((vectors[name] * vectors["fp32"]).sum(axis=1).min())
    return {"hardware": hardware(threads), "rounds": rounds, "variants": found}


def ratio(found: dict[str, Any], name: str, what: str) -> float:
    return float(median(found[name][what]) / median(found["fp32"][what]))


def report(result: dict[str, Any]) -> None:
    found = result["variants"]
    table = Table(title=f"{result['hardware']['processor']}, {result['hardware']['threads']} threads; medians")
    table.add_column(overflow="fold")
    for column in ("page ms", "of fp32", "step ms", "of fp32", "bytes of fp32", "lowest cosine"):
        table.add_column(column, justify="right")
    for name, numbers in found.items():
        step = (f"{median(numbers['step']):.2f}", f"{ratio(found, name, 'step'):.2f}") if numbers["step"] else ("", "")
        size = f"{numbers['bytes'] / found['fp32']['bytes']:.2f}" if numbers["bytes"] else ""
        page = f"{median(numbers['page']):.0f}", f"{ratio(found, name, 'page'):.2f}"
        table.add_row(name, *page, *step, size, f"{numbers['min_cosine']:.4f}")
    Console().print(table)
    for what, targets in TARGETS.items():
        for name, target in targets.items():
            value = ratio(found, name, what)
            print(f"{'met   ' if value <= target else 'MISSED'} {name} {what}: {value:.2f} of fp32, asked {target}")
    for peer in [name for name in found if not found[name]["ours"]]:
        as_good = [n for n in found if found[n]["ours"] and found[n]["min_cosine"] >= found[peer]["min_cosine"]]
        ours = min((ratio(found, name, "page") for name in as_good), default=float("inf"))
        theirs = ratio(found, peer, "page")
        print(f"{'met   ' if ours <= theirs else 'MISSED'} page as good as {peer}'s: {ours:.2f}, {peer} {theirs:.2f}")


def main(
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    workdir: Annotated[Path | None, typer.Option(help="Keeps checkpoint and bundles for the next run.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Writes every number to this file.")] = None,
) -> None:
    """Time a page and a step of the loop with each precision; compare bytes and vectors."""
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(workdir or Path(temporary), threads, rounds)
    report(result)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

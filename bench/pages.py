"""Seconds per page: the runtime against the reference way, transformers with one decode step per latent slot.

    python bench/pages.py --threads 2 --rounds 5

Both sides get the same image and the same random checkpoint, each in a process of its own, so that its peak memory is
its own; they take turns, and their vectors must agree. GFLOP are a page's useful matrix products, alike for both sides.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from cembed.options import spread

NUM_VECTORS = 32
TOLERANCE = 1e-3  # between the sides' vectors; more means that they do not compute the same thing
PAUSE = 0.5  # seconds: by then the threads of the side that has just run no longer spin
PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|><|endoftext|>"
PACKAGES = ("cembed", "onnxruntime", "numpy", "torch", "transformers")
PEAK = "peak RSS MiB"
Numbers = dict[str, Any]
SIDE: list[Any] = []  # what a child process holds, made by its first call


def draw_page() -> Image.Image:
    """An A4 page at 150 dpi, full of text."""
    page = Image.new("RGB", (1240, 1754), "white")
    for row in range(80):
        words = " ".join(f"{(row * 37 + column * 101) % 9973} EUR" for column in range(15))
        ImageDraw.Draw(page).text((80, 60 + 20 * row), words, fill="black")
    return page


class RuntimeSide:
    def __init__(self, bundle: Path, threads: int, max_visual_tokens: int | None = None) -> None:
        from cembed.runtime import Embedder

        self.embedder = Embedder.load(bundle, threads=threads, max_visual_tokens=max_visual_tokens)
        self.image, self.seconds, self.feeds = draw_page(), Numbers(), Numbers()
        for name in ("vision", "text"):
            session: Any = self.embedder.session(name)
            session.run = partial(self.time_session, name, session.run)

    def time_session(self, name: str, run: Any, feeds: Numbers) -> Any:
        start, self.feeds = time.perf_counter(), self.feeds | feeds
        output = run(feeds)
        self.seconds[name] = time.perf_counter() - start
        return output

    def page(self, num_vectors: int = NUM_VECTORS) -> tuple[Numbers, NDArray[np.float32]]:
        start = time.perf_counter()
        vectors = self.embedder.embed_images([self.image], num_vectors)[0]
        return {"page": time.perf_counter() - start} | self.seconds, vectors

    def lengths(self) -> Numbers:
        """What the graphs were last given: patches, patches of each window, positions of prompt and slots."""
        assert "torch" not in sys.modules
        windows, image = self.feeds.get("window_index", np.empty((0, 0))), self.embedder.inputs.image
        patches, positions = self.feeds["pixel_values"].shape[1], self.feeds["inputs_embeds"].shape[1]
        taken = {"patches": patches, "tokens": patches // image.merge_size**2, "positions": positions}
        return {**taken, "limit": image.max_visual_tokens, "windows": (windows >= 0).sum(axis=1).tolist()}


class ReferenceSide:
    def __init__(self, checkpoint: Path, threads: int) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModel

        torch.set_num_threads(threads)
        self.torch, self.image, self.marks = torch, draw_page(), list[float]()
        self.model, info = AutoModel.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
        if any(info.values()):
            raise ValueError(f"the checkpoint does not fill {type(self.model).__name__}: {info}")
        self.processor = AutoImageProcessor.from_pretrained(checkpoint)
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self.prompt = torch.tensor(tokenizer.encode(PROMPT, add_special_tokens=False).ids)
        self.latent = torch.tensor([[tokenizer.token_to_id("<|latent|>")]])
        self.model.visual.register_forward_pre_hook(lambda *_: self.marks.append(time.perf_counter()))
        self.model.visual.register_forward_hook(lambda *_: self.marks.append(time.perf_counter()))

    def page(self) -> tuple[Numbers, NDArray[np.float32]]:
        self.marks = [time.perf_counter()]
        with self.torch.inference_mode():
            vectors = self.torch.nn.functional.normalize(self.states(), dim=-1).numpy()
        start, vision, text, steps, end = *self.marks, time.perf_counter()
        return {"page": end - start, "vision": text - vision, "text": end - text, "steps": end - steps}, vectors

    def states(self) -> Any:  # K H
        torch, image_token = self.torch, self.model.config.image_token_id
        inputs = self.processor(images=self.image, return_tensors="pt")
        tokens = inputs["image_grid_thw"].prod() // self.processor.merge_size**2
        ids = self.prompt.repeat_interleave(torch.where(self.prompt == image_token, tokens, 1))[None]
        positions, _ = self.model.get_rope_index(ids, (ids == image_token).int(), inputs["image_grid_thw"])
        output = self.model(input_ids=ids, position_ids=positions, use_cache=True, **inputs)
        states = [output.last_hidden_state[0, -1]]
        zero = torch.zeros((3, 1, 1), dtype=torch.long)  # transformers 5 would go on from the prompt's positions
        self.marks.append(time.perf_counter())
        for _ in range(NUM_VECTORS - 1):
            output = self.model(self.latent, None, zero, output.past_key_values, use_cache=True)
            states.append(output.last_hidden_state[0, -1])
        return torch.stack(states)


def sgemm_peaks(threads: int, *shapes: tuple[int, int, int]) -> dict[str, float]:
    """GFLOP/s of float32 products by two libraries, the best of the model's shapes and one more."""
    from onnx import TensorProto, helper, numpy_helper

    from cembed.runtime.engines.quiet import ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    best = {"numpy": 0.0, "onnxruntime": 0.0}
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, None)] for name in "ac"]
    for m, k, n in (*shapes, (3072, 1280, 4864)):
        a, b = np.full((m, k), 0.5, np.float32), np.full((k, n), 0.5, np.float32)
        node, weights = helper.make_node("MatMul", ["a", "b"], ["c"]), numpy_helper.from_array(b, "b")
        graph = helper.make_model(helper.make_graph([node], "matmul", *ends, [weights]), ir_version=10)
        session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        products = partial(np.matmul, a, b), partial(session.run, None, {"a": a})
        for library, product in zip(best, products, strict=True):
            seconds = min(timeit.repeat(product, number=1, repeat=4))
            best[library] = max(best[library], 2e-9 * m * k * n / seconds)
    return best


def call(kind_and_arguments: tuple[Any, ...], name: str, values: tuple[Any, ...]) -> Any:
    if not SIDE:
        SIDE.append(kind_and_arguments[0](*kind_and_arguments[1:]))
    return getattr(SIDE[0], name)(*values)


def memory() -> dict[str, float]:
    """MiB of a process: the peak of what is resident, and what is now: its own, and of mapped files."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    fields = ((PEAK, "VmHWM"), ("own at the end", "RssAnon"), ("mapped", "RssFile"))
    return {name: int(lines[field].split()[0]) / 1024 for name, field in fields}


class Child(ProcessPoolExecutor):  # a new process that holds one side, and sleeps between calls
    def __init__(self, *kind_and_arguments: Any) -> None:
        super().__init__(1, get_context("spawn"))
        self.side = kind_and_arguments

    def call(self, name: str, *values: Any) -> Any:
        return self.submit(call, self.side, name, values).result()


def prepare(checkpoint: Path, bundle: Path, backbone: str, size: str) -> None:
    """The checkpoint and the bundle, unless they are there."""
    if not (checkpoint / "config.json").exists():
        script = Path(__file__).resolve().parents[1] / "samples" / "random_checkpoint.py"
        options = ["--backbone", backbone, "--head", "causal", "--size", size]
        subprocess.run([sys.executable, str(script), str(checkpoint), *options], check=True)
    if not bundle.exists():
        command = [sys.executable, "-c", "from cembed.cli import main; main()", "export", "--backbone", backbone]
        options = ["--model", str(checkpoint), "--out", str(bundle), "--num-vectors", str(NUM_VECTORS)]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)


def count_gflop(text: Numbers, vision: Numbers, lengths: Numbers) -> dict[str, float]:
    """Useful work of a page: windows unpadded, half of the causal square, only the vectors after the last layer."""
    patches, rows = lengths["patches"], lengths["positions"]
    wide, depth = vision["embed_dim" if "embed_dim" in vision else "hidden_size"], vision["depth"]
    mlp = 3 * vision["intermediate_size"] if "fullatt_block_indexes" in vision else 2 * int(wide * vision["mlp_ratio"])
    full = vision.get("fullatt_block_indexes", range(depth))
    pairs = len(full) * patches**2 + (depth - len(full)) * sum(n * n for n in lengths["windows"])
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    before = layers * rows * (hidden + 2 * hidden // text["num_attention_heads"] * text["num_key_value_heads"])
    after = (rows * (layers - 1) + NUM_VECTORS) * (hidden + 3 * text["intermediate_size"])
    multiplications = {
        "vision ends": patches * 588 * wide + lengths["tokens"] * 4 * wide * (4 * wide + hidden),
        "vision layers": depth * patches * wide * (4 * wide + mlp),
        "vision attention": 2 * pairs * wide,
        "text layers": hidden * (before + after),
        "text attention": layers * rows**2 * hidden,
    }
    return {name: 2e-9 * count for name, count in multiplications.items()}


def measure(checkpoint: Path, bundle: Path, threads: int, rounds: int) -> Numbers:
    """Both sides and sgemm take turns, after a page each to warm up and to compare the vectors."""
    sides = {"reference": Child(ReferenceSide, checkpoint, threads), "runtime": Child(RuntimeSide, bundle, threads)}
    theirs, ours = (child.call("page")[1] for child in sides.values())
    difference = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
    if not difference <= TOLERANCE:
        raise SystemExit(f"the two sides do not compute the same: their vectors differ by {difference:.1e}")
    lengths, config = sides["runtime"].call("lengths"), json.loads((checkpoint / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    hidden, mlp = text["hidden_size"], text["intermediate_size"]
    shapes = (lengths["positions"], hidden, mlp), (lengths["positions"], mlp, hidden)
    seconds: dict[str, list[Numbers]] = {name: [] for name in sides}
    with ProcessPoolExecutor(1, get_context("spawn")) as sgemm:
        rates = [sgemm.submit(sgemm_peaks, threads, *shapes).result()]
        for number in range(rounds):
            for name in sorted(sides, reverse=bool(number % 2)):
                time.sleep(PAUSE)
                seconds[name].append(sides[name].call("page")[0])
            time.sleep(PAUSE)
            rates.append(sgemm.submit(sgemm_peaks, threads, *shapes).result())
    held = {name: child.submit(memory).result() for name, child in sides.items()}
    for child in sides.values():
        child.shutdown()
    gflop, sgemm_rates = count_gflop(text, vision, lengths), {name: [rate[name] for rate in rates] for name in rates[0]}
    about = {"difference": difference, "lengths": lengths, "gflop": gflop, "sgemm": sgemm_rates, "seconds": seconds}
    return about | {"sides": [side_row(n, pages, gflop, sgemm_rates) | held[n] for n, pages in seconds.items()]}


def side_row(name: str, pages: list[Numbers], gflop: dict[str, float], sgemm: dict[str, list[float]]) -> Numbers:
    middle = {part: median(row[part] for row in pages) for part in pages[0]}
    seconds, rate = [row["page"] for row in pages], sum(gflop.values()) / middle["page"]
    row = {"side": name, "page s": middle["page"], "min": min(seconds), "max": max(seconds)}
    row |= {"pages/s": 1 / middle["page"], "GFLOP/s": rate, "of sgemm peak": rate / max(map(max, sgemm.values()))}
    for part in ("vision", "text"):
        work = sum(count for what, count in gflop.items() if what.startswith(part))
        row |= {f"{part} s": middle[part], f"GFLOP/s in {part}": work / middle[part]}
    return row | {"decode steps s": middle.get("steps", 0.0)}


def measure_budgets(bundle: Path, threads: int, rounds: int, most: int) -> list[Numbers]:
    """Every number of visual tokens in a fresh process, for its memory; the largest also with fewer vectors."""
    rows = []
    for limit in (most // 6, most // 3, most * 2 // 3, most):
        with Child(RuntimeSide, bundle, threads, limit) as child:
            child.call("page")
            for budget in (NUM_VECTORS, 8, 1) if limit == most else (NUM_VECTORS,):
                pages = [child.call("page", budget)[0] for _ in range(rounds)]
                row = {"--max-visual-tokens": limit, "taken": child.call("lengths")["tokens"], "vectors": budget}
                row |= {f"{part} s": median(page[part] for page in pages) for part in pages[0]}
                rows.append(row | {PEAK: child.submit(memory).result()[PEAK]})
    return rows


def hardware(threads: int) -> Numbers:
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    values = {name.strip(): value.strip() for name, _, value in lines}
    flags = {*values.get("flags", values.get("Features", "")).split()} & {"avx2", "avx512f", "avx512_vnni", "asimd"}
    about = {"processor": values.get("model name"), "flags": sorted(flags), "cores": os.cpu_count(), "threads": threads}
    return {**about, "precision": "float32", **{name: version(name) for name in PACKAGES}}


def report(result: Numbers) -> None:
    console, lengths = Console(width=160, highlight=False), result["lengths"]
    console.print(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))
    counts = ", ".join(f"{lengths[name]} {name}" for name in ("patches", "tokens", "positions"))
    console.print(f"{counts}, {NUM_VECTORS} vectors; the sides' vectors differ by {result['difference']:.1e} at most")
    console.print("GFLOP a page: " + ", ".join(f"{name} {count:.3g}" for name, count in result["gflop"].items()))
    console.print("sgemm GFLOP/s: " + ", ".join(f"{n} {min(r):.0f}-{max(r):.0f}" for n, r in result["sgemm"].items()))
    for rows in (result["sides"], result["budgets"]):
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*(f"{v:.{3 if v < 100 else 0}f}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
    theirs, ours = result["sides"]
    console.print(
        f"reference seconds / runtime seconds: {theirs['page s'] / ours['page s']:.2f} (needed: at least 1.3)"
    )
    console.print(f"runtime GFLOP/s / sgemm peak: {ours['of sgemm peak']:.2f} (needed: at least 0.9)")
    console.print(f"runtime peak RSS / reference peak RSS: {ours[PEAK] / theirs[PEAK]:.2f} (needed: at most 0.5)")


@dataclass(frozen=True)
class Run:
    """What is measured, of a random checkpoint."""

    backbone: Annotated[Literal["qwen2.5-vl", "qwen2-vl"], typer.Option()] = "qwen2.5-vl"
    size: Annotated[Literal["mid", "tiny"], typer.Option(help="mid: about 200 M parameters.")] = "mid"
    threads: Annotated[int, typer.Option(min=1, help="Of either side.")] = 2
    rounds: Annotated[int, typer.Option(min=1)] = 5
    workdir: Annotated[Path | None, typer.Option(help="Keeps checkpoint and bundle for the next run.")] = None
    json: Annotated[Path | None, typer.Option(help="Writes every number to this file.")] = None

    def measure(self, how: Callable[[Path, Path, int, int], Numbers], report: Callable[[Numbers], None]) -> None:
        """`how` gets checkpoint, bundle, threads and rounds."""
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        os.environ |= {"OPENBLAS_NUM_THREADS": str(self.threads), **quiet}
        with tempfile.TemporaryDirectory() as temporary:
            folder, name = self.workdir or Path(temporary), f"{self.backbone}-{self.size}"
            checkpoint, bundle = folder / f"{name}-checkpoint", folder / f"{name}-bundle"
            prepare(checkpoint, bundle, self.backbone, self.size)
            result = {"hardware": hardware(self.threads), **how(checkpoint, bundle, self.threads, self.rounds)}
        report(result)
        if self.json is not None:
            self.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def with_budgets(checkpoint: Path, bundle: Path, threads: int, rounds: int) -> Numbers:
    result = measure(checkpoint, bundle, threads, rounds)
    return result | {"budgets": measure_budgets(bundle, threads, rounds, result["lengths"]["limit"])}


@spread
def main(run: Run) -> None:
    """Time a page through the runtime and through transformers; compare speed, memory and vectors."""
    run.measure(with_budgets, report)


if __name__ == "__main__":
    typer.run(main)

"""GPUs: MaxSim kernels, a page beside the reference, vectors beside the CPU's, in one run of less than nine minutes.

    python bench/gpu.py

Needs torch and transformers; what else is missing is skipped, and said. A page is timed from pixel values to vectors,
in a random model of the shapes of Qwen2.5-VL-3B with 768 visual tokens and 32 vectors: float16 here, bfloat16 there,
where transformers runs one decode step per slot. The share of the ceiling is useful arithmetic over what a product of
the model's shapes reaches in the same run. The vectors are those of the sample model on its own pages.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Annotated, Any, Literal, cast

import numpy as np
import typer
from numpy.typing import NDArray
from pages import NUM_VECTORS, PROMPT, count_gflop
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
CUDA = "CUDAExecutionProvider"
PACKAGES = ("cembed", "torch", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt")
PROMPT_OURS = PROMPT.replace("<|image_pad|>", "{image}")
WANTED = {1: 30.0, 16: 3.0}  # reference seconds over ours, by batch
MIN_COSINE, SAME_MODEL = 0.9995, 0.9  # of the sample model's vectors; of both sides' with random weights
GRIDS = {"2b": (48, 64), "mid": (48, 64), "tiny": (16, 24)}  # rows and columns of patches
Numbers = dict[str, Any]
Floats = NDArray[np.float32]


class Random:
    """The random checkpoint: the page's inputs, and the graphs without the checks of an export."""

    def __init__(self, folder: Path, size: str, dtype: str) -> None:
        from cembed.export.plan import ExportOptions, ExportPlan
        from cembed.runtime.bundle.prompts import Prompter
        from cembed.runtime.embed.vision_feeds import vision_feeds

        self.checkpoint, self.folder, self.grid = folder / f"{size}-checkpoint", folder, GRIDS[size]
        if not (self.checkpoint / "config.json").exists():
            script = [sys.executable, str(ROOT / "samples" / "random_checkpoint.py"), str(self.checkpoint)]
            flags = ["--backbone", "qwen2.5-vl", "--head", "causal", "--size", size, "--dtype", "bfloat16"]
            subprocess.run([*script, *flags], check=True)
        self.config = json.loads((self.checkpoint / "config.json").read_text())
        options = ExportOptions("qwen2.5-vl", str(self.checkpoint), num_vectors=NUM_VECTORS, dtype=dtype)
        self.plan = ExportPlan.make(options, self.checkpoint)
        patches = self.grid[0] * self.grid[1]
        self.pixels = np.random.default_rng(0).standard_normal((1, patches, 588), np.float32)
        self.vision = vision_feeds(self.plan.graphs[0].inputs, self.pixels[0], self.grid, self.plan.backbone.image)
        self.ids = Prompter(self.plan.tokenizer, self.plan.backbone.image_token_id).document(PROMPT_OURS, patches // 4)
        rows = self.ids.tolist() + [self.plan.document.latent_token_id] * (NUM_VECTORS - 1)
        self.embeds: Floats = self.plan.checkpoint.load(self.plan.checkpoint.embeddings_name)[rows].float().numpy()

    @property
    def gflop(self) -> float:
        taken = {"patches": self.pixels.shape[1], "tokens": self.pixels.shape[1] // 4, "positions": len(self.embeds)}
        lengths = {**taken, "windows": (self.vision["window_index"] >= 0).sum(axis=1).tolist()}
        return sum(count_gflop(self.config["text_config"], self.config["vision_config"], lengths).values())

    def graphs(self, target: str, dtype: str) -> dict[str, Path]:
        """vision.onnx and text.onnx, traced for a target, with the checkpoint's weights."""
        from cembed.export.graph import WeightFile, choose_dialect, trace, write_graph
        from cembed.export.layers import DTYPES

        folder, paths = self.folder / f"{self.checkpoint.name}-{target}", {}
        folder.mkdir(exist_ok=True)
        for spec in self.plan.graphs[:2]:
            paths[spec.name] = folder / f"{spec.name}.onnx"
            if not paths[spec.name].exists():
                data = WeightFile(folder / spec.data)
                model = trace(spec, choose_dialect(target, 24), DTYPES[dtype], 24)
                write_graph(model, spec, data, self.plan.loader(spec, stored=True))
                data.close()
        return paths


class Ours:
    """Pixel values to vectors with two sessions, as an embedder does it, for a batch."""

    def __init__(self, model: Random, sessions: Callable[[str], Any]) -> None:
        from cembed.runtime.embed.positions import prompt_positions, slot_positions

        self.model, self.sessions = model, {name: sessions(name) for name in ("vision", "text")}
        image, plan = model.plan.backbone.image, model.plan
        self.is_image = model.ids == plan.backbone.image_token_id
        prompt = prompt_positions(self.is_image, model.grid, plan.backbone.positions, image.merge_size)
        slots = slot_positions(prompt, NUM_VECTORS - 1, plan.document.slot_positions)
        self.positions = np.concatenate([prompt, slots], axis=1)[:, None]
        self.slots = np.arange(len(model.ids) - 1, len(model.embeds))[None]

    def run(self, batch: int) -> Floats:
        pixels = self.model.pixels.repeat(batch, 0)
        features = self.sessions["vision"].run({**self.model.vision, "pixel_values": pixels})
        embeds = self.model.embeds[None].repeat(batch, 0)
        embeds[:, : len(self.is_image)][:, self.is_image] = features
        feeds = {"inputs_embeds": embeds, "position_ids": self.positions.repeat(batch, 1)}
        states = self.sessions["text"].run({**feeds, "slot_indices": self.slots.repeat(batch, 0)})
        return normalised(states)


def normalised(states: Floats) -> Floats:
    lengths: Floats = np.linalg.norm(states, axis=-1, keepdims=True)
    return states / lengths


class Reference:
    """transformers: a prefill, and one decode step per slot."""

    def __init__(self, model: Random, device: str) -> None:
        import torch
        from transformers import AutoModel

        self.torch, self.random, self.device = torch, model, device
        loaded = AutoModel.from_pretrained(model.checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa")
        self.model = loaded.to(device).eval()

    def run(self, batch: int) -> Floats:
        torch, random = self.torch, self.random
        frames = random.pixels[0].reshape(-1, 3, 1, 196).repeat(2, 2).reshape(-1, 1176)  # both frames are the page
        pixels = torch.from_numpy(frames).to(self.device, torch.bfloat16).repeat(batch, 1)
        ids = torch.from_numpy(random.ids).to(self.device)[None].repeat(batch, 1)
        grid = torch.tensor([[1, *random.grid]], device=self.device).repeat(batch, 1)
        latent = torch.full((batch, 1), random.plan.document.latent_token_id, device=self.device)
        zero = torch.zeros((3, batch, 1), dtype=torch.long, device=self.device)
        with torch.inference_mode():
            is_image = (ids == self.model.config.image_token_id).int()
            positions, _ = self.model.get_rope_index(ids, is_image, grid)
            output = self.model(
                input_ids=ids, position_ids=positions, pixel_values=pixels, image_grid_thw=grid, use_cache=True
            )
            states = [output.last_hidden_state[:, -1]]
            for _ in range(NUM_VECTORS - 1):
                output = self.model(latent, None, zero, output.past_key_values, use_cache=True)
                states.append(output.last_hidden_state[:, -1])
            return normalised(torch.stack(states, 1).float().cpu().numpy())


def matmul_ceiling(rows: int, hidden: int, wide: int, device: str) -> float:
    """TFLOP/s of float16 products of the decoder's shapes; of float32 ones on a CPU."""
    import torch

    dtype = torch.float16 if device == "cuda" else torch.float32
    best = 0.0
    for inner, outer in ((hidden, wide), (wide, hidden)):
        a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, inner), (inner, outer)))

        def products(a: Any = a, b: Any = b) -> None:
            for _ in range(20):
                a @ b
            if device == "cuda":
                torch.cuda.synchronize()

        best = max(best, 20 * 2e-12 * rows * inner * outer / min(seconds(products, 4)))
    return best


def seconds(call: Callable[[], Any], rounds: int) -> list[float]:
    """Of each round, after one to warm up and one in which graphs are captured."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times[2:]


def ort_sessions(model: Random, provider: str, dtype: str) -> Callable[[str], Any]:
    from cembed.runtime.engines.session import EngineSettings, OrtSession

    paths = model.graphs("onnxruntime", dtype)
    return lambda name: OrtSession(paths[name], EngineSettings((provider,)))


def tensorrt_sessions(model: Random, dtype: str, batch: int) -> Callable[[str], Any]:
    """Engines of the graphs alone: what of a bundle they are built from is put together here."""
    from cembed.runtime.bundle.manifest import Graph
    from cembed.runtime.engines.build import Build, BuildOptions, EngineCache, Library
    from cembed.runtime.engines.cuda import Cuda
    from cembed.runtime.engines.memory import EngineLimits
    from cembed.runtime.engines.tensorrt import Device, TrtSession

    library, cuda, paths, plan = Library.load(), Cuda(), model.graphs("tensorrt", dtype), model.plan
    specs = {spec.name: Graph(f"{spec.name}.onnx", (spec.data,), spec.inputs, spec.outputs) for spec in plan.graphs[:2]}
    image = replace(plan.backbone.image, max_pixels=model.pixels.shape[1] // 4 * plan.backbone.image.factor**2)
    sides = {"document": plan.document, "query": plan.query, "max_sequence_length": plan.backbone.decoder.max_positions}
    manifest = cast(Any, SimpleNamespace(graphs=specs, image=image, **sides))
    bundle = cast(Any, SimpleNamespace(root=paths["text"].parent, manifest=manifest, graph_path=paths.get))
    options = BuildOptions(EngineLimits.from_prompt(manifest, image, len(model.ids), batch))
    cache, device = EngineCache(bundle, library, cuda.gpu()), Device(library.trt, cuda)
    cache.folder.mkdir(exist_ok=True)

    def session(name: str) -> TrtSession:
        return TrtSession(
            device, device.load(Build(cache, name, options).run(), name), specs[name], name, name == "text"
        )

    return session


def measure_pages(model: Random, device: str, dtype: str, rounds: int, say: Callable[[str], None]) -> list[Numbers]:
    """A row for each side and batch; a side whose library is missing is named and left out."""
    text = model.config["text_config"]
    provider = CUDA if device == "cuda" else "CPUExecutionProvider"
    makers: dict[str, Callable[[], Any]] = {
        "transformers": lambda: Reference(model, device),
        f"ONNX Runtime, {provider}": lambda: Ours(model, ort_sessions(model, provider, dtype)),
        "TensorRT": lambda: Ours(model, tensorrt_sessions(model, dtype, max(WANTED))),
    }
    rows: list[Numbers] = []
    expected: dict[int, tuple[Floats, float]] = {}
    for name, make in makers.items():
        try:
            side = make()
            for batch in WANTED:
                vectors, page = side.run(batch), median(seconds(partial(side.run, batch), rounds)) / batch
                rate = model.gflop / page / 1e3
                ceiling = matmul_ceiling(
                    batch * len(model.embeds), text["hidden_size"], text["intermediate_size"], device
                )
                theirs, reference = expected.setdefault(batch, (vectors, page))
                cosine = float((vectors * theirs).sum(-1).min())
                row = {
                    "side": name,
                    "batch": batch,
                    "ms a page": 1e3 * page,
                    "TFLOP/s": rate,
                    "of ceiling": rate / ceiling,
                }
                rows.append({**row, "times faster": reference / page, "needed": WANTED[batch], "lowest cosine": cosine})
        except Exception as error:  # each library has its own
            say(f"skipped: {name}: {str(error).strip().splitlines()[0]}")
        side = None
    return rows


def measure_vectors(folder: Path, provider: str) -> Numbers:
    """The sample model's pages and questions: float16 on the device against float32 on the CPU."""
    from PIL import Image

    from cembed.export.exporter import export
    from cembed.export.plan import ExportOptions
    from cembed.runtime import Embedder, maxsim
    from cembed.runtime.engines.session import check_providers

    check_providers([provider])
    sample = ROOT / "samples" / "pages" / "sample"
    for dtype in ("fp32", "fp16"):
        if not (folder / dtype).exists():
            model = str(ROOT / "samples" / "model")
            export(ExportOptions("qwen2.5-vl", model, slot_positions="continue", dtype=dtype), folder / dtype)
    images = [Image.open(path, formats=("PNG", "JPEG")) for path in sorted((sample / "pages").iterdir())]
    lines = (sample / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    found = []
    for dtype, where in (("fp32", "CPUExecutionProvider"), ("fp16", provider)):
        embedder = Embedder.load(folder / dtype, providers=[where])
        found.append((embedder.embed_images(images), embedder.embed_queries(texts)))
    pairs = [pair for side in (0, 1) for pair in zip(found[0][side], found[1][side], strict=True)]
    cosines = np.concatenate([(a * b).sum(-1) for a, b in pairs])
    best = [maxsim(queries, pages).argmax(axis=1) for pages, queries in found]
    counts = {"pages": len(images), "queries": len(texts)}
    same = float((best[0] == best[1]).mean())
    return {
        **counts,
        "lowest cosine": float(cosines.min()),
        f"of {len(cosines)} below {MIN_COSINE}": int((cosines < MIN_COSINE).sum()),
        "median cosine": float(np.median(cosines)),
        "rank 1 kept": same,
    }


def hardware(device: str) -> Numbers:
    import torch

    found = {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def show(console: Console, title: str, rows: list[Numbers]) -> None:
    if rows:
        table = Table(*rows[0], title=title, title_justify="left")
        for row in rows:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        console.print(table)


def show_maxsim(console: Console, found: Numbers | None) -> None:
    if found:
        copy = f"{found['copy']['bytes_per_second'] / 1e9:.0f} GB/s"
        show(console, f"MaxSim; a copy: {copy}", import_module("gpu_maxsim").rows(found))
        console.print("errors", found["errors"], "published elsewhere, of the bandwidth", found["published"])


def main(
    size: Annotated[Literal["2b", "mid", "tiny"], typer.Option(help="2b: the shapes of Qwen2.5-VL-3B.")] = "2b",
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="cpu: to try the script.")] = "cuda",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    workdir: Annotated[Path | None, typer.Option(help="Keeps checkpoint and graphs for the next run.")] = None,
    results: Annotated[Path, typer.Option(help="Where the JSON goes.")] = ROOT / "bench" / "results",
) -> None:
    """Measure what this project does on a GPU."""
    console, start = Console(width=150, highlight=False), time.perf_counter()
    notes: list[str] = []
    result: Numbers = {"hardware": hardware(device), "notes": notes}

    def say(note: str) -> None:
        notes.append(note)
        console.print(f"[{time.perf_counter() - start:.0f} s] {note}", markup=False)

    def part(name: str, measure: Callable[[], Any]) -> None:
        say(f"measuring {name}")
        try:
            result[name] = measure()
        except Exception as error:  # the others may still be measured
            say(f"skipped: {name}: {str(error).strip().splitlines()[0]}")

    warnings.simplefilter("ignore")
    dtype = "fp16" if device == "cuda" else "fp32"
    with tempfile.TemporaryDirectory() as temporary:
        folder = workdir or Path(temporary)
        part("maxsim", lambda: import_module("gpu_maxsim").measure())
        part("vectors", lambda: measure_vectors(folder, CUDA if device == "cuda" else "CPUExecutionProvider"))
        part("pages", lambda: measure_pages(Random(folder, size, dtype), device, dtype, rounds, say))
    say("done")
    console.print(result["hardware"])
    show_maxsim(console, result.get("maxsim"))
    show(console, f"a page, Qwen2.5-VL {size}, {NUM_VECTORS} vectors", result.get("pages", []))
    show(
        console,
        f"float16 against the CPU; needed: cosine {MIN_COSINE}",
        [result["vectors"]] if "vectors" in result else [],
    )
    path = results / f"gpu-{'-'.join(str(result['hardware']['device']).lower().split())}.json"
    path.write_text(json.dumps(result, indent=1, default=float) + "\n", encoding="utf-8")
    console.print(f"{path}")
    if wrong := [row["side"] for row in result.get("pages", []) if not row["lowest cosine"] >= SAME_MODEL]:
        sys.exit(f"{', '.join(wrong)}: not what transformers computes, the lowest cosine is below {SAME_MODEL}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # where cembed is not installed, it is beside this folder
    typer.run(main)

"""A page, a slot of the loop, loading, memory and disk, beside llama.cpp, OpenVINO and transformers, in one run.

    python bench/peers.py --threads 2 --rounds 5

The model has Qwen2-VL-2B's widths, a quarter of its layers and random weights. All sides compute the same vectors:
the last position of a page's prompt and 15 latent tokens after it; transformers in float32 is right. Each side has
processes of its own: one that loads and embeds a page, one that runs the loop, and one whose pages and slots take
turns with all others'. A peer that is not installed is left out, with a line: `pip install llama-cpp-python gguf`,
and `pip install openvino nncf`. With `--ready` nothing is computed: only how soon each side is ready, in turns.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import llama_peer
import numpy as np
import typer
from numpy.typing import NDArray
from pages import PAUSE, PEAK, Child, draw_page, hardware, memory
from released import GOLDEN, command
from rich.console import Console
from rich.table import Table

from cembed.runtime.engines.operators import BF16, EXACT, byte_products, operators
from cembed.runtime.errors import CembedError

VECTORS, TOKENS, LATENT = 16, 736, "<|vision_end|>"
TEXT = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 7,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "layer_types": ["full_attention"] * 7,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
}
VISION = {"depth": 8, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16}
CPU = "CPUExecutionProvider"
OURS = {
    "ours fp32": ("fp32", CPU),
    "ours int8": ("int8", CPU),
    "ours int8, bf16": ("int8", BF16),
    "ours W8A8, bf16": ("w8a8", BF16),
    "ours int4, bf16": ("int4", BF16),
}
BUNDLES = ("fp32", "int8", "w8a8", "int4", "standard")  # others are made of the first
READY = ("fp32", "int8", "int4")
Seconds = dict[str, float]
Vectors = NDArray[np.float32]


def make(out: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import CONFIG_MAPPING, AutoModel

    golden = GOLDEN / "colqwen2"
    raw = json.loads((golden / "config.json").read_text())
    raw["text_config"] |= TEXT
    raw["vision_config"] |= VISION
    config = CONFIG_MAPPING["qwen2_vl"].from_dict(raw)
    torch.manual_seed(0)
    model = AutoModel.from_config(config).float()
    out.mkdir(parents=True)
    save_file(
        {f"model.{key}": value.contiguous() for key, value in model.state_dict().items()}, out / "model.safetensors"
    )
    config.save_pretrained(out)
    for path in golden.glob("tokenizer*.json"):
        shutil.copy(path, out)
    image = json.loads((golden / "preprocessor_config.json").read_text())
    least, most = 4 * 28 * 28, TOKENS * 28 * 28
    image |= {"size": {"shortest_edge": least, "longest_edge": most}, "min_pixels": least, "max_pixels": most}
    (out / "preprocessor_config.json").write_text(json.dumps(image))


def prepare(root: Path, names: Sequence[str] = BUNDLES) -> dict[str, Path]:
    """The checkpoint and our bundles of these names, where they are not there yet."""
    checkpoint, pages = root / "checkpoint", root / "pages"
    if not (checkpoint / "config.json").exists():
        make(checkpoint)
    pages.mkdir(exist_ok=True)
    draw_page().save(pages / "upright.png")
    draw_page().rotate(90, expand=True).save(pages / "turned.png")
    bundles = {name: root / name for name in names}
    export = [
        "export",
        "--backbone",
        "qwen2-vl",
        "--model",
        str(checkpoint),
        "--head",
        "causal",
        "--num-vectors",
        str(VECTORS),
    ]
    export += ["--latent-token", LATENT, "--slot-positions", "continue"]
    for name, bundle in bundles.items():
        if bundle.exists():
            continue
        if name in ("fp32", "standard"):
            command(
                *export, *(["--target", "onnx", "--opset", "20"] if name == "standard" else []), "--out", str(bundle)
            )
        else:
            scheme = ["--w8a8"] if name == "w8a8" else ["--weights", name]
            options = [*scheme, "--accept-loss", "--calibration", str(pages), "--out", str(bundle)]
            command("quantize", str(bundles["fp32"]), *options)
    return bundles


class Ours:
    """A bundle on one provider; `loop` opens what the loop needs, and nothing else."""

    def __init__(self, bundle: Path, provider: str, threads: int, loop: bool = False) -> None:
        from cembed.runtime import Embedder
        from cembed.runtime.embed.embedder import Budget

        self.budget = Budget(VECTORS, decode="loop" if loop else "single-pass")
        start = time.perf_counter()
        self.embedder = Embedder.load(bundle, providers=[provider], threads=threads)
        self.embedder.prepare("document", self.budget)
        self.ready, self.image = time.perf_counter() - start, draw_page()

    def opened(self) -> float:
        return self.ready

    def page(self) -> tuple[Seconds, Vectors]:
        start = time.perf_counter()
        prompt = self.embedder.inputs.document(self.image)
        seen = time.perf_counter()
        vectors = self.embedder.embed_prompt("document", prompt, self.budget)
        end = time.perf_counter()
        return {"page": end - start, "vision": seen - start, "text": end - seen}, vectors

    def step(self) -> float:
        state = self.embedder.start(self.image, VECTORS + 2)
        state.extend(2)
        start = time.perf_counter()
        state.extend(VECTORS + 2)
        return (time.perf_counter() - start) / VECTORS

    def inputs(self) -> dict[str, Any]:
        """What peers are given: the prompt with one image token, the latent's id, the page in its final size."""
        from cembed.runtime.embed.preprocess import preprocess

        builder = self.embedder.inputs
        side = builder.manifest.document
        _, (rows, columns) = preprocess(self.image, builder.image)
        patch, ids = builder.image.patch_size, builder.prompter.document(side.prompt, 1)
        image = self.image.resize((columns * patch, rows * patch), 3)
        return {
            "ids": [int(i) for i in ids],
            "image_id": builder.manifest.image_token_id,
            "latent_id": side.latent_token_id,
            "vectors": VECTORS,
            "image": image,
            "grid": (rows, columns),
        }


class OpenVino(Ours):
    """The bundle of standard operators; with `compressed`, its weights in int8 by nncf."""

    def __init__(self, bundle: Path, threads: int, compressed: bool) -> None:
        from cembed.runtime.engines.openvino import OpenVinoSession
        from cembed.runtime.engines.quiet import import_openvino

        super().__init__(bundle, "openvino-bf16", threads)
        if not compressed:
            return
        openvino, core = import_openvino(), import_openvino().Core()
        import nncf

        hints = {"INFERENCE_NUM_THREADS": str(threads), "PERFORMANCE_HINT": "LATENCY"}
        for graph in ("vision", "text"):
            path = bundle.with_name("nncf") / f"{graph}.xml"
            if not path.exists():
                model = nncf.compress_weights(
                    core.read_model(bundle / f"{graph}.onnx"), mode=nncf.CompressWeightsMode.INT8_ASYM
                )
                openvino.save_model(model, path, compress_to_fp16=False)
            session = OpenVinoSession(lambda place: core.compile_model(place, "CPU", hints), path)
            self.embedder.replace_sessions({graph: session})


class Transformers:
    def __init__(self, checkpoint: Path, dtype: str, threads: int, inputs: Mapping[str, Any]) -> None:
        import torch
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        torch.set_num_threads(threads)
        self.torch, self.inputs = torch, inputs
        start = time.perf_counter()
        self.model = AutoModel.from_config(AutoConfig.from_pretrained(checkpoint)).eval()
        weights = {
            key.removeprefix("model."): value for key, value in load_file(checkpoint / "model.safetensors").items()
        }
        self.model.load_state_dict(weights)
        self.model = self.model.to(getattr(torch, dtype))
        self.ready = time.perf_counter() - start
        self.processor = AutoImageProcessor.from_pretrained(checkpoint)

    def opened(self) -> float:
        return self.ready

    def page(self) -> tuple[Seconds, Vectors]:
        torch, given, start = self.torch, self.inputs, time.perf_counter()
        pixels = self.processor(images=given["image"], return_tensors="pt")
        at, (rows, columns) = given["ids"].index(given["image_id"]), given["grid"]
        images = [given["image_id"]] * (rows * columns // 4)
        ids = torch.tensor(
            [[*given["ids"][:at], *images, *given["ids"][at + 1 :], *[given["latent_id"]] * (VECTORS - 1)]]
        )
        positions, _ = self.model.get_rope_index(ids, (ids == given["image_id"]).int(), pixels["image_grid_thw"])
        with torch.inference_mode():
            pixels["pixel_values"] = pixels["pixel_values"].to(self.model.dtype)
            states = self.model(input_ids=ids, position_ids=positions, **pixels).last_hidden_state[0, -VECTORS:].float()
        return {"page": time.perf_counter() - start}, torch.nn.functional.normalize(states, dim=-1).numpy()


def ours() -> dict[str, tuple[str, str]]:
    """Our sides: those in bfloat16 without it where there is none, exact sums where the processor has none."""
    found, exact = OURS, {"ours int8, exact": ("int8", EXACT)} if byte_products() else {}
    try:
        operators()
    except CembedError as error:
        print(f"without {BF16}: {error}")
        found = {name.removesuffix(", bf16"): (bundle, CPU) for name, (bundle, _) in OURS.items()}
    return found | exact


def sides_of(root: Path, threads: int, names: Sequence[str] = BUNDLES) -> dict[str, dict[str, Any]]:
    """By name: how a side is opened for pages, for the loop, for its turns, and its files."""
    bundles, checkpoint = prepare(root, names), root / "checkpoint"
    with Child(Ours, bundles["fp32"], CPU, threads) as child:
        inputs = child.call("inputs")
    found: dict[str, dict[str, Any]] = {}
    for name, (bundle, provider) in ours().items():
        if bundle not in bundles:
            continue
        opened: tuple[Any, ...] = (Ours, bundles[bundle], provider, threads)
        files = [path for path in bundles[bundle].iterdir() if path.suffix in (".data", ".bin", ".onnx")]
        found[name] = {"page": opened, "loop": (*opened, True), "turns": opened, "files": files}
    if not find_spec("openvino"):
        print("without OpenVINO: it is not installed")
    elif "standard" in bundles:
        for name, compressed in (("OpenVINO bf16", False), ("OpenVINO bf16, nncf int8", True)):
            if compressed and not find_spec("nncf"):
                print("without weights compressed by nncf: it is not installed")
                continue
            found[name] = {"turns": (OpenVino, bundles["standard"], threads, compressed)}
    for dtype in ("float32", "bfloat16"):
        opened = Transformers, checkpoint, dtype, threads, inputs
        found[f"transformers {dtype}"] = {"turns": opened, "page": opened}
    if find_spec("llama_cpp") and find_spec("gguf"):
        for kind, (text, few, vision) in llama_peer.convert(checkpoint, root / "gguf").items():
            opened, turns = (
                (llama_peer.Llama, text, vision, threads, inputs),
                (llama_peer.Llama, few, vision, threads, inputs),
            )
            found[f"llama.cpp {kind}"] = {"page": opened, "loop": opened, "turns": turns, "files": [text, vision]}
    else:
        print("without llama.cpp: llama-cpp-python and gguf are not installed")
    return found


def measure(root: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    sides, rows = sides_of(root, threads), dict[str, dict[str, Any]]()
    for name, side in sides.items():
        row = rows[name] = {"side": name}
        for kind in ("page", "loop"):
            if kind in side:
                with Child(*side[kind]) as child:
                    row[f"ready {kind} s"] = child.call("opened")
                    child.call("step" if kind == "loop" and "llama" in name else "page")
                    row[f"{kind} {PEAK}"] = child.submit(memory).result()[PEAK]
        if "files" in side:
            row["disk MB"] = sum(path.stat().st_size for path in side["files"]) / 1e6
    children = {name: Child(*side["turns"]) for name, side in sides.items()}
    vectors = {name: child.call("page")[1] for name, child in children.items()}
    stepping = [name for name in children if name.startswith(("ours", "llama"))]
    seconds: dict[str, list[Seconds]] = {name: [] for name in children}
    for number in range(rounds):
        names = list(children)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            time.sleep(PAUSE)
            found = children[name].call("page")[0]
            seconds[name].append(found | ({"step": children[name].call("step")} if name in stepping else {}))
    for name, child in children.items():
        middle = {part: median(row[part] for row in seconds[name]) for part in seconds[name][0]}
        lowest = float((vectors[name] * vectors["transformers float32"]).sum(axis=1).min())
        rows[name] |= {f"{part} s": value for part, value in middle.items()} | {"lowest cosine": lowest}
        rows[name]["rounds"] = seconds[name]
        child.shutdown()
    return list(rows.values())


def time_opening(root: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    """How soon llama.cpp and ours are ready, each time in a process of its own."""
    sides = {name: side for name, side in sides_of(root, threads, READY).items() if "loop" in side}
    seconds: dict[str, dict[str, list[float]]] = {name: {"page": [], "loop": []} for name in sides}
    for number in range(rounds + 1):  # the first one fills the page cache
        for name, side in sides.items():
            for kind in ("page", "loop"):
                time.sleep(PAUSE)
                with Child(*side[kind]) as child:
                    seconds[name][kind] += [child.call("opened")] * (number > 0)
    return [
        {"side": name, "rounds": found} | {f"ready {kind} s": median(found[kind]) for kind in found}
        for name, found in seconds.items()
    ]


COLUMNS = {
    "side": "",
    "page s": "",
    "vision s": "vision",
    "text s": "text",
    "step s": "step",
    "ready page s": "ready",
    "ready loop s": "ready, loop",
    f"page {PEAK}": "MiB",
    f"loop {PEAK}": "MiB, loop",
    "disk MB": "disk MB",
    "lowest cosine": "cosine",
}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(*(short or name for name, short in COLUMNS.items()))
    for row in rows:
        cells = [row.get(name, "") for name in COLUMNS]
        table.add_row(*(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    Console(width=160).print(table)


def main(
    threads: Annotated[int, typer.Option()] = 2,
    rounds: Annotated[int, typer.Option()] = 5,
    ready: Annotated[bool, typer.Option("--ready", help="How soon each side is ready, and nothing else.")] = False,
    workdir: Annotated[
        Path | None, typer.Option(help="Keeps checkpoint, bundles and GGUF files for the next run.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file.")] = None,
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        rows = (time_opening if ready else measure)(workdir or Path(temporary), threads, rounds)
    show(rows)
    if out:
        out.write_text(
            json.dumps({"machine": hardware(threads), "load": os.getloadavg(), "sides": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    typer.run(main)

"""Models in the sizes of their releases, with random weights: export, bundle, seconds a page and a query, memory.

    python bench/released.py --threads 2 --rounds 5

Each is made by transformers' own class, which is the peer as well: the same weights, pixels and tokens, in float32. The
vocabulary is the released one's, the tokenizer that of tests/golden, which makes a query longer. Every variant
has a process of its own; rounds are interleaved. `int8 peak` is what ONNX Runtime multiplies in int8 on this machine.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from pages import PAUSE, PEAK, Child, draw_page, hardware, memory
from rich.console import Console
from rich.table import Table

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
QUERY = "Which invoice names the amount of 120 EUR, and when was it due?"
TOLERANCE = 1e-3
WEIGHTS = ("fp32", "int8", "w8a8")
SIGLIP = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
TILES = SIGLIP | {"image_size": 512, "patch_size": 16}


@dataclass(frozen=True)
class Release:
    """A golden folder, the sizes of the release, and the numbers of visual tokens that are measured."""

    golden: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    top: Mapping[str, Any]
    tokens: tuple[int, ...]


RELEASES = {
    "ColModernVBERT-250M": Release(
        "colmodernvbert",
        {
            "hidden_size": 768,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
            "intermediate_size": 1152,
            "vocab_size": 50368,
            "max_position_embeddings": 8192,
            "local_attention": 128,
            "layer_types": None,
        },
        TILES,
        {"pixel_shuffle_factor": 4},
        (832, 320),
    ),
    "ColSmol-256M": Release(
        "colidefics3",
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "intermediate_size": 1536,
            "vocab_size": 49280,
            "max_position_embeddings": 8192,
        },
        TILES,
        {"scale_factor": 4},
        (832, 320),
    ),
    "Qwen3.5-0.8B": Release(
        "colqwen3_5",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "intermediate_size": 3584,
            "vocab_size": 248320,
            "max_position_embeddings": 32768,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
                "partial_rotary_factor": 0.25,
                "rope_theta": 1e7,
                "rope_type": "default",
            },
        },
        {
            "depth": 12,
            "hidden_size": 768,
            "num_heads": 12,
            "intermediate_size": 3072,
            "out_hidden_size": 1024,
            "num_position_embeddings": 2304,
        },
        {},
        (768, 256),
    ),
}


def configured(release: Release) -> Any:
    """The configuration of the golden checkpoint with the release's sizes."""
    from transformers import CONFIG_MAPPING

    raw = json.loads((GOLDEN / release.golden / "config.json").read_text())
    for section, sizes in (("text_config", release.text), ("vision_config", release.vision)):
        raw[section] = {k: v for k, v in (raw[section] | dict(sizes)).items() if v is not None}
    return CONFIG_MAPPING[raw["model_type"]].from_dict(raw | dict(release.top))


def make(name: str, out: Path) -> None:
    """The checkpoint: transformers' model, and a projection to 128."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel

    release, golden = RELEASES[name], GOLDEN / RELEASES[name].golden
    config = configured(release)
    torch.manual_seed(0)
    model = AutoModel.from_config(config).float()
    projection = torch.randn(128, config.text_config.hidden_size) / config.text_config.hidden_size**0.5
    weights = {f"model.{key}": value.contiguous() for key, value in model.state_dict().items()}
    weights |= {"custom_text_proj.weight": projection, "custom_text_proj.bias": torch.zeros(128)}
    out.mkdir(parents=True)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    config.save_pretrained(out)
    for path in (*golden.glob("tokenizer*.json"), *golden.glob("*processor_config.json")):
        shutil.copy(path, out)
    images = out / "processor_config.json"
    images.write_text(json.dumps(with_sizes(json.loads(images.read_text()), max(release.tokens), name)))


def with_sizes(settings: dict[str, Any], tokens: int, name: str) -> dict[str, Any]:
    """The golden checkpoint's image settings, with the release's limits."""
    image = settings["image_processor"]
    if name.startswith("Qwen"):
        image["size"] = {"shortest_edge": 4096, "longest_edge": tokens * 32 * 32}
    else:
        image |= {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    return settings


def command(*arguments: str) -> tuple[float, float]:
    """Seconds, and the peak of resident memory in MiB, of a `cembed` command."""
    start = time.perf_counter()
    code = "import resource, sys; from cembed.cli import main\ntry: main()\nfinally: print('peak', resource.getrusage("
    code += "resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"cembed {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
    peak = next(int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("peak "))
    return time.perf_counter() - start, peak / 1024


class Ours:
    def __init__(self, bundle: Path, threads: int, tokens: int) -> None:
        from cembed.runtime import Embedder

        self.embedder = Embedder.load(bundle, threads=threads, max_visual_tokens=tokens)

    def page(self) -> tuple[float, NDArray[np.float32]]:
        image, start = draw_page(), time.perf_counter()
        (vectors,) = self.embedder.embed_images([image])
        return time.perf_counter() - start, vectors

    def query(self) -> tuple[float, NDArray[np.float32]]:
        start = time.perf_counter()
        (vectors,) = self.embedder.embed_queries([QUERY])
        return time.perf_counter() - start, vectors

    def stages(self) -> dict[str, float]:
        """Seconds of the graphs of one page."""
        seconds, originals = dict[str, float](), {}
        for name in ("vision", "text"):
            session: Any = self.embedder.session(name)
            originals[name] = session.run
            session.run = lambda feeds, name=name: timed(originals[name], feeds, seconds, name)
        self.page()
        for name in originals:
            del self.embedder.session(name).run
        return seconds

    def inputs(self) -> dict[str, Any]:
        """What a peer is given: tokens, pixels as our graph takes them, and the grid."""
        from cembed.runtime.bundle.prompts import page_prompt
        from cembed.runtime.embed.preprocess import preprocess

        builder = self.embedder.inputs
        pixels, grid = preprocess(draw_page(), builder.image)
        tokens, images = (
            len(pixels) // builder.image.merge_size**2,
            len(pixels) // (builder.image.input_patches or len(pixels)),
        )
        prompt = page_prompt(builder.manifest.document.prompt, builder.image, grid)
        ids = builder.prompter.document(prompt, tokens // images)
        return {"ids": ids, "pixels": pixels, "grid": grid, "images": images, "tokens": tokens}


def timed(run: Any, feeds: Any, seconds: dict[str, float], name: str) -> Any:
    start = time.perf_counter()
    output = run(feeds)
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
    return output


class Peer:
    """transformers' own model, given the same pixels and tokens."""

    def __init__(self, checkpoint: Path, threads: int, inputs: dict[str, Any]) -> None:
        import torch
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModel

        torch.set_num_threads(threads)
        self.torch = torch
        weights = load_file(checkpoint / "model.safetensors")
        self.projection = weights.pop("custom_text_proj.weight")
        weights.pop("custom_text_proj.bias")
        with torch.device("meta"):
            self.model = AutoModel.from_config(AutoConfig.from_pretrained(checkpoint))
        self.model = self.model.to_empty(device="cpu").float().eval()
        self.model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()}, strict=True)
        fresh = AutoModel.from_config(AutoConfig.from_pretrained(checkpoint))  # buffers are not in a state dict
        for name, buffer in fresh.named_buffers():
            self.model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, False)
        del fresh
        self.fields = self.peer_inputs(inputs)

    def peer_inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        torch, pixels, (rows, columns) = self.torch, given["pixels"], given["grid"]
        ids = torch.from_numpy(given["ids"])[None]
        if "qwen" in self.model.config.model_type:
            doubled = pixels.reshape(len(pixels), 3, 1, -1).repeat(2, axis=2).reshape(len(pixels), -1)
            grid = torch.tensor([[1, rows, columns]])
            kinds = (ids == self.model.config.image_token_id).int()
            positions, _ = self.model.get_rope_index(ids, kinds, grid)
            return {
                "input_ids": ids,
                "pixel_values": torch.from_numpy(doubled),
                "image_grid_thw": grid,
                "position_ids": positions,
            }
        side = int((len(pixels) // given["images"]) ** 0.5)
        patch = int((pixels.shape[1] // 3) ** 0.5)
        tiles = unmerged(pixels, given["images"], side, given["tokens"] // given["images"])
        tiles = tiles.reshape(-1, side, side, 3, patch, patch).transpose(0, 3, 1, 4, 2, 5)
        return {
            "input_ids": ids,
            "pixel_values": torch.from_numpy(tiles.reshape(1, -1, 3, side * patch, side * patch).copy()),
        }

    def page(self) -> tuple[float, NDArray[np.float32]]:
        start = time.perf_counter()
        with self.torch.inference_mode():
            states = self.model(**self.fields).last_hidden_state[0] @ self.projection.T
            vectors = self.torch.nn.functional.normalize(states, dim=-1).numpy()
        return time.perf_counter() - start, vectors


def unmerged(pixels: NDArray[np.float32], images: int, side: int, tokens: int) -> NDArray[np.float32]:
    """Patches [images, side * side, ...] row by row, from the order of merge groups."""
    merge = int(((side * side) // tokens) ** 0.5)
    blocks = pixels.reshape(images, side // merge, side // merge, merge, merge, -1)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(images, side * side, -1)


def int8_peak(threads: int) -> float:
    """GOP/s of the best of three shapes of int8 products in ONNX Runtime."""
    from onnx import TensorProto, helper, numpy_helper

    from cembed.runtime.engines.quiet import ort

    options, best = ort.SessionOptions(), 0.0
    options.intra_op_num_threads = threads
    for m, k, n in ((1024, 768, 3072), (3072, 768, 768), (1024, 1024, 3584)):
        weights = numpy_helper.from_array(np.full((k, n), 3, np.int8), "b")
        names = [("a", TensorProto.UINT8, [m, k])], [("c", TensorProto.INT32, [m, n])]
        ends = [[helper.make_tensor_value_info(*each) for each in end] for end in names]
        model = helper.make_model(
            helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["c"])], "int8", *ends, [weights]),
            ir_version=10,
        )
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feeds = {"a": np.full((m, k), 7, np.uint8)}
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            session.run(None, feeds)
            seconds.append(time.perf_counter() - start)
        best = max(best, 2e-9 * m * k * n / min(seconds))
    return best


def bundles_of(name: str, root: Path) -> dict[str, dict[str, Any]]:
    """The float bundle and the quantised ones, and what making them took."""
    checkpoint, rows = root / "checkpoint", dict[str, dict[str, Any]]()
    if not (checkpoint / "config.json").exists():
        make(name, checkpoint)
    (pages := root / "pages").mkdir(exist_ok=True)
    for turned in (False, True):
        (draw_page().rotate(90, expand=True) if turned else draw_page()).save(pages / f"{turned}.png")
    for weights in WEIGHTS:
        out, note = root / weights, root / f"{weights}.json"
        if not note.exists():
            source = ["export", "--model", str(checkpoint)]
            if weights != "fp32":
                scheme = ["--w8a8"] if weights == "w8a8" else ["--weights", weights]
                source = ["quantize", str(root / "fp32"), *scheme, "--accept-loss", "--calibration", str(pages)]
            seconds, peak = command(*source, "--out", str(out), "--force")
            size = sum(path.stat().st_size for path in out.iterdir()) / 2**20
            note.write_text(json.dumps({"made in s": seconds, "made with MiB": peak, "bundle MiB": size}))
        rows[weights] = json.loads(note.read_text())
    return rows


def measure(name: str, root: Path, threads: int, rounds: int) -> dict[str, Any]:
    release, made = RELEASES[name], bundles_of(name, root)
    rows = []
    for tokens in release.tokens:
        sides = {weights: Child(Ours, root / weights, threads, tokens) for weights in WEIGHTS}
        inputs = sides["fp32"].call("inputs")
        if tokens == max(release.tokens):
            sides["transformers"] = Child(Peer, root / "checkpoint", threads, inputs)
        vectors = {side: child.call("page")[1] for side, child in sides.items()}
        check_equal(vectors)
        pages, queries = ({side: list[float]() for side in sides} for _ in range(2))
        for number in range(rounds):
            for side in sorted(sides, reverse=bool(number % 2)):
                time.sleep(PAUSE)
                pages[side].append(sides[side].call("page")[0])
                if side != "transformers":
                    queries[side].append(sides[side].call("query")[0])
        for side, child in sides.items():
            row = {"weights": side, "visual tokens": inputs["tokens"], "page s": median(pages[side])}
            if side != "transformers":
                lowest = float((vectors[side] * vectors["fp32"]).sum(axis=-1).min())
                row |= {"query ms": 1e3 * median(queries[side]), "lowest cosine": lowest} | child.call("stages")
                row |= made[side]
            rows.append(row | {"rounds": pages[side], PEAK: child.submit(memory).result()[PEAK]})
            child.shutdown()
    return {"release": name, "rows": rows}


def check_equal(vectors: Mapping[str, NDArray[np.float32]]) -> None:
    if "transformers" not in vectors:
        return
    difference = float(np.abs(vectors["fp32"] - vectors["transformers"]).max())
    if not difference <= TOLERANCE:
        raise SystemExit(f"the two sides do not compute the same: their vectors differ by {difference:.1e}")


COLUMNS = ("weights", "visual tokens", "page s", "query ms", "lowest cosine", "made in s", "bundle MiB", PEAK)


def show(found: dict[str, Any]) -> None:
    table = Table(*COLUMNS, title=found["release"])
    for row in found["rows"]:
        cells = (row.get(column, "") for column in COLUMNS)
        table.add_row(
            *(
                f"{cell:,.3g}"
                if isinstance(cell, float) and cell < 100
                else f"{cell:,.0f}"
                if isinstance(cell, float)
                else str(cell)
                for cell in cells
            )
        )
    Console(width=140).print(table)


def main(
    threads: Annotated[int, typer.Option()] = 2,
    rounds: Annotated[int, typer.Option()] = 5,
    only: Annotated[list[str] | None, typer.Option(help="Names of releases; repeat for more.")] = None,
    work: Annotated[Path | None, typer.Option(help="Checkpoints and bundles are kept here.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file.")] = None,
) -> None:
    root = work or Path(tempfile.mkdtemp())
    results = []
    for name in only or RELEASES:
        results.append(measure(name, root / name, threads, rounds))
        show(results[-1])
    found = {
        "machine": hardware(threads),
        "int8 peak GOP/s": int8_peak(threads),
        "load": os.getloadavg(),
        "releases": results,
    }
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")
    if work is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    typer.run(main)

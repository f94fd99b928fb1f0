"""Checkpoint in, bundle out.

`export` reads the checkpoint's configuration, traces the graphs without weights, streams the weights into the bundle one
tensor at a time, checks the graphs against torch, embeds a page and a query for the self-test, and only then lets the
directory appear under its name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from cembed import __version__
from cembed.export.backbones import Backbone, load_backbone
from cembed.export.checkpoint import Checkpoint, parameter, resolve
from cembed.export.decoder import Attending, Decoder
from cembed.export.graph import GraphSpec, choose_dialect, empty_module, trace, write_graph
from cembed.export.layers import DTYPES, Decomposed
from cembed.export.parity import Array, check_parity
from cembed.runtime.bundle import (
    MANIFEST,
    Bundle,
    Graph,
    ImageProcessing,
    Manifest,
    Parity,
    PromptAttention,
    SelfTest,
    Side,
    SlotPositions,
    Tensor,
    TokenEmbeddings,
    record_files,
)
from cembed.runtime.embedder import Embedder
from cembed.runtime.errors import CembedError
from cembed.runtime.positions import patch_positions, prompt_positions, slot_positions, window_index, window_restore
from cembed.runtime.preprocess import resized_size
from cembed.runtime.prompts import check_prompt

HEADS = ("causal", "colbert")
SELF_TEST_TEXT = "What is the total of the invoice?"
SELF_TEST_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-4, "fp16": 2e-2}
Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """The flags of `cembed export`; None means the checkpoint's or the backbone's own."""

    backbone: str
    model: str
    revision: str | None = None
    adapter: Path | None = None
    head: str | None = None
    num_vectors: int = 32
    query_vectors: int = 16
    latent_token: str = "<|latent|>"
    slot_positions: SlotPositions | None = None
    prompt_attention: PromptAttention | None = None
    query_prefix: str = ""
    max_visual_tokens: int | None = None
    dtype: str = "fp32"
    target: str = "onnxruntime"
    opset: int = 23

    def __post_init__(self) -> None:
        for what, given, known in (("head", self.head, (None, *HEADS)), ("dtype", self.dtype, tuple(DTYPES))):
            if given not in known:
                raise CembedError(f"unknown {what} {given!r}: cembed has {', '.join(filter(None, known))}")
        if min(self.num_vectors, self.query_vectors) < 1:
            raise CembedError("--num-vectors and --query-vectors must be at least 1")


def export(options: ExportOptions, out: Path, *, force: bool = False, progress: Progress = lambda step: None) -> Manifest:
    """Write the bundle `out` and return its manifest; `progress` is told of each step.

    Raises CembedError: whatever is wrong with the options or the checkpoint, an `out` that exists without `force`, a
    graph that does not equal torch. Nothing is left behind then.
    """
    if out.exists() and not force:
        raise CembedError(f"{out} exists: choose another --out, or replace it with --force")
    dialect = choose_dialect(options.target, options.opset)
    root, commit = resolve(options.model, options.revision)
    plan = Plan.make(options, root)
    with directory(out) as partial:
        graphs, parity = {}, []
        for spec in plan.graphs:
            progress(f"tracing {spec.name}")
            model = trace(spec, dialect, DTYPES[options.dtype], options.opset)
            progress(f"writing the weights of {spec.name}")
            graphs[spec.name] = write_graph(model, spec, partial, plan.loader(spec, stored=True))
            progress(f"checking {spec.name} against torch")
            path = partial / graphs[spec.name].file
            parity.append(check_parity(spec, path, plan.loader(spec, stored=False), plan.cases(spec), options.dtype))
        progress("writing the token embeddings")
        embeddings = write_embeddings(plan, partial)
        shutil.copyfile(plan.tokenizer_path, partial / "tokenizer.json")
        source = {"model": options.model if commit else root.name, **({"revision": commit} if commit else {})}
        manifest = plan.manifest(graphs, tuple(parity), embeddings, source)
        progress("embedding the self-test page")
        return write_self_test(partial, manifest)


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first graph is traced."""

    options: ExportOptions
    backbone: Backbone
    checkpoint: Checkpoint
    tokenizer_path: Path
    head: str
    document: Side
    query: Side
    graphs: tuple[GraphSpec, ...]

    @classmethod
    def make(cls, options: ExportOptions, root: Path) -> Plan:
        backbone = limit_visual_tokens(load_backbone(options.backbone, root), options.max_visual_tokens)
        checkpoint = Checkpoint.open(root, options.adapter)
        head = options.head or ("colbert" if "custom_text_proj.weight" in checkpoint else "causal")
        tokenizer_path = find_tokenizer(root, options.adapter)
        document, query = sides(options, backbone, head, Tokenizer.from_file(str(tokenizer_path)))
        attention = options.prompt_attention or backbone.prompt_attention
        width = checkpoint.load("custom_text_proj.bias").shape[0] if head == "colbert" and "custom_text_proj.bias" in checkpoint else None
        if head == "colbert" and width is None:
            raise CembedError(f"{root} has no custom_text_proj: it is not a ColBERT-style checkpoint, use --head causal")
        specs = (vision_spec(backbone), text_spec(backbone, attending(attention, document), width))
        checkpoint.require(["embed_tokens.weight", *(name for spec in specs for name in parameter_names(spec))])
        return cls(options, backbone, checkpoint, tokenizer_path, head, document, query, specs)

    def loader(self, spec: GraphSpec, *, stored: bool) -> Callable[[str], torch.Tensor]:
        """Loads a parameter of `spec` by name, in the type the bundle stores or in float32."""
        arithmetic = DTYPES[self.options.dtype] if stored else DTYPES["fp32"]
        with torch.device("meta"):
            module = empty_module(spec, Decomposed(), arithmetic)
        return lambda name: parameter(module, self.checkpoint, spec.prefix, name)

    def cases(self, spec: GraphSpec) -> list[dict[str, Array]]:
        rng = np.random.default_rng(0)
        if spec.name == "vision":
            sizes = [(112, 140), (60, 400), (28, 28)]
            return [vision_case(self.backbone.image, spec, size, rng) for size in sizes]
        return [text_case(self, spec, length, rng) for length in (5, 40)]

    def manifest(
        self, graphs: dict[str, Graph], parity: tuple[Parity, ...], embeddings: TokenEmbeddings, source: dict[str, str]
    ) -> Manifest:
        options, backbone = self.options, self.backbone
        text = graphs["text"].outputs[0]
        return Manifest(
            backbone=backbone.name,
            head=self.head,
            target=options.target,
            opset=options.opset,
            dtype=options.dtype,
            hidden_size=backbone.decoder.hidden_size,
            dim=int(text.shape[-1]),
            max_sequence_length=backbone.decoder.max_positions,
            image_token_id=backbone.image_token_id,
            prompt_attention=options.prompt_attention or backbone.prompt_attention,
            document=self.document,
            query=self.query,
            image=backbone.image,
            positions=backbone.positions,
            graphs=graphs,
            token_embeddings=embeddings,
            tokenizer="tokenizer.json",
            self_test=SelfTest("self_test.png", SELF_TEST_TEXT, "self_test.safetensors", SELF_TEST_TOLERANCE[options.dtype]),
            parity=parity,
            source=source,
            made_with={"cembed": __version__, **{name: version(name) for name in ("torch", "transformers", "onnxruntime")}},
        )


def limit_visual_tokens(backbone: Backbone, tokens: int | None) -> Backbone:
    if tokens is None:
        return backbone
    image = backbone.image
    if image.resize == "fixed":
        raise CembedError(f"--max-visual-tokens: {backbone.name} pages always take {image.max_visual_tokens} visual tokens")
    smallest = -(-image.min_pixels // image.factor**2)
    if tokens < smallest:
        raise CembedError(f"--max-visual-tokens {tokens} is too small: the smallest image takes {smallest}")
    return replace(backbone, image=replace(image, max_pixels=tokens * image.factor**2))


def find_tokenizer(root: Path, adapter: Path | None) -> Path:
    """The adapter's tokenizer goes before the base's: training may have added tokens."""
    places = [place / "tokenizer.json" for place in (adapter, root) if place is not None]
    for path in places:
        if path.exists():
            return path
    raise CembedError(f"{places[-1]} is missing: save the checkpoint with a fast tokenizer")


def sides(options: ExportOptions, backbone: Backbone, head: str, tokenizer: Tokenizer) -> tuple[Side, Side]:
    """The document's and the query's side of the manifest."""
    prompts = (
        check_prompt(backbone.prompts[0], "{image}"),
        check_prompt(backbone.prompts[1].replace("{text}", options.query_prefix + "{text}"), "{text}"),
    )
    policy = options.slot_positions or backbone.slot_positions
    if head == "colbert":
        document, query = (Side(prompt, "all_tokens", None, None, policy) for prompt in prompts)
        return document, query
    latent = tokenizer.token_to_id(options.latent_token)
    if latent is None:
        raise CembedError(
            f"the tokenizer has no token {options.latent_token!r}: name the one fed to latent slots with --latent-token"
        )
    budgets = (options.num_vectors, options.query_vectors)
    document, query = (Side(p, "constant", k, latent, policy) for p, k in zip(prompts, budgets, strict=True))
    return document, query


def attending(prompt_attention: PromptAttention, document: Side) -> Attending:
    if prompt_attention == "causal":
        return "causal"
    return "bidirectional" if document.slots == "all_tokens" else "bidirectional-prompt"


def vision_spec(backbone: Backbone) -> GraphSpec:
    output = Tensor("image_features", "float32", ("batch_size", "num_visual_tokens", backbone.decoder.hidden_size))
    return GraphSpec("vision", backbone.build_vision, backbone.vision_prefix, backbone.vision_inputs, output)


def text_spec(backbone: Backbone, attends: Attending, head_dim: int | None) -> GraphSpec:
    config = backbone.decoder
    axes = ("batch_size", "sequence_length")
    inputs = [
        Tensor("inputs_embeds", "float32", (*axes, config.hidden_size)),
        Tensor("position_ids", "int64", (config.position_axes, *axes)),
        Tensor("slot_indices", "int64", ("batch_size", "num_vectors")),
    ]
    if attends == "bidirectional-prompt":
        inputs.append(Tensor("prompt_length", "int64", (1,)))
    output = Tensor("slot_states", "float32", ("batch_size", "num_vectors", head_dim or config.hidden_size))
    return GraphSpec("text", lambda dialect: Decoder(config, attends, dialect, head_dim), "", tuple(inputs), output)


def parameter_names(spec: GraphSpec) -> list[str]:
    with torch.device("meta"):
        return [spec.prefix + name for name, _ in spec.build(Decomposed()).named_parameters()]


def vision_case(image: ImageProcessing, spec: GraphSpec, size: tuple[int, int], rng: np.random.Generator) -> dict[str, Array]:
    """Random inputs of the vision graph, for an image of about `size` (height, width) pixels."""
    small = replace(image, min_pixels=1, max_pixels=min(image.max_pixels, 112 * 140))
    height, width = resized_size(*size, image if image.resize == "fixed" else small)
    grid = (height // image.patch_size, width // image.patch_size)
    num_patches = grid[0] * grid[1]
    windows = window_index(grid, image) if image.window_size else np.empty((0, 0), np.int64)
    values = {
        "pixel_values": rng.standard_normal((1, num_patches, 3 * image.patch_size**2), np.float32),
        "patch_positions": patch_positions(grid, image.merge_size),
        "window_index": windows,
        "window_restore": window_restore(windows, num_patches) if image.window_size else windows,
    }
    return {tensor.name: values[tensor.name] for tensor in spec.inputs}


def text_case(plan: Plan, spec: GraphSpec, length: int, rng: np.random.Generator) -> dict[str, Array]:
    """Random inputs of the text graph: a prompt of `length` positions and, for latent slots, four slots."""
    config, side = plan.backbone.decoder, plan.query
    num_slots = 0 if side.slots == "all_tokens" else 4
    prompt = prompt_positions(np.zeros(length, bool), None, plan.backbone.positions, 1)
    positions = np.concatenate([prompt, slot_positions(prompt, num_slots, side.slot_positions)], axis=1)
    first = length - 1 if num_slots else 0
    values = {
        "inputs_embeds": rng.standard_normal((1, length + num_slots, config.hidden_size), np.float32),
        "position_ids": positions[:, None],
        "slot_indices": np.arange(first, length + num_slots)[None],
        "prompt_length": np.array([length]),
    }
    return {tensor.name: values[tensor.name] for tensor in spec.inputs}


def write_embeddings(plan: Plan, root: Path) -> TokenEmbeddings:
    """The table in float32 (fp16 bundles: float16), scaled as the backbone scales it, a slice at a time."""
    table = plan.checkpoint.embeddings()
    hidden = plan.backbone.decoder.hidden_size
    needed = max(plan.backbone.image_token_id, plan.document.latent_token_id or 0, plan.query.latent_token_id or 0)
    if table.dim() != 2 or table.shape[1] != hidden or table.shape[0] <= needed:
        raise CembedError(f"embed_tokens.weight has shape {tuple(table.shape)}: [more than {needed}, {hidden}] is wanted")
    dtype = torch.float16 if plan.options.dtype == "fp16" else torch.float32
    with (root / "token_embeddings.bin").open("wb") as file:
        for rows in table.split(8192):
            scaled = (rows.float() * plan.backbone.embedding_scale).to(dtype)
            file.write(memoryview(scaled.contiguous().numpy()).cast("B"))
    return TokenEmbeddings("token_embeddings.bin", "float16" if dtype == torch.float16 else "float32", table.shape[0])


def self_test_page() -> Image.Image:
    """A small page with lines of text, drawn alike everywhere."""
    page = Image.new("RGB", (280, 364), "white")
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, 279, 40), fill=(20, 60, 120))
    for row in range(9):
        draw.text((16, 60 + 30 * row), f"Position {row + 1}: {(row * 37) % 91}.50 EUR", fill=(0, 0, 40 * (row % 3)))
    return page


def write_self_test(root: Path, manifest: Manifest) -> Manifest:
    """Embeds the self-test page and query with the bundle as it is, stores the vectors, and completes the manifest."""
    self_test_page().save(root / manifest.self_test.image)
    (root / MANIFEST).write_text(replace(manifest, files=record_files(root)).to_json(), encoding="utf-8")
    embedder = Embedder(Bundle(root, verify=False), ["CPUExecutionProvider"], None, None)
    with Image.open(root / manifest.self_test.image) as page:
        vectors = {"document": embedder.embed_image(page), "query": embedder.embed_query(manifest.self_test.text)}
    save_file(vectors, root / manifest.self_test.vectors)
    complete = replace(manifest, files=record_files(root))
    (root / MANIFEST).write_text(complete.to_json(), encoding="utf-8")
    return complete


@contextlib.contextmanager
def directory(out: Path) -> Iterator[Path]:
    """A temporary directory that becomes `out` when the block ends well, replacing what is there, and vanishes if not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)
        sync(partial)
        if out.exists():
            retired = partial.with_name(partial.name + ".old")
            out.rename(retired)
            partial.rename(out)
            shutil.rmtree(retired) if retired.is_dir() else retired.unlink()
        else:
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(root: Path) -> None:
    """Waits until the files of a directory, and the directory, are on disk."""
    for path in [*root.iterdir(), root]:
        handle: Any = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

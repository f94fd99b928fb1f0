"""What will be exported: the options, and everything decided from them and the checkpoint before the first graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer

from cembed import __version__
from cembed.export import choices
from cembed.export.backbones import Backbone, load_backbone
from cembed.export.checkpoint import Checkpoint, parameter
from cembed.export.decoder import Attending, Decoder
from cembed.export.graph import GraphSpec, empty_module
from cembed.export.layers import DTYPES, Decomposed
from cembed.runtime.errors import CembedError
from cembed.runtime.manifest import (
    Graph,
    Manifest,
    Parity,
    PromptAttention,
    SelfTest,
    Side,
    SlotPositions,
    Tensor,
    TokenEmbeddings,
)
from cembed.runtime.prompts import check_prompt, load_tokenizer

SELF_TEST_TEXT = "What is the total of the invoice?"
SELF_TEST_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-4, "fp16": 2e-2}


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
        for what, given, known in (
            ("backbone", self.backbone, choices.BACKBONES),
            ("target", self.target, choices.TARGETS),
            ("head", self.head, choices.HEADS),
            ("dtype", self.dtype, choices.DTYPES),
            ("slot positions", self.slot_positions, choices.SLOT_POSITIONS),
            ("prompt attention", self.prompt_attention, choices.PROMPT_ATTENTION),
        ):
            if given is not None:
                choices.require_choice(what, given, known)
        if min(self.num_vectors, self.query_vectors) < 1:
            raise CembedError("--num-vectors and --query-vectors must be at least 1")


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
        checkpoint = Checkpoint.open(root, options.adapter)
        backbone = limit_visual_tokens(load_backbone(options.backbone, root), options.max_visual_tokens)
        head = options.head or ("colbert" if "custom_text_proj.weight" in checkpoint else "causal")
        tokenizer_path = find_tokenizer(root, options.adapter)
        document, query = sides(options, backbone, head, load_tokenizer(tokenizer_path))
        attention = options.prompt_attention or backbone.prompt_attention
        width = projection_width(checkpoint) if head == "colbert" else None
        specs = (vision_spec(backbone), text_spec(backbone, attending(attention, document), width))
        checkpoint.require([checkpoint.embeddings_name, *(name for spec in specs for name in parameter_names(spec))])
        return cls(options, backbone, checkpoint, tokenizer_path, head, document, query, specs)

    def loader(self, spec: GraphSpec, *, stored: bool) -> Callable[[str], torch.Tensor]:
        """Loads a parameter of `spec` by name, in the type the bundle stores or in float32."""
        arithmetic = DTYPES[self.options.dtype] if stored else DTYPES["fp32"]
        with torch.device("meta"):
            module = empty_module(spec, Decomposed(), arithmetic)
        return lambda name: parameter(module, self.checkpoint, spec.prefix, name)

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
            self_test=SelfTest(
                "self_test.png", SELF_TEST_TEXT, "self_test.safetensors", SELF_TEST_TOLERANCE[options.dtype]
            ),
            parity=parity,
            source=source,
            made_with={
                "cembed": __version__,
                **{name: version(name) for name in ("torch", "transformers", "onnxruntime")},
            },
        )


def limit_visual_tokens(backbone: Backbone, tokens: int | None) -> Backbone:
    if tokens is None:
        return backbone
    image = backbone.image
    if image.resize == "fixed":
        raise CembedError(
            f"--max-visual-tokens: {backbone.name} pages always take {image.max_visual_tokens} visual tokens"
        )
    smallest = -(-image.min_pixels // image.factor**2)
    if tokens < smallest:
        raise CembedError(f"--max-visual-tokens {tokens} is too small: the smallest image takes {smallest}")
    return replace(backbone, image=replace(image, max_pixels=tokens * image.factor**2))


def projection_width(checkpoint: Checkpoint) -> int:
    if "custom_text_proj.bias" not in checkpoint:
        raise CembedError(f"{checkpoint.root} has no custom_text_proj: it is no ColBERT-style one, use --head causal")
    return checkpoint.load("custom_text_proj.bias").shape[0]


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

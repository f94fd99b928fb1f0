"""What will be exported: the options, and everything decided from them and the checkpoint before the first graph."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer

from cembed import __version__
from cembed.export import choices
from cembed.export.backbones import Backbone, load_backbone
from cembed.export.checkpoint import Checkpoint, check_shape, parameter
from cembed.export.decoder import DecoderConfig
from cembed.export.encoder import EncoderConfig
from cembed.export.graph import GraphSpec, empty_module
from cembed.export.head_weights import BIAS, WEIGHT, Rows, SlotTables, named_head, projection_width, slot_tables
from cembed.export.heads import Head, HeadSide, read_head, with_budgets, with_pooling
from cembed.export.layers import DTYPES, Decomposed
from cembed.export.pipelines import MODULES, Pipeline, transformer_folder
from cembed.export.specs import graph_specs
from cembed.export.tokens import check_prompts, prompts_of, read_tokenizer
from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.manifest import (
    EmbeddingTable,
    Graph,
    Manifest,
    Parity,
    Pooling,
    PromptAttention,
    SelfTest,
    Side,
    SlotPositions,
)
from cembed.runtime.bundle.prompts import QUERY_POSITIONS, Prompter, check_prompt, longest_page
from cembed.runtime.errors import CembedError

MADE_WITH = ("torch", "transformers", "onnxruntime")
SELF_TEST_TEXT = "What is the total of the invoice?"
SELF_TEST_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-4, "fp16": 2e-2}


@dataclass(frozen=True)
class ExportOptions:
    """The flags of `cembed export`; None means the checkpoint's, the head's or the backbone's own.

    `model`, `adapter` and `base` are folders or hub ids; see `sources.find_source`.
    """

    backbone: str | None = None
    model: str | None = None
    revision: str | None = None
    adapter: str | Path | None = None
    base: str | None = None
    head: str | None = None
    head_spec: Path | None = None
    head_weights: Path | None = None
    num_vectors: int | None = None
    query_vectors: int | None = None
    pooling: Pooling | None = None
    latent_token: str = "<|latent|>"
    slot_positions: SlotPositions | None = None
    prompt_attention: PromptAttention | None = None
    query_prefix: str = ""
    max_visual_tokens: int | None = None
    skip_blank: bool = False
    num_layers: int | None = None
    dtype: str = "fp32"
    target: str = "onnxruntime"
    opset: int = 24

    def __post_init__(self) -> None:
        for what, given, known in (
            ("backbone", self.backbone, choices.BACKBONES),
            ("target", self.target, choices.TARGETS),
            ("head", self.head, choices.HEADS),
            ("pooling", self.pooling, choices.POOLING),
            ("dtype", self.dtype, choices.DTYPES),
            ("slot positions", self.slot_positions, choices.SLOT_POSITIONS),
            ("prompt attention", self.prompt_attention, choices.PROMPT_ATTENTION),
        ):
            if given is not None:
                choices.require_choice(what, given, known)
        if self.head and self.head_spec:
            raise CembedError("--head and --head-spec both say what the head is: give one of them")
        if any(budget is not None and budget < 1 for budget in (self.num_vectors, self.query_vectors)):
            raise CembedError("--num-vectors and --query-vectors must be at least 1")


def image_of(backbone: Backbone, options: ExportOptions) -> ImageProcessing:
    """Raises CembedError: a limit that no page keeps."""
    return replace(backbone.image.limited(options.max_visual_tokens), skip_blank=options.skip_blank)


@dataclass(frozen=True)
class ExportPlan:
    """Everything decided before the first graph is traced."""

    options: ExportOptions
    backbone: Backbone
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    head: str
    document: Side
    query: Side
    slot_tables: tuple[str, ...]
    graphs: tuple[GraphSpec, ...]

    @classmethod
    def make(cls, options: ExportOptions, root: Path) -> ExportPlan:
        adapter = None if options.adapter is None else Path(options.adapter)
        pipeline = find_pipeline(options, adapter or root)
        options = with_pipeline(options, pipeline)
        root, adapter = transformer_folder(root), adapter and transformer_folder(adapter)
        checkpoint = open_checkpoint(root, adapter, options, pipeline)
        backbone = load_backbone(options.backbone, root, adapter, pipeline.images if pipeline else {})
        check_projection(checkpoint, backbone.dim)
        backbone = replace(backbone, image=image_of(backbone, options))
        backbone = limit_layers(backbone, options.num_layers, checkpoint)
        name, head = choose_head(options, checkpoint)
        tokenizer = read_tokenizer([place for place in (adapter, root) if place is not None])
        if pipeline:
            backbone = pipeline.dress(backbone, tokenizer)
        elif name == "single" and backbone.single_prompts:
            backbone = replace(backbone, prompts=backbone.single_prompts, tokenizer_adds=True)
        backbone = replace(backbone, prompts=prompts_of(backbone, tokenizer, root))
        hidden = backbone.decoder.hidden_size
        tables = slot_tables(checkpoint, head, None if options.head_spec else name, hidden)
        document, query = sides(options, backbone, head, tables, tokenizer)
        check_prompts(tokenizer, backbone.image_token_id, (document, query), backbone.decoder.max_positions)
        capacity = cache_capacity(options, backbone, tokenizer, (document, query))
        specs = graph_specs(
            backbone,
            options.prompt_attention,
            options.dtype,
            (document, query),
            projection_width(checkpoint, hidden),
            capacity,
        )
        check_weights(checkpoint, specs, tables.names)
        check_embeddings(checkpoint, hidden, max(backbone.image_token_id, tokenizer.get_vocab_size() - 1))
        return cls(
            options=options,
            backbone=backbone,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            head=name,
            document=document,
            query=query,
            slot_tables=tables.names,
            graphs=specs,
        )

    def loader(self, spec: GraphSpec, *, stored: bool) -> Callable[[str], torch.Tensor]:
        """Loads a parameter of `spec` by name, in the type the bundle stores or in float32."""
        arithmetic = DTYPES[self.options.dtype] if stored else DTYPES["fp32"]
        with torch.device("meta"):
            module = empty_module(spec, Decomposed(), arithmetic)
        return lambda name: parameter(module, self.checkpoint, spec.prefix, name, finite=stored)

    def manifest(
        self,
        graphs: dict[str, Graph],
        parity: tuple[Parity, ...],
        tables: tuple[EmbeddingTable, EmbeddingTable | None],
        source: dict[str, str],
    ) -> Manifest:
        options, backbone = self.options, self.backbone
        states = next(graph for name, graph in graphs.items() if name != "vision").outputs[0]
        tolerance = SELF_TEST_TOLERANCE[options.dtype]
        return Manifest(
            backbone=backbone.name,
            head=self.head,
            target=options.target,
            opset=options.opset,
            dtype=options.dtype,
            hidden_size=backbone.decoder.hidden_size,
            dim=int(states.shape[-1]),
            max_sequence_length=backbone.decoder.max_positions,
            image_token_id=backbone.image_token_id,
            prompt_attention=options.prompt_attention or backbone.prompt_attention,
            document=self.document,
            query=self.query,
            image=backbone.image,
            positions=backbone.positions,
            graphs=graphs,
            token_embeddings=tables[0],
            slot_embeddings=tables[1],
            tokenizer="tokenizer.json",
            self_test=SelfTest("self_test.png", SELF_TEST_TEXT, "self_test.safetensors", tolerance),
            parity=parity,
            source=source,
            made_with={"cembed": __version__, **{name: version(name) for name in MADE_WITH}},
        )


def find_pipeline(options: ExportOptions, root: Path) -> Pipeline | None:
    """A directory of sentence-transformers; with a head that is asked for it is a checkpoint like others."""
    if not (options.head or options.head_spec):
        return Pipeline.read(root)
    if (root / MODULES).exists():
        warnings.warn(f"{root / MODULES} is not read, as the head is given", RuntimeWarning, stacklevel=2)
    return None


def with_pipeline(options: ExportOptions, pipeline: Pipeline | None) -> ExportOptions:
    if pipeline is None:
        return options
    return replace(options, head=pipeline.head, pooling=options.pooling or pipeline.pooling)


def open_checkpoint(root: Path, adapter: Path | None, options: ExportOptions, pipeline: Pipeline | None) -> Checkpoint:
    """The checkpoint with the weights beside it; a projection without a bias gets one of zeros.

    sentence-transformers reads no projection with the transformer, but for that of a retrieval class.
    """
    unread = (WEIGHT, BIAS) if pipeline and not pipeline.wraps else ()
    beside = (*(pipeline.files if pipeline else ()), *([options.head_weights] if options.head_weights else ()))
    checkpoint = Checkpoint.open(root, adapter, beside, unread)
    if pipeline and not pipeline.bias and WEIGHT in checkpoint and BIAS not in checkpoint:
        checkpoint.zeros[BIAS] = checkpoint.shape(WEIGHT)[:1]
    return checkpoint


def choose_head(options: ExportOptions, checkpoint: Checkpoint) -> tuple[str, Head]:
    """The head's name and what it is: the one asked for, or what the checkpoint's weights say."""
    if options.head_spec:
        name, head = options.head_spec.stem, read_head(options.head_spec)
    else:
        name, head = named_head(options.head, checkpoint)
    return name, with_pooling(with_budgets(head, options.num_vectors, options.query_vectors), options.pooling)


def limit_layers(backbone: Backbone, num_layers: int | None, checkpoint: Checkpoint) -> Backbone:
    """The backbone with its first layers only (2D Matryoshka, arXiv 2402.14776); the others' weights are not missed."""
    if num_layers is None:
        return backbone
    most = backbone.decoder.num_layers
    if not 1 <= num_layers <= most:
        raise CembedError(f"--num-layers {num_layers}: the decoder has 1 to {most}")
    if isinstance(backbone.decoder, DecoderConfig) and backbone.decoder.delta_layers >= set(range(num_layers)):
        raise CembedError(f"--num-layers {num_layers}: none of these layers attends, and the loop needs one that does")
    checkpoint.drop(re.compile(rf"^layers\.({'|'.join(map(str, range(num_layers, most))) or 'none'})\."))
    decoder: DecoderConfig | EncoderConfig = replace(backbone.decoder, num_layers=num_layers)
    return replace(backbone, decoder=decoder)


def check_weights(checkpoint: Checkpoint, specs: Sequence[GraphSpec], tables: Iterable[str]) -> None:
    """Raises CembedError that names what is missing, left over, or of another shape than the graphs want."""
    with torch.device("meta"):
        modules = [(spec.prefix, spec.build(Decomposed())) for spec in specs]
    wanted = [(prefix, module, name) for prefix, module in modules for name, _ in module.named_parameters()]
    checkpoint.require([checkpoint.embeddings_name, *tables, *(prefix + name for prefix, _, name in wanted)])
    for prefix, module, name in wanted:
        check_shape(module, checkpoint, prefix, name)


def check_projection(checkpoint: Checkpoint, dim: int | None) -> None:
    """Raises CembedError if the projection has not the width that the configuration says, where it says one."""
    shape = checkpoint.shape(WEIGHT) if WEIGHT in checkpoint else None
    if dim is not None and (shape is None or shape[:1] != (dim,)):
        found = "is missing" if shape is None else f"has shape {shape}"
        raise CembedError(f"{WEIGHT} {found}: config.json has embedding_dim {dim}, so [{dim}, hidden] is needed")


def check_embeddings(checkpoint: Checkpoint, hidden: int, last_token: int) -> None:
    name = checkpoint.embeddings_name
    shape = checkpoint.shape(name)
    if len(shape) != 2 or shape[1] != hidden or shape[0] <= last_token:
        raise CembedError(f"{name} has shape {shape}: [more than {last_token}, {hidden}] is needed")


def sides(
    options: ExportOptions, backbone: Backbone, head: Head, tables: SlotTables, tokenizer: Tokenizer
) -> tuple[Side, Side]:
    """The document's and the query's side of the manifest."""
    latent = tokenizer.token_to_id(options.latent_token)
    if latent is None and "constant" in (head.document.slots, head.query.slots):
        raise CembedError(
            f"the tokenizer has no token {options.latent_token!r}: name the one fed to latent slots with --latent-token"
        )
    query_prompt = either(head.query.prompt, backbone.prompts[1])
    prompts = (
        check_prompt(either(head.document.prompt, backbone.prompts[0]), "{image}"),
        check_prompt(query_prompt.replace("{text}", options.query_prefix + "{text}"), "{text}"),
    )
    made: list[Side] = []
    for side, prompt, rows in zip((head.document, head.query), prompts, (tables.document, tables.query), strict=True):
        policy = options.slot_positions or side.slot_positions or backbone.slot_positions
        made.append(make_side(side, prompt, policy, latent, rows))
    return made[0], made[1]


def either(given: str | None, default: str) -> str:
    return default if given is None else given


def make_side(side: HeadSide, prompt: str, policy: SlotPositions, latent: int | None, rows: Rows | None) -> Side:
    num_vectors = side.num_vectors
    if rows is not None and num_vectors is None:
        num_vectors = rows.count - rows.unread + (side.first_vector == "prompt_end")
    return Side(
        prompt=prompt,
        slots=side.slots,
        num_vectors=num_vectors,
        slot_positions=policy,
        first_vector=side.first_vector,
        latent_token_id=latent if side.slots == "constant" else None,
        slot_rows=(rows.first, rows.count) if rows else None,
        unread_slots=rows.unread if rows else 0,
        nested_budgets=tuple(n for n in side.nested_budgets if num_vectors is None or n <= num_vectors),
        pooling=side.pooling,
    )


def cache_capacity(
    options: ExportOptions, backbone: Backbone, tokenizer: Tokenizer, both: tuple[Side, Side]
) -> int | str:
    """Positions of a cache. TensorRT wants a number: the longest page or query, and slots after it."""
    if options.target != "tensorrt":
        return "capacity"
    prompter = Prompter(tokenizer, backbone.image_token_id)
    page = longest_page(prompter, both[0].prompt, backbone.image)
    most = max(length + side.room for length, side in zip((page, QUERY_POSITIONS), both, strict=True))
    return min(-(-most // 64) * 64, backbone.decoder.max_positions)

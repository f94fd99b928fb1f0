"""What `manifest.json` says, as frozen dataclasses: each field with its kind and its range.

This is the one table of what is allowed; `runtime/native/lib/manifest_schema.h` is written from it. What fields must
have to do with each other is in `contract.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Annotated, Literal

from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.schema import Range, Text, decode, parse
from cembed.runtime.errors import CembedError

MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
SIGNATURES = "manifest.sig"
SCHEMA_VERSION = 2
OLDEST_SCHEMA = 1  # it has no digest of the manifest
MAX_MANIFEST = 1 << 24  # bytes; it is some kilobytes, with hundreds of quantised layers some hundreds
MAX_PICTURE = 1 << 26  # bytes of the page of the self-test
MAX_TOKENIZER = 1 << 26  # bytes; that of Gemma 3 has 33 million
MAX_VECTOR = (1 << 31) - 1  # components, of states that are put side by side too
MAX_DEEPSTACK = 64  # layers of a decoder that take features of images; Qwen3-VL has 3
LEAST_ROOM = 64  # vectors that a cache has room for at least, unless the caller says how many

SideName = Literal["document", "query"]
FileName = Annotated[
    str, Text("file", "a plain file name", r"(?!(\.{1,2}|manifest\.(json|sha256|sig))\Z)[ -.0-\[\]-~]{1,255}")
]
Words = Annotated[str, Text("words", "a text of at most 4,096 characters", r"(?s:.){0,4096}")]
Sha256 = Annotated[str, Text("sha256", "64 hexadecimal digits", "[0-9a-f]{64}")]

Width = Annotated[int, Range(1, 1 << 20)]
Rows = Annotated[int, Range(1, 1 << 28)]
RowNumber = Annotated[int, Range(0, 1 << 28)]
Length = Annotated[int, Range(1, 1 << 24)]
Opset = Annotated[int, Range(18, 64)]
Position = Annotated[int, Range(0, 1 << 16)]
Axis = Annotated[int, Range(1, 1 << 28)]
Bytes = Annotated[int, Range(0, 1 << 50)]
Count = Annotated[int, Range(0, 1 << 40)]
Tolerance = Annotated[float, Range(0.0, 0.1)]
Cosine = Annotated[float, Range(-1.001, 1.001)]  # of float32 rows
Share = Annotated[float, Range(0.0, 1.001)]
Deviation = Annotated[float, Range(-1e6, 1e6)]
Milliseconds = Annotated[float, Range(0.0, 1e12)]
SchemaVersion = Annotated[int, Range(OLDEST_SCHEMA, SCHEMA_VERSION)]

SlotKind = Literal["constant", "learned", "feedback", "all_tokens"]
FirstVector = Literal["prompt_end", "slot"]
Pooling = Literal["none", "mean", "last", "concat"]
SlotPositions = Literal["zero", "continue"]
PromptAttention = Literal["causal", "bidirectional"]


@dataclass(frozen=True)
class Side:
    """How one side, document or query, becomes vectors.

    `prompt` is the text around the input: `{image}` or `{text}` stands for the input itself.

    `slots` says what is fed into the latent slots after it: `constant`, the embedding of `latent_token_id`; `learned`,
    rows of the slot table, from `slot_rows[0]` on and `slot_rows[1]` of them; `feedback`, the hidden state of the
    position before; `all_tokens`: there are none, and every position gives a vector.

    `num_vectors` is the budget K unless a caller chooses another: the state of the prompt's last position and of K - 1
    slots if `first_vector` is `prompt_end`, of K slots if it is `slot`, after `unread_slots` that give none.
    `nested_budgets` are those it was trained for. `pooling` makes one vector of the K states: their mean, the last one,
    or all of them side by side.
    """

    prompt: str
    slots: SlotKind
    num_vectors: Length | None
    slot_positions: SlotPositions
    first_vector: FirstVector = "prompt_end"
    latent_token_id: RowNumber | None = None
    slot_rows: tuple[RowNumber, RowNumber] | None = None
    unread_slots: RowNumber = 0
    nested_budgets: tuple[Length, ...] = ()
    pooling: Pooling = "none"

    def __post_init__(self) -> None:
        """Raises CembedError: fields that contradict each other."""
        tokens, given = self.slots == "all_tokens", f"a side with slots '{self.slots}'"
        learned, concat = self.slots == "learned", tokens and self.pooling == "concat"
        unnamed = self.slots == "constant" and self.latent_token_id is None
        unread = self.unread_slots > 0 and (not learned or self.first_vector == "prompt_end")
        early = self.slots == "feedback" and self.first_vector == "slot"
        wrong = {
            f"{given} cannot have num_vectors {self.num_vectors}": tokens != (self.num_vectors is None),
            "pooling concat needs latent slots: side by side, all tokens are as long as the page": concat,
            "a side with constant slots needs a latent_token_id": unnamed,
            f"{given} cannot have slot_rows {self.slot_rows}": learned != (self.slot_rows is not None),
            "a side with feedback slots starts with the prompt's end, which is fed into the first slot": early,
            "unread_slots stand before learned slots, the first of which gives the first vector": unread,
        }
        if why := next((why for why, is_so in wrong.items() if is_so), None):
            raise CembedError(why)
        self._check_budgets()

    def _check_budgets(self) -> None:
        if self.num_vectors is not None:
            self.check_budget(self.num_vectors)
        budgets = (0, *self.nested_budgets, *(() if self.num_vectors is None else (self.num_vectors + 1,)))
        if any(budget >= following for budget, following in pairwise(budgets)):
            raise CembedError(f"nested_budgets {list(self.nested_budgets)} do not rise from 1 to {self.num_vectors}")

    @property
    def max_vectors(self) -> int | None:
        """The largest budget; None where only the length of the model's context limits it."""
        return None if self.slot_rows is None else self.slot_rows[1] - self.num_slots(0)

    @property
    def room(self) -> int:
        """Vectors that a cache has room for unless the caller says how many."""
        return self.max_vectors or max(LEAST_ROOM, 2 * (self.num_vectors or 0))

    def num_slots(self, num_vectors: int) -> int:
        return num_vectors - (self.first_vector == "prompt_end") + self.unread_slots

    def check_budget(self, num_vectors: int) -> None:
        """Raises CembedError if there can be no such number of vectors."""
        if num_vectors < 1:
            raise CembedError(f"num_vectors is {num_vectors}: it is at least 1")
        if self.max_vectors is not None and num_vectors > self.max_vectors:
            raise CembedError(f"num_vectors is {num_vectors}: this bundle makes 1 to {self.max_vectors}")

    def vector_dim(self, dim: int, num_vectors: int | None = None) -> int:
        """Length of a vector at a budget, by default the full one, for states of length `dim`."""
        return dim * (num_vectors or self.num_vectors or 1) if self.pooling == "concat" else dim


@dataclass(frozen=True)
class Positions:
    """Rotary positions: `axes` is 3 for M-RoPE (time, height, width) and 1 otherwise; prompts start at `first`."""

    axes: Literal[1, 3]
    first: Position


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str
    shape: tuple[Axis | str, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX file, the data files it refers to, and its inputs and outputs."""

    file: FileName
    data: tuple[FileName, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class EmbeddingTable:
    """Rows of hidden_size values, row-major; int8 rows are multiplied with the float32 in the file `scales`."""

    file: FileName
    dtype: Literal["float32", "float16", "int8"]
    rows: Rows
    scales: FileName | None = None


@dataclass(frozen=True)
class SelfTest:
    """What `cembed verify` embeds again: the files' vectors are float32 [num_vectors, dim]."""

    image: FileName
    text: Words
    vectors: FileName
    tolerance: Tolerance


@dataclass(frozen=True)
class FileRecord:
    size: Bytes
    sha256: Sha256


@dataclass(frozen=True)
class Parity:
    """A graph against the torch modules it was traced from.

    `max_error` is the largest difference as a share of the largest value, `min_cosine` the lowest cosine of a row.
    """

    graph: str
    max_error: Share
    min_cosine: Cosine
    tolerance: Share


@dataclass(frozen=True)
class Comparison:
    """A quantised bundle against the one it was made from, on the pages and queries of a calibration set.

    Cosines are those of a vector in both; `top5_overlap` is the share of the five best pages that both name;
    `score_error` the mean difference of MaxSim as a share of the mean score. nDCG only where there are judgements.
    """

    pages: Count
    queries: Count
    min_cosine: Cosine
    p1_cosine: Cosine
    median_cosine: Cosine
    score_error: Deviation
    top5_overlap: Share
    ms_per_page: tuple[Milliseconds, Milliseconds]
    bytes: tuple[Bytes, Bytes]
    ndcg5: tuple[Share, Share] | None = None


@dataclass(frozen=True)
class LayerDamage:
    """What quantising one layer alone does: the lowest cosine of a vector, and the mean error of MaxSim as a share."""

    layer: str
    weights: tuple[str, ...]
    min_cosine: Cosine
    score_error: Deviation


@dataclass(frozen=True)
class Quantisation:
    """How a bundle was quantised, from the bundle with the hash `source`, and the loss that was measured.

    `schemes` has every weight that was, `kept` those in float; `sensitivity` the layers by falling damage, if asked.
    `rows`: in the graphs that compute whole pages, int8 weights meet activations in int8, each row in a range of its
    own.
    """

    weights: str
    embeddings: str
    rounding: str
    source: str
    schemes: Mapping[str, str]
    kept: tuple[str, ...]
    comparison: Comparison
    sensitivity: tuple[LayerDamage, ...] = ()
    rows: bool = False

    def schemes_of(self, graph: str) -> set[str]:
        """Of the weights of a graph, which are named after the part of the model that it is of."""
        return {scheme for name, scheme in self.schemes.items() if name.startswith(f"{part_of(graph)}/")}

    def by_row(self, graph: str) -> bool:
        """Whether a graph has products by row."""
        return self.rows and "int8" in self.schemes_of(graph)


def part_of(graph: str) -> str:
    """`text` for `text_step` too: they have the same weights."""
    return graph.split("_")[0]


def reads_parts(image: ImageProcessing, inputs: Iterable[Tensor]) -> bool:
    """Whether a vision graph with these inputs takes a part of a page: it is told the places of patches, or each tile
    is alone."""
    names = {tensor.name for tensor in inputs}
    return names == {"pixel_values"} if image.tiles else "patch_positions" in names


@dataclass(frozen=True)
class Manifest:
    backbone: str
    head: str
    target: str
    opset: Opset
    dtype: str
    hidden_size: Width
    dim: Width
    max_sequence_length: Length
    image_token_id: RowNumber
    prompt_attention: PromptAttention
    document: Side
    query: Side
    image: ImageProcessing
    positions: Positions
    graphs: Mapping[str, Graph]
    token_embeddings: EmbeddingTable
    tokenizer: FileName
    self_test: SelfTest
    parity: tuple[Parity, ...]
    source: Mapping[str, str]
    made_with: Mapping[str, str]
    slot_embeddings: EmbeddingTable | None = None
    quantisation: Quantisation | None = None
    files: Mapping[FileName, FileRecord] = field(default_factory=dict)
    upgraded_from: Sha256 | None = None
    schema_version: SchemaVersion = SCHEMA_VERSION

    @property
    def reads_parts(self) -> bool:
        return reads_parts(self.image, self.graphs["vision"].inputs)

    def side(self, name: SideName) -> Side:
        return self.document if name == "document" else self.query

    def to_json(self) -> str:
        raw = asdict(self)
        if self.upgraded_from is None:
            del raw["upgraded_from"]
        for side in (raw["document"], raw["query"]):
            if not side["unread_slots"]:
                del side["unread_slots"]
        if self.image.tiles is None:
            del raw["image"]["tiles"]
        if not self.image.skip_blank:
            del raw["image"]["skip_blank"]
        if self.quantisation and not self.quantisation.rows:
            del raw["quantisation"]["rows"]
        return json.dumps(raw, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse strictly: a field that is unknown, missing, of another kind or out of range is a `CembedError` that
        names it."""
        raw = parse(text, MANIFEST)
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if type(version) is not int:
            raise CembedError(f"{MANIFEST} has no schema_version: this is not a cembed bundle")
        if not OLDEST_SCHEMA <= version <= SCHEMA_VERSION:
            raise CembedError(
                f"the bundle has schema version {version}, this cembed reads {OLDEST_SCHEMA} to {SCHEMA_VERSION}: "
                + ("update cembed" if version > SCHEMA_VERSION else "export the bundle again")
            )
        if version < SCHEMA_VERSION and "upgraded_from" in raw:
            raise CembedError(f"{MANIFEST} has unknown fields: upgraded_from")
        manifest: Manifest = decode(cls, raw, MANIFEST)
        return manifest

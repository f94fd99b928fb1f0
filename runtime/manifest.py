"""What `manifest.json` says, as frozen dataclasses, and how it is parsed: strictly."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from cembed.runtime.errors import CembedError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1

SlotKind = Literal["constant", "learned", "feedback", "all_tokens"]
FirstVector = Literal["prompt_end", "slot"]
Pooling = Literal["none", "mean", "last", "concat"]
SlotPositions = Literal["zero", "continue"]
PromptAttention = Literal["causal", "bidirectional"]


@dataclass(frozen=True)
class Side:
    """How one side, document or query, becomes vectors.

    `prompt` is the text around the input: `{image}` or `{text}` stands for the input itself.

    `slots` says what is fed into the latent slots behind it: `constant`, the embedding of `latent_token_id`; `learned`,
    rows of the slot table, from `slot_rows[0]` on and `slot_rows[1]` of them; `feedback`, the hidden state of the
    position before; `all_tokens`: there are none, and every position gives a vector.

    `num_vectors` is the budget K unless a caller chooses another: the state of the prompt's last position and of K - 1
    slots if `first_vector` is `prompt_end`, of K slots if it is `slot`. `nested_budgets` are those it was trained for.
    `pooling` makes one vector of the K states: their mean, the last one, or all of them side by side.
    """

    prompt: str
    slots: SlotKind
    num_vectors: int | None
    slot_positions: SlotPositions
    first_vector: FirstVector = "prompt_end"
    latent_token_id: int | None = None
    slot_rows: tuple[int, int] | None = None
    nested_budgets: tuple[int, ...] = ()
    pooling: Pooling = "none"

    def __post_init__(self) -> None:
        if (self.slots == "all_tokens") != (self.num_vectors is None):
            raise CembedError(f"a side with slots '{self.slots}' cannot have num_vectors {self.num_vectors}")
        if self.slots == "all_tokens" and self.pooling == "concat":
            raise CembedError("pooling concat needs latent slots: side by side, all tokens are as long as the page")
        if self.slots == "constant" and self.latent_token_id is None:
            raise CembedError("a side with constant slots needs a latent_token_id")
        if (self.slots == "learned") != (self.slot_rows is not None):
            raise CembedError(f"a side with slots '{self.slots}' cannot have slot_rows {self.slot_rows}")
        if self.slots == "feedback" and self.first_vector == "slot":
            raise CembedError(
                "a side with feedback slots starts with the prompt's end, which is fed into the first slot"
            )
        if self.num_vectors is not None:
            self.check_budget(self.num_vectors)

    @property
    def max_vectors(self) -> int | None:
        """The largest budget; None where only the length of the model's context limits it."""
        return None if self.slot_rows is None else self.slot_rows[1] + (self.first_vector == "prompt_end")

    @property
    def room(self) -> int:
        """Vectors that a cache has room for unless the caller says how many."""
        return self.max_vectors or max(64, 2 * (self.num_vectors or 0))

    def num_slots(self, num_vectors: int) -> int:
        return num_vectors - (self.first_vector == "prompt_end")

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
class ImageProcessing:
    """From an RGB image to `pixel_values`.

    `smart` resizing keeps the aspect ratio within `min_pixels`..`max_pixels` in steps of `patch_size * merge_size`
    (Qwen2-VL, arXiv 2409.12191); `fixed` always gives `max_pixels`, square (SigLIP). A window of the vision tower is
    `window_size` pixels wide; 0 means that there are none.
    """

    resize: Literal["smart", "fixed"]
    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    window_size: int = 0

    @property
    def factor(self) -> int:
        """Side of the square of pixels that becomes one visual token."""
        return self.patch_size * self.merge_size

    @property
    def max_visual_tokens(self) -> int:
        return self.max_pixels // self.factor**2


@dataclass(frozen=True)
class Positions:
    """Rotary positions: `axes` is 3 for M-RoPE (time, height, width) and 1 otherwise; prompts start at `first`."""

    axes: Literal[1, 3]
    first: int


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX file, the data files it refers to, and its inputs and outputs."""

    file: str
    data: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class EmbeddingTable:
    """Rows of hidden_size values, row-major; int8 rows are multiplied with the float32 in the file `scales`."""

    file: str
    dtype: Literal["float32", "float16", "int8"]
    rows: int
    scales: str | None = None


@dataclass(frozen=True)
class SelfTest:
    """What `cembed verify` embeds again: the files' vectors are float32 [num_vectors, dim]."""

    image: str
    text: str
    vectors: str
    tolerance: float


@dataclass(frozen=True)
class FileRecord:
    size: int
    sha256: str


@dataclass(frozen=True)
class Parity:
    """A graph against the torch modules it was traced from.

    `max_error` is the largest difference as a share of the largest value, `min_cosine` the lowest cosine of a row.
    """

    graph: str
    max_error: float
    min_cosine: float
    tolerance: float


@dataclass(frozen=True)
class Comparison:
    """A quantised bundle against the one it was made from, on the pages and queries of a calibration set.

    Cosines are those of a vector in both; `top5_overlap` is the share of the five best pages that both name;
    `score_error` the mean difference of MaxSim as a share of the mean score. nDCG only where there are judgements.
    """

    pages: int
    queries: int
    min_cosine: float
    p1_cosine: float
    median_cosine: float
    score_error: float
    top5_overlap: float
    ms_per_page: tuple[float, float]
    bytes: tuple[int, int]
    ndcg5: tuple[float, float] | None = None


@dataclass(frozen=True)
class LayerDamage:
    """What quantising one layer alone does: the lowest cosine of a vector, and the mean error of MaxSim as a share."""

    layer: str
    weights: tuple[str, ...]
    min_cosine: float
    score_error: float


@dataclass(frozen=True)
class Quantisation:
    """How a bundle was quantised, from the bundle with the hash `source`, and the loss that was measured.

    `schemes` has every weight that was, `kept` those in float; `sensitivity` the layers by falling damage, if asked.
    """

    weights: str
    embeddings: str
    rounding: str
    source: str
    schemes: Mapping[str, str]
    kept: tuple[str, ...]
    comparison: Comparison
    sensitivity: tuple[LayerDamage, ...] = ()


@dataclass(frozen=True)
class Manifest:
    backbone: str
    head: str
    target: str
    opset: int
    dtype: str
    hidden_size: int
    dim: int
    max_sequence_length: int
    image_token_id: int
    prompt_attention: PromptAttention
    document: Side
    query: Side
    image: ImageProcessing
    positions: Positions
    graphs: Mapping[str, Graph]
    token_embeddings: EmbeddingTable
    tokenizer: str
    self_test: SelfTest
    parity: tuple[Parity, ...]
    source: Mapping[str, str]
    made_with: Mapping[str, str]
    slot_embeddings: EmbeddingTable | None = None
    quantisation: Quantisation | None = None
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse strictly: a field that is unknown, missing or of another type is a `CembedError` that names it."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CembedError(f"{MANIFEST} is not JSON: {error}") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if not isinstance(version, int):
            raise CembedError(f"{MANIFEST} has no schema_version: this is not a cembed bundle")
        if version != SCHEMA_VERSION:
            raise CembedError(
                f"the bundle has schema version {version}, this cembed reads {SCHEMA_VERSION}: "
                + ("update cembed" if version > SCHEMA_VERSION else "export the bundle again")
            )
        manifest: Manifest = decode(cls, raw, MANIFEST)
        return manifest


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, as parsed from JSON, as an object of type `kind`: dataclasses, tuples, mappings, literals, scalars."""
    if is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(args, value, where)
    if origin is Literal and any(type(value) is type(choice) and value == choice for choice in args):
        return value
    if origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(decode(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is Mapping and isinstance(value, dict):
        return {key: decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) in (int, float) and abs(value) < 1e300:  # and so not NaN or infinity
        return float(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    raise CembedError(f"{where} is {value!r:.80}, which is not of the kind the schema wants ({kind})")


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    for kind in kinds:
        if type(value) is kind:
            return value
    others = [kind for kind in kinds if kind not in (types.NoneType, int, str)]
    if not others:
        raise CembedError(f"{where} is {value!r:.80}, which is none of {kinds}")
    return decode(others[0], value, where)


def _decode_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise CembedError(f"{where} is {value!r:.80}, not an object")
    known = {f.name: f for f in fields(kind)}
    required = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    for problem, names in (("unknown", value.keys() - known.keys()), ("missing", required - value.keys())):
        if names:
            raise CembedError(f"{where} has {problem} fields: {', '.join(sorted(names))}")
    kinds = typing.get_type_hints(kind)
    return kind(**{name: decode(kinds[name], item, f"{where}.{name}") for name, item in value.items()})

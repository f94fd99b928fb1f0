"""The bundle: one directory, described by `manifest.json`, that holds all a runtime needs.

    manifest.json            this module's `Manifest`, and every other file's size and sha256
    vision.onnx, vision.data the image encoder and its weights
    text.onnx, text.data     the single pass and its weights
    token_embeddings.bin     the embedding table, row-major, memory-mapped
    tokenizer.json           the tokenizer, as the `tokenizers` library writes it
    self_test.*              a page, a query, and the vectors they gave when the bundle was made

A file is checked against the manifest before anything else reads it, once per `Bundle`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.errors import CembedError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_CHUNK = 1 << 22

SlotKind = Literal["constant", "all_tokens"]
SlotPositions = Literal["zero", "continue"]
PromptAttention = Literal["causal", "bidirectional"]
T = TypeVar("T")


@dataclass(frozen=True)
class Side:
    """How one side, document or query, becomes vectors.

    `prompt` is the text around the input: `{image}` or `{text}` stands for the input itself. `num_vectors` is the full
    budget K of a latent-slot head: the last prompt position and K - 1 slots; None for `all_tokens`.
    """

    prompt: str
    slots: SlotKind
    num_vectors: int | None
    latent_token_id: int | None
    slot_positions: SlotPositions

    def __post_init__(self) -> None:
        if (self.slots == "all_tokens") != (self.num_vectors is None):
            raise CembedError(f"a side with slots '{self.slots}' cannot have num_vectors {self.num_vectors}")
        if self.num_vectors is not None and (self.num_vectors < 1 or self.latent_token_id is None):
            raise CembedError("a side with latent slots needs num_vectors >= 1 and a latent_token_id")


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
class TokenEmbeddings:
    file: str
    dtype: Literal["float32", "float16"]
    rows: int


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
    """Largest absolute difference and lowest cosine between a graph and the torch modules it was traced from."""

    graph: str
    max_abs_error: float
    min_cosine: float
    tolerance: float


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
    token_embeddings: TokenEmbeddings
    tokenizer: str
    self_test: SelfTest
    parity: tuple[Parity, ...]
    source: Mapping[str, str]
    made_with: Mapping[str, str]
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse strictly: a field that is unknown, missing or of another type is a `CembedError` that names it."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise CembedError(f"{MANIFEST} is not JSON: {error}") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if not isinstance(version, int):
            raise CembedError(f"{MANIFEST} has no schema_version: this is not a cembed bundle")
        if version != SCHEMA_VERSION:
            raise CembedError(
                f"the bundle has schema version {version}, this cembed reads {SCHEMA_VERSION}: "
                + ("update cembed" if version > SCHEMA_VERSION else "export the bundle again")
            )
        return decode(cls, raw, MANIFEST)


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, as parsed from JSON, as an object of type `kind`: dataclasses, tuples, mappings, literals, scalars."""
    if is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(args, value, where)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(decode(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is not None and isinstance(value, dict) and issubclass(origin, Mapping):
        return {key: decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) in (int, float):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise CembedError(f"{where} is {value!r:.80}, which is not of the kind the schema wants ({kind})")


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    for kind in kinds:
        if (kind is types.NoneType and value is None) or type(value) is kind:
            return value
    raise CembedError(f"{where} is {value!r:.80}, which is none of {kinds}")


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


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: typing.BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


class Bundle:
    """An opened bundle. `path(name)` is the only way to a file, and verifies it first.

    Raises CembedError: no such directory, no or a newer manifest, a file that is missing, changed, a link, unlisted.
    """

    def __init__(self, root: str | Path, *, verify: bool = True) -> None:
        self.root = Path(root)
        try:
            text = (self.root / MANIFEST).read_bytes()
        except OSError as error:
            raise CembedError(f"{self.root} is not a bundle: cannot read {MANIFEST} ({error.strerror})") from error
        try:
            self.manifest = Manifest.from_json(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise CembedError(f"{self.root}: {MANIFEST} is not UTF-8") from error
        except CembedError as error:
            raise CembedError(f"{self.root}: {error}") from error
        self.hash = hashlib.sha256(text).hexdigest()
        self._lock = threading.Lock()
        self._verified: set[str] = set()
        self._verify = verify
        self._check_listing()

    def _check_listing(self) -> None:
        listed, found = set(self.manifest.files), {entry.name for entry in os.scandir(self.root)} - {MANIFEST}
        for name in listed:
            if name != os.path.basename(name) or name in ("", ".", ".."):
                raise CembedError(f"{self.root}: the manifest names {name!r}, which is not a plain file name")
        if missing := sorted(listed - found):
            raise CembedError(f"{self.root}: missing {', '.join(missing)}: the bundle is incomplete, copy it again")
        if extra := sorted(found - listed):
            raise CembedError(f"{self.root}: {', '.join(extra)} is not in the manifest: remove it or export again")
        for name in listed:
            status = (self.root / name).lstat()
            if not stat.S_ISREG(status.st_mode):
                raise CembedError(f"{self.root / name} is a link or not a file: a bundle holds plain files only")
            if status.st_size != self.manifest.files[name].size:
                raise CembedError(
                    f"{self.root / name} has {status.st_size} bytes, the manifest says "
                    f"{self.manifest.files[name].size}: the file is damaged, copy the bundle again"
                )

    def path(self, name: str) -> Path:
        """The path of the file `name`, once its sha256 is the manifest's."""
        if name not in self.manifest.files:
            raise CembedError(f"{self.root}: the manifest does not list {name!r}")
        with self._lock:
            if self._verify and name not in self._verified:
                if sha256(self.root / name) != self.manifest.files[name].sha256:
                    raise CembedError(f"{self.root / name} does not match its sha256: it is damaged, copy it again")
                self._verified.add(name)
        return self.root / name

    def graph_path(self, name: str) -> Path:
        """The path of a graph's ONNX file; its data files are verified too."""
        graph = self.manifest.graphs.get(name)
        if graph is None:
            raise CembedError(f"{self.root} has no graph '{name}': it has {', '.join(self.manifest.graphs)}")
        for data in graph.data:
            self.path(data)
        return self.path(graph.file)

    def token_embeddings(self) -> NDArray[np.floating[Any]]:
        """The table [rows, hidden_size], memory-mapped and read-only."""
        spec = self.manifest.token_embeddings
        shape = (spec.rows, self.manifest.hidden_size)
        expected = np.dtype(spec.dtype).itemsize * shape[0] * shape[1]
        if self.manifest.files[spec.file].size != expected:
            raise CembedError(f"{self.root / spec.file}: {shape} of {spec.dtype} takes {expected} bytes")
        return np.memmap(self.path(spec.file), dtype=spec.dtype, mode="r", shape=shape)


def record_files(root: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file of a bundle that is being made."""
    names = sorted(entry.name for entry in os.scandir(root) if entry.name != MANIFEST)
    return {name: FileRecord((root / name).stat().st_size, sha256(root / name)) for name in names}

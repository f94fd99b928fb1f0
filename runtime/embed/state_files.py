"""The file of a saved state: what is in it is checked against the bundle, and before anything is read.

Tensors, of a state with n vectors and T positions in its cache (A position axes, H hidden, D length of a state):

    past_key_values.{i}.key, .value   [1, kv_heads, T, head_dim], as the bundle's text_step graph declares them
    past_states.{i}.conv, .recurrent  float32, of layers that have these instead, whole
    prompt_end                        int64 [A, 1]    the prompt's largest position, on each axis
    hidden                            float32 [1, H]  the last hidden state
    states                            float32 [n, D]  left out where n is 0

and in the metadata `version`, `bundle`, `side`, and `sha256` over these and the tensors. It is no signature: a file
that no state of the bundle could have written is refused whatever its hash.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cembed.runtime.bundle.array_files import Parts, write_safetensors
from cembed.runtime.bundle.graph_tensors import grows, is_past, state_tensors
from cembed.runtime.bundle.manifest import Manifest, Side, SideName
from cembed.runtime.bundle.tensor_files import DTYPES, Header, read_header, read_safetensors
from cembed.runtime.bundle.vectors import write_whole
from cembed.runtime.engines.session import Array
from cembed.runtime.errors import CembedError
from cembed.runtime.plain_files import open_plain

Signature = dict[str, tuple[str, tuple[int, ...]]]
"""Type and shape of each tensor, by name."""
VERSION = "2"
MAX_HEADER, MAX_FILE = 1 << 20, 1 << 40
_CODES = {"float32": "F32", "float16": "F16", "int64": "I64"}


class UnfitError(Exception):
    """What a file has that no state of the bundle has."""


class ForeignError(CembedError):
    """A state, but one of another bundle or version."""


@dataclass(frozen=True)
class StateSchema:
    """What states of a bundle are like; `page_text` are the positions of a page's prompt around the image.

    `longest` is how many visual tokens a page may have side by side, where only a part of them may be read.
    """

    bundle: str
    manifest: Manifest
    page_text: int
    longest: int | None = None

    def side(self, name: SideName) -> Side:
        return self.manifest.side(name)

    def signature(self, positions: int, vectors: int) -> Signature:
        """The tensors of a state with so many positions in its cache, and so many vectors."""
        m = self.manifest
        sizes: dict[int | str, int] = {"batch_size": 1, "capacity": positions}
        found: Signature = {"prompt_end": ("I64", (m.positions.axes, 1)), "hidden": ("F32", (1, m.hidden_size))}
        for tensor in state_tensors(m.graphs["text_step"]):
            shape = [int(sizes.get(axis, axis)) for axis in tensor.shape]
            if grows(tensor.name):
                shape[2] = positions
            found[tensor.name] = (_CODES.get(tensor.dtype, tensor.dtype), tuple(shape))
        return found | ({"states": ("F32", (vectors, m.dim))} if vectors else {})

    def check_counts(self, name: SideName, positions: int, vectors: int) -> None:
        """Raises UnfitError for numbers of positions and vectors that no state of a side has."""
        side = self.side(name)
        most = side.max_vectors or self.manifest.max_sequence_length
        if not (side.first_vector == "prompt_end") <= vectors <= most:
            raise UnfitError(f"it has {vectors} vectors")
        prompt = positions - side.num_slots(vectors)
        if prompt < 1 or positions > self.manifest.max_sequence_length:
            raise UnfitError(f"its cache has {positions} positions, {prompt} of them of the prompt")

    def check_prompt(self, name: SideName, prompt: int, end: Array) -> None:
        """Raises UnfitError if no prompt of so many positions ends at `end` [A, 1]."""
        last = end - self.manifest.positions.first
        if (last != last[0]).any() or int(last[0, 0]) not in self._ends(name, prompt):
            raise UnfitError(f"its prompt of {prompt} positions ends at {end.ravel().tolist()}")

    def _ends(self, name: SideName, prompt: int) -> set[int]:
        """Where a prompt may end: with M-RoPE a page's image moves the text after it by its longer side only."""
        if name == "query" or self.manifest.positions.axes == 1:
            return {prompt - 1}
        visual = prompt - self.page_text
        shortest = math.isqrt(max(visual, 1))
        if self.longest is not None:
            return {self.page_text + side - 1 for side in range(shortest, self.longest + 1) if side * side >= visual}
        longer = (side for side in range(shortest, visual + 1) if side * side >= visual)
        return {self.page_text + side - 1 for side in longer if visual % side == 0}


@dataclass(frozen=True, eq=False)
class StateFile:
    """A file whose header fits the bundle: `positions` of cache, and `vectors` that were made."""

    path: Path
    schema: StateSchema
    side: SideName
    positions: int
    vectors: int

    def read(self) -> dict[str, Array]:
        """Its tensors by name. Raises CembedError: they are not those of its hash, or of no state of the bundle."""
        signature = self.schema.signature(self.positions, self.vectors)
        expected = {name: (DTYPES[code], shape) for name, (code, shape) in signature.items()}
        with refusals_named(self.path):
            arrays, given = read_safetensors(self.path, expected, MAX_FILE, MAX_HEADER)
            if given.get("sha256") != digest(arrays, metadata(self.schema.bundle, self.side)):
                raise UnfitError("its content has another hash")
            if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
                raise UnfitError(f"{broken[0]} has NaN or infinity")
            self._check_values(arrays)
        return arrays

    def _check_values(self, arrays: Mapping[str, Array]) -> None:
        prompt = self.positions - self.schema.side(self.side).num_slots(self.vectors)
        self.schema.check_prompt(self.side, prompt, arrays["prompt_end"])
        names = {tensor.name for tensor in self.schema.manifest.graphs["text_step"].outputs}
        if self.vectors and "hidden_states" not in names and (arrays["hidden"] != arrays["states"][-1:]).any():
            raise UnfitError("its hidden state is not that of its last vector")


def open_state(path: Path, schema: StateSchema) -> StateFile:
    """A saved state, ready to be read. Raises CembedError: no file, damaged, no state, of another bundle or version."""
    with refusals_named(path):
        header = header_of(path)
        check_origin(path, header.metadata, schema.bundle)
        found: Signature = {name: (stored.dtype, stored.shape) for name, stored in header.arrays.items()}
        side: SideName = "document" if header.metadata["side"] == "document" else "query"
        positions, vectors = count(found, schema)
        schema.check_counts(side, positions, vectors)
    return StateFile(path, schema, side, positions, vectors)


def header_of(path: Path) -> Header:
    """Raises CembedError: no file, or its header is damaged, or would be large to parse."""
    with open_plain(path, MAX_FILE) as (file, size):
        return read_header(path, file, size, MAX_HEADER)


def check_origin(path: Path, given: Mapping[str, str], bundle: str) -> None:
    """Raises ForeignError: of another bundle or version; UnfitError: no state's."""
    if {"bundle", "side"} <= given.keys() and given.get("version") != VERSION:
        raise ForeignError(f"{path} is a state of another version of cembed: start again")
    if given.get("bundle") != bundle:
        raise ForeignError(f"{path} is not a state of this bundle: use the one that made it, or start again")
    if given.keys() != {*metadata(bundle, "query"), "sha256"} or given["side"] not in ("document", "query"):
        raise UnfitError(f"its metadata are {', '.join(sorted(given))}")


def count(found: Signature, schema: StateSchema) -> tuple[int, int]:
    """Positions of the cache, and vectors. Raises UnfitError if the tensors are not those of any state."""
    if "text_step" not in schema.manifest.graphs:
        raise UnfitError("the bundle has no slots")
    cache = next((shape for name, (_, shape) in found.items() if is_past(name) and grows(name)), ())
    states = found["states"][1] if "states" in found else (0,)
    positions, vectors = (cache[2] if len(cache) == 4 else 0), (states[0] if states else 0)
    expected = schema.signature(positions, vectors)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            given, right = described(found, name, "missing"), described(expected, name, "left out")
            raise UnfitError(f"{name:.80} is {given}, and should be {right}")
    return positions, vectors


def described(signature: Signature, name: str, otherwise: str) -> str:
    return f"{signature[name][0]} {list(signature[name][1])}" if name in signature else otherwise


def write_state(path: Path, bundle: str, side: SideName, arrays: Mapping[str, Array]) -> None:
    """A file that `open_state` reads. Raises CembedError if it cannot be written."""
    origin = metadata(bundle, side)
    parts = {name: Parts.of([array]) for name, array in arrays.items()}
    write_whole(path, lambda file: write_safetensors(file, parts, origin | {"sha256": digest(arrays, origin)}))


def metadata(bundle: str, side: SideName) -> dict[str, str]:
    return {"version": VERSION, "bundle": bundle, "side": side}


def digest(arrays: Mapping[str, Array], origin: Mapping[str, str]) -> str:
    """sha256 over what a state is of, and over names, types, shapes and values of its tensors."""
    result = hashlib.sha256("".join(f"{name} {origin[name]}\n" for name in sorted(origin)).encode())
    for name in sorted(arrays):
        result.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        result.update(np.ascontiguousarray(arrays[name]).data)
    return result.hexdigest()


@contextmanager
def refusals_named(path: Path) -> Iterator[None]:
    try:
        yield
    except UnfitError as error:
        raise CembedError(f"{path} is a damaged state: {error}; start again") from error
    except ForeignError:
        raise
    except CembedError as error:
        raise CembedError(f"no state can be read: {error}") from error

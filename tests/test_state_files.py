"""Files of saved states: those that were saved are read, and no others, whatever their hash says."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reference import Zoo
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cembed.runtime import CembedError, Embedder
from cembed.runtime.embed.state_files import VERSION, StateSchema, digest, open_state

TEXT = "source code form of the work"
KEY, VALUE = "past_key_values.1.key", "past_key_values.1.value"
Arrays = dict[str, Any]
Change = Callable[[Arrays, dict[str, str]], object]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.getbasetemp() / "zoo")


@pytest.fixture(scope="session")
def embedder(zoo: Zoo) -> Embedder:
    """Vectors of a feedback head come out as they are fed: there is no projection."""
    return zoo.under("qwen2-vl", "feedback").embedder


@pytest.fixture(scope="session")
def saved(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("states") / "state.safetensors"
    state = embedder.start_query(TEXT, 6)
    state.extend(4)
    state.save(path)
    return path


def refused(embedder: Embedder, path: Path, words: str = "") -> None:
    with pytest.raises(CembedError, match="state") as raised:
        embedder.resume(path)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def forge(source: Path, path: Path, change: Change, *, rehash: bool) -> Path:
    """A file with another content; `rehash`: with the hash of that content."""
    with safe_open(str(source), framework="numpy") as file:
        metadata = dict(file.metadata())
    arrays = load_file(source)
    change(arrays, metadata)
    if rehash:
        metadata["sha256"] = digest(arrays, {name: metadata[name] for name in metadata if name != "sha256"})
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata)
    return path


def put(name: str, new: Callable[[Any], Any]) -> Change:
    return lambda arrays, _: arrays.update({name: new(arrays[name])})


def caches(new: Callable[[Any], Any]) -> Change:
    return lambda arrays, _: arrays.update({name: new(a) for name, a in arrays.items() if name.startswith("past")})


def drop(*names: str) -> Change:
    return lambda arrays, _: [arrays.pop(name) for name in names]


def say(**fields: str | None) -> Change:
    return lambda _, metadata: [
        metadata.pop(name) if value is None else metadata.update({name: value}) for name, value in fields.items()
    ]


def broken(array: Any, value: float) -> Any:
    array = array.copy()
    array.flat[-1] = value
    return array


def longer(array: Any, positions: int = 1) -> Any:
    return np.concatenate([array, *positions * [array[:, :, -1:]]], axis=2)


FORGED: dict[str, tuple[Change, str]] = {
    "no key": (drop(KEY), f"{KEY} is missing"),
    "no value": (drop(VALUE), f"{VALUE} is missing"),
    "no cache": (lambda arrays, _: [arrays.pop(name) for name in list(arrays) if name.startswith("past")], "missing"),
    "no hidden": (drop("hidden"), "hidden is missing"),
    "no end": (drop("prompt_end"), "prompt_end is missing"),
    "no states": (drop("states"), "0 vectors"),
    "another layer": (lambda arrays, _: arrays.update({"past_key_values.9.key": arrays[KEY]}), "left out"),
    "another tensor": (lambda arrays, _: arrays.update({"more": arrays["hidden"]}), "left out"),
    "key shorter than value": (put(KEY, lambda a: a[:, :, :-1]), "is F32 [1, 2, "),
    "value longer than key": (put(VALUE, longer), "is F32 [1, 2, "),
    "all shorter": (caches(lambda a: a[:, :, :-1]), "ends at"),
    "all longer": (caches(longer), "ends at"),
    "no positions": (caches(lambda a: a[:, :, :0]), "0 positions"),
    "no prompt": (caches(lambda a: a[:, :, :3]), "0 of them of the prompt"),
    "longer than the model": (caches(lambda a: longer(a[:, :, :1], 40_000)), "positions"),
    "few heads": (put(KEY, lambda a: a[:, :1]), KEY),
    "narrow heads": (put(KEY, lambda a: a[..., :-1]), KEY),
    "flat key": (put(KEY, lambda a: a[0]), KEY),
    "flat caches": (caches(lambda a: a[0]), "past_key_values.0.key"),
    "two in a batch": (caches(lambda a: np.concatenate([a, a])), "past_key_values.0.key"),
    "half floats": (caches(lambda a: a.astype(np.float16)), "F16"),
    "doubles": (put(KEY, lambda a: a.astype(np.float64)), "F64"),
    "integers": (put(KEY, lambda a: a.astype(np.int32)), "I32"),
    "NaN in a key": (put(KEY, lambda a: broken(a, np.nan)), f"{KEY} has NaN"),
    "infinity in a value": (put(VALUE, lambda a: broken(a, np.inf)), f"{VALUE} has NaN or infinity"),
    "narrow hidden": (put("hidden", lambda a: a[:, :-1]), "hidden"),
    "two hidden rows": (put("hidden", lambda a: np.concatenate([a, a])), "hidden"),
    "NaN in hidden": (put("hidden", lambda a: broken(a, np.nan)), "hidden has NaN"),
    "another hidden": (put("hidden", lambda a: a + 1), "hidden state is not"),
    "narrow states": (put("states", lambda a: a[:, :-1]), "states"),
    "states of one more axis": (put("states", lambda a: a[:, None]), "states"),
    "states without axes": (put("states", lambda a: a[0, 0]), "states"),
    "no rows of states": (put("states", lambda a: a[:0]), "states"),
    "one state more": (put("states", lambda a: np.concatenate([a[:1], a])), "ends at"),
    "one state less": (put("states", lambda a: a[1:]), "ends at"),
    "more states than positions": (put("states", lambda a: np.repeat(a, 20, axis=0)), "of the prompt"),
    "infinity in states": (put("states", lambda a: broken(a, -np.inf)), "states has NaN or infinity"),
    "NaN positions": (put("prompt_end", lambda a: np.full(a.shape, np.nan)), "F64"),
    "short positions": (put("prompt_end", lambda a: a.astype(np.int32)), "I32"),
    "one axis": (put("prompt_end", lambda a: a[:1]), "prompt_end"),
    "flat end": (put("prompt_end", lambda a: a[:, 0]), "prompt_end"),
    "axes that differ": (put("prompt_end", lambda a: a + np.arange(len(a))[:, None]), "ends at"),
    "a later end": (put("prompt_end", lambda a: a + 1), "ends at"),
    "an end before all": (put("prompt_end", lambda a: a * 0 - 1), "ends at"),
    "an end beyond all": (put("prompt_end", lambda a: a * 0 + 2**62), "ends at"),
    "a page": (say(side="document"), "ends at"),
    "no side": (say(side=None), "metadata"),
    "another side": (say(side="page"), "metadata"),
    "another bundle": (say(bundle="0" * 64), "not a state of this bundle"),
    "no bundle": (say(bundle=None), "not a state of this bundle"),
    "more metadata": (say(more="1"), "metadata"),
    "no version": (say(version=None), "another version"),
    "an older version": (say(version="1"), "another version"),
    "a later version": (say(version="3"), "another version"),
}


@pytest.mark.parametrize(("change", "words"), FORGED.values(), ids=FORGED)
def test_a_forged_state(embedder: Embedder, saved: Path, tmp_path: Path, change: Change, words: str) -> None:
    refused(embedder, forge(saved, tmp_path / "right.safetensors", change, rehash=True), words)
    refused(embedder, forge(saved, tmp_path / "wrong.safetensors", change, rehash=False))


def nothing(_: Arrays, __: dict[str, str]) -> None:
    """What the forger above does besides its changes is no fault."""


def test_a_state_that_was_written_again(embedder: Embedder, saved: Path, tmp_path: Path) -> None:
    again = forge(saved, tmp_path / "state.safetensors", nothing, rehash=True)
    assert np.array_equal(embedder.resume(again).extend(4), embedder.resume(saved).extend(4))


def test_the_hash_covers_what_a_state_is_of(embedder: Embedder, zoo: Zoo, tmp_path: Path) -> None:
    """Of PaliGemma, whose pages and queries have the same positions, only the hash tells a page from a query."""
    pali = zoo.under("paligemma", "feedback").embedder
    state = pali.start(Image.new("RGB", (30, 30), "white"), 3)
    state.extend(2)
    state.save(tmp_path / "page.safetensors")
    refused(pali, forge(tmp_path / "page.safetensors", tmp_path / "query.safetensors", say(side="query"), rehash=False))
    assert pali.resume(tmp_path / "page.safetensors").loop.name == "document"


def test_any_page_is_taken_back(embedder: Embedder, tmp_path: Path) -> None:
    """Where its prompt ends depends on its shape."""
    path = tmp_path / "state.safetensors"
    for size in ((30, 30), (300, 60), (60, 300), (140, 140), (700, 5), (400, 200)):
        state = embedder.start(Image.new("RGB", size, "white"), 3)
        expected = state.extend(2)
        state.save(path)
        assert np.array_equal(embedder.resume(path).extend(2), expected)
        refused(embedder, forge(path, path, put("prompt_end", lambda a: a + 1), rehash=True), "ends at")


def test_a_bundle_without_slots(embedder: Embedder, saved: Path) -> None:
    manifest = replace(embedder.manifest, graphs={"vision": embedder.manifest.graphs["vision"]})
    with pytest.raises(CembedError, match="the bundle has no slots"):
        open_state(saved, StateSchema(embedder.bundle.hash, manifest, 0))


def header(content: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def huge(embedder: Embedder) -> bytes:
    """Tensors without values and of more rows than an array can have."""
    names = {"version": VERSION, "bundle": embedder.bundle.hash, "side": "query", "sha256": ""}
    shapes = {KEY: [0, 2**62], "hidden": [2**62, 0], "prompt_end": [0]}
    tensors = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    return header({"__metadata__": names} | tensors)


def flipped(content: bytes) -> bytes:
    return content[:-1000] + bytes([content[-1000] ^ 64]) + content[-999:]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[:-100],
    "cut in the header": lambda content: content[:100],
    "empty": lambda _: b"",
    "seven bytes": lambda content: content[:7],
    "more behind it": lambda content: content + b"x",
    "scrambled": lambda content: content[::-1],
    "a bit": flipped,
    "a header beyond the file": lambda content: struct.pack("<Q", len(content)) + content[8:],
    "a header of 2^63 bytes": lambda content: struct.pack("<Q", 1 << 63) + content[8:],
    "a header of 2 MiB": lambda content: struct.pack("<Q", 1 << 21) + b" " * (1 << 21),
    "no JSON": lambda content: struct.pack("<Q", 8) + b"nonsense",
    "not UTF-8": lambda content: struct.pack("<Q", 8) + b'{"\xff":1}',
    "a list": lambda content: struct.pack("<Q", 2) + b"[]",
    "no tensors": lambda content: struct.pack("<Q", 2) + b"{}",
    "metadata that are no texts": lambda content: header({"__metadata__": {"version": 2, "side": "query"}}),
    "another kind of file": lambda content: header(
        {"v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"xxxx"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file(embedder: Embedder, saved: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(damage(saved.read_bytes()))
    refused(embedder, path)


def test_shapes_that_no_array_has(embedder: Embedder, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(huge(embedder))
    refused(embedder, path)


def test_what_is_no_file(embedder: Embedder, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for path in (tmp_path / "gone", tmp_path, tmp_path / "pipe", tmp_path / "endless", tmp_path / "a" / "b"):
        refused(embedder, path)


def test_every_byte_of_a_header(embedder: Embedder, saved: Path, tmp_path: Path) -> None:
    """Another digit, quote or letter anywhere."""
    content, path = bytearray(saved.read_bytes()), tmp_path / "state.safetensors"
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for place in range(0, end, 3):
        for change in (1, 128):
            content[place] ^= change
            path.write_bytes(content)
            content[place] ^= change
            refused(embedder, path)


def test_a_large_state_is_refused_before_it_is_read(zoo: Zoo, saved: Path, tmp_path: Path) -> None:
    small = Embedder.load(zoo.model("qwen2-vl").bundle, threads=1, state_memory=1000)
    small.manifest = zoo.under("qwen2-vl", "feedback").embedder.manifest
    refused(small, saved, "state_memory")

"""Both languages hold a manifest to the same table: its kinds, its ranges, and what its fields have to do with each
other."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libcembed import ROOT, Library
from manifests import (
    Json,
    Place,
    at,
    changed,
    library_refuses,
    make_full,
    name_of,
    places,
    put,
    python_refuses,
    read,
    told,
)

from cembed.runtime import Embedder
from cembed.runtime.bundle.manifest_file import write_manifest

Edit = Callable[[Json], object]
WRITER = ROOT / "tests" / "native" / "manifest_schema.py"
FIELDS = {(row.owner, row.name): row for row in runpy.run_path(str(WRITER))["field_rows"]()}
OTHERS = [None, True, "1", [], {}, 10**30, 0.5, "\ud800"]


def opened(root: Path) -> None:
    """As the C library does it: with the table of tokens verified."""
    Embedder.load(root).inputs.tokens.verify()


@pytest.fixture(scope="module")
def full(causal_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose manifest has every field; tests write manifests of their own there."""
    return make_full(causal_bundle, tmp_path_factory.mktemp("manifest") / "full")


@pytest.fixture(scope="module")
def raw(full: Path) -> Json:
    """The manifest of `full`, not to be changed."""
    return read(full)


def row_of(place: Place) -> Any:
    """The line of the table that a place is under."""
    kind, row = "Manifest", None
    for key in place:
        inner = kind.rstrip("?")[1:-1]
        if kind[0] in "[{":
            kind = inner.split("*")[0] if kind[0] == "[" else inner.split(":")[1]
        else:
            row = FIELDS[kind.rstrip("?"), str(key)]
            kind = row.kind
    return row


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def test_the_table_of_the_c_library_is_written_from_python() -> None:
    written = subprocess.run([sys.executable, WRITER], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert (ROOT / "runtime" / "native" / "lib" / "manifest_schema.h").read_text() == written


def test_the_full_manifest_has_every_field(full: Path, raw: Json) -> None:
    found = {(row_of(place).owner, row_of(place).name) for place in places(raw)}
    assert found == FIELDS.keys() - {("Manifest", "upgraded_from")}
    write_manifest(full, json.dumps(raw))
    assert python_refuses(full) is None


def out_of_range(place: Place, value: Any) -> list[Any]:
    """Numbers below and above what the table allows in a place."""
    row = row_of(place)
    if row.kind[0] == "=":
        return [0, 2, 4, -1, 10**20]
    step = 1 if type(value) is int else max(abs(row.least), abs(row.most)) * 1e-6
    far = [-(10**400), -(2**63) - 1, 2**63, 2**64, 10**400]
    return [row.least - step, row.most + step, *far, *([1e308, -1e308] if type(value) is float else [])]


def test_python_names_every_number_that_is_out_of_range(full: Path, raw: Json) -> None:
    tried = 0
    for place in filter(lambda place: is_number(at(raw, place)), places(raw)):
        for value in out_of_range(place, at(raw, place)):
            write_manifest(full, json.dumps(changed(raw, place, value)))
            message = python_refuses(full)
            assert message is not None, (place, value)
            assert name_of(place) in message.replace(" version", "_version"), (place, value, message)
            tried += 1
    assert tried > 500


def test_the_c_library_names_every_number_that_is_out_of_range(library: Library, full: Path, raw: Json) -> None:
    for place in filter(lambda place: is_number(at(raw, place)), places(raw)):
        for value in out_of_range(place, at(raw, place)):
            write_manifest(full, json.dumps(changed(raw, place, value)))
            message = library_refuses(library, full)
            assert message is not None, (place, value)
            assert "too large" in message or name_of(place) in message.replace(" version", "_version"), (place, value)
    write_manifest(full, json.dumps(raw))
    assert library_refuses(library, full) is None


def test_values_of_other_kinds_are_refused_by_both_or_by_none(library: Library, full: Path, raw: Json) -> None:
    for place in places(raw):
        for value in OTHERS:
            write_manifest(full, json.dumps(changed(raw, place, value)))
            python, c = python_refuses(full), library_refuses(library, full)
            assert (python is None) == (c is None), (place, value, python, c)


@pytest.mark.parametrize(
    "literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e400", "01", "+1", ".5", "1."]
)
def test_numbers_that_are_none(library: Library, full: Path, raw: Json, literal: str) -> None:
    for place in (("self_test", "tolerance"), ("image", "std", 0), ("dim",)):
        text = json.dumps(changed(raw, place, 123454321)).replace("123454321", literal)
        put(full, text.encode())
        assert python_refuses(full), place
        assert library_refuses(library, full), place


def grow(tensor: Json, axis: int, size: Any) -> None:
    tensor["shape"][axis] = size


def deepen(manifest: Json, widths: dict[str, int], features: int) -> None:
    """Inputs deepstack_embeds of these widths for text graphs, and what the vision graph gives for all of them."""
    for graph, width in widths.items():
        shape = ["batch_size", "sequence_length", width]
        manifest["graphs"][graph]["inputs"].append({"name": "deepstack_embeds", "dtype": "float32", "shape": shape})
    grow(manifest["graphs"]["vision"]["outputs"][0], 2, features)


CONTRADICTIONS: list[tuple[Edit, str]] = [
    (lambda m: m.update(image_token_id=600), "image_token_id"),
    (lambda m: m["query"].update(latent_token_id=600), "latent_token_id"),
    (lambda m: m["document"].update(latent_token_id=2**28), "latent_token_id"),
    (lambda m: m.update(max_sequence_length=5), "max_sequence_length"),
    (lambda m: m["image"].update(min_pixels=m["image"]["max_pixels"] + 1), "min_pixels"),
    (lambda m: m["image"].update(min_pixels=1, max_pixels=783), "max_pixels"),
    (lambda m: m["image"].update(window_size=113), "window_size"),
    (lambda m: m["image"].update(window_size=56), "window_size"),
    (lambda m: m["image"].update(window_size=0), "window_size"),
    (lambda m: m["image"].update(patch_size=16, window_size=0), "patch_size"),
    (lambda m: m["image"].update(merge_size=3), "window_size"),
    (lambda m: m["image"].update(resize="fixed"), "max_pixels"),
    (lambda m: m["image"].update(resize="smart"), "tiles"),
    (lambda m: m["image"].update(tiles=None), "tiles"),
    (lambda m: m["image"].update(min_pixels=784), "min_pixels"),
    (lambda m: m["image"].update(max_pixels=1025 * 56**2), "max_pixels"),
    (lambda m: m["image"]["tiles"].update(side=42), "side"),
    (lambda m: m["image"]["tiles"].update(side=57), "side"),
    (lambda m: m["image"]["tiles"].update(tile="<tile>"), "tile"),
    (lambda m: m["image"]["tiles"].update(row_end="{image}"), "row_end"),
    (lambda m: m["image"]["tiles"].update(page="{image}{image}"), "page"),
    (lambda m: m["image"]["tiles"].update(alone=""), "alone"),
    (lambda m: m["image"].update(skip_blank=True), "skip_blank"),
    (lambda m: m["positions"].update(axes=1), "axes"),
    (lambda m: m.update(dim=7), "dim"),
    (lambda m: m.update(dim=m["dim"] + 1), "dim"),
    (lambda m: m.update(hidden_size=95), "hidden_size"),
    (lambda m: m["token_embeddings"].update(rows=601), "rows"),
    (lambda m: m["token_embeddings"].update(dtype="float16"), "scales"),
    (lambda m: m["token_embeddings"].update(scales=None), "scales"),
    (lambda m: m["slot_embeddings"].update(rows=8), "rows"),
    (lambda m: m["slot_embeddings"].update(dtype="float16"), "slots.bin"),
    (lambda m: m["document"].update(slot_rows=[1, 7]), "slot_rows"),
    (lambda m: m["document"].update(slot_rows=[0, 6]), "num_vectors"),
    (lambda m: m["document"].update(unread_slots=2), "num_vectors"),
    (lambda m: m["document"].update(first_vector="prompt_end"), "unread_slots"),
    (lambda m: m["query"].update(unread_slots=1), "unread_slots"),
    (lambda m: m["document"].update(nested_budgets=[4, 1]), "nested_budgets"),
    (lambda m: m["document"].update(nested_budgets=[4, 4]), "nested_budgets"),
    (lambda m: m["document"].update(nested_budgets=[4, 9]), "nested_budgets"),
    (lambda m: m["document"].update(prompt="no picture"), "{image}"),
    (lambda m: m["document"].update(prompt="{image}{image}"), "{image}"),
    (lambda m: m["query"].update(prompt="{image}"), "{text}"),
    (lambda m: m["graphs"].pop("vision"), "vision"),
    (lambda m: m["graphs"].update(text2=m["graphs"]["text"]), "text2"),
    (lambda m: m["graphs"]["text"].update(file="tokenizer.json"), "text.onnx"),
    (lambda m: m["graphs"]["text"].update(file="vision.data") or m["files"].pop("text.onnx"), "*.onnx"),
    (lambda m: grow(m["graphs"]["text"]["inputs"][0], 2, 97), "inputs_embeds"),
    (lambda m: grow(m["graphs"]["text"]["inputs"][0], 1, 5), "inputs_embeds"),
    (lambda m: grow(m["graphs"]["text"]["inputs"][0], 1, ""), "inputs_embeds"),
    (lambda m: grow(m["graphs"]["text"]["inputs"][0], 1, "positions"), "inputs_embeds"),
    (lambda m: m["graphs"]["text"]["inputs"][0]["shape"].pop(), "inputs_embeds"),
    (lambda m: m["graphs"]["text"]["inputs"][1].update(dtype="int32"), "position_ids"),
    (lambda m: m["graphs"]["text"]["inputs"].append(m["graphs"]["text"]["inputs"][0]), "twice"),
    (lambda m: m["graphs"]["text"]["inputs"].pop(1), "position_ids"),
    (lambda m: m["graphs"]["text"].update(outputs=[]), "slot_states"),
    (lambda m: m["graphs"]["vision"]["inputs"].pop(), "window_restore"),
    (lambda m: m["graphs"]["vision"]["outputs"][0].update(dtype="float64"), "image_features"),
    (lambda m: grow(m["graphs"]["vision"]["inputs"][0], 1, 64), "pixel_values"),
    (lambda m: m["graphs"]["text_step"]["outputs"].reverse(), "slot_states"),
    (lambda m: m["graphs"]["text_step"]["outputs"].pop(), "present"),
    (lambda m: m["graphs"]["text_step"]["inputs"].pop(), "past_key_values"),
    (lambda m: m["graphs"]["text_step"]["inputs"][-1].update(name="past_key_values.x.value"), "past_key_values"),
    (lambda m: m["graphs"]["text_step"]["inputs"][-1].update(dtype="float16"), "past_key_values"),
    (lambda m: [grow(m["graphs"]["text_step"][way][-1], 2, 64) for way in ("inputs", "outputs")], "positions"),
    (lambda m: deepen(m, {"text": 192}, 288), "deepstack_embeds"),
    (lambda m: deepen(m, {"text_step": 192}, 288), "deepstack_embeds"),
    (lambda m: deepen(m, {"text": 192, "text_step": 96}, 288), "deepstack_embeds"),
    (lambda m: deepen(m, {"text": 100, "text_step": 100}, 192), "deepstack_embeds"),
    (lambda m: deepen(m, {"text": 95, "text_step": 95}, 96), "deepstack_embeds"),
    (lambda m: deepen(m, {"text": 65 * 96, "text_step": 65 * 96}, 65 * 96), "deepstack_embeds"),
    (lambda m: deepen(m, {"text": 192, "text_step": 192}, 96), "image_features"),
    (lambda m: deepen(m, {}, 192), "image_features"),
    (lambda m: m["files"].pop("tokenizer.json"), "tokenizer.json"),
    (lambda m: m["files"].update(more={"size": 0, "sha256": "0" * 64}), "more"),
    (lambda m: m["files"]["tokenizer.json"].update(size=2**28 + 1), "tokenizer.json"),
    (lambda m: m["files"]["tokenizer.json"].update(sha256="0" * 63), "sha256"),
    (lambda m: m["files"]["tokenizer.json"].update(sha256="A" * 64), "sha256"),
    (lambda m: m.update(upgraded_from="0" * 64), "upgraded_from"),
    (lambda m: m.update(schema_version=1, upgraded_from=None), "upgraded_from"),
]


@pytest.mark.parametrize("number", range(len(CONTRADICTIONS)))
def test_fields_that_contradict_each_other_are_refused_by_both(
    number: int, request: pytest.FixtureRequest, full: Path, raw: Json
) -> None:
    edit, words = CONTRADICTIONS[number]
    edit(edited := copy.deepcopy(raw))
    write_manifest(full, json.dumps(edited))
    message = python_refuses(full)
    assert message is not None
    assert words in message
    told_by_c = library_refuses(request.getfixturevalue("library"), full)
    assert told_by_c is not None
    assert words in told_by_c


def test_a_projection_needs_hidden_states(library: Library, full: Path, raw: Json) -> None:
    """Vectors of another length than the hidden state's: a step must give both, as slots are fed the hidden one."""
    raw = copy.deepcopy(raw)
    raw["dim"] = 16
    for graph in ("text", "text_step"):
        grow(raw["graphs"][graph]["outputs"][0], 2, 16)
    write_manifest(full, json.dumps(raw))
    assert "hidden_states" in (python_refuses(full) or "")
    assert "hidden_states" in (library_refuses(library, full) or "")
    hidden = {"name": "hidden_states", "dtype": "float32", "shape": ["batch_size", "num_vectors", 96]}
    raw["graphs"]["text_step"]["outputs"].insert(1, hidden)
    write_manifest(full, json.dumps(raw))
    assert python_refuses(full) is None
    assert library_refuses(library, full) is None


def test_several_layers_may_take_features_of_images(library: Library, full: Path, raw: Json) -> None:
    for layers in (1, 3, 64):
        deepen(deep := copy.deepcopy(raw), {"text": layers * 96, "text_step": layers * 96}, (1 + layers) * 96)
        write_manifest(full, json.dumps(deep))
        assert python_refuses(full) is None
        assert library_refuses(library, full) is None


def test_states_side_by_side_are_no_longer_than_a_number_of_components(library: Library, full: Path, raw: Json) -> None:
    raw = copy.deepcopy(raw) | {"dim": 256, "max_sequence_length": 2**24}
    raw["query"] |= {"pooling": "concat", "num_vectors": 2**23}
    for graph in ("text", "text_step"):
        grow(raw["graphs"][graph]["outputs"][0], 2, 256)
    hidden = {"name": "hidden_states", "dtype": "float32", "shape": ["batch_size", "num_vectors", 96]}
    raw["graphs"]["text_step"]["outputs"].insert(1, hidden)
    for budget, refused in ((2**23 - 1, False), (2**23, True)):
        raw["query"]["num_vectors"] = budget
        write_manifest(full, json.dumps(raw))
        assert ("query.num_vectors" in (python_refuses(full) or "")) is refused
        assert ("query.num_vectors" in (library_refuses(library, full) or "")) is refused


@pytest.mark.parametrize("name", ["causalqwen2_5", "causalpali", "colqwen2", "colqwen3", "colpali"])
def test_manifests_of_the_exporter_are_within_the_table(name: str, bundle_of: Callable[[str], Path]) -> None:
    assert python_refuses(bundle_of(name)) is None


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 700)
    | st.integers()
    | st.floats()
    | st.sampled_from(
        [2**31, 2**53 + 1, 2**63, 10**400, 1e-7, 1e300, "constant", "feedback", "vision.onnx", "\ud800", ""]
    )
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_change_of_a_field_is_taken_by_one_and_not_by_the_other(
    library: Library, causal_bundle: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = copy_once(causal_bundle, tmp_path_factory)
    raw = read(causal_bundle)
    for _ in range(data.draw(st.integers(1, 2))):
        raw = changed(raw, data.draw(st.sampled_from(list(places(raw)))), data.draw(VALUES))
    put(root, json.dumps(raw).encode())
    python, c = told(lambda: opened(root)), library_refuses(library, root)
    assert (python is None) == (c is None), (python, c)


COPIES: dict[Path, Path] = {}


def copy_once(source: Path, factory: pytest.TempPathFactory) -> Path:
    """A bundle for manifests of any kind."""
    if source not in COPIES:
        COPIES[source] = Path(shutil.copytree(source, factory.mktemp("changed") / "bundle"))
    return COPIES[source]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"dim": 96', b'"dim": 96, "dim": 96'),
        (b'"schema_version": 2', b'"schema_version": 2, "schema_version": 1'),
        (b"{", b"\xef\xbb\xbf{"),
        (b"{", b"\0{"),
        (b'"head": "causal"', b'"head": "caus\0al"'),
        (b'"head": "causal"', b'"head": "\\ud800"'),
        (b'"head": "causal"', b'"head": "\\ud83d\\ude00"'),
        (b'"head": "causal"', b'"head": "\\u0000"'),
        (b'"head": "causal"', b'"head": "\xff"'),
        (b'"head": "causal"', b'"head": "\xed\xa0\x80"'),
        (b'"head": "causal"', b'"head": "a\tb"'),
        (b'"head": "causal"', b"'head': 'causal'"),
        (b'"head": "causal"', b'"head": "causal",'),
        (b'"head": "causal"', b'"head": "causal" // why'),
        (b'"dim": 96', b'"dim": 96.0'),
        (b'"dim": 96', b'"dim": 0x60'),
        (b'"dim": 96', b'"dim": 9600e-2'),
        (b'"dim": 96', b'"dim": -0'),
        (b'"first": 0', b'"first": -0'),
        (b'"schema_version": 2\n}\n', b'"schema_version": 2\n}\n\0'),
        (b'"schema_version": 2\n}\n', b'"schema_version": 2\n}\n{}'),
        (b'"schema_version": 2\n}\n', b'"schema_version": 2\n}\n\x0b'),
        (b'"schema_version": 2\n}\n', b'"schema_version": 2\n}  \r\n\t'),
        (b'"schema_version": 2\n}\n', b'"schema_version": 2.0\n}\n'),
    ],
)
def test_both_read_the_same_json(library: Library, causal_bundle: Path, tmp_path: Path, old: bytes, new: bytes) -> None:
    root = Path(shutil.copytree(causal_bundle, tmp_path / "bundle"))
    text = (causal_bundle / "manifest.json").read_bytes()
    assert text.count(old) >= 1
    put(root, text.replace(old, new, 1))
    python, c = python_refuses(root), library_refuses(library, root)
    assert (python is None) == (c is None), (python, c)


@pytest.mark.parametrize("step", [7])
def test_bytes_that_change_in_a_manifest_are_taken_by_both_or_by_none(
    library: Library, causal_bundle: Path, tmp_path_factory: pytest.TempPathFactory, step: int
) -> None:
    """With a digest that fits: what is left is what the two readers of JSON make of it."""
    root, text = copy_once(causal_bundle, tmp_path_factory), (causal_bundle / "manifest.json").read_bytes()
    for place in range(0, len(text), step):
        content = bytearray(text)
        content[place] ^= 1 << place % 8
        put(root, bytes(content))
        python, c = told(lambda: opened(root)), library_refuses(library, root)
        assert (python is None) == (c is None), (place, content[place], python, c)

"""A bundle is what its manifest says, to the byte, or it is refused in one line."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from cembed.runtime import Bundle, CembedError, Embedder
from cembed.runtime.errors import Check
from cembed.runtime.manifest import MANIFEST, SCHEMA_VERSION, Manifest
from cembed.runtime.quiet import ort as onnxruntime
from cembed.runtime.verify import verify

FILES = (
    "self_test.png",
    "self_test.safetensors",
    "text.data",
    "text.onnx",
    "text_step.onnx",
    "token_embeddings.bin",
    "tokenizer.json",
    "vision.data",
    "vision.onnx",
)
READ_BY_VERIFY_ONLY = ("self_test.png", "self_test.safetensors")
Json = dict[str, Any]
Edit = Callable[[Json], object]


@pytest.fixture
def bundle(causal_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(causal_bundle, tmp_path / "bundle"))


def edit_manifest(root: Path, edit: Edit) -> None:
    """Change the manifest; the sizes and hashes of the other files are brought up to date first."""
    raw = json.loads((root / MANIFEST).read_text())
    for name in raw["files"]:
        content = (root / name).read_bytes()
        raw["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(raw)
    (root / MANIFEST).write_text(json.dumps(raw))


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def use(root: Path) -> None:
    """Everything an embedder does with a bundle."""
    embedder = Embedder.load(root)
    embedder.embed_query("total")
    embedder.embed_image(Image.new("RGB", (64, 64)))
    embedder.embed_queries(["total"], decode="loop")


def refusal(action: Callable[[], object]) -> str:
    """The message of the CembedError that `action` raises: one line."""
    with pytest.raises(CembedError) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the graphs that reach ONNX Runtime."""
    names: list[str] = []
    session = onnxruntime.InferenceSession

    def record(path: str, *arguments: Any, **options: Any) -> Any:
        names.append(Path(path).name)
        return session(path, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    return names


def failed(root: Path) -> list[str]:
    return [check.name for check in verify(Bundle(root)) if not check.passed]


# The manifest alone.


@pytest.fixture(scope="module")
def manifest_text(causal_bundle: Path) -> str:
    return (causal_bundle / MANIFEST).read_text(encoding="utf-8")


def at(raw: Json, place: str) -> tuple[Any, str | int]:
    """The container of a place such as `graphs/text/inputs/0/name`, and the last key."""
    *way, last = [int(key) if key.isdecimal() else key for key in place.split("/")]
    container: Any = raw
    for key in way:
        container = container[key]
    return container, last


def test_a_manifest_survives_the_round_trip(manifest_text: str) -> None:
    manifest = Manifest.from_json(manifest_text)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.to_json() == manifest_text
    odd = replace(manifest, source={"model": 'a "quoted"\n名前/é'}, dim=1)
    assert Manifest.from_json(odd.to_json()) == odd
    assert odd != manifest


@pytest.mark.parametrize("place", ["dim", "document/slots", "image/mean", "graphs/text/file", "files/text.onnx/size"])
def test_an_unknown_field_is_named(manifest_text: str, place: str) -> None:
    raw = json.loads(manifest_text)
    container, _ = at(raw, place)
    container["surprise"] = 1
    assert "unknown fields: surprise" in refusal(lambda: Manifest.from_json(json.dumps(raw)))


@pytest.mark.parametrize(
    "place",
    ["backbone", "query", "document/prompt", "positions/first", "graphs/text/data", "files/text.onnx/size"],
)
def test_a_missing_field_is_named(manifest_text: str, place: str) -> None:
    raw = json.loads(manifest_text)
    container, key = at(raw, place)
    del container[key]
    assert f"missing fields: {key}" in refusal(lambda: Manifest.from_json(json.dumps(raw)))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("dim", "96"),
        ("dim", 96.0),
        ("dim", True),
        ("dim", None),
        ("backbone", 7),
        ("prompt_attention", "sideways"),
        ("prompt_attention", None),
        ("document", []),
        ("document/slots", "some"),
        ("document/slots", {}),
        ("document/slots", ["constant"]),
        ("document/num_vectors", "8"),
        ("document/num_vectors", 8.0),
        ("image/mean", [0.5, 0.5]),
        ("image/mean", [0.5, 0.5, "x"]),
        ("image/rescale_factor", "1/255"),
        ("image/rescale_factor", False),
        pytest.param("image/rescale_factor", 10**400, id="image/rescale_factor-too-large"),
        ("positions/axes", 2),
        ("positions/axes", 3.0),
        ("positions/axes", True),
        ("graphs", []),
        ("graphs/text", "text.onnx"),
        ("graphs/text/data", "text.data"),
        ("graphs/text/inputs/0/shape", [None]),
        ("token_embeddings/dtype", "int7"),
        ("source", {"model": 1}),
        ("files", {"text.onnx": 17411}),
        ("parity", {}),
        ("self_test/tolerance", None),
    ],
)
def test_a_field_of_another_type_is_named(manifest_text: str, place: str, value: object) -> None:
    raw = json.loads(manifest_text)
    container, key = at(raw, place)
    container[key] = value
    message = refusal(lambda: Manifest.from_json(json.dumps(raw)))
    assert all(part in message for part in place.split("/"))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_of_the_manifest_are_finite(manifest_text: str, number: str) -> None:
    text = manifest_text.replace('"tolerance": 0.0001', f'"tolerance": {number}')
    assert text != manifest_text
    refusal(lambda: Manifest.from_json(text))


@pytest.mark.parametrize(
    ("side", "change"),
    [
        ("document", {"num_vectors": None}),
        ("document", {"num_vectors": 0}),
        ("query", {"latent_token_id": None}),
        ("query", {"slots": "all_tokens"}),
        ("query", {"slots": "learned"}),
        ("query", {"slot_rows": [0, 4]}),
        ("query", {"slots": "feedback", "first_vector": "slot"}),
    ],
)
def test_a_side_contradicts_itself(manifest_text: str, side: str, change: Json) -> None:
    raw = json.loads(manifest_text)
    raw[side] |= change
    assert refusal(lambda: Manifest.from_json(json.dumps(raw)))


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (SCHEMA_VERSION + 1, "update cembed"),
        (SCHEMA_VERSION - 1, "export the bundle again"),
        ("1", "not a cembed bundle"),
        (None, "not a cembed bundle"),
    ],
)
def test_another_schema_version(manifest_text: str, version: object, words: str) -> None:
    raw = json.loads(manifest_text) | {"schema_version": version, "from_the_future": {}}
    assert words in refusal(lambda: Manifest.from_json(json.dumps(raw)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "not JSON", id="empty"),
        pytest.param(b"\x89PNG", "not UTF-8", id="png"),
        pytest.param(b'{"schema_version": 1', "not JSON", id="cut"),
        pytest.param(b"[1]", "not a cembed bundle", id="list"),
        pytest.param(b"null", "not a cembed bundle", id="null"),
        pytest.param(b"{}", "not a cembed bundle", id="object"),
        pytest.param(b'{"_class_name": "StableDiffusionPipeline"}', "not a cembed bundle", id="foreign"),
        pytest.param("{}".encode("utf-16"), "not UTF-8", id="utf-16"),
        pytest.param(b"[" * 100_000, "", id="deep"),
        pytest.param(b'{"schema_version": ' + b"9" * 5000 + b"}", "", id="long number"),
    ],
)
def test_what_is_no_manifest(bundle: Path, content: bytes, words: str) -> None:
    (bundle / MANIFEST).write_bytes(content)
    message = refusal(lambda: Bundle(bundle))
    assert words in message
    assert str(bundle) in message


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document except the root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(*way, key), *places(item, (*way, key))]]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_mutation_of_a_manifest_raises_anything_else(manifest_text: str, data: st.DataObject) -> None:
    raw = json.loads(manifest_text)
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places(raw)))
        container = raw
        for key in way:
            container = container[key]
        if data.draw(st.booleans()):
            del container[last]
        else:
            container[last] = data.draw(JSON_VALUES)
    try:
        manifest = Manifest.from_json(json.dumps(raw))
    except CembedError:
        return
    assert Manifest.from_json(manifest.to_json()).to_json() == manifest.to_json()


@settings(max_examples=100, deadline=None)
@given(text=st.text() | JSON_VALUES.map(json.dumps))
@example(text="[" * 100_000)
@example(text='{"schema_version": true}')
def test_no_text_raises_anything_else(text: str) -> None:
    with pytest.raises(CembedError):
        Manifest.from_json(text)


# The files.


def test_a_bundle_has_these_files(causal_bundle: Path) -> None:
    assert set(Bundle(causal_bundle).manifest.files) == set(FILES)
    use(causal_bundle)


def test_whoever_may_read_the_manifest_may_read_the_bundle(causal_bundle: Path) -> None:
    modes = {path.name: oct(path.stat().st_mode & 0o444) for path in causal_bundle.iterdir()}
    assert set(modes.values()) == {modes[MANIFEST]}, modes


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_before_an_engine_sees_it(bundle: Path, name: str, loaded: list[str]) -> None:
    flip_bit(bundle / name)
    if name in READ_BY_VERIFY_ONLY:
        use(bundle)
        with pytest.raises(CembedError, match=name):
            Bundle(bundle).path(name)
        return
    assert name in refusal(lambda: use(bundle))
    assert not [graph for graph in loaded if graph.startswith(name.split(".")[0])]


def test_a_damaged_vision_graph_does_not_matter_to_a_query(bundle: Path) -> None:
    flip_bit(bundle / "vision.data")
    assert len(Embedder.load(bundle).embed_query("total")) == 4


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def link(path: Path) -> None:
    elsewhere = path.parent.parent / path.name
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [Path.unlink, cut, lengthen, link, dangle, make_folder])
@pytest.mark.parametrize("name", FILES)
def test_opening_refuses_a_file_that_is_not_as_listed(
    bundle: Path, name: str, damage: Callable[[Path], object]
) -> None:
    damage(bundle / name)
    assert name in refusal(lambda: Bundle(bundle))


@pytest.mark.parametrize("add", [Path.touch, Path.mkdir, lambda path: path.symlink_to("text.onnx")])
def test_opening_refuses_a_file_that_is_not_listed(bundle: Path, add: Callable[[Path], object]) -> None:
    add(bundle / "extra.data")
    assert "extra.data" in refusal(lambda: Bundle(bundle))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "./text.onnx", "..", ".", "", "sub/", "a\0b", "x" * 300, "\ud800", MANIFEST]
)
def test_opening_refuses_a_name_that_leaves_the_folder(bundle: Path, name: str) -> None:
    (bundle.parent / "x").touch()
    record = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    edit_manifest(bundle, lambda raw: raw["files"].update({name: record}))
    refusal(lambda: Bundle(bundle))


@pytest.mark.parametrize("root", ["nowhere", "file"])
def test_what_is_no_folder(tmp_path: Path, root: str) -> None:
    (tmp_path / "file").touch()
    assert "is not a bundle" in refusal(lambda: Bundle(tmp_path / root))


def test_a_manifest_that_cannot_be_read(bundle: Path) -> None:
    make_folder(bundle / MANIFEST)
    assert MANIFEST in refusal(lambda: Bundle(bundle))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda raw: raw["graphs"]["text"]["data"].append("../secret"), "../secret"),
        (lambda raw: raw["graphs"]["text"].update(file="other.onnx"), "other.onnx"),
        (lambda raw: raw.update(tokenizer="/etc/passwd"), "/etc/passwd"),
        (lambda raw: raw["token_embeddings"].update(file="nothing.bin"), "nothing.bin"),
        (lambda raw: raw["token_embeddings"].update(rows=601), "token_embeddings.bin"),
        (lambda raw: raw["token_embeddings"].update(dtype="float16"), "token_embeddings.bin"),
        (lambda raw: raw.update(hidden_size=95), "token_embeddings.bin"),
        (lambda raw: raw["graphs"].pop("vision"), "vision"),
        (lambda raw: raw["graphs"].pop("text"), "text"),
    ],
)
def test_a_manifest_that_contradicts_the_files(bundle: Path, edit: Edit, words: str) -> None:
    edit_manifest(bundle, edit)
    assert words in refusal(lambda: use(bundle))


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", b"{}"), ("text.onnx", b"no graph"), ("vision.onnx", b""), ("vision.data", b"short")],
)
def test_a_file_that_was_replaced_with_its_hash(bundle: Path, file: str, content: bytes) -> None:
    (bundle / file).write_bytes(content)
    edit_manifest(bundle, lambda raw: None)
    assert file.split(".")[0] in refusal(lambda: use(bundle))


def test_hashes_can_be_skipped(bundle: Path) -> None:
    flip_bit(bundle / "tokenizer.json")
    with pytest.raises(CembedError, match=r"tokenizer\.json"):
        Embedder.load(bundle)
    Bundle(bundle, verify=False).path("tokenizer.json")


def test_the_hash_is_that_of_the_manifest(bundle: Path) -> None:
    before = Bundle(bundle).hash
    edit_manifest(bundle, lambda raw: raw["source"].update(model="another"))
    assert len(before) == 64
    assert Bundle(bundle).hash != before


# Verification.


def test_verify_reports_every_check(causal_bundle: Path) -> None:
    checks = list(verify(Bundle(causal_bundle)))
    assert all(check.passed for check in checks), checks
    graphs = [f"inputs and outputs of {graph}" for graph in ("vision", "text", "text_step")]
    assert {check.name for check in checks} == {*(f"sha256 of {name}" for name in FILES), *graphs, "self-test"}


@pytest.mark.parametrize("name", FILES)
def test_verify_finds_damage_and_still_reports_every_check(bundle: Path, name: str) -> None:
    expected = len(FILES) + 4
    flip_bit(bundle / name)
    checks: list[Check] = list(verify(Bundle(bundle)))
    assert f"sha256 of {name}" in [check.name for check in checks if not check.passed]
    assert len([check for check in checks if not check.passed and check.name.startswith("sha256")]) == 1
    assert len(checks) == expected


@pytest.mark.parametrize("change", ["off", "shape", "side", "garbage"])
def test_verify_finds_other_vectors_with_a_hash_that_fits(bundle: Path, change: str) -> None:
    path = bundle / "self_test.safetensors"
    vectors = load_file(path)
    if change == "off":
        vectors["query"] = vectors["query"] + 0.01
    elif change == "shape":
        vectors["query"] = vectors["query"][:-1].copy()
    elif change == "side":
        del vectors["document"]
    save_file(vectors, path)
    if change == "garbage":
        path.write_bytes(b"garbage")
    edit_manifest(bundle, lambda raw: None)
    assert failed(bundle) == ["self-test"]


@pytest.mark.parametrize("number", ["nan", "-nan"])
def test_verify_finds_vectors_of_nan(bundle: Path, number: str) -> None:
    path = bundle / "self_test.safetensors"
    vectors = load_file(path)
    vectors["document"][0, 0] = float(number)
    save_file(vectors, path)
    edit_manifest(bundle, lambda raw: None)
    assert failed(bundle) == ["self-test"]


def test_verify_finds_another_page(bundle: Path) -> None:
    Image.new("RGB", (280, 364), "black").save(bundle / "self_test.png")
    edit_manifest(bundle, lambda raw: None)
    assert failed(bundle) == ["self-test"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda graph: graph["inputs"][0].update(name="embeds"), "embeds"),
        (lambda graph: graph["inputs"][1].update(dtype="int32"), "position_ids"),
        (lambda graph: graph["outputs"][0].update(shape=["batch_size", "num_vectors", 95]), "slot_states"),
        (lambda graph: graph["inputs"].pop(), "slot_indices"),
    ],
)
def test_verify_compares_the_graphs_with_the_manifest(bundle: Path, edit: Edit, words: str) -> None:
    edit_manifest(bundle, lambda raw: edit(raw["graphs"]["text"]))
    checks = {check.name: check for check in verify(Bundle(bundle))}
    check = checks["inputs and outputs of text"]
    assert not check.passed
    assert words in check.detail
    assert checks["inputs and outputs of vision"].passed

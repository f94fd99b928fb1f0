"""A bundle is what its manifest says, to the byte, or it is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import BundleMaker
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from cembed.runtime import Bundle, CembedError, Embedder
from cembed.runtime.bundle.manifest import DIGEST, MANIFEST, OLDEST_SCHEMA, SCHEMA_VERSION, Manifest
from cembed.runtime.bundle.manifest_file import digest_line, write_manifest
from cembed.runtime.engines.quiet import ort as onnxruntime
from cembed.runtime.errors import Check
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
    write_manifest(root, json.dumps(raw))


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
        (OLDEST_SCHEMA - 1, "export the bundle again"),
        (-(10**30), "export the bundle again"),
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
    (bundle / DIGEST).write_bytes(digest_line(content))
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
    """But of weights: they are hashed while it takes them in."""
    flip_bit(bundle / name)
    if name in READ_BY_VERIFY_ONLY:
        use(bundle)
        with pytest.raises(CembedError, match=name):
            Bundle(bundle).path(name)
        return
    assert name in refusal(lambda: use(bundle))
    assert name.endswith(".data") or not [graph for graph in loaded if graph.startswith(name.split(".")[0])]


@pytest.mark.parametrize("graph", ["vision", "text", "text_step"])
def test_no_session_of_damaged_weights_is_handed_out(bundle: Path, graph: str) -> None:
    flip_bit(bundle / f"{graph.removesuffix('_step')}.data")
    embedder = Embedder.load(bundle)
    for _ in range(2):
        with pytest.raises(CembedError, match="does not match its sha256"):
            embedder.session(graph)


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


def other_dim(raw: Json) -> None:
    hidden = {"name": "hidden_states", "dtype": "float32", "shape": ["batch_size", "num_vectors", 96]}
    raw["graphs"]["text_step"]["outputs"].insert(1, hidden)
    for graph in ("text", "text_step"):
        raw["graphs"][graph]["outputs"][0]["shape"][2] = raw["dim"] = 7


def other_tokens(raw: Json) -> None:
    raw["image"]["merge_size"] = 8  # one visual token, where the graph gives 64


def other_rows(raw: Json) -> None:
    raw["document"]["prompt"] = "<image>{image}"


@pytest.mark.parametrize("edit", [other_dim, other_tokens, other_rows])
def test_a_manifest_that_only_its_graphs_contradict(bundle_of: BundleMaker, tmp_path: Path, edit: Edit) -> None:
    """It can be opened, and what it makes is refused: never vectors of another length, or another error."""
    root = Path(shutil.copytree(bundle_of("causalpali"), tmp_path / "bundle"))
    edit_manifest(root, edit)
    embedder = Embedder.load(root)
    refusal(lambda: embedder.embed_image(Image.new("RGB", (64, 64))))
    if edit is other_dim:
        assert "the manifest" in refusal(lambda: embedder.embed_query("total"))
        assert "the manifest" in refusal(lambda: embedder.embed_queries(["total"], decode="loop"))


def test_ids_that_the_table_does_not_have(bundle: Path) -> None:
    """The tokenizer has 600, and the last one is in the prompt."""

    def fewer(raw: Json) -> None:
        raw["token_embeddings"]["rows"] = 598
        raw["query"] |= {"prompt": "<|latent|>{text}", "latent_token_id": 5}
        raw["document"]["latent_token_id"] = 5

    (bundle / "token_embeddings.bin").write_bytes(bytes(598 * 96 * 4))
    edit_manifest(bundle, fewer)
    assert "no row 599" in refusal(lambda: Embedder.load(bundle).embed_query("total"))


def test_a_token_that_the_tokenizer_does_not_have(bundle: Path) -> None:
    (bundle / "token_embeddings.bin").write_bytes(bytes(700 * 96 * 4))
    edit_manifest(bundle, lambda raw: raw["token_embeddings"].update(rows=700) or raw.update(image_token_id=699))
    assert "no image token 699" in refusal(lambda: Embedder.load(bundle))


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", b"{}"), ("text.onnx", b"no graph"), ("vision.onnx", b""), ("vision.data", b"short")],
)
def test_a_file_that_was_replaced_with_its_hash(bundle: Path, file: str, content: bytes) -> None:
    (bundle / file).write_bytes(content)
    edit_manifest(bundle, lambda raw: None)
    assert file.split(".")[0] in refusal(lambda: use(bundle))


def test_hashes_can_be_skipped(bundle: Path) -> None:
    """What a graph and the tokenizer hold is looked at all the same."""
    flip_bit(bundle / "self_test.png")
    with pytest.raises(CembedError, match=r"self_test\.png"):
        Bundle(bundle).path("self_test.png")
    Bundle(bundle, verify=False).path("self_test.png")
    (bundle / "tokenizer.json").write_bytes(b"{}".ljust((bundle / "tokenizer.json").stat().st_size))
    with pytest.raises(CembedError, match=r"tokenizer\.json"):
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


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int) -> bytes:
    """A picture of one colour, whatever its size says."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 280 364\n%%EndComments\n0 0 moveto 9 9 lineto stroke\nshowpage\n"
)
PICTURES = {
    "eps": POSTSCRIPT,
    "eps in binary": struct.pack("<IIIIIIIH", 0xC6D3D0C5, 30, len(POSTSCRIPT), 0, 0, 0, 0, 0xFFFF) + POSTSCRIPT,
    "2.5 gigapixels": png(50_000, 50_000),
    "wide": png(2**31 - 1, 1),
    "cut off": png(280, 364)[:60],
    "ppm": b"P6 280 364 255\n" + bytes(280 * 364 * 3),
    "icon": b"\0\0\1\0\1\0" + bytes(64),
    "text": b"a page",
    "empty": b"",
}


@pytest.mark.parametrize("name", PICTURES)
def test_verify_opens_the_page_as_any_other_document(
    bundle: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the process that decodes, with its formats and limits: nothing else is started, and nothing is drawn."""
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(Image, "open", never)
    (bundle / "self_test.png").write_bytes(PICTURES[name])
    edit_manifest(bundle, lambda raw: None)
    checks = list(verify(Bundle(bundle)))
    assert [check.name for check in checks if not check.passed] == ["self-test"]
    assert "self-test page" in checks[-1].detail
    assert not started.exists()


def never(*_: object, **__: object) -> None:
    raise AssertionError("opened in this process")


def test_no_picture_is_opened_without_a_list_of_formats() -> None:
    """Pillow tries every format it has, and some start other programs."""
    root, found = Path(__file__).parents[1], []
    for folder in ("runtime", "cembed", "export", "quantize", "samples", "bench"):
        for path in (root / folder).glob("**/*.py"):
            text = path.read_text(encoding="utf-8")
            found += [(path.name, call) for call in re.findall(r"Image\.open\([^()]*(?:\([^()]*\))?[^()]*\)", text)]
    assert len(found) >= 4
    assert [call for call in found if "formats=" not in call[1]] == []


def safetensors(header: Json | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], end: int, dtype: str = "F32", start: int = 0) -> Json:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


QUERY = 4 * 96 * 4
DOCUMENT = 2 * QUERY
BOTH = {"document": tensor([8, 96], DOCUMENT), "query": tensor([4, 96], DOCUMENT + QUERY, start=DOCUMENT)}
VECTORS = {
    "huge shape": safetensors({"document": tensor([0, 2**62], 0), "query": tensor([0, 2**62], 0)}),
    "huge length": safetensors(BOTH, bytes(DOCUMENT + QUERY), length=2**63),
    "huge header": safetensors(BOTH, bytes(DOCUMENT + QUERY), length=2**30),
    "huge offsets": safetensors({"document": tensor([8, 96], 2**62), "query": BOTH["query"]}, bytes(DOCUMENT + QUERY)),
    "negative": safetensors({"document": tensor([-8, -96], DOCUMENT), "query": BOTH["query"]}, bytes(DOCUMENT + QUERY)),
    "many axes": safetensors({"document": tensor([2**40] * 5000, DOCUMENT), "query": BOTH["query"]}, bytes(DOCUMENT)),
    "no rows": safetensors({"document": tensor([0, 96], 0), "query": tensor([4, 96], QUERY)}, bytes(QUERY)),
    "another type": safetensors(
        {**BOTH, "query": tensor([8, 96], DOCUMENT + QUERY, "F16", DOCUMENT)}, bytes(DOCUMENT + QUERY)
    ),
    "one more": safetensors(
        {**BOTH, "more": tensor([0], DOCUMENT + QUERY, start=DOCUMENT + QUERY)}, bytes(DOCUMENT + QUERY)
    ),
    "nested": safetensors(b"[" * 100_000),
    "cut off": safetensors(BOTH, bytes(DOCUMENT + QUERY - 1)),
    "longer": safetensors(BOTH, bytes(DOCUMENT + QUERY + 1)),
    "overlapping": safetensors({**BOTH, "query": tensor([4, 96], QUERY)}, bytes(DOCUMENT)),
    "empty": b"",
    "short": b"\1\0\0\0",
}


@pytest.mark.parametrize("name", VECTORS)
def test_verify_reads_vectors_within_bounds(bundle: Path, name: str) -> None:
    (bundle / "self_test.safetensors").write_bytes(VECTORS[name])
    edit_manifest(bundle, lambda raw: None)
    checks = list(verify(Bundle(bundle)))
    assert [check.name for check in checks if not check.passed] == ["self-test"]
    assert "self_test.safetensors" in checks[-1].detail


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
def test_opening_refuses_graphs_that_no_runtime_could_feed(bundle: Path, edit: Edit, words: str) -> None:
    edit_manifest(bundle, lambda raw: edit(raw["graphs"]["text"]))
    message = refusal(lambda: Bundle(bundle))
    assert words in message
    assert "graphs.text" in message


def more_heads(step: Json) -> None:
    """Twice the heads in every cache."""
    for tensor in (*step["inputs"][4:], *step["outputs"][1:]):
        tensor["shape"][1] *= 2


@pytest.mark.parametrize(
    ("graph", "edit", "words"),
    [
        (
            "text",
            lambda graph: graph["inputs"].append({"name": "prompt_length", "dtype": "int64", "shape": [1]}),
            "prompt",
        ),
        ("text_step", more_heads, "past_key_values.0.key"),
        ("vision", lambda graph: graph["inputs"].pop(1), "patch_positions"),
    ],
)
def test_verify_compares_the_graphs_with_the_manifest(bundle: Path, graph: str, edit: Edit, words: str) -> None:
    """A manifest that no other field contradicts."""
    edit_manifest(bundle, lambda raw: edit(raw["graphs"][graph]))
    checks = {check.name: check for check in verify(Bundle(bundle))}
    check = checks.pop(f"inputs and outputs of {graph}")
    assert not check.passed
    assert words in check.detail
    others = [check for name, check in checks.items() if name.startswith("sha256") and f" {graph}.onnx" not in name]
    assert all(check.passed for check in others), checks  # no graph is opened while one of them is refused

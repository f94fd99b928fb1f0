"""What the C library refuses: arguments, inputs, bundles that are not whole, manifests as strictly as Python."""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libcembed
import numpy as np
import pytest
from conftest import GOLDEN, BundleMaker
from libcembed import Bundle, CallError, Library
from manifests import told
from PIL import Image

from cembed.runtime import CembedError, Embedder
from cembed.runtime.bundle.manifest import DIGEST, MANIFEST
from cembed.runtime.bundle.manifest_file import write_manifest
from cembed.runtime.embed.embedder import Budget

TEXT = "warranty period"


def page() -> Image.Image:
    return Image.open(GOLDEN / "causalqwen2_5" / "page.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "empty"), (" \u3000\n", "empty"), ("a <|im_end|> b", "control token"), (b"\xff\xfe", "UTF-8")],
)
def test_queries_that_are_refused(causal: Bundle, text: str | bytes, message: str) -> None:
    with pytest.raises(CallError, match=message) as error:
        causal.embed_query(text)
    assert error.value.status == libcembed.ARGUMENT
    assert "\n" not in error.value.message
    causal.embed_query(TEXT)
    assert causal.library.dll.cembed_error() == b""


def filled(source: Path, root: Path, name: str, value: float) -> Path:
    """A bundle whose weights in a file are all of one value."""
    shutil.copytree(source, root)
    data = root / name
    data.write_bytes(np.full(data.stat().st_size // 4, value, np.float32).tobytes())
    raw = json.loads((root / MANIFEST).read_text())
    raw["files"][name]["sha256"] = hashlib.sha256(data.read_bytes()).hexdigest()
    write_manifest(root, json.dumps(raw))
    return root


@pytest.mark.parametrize("value", [np.nan, 0.0, 1e30])
@pytest.mark.parametrize("name", ["text.data", "vision.data"])
def test_what_a_model_gave_is_named_as_in_python(
    library: Library, causal_bundle: Path, tmp_path: Path, name: str, value: float
) -> None:
    root = filled(causal_bundle, tmp_path / "bundle", name, value)
    embedder, bundle = Embedder.load(root), library.open(root)
    calls = [
        (lambda: embedder.embed_image(page()), lambda: bundle.embed_image(page())),
        (lambda: embedder.embed_query(TEXT), lambda: bundle.embed_query(TEXT)),
        (lambda: embedder.embed_query(TEXT, Budget(decode="loop")), lambda: bundle.embed_query(TEXT, loop=1)),
    ]
    said = [(told(theirs), told(ours)) for theirs, ours in calls]
    assert all(theirs == ours for theirs, ours in said), said
    graphs = ["text", "text", "text_step"] if name == "text.data" else ["vision" if value else "text", None, None]
    for (_, message), graph in zip(said, graphs, strict=True):
        assert message is None or message.startswith(f"graph {graph}, of this ")
    assert name != "text.data" or all(message for _, message in said)
    bundle.close()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"num_vectors": -1}, "at least 1"),
        ({"num_vectors": 1 << 30}, "positions"),
        ({"dim": 97}, "have 96"),
        ({"dim": -1}, "have 96"),
    ],
)
def test_budgets_that_are_refused(causal: Bundle, budget: dict[str, int], message: str) -> None:
    with pytest.raises(CallError, match=message) as error:
        causal.embed_query(TEXT, **budget)
    assert error.value.status == libcembed.ARGUMENT


def test_arguments_that_are_refused(
    library: Library, causal: Bundle, causal_bundle: Path, bundle_of: BundleMaker
) -> None:
    refused = [
        (causal_bundle, {"abi_version": 99}, libcembed.ARGUMENT, "version 99"),
        (causal_bundle, {"threads": -1}, libcembed.ARGUMENT, "threads"),
        (causal_bundle, {"max_visual_tokens": 1 << 20}, libcembed.ARGUMENT, "max_visual_tokens"),
        (causal_bundle, {"provider": b"NoSuchProvider"}, libcembed.ENGINE, "CPUExecutionProvider"),
        (causal_bundle, {"onnxruntime": b"/nowhere/libonnxruntime.so"}, libcembed.ENGINE, "CEMBED_ONNXRUNTIME"),
        (Path("/nowhere"), {}, libcembed.BUNDLE, "not a bundle"),
    ]
    for path, options, status, message in refused:
        with pytest.raises(CallError, match=message) as error:
            library.open(path, **options)
        assert error.value.status == status, options
    with pytest.raises(CallError, match="every token"):
        library.open(bundle_of("colqwen2")).start(TEXT)
    with pytest.raises(CallError, match="null"):
        library.call("cembed_embed_image", None, None, None, None)
    with pytest.raises(CallError, match="no image"):
        library.vectors(lambda to: library.call("cembed_embed_image", causal.handle, None, None, to))
    for width, height, stride in ((0, 9, 27), (9, -1, 27), (9, 9, 26), (1 << 30, 1, 3 << 30), (801, 2, 2403)):
        image = libcembed.RgbImage(memory_of_an_image.ctypes.data, width, height, stride)
        with pytest.raises(CallError):
            library.vectors(lambda to: library.call("cembed_embed_image", causal.handle, ctypes.byref(image), None, to))  # noqa: B023


memory_of_an_image = np.zeros(8192, np.uint8)


def copy_of(bundle: Path, to: Path) -> Path:
    return Path(shutil.copytree(bundle, to))


def test_bundles_that_are_refused(library: Library, causal_bundle: Path, tmp_path: Path) -> None:
    """A byte of any file, a file too many, too few, a link."""
    names = sorted(path.name for path in causal_bundle.iterdir() if path.name not in (MANIFEST, DIGEST))
    for name in names:
        root = copy_of(causal_bundle, tmp_path / f"flipped-{name}")
        raw = bytearray((root / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (root / name).write_bytes(raw)
        if name.startswith("self_test"):
            continue  # nothing here reads it
        with pytest.raises(CallError, match="sha256") as error:
            use(library, root)
        assert error.value.status == libcembed.BUNDLE
    more, fewer, link = (copy_of(causal_bundle, tmp_path / name) for name in ("more", "fewer", "link"))
    (more / "note.txt").write_text("")
    (fewer / "tokenizer.json").unlink()
    (link / "text.data").rename(tmp_path / "text.data")
    (link / "text.data").symlink_to(tmp_path / "text.data")
    for root, message in ((more, "note.txt"), (fewer, "tokenizer.json"), (link, "link")):
        with pytest.raises(CallError, match=message):
            library.open(root)


def use(library: Library, root: Path) -> None:
    bundle = library.open(root)
    try:
        bundle.embed_image(page())
        state = bundle.start(TEXT)
        state.close()
    finally:
        bundle.close()


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a manifest, one of each list and of each object with names of its own."""
    yield at
    if isinstance(value, dict):
        keys = list(value)[:1] if at in (("graphs",), ("files",), ("source",), ("made_with",)) else list(value)
        for key in keys:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*at, 0))


def changed(manifest: Any, at: tuple[Any, ...], how: str) -> str:
    """The manifest with the value at a place dropped, of another kind, or with a stranger in it."""
    copy = json.loads(json.dumps(manifest))
    parent = copy
    for key in at[:-1]:
        parent = parent[key]
    if how == "dropped":
        del parent[at[-1]]
    elif how == "stranger" and isinstance(parent[at[-1]], dict):
        parent[at[-1]]["stranger"] = 1
    else:
        parent[at[-1]] = {"number": 1.5, "null": None, "list": [], "text": "none", "stranger": True}[how]
    return json.dumps(copy)


@pytest.mark.parametrize("how", ["dropped", "stranger", "number", "null", "list", "text"])
def test_manifests_are_read_as_strictly_as_by_python(
    library: Library, causal_bundle: Path, how: str, tmp_path: Path
) -> None:
    root = copy_of(causal_bundle, tmp_path / "bundle")
    manifest = json.loads((root / "manifest.json").read_text())
    refused = 0
    for at in places(manifest):
        if not at:
            continue
        write_manifest(root, changed(manifest, at, how))
        assert opens(lambda: library.open(root).close()) == opens(lambda: Embedder.load(root)), (at, how)
        refused += not opens(lambda: library.open(root).close())
    assert refused > 20


def opens(call: Any) -> bool:
    try:
        call()
    except (CallError, CembedError):
        return False
    return True


@pytest.mark.parametrize(
    ("at", "value"),
    [(("positions", "first"), 2**63 - 1), (("positions", "first"), -1), (("image", "window_size"), 2**63 - 1),
     (("image", "patch_size"), 2**40), (("hidden_size",), 0), (("document", "num_vectors"), 2**62)],
)  # fmt: skip
def test_numbers_that_cannot_be_computed_with(
    library: Library, causal_bundle: Path, at: tuple[str, ...], value: int, tmp_path: Path
) -> None:
    root = copy_of(causal_bundle, tmp_path / "bundle")
    manifest = json.loads((root / "manifest.json").read_text())
    inner = manifest
    for name in at[:-1]:
        inner = inner[name]
    inner[at[-1]] = value
    write_manifest(root, json.dumps(manifest))
    with pytest.raises(CallError, match=f"{at[-1]}.* out of range"):
        library.open(root)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "{", '{"schema_version": 99}', '{"schema_version": 1}', "[" * 100_000, "\xff"]
)
def test_what_is_no_manifest(library: Library, text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text, "latin-1")
    with pytest.raises(CallError) as error:
        library.open(tmp_path)
    assert error.value.status == libcembed.BUNDLE


FAKE = """
struct base { const void *(*api)(unsigned); const char *(*version)(void); };
static const void *api(unsigned version) { return 0; }
static const char *version(void) { return VERSION; }
const struct base *OrtGetApiBase(void) { static struct base found = {api, version}; return &found; }
"""


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("1.23.2", "ONNX Runtime 1.23.2 is too old: 1.24 or later is needed"),
        ("1.16.0", "ONNX Runtime 1.16.0 is too old: 1.24 or later is needed"),
        ("0.99.1", "ONNX Runtime 0.99.1 is too old: 1.24 or later is needed"),
        ("", "ONNX Runtime  is too old: 1.24 or later is needed"),
        ("nightly", "ONNX Runtime nightly is too old: 1.24 or later is needed"),
        ("1.24.0", "does not have the functions"),
        ("2.0", "does not have the functions"),
    ],
)
def test_versions_of_onnxruntime(
    library: Library, causal_bundle: Path, version: str, message: str, tmp_path: Path
) -> None:
    """Earlier ones open whatever file a tensor names."""
    (tmp_path / "fake.c").write_text(FAKE)
    out = tmp_path / "libonnxruntime.so"
    libcembed.run("cc", "-shared", "-fPIC", f'-DVERSION="{version}"', "-o", out, tmp_path / "fake.c")
    with pytest.raises(CallError, match=message) as error:
        library.open(causal_bundle, onnxruntime=str(out).encode())
    assert error.value.status == libcembed.ENGINE
    assert "\n" not in error.value.message

"""The C library against the Python runtime: the same vectors, pages and refusals. Built here; skipped without its needs."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import libcembed
import numpy as np
import onnxruntime
import pytest
from conftest import BACKBONE_OF, CAUSAL, GOLDEN, BundleMaker
from libcembed import Bundle, CallError, Library
from PIL import Image
from reference import Zoo

import cembed
from cembed.export.exporter import export
from cembed.export.plan import ExportOptions
from cembed.quantize.plan import QuantiseOptions
from cembed.quantize.quantizer import quantise
from cembed.runtime import CembedError, Embedder, maxsim
from cembed.runtime.embedder import Budget
from cembed.runtime.evaluate import Dataset
from cembed.runtime.manifest import SCHEMA_VERSION

ROOT = Path(__file__).resolve().parents[1]
NATIVE, CONSUMER, SAMPLES = ROOT / "runtime" / "native", ROOT / "tests" / "consumer", ROOT / "samples"
HEADERS = ("onnxruntime_c_api.h", "nlohmann/json.hpp", "openssl/evp.h", "zlib.h")
FOLDERS = ("", "include", "include/onnxruntime", "usr/include/onnxruntime", "include/onnxruntime/core/session")
IMAGES = ("page", "wide", "small")
TEXT = "warranty period"
API = """
abi_version close embed_image embed_query error extend get_info hits_free index_close index_get_info index_open
index_search kernels load maxsim open schema_version start_image start_query state_close vectors_free version
""".split()


def missing() -> str | None:
    """What the build lacks here, in words."""
    if tools := [tool for tool in ("cmake", "c++", "cc") if shutil.which(tool) is None]:
        return f"no {', '.join(tools)}"
    root = Path(os.environ.get("ONNXRUNTIME_ROOT", "/usr"))
    places = [f"-I{root / folder}" for folder in FOLDERS]
    for header in HEADERS:
        command = ["c++", "-x", "c++", "-fsyntax-only", *places, "-include", header, os.devnull]
        if subprocess.run(command, capture_output=True).returncode:
            return f"no {header}; ONNXRUNTIME_ROOT is {os.environ.get('ONNXRUNTIME_ROOT', 'not set')}"
    return None


LACKING = missing()
pytestmark = pytest.mark.skipif(LACKING is not None, reason=f"libcembed is not built: {LACKING}")


def run(*command: str | Path, **variables: str) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env={**os.environ, **variables})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def built() -> Path:
    """The folder that the library was built in."""
    folder = ROOT / "build" / "lib"
    root = os.environ.get("ONNXRUNTIME_ROOT", "")
    run("cmake", "-S", NATIVE, "-B", folder, f"-DONNXRUNTIME_ROOT={root}", "-DCEMBED_BUILD_SAMPLES=OFF")
    run("cmake", "--build", folder, "--parallel", "2")
    return folder


@pytest.fixture(scope="session")
def onnxruntime_library() -> Path:
    return next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))


@pytest.fixture(scope="session")
def library(built: Path, onnxruntime_library: Path) -> Library:
    return Library(built / "libcembed.so", onnxruntime_library)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("libcembed") / "sample"
    export(ExportOptions("qwen2.5-vl", str(SAMPLES / "model"), slot_positions="continue"), out)
    return out


@pytest.fixture
def causal(library: Library, causal_bundle: Path) -> Iterator[Bundle]:
    bundle = library.open(causal_bundle)
    yield bundle
    bundle.close()


def page() -> Image.Image:
    return Image.open(GOLDEN / "causalqwen2_5" / "page.png")


def close(actual: Any, expected: Any) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


# Vectors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONE_OF)
def test_vectors_are_those_of_python(library: Library, name: str, bundle_of: BundleMaker) -> None:
    embedder, bundle = Embedder.load(bundle_of(name)), library.open(bundle_of(name))
    for image in IMAGES:
        picture = Image.open(GOLDEN / name / f"{image}.png").convert("RGB")
        close(bundle.embed_image(picture), embedder.embed_image(picture))
    for text in json.loads((GOLDEN / name / "queries.json").read_text()):
        close(bundle.embed_query(text), embedder.embed_query(text))
    if name in CAUSAL:
        close(bundle.embed_image(picture, loop=1), embedder.embed_image(picture, Budget(decode="loop")))
        close(bundle.embed_image(picture, num_vectors=3, dim=16), embedder.embed_image(picture, Budget(3, 16)))
        close(bundle.embed_query(TEXT, num_vectors=9), embedder.embed_query(TEXT, Budget(9)))
    bundle.close()


@pytest.mark.parametrize("name", ["projected", "shallow", "qwen2-vl"])
def test_heads_are_those_of_python(library: Library, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fed-back slots behind a projection and without one, learned slots, pooled ones."""
    root = tmp_path_factory.getbasetemp() / "zoo"
    root.mkdir(exist_ok=True)
    embedder = Zoo(root).model(name).embedder
    bundle = library.open(embedder.bundle.root)
    picture = page().resize((90, 60))
    close(bundle.embed_image(picture), embedder.embed_image(picture))
    close(bundle.embed_query(TEXT), embedder.embed_query(TEXT))
    close(bundle.embed_query(TEXT, num_vectors=2, dim=8), embedder.embed_query(TEXT, Budget(2, 8)))
    state = bundle.start(TEXT)
    close(state.extend(3), embedder.embed_query(TEXT, Budget(3)))
    state.close()
    bundle.close()


@pytest.mark.parametrize("embeddings", ["fp16", "int8"])
def test_stored_rows_are_those_of_python(library: Library, causal_bundle: Path, embeddings: str, tmp_path: Path) -> None:
    options = QuantiseOptions("int8", embeddings=embeddings, accept_loss=True)
    quantise(causal_bundle, options, tmp_path / "q")
    bundle = library.open(tmp_path / "q")
    close(bundle.embed_query(TEXT), Embedder.load(tmp_path / "q").embed_query(TEXT))
    bundle.close()


def test_the_sample_model_finds_the_same_pages(library: Library, sample: Path) -> None:
    data = Dataset.read(SAMPLES / "pages" / "sample")
    files = sorted((SAMPLES / "pages" / "sample" / "pages").iterdir())
    assert len(files) >= 60
    images = [Image.open(file).convert("RGB") for file in files]
    texts = list(data.queries.values())
    embedder, bundle = Embedder.load(sample), library.open(sample)
    theirs, ours = embedder.embed_images(images), [bundle.embed_image(image) for image in images]
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    for text in texts:
        query = bundle.embed_query(text)
        close(query, embedder.embed_query(text))
        scores = library.maxsim(query, ours)
        expected = maxsim([embedder.embed_query(text)], theirs)[0]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
        assert np.argsort(-scores)[:5].tolist() == np.argsort(-expected)[:5].tolist()
    bundle.close()


def test_rows_of_an_image_may_lie_apart(causal: Bundle) -> None:
    whole = np.asarray(page().convert("RGB"))
    part = whole[3:60, 5:70]
    assert not part.flags.c_contiguous
    close(causal.embed_image(part), causal.embed_image(np.ascontiguousarray(part)))


def test_fewer_visual_tokens(library: Library, causal_bundle: Path) -> None:
    bundle = library.open(causal_bundle, max_visual_tokens=20, threads=1, mapped_weights=1)
    assert bundle.info.max_visual_tokens == 20
    close(bundle.embed_image(page()), Embedder.load(causal_bundle, max_visual_tokens=20).embed_image(page()))
    bundle.close()


def test_sixteen_callers_get_what_one_gets(library: Library, causal_bundle: Path) -> None:
    bundle = library.open(causal_bundle)
    jobs: list[Any] = [f"question {i}" for i in range(60)] + [page().resize((60 + i, 50)) for i in range(20)]

    def embed(job: Any) -> Any:
        return bundle.embed_query(job) if isinstance(job, str) else bundle.embed_image(job)

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(embed, jobs))
    for job, vectors in zip(jobs, together, strict=True):
        np.testing.assert_array_equal(vectors, embed(job))
    bundle.close()


# Buffers, states, scores ----------------------------------------------------------------------------------------------


def test_a_callers_buffer(library: Library, causal: Bundle) -> None:
    expected, raw = causal.embed_query(TEXT), TEXT.encode()
    memory = np.full(expected.size + 1, 7, np.float32)
    place = memory.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    arguments = causal.handle, raw, ctypes.c_size_t(len(raw)), None
    small = libcembed.VectorBuffer(place, expected.size - 1)
    with pytest.raises(CallError) as error:
        library.call("cembed_embed_query", *arguments, ctypes.byref(small))
    assert error.value.status == libcembed.CAPACITY
    assert (small.rows, small.dim) == expected.shape
    assert (memory == 7).all()
    enough = libcembed.VectorBuffer(place, expected.size)
    library.call("cembed_embed_query", *arguments, ctypes.byref(enough))
    np.testing.assert_array_equal(memory[:-1].reshape(expected.shape), expected)
    assert memory[-1] == 7
    assert not enough.owned


def test_states_grow(causal: Bundle, causal_bundle: Path) -> None:
    embedder = Embedder.load(causal_bundle)
    state, theirs = causal.start(page(), 12), embedder.start(page(), 12)
    for budget in (3, 12, 5):
        close(state.extend(budget), theirs.extend(budget))
    with pytest.raises(CallError, match="room for 12"):
        state.extend(13)
    causal.close()  # a state may outlive the handle of its bundle
    close(state.extend(4), theirs.extend(4))
    state.close()


def test_states_are_bounded(library: Library, causal_bundle: Path) -> None:
    bundle = library.open(causal_bundle, state_memory=Embedder.load(causal_bundle).start(TEXT_PAGE).nbytes)
    first = bundle.start(TEXT_PAGE)
    with pytest.raises(CallError, match="state_memory") as error:
        bundle.start(TEXT_PAGE)
    assert error.value.status == libcembed.MEMORY
    first.close()
    bundle.start(TEXT_PAGE).close()
    bundle.close()


TEXT_PAGE = Image.new("RGB", (80, 60), "white")


def test_maxsim_is_that_of_python(library: Library) -> None:
    random = np.random.default_rng(0)
    pages = [random.standard_normal((rows, 24)).astype(np.float32) for rows in (1, 40, 3)]
    query = random.standard_normal((5, 24)).astype(np.float32)
    np.testing.assert_array_equal(library.maxsim(query, pages), maxsim([query], pages)[0])
    assert library.maxsim(query, []).shape == (0,)
    with pytest.raises(CallError, match="NaN"):
        library.maxsim(query * np.nan, pages)


# Refusals -------------------------------------------------------------------------------------------------------------


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


def test_arguments_that_are_refused(library: Library, causal: Bundle, causal_bundle: Path, bundle_of: BundleMaker) -> None:
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
    names = sorted(path.name for path in causal_bundle.iterdir() if path.name != "manifest.json")
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
def test_manifests_are_read_as_strictly_as_by_python(library: Library, causal_bundle: Path, how: str, tmp_path: Path) -> None:
    root = copy_of(causal_bundle, tmp_path / "bundle")
    manifest = json.loads((root / "manifest.json").read_text())
    refused = 0
    for at in places(manifest):
        if not at:
            continue
        (root / "manifest.json").write_text(changed(manifest, at, how))
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
    "text", ["", "[]", "{}", "{", '{"schema_version": 99}', '{"schema_version": 1}', "[" * 100_000, "\xff"]
)
def test_what_is_no_manifest(library: Library, text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text, "latin-1")
    with pytest.raises(CallError) as error:
        library.open(tmp_path)
    assert error.value.status == libcembed.BUNDLE


# The library for others ------------------------------------------------------------------------------------------------


def test_versions(library: Library, causal: Bundle, causal_bundle: Path) -> None:
    assert library.dll.cembed_abi_version() == libcembed.ABI_VERSION
    assert library.dll.cembed_version().decode() == cembed.__version__
    assert library.dll.cembed_schema_version() == SCHEMA_VERSION
    assert library.dll.cembed_kernels(0)
    assert library.dll.cembed_kernels(99) is None
    info, embedder = causal.info, Embedder.load(causal_bundle)
    assert (info.hash.decode(), info.backbone.decode()) == (embedder.bundle.hash, "qwen2.5-vl")
    assert (info.document_vectors, info.document_dim, info.query_vectors, info.query_dim) == (8, 96, 4, 96)


def test_it_shows_the_api_and_nothing_else(built: Path) -> None:
    lines = run("nm", "-D", "--defined-only", built / "libcembed.so").splitlines()
    assert sorted(line.split()[-1] for line in lines) == [f"cembed_{name}" for name in sorted(API)]


@pytest.fixture(scope="session")
def prefix(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", built, "--prefix", folder)
    return folder


@pytest.fixture(scope="session")
def consumers(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Programs in C and C++, by find_package and by pkg-config."""
    folder: Path = tmp_path_factory.mktemp("consumer")
    shutil.copytree(CONSUMER, folder / "source")
    run("cmake", "-S", folder / "source", "-B", folder / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", folder / "build")
    made = [folder / "build" / "consumer_c", folder / "build" / "consumer_cpp"]
    if shutil.which("pkg-config"):
        (places,) = {str(path.parent) for path in prefix.rglob("cembed.pc")}
        flags = run("pkg-config", "--cflags", "--libs", "cembed", PKG_CONFIG_PATH=places).split()
        for compiler, source in (("cc", "consumer.c"), ("c++", "consumer.cpp")):
            made.append(folder / f"{compiler}.out")
            standard = "-std=c99" if compiler == "cc" else "-std=c++17"
            run(compiler, standard, folder / "source" / source, *flags, "-o", made[-1])
    return made


def test_a_project_elsewhere(
    consumers: list[Path], prefix: Path, causal_bundle: Path, onnxruntime_library: Path
) -> None:
    vectors = Embedder.load(causal_bundle).embed_query(TEXT)
    (libraries,) = {str(path.parent) for path in prefix.rglob("libcembed.so")}
    variables = {"LD_LIBRARY_PATH": libraries, "CEMBED_ONNXRUNTIME": str(onnxruntime_library)}
    for consumer in consumers:
        rows, dim, total = run(consumer, causal_bundle, TEXT, **variables).split()
        assert (int(rows), int(dim)) == vectors.shape
        assert float(total) == pytest.approx(float(vectors.sum()), abs=1e-4)
        failed = subprocess.run([consumer, "/nowhere", TEXT], capture_output=True, text=True, env={**os.environ, **variables})
        assert failed.returncode == 1
        assert "not a bundle" in failed.stderr

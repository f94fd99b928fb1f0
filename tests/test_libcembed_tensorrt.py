"""TensorRT engines in the C library, on a fake device that keeps the rules: they give what ONNX Runtime gives.

Nothing here runs on a GPU. With TENSORRT_ROOT set the same source is compiled against TensorRT's own headers.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import libcembed
import numpy as np
import pytest
from conftest import BundleMaker
from libcembed import CallError, Library, run
from preparation import pillows_pixels
from test_trt_session import page

from cembed.runtime import Embedder
from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.embed.embedder import Budget
from cembed.runtime.engines.build import EngineCache, profiles
from cembed.runtime.engines.build import Library as TensorRt
from cembed.runtime.engines.cuda import GpuInfo
from cembed.runtime.engines.memory import EngineLimits

SOURCES = [libcembed.ROOT / "runtime" / "native" / "lib" / name for name in ("tensorrt.cpp", "trt_engine.cpp")]
FAKE = Path(__file__).parent / "native"
TOLERANCE = 1e-5
COMPILE = ("c++", "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-DCEMBED_TENSORRT")
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


@pytest.fixture(scope="session")
def fake(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library, built for a TensorRT that is a fake, and the fake."""
    folder: Path = tmp_path_factory.mktemp("tensorrt")
    root = Path(os.environ.get("ONNXRUNTIME_ROOT", "/usr"))
    places = [f"-I{FAKE / 'fake'}", *(f"-I{root / part}" for part in libcembed.FOLDERS)]
    sources = FAKE / "fake_tensorrt.cpp", SOURCES[0].with_name("engine.cpp")
    name = "libnvinfer.so.10"
    hidden = "-fvisibility-inlines-hidden", "-Wl,-Bsymbolic", "-shared", f"-Wl,-soname,{name}"
    run(*COMPILE, *places, *hidden, *sources, "-o", folder / name, "-ldl")
    objects = {path.name: path for path in built.glob("CMakeFiles/cembed.dir/**/*.o")}
    for source in SOURCES:
        objects[f"{source.name}.o"] = folder / f"{source.name}.o"
        run(*COMPILE, *places, "-c", source, "-o", objects[f"{source.name}.o"])
    libraries = f"-L{folder}", f"-l:{name}", "-lcrypto", "-lz", "-ldl", f"-Wl,-rpath,{folder}"
    run("c++", "-shared", *objects.values(), *libraries, "-o", folder / "libcembed.so")
    return folder


@pytest.fixture(scope="session")
def tensorrt(fake: Path, onnxruntime_library: Path) -> Library:
    os.environ["CEMBED_ONNXRUNTIME"] = str(onnxruntime_library)  # for the fake
    return Library(fake / "libcembed.so", onnxruntime_library)


def cache_of(bundle: Bundle) -> EngineCache:
    library = TensorRt(SimpleNamespace(__version__="10.16.0.72"), "tensorrt")
    return EngineCache(bundle, library, GpuInfo("Fake GPU", (8, 7), False))


def build_engines(root: Path, aliased: bool = True, without: str = "") -> EngineCache:
    """Engines beside a bundle, as `cembed build-engine` leaves them."""
    bundle = Bundle(root)
    cache = cache_of(bundle)
    shutil.rmtree(cache.folder, ignore_errors=True)
    cache.folder.mkdir()
    for name, graph in bundle.manifest.graphs.items():
        plan = {
            "model": str(bundle.graph_path(name)),
            "aliased": aliased,
            "group": bundle.manifest.image.merge_size**2,
            "profiles": profiles(name, EngineLimits.of(bundle), bundle.manifest),
            "inputs": [{**asdict(tensor), "output": False} for tensor in graph.inputs],
            "outputs": [{**asdict(tensor), "output": True} for tensor in graph.outputs],
        }
        if name != without:
            cache.write(name, json.dumps(plan).encode(), {})
    return cache


Opener = Callable[..., tuple[libcembed.Bundle, Embedder]]


@pytest.fixture
def open_both(tensorrt: Library, tensorrt_bundle_of: BundleMaker) -> Opener:
    def make(name: str, aliased: bool = True) -> tuple[libcembed.Bundle, Embedder]:
        build_engines(tensorrt_bundle_of(name), aliased)
        root = tensorrt_bundle_of(name)
        return tensorrt.open(root, provider=b"tensorrt"), Embedder.load(root)

    return make


def count(fake: Path, what: str) -> int:
    function = ctypes.CDLL(str(fake / "libnvinfer.so.10")).fake_count
    function.restype = ctypes.c_int64
    return int(function(what.encode()))


def close(ours: Any, theirs: Any) -> None:
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pillows_pixels
@pytest.mark.parametrize("name", ["causalqwen2_5", "causalpali", "colqwen2"])
def test_vectors_are_those_of_the_cpu(name: str, open_both: Opener, fake: Path) -> None:
    """Shapes come again, so that runs are replayed, and some are given up for others."""
    ours, cpu = open_both(name)
    before = count(fake, "launch")
    for seed, size in enumerate([(300, 200), (120, 400), (300, 200), (300, 200)]):
        close(ours.embed_image(page(*size, seed)), cpu.embed_image(page(*size, seed)))
    for text in [
        "one",
        "a rather longer query about invoices",
        "one",
        "one",
        *(f"{'many ' * n}words" for n in range(40)),
    ]:
        close(ours.embed_query(text), cpu.embed_query(text))
    assert count(fake, "launch") > before
    ours.close()


def test_a_graph_is_captured_once_for_a_shape(open_both: Opener, fake: Path) -> None:
    ours, _ = open_both("causalqwen2_5")
    by_hand, captured, launched = (count(fake, what) for what in ("engine", "captured engine", "launch"))
    for text in ("one", "one two", "one two three", "one"):  # which are filled up to one length
        ours.embed_query(text)
    assert count(fake, "engine") == by_hand + 1
    assert count(fake, "captured engine") == captured + 1
    assert count(fake, "launch") == launched + 3
    ours.close()


@pillows_pixels
@pytest.mark.parametrize("aliased", [True, False], ids=["in place", "copied"])
@pytest.mark.parametrize("name", ["causalqwen2_5", "causalpali"])
def test_the_loop_keeps_its_cache_on_the_device(name: str, aliased: bool, open_both: Opener, fake: Path) -> None:
    blocks = count(fake, "blocks")
    ours, cpu = open_both(name, aliased)
    for seed in range(3):  # the third page finds the cache of the first
        close(
            ours.embed_image(page(300, 200, seed), loop=1), cpu.embed_image(page(300, 200, seed), Budget(decode="loop"))
        )
    one, two = ours.start(page(300, 200, 1), 6), ours.start("a query", 6)
    theirs = cpu.start(page(300, 200, 1), 6), cpu.start_query("a query", 6)
    for budget in (2, 4, 6):
        close(one.extend(budget), theirs[0].extend(budget))
        close(two.extend(budget), theirs[1].extend(budget))
    one.close()
    ours.close()  # before a state of its
    two.close()
    assert count(fake, "blocks") == blocks


def test_a_cache_holds_what_it_was_exported_for(open_both: Opener) -> None:
    ours, cpu = open_both("causalqwen2_5")
    with pytest.raises(Exception, match="the bundle's cache has") as theirs:
        cpu.start_query("a query", 4000)
    with pytest.raises(CallError) as error:
        ours.start("a query", 4000)
    assert error.value.message == str(theirs.value)
    ours.close()


def test_what_is_refused(
    tensorrt: Library,
    library: Library,
    tensorrt_bundle_of: BundleMaker,
    causal_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tensorrt_bundle_of("causalqwen2_5")

    def refused(message: str, where: Library = tensorrt, bundle: Path = root) -> None:
        with pytest.raises(CallError, match=message) as error:
            where.open(bundle, provider=b"tensorrt").embed_query("a query")
        assert error.value.status == libcembed.ENGINE

    cache = build_engines(root, without="text")
    refused(f"there is no engine of text for {cache.device}: run `cembed build-engine {root}` on this device")
    cache = build_engines(root, without="text_step")
    with pytest.raises(CallError, match=f"run `cembed build-engine {root} --loop`"):
        tensorrt.open(root, provider=b"tensorrt").start("a query")
    path = cache.path("text")
    path.write_bytes(path.read_bytes() + b" ")
    refused("is damaged: run `cembed build-engine")
    cache.write("text", b"nothing", {})
    refused("cannot load the engine of text: this is no plan")
    with pytest.raises(CallError, match=r"takes inputs_embeds from \(1, 3, .* build it with larger limits"):
        tensorrt.open(root, provider=b"tensorrt").embed_query("many words " * 500) if build_engines(root) else None
    refused("this bundle is for onnxruntime: export it with --target tensorrt", bundle=causal_bundle)
    refused("this libcembed was built without TensorRT", library)
    monkeypatch.setenv("FAKE_TENSORRT", "101500")
    refused("built for TensorRT 10.16.0, here is 10.15.0")


def test_it_compiles_with_tensorrts_headers() -> None:
    """10.3, 10.16, 11.0 and 11.1 were tried."""
    root = Path(os.environ.get("TENSORRT_ROOT", "/usr"))
    found = (
        next((path.parent for path in root.rglob("NvInferRuntime.h")), None) if "TENSORRT_ROOT" in os.environ else None
    )
    if found is None or not (CUDA / "include" / "cuda_runtime_api.h").exists():
        pytest.skip("TENSORRT_ROOT names no headers of TensorRT, or CUDA_HOME none of CUDA")
    places = "-isystem", found, "-isystem", CUDA / "include"
    run(*COMPILE, "-Werror", "-fsyntax-only", *places, *SOURCES)

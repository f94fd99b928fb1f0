"""Native TensorRT sessions, on a fake device that keeps the rules: they give what ONNX Runtime gives on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import BundleMaker
from fake_gpu import FakeContext, FakeCuda, FakeEngine, FakeTrt
from PIL import Image
from reference import Zoo
from test_cli import cembed
from test_qwen3_5 import options as qwen3_5_options

from cembed.export.plan import ExportOptions
from cembed.runtime import CembedError, Embedder
from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.embed.embedder import Budget
from cembed.runtime.engines.build import EngineCache, Library, profiles
from cembed.runtime.engines.cuda import Cuda
from cembed.runtime.engines.memory import EngineLimits

TOLERANCE = 1e-5
LOOP = Budget(8, decode="loop")


def page(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@dataclass
class Rig:
    """A bundle with fake engines beside it."""

    bundle: Path
    cuda: FakeCuda
    trt: FakeTrt

    def open(self) -> Embedder:
        return Embedder.load(self.bundle, providers=["tensorrt"])

    @property
    def cpu(self) -> Embedder:
        return Embedder.load(self.bundle)


@pytest.fixture
def rig_of(tensorrt_bundle_of: BundleMaker, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rig]:
    def make(name: str | Path, aliased: bool = True) -> Rig:
        bundle = Bundle(tensorrt_bundle_of(name) if isinstance(name, str) else name)
        cuda = FakeCuda()
        trt = FakeTrt(cuda, {bundle.root / g.file: g for g in bundle.manifest.graphs.values()}, aliased)
        cache = EngineCache(bundle, Library(trt, "tensorrt"), Cuda(cuda).gpu())
        cache.folder.mkdir(exist_ok=True)
        for graph, spec in bundle.manifest.graphs.items():
            cache.write(graph, str(bundle.root / spec.file).encode(), {})
            trt.profiles[graph] = profiles(graph, EngineLimits.of(bundle), bundle.manifest)
        monkeypatch.setattr(Library, "load", lambda: cache.library)
        monkeypatch.setattr("cembed.runtime.engines.cuda.load_api", lambda: cuda)
        return Rig(bundle.root, cuda, trt)

    return make


@pytest.mark.parametrize("name", ["causalqwen2_5", "causalpali", "colqwen2"])
def test_vectors_are_those_of_the_cpu(name: str, rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(name)
    embedder, cpu = rig.open(), rig.cpu
    pages = [page(300, 200), page(120, 400), page(300, 200, 1), page(300, 200, 2)]
    for ours, theirs in zip(embedder.embed_images(pages), cpu.embed_images(pages), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    texts = ["one", "a rather longer query about invoices", "one", "one"]
    for ours, theirs in zip(embedder.embed_queries(texts), cpu.embed_queries(texts), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("aliased", [True, False])
def test_states_of_fixed_size_are_those_of_the_cpu(
    exported: Callable[[ExportOptions], Path], zoo: Zoo, rig_of: Callable[..., Rig], tmp_path: Path, aliased: bool
) -> None:
    """Qwen3.5: no engine updates them in place, whatever it does with caches."""
    rig = rig_of(exported(qwen3_5_options(zoo, target="tensorrt", opset=24)), aliased)
    embedder, cpu = rig.open(), rig.cpu
    for image in (page(90, 60), page(64, 200)):
        np.testing.assert_allclose(embedder.embed_image(image, LOOP), cpu.embed_image(image, LOOP), atol=TOLERANCE)
    state = embedder.start_query("one", 8)
    state.extend(4)
    state.save(tmp_path / "state.safetensors")
    expected = cpu.embed_query("one", Budget(8, decode="loop"))
    np.testing.assert_allclose(state.extend(8), expected, atol=TOLERANCE)
    for other in (embedder, cpu):
        np.testing.assert_allclose(other.resume(tmp_path / "state.safetensors", 8).extend(8), expected, atol=TOLERANCE)


def test_a_graph_is_captured_once_for_a_shape(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of("causalqwen2_5")
    embedder, wide, tall = rig.open(), page(300, 200), page(100, 400)
    for image in (wide, wide, tall, wide, tall, wide, tall):
        embedder.embed_image(image)
    assert len({tuple(run.items()) for run in rig.trt.engines["vision"].runs}) == 2
    contexts = len({tuple(run.items()) for name in ("vision", "text") for run in rig.trt.engines[name].runs})
    assert rig.cuda.log.count("instantiate") == contexts
    assert (
        rig.cuda.log.count("engine") == rig.cuda.log.count("capture engine") == contexts
    )  # once by hand, once recorded
    assert sum(len(rig.trt.engines[name].runs) for name in ("vision", "text")) == 14


def test_an_engine_that_cannot_be_captured_runs_without_a_graph(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of("causalqwen2_5")
    rig.cuda.capturable = False
    embedder, cpu = rig.open(), rig.cpu
    embedder.embed_query("one")
    with pytest.warns(RuntimeWarning, match="text runs without a CUDA graph: CUDA cannot do StreamEndCapture"):
        found = embedder.embed_query("two")
    for vectors, text in ((found, "two"), (embedder.embed_query("three"), "three")):
        np.testing.assert_allclose(vectors, cpu.embed_query(text), atol=TOLERANCE)
    assert rig.cuda.log.count("capture engine") == 1  # it is not tried again


def test_texts_of_similar_lengths_share_a_shape(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of("causalqwen2_5")
    embedder = rig.open()
    embedder.embed_queries(["one", "one two", "one two three"])
    lengths = {run["inputs_embeds"] for run in rig.trt.engines["text"].runs}
    assert [length for _, length, _ in lengths] == [64]


def test_shapes_that_were_not_used_for_long_give_their_memory_back(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of("causalqwen2_5")
    embedder, sizes = rig.open(), []
    for columns in range(2, 17):
        embedder.embed_image(page(28 * columns, 56))
        sizes.append(len(rig.cuda.device))
    assert sizes[-1] == sizes[-3]
    expected = rig.cpu.embed_image(page(56, 56))
    np.testing.assert_allclose(embedder.embed_image(page(56, 56)), expected, atol=TOLERANCE)


@pytest.mark.parametrize("aliased", [True, False], ids=["in place", "copied"])
@pytest.mark.parametrize("name", ["causalqwen2_5", "causalpali"])
def test_the_loop_keeps_its_cache_on_the_device(name: str, aliased: bool, rig_of: Callable[..., Rig]) -> None:
    rig = rig_of(name, aliased)
    embedder, cpu = rig.open(), rig.cpu
    for seed in range(3):  # the third page finds the cache of the first
        ours, theirs = (e.embed_image(page(300, 200, seed), LOOP) for e in (embedder, cpu))
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    assert rig.cuda.log.count("launch") > 2 * 6  # steps are replayed


def test_two_states_do_not_share_a_cache(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of("causalqwen2_5")
    embedder, cpu = rig.open(), rig.cpu
    images = page(300, 200), page(200, 300)
    states = [embedder.start(image) for image in images]
    for budget in (2, 5, 8):
        for state, image in zip(states, images, strict=True):
            np.testing.assert_allclose(state.extend(budget), cpu.embed_image(image, LOOP)[:budget], atol=TOLERANCE)


def test_a_state_is_saved_from_the_device_and_goes_on_there(rig_of: Callable[..., Rig], tmp_path: Path) -> None:
    rig = rig_of("causalqwen2_5")
    embedder, cpu = rig.open(), rig.cpu
    expected = cpu.embed_image(page(300, 200), LOOP)
    with_three = embedder.start(page(300, 200))
    with_three.extend(3)
    with_three.save(tmp_path / "gpu")
    with_three.close()
    for other in (embedder, cpu):  # the file is the same wherever it was made
        np.testing.assert_allclose(other.resume(tmp_path / "gpu").extend(8), expected, atol=TOLERANCE)


def test_all_memory_is_given_back(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of("causalqwen2_5")
    embedder = rig.open()
    for _ in range(3):
        embedder.embed_image(page(300, 200), LOOP)
        embedder.embed_image(page(300, 200))
    assert rig.cuda.device
    assert rig.cuda.graphs
    gc.disable()
    try:
        for name in ("vision", "text", "text_step"):
            embedder.release(name)
    finally:
        gc.enable()
    assert not rig.cuda.device  # at once, not when circles are looked for
    assert not rig.cuda.graphs
    del embedder
    gc.collect()
    assert rig.cuda.log[-1] == "destroy"
    assert not rig.cuda.pinned
    assert not rig.cuda.graphs


def test_more_than_an_engine_takes_is_refused(rig_of: Callable[..., Rig]) -> None:
    rig = rig_of("causalqwen2_5")
    rig.trt.profiles["vision"][0]["num_patches"] = (4, 16, 16)
    with pytest.raises(CembedError, match=r"the engine of vision takes pixel_values from .* to .*: build it with"):
        rig.open().embed_image(page(300, 200))


def test_what_is_missing_is_said_in_one_line(rig_of: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rig_of("causalqwen2_5")
    bundle = Bundle(rig.bundle)
    cache = EngineCache(bundle, Library(rig.trt, "tensorrt"), Cuda(rig.cuda).gpu())
    for content in (b"damaged", b""):
        cache.path("text").write_bytes(content)
        with pytest.raises(CembedError, match=r"text-.* is damaged: run `cembed build-engine"):
            rig.open().embed_query("one")
    cache.path("text").unlink()
    with pytest.raises(CembedError, match=r"no engine of text for tensorrt-10.16.1-Fake-GPU-sm87: run `cembed build"):
        rig.open()
    with pytest.warns(RuntimeWarning, match="no engine of text .*; going on with CPUExecutionProvider"):
        fallen_back = Embedder.load(rig.bundle, providers=["tensorrt", "CPUExecutionProvider"])
    assert np.array_equal(fallen_back.embed_query("one"), rig.cpu.embed_query("one"))
    monkeypatch.setattr(rig.cuda, "cudaStreamCreateWithFlags", lambda flags: (35, None))
    with pytest.raises(
        CembedError, match="no NVIDIA GPU can be used: CUDA cannot do StreamCreateWithFlags: a fake error"
    ):
        rig.open()


def test_the_command_line_says_in_one_line_what_it_goes_on_without(
    tensorrt_bundle_of: BundleMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing() -> None:
        raise CembedError("TensorRT is not there")

    monkeypatch.setattr(Library, "load", missing)
    page(100, 100).save(tmp_path / "page.png")
    inputs = "embed", tensorrt_bundle_of("causalqwen2_5"), tmp_path / "page.png", "--out", tmp_path / "pages.npz"
    outcome = cembed(*inputs, "--provider", "tensorrt", "--provider", "CPUExecutionProvider")
    assert (outcome.status, outcome.err) == (0, "warning: TensorRT is not there; going on with CPUExecutionProvider\n")


@pytest.mark.parametrize(
    ("version", "reason"),
    [("10.0.1", "10.1 or later is needed"), ("10.3.0", "opset 24 needs TensorRT 10.15, this is 10.3.0")],
)
def test_a_library_that_is_too_old_is_refused(
    version: str, reason: str, tensorrt_bundle_of: BundleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Old:
        __version__ = version

    monkeypatch.setattr("importlib.import_module", lambda name: Old)
    with pytest.raises(CembedError, match=reason):
        Library.load().check(Bundle(tensorrt_bundle_of("causalqwen2_5")).manifest)


def test_a_library_that_cannot_be_loaded_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", load)
    with pytest.raises(CembedError, match=r"^tensorrt is installed but cannot be loaded: libnvinfer.so.10: cannot"):
        Library.load()


def test_the_fakes_have_only_what_the_real_ones_have() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install '.[rtx]'")
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python: pip install '.[gpu]'")
    calls = ("cuda", "get_", "set_", "create_", "infer", "execute", "Tensor", "Execution", "Logger", "Runtime")
    pairs = ((runtime, FakeCuda), (trt, FakeTrt), (trt.ICudaEngine, FakeEngine), (trt.IExecutionContext, FakeContext))
    for real, fake in pairs:
        used = [name for name in vars(fake) if name.startswith(calls)]
        assert used
        assert [name for name in used if not hasattr(real, name)] == []

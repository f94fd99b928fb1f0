"""Engines: every graph of every backbone and precision parses and builds with TensorRT, which takes no GPU.

    CEMBED_TENSORRT=all make test

builds all of them; without it a few of each kind are built. TensorRT for RTX (`pip install '.[rtx]'`, 230 MB) is there
on Linux. What is decided before a build is tested anyway.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import onnx
import pytest
from conftest import BundleMaker, golden
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from cembed.cli import app
from cembed.engine_cli import is_tf32
from cembed.export.graph import choose_dialect
from cembed.export.plan import ExportOptions
from cembed.quantize.plan import QuantiseOptions
from cembed.quantize.quantizer import quantise
from cembed.runtime import CembedError, Embedder
from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.image_processing import ImageProcessing
from cembed.runtime.bundle.manifest import Graph
from cembed.runtime.embed.positions import window_index
from cembed.runtime.embed.preprocess import smart_resize
from cembed.runtime.engines.build import (
    Build,
    BuildOptions,
    EngineCache,
    Library,
    Range,
    needed_graphs,
    profiles,
    tensor_range,
    use_timings,
)
from cembed.runtime.engines.cuda import GpuInfo
from cembed.runtime.engines.memory import EngineLimits, Fit, Model, longest_row, max_windows
from cembed.runtime.engines.session import Array, EngineSettings, Session, StepSession

NAMES = ("causalqwen2_5", "causalpali", "colqwen2")  # one of each backbone
PRECISIONS = ("fp32", "fp16", "int8", "int4", "w8a8")
OPSET_20 = ("causalqwen2_5", "causalpali")
FEW = [  # each backbone, precision and opset at least once
    ("causalqwen2_5", "int8", 24),
    ("causalqwen2_5", "w8a8", 24),
    ("causalpali", "fp16", 24),
    ("colqwen2", "fp32", 20),
    ("colqwen2", "int4", 24),
    ("colidefics3", "fp16", 24),
    ("colmodernvbert", "fp16", 24),
    ("colqwen3", "fp16", 24),
]
ALL = [*product(NAMES, PRECISIONS, (24, 20)), *FEW[5:], ("colqwen3_5", "fp16", 24), ("colqwen3_5", "fp32", 20)]
CASES = ALL if os.environ.get("CEMBED_TENSORRT") == "all" else FEW


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(
        pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install '.[rtx]'"), "tensorrt_rtx"
    )


def build_all(library: Library, root: Path, but: Collection[str] = ()) -> None:
    bundle = Bundle(root)
    cache, options = EngineCache(bundle, library, None), BuildOptions(EngineLimits.of(bundle, batch=2))
    cache.folder.mkdir(exist_ok=True)
    for graph in bundle.manifest.graphs.keys() - but:
        assert Build(cache, graph, options).run().nbytes > (root / bundle.manifest.graphs[graph].file).stat().st_size


@pytest.fixture(scope="module")
def decomposed_bundle_of(exported: Callable[[ExportOptions], Path]) -> BundleMaker:
    """For TensorRT 10.3, whose parser knows no attention."""
    return lambda name: exported(replace(golden(name), target="tensorrt", opset=20))


@pytest.mark.parametrize(("name", "precision", "opset"), CASES)
def test_every_graph_builds(
    name: str, precision: str, opset: int, library: Library, tensorrt_bundle_of: BundleMaker,
    decomposed_bundle_of: BundleMaker, tmp_path: Path,
) -> None:  # fmt: skip
    root = (tensorrt_bundle_of if opset == 24 else decomposed_bundle_of)(name)
    if precision != "fp32":
        quantise(root, QuantiseOptions(precision, accept_loss=True), tmp_path / precision)
        root = tmp_path / precision
    model = onnx.load(str(root / "text.onnx"), load_external_data=False)
    blocks = 21 if precision == "int4" else 0  # which DequantizeLinear has since then
    assert [entry.version for entry in model.opset_import if not entry.domain] == [max(opset, blocks)]
    short = opset == 20 and precision not in ("fp32", "fp16")  # the step has the products of text, and takes long
    build_all(library, root, but={"text_step"} if short else ())


def test_the_command_builds_once_for_a_device(library: Library, tensorrt_bundle_of: BundleMaker) -> None:
    root = tensorrt_bundle_of("causalqwen2_5")

    def run(*options: str) -> str:
        result = CliRunner().invoke(app, ["build-engine", str(root), *options])
        assert result.exit_code == 0, result.output
        return result.output

    assert "building vision" in run("--max-visual-tokens", "32", "--loop")
    assert "there already" not in run("--max-visual-tokens", "64", "--workspace", "64")  # other limits
    again = run("--max-visual-tokens", "64", "--workspace", "64")
    assert again.count("is there already") == 2
    assert "building" not in again
    assert "building text" in run("--max-visual-tokens", "64", "--workspace", "64", "--force")
    bundle = Bundle(root)
    cache = EngineCache(bundle, Library.load(), None)
    about = json.loads(cache.path("text").with_suffix(".json").read_text())
    assert about["limits"]["visual_tokens"] == 64
    assert len(cache.read("text")) == about["bytes"]
    with pytest.raises(CembedError, match=r"no engine of text for .*-Orin-sm87"):
        replace(cache, gpu=GpuInfo("Orin", (8, 7), True)).read("text")


@pytest.mark.parametrize(("content", "used"), [(b"", b""), (b"mine", b"mine"), (b"old", b""), (b"damaged", b"")])
def test_timings_that_do_not_belong_here_are_left_out(content: bytes, used: bytes, tmp_path: Path) -> None:
    """TensorRT refuses those of another driver, and makes nothing of what is none."""
    taken = list[bytes]()

    class Config:
        def create_timing_cache(self, known: bytes) -> bytes | None:
            return None if known == b"damaged" else known

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if cache != b"old":
                taken.append(cache)
            return cache != b"old"

    (tmp_path / "there.timing").write_bytes(content)
    use_timings(Config(), tmp_path / "there.timing")
    use_timings(Config(), tmp_path / "missing.timing")
    assert taken == [used, b""]


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), tokens=st.sampled_from([16, 64, 300, 768]))
def test_no_page_has_more_windows_than_an_engine_takes(height: int, width: int, tokens: int) -> None:
    image = ImageProcessing("smart", 14, 2, 784, 784 * tokens, 1.0, (0, 0, 0), (1, 1, 1), window_size=112)
    assume(max(height, width) <= 200 * min(height, width))
    rows, columns = smart_resize(height, width, image)
    windows = window_index((rows // 14, columns // 14), image)
    assert len(windows) <= max_windows(image)
    assert windows.max() < longest_row(image) * 4


class Watch:
    """A session that keeps the shapes it is given."""

    def __init__(self, inner: Session) -> None:
        self.inner, self.shapes = inner, list[dict[str, tuple[int, ...]]]()

    def run(self, feeds: Mapping[str, Array]) -> Array:
        self.shapes.append({name: feed.shape for name, feed in feeds.items()})
        return self.inner.run(feeds)

    def bind(self, cache: Mapping[str, Array]) -> StepSession:
        return self.inner.bind(cache)


def takes(ranges: Mapping[str, Range], graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    limits = {tensor.name: tensor_range(tensor.shape, ranges) for tensor in graph.inputs}
    return all(
        low <= size <= high
        for name, shape in shapes.items()
        if name != "prompt_length"
        for low, size, high in zip(limits[name][0], shape, limits[name][2], strict=True)
    )


@pytest.mark.parametrize("name", [*NAMES, "colidefics3", "colmodernvbert"])
def test_what_pages_and_queries_need_is_within_the_profiles(name: str, tensorrt_bundle_of: BundleMaker) -> None:
    bundle = Bundle(tensorrt_bundle_of(name))
    embedder, limits = Embedder.load(bundle.root), EngineLimits.of(bundle, batch=2)
    watched = {graph: Watch(embedder.session(graph)) for graph in ("vision", "text")}
    embedder.replace_sessions(watched)
    embedder.embed_images([Image.new("RGB", size) for size in ((2000, 1500), (30, 30), (2000, 50))])
    embedder.embed_queries(["x", "what was paid for the long table in the hall " * 8])
    for graph, session in watched.items():
        found = profiles(graph, limits, bundle.manifest)
        assert all(0 < low <= usual <= high for ranges in found for low, usual, high in ranges.values())
        for shapes in session.shapes:
            assert any(takes(ranges, bundle.manifest.graphs[graph], shapes) for ranges in found), shapes


@pytest.mark.parametrize("name", OPSET_20)
def test_a_cache_for_tensorrt_holds_a_page_and_all_its_slots(name: str, tensorrt_bundle_of: BundleMaker) -> None:
    embedder = Embedder.load(tensorrt_bundle_of(name))
    room = embedder.manifest.document.room
    state = embedder.start(Image.new("RGB", (2000, 1500)))
    assert state.extend(room).shape[0] == room
    with pytest.raises(CembedError, match="positions are needed, the bundle's cache has"):
        embedder.start(Image.new("RGB", (2000, 1500)), 10 * room)


@pytest.mark.parametrize("opset", [21, 22, 23])
def test_opsets_that_no_tensorrt_reads_well_are_refused(opset: int) -> None:
    with pytest.raises(CembedError, match=f"opset {opset} is not for TensorRT: 24 needs 10.15 or later"):
        choose_dialect("tensorrt", opset)


def test_memory_is_counted_and_refused(tensorrt_bundle_of: BundleMaker) -> None:
    bundle = Bundle(tensorrt_bundle_of("causalqwen2_5"))
    manifest = bundle.manifest
    small, large = EngineLimits.of(bundle, 1, 16), EngineLimits.of(bundle, 4)
    model = Model.of(manifest, needed_graphs(manifest, loop=True))
    assert model.weights["text"] == manifest.files["text.data"].size
    cache = Embedder(bundle, EngineSettings()).start_query("one").nbytes
    needs, more = model.needs(small), model.needs(large)
    assert needs["cache"] == cache
    assert all(needs[name] <= more[name] for name in needs)
    assert model.build(large, integrated=True) > model.build(large, integrated=False)
    fit = Fit(needs, model.build(small, False), None)
    assert fit.needed == max(sum(needs.values()), fit.build)
    fit.check()  # nothing is known of the device
    replace(fit, free=fit.needed).check()
    with pytest.raises(CembedError, match=r"MiB are needed and .* are free: lower --max-visual-tokens"):
        replace(fit, free=fit.needed - 1).check()
    assert needed_graphs(manifest, loop=False) == ["vision", "text"]


def test_an_engine_is_as_precise_as_its_bundle(tensorrt_bundle_of: BundleMaker) -> None:
    manifest = Bundle(tensorrt_bundle_of("causalqwen2_5")).manifest
    assert not is_tf32(manifest, "fp32")
    assert is_tf32(manifest, "tf32")
    with pytest.raises(CembedError, match="this bundle is fp32: for an engine in fp16, make a bundle"):
        is_tf32(manifest, "fp16")


def test_a_bundle_for_another_target_is_refused(causal_bundle: Path) -> None:
    class Newest:
        __version__ = "11.4.0"

    with pytest.raises(CembedError, match="this bundle is for onnxruntime: export it with --target tensorrt"):
        Library(Newest, "tensorrt").check(Bundle(causal_bundle).manifest)


def test_patches_of_a_tile_see_that_tile_only(tensorrt_bundle_of: BundleMaker) -> None:
    limits = EngineLimits.of(Bundle(tensorrt_bundle_of("colidefics3")))
    assert (limits.patches, limits.attended) == (17 * 64, 64)
    limits = EngineLimits.of(Bundle(tensorrt_bundle_of("causalpali")))
    assert limits.patches == limits.attended == 64

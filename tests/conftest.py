"""Bundles are exported once a session, from the checkpoints in tests/golden."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import libcembed
import pytest

from cembed.runtime.quiet import ort as onnxruntime

GOLDEN = Path(__file__).parent / "golden"
BACKBONE_OF = {
    "causalqwen2_5": "qwen2.5-vl",
    "causalpali": "paligemma",
    "colqwen2": "qwen2-vl",
    "colqwen2_5": "qwen2.5-vl",
    "colpali": "paligemma",
}
CAUSAL = ("causalqwen2_5", "causalpali")
BundleMaker = Callable[[str], Path]


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> BundleMaker:
    """The bundle of a golden checkpoint, by folder name: fp32, 8 document and 4 query vectors."""
    root = tmp_path_factory.mktemp("bundles")

    def make(name: str) -> Path:
        if not (root / name).exists():
            from cembed.export.exporter import export
            from cembed.export.plan import ExportOptions

            budgets = (8, 4) if name in CAUSAL else (None, None)
            options = ExportOptions(
                BACKBONE_OF[name], str(GOLDEN / name), num_vectors=budgets[0], query_vectors=budgets[1]
            )
            export(options, root / name)
        return root / name

    return make


@pytest.fixture(scope="session")
def tensorrt_bundle_of(tmp_path_factory: pytest.TempPathFactory) -> BundleMaker:
    """The bundle of a golden checkpoint for TensorRT: fp32, opset 24."""
    root = tmp_path_factory.mktemp("tensorrt")

    def make(name: str) -> Path:
        if not (root / name).exists():
            from cembed.export.exporter import export
            from cembed.export.plan import ExportOptions

            export(ExportOptions(BACKBONE_OF[name], str(GOLDEN / name), target="tensorrt"), root / name)
        return root / name

    return make


@pytest.fixture(scope="session")
def causal_bundle(bundle_of: BundleMaker) -> Path:
    return bundle_of("causalqwen2_5")


@pytest.fixture(scope="session")
def built() -> Path:
    """The folder that libcembed and its samples were built in; skips where that is impossible."""
    if lacking := libcembed.missing():
        pytest.skip(f"libcembed is not built: {lacking}")
    return libcembed.build()


@pytest.fixture(scope="session")
def onnxruntime_library() -> Path:
    return next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))


@pytest.fixture(scope="session")
def library(built: Path, onnxruntime_library: Path) -> libcembed.Library:
    return libcembed.Library(built / "libcembed.so", onnxruntime_library)


@pytest.fixture
def causal(library: libcembed.Library, causal_bundle: Path) -> Iterator[libcembed.Bundle]:
    bundle = library.open(causal_bundle)
    yield bundle
    bundle.close()

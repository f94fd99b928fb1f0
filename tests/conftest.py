"""Bundles are exported once a session, from the checkpoints in tests/golden."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import libcembed
import pytest
from filelock import FileLock

from cembed.runtime.engines.quiet import ort as onnxruntime

if TYPE_CHECKING:
    from reference import Zoo

    from cembed.export.plan import ExportOptions

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a run in the background: commands would not be interrupted
    signal.signal(signal.SIGINT, signal.default_int_handler)
SAMPLES = Path(__file__).resolve().parents[1] / "samples"
GOLDEN = Path(__file__).parent / "golden"
BACKBONE_OF = {
    "causalqwen2_5": "qwen2.5-vl",
    "causalpali": "paligemma",
    "colqwen2": "qwen2-vl",
    "colqwen2_5": "qwen2.5-vl",
    "colqwen3": "qwen3-vl",
    "colqwen3_5": "qwen3.5",
    "colpali": "paligemma",
    "colidefics3": "idefics3",
    "colmodernvbert": "modernvbert",
}
CAUSAL = ("causalqwen2_5", "causalpali")
BundleMaker = Callable[[str], Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the tests in slow.txt too, which are run if they are named")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what takes long and says little that others do not; a name that is no test's any more is an error."""
    folder = Path(__file__).parent
    slow = set((folder / "slow.txt").read_text().splitlines())
    names = {item: item.nodeid.removeprefix("tests/") for item in items}
    if set(config.args) <= {str(folder), "tests"}:  # all were collected
        assert not slow - set(names.values()), f"slow.txt names no tests: {slow - set(names.values())}"
    if config.getoption("--all") or any("::" in given for given in config.args):
        return
    left_out = [item for item in items if names[item] in slow]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if names[item] not in slow]


@pytest.fixture(scope="session", autouse=True)
def _torchlib_is_read_once() -> None:
    """torch reads its operators anew for each graph, which is a seventh of the export of a small checkpoint."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders by name that all test processes of this run have in common."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder(name: str) -> Path:
        (root / "shared" / name).mkdir(parents=True, exist_ok=True)
        return root / "shared" / name

    return folder


@pytest.fixture(scope="session")
def exported(shared: Callable[[str], Path]) -> Callable[[ExportOptions], Path]:
    """The bundle of a checkpoint that no test changes: exported once, whichever process asks first. Only to be read."""

    def make(options: ExportOptions) -> Path:
        from cembed.export.exporter import export

        name = hashlib.sha256(repr(options).encode()).hexdigest()[:16]
        return once(shared("exported") / name, lambda path: export(options, path))

    return make


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, which `make` puts there whole if nothing is; other processes wait meanwhile."""
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make(path)
    return path


@pytest.fixture(scope="session")
def bundle_of(exported: Callable[[ExportOptions], Path]) -> BundleMaker:
    """The bundle of a golden checkpoint, by folder name: fp32, 8 document and 4 query vectors."""

    def make(name: str) -> Path:
        return exported(golden(name, *((8, 4) if name in CAUSAL else (None, None))))

    return make


@pytest.fixture(scope="session")
def tensorrt_bundle_of(exported: Callable[[ExportOptions], Path]) -> BundleMaker:
    """The bundle of a golden checkpoint for TensorRT: fp32, opset 24."""
    return lambda name: exported(replace(golden(name), target="tensorrt"))


def golden(name: str, num_vectors: int | None = None, query_vectors: int | None = None) -> ExportOptions:
    from cembed.export.plan import ExportOptions

    return ExportOptions(BACKBONE_OF[name], str(GOLDEN / name), num_vectors=num_vectors, query_vectors=query_vectors)


@pytest.fixture(scope="session")
def zoo(shared: Callable[[str], Path]) -> Zoo:
    from reference import Zoo

    return Zoo(shared("zoo"))


@pytest.fixture(scope="session")
def sample_bundle(exported: Callable[[ExportOptions], Path]) -> Path:
    """The bundle of the sample model."""
    from cembed.export.plan import ExportOptions

    return exported(ExportOptions("qwen2.5-vl", str(SAMPLES / "model"), slot_positions="continue"))


@pytest.fixture(scope="session")
def causal_bundle(bundle_of: BundleMaker) -> Path:
    return bundle_of("causalqwen2_5")


@pytest.fixture(scope="session")
def built(shared: Callable[[str], Path]) -> Path:
    """The folder that libcembed and its samples were built in; skips where that is impossible."""
    if lacking := libcembed.missing():
        pytest.skip(f"libcembed is not built: {lacking}")
    with FileLock(shared("libcembed") / "lock"):
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

"""MaxSim as a graph, and the TensorRT plugin: what can be known of them without a GPU.

    TENSORRT_ROOT=DIR make test

compiles the plugin with the headers in DIR/include; without it, or nvcc, or cmake, that is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cembed.export import maxsim
from cembed.runtime.engines.quiet import ort as onnxruntime

ROOT = Path(__file__).parent.parent
LEAST_USUAL_MOST = {"query": (1, 16, 64), "pages": (1, 100, 1000), "lengths": (1, 100, 1000)}


def run(model: onnx.ModelProto, feeds: dict[str, NDArray[np.generic]]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, feeds)[0]
    return found


@settings(max_examples=20, deadline=None)
@given(
    num=st.integers(1, 20), dim=st.integers(1, 40), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    seed=st.integers(0, 99), half=st.booleans(),
)  # fmt: skip
def test_standard_operators_equal_the_definition(num: int, dim: int, lengths: list[int], seed: int, half: bool) -> None:
    """Whatever is behind the last vector of a page."""
    random, kind = np.random.default_rng(seed), np.float16 if half else np.float32
    query = (random.standard_normal((num, dim)) / np.sqrt(dim)).astype(kind)
    pages = (random.standard_normal((len(lengths), 9, dim)) * 3).astype(kind)
    found = run(maxsim.standard(dim, half=half), {"query": query, "pages": pages, "lengths": np.array(lengths)})
    similarity = np.einsum("qd,pkd->pkq", query.astype(np.float64), pages.astype(np.float64))
    wanted = [
        page[:length].max(axis=0, initial=-np.inf).sum() for page, length in zip(similarity, lengths, strict=True)
    ]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=(1e-2 if half else 1e-5) * num)
    assert found.dtype == np.float32


@pytest.mark.parametrize("levels", [False, True])
def test_the_plugin_is_one_node(levels: bool) -> None:
    model = maxsim.plugin(128, levels=levels)
    (node,) = model.graph.node
    assert (node.domain, node.op_type) == ("cembed", "MaxSim")
    assert list(node.input) == ["query", "pages", "offsets", *(["scales"] if levels else [])]
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": maxsim.OPSET, "cembed": 1}


@pytest.mark.parametrize("half", [False, True])
def test_standard_operators_parse_and_build(half: bool) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install '.[rtx]'")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(maxsim.standard(128, half=half).SerializeToString())
    assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]
    profile = builder.create_optimization_profile()
    for name, sizes in LEAST_USUAL_MOST.items():
        rest = {"query": (128,), "pages": (32, 128), "lengths": ()}[name]
        profile.set_shape(name, *((size, *rest) for size in sizes))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


def test_the_plugin_compiles_and_answers(tmp_path: Path) -> None:
    root = os.environ.get("TENSORRT_ROOT")
    if not root:
        pytest.skip("needs TensorRT's headers: TENSORRT_ROOT is not set")
    if missing := [tool for tool in ("nvcc", "cmake") if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    options = [f"-DTENSORRT_ROOT={root}", "-DCMAKE_CUDA_ARCHITECTURES=87-real"]
    source, build = ROOT / "runtime" / "native" / "tensorrt", tmp_path / "build"
    subprocess.run(["cmake", "-S", str(source), "-B", str(build), *options], check=True, capture_output=True)
    built = subprocess.run(["cmake", "--build", str(build)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "warning" not in built.stdout + built.stderr
    program, test = tmp_path / "test_plugin", ROOT / "tests" / "native" / "test_plugin.cpp"
    command = ["nvcc", "-std=c++17", "-isystem", f"{root}/include", str(test), "-o", str(program), "-ldl"]
    subprocess.run(command, check=True)
    done = subprocess.run([program, build / "libcembed_maxsim.so"], capture_output=True, text=True, check=False)
    assert done.stdout == "passed\n"

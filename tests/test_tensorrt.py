"""Graphs for TensorRT: every graph of every precision parses and builds there, which takes no GPU.

    pip install '.[rtx]'

brings TensorRT for RTX (370 MB); without it these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import GOLDEN

from cembed.export.exporter import export
from cembed.export.plan import ExportOptions
from cembed.quantize.plan import QuantiseOptions
from cembed.quantize.quantizer import quantise

CAPACITY = 64  # TensorRT's KV caches have a fixed length
PROFILE = {  # least, usual, most
    "batch_size": (1, 1, 2),
    "sequence_length": (16, 64, 128),
    "num_vectors": (1, 8, 32),
    "num_patches": (64, 128, 256),
    "num_windows": (1, 2, 4),
}
PRECISIONS = ("float", "int8", "int4", "w8a8")
GRAPHS = ("text", "text_step", "vision")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install '.[rtx]'")
    root = tmp_path_factory.mktemp("standard")
    export(ExportOptions("qwen2.5-vl", str(GOLDEN / "causalqwen2_5"), target="onnx"), root / "float")
    for scheme in PRECISIONS[1:]:
        quantise(root / "float", QuantiseOptions(scheme, accept_loss=True), root / scheme)
    return {name: root / name for name in PRECISIONS}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graph_parses_and_builds(bundles: dict[str, Path], precision: str, graph: str) -> None:
    import tensorrt_rtx as trt

    path = bundles[precision] / f"{graph}.onnx"
    model = with_fixed_cache(path)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(model.SerializeToString(), str(path))
    assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.add_optimization_profile(profile(trt, builder, network, model))
    allow_unfused_attention(trt, network)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > path.stat().st_size


def with_fixed_cache(path: Path) -> onnx.ModelProto:
    model = onnx.load(str(path), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == "capacity":
                axis.dim_value = CAPACITY
    return model


def profile(trt: Any, builder: Any, network: Any, model: onnx.ModelProto) -> Any:
    found = builder.create_optimization_profile()
    axes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        if -1 in tuple(tensor.shape):
            sizes = [PROFILE.get(axis.dim_param, (axis.dim_value,) * 3) for axis in axes[tensor.name]]
            found.set_shape(tensor.name, *zip(*sizes, strict=True))
    return found


def allow_unfused_attention(trt: Any, network: Any) -> None:
    """The heads of the tiny checkpoints have 16 channels, for which there is no fused kernel."""
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionBoundaryLayer
            layer.attention.decomposable = True

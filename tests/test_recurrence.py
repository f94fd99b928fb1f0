"""The gated delta rule as graphs compute it, in chunks and by ONNX Runtime's operator, against its definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cembed.export.graph import choose_dialect, quiet
from cembed.export.layers import Dialect, Reference
from cembed.export.recurrence import CHUNK, DeltaInputs
from cembed.runtime.engines.quiet import ort

Array = NDArray[np.float32]
HEADS, KEY, VALUE = 3, 16, 24
NAMES = ("query", "key", "value", "decay", "rate", "state")
LENGTHS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK + 7)
FORMS = {"in chunks": ("onnx", 20), "in chunks, opset 24": ("tensorrt", 24), "LinearAttention": ("onnxruntime", 24)}


class Rule(nn.Module):
    def __init__(self, dialect: Dialect) -> None:
        super().__init__()
        self.dialect = dialect

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return self.dialect.delta_rule(DeltaInputs(*tensors[:5]), tensors[5] if len(tensors) > 5 else None)


def examples(length: int, names: tuple[str, ...] = NAMES) -> list[Tensor]:
    widths = dict(zip(NAMES, (HEADS * KEY, HEADS * KEY, HEADS * VALUE, HEADS, HEADS), strict=False))
    return [torch.zeros(2, length, widths[n]) if n in widths else torch.zeros(2, HEADS, KEY, VALUE) for n in names]


def session(form: str, names: tuple[str, ...] = NAMES) -> ort.InferenceSession:
    target, opset = FORMS[form]
    axes = [{0: torch.export.Dim.DYNAMIC} | ({} if n == "state" else {1: torch.export.Dim.DYNAMIC}) for n in names]
    with quiet():
        program = torch.onnx.export(
            Rule(choose_dialect(target, opset)).eval(),
            tuple(examples(3 * CHUNK, names)),
            dynamo=True,
            opset_version=opset,
            input_names=list(names),
            output_names=["output", "present"],
            dynamic_shapes=(tuple(axes),),
            verbose=False,
        )
    assert program is not None
    onnx.checker.check_model(program.model_proto) if target != "onnxruntime" else None
    return ort.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def sessions() -> dict[str, ort.InferenceSession]:
    return {form: session(form) for form in FORMS}


def draw(length: int, case: str) -> dict[str, Array]:
    rng = np.random.default_rng(length)
    key = rng.standard_normal((1, length, HEADS, KEY))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    decay = -rng.exponential(2.0, (1, length, HEADS)) * (rng.random((1, length, HEADS)) < 0.8)
    rate = rng.random((1, length, HEADS))
    if case == "one key":  # what powers of the triangular matrix overflow with
        key, decay, rate = np.broadcast_to(key[:, :1], key.shape), np.zeros_like(decay), np.ones_like(rate)
    if case == "all forgotten":
        decay = np.where(rng.random(decay.shape) < 0.5, -300.0, decay)
    if case == "nothing taken in":
        rate = np.zeros_like(rate)
    values = {
        "query": rng.standard_normal((1, length, HEADS * KEY)) / KEY**0.5,
        "key": key.reshape(1, length, -1),
        "value": rng.standard_normal((1, length, HEADS * VALUE)),
        "decay": decay,
        "rate": rate,
        "state": rng.standard_normal((1, HEADS, KEY, VALUE)),
    }
    return {name: np.ascontiguousarray(value, np.float32) for name, value in values.items()}


def in_float64(feeds: dict[str, Array]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    q, k, v = (
        feeds[name].astype(np.float64).reshape(feeds[name].shape[1], HEADS, -1) for name in ("query", "key", "value")
    )
    state = feeds["state"][0].astype(np.float64)
    outputs = []
    for t in range(len(q)):
        state = state * np.exp(feeds["decay"][0, t].astype(np.float64))[:, None, None]
        known = np.einsum("nde,nd->ne", state, k[t])
        state = state + np.einsum("nd,ne->nde", k[t], feeds["rate"][0, t, :, None] * (v[t] - known))
        outputs.append(np.einsum("nde,nd->ne", state, q[t]).ravel())
    return np.stack(outputs)[None], state[None]


@pytest.mark.parametrize("case", ["random", "one key", "all forgotten", "nothing taken in"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_definition(sessions: dict[str, ort.InferenceSession], form: str, case: str) -> None:
    for length in LENGTHS:
        feeds = draw(length, case)
        for actual, expected in zip(sessions[form].run(None, feeds), in_float64(feeds), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5, err_msg=f"{length} positions")


def test_the_reference_of_the_parity_check_is_the_definition() -> None:
    for length in (1, 2, 40):
        feeds = draw(length, "random")
        found = Rule(Reference())(*(torch.from_numpy(feeds[name]) for name in NAMES))
        for actual, expected in zip(found, in_float64(feeds), strict=True):
            np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_positions_may_come_in_parts(sessions: dict[str, ort.InferenceSession], form: str) -> None:
    feeds = draw(100, "random")
    whole, last = sessions[form].run(None, feeds)
    state, outputs = feeds["state"], []
    for part in (slice(0, 33), slice(33, 34), slice(34, 35), slice(35, 100)):
        cut = {name: value if name == "state" else value[:, part] for name, value in feeds.items()}
        output, state = sessions[form].run(None, cut | {"state": state})
        outputs.append(output)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_state_it_starts_from_zeros(sessions: dict[str, ort.InferenceSession], form: str) -> None:
    feeds = draw(70, "random")
    alone = session(form, NAMES[:-1]).run(None, {name: feeds[name] for name in NAMES[:-1]})
    zeros: dict[str, Array] = feeds | {"state": np.zeros_like(feeds["state"])}
    expected: Callable[[], list[Array]] = lambda: sessions[form].run(None, zeros)  # noqa: E731
    for actual, other in zip(alone, expected(), strict=True):
        np.testing.assert_allclose(actual, other, rtol=0, atol=1e-6)

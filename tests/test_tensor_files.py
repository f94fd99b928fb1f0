"""Arrays of safetensors files: what the library of that name writes, and nothing that a header merely says."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from cembed.runtime.bundle.tensor_files import DTYPES, Shape, read_safetensors
from cembed.runtime.errors import CembedError

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, -2], np.int64)}
EXPECTED: dict[str, tuple[str, Shape]] = {"a": ("float32", (2, 3)), "b": ("int64", (None,))}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(ARRAYS, tmp_path / "x.safetensors", {"bundle": "b"})
    return tmp_path / "x.safetensors"


def test_what_safetensors_writes_is_read(path: Path) -> None:
    arrays, metadata = read_safetensors(path, EXPECTED, 1 << 20)
    assert metadata == {"bundle": "b"}
    assert arrays.keys() == ARRAYS.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, ARRAYS[name])
        assert array.flags.writeable


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_type_and_empty_arrays(tmp_path: Path, dtype: str) -> None:
    arrays = {"x": np.ones((3, 1), dtype), "none": np.ones((0, 5), dtype), "scalar": np.ones((), dtype)}
    save_file(arrays, tmp_path / "x")
    read, _ = read_safetensors(tmp_path / "x", {name: (dtype, array.shape) for name, array in arrays.items()}, 1 << 20)
    for name, array in read.items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == dtype


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"a": ("float32", (2, 3))}, "has the arrays"),
        ({**EXPECTED, "c": ("float32", ())}, "c are expected"),
        ({**EXPECTED, "a": ("float16", (2, 3))}, "expected is float16"),
        ({**EXPECTED, "a": ("float32", (3, 2))}, "a is float32"),
        ({**EXPECTED, "a": ("float32", (2, 3, 1))}, "a is float32"),
        ({**EXPECTED, "b": ("int64", ())}, "b is int64"),
    ],
)
def test_only_what_is_expected_is_read(path: Path, expected: Any, words: str) -> None:
    with pytest.raises(CembedError, match=words):
        read_safetensors(path, expected, 1 << 20)


def test_the_limit_is_the_files(path: Path) -> None:
    size = path.stat().st_size
    assert len(read_safetensors(path, EXPECTED, size)[0]) == 2
    with pytest.raises(CembedError, match="more than any such file"):
        read_safetensors(path, EXPECTED, size - 1)


def test_only_plain_files(path: Path) -> None:
    link, pipe = path.with_name("link"), path.with_name("pipe")
    link.symlink_to(path)
    os.mkfifo(pipe)
    for other in (link, pipe, path.parent, path.with_name("nothing")):
        with pytest.raises(CembedError, match=other.name):
            read_safetensors(other, EXPECTED, 1 << 20)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 1},
        {"__metadata__": {"a": 1}},
        {"__metadata__": []},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "more": 1}},
        {"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
    ],
)
def test_headers_that_are_none(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(CembedError, match="x is a damaged safetensors file"):
        read_safetensors(tmp_path / "x", {"a": ("float32", (1,))}, 1 << 20)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_byte_that_changed_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(save(ARRAYS, {"bundle": "b"}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with contextlib.suppress(CembedError):
        arrays, _ = read_safetensors(path, EXPECTED, 1 << 20)
        assert {name: array.shape[0] for name, array in arrays.items()} == {"a": 2, "b": 2}

"""Vector files: what was stored comes back, and what is not one is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from cembed.runtime import CembedError, VectorFile
from cembed.runtime.vectors import SUFFIXES, check_writable

EMBEDDINGS = [np.arange(12, dtype=np.float32).reshape(3, 4), np.ones((1, 4), np.float32), -np.eye(4, dtype=np.float32)]
PATHS = ["a.pdf", "ordner/Grüße 名前.pdf", 'with "quotes", commas\nand lines.png']
CONTENT = VectorFile.of(EMBEDDINGS, PATHS, [1, 12, 1], "0123abcd")
Arrays = dict[str, Any]


def assert_same(actual: VectorFile, expected: VectorFile = CONTENT) -> None:
    for name in ("vectors", "offsets", "pages"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    assert (actual.paths, actual.bundle) == (expected.paths, expected.bundle)


def write(path: Path, arrays: Arrays) -> None:
    """A vector file of any content, by numpy and safetensors alone."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return
    strings = {"paths": json.dumps([str(p) for p in arrays["paths"]]), "bundle": str(arrays["bundle"])}
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items() if k not in strings}, path, strings)


def arrays_of(content: VectorFile) -> Arrays:
    return {**vars(content), "paths": np.array(content.paths), "bundle": np.array(content.bundle)}


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(CembedError) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture(params=SUFFIXES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"pages{request.param}"


@pytest.mark.parametrize("name", ["plain", "Grüße 名前 🗎", "a.b.c", "-rf", "x" * 200])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"{name}{suffix}"
    CONTENT.save(path)
    assert_same(VectorFile.load(path))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_documents_are_the_embeddings(path: Path) -> None:
    CONTENT.save(path)
    loaded = VectorFile.load(path)
    assert len(loaded) == 3
    for actual, expected in zip(loaded.documents(), EMBEDDINGS, strict=True):
        assert np.array_equal(actual, expected)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12),
    suffix=st.sampled_from(SUFFIXES),
)
def test_round_trip_of_anything(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], name: str, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("any") / f"v{suffix}"
    rng = np.random.default_rng(sum(sizes))
    embeddings = [rng.standard_normal((size, 3)).astype(np.float32) for size in sizes]
    content = VectorFile.of(embeddings, [name] * len(sizes), range(1, len(sizes) + 1), "b")
    content.save(path)
    assert_same(VectorFile.load(path), content)
    shutil.rmtree(path.parent)


def test_a_path_that_is_not_unicode(path: Path) -> None:
    content = VectorFile.of([EMBEDDINGS[0]], [os.fsdecode(b"caf\xe9.pdf")], [1], "b")
    content.save(path)
    assert_same(VectorFile.load(path), content)


def test_numpy_alone_opens_npz(tmp_path: Path) -> None:
    CONTENT.save(tmp_path / "v.npz")
    with np.load(tmp_path / "v.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"vectors", "offsets", "pages", "paths", "bundle"}
        assert arrays["vectors"].dtype == np.float32
        assert arrays["offsets"].tolist() == [0, 3, 4, 8]
        assert arrays["pages"].tolist() == [1, 12, 1]
        assert arrays["paths"].tolist() == PATHS
        assert arrays["bundle"][()] == "0123abcd"


def test_safetensors_alone_opens_safetensors(tmp_path: Path) -> None:
    CONTENT.save(tmp_path / "v.safetensors")
    with safe_open(tmp_path / "v.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {"vectors", "offsets", "pages"}
        assert np.array_equal(file.get_tensor("vectors"), CONTENT.vectors)
        assert json.loads(file.metadata()["paths"]) == PATHS
        assert file.metadata()["bundle"] == "0123abcd"


@pytest.mark.parametrize("name", ["v.npy", "v", "v.NPZ", ".npz", "v.npz.bak"])
def test_the_suffix_decides(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for action in (lambda: CONTENT.save(path), lambda: VectorFile.load(path), lambda: check_writable(path, force=True)):
        assert ".npz or .safetensors" in refusal(action)
    assert not list(tmp_path.iterdir())


def test_nothing_to_keep() -> None:
    refusal(lambda: VectorFile.of([], [], [], "b"))


# Writing: whole or not at all.


@pytest.mark.parametrize("older", [None, b"older"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_nothing(
    path: Path, older: bytes | None, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if older is not None:
        path.write_bytes(older)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    message = refusal(lambda: CONTENT.save(path))
    assert "No space left" in message
    assert str(path) in message
    assert [p.read_bytes() for p in path.parent.iterdir()] == ([] if older is None else [older])


def test_an_interrupted_write_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        CONTENT.save(path)
    assert not list(path.parent.iterdir())


def test_saving_replaces_what_is_there(path: Path) -> None:
    path.write_bytes(b"older")
    CONTENT.save(path)
    assert_same(VectorFile.load(path))


def test_a_folder_that_is_not_there(path: Path) -> None:
    lost = path.parent / "nowhere" / path.name
    assert str(lost) in refusal(lambda: CONTENT.save(lost))
    assert "nowhere" in refusal(lambda: check_writable(lost, force=True))


def test_check_writable(path: Path) -> None:
    check_writable(path, force=False)
    path.touch()
    check_writable(path, force=True)
    assert "--force" in refusal(lambda: check_writable(path, force=False))


def test_a_folder_cannot_be_replaced(path: Path) -> None:
    path.mkdir()
    assert str(path) in refusal(lambda: check_writable(path, force=True))


# Reading.


def test_no_such_file(path: Path) -> None:
    assert str(path) in refusal(lambda: VectorFile.load(path))
    path.mkdir()
    assert str(path) in refusal(lambda: VectorFile.load(path))


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"PK\x03\x04", b"not a vector file", b"\x93NUMPY\x01\0", b"\xff" * 8 + b"{}"],
    ids=["empty", "zeros", "zip", "text", "npy", "huge header"],
)
def test_a_foreign_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert str(path) in refusal(lambda: VectorFile.load(path))


def test_an_npy_file_named_npz(tmp_path: Path) -> None:
    with (tmp_path / "v.npz").open("wb") as file:
        np.save(file, EMBEDDINGS[0])
    assert "v.npz" in refusal(lambda: VectorFile.load(tmp_path / "v.npz"))


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    np.savez(path, **{**arrays_of(CONTENT), "paths": np.array([{"evil": 1}, 2, 3], dtype=object)})
    assert "v.npz" in refusal(lambda: VectorFile.load(path))


@pytest.mark.parametrize(
    "metadata", [None, {"bundle": "b"}, {"paths": "7", "bundle": "b"}, {"paths": "{", "bundle": "b"}]
)
def test_safetensors_of_something_else(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "v.safetensors"
    save_file({name: getattr(CONTENT, name) for name in ("vectors", "offsets", "pages")}, path, metadata)
    assert str(path) in refusal(lambda: VectorFile.load(path))


@pytest.mark.parametrize("name", ["vectors", "offsets", "pages"])
def test_an_array_is_missing(path: Path, name: str) -> None:
    arrays = arrays_of(CONTENT)
    del arrays[name]
    write(path, arrays)
    assert name in refusal(lambda: VectorFile.load(path))


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(path: Path, part: float) -> None:
    CONTENT.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    assert str(path) in refusal(lambda: VectorFile.load(path))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(SUFFIXES))
def test_a_damaged_byte(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str) -> None:
    """An npz has checksums: what it gives is right or nothing. A safetensors file has none: it never crashes."""
    folder = tmp_path_factory.mktemp("damaged")
    CONTENT.save(folder / f"v{suffix}")
    content = bytearray((folder / f"v{suffix}").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / f"v{suffix}").write_bytes(content)
    try:
        loaded = VectorFile.load(folder / f"v{suffix}")
    except CembedError:
        return
    finally:
        shutil.rmtree(folder)
    assert np.isfinite(loaded.vectors).all()
    assert len(loaded.documents()) == len(loaded)
    if suffix == ".npz":
        assert_same(loaded)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("offsets", [0, 3, 4, 9]),
        ("offsets", [1, 3, 4, 8]),
        ("offsets", [0, 4, 3, 8]),
        ("offsets", [0, 3, 3, 8]),
        ("offsets", [0, 3, 8]),
        ("offsets", [0, 3, 4, 6, 8]),
        ("offsets", [[0, 3, 4, 8]]),
        ("offsets", []),
        ("offsets", 0),
        pytest.param("offsets", [0.0, 3.0, 4.0, 8.0], id="offsets-float"),
        pytest.param("pages", [0.5, 1.5, 2.5], id="pages-float"),
        ("pages", [1, 12]),
        ("pages", [[1], [12], [1]]),
        ("vectors", np.zeros((7, 4), np.float32)),
        ("vectors", np.zeros((8, 4), np.float64)),
        ("vectors", np.zeros((8, 4), np.float16)),
        ("vectors", np.zeros(8, np.float32)),
        ("vectors", np.zeros((2, 8, 4), np.float32)),
        ("vectors", np.full((8, 4), np.nan, np.float32)),
        ("vectors", np.full((8, 4), -np.inf, np.float32)),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit(path: Path, name: str, value: Any) -> None:
    array = value if isinstance(value, np.ndarray) else np.array(value, getattr(CONTENT, name).dtype)
    if isinstance(value, list) and value and isinstance(value[0], float):
        array = np.array(value, np.float64)
    write(path, arrays_of(CONTENT) | {name: array})
    assert str(path) in refusal(lambda: VectorFile.load(path))


def test_offsets_of_text(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", **(arrays_of(CONTENT) | {"offsets": np.array(["0", "3", "4", "8"])}))
    assert "v.npz" in refusal(lambda: VectorFile.load(tmp_path / "v.npz"))


@pytest.mark.parametrize("place", [(0, 0), (7, 3)])
def test_one_nan_is_enough(path: Path, place: tuple[int, int]) -> None:
    vectors = CONTENT.vectors.copy()
    vectors[place] = np.nan
    write(path, arrays_of(CONTENT) | {"vectors": vectors})
    assert "damaged" in refusal(lambda: VectorFile.load(path))

"""Vector files: what was stored comes back, and what is not one is refused."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from cembed.runtime import CembedError, VectorFile
from cembed.runtime.bundle.vectors import SUFFIXES, VectorParts, check_writable

EMBEDDINGS = [np.arange(12, dtype=np.float32).reshape(3, 4), np.ones((1, 4), np.float32), -np.eye(4, dtype=np.float32)]
PATHS = ["a.pdf", "ordner/Grüße 名前.pdf", 'with "quotes", commas\nand lines.png']
CONTENT = VectorFile.of(EMBEDDINGS, PATHS, [1, 12, 1], "0123abcd")
Arrays = dict[str, Any]


def assert_same(actual: VectorFile, expected: VectorFile = CONTENT) -> None:
    for name in ("vectors", "offsets", "pages"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    assert (actual.paths, actual.bundle, actual.warnings) == (expected.paths, expected.bundle, expected.warnings)


def write(path: Path, arrays: Arrays) -> None:
    """A vector file of any content, by numpy and safetensors alone."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return
    strings = {name: json.dumps([str(p) for p in arrays[name]]) for name in ("paths", "warnings") if name in arrays}
    strings["bundle"] = str(arrays["bundle"])
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items() if k not in strings}, path, strings)


def arrays_of(content: VectorFile) -> Arrays:
    arrays = {**vars(content), "paths": np.array(content.paths), "bundle": np.array(content.bundle)}
    return {name: value for name, value in arrays.items() if name != "warnings"}


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
    refusal(lambda: VectorParts.of([], [], [], "b"))


def test_pages_in_doubt(path: Path) -> None:
    """Files without the field are those of before, and are still written where there is no doubt."""
    doubted = VectorFile.of(EMBEDDINGS, PATHS, [1, 12, 1], "b", ["", "Grüße: half of it is white", ""])
    doubted.save(path)
    assert_same(VectorFile.load(path), doubted)
    assert VectorFile.load(path).warnings == ("", "Grüße: half of it is white", "")
    VectorFile.of(EMBEDDINGS, PATHS, [1, 12, 1], "b", ["", "", ""]).save(path)
    assert VectorFile.load(path).warnings == ()
    assert b"warnings" not in path.read_bytes()


@pytest.mark.parametrize("warnings", [["one"], ["one", "two"], ["one", "two", "three", "four"]])
def test_warnings_that_do_not_fit(path: Path, warnings: list[str]) -> None:
    write(path, arrays_of(CONTENT) | {"warnings": np.array(warnings)})
    assert str(path) in refusal(lambda: VectorFile.load(path))


def test_parts_are_written_as_they_are(path: Path) -> None:
    """No copy of all vectors is made, and none of all paths."""
    pages, paths = [np.full((64, 1024), i, np.float32) for i in range(64)], [f"/folder/{i:0200}.pdf" for i in range(64)]
    parts = VectorParts.of(pages, paths, range(1, 65), "b")
    tracemalloc.start()
    try:
        parts.save(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.1 * sum(page.nbytes for page in pages)
    loaded = VectorFile.load(path)
    assert all(np.array_equal(a, b) for a, b in zip(loaded.documents(), pages, strict=True))
    assert loaded.paths == tuple(paths)


def test_parts_of_any_layout(path: Path) -> None:
    """Views, columns first, foreign byte order."""
    pages = [np.asfortranarray(EMBEDDINGS[0]), EMBEDDINGS[0][::-1], EMBEDDINGS[0].astype(">f4")]
    VectorParts.of(pages, PATHS, [1, 2, 3], "b").save(path)
    for actual, expected in zip(VectorFile.load(path).documents(), pages, strict=True):
        assert np.array_equal(actual, expected)


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
    assert not list(path.parent.iterdir())
    path.touch()
    check_writable(path, force=True)
    assert "--force" in refusal(lambda: check_writable(path, force=False))


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_what_cannot_be_written_is_found_before(path: Path, monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(lambda: check_writable(path, force=True)) == f"cannot write {path}: {os.strerror(reason)}"


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


# Files that would take more memory than they have bytes are refused by their headers.


def npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(shape: tuple[int, ...], kind: str) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


ZEROS = bytes(1 << 25)
BOMBS = {
    "vectors that shrink": {"vectors": header((1 << 16, 128), "<f4") + ZEROS},
    "paths that shrink": {"paths": header((1,), "<U8388608") + ZEROS},
    "warnings that shrink": {"warnings": header((1,), "<U8388608") + ZEROS},
    "a shape of more than there is": {"vectors": header((1 << 40, 128), "<f4") + bytes(512)},
    "a negative shape": {"vectors": header((-2, -64), "<f4") + bytes(512)},
    "a string of more than there is": {"paths": header((1,), "<U400000000") + bytes(4)},
    "an array of objects": {"vectors": header((1 << 30,), "|O")},
    "a long header": {"vectors": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + ZEROS},
    "a header of another version": {"vectors": b"\x93NUMPY\x09\x00" + bytes(200)},
}


def load_in_vain(path: Path) -> tuple[str, int]:
    """What is said, and the memory that it took."""
    tracemalloc.start()
    try:
        return refusal(lambda: VectorFile.load(path)), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA], ids=["deflate", "lzma"])
@pytest.mark.parametrize("name", BOMBS)
def test_an_npz_that_is_a_bomb(tmp_path: Path, name: str, compression: int) -> None:
    path = tmp_path / "v.npz"
    members = {key: npy(value) for key, value in arrays_of(CONTENT).items()} | BOMBS[name]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for key, value in members.items():
            archive.writestr(f"{key}.npy", value)
    message, peak = load_in_vain(path)
    assert message.startswith(f"{path} is not a vector file, or damaged: ")
    assert peak < 4 << 20


def test_an_npz_that_is_compressed_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "v.npz", **arrays_of(CONTENT))
    assert_same(VectorFile.load(tmp_path / "v.npz"))


def tensors(**changes: Any) -> dict[str, Any]:
    known = {
        "vectors": {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 128]},
        "offsets": {"dtype": "I64", "shape": [4], "data_offsets": [128, 160]},
        "pages": {"dtype": "I32", "shape": [3], "data_offsets": [160, 172]},
        "__metadata__": {"paths": json.dumps(PATHS), "bundle": "b"},
    }
    return {name: value | changes.get(name, {}) for name, value in known.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"vectors": {"shape": [1 << 40, 1 << 40]}},
        {"vectors": {"shape": [1 << 30, 128], "data_offsets": [0, 1 << 39]}},
        {"vectors": {"shape": [-8, -4]}},
        {"vectors": {"data_offsets": [128, 0]}},
        {"offsets": {"data_offsets": [0, 32]}},
        {"__metadata__": {"paths": "[" * 100_000}},
        {"__metadata__": {"paths": '"abc"'}},
        {"__metadata__": {"paths": "[1, 2, 3]"}},
        {"__metadata__": {"paths": '{"a": 1, "b": 2, "c": 3}'}},
        {"__metadata__": {"warnings": '"abc"'}},
    ],
    ids=str,
)
def test_a_safetensors_header_that_lies(tmp_path: Path, changes: dict[str, Any]) -> None:
    path, text = tmp_path / "v.safetensors", json.dumps(tensors(**changes)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(172))
    message, peak = load_in_vain(path)
    assert message.startswith(f"{path} is not a vector file, or damaged: ")
    assert peak < 4 << 20


def test_paths_that_safetensors_would_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cembed.runtime.bundle.array_files._MOST_HEADER", 100)
    assert "write .npz" in refusal(lambda: CONTENT.save(tmp_path / "v.safetensors"))
    assert not list(tmp_path.iterdir())


def test_memory_that_does_not_suffice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Iterator[None]:
        raise MemoryError

    CONTENT.save(path)
    monkeypatch.setattr("cembed.runtime.bundle.vectors._texts", fail)
    assert refusal(lambda: VectorFile.load(path)) == f"there is not enough memory for the vectors of {path}"


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

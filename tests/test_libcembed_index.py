"""The C library and indexes: what Python wrote is found as Python finds it, and damage is named."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fuzz_index
import libcembed
import numpy as np
import pytest
from libcembed import CallError, Library
from test_index import BUNDLE, CASES, DIM, PAGES, QUERY, make, some_pages

from cembed.runtime import CembedError
from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.index import index as index_module
from cembed.runtime.index import new_pages, records
from cembed.runtime.index.files import read_current
from cembed.runtime.index.index import Index, NewPage
from cembed.runtime.index.search import Hit


def same(library: Library, folder: Path, top: int = 10, query: np.typing.NDArray[np.float32] = QUERY) -> None:
    """Whether both find the same."""
    theirs, ours = Index.open(folder), libcembed.Index(library, folder)
    info = ours.info
    assert (info.pages, info.dim, info.bundle.decode()) == (len(theirs), theirs.dim, theirs.bundle)
    expected = [(h.id, h.score, h.source, h.page, told(h)) for h in theirs.search(query, top).hits]
    found = [(*hit[:4], json.loads(hit[4])) for hit in ours.search(query, top)]
    assert found == expected
    ours.close()


def told(hit: Hit) -> dict[str, Any]:
    """The metadata with what cembed adds, as an index keeps it."""
    added = {"cembed:warning": hit.warning, "cembed:folder": hit.folder}
    return {**hit.metadata, **{name: value for name, value in added.items() if value is not None}}


@pytest.mark.parametrize("store", ["f32", "f16,u8,bits", "u8"])
def test_it_finds_what_python_finds(library: Library, tmp_path: Path, store: str) -> None:
    """Also what was added later, over segments, removed, and compacted."""
    folder = tmp_path / "index"
    with make(folder, storage=store) as index:
        same(library, folder)  # while a writer has it open
        index.add(some_pages(30, seed=5), bundle=BUNDLE)
        index.remove([PAGES[0].id, PAGES[7].id])
        same(library, folder)
    same(library, folder, top=3)
    with Index.open(folder, write=True) as index:
        index.compact()
    same(library, folder, top=1000)


def test_pages_that_share_their_bytes(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch, over batches and segments, with other metadata, removed, compacted; and filters of them."""
    monkeypatch.setattr(index_module, "SEGMENT_BYTES", 20_000)
    monkeypatch.setattr(new_pages, "BATCH_PAGES", 9)
    folder = tmp_path / "index"
    copies = [
        NewPage(
            f"copy {i}", None, f"copies/{i}.pdf", i, {"copy": i % 2}, page.content, folder="/there" if i % 3 else None
        )
        for i, page in enumerate(PAGES)
    ]
    doubtful = [replace(page, warning="blurred") if i % 5 == 0 else page for i, page in enumerate(PAGES)]
    with make(folder, doubtful) as index:
        assert index.add(copies, bundle=BUNDLE).added == 50
        same(library, folder, top=100)
        index.add([replace(copy, metadata={"copy": 2}) for copy in copies[::4]], bundle=BUNDLE)
        index.remove([page.id for page in PAGES[::3]])
        same(library, folder, top=100)
        ours = libcembed.Index(library, folder)
        for where in ({"copy": 2}, {"copy": 1, "cembed:folder": "/there"}, {"cembed:warning": "blurred"}):
            hits = Index.open(folder).search(QUERY, 100, where=where, source="*[0-9].pdf").hits
            assert hits
            found = ours.search(QUERY, 100, json.dumps(where), "*[0-9].pdf")
            assert [hit[:2] for hit in found] == [(hit.id, hit.score) for hit in hits]
        ours.close()
        index.compact()
    same(library, folder, top=100)


def test_an_index_of_version_1(library: Library) -> None:
    """Written before pages could share bytes."""
    query = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    same(library, CASES / "version1.index", query=query)


def test_an_index_of_a_later_version(library: Library, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CASES / "version1.index", tmp_path / "index"))
    text = (folder / "CURRENT").read_bytes().rpartition(b" ")[0].replace(b'"version": 1', b'"version": 3')
    (folder / "CURRENT").write_bytes(text + b" %08x\n" % zlib.crc32(text))
    with pytest.raises(CallError, match="use a newer cembed"):
        libcembed.Index(library, folder)


def test_logs_with_holes_and_with_what_looks_like_records(library: Library, tmp_path: Path) -> None:
    """As tests/test_index.py has them: a hole is a torn write, and not all that asks for it is read."""
    with make(tmp_path / "index"):
        pass
    log, seed = tmp_path / "index" / "00000001.log", records.seed_of(read_current(tmp_path / "index").index, 1)
    whole = log.read_bytes()
    os.truncate(log, 1 << 32)
    same(library, tmp_path / "index")
    os.truncate(log, 1 << 42)
    with pytest.raises(CallError, match="more than any log"):
        libcembed.Index(library, tmp_path / "index")
    content = bytearray(whole)
    fuzz_index.add_fragments(content, random.Random(0), seed)
    assert len(content) > len(whole) + 65 * 64
    log.write_bytes(content)
    assert ours(library, tmp_path / "index") is None
    assert not python_takes(tmp_path / "index")


def test_stages_are_those_of_python(library: Library, tmp_path: Path) -> None:
    pages = some_pages(1100, dim=512, rows=32)
    with make(tmp_path / "index", pages, "f32,u8,bits"):
        pass
    same(library, tmp_path / "index", query=pages[3].vectors[:4])


def test_a_torn_end_does_not_count(library: Library, tmp_path: Path) -> None:
    with make(tmp_path / "index") as index:
        log = tmp_path / "index" / "00000001.log"
        index.add(some_pages(3, seed=9), bundle=BUNDLE)
    log.write_bytes(log.read_bytes()[:-100])
    same(library, tmp_path / "index")


def test_damage_is_named(library: Library, tmp_path: Path) -> None:
    """A flipped bit anywhere gives what Python gives: a refusal, or hits that are right."""
    with make(tmp_path / "whole"):
        pass
    whole, refused = ours(library, tmp_path / "whole"), 0
    assert whole is not None
    random = np.random.default_rng(3)
    for path in sorted((tmp_path / "whole").iterdir()):
        for _ in range(12 if path.stat().st_size else 0):
            folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "damaged"))
            raw = bytearray(path.read_bytes())
            raw[random.integers(len(raw))] ^= 1 << random.integers(8)
            (folder / path.name).write_bytes(raw)
            found = ours(library, folder)
            assert found in (None, whole)
            assert (found is None) == (not python_takes(folder)), path.name
            refused += found is None
            shutil.rmtree(folder)
    assert refused > 20


CRAFTED = [  # bytes of a record, and what stands in their place
    (b'{"even":true,"number":0}', b'["even",true,"number",0]'),
    (b'{"even":true,"number":0}', b'{"even":true,"number":0 '),
    (b"scans/0.pdf", b"scans/\xff.pdf"),
    (b"scans/0.pdf", b"scans/0.pd\xc3"),
    (b"0/10", b"0/\xed\xa0"),
    (b"0/10", b"0/\xc0\x80"),
]


@pytest.mark.parametrize(("before", "after"), CRAFTED)
def test_records_that_make_no_sense_are_refused_whatever_their_crc(
    library: Library, tmp_path: Path, before: bytes, after: bytes
) -> None:
    with make(tmp_path / "index"):
        pass
    log = tmp_path / "index" / "00000001.log"
    raw, seed = log.read_bytes(), records.seed_of(read_current(tmp_path / "index").index, 1)
    pages, removed = struct.unpack_from("<II", raw, 12)
    (length,) = struct.unpack_from("<Q", raw, 32)
    payload = raw[64 : 64 + length]
    same = records.encode_record(seed, 0, records.COMMIT, pages, removed, payload)
    assert raw.startswith(same)
    assert before in payload
    changed = records.encode_record(seed, 0, records.COMMIT, pages, removed, payload.replace(before, after, 1))
    log.write_bytes(changed + raw[len(same) :])
    assert not python_takes(tmp_path / "index", 99)
    assert ours(library, tmp_path / "index", 99) is None


def ours(library: Library, folder: Path, top: int = 10, query: Vectors = QUERY) -> object:
    """Hits, or None where the index is refused."""
    try:
        return libcembed.Index(library, folder).search(query, top)
    except CallError as error:
        return None if error.status in (libcembed.INDEX, libcembed.ARGUMENT) else error


def python_takes(folder: Path, top: int = 10) -> bool:
    try:
        return bool(Index.open(folder).search(QUERY, top).hits)
    except CembedError:
        return False


def test_what_fuzzing_makes_is_taken_or_refused_as_python_does(library: Library, tmp_path: Path) -> None:
    """Records with good CRCs and wrong numbers, files of other kinds, and others: see tests/fuzz_index.py."""
    counts = {True: 0, False: 0}
    for number in range(150):
        folder = tmp_path / str(number)
        fuzz_index.write_changed(f"c/{number}".encode(), folder)
        query = np.ones((2, fuzz_index.DIM), np.float32)
        found, theirs = ours(library, folder, 100, query), None
        with contextlib.suppress(CembedError):
            theirs = [(hit.id, hit.score) for hit in Index.open(folder).search(query, 100).hits]
        assert ([hit[:2] for hit in found] if isinstance(found, list) else found) == theirs, number
        counts[found is None] += 1
    assert min(counts.values()) > 20


def test_indexes_that_are_refused(library: Library, tmp_path: Path) -> None:
    with pytest.raises(CallError, match="no index"):
        libcembed.Index(library, tmp_path)
    with make(tmp_path / "index"):
        pass
    index = libcembed.Index(library, tmp_path / "index")
    for query, message in (
        (QUERY[:, :8].copy(), "dim"),
        (QUERY * np.nan, "NaN"),
        (np.empty((0, DIM), np.float32), "row"),
    ):
        with pytest.raises(CallError, match=message):
            index.search(query)
    with pytest.raises(CallError, match="top"):
        index.search(QUERY, 0)
    index.close()


# Filters --------------------------------------------------------------------------------------------------------------

BIG = 2**53 + 1
VALUES: list[Any] = [
    0, 1, 1.0, -0.0, True, False, None, "1", "", 0.1, 1e300, BIG, BIG - 1, float(BIG - 1), 2**63, 2**64, 10**40, 1e40,
    int(1e40), -(2**70), "é", "e\u0301", "\0", "\U0010ffff", [], [1, [True]], [1.0, [1]], [[1, 1]], [11], ["1", 1], {},
    [{}], {"a": 1, "b": [2]}, {"b": [2.0], "a": True}, {"a": {"b": None}},
]  # fmt: skip
SOURCES = [
    "",
    "a",
    "b",
    "-",
    "!",
    "]",
    "[",
    "^",
    "\\",
    "a-b",
    "ab",
    "ba",
    "[a]",
    "a\nb",
    "é",
    "eé",
    "aéb-",
    "\U0001f600",
    "\udc80",
]


@pytest.fixture(scope="module")
def filtered(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[libcembed.Index, Index]]:
    """An index with each value, and each source, in two segments; one page is removed."""
    folder: Path = tmp_path_factory.mktemp("filtered") / "index"
    metadata: list[dict[str, Any]] = [{}, {"y": 1}, *({"x": value, "y": i % 3} for i, value in enumerate(VALUES))]
    metadata.append({"x": "\udc80"})  # of a file's name, say
    vectors = [page.vectors for page in some_pages(len(metadata), seed=2)]
    pages = [
        NewPage(str(i), rows, SOURCES[i % len(SOURCES)], 1, data)
        for i, (rows, data) in enumerate(zip(vectors, metadata, strict=True))
    ]
    with make(folder, pages[:20]):
        pass
    with Index.open(folder, write=True) as index:
        index.add(pages[20:], bundle=BUNDLE)
        index.remove(["1"])
    ours = libcembed.Index(library, folder)
    yield ours, Index.open(folder)
    ours.close()


def found(index: tuple[libcembed.Index, Index], where: dict[str, Any] | None, source: str | None, top: int = 99) -> int:
    """How many both find, alike."""
    ours, theirs = index
    wanted = [(hit.id, hit.score) for hit in theirs.search(QUERY, top, where=where, source=source).hits]
    text = None if where is None else json.dumps(where)
    assert [hit[:2] for hit in ours.search(QUERY, top, text, source)] == wanted, (where, source)
    return len(wanted)


def test_values_are_equal_where_python_says_so(filtered: tuple[libcembed.Index, Index]) -> None:
    everything = found(filtered, None, None)
    assert found(filtered, {}, None) == everything == len(VALUES) + 2
    counts = [found(filtered, {"x": value}, None) for value in VALUES]
    assert counts[VALUES.index("1")] == 1
    assert counts[VALUES.index(1)] == 3
    assert set(counts) == {1, 2, 3}
    assert found(filtered, {"x": VALUES[5], "y": 2}, None) < found(filtered, {"y": 2}, None) < everything
    assert found(filtered, {"z": None}, None) == found(filtered, {"x": 1, "z": 1}, None) == 0
    assert found(filtered, {"y": 1}, "[ab]*", 2) == 2


def test_patterns_fit_where_python_says_so(filtered: tuple[libcembed.Index, Index]) -> None:
    rng, patterns = (
        random.Random(0),
        ["", "*", "?", "??", "[!a]*", "a*b-", "[a", "[]a]", "[!]", "[b-a]", "[z-a!-b]", "A"],
    )
    patterns += ["".join(rng.choices("a*b?[]-!^\\é\n", k=rng.randint(1, 9))) for _ in range(3000)]
    counts = {found(filtered, None, pattern) for pattern in patterns}
    assert {0, 1, len(VALUES) + 2} < counts


def test_a_filter_comes_before_the_stages(library: Library, tmp_path: Path) -> None:
    pages = some_pages(1100, dim=512, rows=32)
    with make(tmp_path / "index", pages, "f32,u8,bits"):
        pass
    ours, query = libcembed.Index(library, tmp_path / "index"), pages[3].vectors[:4]
    for where in ({"even": True}, {"number": 7}):
        theirs = Index.open(tmp_path / "index").search(query, 5, where=where).hits
        assert [h[:2] for h in ours.search(query, 5, json.dumps(where))] == [(h.id, h.score) for h in theirs]
    ours.close()


@pytest.mark.parametrize(
    ("where", "source", "message"),
    [
        ("[]", None, "where is no JSON object"),
        ("1", None, "where is no JSON object"),
        ("", None, "where is no JSON object"),
        ('{"a": 1', None, "where is no JSON object"),
        ('{"a": NaN}', None, "where is no JSON object"),
        (b'{"a": "\xff"}', None, "where is no JSON object"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", None, "where is no JSON object"),
        (None, b"\xff", "UTF-8"),
    ],
)
def test_filters_that_are_refused(
    filtered: tuple[libcembed.Index, Index], where: str | bytes | None, source: bytes | None, message: str
) -> None:
    with pytest.raises(CallError, match=message) as error:
        filtered[0].search(QUERY, 5, where, source)
    assert error.value.status == libcembed.ARGUMENT

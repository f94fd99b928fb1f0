"""The index: what goes in comes out, searches are MaxSim's, nothing wrong is ever given. Crashes: tests/crash."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fuzz_index
import numpy as np
import pytest
from numpy.typing import NDArray

from cembed.runtime import CembedError, maxsim
from cembed.runtime.index import compaction, index, new_pages, records, segments
from cembed.runtime.index.index import Added, Index
from cembed.runtime.index.new_pages import NewPage
from cembed.runtime.index.search import Stage, make_plan
from cembed.runtime.index.verify import verify_index
from cembed.runtime.scoring.storage import STORAGE

BUNDLE = "b" * 64
CASES = Path(__file__).with_name("cases")
VERSION_1 = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 3)]  # files and pages of the index in CASES
DIM = 32
Vectors = NDArray[np.float32]


def unit(rows: NDArray[Any]) -> Vectors:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def some_pages(count: int, dim: int = DIM, rows: int | None = None, seed: int = 0) -> list[NewPage]:
    rng = np.random.default_rng(seed)
    return [
        NewPage(
            f"{seed}/{i}",
            unit(rng.standard_normal((rows or int(rng.integers(1, 40)), dim))),
            f"scans/{i // 4}.pdf",
            i % 4 + 1,
            {"even": i % 2 == 0, "number": i},
            f"{seed}-{i}".encode(),
        )
        for i in range(count)
    ]


PAGES = some_pages(50)
QUERY = unit(np.random.default_rng(1).standard_normal((5, DIM)))


def make(folder: Path, pages: Sequence[NewPage] = PAGES, storage: str = "f16,u8,bits") -> Index:
    """An index with pages, open for writing."""
    made = Index.create(folder, dim=pages[0].vectors.shape[1], bundle=BUNDLE, storage=storage.split(","))
    assert made.add(pages, bundle=BUNDLE) == Added(len(pages), 0, 0)
    return made


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Index]:
    with make(tmp_path / "index") as made:
        yield made


@pytest.fixture
def many_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "SEGMENT_BYTES", 10_000)
    monkeypatch.setattr(new_pages, "BATCH_PAGES", 4)


def refusal(call: Any) -> str:
    with pytest.raises(CembedError) as caught:
        call()
    (line,) = str(caught.value).splitlines()
    return line


def ids(found: Any) -> list[str]:
    return [hit.id for hit in found.hits]


def best(pages: Sequence[NewPage], tier: str, top: int) -> list[str]:
    """By MaxSim over what the tier keeps."""
    scores = maxsim([QUERY], [STORAGE[tier].restore(page.vectors) for page in pages])[0]
    return [pages[i].id for i in np.argsort(-scores, kind="stable")[:top]]


# What goes in comes out.


@pytest.mark.parametrize("store", ["f32", "f16", "u8", "bits", "f16,u8,bits", "f32,bits"])
def test_pages_come_back(tmp_path: Path, store: str) -> None:
    make(tmp_path / "index", storage=store).close()
    opened, tier = Index.open(tmp_path / "index"), store.split(",")[0]
    assert (len(opened), opened.dim, opened.bundle, opened.tiers) == (50, DIM, BUNDLE, tuple(store.split(",")))
    for info, page in zip(opened.find(), PAGES, strict=True):
        assert (info.id, info.source, info.page, info.metadata) == (page.id, page.source, page.page, page.metadata)
        assert info.vectors == len(page.vectors)
        assert np.array_equal(opened.vectors(page.id), STORAGE[tier].restore(page.vectors))


def test_bytes_are_those_of_the_arithmetic(tmp_path: Path) -> None:
    pages = some_pages(600, 128, 32)
    with make(tmp_path / "index", pages) as made:
        stats = made.stats()
    arithmetic = 32 * 128 * (2 + 1 + 1 / 8)
    assert stats.bytes_per_page == pytest.approx(arithmetic, rel=0.03)
    assert stats.bytes_per_page >= arithmetic
    assert {name: size / 600 for name, size in stats.bytes.items() if name != "log"} == {
        "f16": 8192,
        "u8": 4096,
        "bits": 512,
    }
    size = sum(path.stat().st_size for path in (tmp_path / "index").iterdir() if path.suffix)
    assert size == pytest.approx(sum(stats.bytes.values()), abs=64)  # and the mark of a writer that ended well


def test_names_of_any_kind(tmp_path: Path) -> None:
    names = ["写真", "a\nb", "x" * 5000, "\udcff", "🦊#1", "'\";--"]
    pages = [NewPage(name, PAGES[0].vectors, name, 0, {name: [None, {"deep": name}]}) for name in names]
    with make(tmp_path / "index", pages) as made:
        assert [page.id for page in made.find()] == names
        assert [page.source for page in made.find()] == names
        assert [page.metadata for page in made.find()] == [page.metadata for page in pages]
        assert all(name in made for name in names)


def test_an_index_of_nothing(tmp_path: Path) -> None:
    with Index.create(tmp_path / "index", dim=DIM, bundle=BUNDLE) as empty:
        assert (len(empty), empty.search(QUERY).hits, empty.find()) == (0, (), [])
        assert empty.add([], bundle=BUNDLE) == Added(0, 0, 0)
        assert empty.compact().pages == 0
        empty.add(PAGES, bundle=BUNDLE)
        empty.remove([page.id for page in PAGES])
        assert (len(empty), empty.search(QUERY).hits) == (0, ())
        assert empty.compact().bytes_after == 0


def test_a_record_that_makes_no_sense_costs_only_its_own_pages(tmp_path: Path) -> None:
    """Records are decoded together. This one has a good CRC, and pages of no vectors."""
    with Index.create(tmp_path / "index", dim=DIM, bundle=BUNDLE) as made:
        for page in PAGES[:5]:
            made.add([page], bundle=BUNDLE)
    log = tmp_path / "index" / "00000001.log"
    content, seed = bytearray(log.read_bytes()), records.seed_of(made._current.index, 1)
    offset, length = fuzz_index.split(content)[2]
    rows = offset + 64 + 8 * len(made.tiers) + 8
    content[rows : rows + 4] = bytes(4)
    fuzz_index.seal(content, offset, length, seed)
    log.write_bytes(content)
    assert f"record at byte {offset} makes no sense" in refusal(lambda: Index.open(tmp_path / "index"))
    left = Index.open(tmp_path / "index", damaged=True)
    assert [page.id for page in left.find()] == [page.id for page in PAGES[:5] if page is not PAGES[2]]


def test_an_index_of_a_later_version_is_not_called_damaged(tmp_path: Path) -> None:
    Index.create(tmp_path / "index", dim=DIM, bundle=BUNDLE).close()
    current = tmp_path / "index" / "CURRENT"
    text = current.read_bytes().rpartition(b" ")[0].replace(b'"version": 1', b'"version": 3')
    current.write_bytes(text + b" %08x\n" % zlib.crc32(text))
    said = refusal(lambda: Index.open(tmp_path / "index"))
    assert "version 3, this cembed reads 1 to 2: use a newer cembed" in said
    assert "damaged" not in said


@pytest.mark.parametrize(
    ("place", "number"), [(24, (1 << 64) - 1), (64 + 8 * len(index.DEFAULT_STORAGE), (1 << 63) - 1)]
)
def test_numbers_that_have_no_next_one_are_refused(tmp_path: Path, place: int, number: int) -> None:
    """That of the record after a damaged one, or the serial of its page; its CRCs are good."""
    with Index.create(tmp_path / "index", dim=DIM, bundle=BUNDLE) as made:
        for page in PAGES[:3]:
            made.add([page], bundle=BUNDLE)
    log = tmp_path / "index" / "00000001.log"
    content, seed = bytearray(log.read_bytes()), records.seed_of(made._current.index, 1)
    offset, length = fuzz_index.split(content)[2]
    content[offset - 1] ^= 1
    content[offset + place : offset + place + 8] = number.to_bytes(8, "little")
    fuzz_index.seal(content, offset, length, seed)
    log.write_bytes(content)
    assert str(log) in refusal(lambda: Index.open(tmp_path / "index"))
    with Index.open(tmp_path / "index", write=True, damaged=True) as left:
        assert left.compact(drop_damaged=True).pages == 1
        assert left.add(PAGES[1:3], bundle=BUNDLE) == Added(2, 0, 0)


# Adding.


def test_what_is_there_is_skipped(small: Index) -> None:
    assert small.knows(PAGES[3].id, PAGES[3].content)
    assert small.add([*PAGES[:10], *some_pages(5, seed=1)], bundle=BUNDLE) == Added(5, 0, 10)
    assert not small.knows(PAGES[3].id, PAGES[4].content)
    assert len(small) == 55


def test_an_id_that_is_there_is_replaced(small: Index) -> None:
    new = [NewPage(page.id, -page.vectors, page.source) for page in PAGES[:7]]
    assert small.add(new, bundle=BUNDLE) == Added(7, 7, 0)
    assert len(small) == 50
    assert np.allclose(small.vectors(PAGES[3].id), -PAGES[3].vectors, atol=1e-3)
    assert not small.knows(PAGES[3].id, PAGES[3].content)
    assert small.add(PAGES[:7], bundle=BUNDLE) == Added(7, 7, 0)
    assert small.stats().removed == 14


def test_the_same_page_twice_in_one_call(small: Index) -> None:
    first, second = (NewPage("twice", vectors) for vectors in (PAGES[0].vectors, PAGES[1].vectors))
    assert small.add([first, second], bundle=BUNDLE) == Added(2, 1, 0)
    assert small.vectors("twice").shape == PAGES[1].vectors.shape
    same = NewPage("once", PAGES[0].vectors, content=b"same")
    assert small.add([same, same], bundle=BUNDLE) == Added(1, 0, 1)


def test_memory_of_a_page_may_be_used_again(tmp_path: Path) -> None:
    buffer = np.zeros((4, DIM), np.float32)

    def pages() -> Iterator[NewPage]:
        for i in range(5000):
            buffer[:] = i
            yield NewPage(str(i), buffer)

    with Index.create(tmp_path / "index", dim=DIM, bundle=BUNDLE, storage=["f32"]) as made:
        made.add(pages(), bundle=BUNDLE)
        assert all((made.vectors(str(i)) == i).all() for i in range(0, 5000, 100))


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (NewPage("x", np.ones((2, DIM + 1), np.float32)), "shape (2, 33)"),
        (NewPage("x", np.ones((0, DIM), np.float32)), "shape (0, 32)"),
        (NewPage("x", np.ones(DIM, np.float32)), "shape (32,)"),
        (NewPage("x", np.full((2, DIM), np.nan, np.float32)), "NaN"),
        (NewPage("x", np.full((2, DIM), -np.inf, np.float32)), "infinity"),
        (NewPage("x", np.full((2, DIM), 1e39)), "infinity"),
        (NewPage("x", np.full((2, DIM), 70000, np.float32)), "f16"),
        (NewPage("", np.ones((2, DIM), np.float32)), "not empty"),
        (NewPage("x", np.ones((2, DIM), np.float32), metadata={"a": object()}), "JSON"),
        (NewPage("x", np.ones((2, DIM), np.float32), metadata={"a": float("nan")}), "JSON"),
        (NewPage("x", np.ones((2, DIM), np.float32), page=-1), "page number -1"),
        (NewPage("x", np.ones((2, DIM), np.float32), content=b"x" * 17), "17 bytes"),
    ],
)
def test_pages_that_cannot_be_kept(small: Index, page: NewPage, words: str) -> None:
    assert words in refusal(lambda: small.add([NewPage("good", QUERY), page], bundle=BUNDLE))
    assert len(small) == 50
    assert small.add([NewPage("good", QUERY)], bundle=BUNDLE) == Added(1, 0, 0)


def test_batches_before_an_error_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_pages, "BATCH_PAGES", 10)

    def pages() -> Iterator[NewPage]:
        yield from PAGES[:35]
        raise KeyboardInterrupt

    with Index.create(tmp_path / "index", dim=DIM, bundle=BUNDLE) as made:
        with pytest.raises(KeyboardInterrupt):
            made.add(pages(), bundle=BUNDLE)
        assert len(made) == 30
        assert made.add(PAGES, bundle=BUNDLE) == Added(20, 0, 30)


def test_vectors_of_another_bundle(small: Index) -> None:
    assert "bundle bbbbbbbbbbbb, these are of cccccccccccc" in refusal(lambda: small.add(PAGES, bundle="c" * 64))


# One content, several pages.


def copy_of(page: NewPage, name: str, metadata: dict[str, Any] | None = None) -> NewPage:
    """The same content under another path, without vectors."""
    return NewPage(f"{name}#1", None, name, 1, metadata or {}, page.content)


def tier_bytes(opened: Index) -> dict[str, int]:
    return {name: size for name, size in opened.stats().bytes.items() if name != "log"}


def scores_of(opened: Index, names: Sequence[str]) -> list[float]:
    scores = {hit.id: hit.score for hit in opened.search(QUERY, 1000).hits}
    return [scores[name] for name in names]


def test_a_content_under_other_ids_is_stored_once(tmp_path: Path) -> None:
    """Each page has its own metadata, filters and removal, before and after compaction."""
    with make(tmp_path / "index") as made:
        before, first = tier_bytes(made), PAGES[7]
        copies = [copy_of(first, f"copies/{i}.pdf", {"copy": i}) for i in range(3)]
        assert not made.knows(copies[0].id, first.content)
        assert made.has_content(first.content)
        assert made.add(copies, bundle=BUNDLE) == Added(3, 0, 0)
        assert made.add(copies, bundle=BUNDLE) == Added(0, 0, 3)
    names = [first.id, *(page.id for page in copies)]
    for step in ("as it is", "compacted", "the first is gone", "without it"):
        with Index.open(tmp_path / "index", write=True) as opened:
            names = names[1:] if step == "the first is gone" else names
            if step == "the first is gone":
                opened.remove([first.id])
            if step in ("compacted", "without it"):
                opened.compact()
            assert tier_bytes(opened) == before
            assert len(set(scores_of(opened, names))) == 1
            assert all(np.array_equal(opened.vectors(name), STORAGE["f16"].restore(first.vectors)) for name in names)
            assert ids(opened.search(QUERY, where={"copy": 1})) == ["copies/1.pdf#1"]
            assert [page.id for page in opened.find(source="copies/*")] == [page.id for page in copies]
        assert all(check.passed for check in verify_index(tmp_path / "index"))
    with Index.open(tmp_path / "index", write=True) as opened:
        opened.remove(names)
        opened.compact()
        assert tier_bytes(opened)["bits"] < before["bits"]


def test_copies_within_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch, or over several; vectors that are given for a content that is there are not used."""
    monkeypatch.setattr(new_pages, "BATCH_PAGES", 7)
    pages = [page for first in PAGES for page in (first, copy_of(first, f"copy of {first.id}"))]
    pages += [NewPage(f"{page.id} again", -page.vectors, content=page.content) for page in PAGES[:9]]
    with Index.create(tmp_path / "index", dim=DIM, bundle=BUNDLE) as made, make(tmp_path / "single") as single:
        assert made.add(iter(pages), bundle=BUNDLE) == Added(109, 0, 0)
        assert tier_bytes(made) == tier_bytes(single)
        for page in PAGES[:9]:
            several = [page.id, f"copy of {page.id}#1", f"{page.id} again"]
            assert len({made.vectors(name).tobytes() for name in several}) == 1
            assert len(set(scores_of(made, several))) == 1


@pytest.mark.usefixtures("many_segments")
def test_copies_in_another_segment_are_bit_for_bit_the_same(tmp_path: Path) -> None:
    with make(tmp_path / "index") as made:
        copies = [copy_of(page, f"copy of {page.id}", {"copy": True}) for page in PAGES]
        assert made.add([*copies, copy_of(PAGES[0], "one more")], bundle=BUNDLE) == Added(51, 0, 0)
        for _ in range(2):
            for page, copy in zip(PAGES, copies, strict=True):
                assert np.array_equal(made.vectors(page.id), made.vectors(copy.id))
            for tier in made.tiers:
                hits = made.search(QUERY, 1000, plan=(Stage(tier, 1000),)).hits
                scores = {hit.id: hit.score for hit in hits}
                assert [scores[page.id] for page in PAGES] == [scores[copy.id] for copy in copies]
            made.remove([page.id for page in PAGES[::3]])
            made.compact()
            made.add([copy_of(page, page.id.removesuffix("#1")) for page in PAGES[::3]], bundle=BUNDLE)
            made.add(PAGES, bundle=BUNDLE)
    assert all(check.passed for check in verify_index(tmp_path / "index"))


def test_other_metadata_replaces_it_without_vectors(small: Index) -> None:
    """Source, page number, warning and folder too; what differs in the order of names only is the same."""
    before, page = tier_bytes(small), PAGES[3]

    def add(metadata: dict[str, Any], source: str = page.source, number: int = page.page) -> Added:
        return small.add([NewPage(page.id, None, source, number, metadata, page.content)], bundle=BUNDLE)

    same, changed = Added(0, 0, 1), Added(0, 0, 0, 1)
    assert add({"number": 3, "even": False}) == same
    assert add({"even": False, "number": True}) == changed
    assert add({"even": False, "number": 3.0}) == changed
    assert add({"even": False, "number": 3.0}) == same
    assert add({}) == changed
    assert add({}, source="elsewhere.pdf") == changed
    assert add({}, source="elsewhere.pdf", number=9) == changed
    info = small.info(page.id)
    assert (info.source, info.page, info.metadata, len(small)) == ("elsewhere.pdf", 9, {}, 50)
    assert tier_bytes(small) == before
    assert small.search(QUERY, where={"number": 3}).hits == ()
    assert np.array_equal(small.vectors(page.id), STORAGE["f16"].restore(page.vectors))
    small.close()
    reopened = Index.open(small.folder)
    assert reopened.info(page.id) == info
    assert reopened.knows(page.id, page.content)


def test_pages_may_trade_contents(small: Index) -> None:
    """As files do that are renamed: the content of the first is gone from its id before the second one asks for it."""
    a, b = PAGES[1], PAGES[2]
    traded = [NewPage(a.id, None, content=b.content), NewPage(b.id, None, content=a.content)]
    assert small.add(traded, bundle=BUNDLE) == Added(2, 2, 0)
    assert np.array_equal(small.vectors(a.id), STORAGE["f16"].restore(b.vectors))
    assert np.array_equal(small.vectors(b.id), STORAGE["f16"].restore(a.vectors))


def test_a_page_without_vectors_needs_a_content_that_is_there(small: Index) -> None:
    for content in (b"", b"nobody's"):
        page = NewPage("x", None, content=content)
        assert "'x' has no vectors" in refusal(lambda page=page: small.add([page], bundle=BUNDLE))
        assert not small.has_content(content)
    small.remove([PAGES[0].id])
    assert small.add([PAGES[0]], bundle=BUNDLE) == Added(1, 0, 0)


def test_vectors_that_are_damaged_are_not_taken_for_a_copy(small: Index) -> None:
    page = PAGES[7]
    start = int(small._snapshot()[0].columns.starts[1][7])
    damage(small.folder / "00000001.u8", start + 3)
    line = refusal(lambda: small.add([copy_of(page, "copy")], bundle=BUNDLE))
    assert "00000001.u8 is damaged" in line
    assert "--drop-damaged" in line
    assert "copy#1" not in small
    small.remove([page.id])
    assert small.add([page], bundle=BUNDLE) == Added(1, 0, 0)  # with vectors of its own
    assert len(small.search(QUERY, 50, plan=(Stage("u8", 50),)).hits) == 50


def test_damage_of_shared_bytes_is_named_for_each_page(small: Index) -> None:
    small.add([copy_of(PAGES[7], "copy")], bundle=BUNDLE)
    small.close()
    start = int(Index.open(small.folder)._snapshot()[0].columns.starts[0][7])
    damage(small.folder / "00000001.f16", start)
    (failed,) = [check for check in verify_index(small.folder) if not check.passed]
    assert "'0/7'" in failed.detail
    assert "'copy#1'" in failed.detail
    with Index.open(small.folder, write=True, damaged=True) as mended:
        assert mended.compact(drop_damaged=True).dropped == ("0/7", "copy#1")
        assert not mended.has_content(PAGES[7].content)


def test_an_index_is_of_the_newer_version_once_pages_share_bytes(small: Index) -> None:
    def version() -> int:
        fields = json.loads((small.folder / "CURRENT").read_bytes().rpartition(b" ")[0])
        assert isinstance(fields, dict)
        return int(fields["version"])

    reader = Index.open(small.folder)
    small.add(some_pages(3, seed=1), bundle=BUNDLE)
    assert version() == 1
    small.add([copy_of(PAGES[0], "copy")], bundle=BUNDLE)
    assert version() == 2
    reader.refresh()
    assert len(reader) == 54
    small.compact()
    assert version() == 2


def test_an_index_of_version_1(tmp_path: Path) -> None:
    """It was written before pages could share bytes, and has ids as they were given then."""
    folder = Path(shutil.copytree(CASES / "version1.index", tmp_path / "index"))
    with Index.open(folder, write=True) as opened:
        assert [page.id for page in opened.find()] == [f"scans/{i}.pdf#{n}" for i, n in VERSION_1]
        before = {page.id: opened.vectors(page.id) for page in opened.find()}
        told = opened.find(source="scans/1.pdf")[0].metadata
        assert told == {"year": 2021, "b": 1, "a": 2}
        again = [
            NewPage(f"scans/{i}.pdf#{n}", None, f"scans/{i}.pdf", n, told, f"{i}-{n}".encode()) for i, n in VERSION_1
        ]
        assert opened.add(again, bundle="b" * 64) == Added(0, 0, 2, 3)  # the year of those in the other file
        assert opened.add([replace(again[0], id="more")], bundle="b" * 64) == Added(1, 0, 0)
        opened.compact()
        after = {page.id: opened.vectors(page.id) for page in opened.find()}
        assert np.array_equal(after.pop("more"), before["scans/0.pdf#1"])
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(check.passed for check in verify_index(folder))


# Warnings, and what else cembed keeps beside the user's metadata.


def test_a_warning_stays_with_its_content(tmp_path: Path) -> None:
    doubtful = replace(PAGES[0], warning="a picture could not be decoded whole")
    with make(tmp_path / "index", [doubtful, *PAGES[1:]]) as made:
        made.add([replace(copy_of(doubtful, "copy"), metadata={"a": 1}, folder="/somewhere")], bundle=BUNDLE)
        assert made.add([PAGES[0]], bundle=BUNDLE) == Added(0, 0, 1)
        assert made.warning_of(doubtful.content) == doubtful.warning
    for step in range(2):
        opened = Index.open(tmp_path / "index")
        assert opened.stats().warnings == 2
        found = {hit.id: hit for hit in opened.search(QUERY, 100).hits}
        assert {name for name, hit in found.items() if hit.warning} == {doubtful.id, "copy#1"}
        assert found["copy#1"].warning == doubtful.warning
        assert (found["copy#1"].metadata, found["copy#1"].folder) == ({"a": 1}, "/somewhere")
        assert opened.info(doubtful.id).metadata == doubtful.metadata
        assert ids(opened.search(QUERY, where={"cembed:warning": doubtful.warning, "a": 1})) == ["copy#1"]
        with Index.open(tmp_path / "index", write=True) as writing:
            writing.remove([PAGES[5 + step].id])
            writing.compact()
    with Index.open(tmp_path / "index", write=True) as opened:
        opened.remove([doubtful.id])
        assert opened.stats().warnings == 1
        opened.remove(["copy#1"])
        assert opened.add([PAGES[0]], bundle=BUNDLE) == Added(1, 0, 0)  # read again, and well
        assert (opened.stats().warnings, opened.warning_of(PAGES[0].content)) == (0, None)


def test_names_of_metadata_that_are_taken(small: Index) -> None:
    for name in ("cembed:warning", "cembed:", "cembed:folder"):
        page = NewPage("x", QUERY, metadata={name: "mine"})
        assert "are cembed's" in refusal(lambda page=page: small.add([page], bundle=BUNDLE))
    fine = {"Cembed:warning": 1, "warning": "mine", "note": '"cembed:warning":"no"', "deep": {"cembed:warning": "x"}}
    small.add([NewPage("x", QUERY, metadata=fine)], bundle=BUNDLE)
    assert (small.info("x").metadata, small.info("x").warning, small.stats().warnings) == (fine, None, 0)


def test_sources(small: Index) -> None:
    found = small.sources()
    assert list(found) == [f"scans/{i}.pdf" for i in range(13)]
    assert (found["scans/3.pdf"].numbers, found["scans/12.pdf"].numbers) == ([1, 2, 3, 4], [1, 2])
    small.remove(["0/12", "0/48", "0/49"])
    small.add([NewPage("x", QUERY, "scans/3.pdf", 9, folder="/here")], bundle=BUNDLE)
    found = small.sources()
    assert list(found) == [f"scans/{i}.pdf" for i in range(12)]
    assert (found["scans/3.pdf"].numbers, found["scans/3.pdf"].folder) == ([2, 3, 4, 9], "/here")


# Searching.


@pytest.mark.parametrize("store", ["f32", "f16", "u8", "bits", "f16,u8,bits"])
def test_a_search_is_maxsim(tmp_path: Path, store: str) -> None:
    tier = store.split(",")[0]
    with make(tmp_path / "index", storage=store) as made:
        found = made.search(QUERY, 7)
        coarse = tier in ("u8", "bits")  # their kernels round the query too
        assert coarse or ids(found) == best(PAGES, tier, 7)
        scores = maxsim([QUERY], [STORAGE[tier].restore(made_of(hit.id).vectors) for hit in found.hits])[0]
        assert [hit.score for hit in found.hits] == pytest.approx(scores.tolist(), abs=0.02 if coarse else 1e-4)
        assert set(ids(made.search(QUERY, 1000))) == {page.id for page in PAGES}


def made_of(name: str) -> NewPage:
    return next(page for page in PAGES if page.id == name)


@pytest.mark.usefixtures("many_segments")
def test_stages_over_segments(tmp_path: Path) -> None:
    with make(tmp_path / "index") as made:
        assert made.stats().segments > 3
        found = made.search(QUERY, 5, candidates=20)
        assert [(stage.tier, stage.pages, stage.kept) for stage in found.stages] == [
            ("bits", 50, 20),
            ("u8", 20, 20),
            ("f16", 20, 5),
        ]
        rows = sum(len(page.vectors) for page in PAGES)
        assert found.stages[0].bytes == rows * DIM // 8
        first = made.search(QUERY, plan=(Stage("bits", 20),))
        left = [page for page in PAGES if page.id in ids(first)]
        assert ids(found) == best(left, "f16", 5)
        assert ids(made.search(QUERY, 5, candidates=50)) == best(PAGES, "f16", 5)
        plan = (Stage("u8", 6), Stage("bits", 3))
        assert len(made.search(QUERY, plan=plan).hits) == 3


def test_equal_pages_come_in_the_order_they_were_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "SEGMENT_BYTES", 5000)
    monkeypatch.setattr(new_pages, "BATCH_PAGES", 3)
    pages = [NewPage(f"{i}", PAGES[i % 2].vectors) for i in range(40)]
    with make(tmp_path / "index", pages) as made:
        for candidates in (None, 40, 10):
            even = ids(made.search(PAGES[0].vectors, 5, candidates=candidates))
            assert even == ["0", "2", "4", "6", "8"]
        made.remove(["2"])
        made.compact()
        assert ids(made.search(PAGES[0].vectors, 3)) == ["0", "4", "6"]


def test_filters_come_before_ranks(small: Index) -> None:
    even = [page for page in PAGES if page.metadata["even"]]
    for candidates in (None, 10):
        assert len(ids(small.search(QUERY, 9, where={"even": True}, candidates=candidates))) == 9
    assert ids(small.search(QUERY, 9, where={"even": True})) == best(even, "f16", 9)
    assert ids(small.search(QUERY, 9, where={"even": True, "number": 4})) == ["0/4"]
    assert ids(small.search(QUERY, source="scans/2.pdf")) == best(PAGES[8:12], "f16", 10)
    assert ids(small.search(QUERY, source="scans/2.pdf", where={"number": 9})) == ["0/9"]
    assert small.search(QUERY, where={"even": "True"}).hits == ()
    assert small.search(QUERY, where={"nothing": None}).hits == ()
    assert [page.id for page in small.find(source="scans/1?.pdf", where={"even": False})][:2] == ["0/41", "0/43"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"query": QUERY[:, :5]}, "shape (5, 5)"),
        ({"query": QUERY[0]}, "shape (32,)"),
        ({"query": QUERY[:0]}, "shape (0, 32)"),
        ({"query": QUERY * np.nan}, "NaN"),
        ({"query": QUERY, "top": 0}, "top is 0"),
        ({"query": QUERY, "candidates": 0}, "candidates 0"),
        ({"query": QUERY, "plan": (Stage("f32", 5),)}, "does not store f32"),
        ({"query": QUERY, "plan": ()}, "one stage or more"),
    ],
)
def test_searches_that_cannot_be(small: Index, arguments: dict[str, Any], words: str) -> None:
    assert words in refusal(lambda: small.search(**arguments))


@pytest.mark.parametrize(
    ("tiers", "size", "top", "candidates", "plan"),
    [
        ("f16 u8 bits", 1 << 20, 10, None, "f16:10"),
        ("f16 u8 bits", 1 << 30, 10, None, "bits:1000 u8:100 f16:10"),
        ("f16 u8 bits", 1 << 30, 100, None, "bits:2000 u8:500 f16:100"),
        ("f16 u8 bits", 1 << 20, 10, 50, "bits:50 u8:50 f16:10"),
        ("f32 u8", 1 << 30, 10, None, "u8:1000 f32:10"),
        ("f16 bits", 1 << 30, 10, 5000, "bits:5000 f16:10"),
        ("f32 f16", 1 << 30, 10, None, "f32:10"),
        ("bits", 1 << 30, 10, None, "bits:10"),
        ("f16 u8 bits", 1 << 30, 10, 3, "bits:10 u8:10 f16:10"),
    ],
)
def test_plans(tiers: str, size: int, top: int, candidates: int | None, plan: str) -> None:
    made = make_plan(tiers.split(), size, top, candidates)
    assert " ".join(f"{stage.tier}:{stage.keep}" for stage in made) == plan


# Removing and compacting.


@pytest.mark.usefixtures("many_segments")
def test_removed_pages_are_gone_and_their_bytes_after_compaction(tmp_path: Path) -> None:
    with make(tmp_path / "index") as made:
        gone = [page.id for page in PAGES[5:30]]
        assert made.remove(gone) == 25
        left = [page for page in PAGES if page.id not in gone]
        for _ in range(2):
            assert [page.id for page in made.find()] == [page.id for page in left]
            assert ids(made.search(QUERY, 10)) == best(left, "f16", 10)
            assert ids(made.search(QUERY, 10, candidates=25)) == best(left, "f16", 10)
            done = made.compact()
            assert done.pages == 25
        assert made.stats().removed == 0
        assert made.add(PAGES, bundle=BUNDLE) == Added(25, 0, 25)
    assert {path.name.partition(".")[0] for path in (tmp_path / "index").iterdir()} > {"LOCK", "CURRENT"}
    assert all(check.passed for check in verify_index(tmp_path / "index"))
    assert len(Index.open(tmp_path / "index")) == 50


def test_removing_what_is_not_there_removes_nothing(small: Index) -> None:
    assert "no page 'nothing'" in refusal(lambda: small.remove([PAGES[0].id, "nothing"]))
    assert PAGES[0].id in small
    assert small.remove([PAGES[0].id, PAGES[0].id]) == 1
    assert PAGES[0].id not in small


def test_many_small_records_become_few(tmp_path: Path) -> None:
    with Index.create(tmp_path / "index", dim=DIM, bundle=BUNDLE) as made:
        for page in PAGES:
            made.add([page], bundle=BUNDLE)
        assert made.stats().records == 50
        made.compact()
        assert made.stats().records == 1
        before = sorted(os.listdir(tmp_path / "index"))
        made.compact()
        assert sorted(os.listdir(tmp_path / "index")) == before  # nothing to do


# One writer, many readers.


def test_a_reader_sees_more_after_refresh(small: Index) -> None:
    reader = Index.open(small.folder)
    small.add(some_pages(5, seed=1), bundle=BUNDLE)
    small.remove([PAGES[0].id])
    assert len(reader) == 50
    reader.refresh()
    assert len(reader) == 54
    assert PAGES[0].id not in ids(reader.search(PAGES[0].vectors, 54))


@pytest.mark.usefixtures("many_segments")
def test_a_reader_goes_on_while_the_index_is_compacted(tmp_path: Path) -> None:
    with make(tmp_path / "index") as made:
        reader = Index.open(made.folder)
        made.remove([page.id for page in PAGES[::2]])
        made.compact()
        made.add(some_pages(30, seed=1), bundle=BUNDLE)
        assert ids(reader.search(QUERY, 50)) == best(PAGES, "f16", 50)
        reader.refresh()
        assert len(reader) == 55


def test_one_writer(small: Index) -> None:
    assert "another process is writing" in refusal(lambda: Index.open(small.folder, write=True))
    reader = Index.open(small.folder)
    assert "write=True" in refusal(lambda: reader.add([], bundle=BUNDLE))
    small.close()
    with Index.open(small.folder, write=True) as other:
        assert "write=True" in refusal(lambda: small.remove([]))
        other.add(some_pages(1, seed=2), bundle=BUNDLE)


def test_readers_in_other_processes(small: Index) -> None:
    code = (
        "import sys; from cembed.runtime.index.index import Index; index = Index.open(sys.argv[1])\n"
        "for line in sys.stdin:\n"
        "    index.refresh(); print(len(index), len(index.find()), flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, small.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        for seed in range(1, 6):
            small.add(some_pages(10, seed=seed), bundle=BUNDLE)
            if seed == 3:
                small.remove([page.id for page in PAGES])
                small.compact()
            print("refresh", file=reader.stdin, flush=True)
            count = len(small)
            assert reader.stdout.readline().split() == [str(count)] * 2


def test_searches_while_another_thread_adds(small: Index) -> None:
    small.search(QUERY)
    failures: list[BaseException] = []
    done = threading.Event()

    def search() -> None:
        try:
            while not done.is_set():
                assert len(small.search(QUERY, 5).hits) == 5
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for seed in range(1, 10):
        small.add(some_pages(20, seed=seed), bundle=BUNDLE)
    small.compact()
    done.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(small) == 230


# What is no index, and what is damaged.


def test_places_where_no_index_can_be_made(small: Index, tmp_path: Path) -> None:
    def create(name: str, **options: Any) -> str:
        return refusal(lambda: Index.create(tmp_path / name, **({"dim": DIM, "bundle": BUNDLE} | options)))

    assert "is an index already" in create("index")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    assert "no index" in create("full")
    (tmp_path / "file").touch()
    assert "file" in create("file")
    assert "No such file" in create("no/where")
    assert "unknown storage 'f8'" in create("new", store=["f8"])  # as it was called
    assert "unknown storage 'f8'" in create("new", storage=["f8"])
    assert "unknown storage" in create("new", storage=[])
    assert "multiple of 8" in create("new", dim=12)
    assert "dim is 0" in create("new", dim=0, storage=["f32"])
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "no").exists()


def test_what_is_no_index(tmp_path: Path) -> None:
    for write in (False, True):
        assert "no index" in refusal(lambda w=write: Index.open(tmp_path / "nothing", write=w))
        assert "no index" in refusal(lambda w=write: Index.open(tmp_path, write=w))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "missing"])
@pytest.mark.parametrize("name", ["CURRENT", "00000001.log", "00000001.u8"])
def test_files_of_another_kind(small: Index, name: str, kind: str) -> None:
    small.close()
    path = small.folder / name
    path.rename(path.with_name("moved"))
    if kind == "link":
        path.symlink_to("moved")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    assert name in refusal(lambda: Index.open(small.folder))


def damage(path: Path, place: int, size: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        changed = bytes(byte ^ 0xFF for byte in file.read(size))
        file.seek(place)
        file.write(changed)


@pytest.mark.parametrize("tier", ["f16", "u8", "bits"])
def test_damaged_vectors_are_named(small: Index, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "RETRY_SECONDS", 0)
    small.close()
    whole = Index.open(small.folder)
    start = int(whole._snapshot()[0].columns.starts[whole.tiers.index(tier)][7])
    damage(small.folder / f"00000001.{tier}", start + 3)
    opened = Index.open(small.folder)
    plan = (Stage(tier, 50),)
    line = refusal(lambda: opened.search(QUERY, plan=plan))
    assert f"00000001.{tier} is damaged between bytes {start} and" in line
    assert "the vectors of '0/7'" in line
    assert "--drop-damaged" in line
    failed = [check for check in verify_index(small.folder) if not check.passed]
    assert [check.name for check in failed] == [f"00000001.{tier}"]
    assert "'0/7'" in failed[0].detail
    with Index.open(small.folder, write=True, damaged=True) as mended:
        assert "'0/7'" in refusal(lambda: mended.search(QUERY, plan=plan))
        assert mended.compact(drop_damaged=True).dropped == ("0/7",)
        assert mended.add(PAGES, bundle=BUNDLE) == Added(1, 0, 49)
    assert all(check.passed for check in verify_index(small.folder))


def test_a_damaged_log_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "RETRY_SECONDS", 0)
    with make(tmp_path / "index", PAGES[:10]) as made:
        end = made.stats().bytes["log"]
        made.add(PAGES[10:20], bundle=BUNDLE)
    damage(made.folder / "00000001.log", 200)
    line = refusal(lambda: Index.open(made.folder))
    assert f"00000001.log is damaged between bytes 0 and {end}" in line
    assert [check.name for check in verify_index(made.folder) if not check.passed] == ["00000001.log"]
    refusal(lambda: Index.open(made.folder, write=True))
    with Index.open(made.folder, write=True, damaged=True) as mended:
        assert len(mended) == 10
        refusal(lambda: mended.add(PAGES, bundle=BUNDLE))
        assert mended.compact(drop_damaged=True).pages == 10
        assert mended.add(PAGES[:20], bundle=BUNDLE) == Added(10, 0, 10)


def test_a_torn_tail_is_cut_off_and_reported(small: Index) -> None:
    small.close()
    for suffix, size in (("log", 100), ("f16", 5000)):
        with (small.folder / f"00000001.{suffix}").open("ab") as file:
            file.write(os.urandom(size))
    assert len(Index.open(small.folder)) == 50
    assert all(check.passed for check in verify_index(small.folder))
    with Index.open(small.folder, write=True) as opened:
        assert [note.partition(": ")[2].split()[2] for note in opened.notes] == ["100", "5000"]
        assert len(opened) == 50
    with Index.open(small.folder, write=True) as opened:
        assert opened.notes == []
    assert len(Index.open(small.folder)) == 50


@pytest.mark.parametrize("size", [1 << 32, 1 << 42])
def test_logs_with_holes_that_no_disk_has_room_for(small: Index, size: int) -> None:
    """Up to what a log may have, the hole is a torn write, which is not looked through."""
    small.close()
    log = small.folder / "00000001.log"
    os.truncate(log, size)
    if size > records.MAX_LOG:
        assert "more than any log" in refusal(lambda: Index.open(small.folder))
        return
    assert len(Index.open(small.folder)) == 50
    with Index.open(small.folder, write=True) as opened:
        assert str(log) in opened.notes[0]
    assert log.stat().st_size < 1 << 20


def test_what_looks_like_records_is_not_read_without_end(small: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers in the tail of a log, with good CRCs, each of which asks for a large payload to be compared."""
    monkeypatch.setattr(records, "FRAGMENT_BYTES", 5 << 20)
    small.close()
    log, seed = small.folder / "00000001.log", records.seed_of(small._current.index, 1)
    content = bytearray(log.read_bytes()) + bytes(64)
    for offset in (len(content), len(content) + (1 << 20)):
        header = bytearray(records.encode_record(seed, 99, records.COMMIT, 1, 0, bytes(4 << 20))[:64])
        header[20] ^= 1
        content[offset:] = header + bytes(8 << 20)
        fuzz_index.seal_header(content, offset, seed)
    log.write_bytes(content)
    assert "2 fragments of records are in it" in refusal(lambda: Index.open(small.folder))


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_a_lock_of_another_kind(small: Index, kind: str) -> None:
    small.close()
    lock = small.folder / "LOCK"
    lock.unlink()
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to("/dev/zero")
    refusal(lambda: Index.open(small.folder, write=True))
    assert len(Index.open(small.folder)) == 50


def test_starts_of_shared_bytes_that_make_no_sense(small: Index) -> None:
    """The record's CRCs are good. Each number in turn is one that is odd, beyond the end, negative, or has no next."""
    small.add([copy_of(PAGES[7], "copy"), copy_of(PAGES[8], "copy 2")], bundle=BUNDLE)
    small.close()
    log, seed = small.folder / "00000001.log", records.seed_of(small._current.index, 1)
    whole = log.read_bytes()
    offset, length = fuzz_index.split(whole)[1]
    first = offset + 64 + 8 * 3 + 2 * (8 + 5 * 4 + 3 * 4 + 16)
    for place in range(first, first + 8 * 6, 8):
        for number in (1, 1 << 40, (1 << 60) + 64, (1 << 63) - 64, (1 << 64) - 64):
            content = bytearray(whole)
            content[place : place + 8] = number.to_bytes(8, "little")
            fuzz_index.seal(content, offset, length, seed)
            log.write_bytes(content)
            assert f"record at byte {offset} makes no sense" in refusal(lambda: Index.open(small.folder))
            assert len(Index.open(small.folder, damaged=True)) == 50
    log.write_bytes(whole)
    assert len(Index.open(small.folder)) == 52


def test_records_that_could_not_be_read_again_are_not_written(small: Index) -> None:
    with pytest.raises(CembedError, match="do less at once"):
        records.encode_record(0, 0, records.COMMIT, payload=bytes(records.MAX_PAYLOAD + 1))


def test_compaction_makes_records_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ids and sources count for the size of a record, as vectors do."""
    monkeypatch.setattr(compaction, "BATCH_BYTES", 100_000)
    pages = [NewPage("é" * 8000 + str(i), QUERY, "é" * 8000 + str(i)) for i in range(40)]
    with make(tmp_path / "index", pages) as made:
        made.remove([pages[0].id])
        made.compact()
        assert made.stats().records > 5
        assert len(made) == 39


def test_hostile_files() -> None:
    assert sum(fuzz_index.fuzz(60, 0, 150).values()) == 150


def test_a_full_disk(small: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", write)
        assert "No space left on device; the index is as it was" in refusal(
            lambda: small.add([NewPage("x", QUERY)], bundle=BUNDLE)
        )
    assert small.add([NewPage("x", QUERY)], bundle=BUNDLE) == Added(1, 0, 0)
    assert len(small) == 51

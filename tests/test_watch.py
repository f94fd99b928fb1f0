"""Folders that are watched, and what befalls them. Time is that of a clock which the tests turn."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_cli import picture

from cembed.runtime import CembedError
from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.disk import Disk
from cembed.runtime.embed.blank import is_blank
from cembed.runtime.embed.embedder import Budget
from cembed.runtime.index.index import Index
from cembed.runtime.intake import moving, survey
from cembed.runtime.intake.folders import Folders
from cembed.runtime.intake.job import LocalPages
from cembed.runtime.intake.ledger import Ledger, ledger_path
from cembed.runtime.intake.opening import open_or_create, reading_of
from cembed.runtime.pages import decoder
from cembed.runtime.pages.documents import PageReader
from cembed.serve.watcher import PATIENCE, Rules, Watcher

STILL = 2.0
DIM = 8


def vectors_of(image: Any) -> Vectors:
    """Two vectors that no other page has."""
    seed = int.from_bytes(hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()[:8], "little")
    vectors = np.random.default_rng(seed).standard_normal((2, DIM)).astype(np.float32)
    normalised: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalised


@dataclass
class Hasher:
    """In the place of an Embedder: its vectors are a hash of the pixels. It counts."""

    count: int = 0
    bundle: Any = field(default_factory=lambda: SimpleNamespace(hash="b" * 64))

    def prepare(self, *_: object) -> None:
        pass

    def embed_image(self, image: Any, budget: Budget) -> Vectors:
        self.count += 1
        return vectors_of(image)


class FullDisk(Disk):
    """Has no room while `full`."""

    full = False

    def write(self, handle: int, data: bytes | memoryview, offset: int) -> None:
        if FullDisk.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(handle, data, offset)


class Place:
    """A folder, an index beside it, and a watcher that comes and goes."""

    def __init__(self, root: Path, reader: PageReader) -> None:
        self.folder, self.path, self.now = root / "in", root / "pages.index", 1000.0
        self.folder.mkdir()
        self.roots: list[Path] = [self.folder]
        self.embedder, self.reader = Hasher(), reader
        self.said: list[str] = []
        self.skip_blank = False
        self._open: tuple[Index, Ledger] | None = None
        self.rules = Rules(stable_for=STILL)

    def start(self, *, retry: bool = False, **rules: Any) -> Watcher:
        """A new watcher, as after the start of the process."""
        self.stop()
        self.rules = Rules(**{"stable_for": STILL, **rules}) if rules else self.rules
        open_or_create(self.path, bundle=self.embedder.bundle.hash, dim=DIM, storage=("f32",)).close()
        index, ledger = Index.open(self.path, write=True, disk=FullDisk()), Ledger.beside(self.path, write=True)
        ledger.adopt(**reading_of(index, "[]", self.skip_blank, "1"))
        if retry:
            ledger.forget_contents()
        self._open = index, ledger
        excluded = [folder for folder in (self.path, self.rules.done, self.rules.failed) if folder]
        embedder: Any = self.embedder
        self.watcher = Watcher(
            folders=Folders.of(self.roots, excluded),
            rules=self.rules,
            index=index,
            pages=LocalPages(embedder, self.reader, Budget(), self.skip_blank),
            settings="[]",
            ledger=ledger,
            say=self.said.append,
            clock=lambda: self.now,
        )
        return self.watcher

    def stop(self) -> None:
        for thing in self._open or ():
            with contextlib.suppress(CembedError):  # no room to say that the log is whole
                thing.close()
        self._open = None

    def step(self, seconds: float = STILL, times: int = 1) -> None:
        for _ in range(times):
            self.now += seconds
            self.watcher.step()

    def settle(self) -> None:
        """Long enough for everything that does not wait for somebody."""
        self.step(STILL, 2 + PATIENCE)

    def put(self, name: str, text: str | None = None, *more: str) -> Path:
        """A file of a page, or of several as a PDF."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pages = [picture(page) for page in (text or name, *more)]
        pages[0].save(path, **({"save_all": True, "append_images": pages[1:]} if path.suffix == ".pdf" else {}))
        return path

    @property
    def index(self) -> Index:
        return Index.open(self.path)

    def pages(self) -> list[str]:
        """Ids, below the folder; each once."""
        ids = [os.path.relpath(page.id, self.folder) for page in self.index.find()]
        assert len(set(ids)) == len(ids)
        return sorted(ids)

    def state(self, name: str) -> Any:
        return self.watcher.ledger.get(str(self.folder / name))

    def is_right(self, name: str, *texts: str) -> bool:
        """Whether the index has the vectors of the file as it is now."""
        found = [page.image for page in self.reader.read([self.folder / name]) if hasattr(page, "image")]
        index = self.index
        return all(
            np.array_equal(index.vectors(f"{self.folder / name}#{number}"), vectors_of(image))
            for number, image in enumerate(found, 1)
        ) and bool(found)


@pytest.fixture(scope="module")
def reader() -> Iterator[PageReader]:
    with PageReader() as opened:
        yield opened


@pytest.fixture
def place(tmp_path: Path, reader: PageReader) -> Iterator[Place]:
    place = Place(tmp_path, reader)
    place.start()
    yield place
    FullDisk.full = False
    place.stop()


def grow(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


# Files that are being written ---------------------------------------------------------------------------------------


def test_a_file_is_taken_when_it_is_still(place: Place) -> None:
    place.put("a.png")
    place.step(0)
    place.step(STILL / 2)
    assert place.pages() == []
    place.step(STILL / 2)
    assert place.pages() == ["a.png#1"]
    assert place.is_right("a.png")


def test_a_slow_writer(place: Place) -> None:
    """Never still until it is done; nothing of a half is seen."""
    data, path = place.put("a.pdf", "one", "two").read_bytes(), place.folder / "slow.pdf"
    (place.folder / "a.pdf").unlink()
    for start in range(0, len(data), len(data) // 10):
        grow(path, data[start : start + len(data) // 10])
        place.step(0.9 * STILL)
        assert place.pages() == []
    place.step()
    assert place.pages() == ["slow.pdf#1", "slow.pdf#2"]
    assert place.embedder.count == 2
    assert place.said == []


@pytest.mark.parametrize("pause", [5.0, 9.0])
@pytest.mark.parametrize("name", ["a.pdf", "a.jpg", "a.png"])
def test_a_writer_that_pauses(place: Place, name: str, pause: float) -> None:
    """Longer than a file has to be still: its half is no failure, and leaves nothing."""
    path = place.put(name, "text " * 3)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    place.step(1.0, int(pause))
    assert [line for line in place.said if "not embedded" in line] == []
    assert place.state(name) is None or place.state(name).state == "waiting"
    path.write_bytes(data)
    place.settle()
    assert place.pages() == [f"{name}#1"]
    assert place.is_right(name)
    assert place.state(name).reasons == ()


def test_rename_into_place(place: Place) -> None:
    for name in ("a.png.part", ".a.png.x7", "~$a.png", "a.tmp"):
        picture("a").save(place.folder / name, "PNG")
    place.settle()
    assert place.pages() == []
    (place.folder / "a.png.part").rename(place.folder / "a.png")
    place.step(0)
    place.step()
    assert place.pages() == ["a.png#1"]


def test_truncated_and_written_again(place: Place) -> None:
    """As over SMB: the old pages are found until the new file is whole."""
    path = place.put("a.png", "old")
    place.settle()
    new = place.put("b.png", "new").read_bytes()
    os.unlink(place.folder / "b.png")
    os.truncate(path, 0)
    place.step(STILL, 3)
    assert place.pages() == ["a.png#1"]
    grow(path, new[:100])
    place.step(0.5 * STILL)
    grow(path, new[100:])
    place.settle()
    assert place.pages() == ["a.png#1"]
    assert place.is_right("a.png")


def test_changed_while_it_is_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = place.put("a.pdf", "one", "two"), PageReader.read

    def instead(self: PageReader, paths: Any) -> Iterator[Any]:
        for page in read(self, paths):
            if page.number == 1:
                grow(path, b"\n")
            yield page

    with monkeypatch.context() as patch:
        patch.setattr(PageReader, "read", instead)
        place.step(STILL, 3)
    assert place.pages() == []
    assert place.state("a.pdf").state == "waiting"
    place.step(STILL, 10)
    assert place.pages() == ["a.pdf#1", "a.pdf#2"]
    assert place.state("a.pdf").state == "indexed"


def test_the_clock_is_set_back(place: Place) -> None:
    """A time of change says when a file is another one, never whether it is old enough."""
    path = place.put("a.png", "one")
    os.utime(path, (time.time() + 1e7,) * 2)
    place.settle()
    assert place.pages() == ["a.png#1"]
    place.put("a.png", "two")
    os.utime(path, (1000, 1000))
    place.settle()
    assert place.is_right("a.png")
    assert place.embedder.count == 2


def test_it_vanishes_before_it_is_read(place: Place) -> None:
    place.put("a.png")
    place.step(0)
    os.unlink(place.folder / "a.png")
    place.settle()
    assert (place.pages(), place.watcher.pending) == ([], {})
    assert place.state("a.png") is None


# Files that cannot be opened or read --------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EBUSY, errno.EIO, errno.ESTALE])
def test_what_may_pass_is_tried_again(place: Place, monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    """Later and later, and never given up: a lock, a missing right, a network that is away."""
    path, tries, opened = place.put("a.png"), list[float](), os.open

    def denied(name: Any, *arguments: Any, **more: Any) -> int:
        if str(name) == str(path):
            tries.append(place.now)
            raise OSError(reason, os.strerror(reason))
        return opened(name, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        place.step(STILL, 200)
        pauses = np.diff(tries)
        assert (np.diff(pauses) >= 0).all()
        assert len(tries) < 10
        assert place.state("a.png").reasons == (os.strerror(reason),)
        assert len(place.said) == 1
    place.step(700.0)
    assert place.pages() == ["a.png#1"]
    assert place.state("a.png").state == "indexed"


def test_a_bad_file_fails_once(place: Place) -> None:
    bad = place.folder / "bad.pdf"
    bad.write_bytes(b"%PDF-1.7 nothing")
    place.put("good.png")
    place.settle()
    (line,) = place.said
    assert line.startswith(f"not embedded: {bad}: ")
    assert place.pages() == ["good.png#1"]
    shutil.copy(bad, place.folder / "again.pdf")
    for _ in range(2):
        place.settle()
        place.start()
    assert place.said == [line]
    assert [place.state(name).state for name in ("bad.pdf", "again.pdf")] == ["failed", "failed"]
    place.start(retry=True)
    place.settle()
    assert len(place.said) == 2  # by its content
    bad.unlink()
    place.put("bad.pdf", "mended")
    place.settle()
    assert place.state("bad.pdf").state == "indexed"
    assert place.pages() == ["bad.pdf#1", "good.png#1"]


def test_a_file_that_is_known_to_be_bad_is_not_opened(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    place.settle()
    monkeypatch.setattr(PageReader, "read", None)
    monkeypatch.setattr(PageReader, "page_count", None)
    shutil.copy(place.folder / "bad.png", place.folder / "again.png")
    place.start()
    place.settle()
    assert place.state("again.png").state == "failed"


def test_a_file_that_kills_the_decoder(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others go on, and it is not tried for ever."""
    deadly, sent = place.put("deadly.png"), list[str]()
    place.put("before.png")
    place.put("with.png")
    send = decoder.Decoder.send

    def sending(self: decoder.Decoder, path: str, number: int) -> None:
        if path == str(deadly):  # stopped first: it could be done with the page before the signal comes
            self._process.send_signal(signal.SIGSTOP)
        send(self, path, number)
        if path == str(deadly):
            sent.append(path)
            self._process.send_signal(signal.SIGKILL)

    monkeypatch.setattr(decoder.Decoder, "send", sending)
    place.settle()
    assert place.pages() == ["before.png#1", "with.png#1"]
    assert place.state("deadly.png").state == "failed"
    assert "died" in place.state("deadly.png").reasons[0]
    tried = len(sent)
    place.step(STILL, 20)
    place.start()
    place.settle()
    assert len(sent) == tried


def test_a_file_of_which_some_pages_fail(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = Hasher.embed_image

    def failing(self: Hasher, image: Any, budget: Budget) -> Vectors:
        if np.asarray(image).shape[0] > 1000:
            raise CembedError("too large")
        return embed(self, image, budget)

    monkeypatch.setattr(Hasher, "embed_image", failing)
    pages = [picture("one"), picture("two", (160, 900)), picture("three")]
    pages[0].save(place.folder / "a.pdf", save_all=True, append_images=pages[1:])
    place.settle()
    assert place.pages() == ["a.pdf#1", "a.pdf#3"]
    entry = place.state("a.pdf")
    assert (entry.state, entry.pages, entry.reasons) == ("failed", 2, ("page 2: too large",))
    shutil.copy(place.folder / "a.pdf", place.folder / "b.pdf")
    count = place.embedder.count
    place.settle()
    assert place.embedder.count == count
    assert place.pages() == ["a.pdf#1", "a.pdf#3", "b.pdf#1", "b.pdf#3"]


# Disks and folders --------------------------------------------------------------------------------------------------


def test_the_disk_is_full_and_then_is_not(place: Place) -> None:
    place.put("a.png")
    place.settle()
    place.put("b.png")
    place.put("c.pdf", "one", "two")
    FullDisk.full = True
    place.step(0)
    for attempt in (place.step, place.step, place.start):
        with pytest.raises(CembedError, match=os.strerror(errno.ENOSPC)):
            attempt()
    assert place.pages() == ["a.png#1"]
    FullDisk.full = False
    place.start()
    place.settle()
    assert place.pages() == ["a.png#1", "b.png#1", "c.pdf#1", "c.pdf#2"]


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("restart", [True, False])
def test_a_folder_is_unmounted_and_comes_back(place: Place, empty: bool, restart: bool) -> None:
    """What is not there for now stays in the index, also of a mirror; what was deleted meanwhile goes."""
    place.start(mirror=True)
    for name in ("a.png", "sub/b.png", "c.png"):
        place.put(name)
    place.settle()
    away = place.folder.with_name("away")
    place.folder.rename(away)
    if empty:
        place.folder.mkdir()  # the mount point
    if restart:
        place.start()
    place.step(STILL, 20)
    assert place.pages() == ["a.png#1", "c.png#1", "sub/b.png#1"]
    (trouble,) = place.watcher.troubles.items()
    assert trouble[0] == str(place.folder)
    assert ("is its disk mounted?" in trouble[1]) == empty
    if empty:
        place.folder.rmdir()
    (away / "c.png").unlink()
    away.rename(place.folder)
    place.settle()
    assert place.watcher.troubles == {}
    assert place.pages() == ["a.png#1", "sub/b.png#1"]
    assert place.embedder.count == 3


def test_a_disk_in_the_folder_is_unmounted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.start(mirror=True)
    place.put("disk/a.png")
    place.put("b.png")
    place.settle()
    held = place.folder.with_name("held")
    (place.folder / "disk").rename(held)
    (place.folder / "disk").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(survey, "_device_at", lambda path: -1 if "/disk/" in path else os.stat(place.folder).st_dev)
        place.step(STILL, 10)
    assert place.pages() == ["b.png#1", "disk/a.png#1"]
    place.settle()  # by now the folder that is there is that of the disk
    assert place.pages() == ["b.png#1"]


def test_a_disk_that_comes_back_with_another_number(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are known, and those that were deleted meanwhile are missed."""
    place.start(mirror=True)
    for name in ("a.png", "b.png"):
        place.put(name)
    place.settle()
    (place.folder / "b.png").unlink()
    stamp_of = survey.Folders._sort

    def renumbered(self: Folders, entries: Any) -> Any:
        files, folders = stamp_of(self, entries)
        return {name: (77, *stamp[1:]) for name, stamp in files.items()}, folders

    monkeypatch.setattr(Folders, "_sort", renumbered)
    monkeypatch.setattr(survey, "_device_at", lambda path: 77)
    place.settle()
    assert (place.pages(), place.embedder.count) == (["a.png#1"], 2)


def test_a_folder_that_cannot_be_listed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.start(mirror=True)
    place.put("closed/deep/a.png")
    place.put("b.png")
    place.settle()
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        place.put("c.png")
        place.step(STILL, 10)
        assert place.watcher.troubles == {str(place.folder / "closed"): os.strerror(errno.EACCES)}
        assert place.pages() == ["b.png#1", "c.png#1", "closed/deep/a.png#1"]
    place.settle()
    assert place.watcher.troubles == {}


def test_links(place: Place, tmp_path: Path) -> None:
    """Those in circles, out of the folder, and to nowhere are passed over; the folder itself may be one."""
    outside = tmp_path / "outside"
    outside.mkdir()
    picture("secret").save(outside / "secret.png")
    place.put("a.png")
    (place.folder / "sub").mkdir()
    for name, target in {
        "sub/circle": place.folder,
        "self": "self",
        "out": outside,
        "out.png": outside / "secret.png",
        "gone.png": "nowhere",
        "same.png": place.folder / "a.png",
    }.items():
        (place.folder / name).symlink_to(target)
    link = tmp_path / "link"
    link.symlink_to(place.folder)
    place.roots = [link]
    place.start()
    place.settle()
    assert place.pages() == ["a.png#1"]
    assert place.said == []


def test_folders_in_folders_are_watched_once(place: Place, tmp_path: Path) -> None:
    place.path = place.folder / "sub" / "pages.index"
    (place.folder / "sub").mkdir()
    place.roots = [place.folder / "sub", place.folder, Path(f"{place.folder}/../in"), tmp_path / "none"]
    place.start()
    for name in ("a.png", "sub/b.png", ".hidden.png", ".git/c.png", "sub/pages.index.x/d.png"):
        place.put(name)
    place.settle()
    assert place.pages() == ["a.png#1", "sub/b.png#1", "sub/pages.index.x/d.png#1"]
    assert set(place.watcher.troubles) == {str(tmp_path / "none")}


def test_names_that_are_no_text(place: Place) -> None:
    names = [b"\xff\xfe.png", "Grüße \U0001f600.png".encode(), b"new\nline.png", b"' OR 1=1 --.png", b"a\\b.png"]
    for name in names:
        picture("a" + repr(name)).save(os.path.join(os.fsencode(place.folder), name))
    place.start(mirror=True)
    place.settle()
    assert len(place.pages()) == len(names)
    place.start()
    place.settle()
    assert place.embedder.count == len(names)
    for name in names:
        os.unlink(os.path.join(os.fsencode(place.folder), name))
    place.settle()
    assert place.pages() == []


# Files that come again, move and go ---------------------------------------------------------------------------------


def test_the_same_content_twice(place: Place) -> None:
    """Is embedded and stored once, and found at both paths; one can go."""
    place.start(mirror=True)
    place.put("a.pdf", "one", "two")
    place.settle()
    size = place.index.stats().bytes["f32"]
    shutil.copy(place.folder / "a.pdf", place.folder / "b.pdf")
    place.settle()
    assert place.pages() == ["a.pdf#1", "a.pdf#2", "b.pdf#1", "b.pdf#2"]
    assert (place.embedder.count, place.index.stats().bytes["f32"]) == (2, size)
    (place.folder / "a.pdf").unlink()
    place.settle()
    assert place.pages() == ["b.pdf#1", "b.pdf#2"]
    assert place.is_right("b.pdf")


@pytest.mark.parametrize("mirror", [True, False])
def test_a_moved_file_keeps_its_vectors(place: Place, mirror: bool) -> None:
    place.start(mirror=mirror)
    place.watcher.metadata = {"year": 2024}
    place.put("a.pdf", "one", "two")
    place.put("old/b.png")
    place.settle()
    place.watcher.metadata = None
    (place.folder / "a.pdf").rename(place.folder / "c.pdf")
    (place.folder / "old").rename(place.folder / "new")
    (place.folder / "old").mkdir()
    place.settle()
    assert place.pages() == ["c.pdf#1", "c.pdf#2", "new/b.png#1"]
    assert place.embedder.count == 3
    assert place.index.info(f"{place.folder}/c.pdf#1").metadata == {"year": 2024}
    (place.folder / "new").rename(place.folder / "newer")  # with its folder, that is
    place.settle()
    assert "newer/b.png#1" in place.pages()
    assert ("new/b.png#1" in place.pages()) != mirror


@pytest.mark.parametrize("mirror", [True, False])
def test_deleted_and_changed_files(place: Place, mirror: bool) -> None:
    place.start(mirror=mirror)
    place.put("a.pdf", "one", "two", "three")
    place.put("b.png")
    place.settle()
    (place.folder / "b.png").unlink()
    place.put("a.pdf", "other")
    place.settle()
    assert place.pages() == (["a.pdf#1"] if mirror else ["a.pdf#1", "b.png#1"])
    assert place.is_right("a.pdf")
    place.put("b.png")
    place.settle()
    assert place.pages() == ["a.pdf#1", "b.png#1"]
    assert place.embedder.count == 5


def test_it_is_gone_for_a_moment(place: Place) -> None:
    """As when a program deletes a file and writes it anew."""
    place.start(mirror=True)
    path = place.put("a.png")
    place.settle()
    data = path.read_bytes()
    path.unlink()
    place.step(STILL / 2)
    path.write_bytes(data)
    removed: list[object] = []
    place.watcher.index.remove = removed.append  # type: ignore[assignment, method-assign]
    place.settle()
    assert (place.pages(), removed, place.embedder.count) == (["a.png#1"], [], 1)


def test_a_mirror_misses_what_went_while_nobody_watched(place: Place) -> None:
    """With its ledger and without."""
    for name in ("a.png", "b.png", "c.png"):
        place.put(name)
    place.settle()
    (place.folder / "a.png").unlink()
    place.start(mirror=True)
    place.settle()
    assert place.pages() == ["b.png#1", "c.png#1"]
    place.stop()
    ledger_path(place.path).unlink()
    (place.folder / "b.png").unlink()
    place.start()
    place.settle()
    assert (place.pages(), place.embedder.count) == (["c.png#1"], 3)


def test_ten_thousand_files_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the decoding left out: nothing is lost, nothing is there twice, and no more than a batch is in hand."""
    count, largest = 10_000, 0
    for number in range(count):
        (place.folder / f"{number:05}.png").write_bytes(number.to_bytes(4, "big"))

    def read(self: PageReader, paths: Any) -> Iterator[Any]:
        nonlocal largest
        largest = max(largest, len(paths))
        for path in paths:
            pixels = np.frombuffer(Path(path).read_bytes().ljust(12, b"\0"), np.uint8).reshape(2, 2, 3)
            yield decoded(path, pixels)

    monkeypatch.setattr(PageReader, "read", read)
    monkeypatch.setattr(PageReader, "page_count", lambda self, path: 1)
    place.step(0)
    place.step()
    assert place.watcher.pending == {}
    assert (len(place.pages()), place.embedder.count) == (count, count)
    assert largest < 100


def decoded(path: str, pixels: Any) -> Any:
    from cembed.runtime.pages.documents import Page

    return Page(path, 1, pixels)


# Files that are moved away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other_disk", [True, False])
def test_done_and_failed_files_are_moved(place: Place, other_disk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search results name the place where a file is in the end."""
    if other_disk:
        replace = os.replace

        def across(a: Any, b: Any) -> None:
            if os.path.dirname(a) != os.path.dirname(b):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            replace(a, b)

        monkeypatch.setattr(moving.os, "replace", across)
    done, failed = place.folder / "done", place.folder.with_name("failed")
    place.start(done=done, failed=failed)
    place.put("a.png")
    place.put("sub/a.png", "other")
    (place.folder / "bad.pdf").write_bytes(b"%PDF-1.7 nothing")
    place.settle()
    assert place.pages() == ["done/a.png#1", "done/sub/a.png#1"]
    assert sorted(path.name for path in failed.rglob("*")) == ["bad.pdf"]
    assert sorted(str(p.relative_to(place.folder)) for p in place.folder.rglob("*.png")) == [
        "done/a.png",
        "done/sub/a.png",
    ]
    place.put("a.png", "again, another one")
    place.put("sub/a.png", "other")  # again, the same
    place.settle()
    assert place.pages() == ["done/a (2).png#1", "done/a.png#1", "done/sub/a.png#1"]
    assert all(os.path.exists(page.source) for page in place.index.find())


def test_a_move_that_was_interrupted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before or after the file was moved: it is where the index says in the end."""
    done = place.folder.with_name("done")
    place.start(done=done)
    place.put("a.png")
    place.put("b.png")
    moves: list[str] = []
    move_file = moving.move_file

    def interrupted(path: str, to: str) -> None:
        if moves:
            raise KeyboardInterrupt
        moves.append(path)
        move_file(path, to)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cembed.serve.watcher.move_file", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                place.settle()
            place.start()
    place.settle()
    assert sorted(path.name for path in done.iterdir()) == ["a.png", "b.png"]
    assert sorted(page.id for page in place.index.find()) == [f"{done}/a.png#1", f"{done}/b.png#1"]
    assert place.embedder.count == 2
    assert place.watcher.ledger.entries("moving") == []


def test_a_folder_that_files_cannot_be_moved_to(place: Place) -> None:
    done = place.folder.with_name("done")
    done.write_bytes(b"")
    place.start(done=done)
    place.put("a.png")
    place.settle()
    assert "cannot be moved to" in place.said[-1]
    done.unlink()
    place.step(60.0, 3)
    assert (done / "a.png").exists()
    assert (place.embedder.count, len(place.pages())) == (1, 1)


def test_a_mirror_moves_no_files() -> None:
    with pytest.raises(CembedError, match="choose one of them"):
        Rules(mirror=True, done=Path("done"))


# Blank pages --------------------------------------------------------------------------------------------------------


def test_blank_pages_are_noted(place: Place) -> None:
    place.skip_blank = True
    place.start()
    blank = Image.new("RGB", (400, 560), "white")
    page = blank.copy()
    ImageDraw.Draw(page).text((100, 200), "something", fill="black")
    page.save(place.folder / "a.pdf", save_all=True, append_images=[blank, page])
    blank.save(place.folder / "blank.png")
    place.settle()
    assert place.pages() == ["a.pdf#1", "a.pdf#3"]
    assert (place.state("blank.png").state, place.state("a.pdf").blank) == ("blank", 1)
    assert place.watcher.tally.blank == 2
    page.save(place.folder / "blank.png")
    blank.save(place.folder / "a.pdf")
    place.settle()
    assert place.pages() == ["blank.png#1"]


def scan(draw: Callable[[ImageDraw.ImageDraw], None] | None = None, noise: float = 3.0) -> Any:
    """Paper as a scanner gives it: noise, a shadow that grows to one side, a punched hole and a staple at the edge."""
    rng = np.random.default_rng(1)
    image = Image.new("RGB", (1240, 1754), (244, 242, 236))
    marks = ImageDraw.Draw(image)
    marks.ellipse((10, 860, 60, 910), fill=(60, 60, 60))
    marks.line((20, 30, 60, 50), fill=(90, 90, 90), width=4)
    if draw is not None:
        draw(marks)
    shade = np.linspace(0, 12, 1240)[None, :, None]
    pixels = np.asarray(image, np.float32) - shade + rng.normal(0, noise, (1754, 1240, 1))
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("noise", [0.0, 2.0, 5.0])
def test_what_is_blank(noise: float) -> None:
    assert is_blank(scan(noise=noise))
    assert not is_blank(scan(lambda d: d.text((600, 900), "3", fill=(40, 40, 40), font_size=24), noise))
    assert not is_blank(scan(lambda d: d.line((300, 500, 900, 500), fill=(150, 150, 170), width=2), noise))
    assert not is_blank(np.random.default_rng(0).integers(0, 255, (600, 400, 3)).astype(np.uint8))  # no paper at all


# The ledger ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, None])
def test_a_ledger_that_is_lost(place: Place, content: bytes | None) -> None:
    """Is made anew: nothing is embedded again, and nothing is lost."""
    place.put("a.png")
    (place.folder / "bad.pdf").write_bytes(b"%PDF-1.7 nothing")
    place.settle()
    place.stop()
    if content is None:
        ledger_path(place.path).unlink()
    else:
        ledger_path(place.path).write_bytes(content)
    place.start()
    place.put("b.png")
    place.settle()
    assert (place.pages(), place.embedder.count) == (["a.png#1", "b.png#1"], 2)
    assert place.state("bad.pdf").state == "failed"


def test_another_index_is_filled_anew(place: Place) -> None:
    place.put("a.png")
    place.settle()
    place.stop()
    shutil.rmtree(place.path)
    place.start()
    place.settle()
    assert place.pages() == ["a.png#1"]


def test_two_watchers(place: Place) -> None:
    with pytest.raises(CembedError, match="another process"):
        open_or_create(place.path, bundle=place.embedder.bundle.hash, dim=DIM)

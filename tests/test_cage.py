"""What the decoding process cannot do, whatever a file makes of it, and that it decodes as it would outside."""

from __future__ import annotations

import io
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import planted
import psutil
import pytest
from PIL import Image
from test_documents import NOISE, encrypted_pdf, pages_pdf, worker_of_this_test

from cembed.runtime import landlock, seccomp
from cembed.runtime.errors import CembedError
from cembed.runtime.pages import cage, decoder
from cembed.runtime.pages.documents import Page, PageError, PageReader
from cembed.runtime.pages.files import _MOST_HELD

CASES = Path(__file__).with_name("cases")
PATH = "import sys; sys.path[:] = sys.argv[2:]; from cembed.runtime.pages import cage, worker as w; "
PLANTED = "import planted; w._open = planted.attempt; "
UNCAGED = "w._enter_cage = lambda *_: None; "
SERVE = "w.serve(sys.argv[1])"
REFUSALS = ("refused: EPERM", "refused: EACCES")
OTHER_REFUSALS = {
    "write to what was handed over": "refused: EBADF",  # it is open for reading
    "write to the socket of requests": "refused: EPIPE",
}
KILLED = "the decoding process died (Bad system call)"
LACKING = {
    "Landlock": "cage.landlock._CREATE_RULESET = 999; ",
    "a filter of system calls": "cage.seccomp.MACHINES = {}; ",
    "Landlock .* and a filter of system calls": "cage.landlock._CREATE_RULESET = 999; cage.seccomp.MACHINES = {}; ",
}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or landlock.call(444, None, 0, 1) < 1,
    reason="Landlock",
)


@dataclass(frozen=True)
class Targets:
    """A folder, and how a process is told of what is there."""

    folder: Path
    told: str


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Targets]:
    """What attempts are made at: the folder of a file of the user, a port and a UNIX socket that are listened on."""
    folder = tmp_path_factory.mktemp("targets")
    (folder / "secret").write_text("the user's own")
    with (
        socket.create_server(("127.0.0.1", 0)) as port,
        socket.socket(socket.AF_UNIX) as named,
    ):
        named.bind(f"\0planted-{os.getpid()}")
        named.listen()
        values = str(folder / "secret"), port.getsockname()[1], named.getsockname()
        yield Targets(folder, f"planted.SECRET, planted.PORT, planted.NAME = {values!r}; ")


@pytest.fixture(scope="module")
def taken_over(targets: Targets) -> Iterator[PageReader]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "BOOT", PATH + PLANTED + targets.told + SERVE)
        reader = PageReader().__enter__()
    yield reader
    reader.__exit__()


@pytest.fixture(scope="module")
def free(targets: Targets) -> Iterator[PageReader]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "BOOT", PATH + PLANTED + targets.told + UNCAGED + SERVE)
        reader = PageReader().__enter__()
    yield reader
    reader.__exit__()


def outcome_of(name: str, folder: Path, reader: PageReader) -> str:
    (folder / "attempt").write_text(name)
    (outcome,) = reader.read([folder / "attempt"])
    assert isinstance(outcome, PageError)
    return outcome.reason


@pytest.mark.parametrize("name", planted.ATTEMPTS)
def test_a_process_that_was_taken_over_cannot(
    name: str, tmp_path: Path, taken_over: PageReader, targets: Targets
) -> None:
    """All in one process, until one of them ends it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "BOOT", PATH + PLANTED + targets.told + SERVE)
        result = outcome_of(name, tmp_path, taken_over)
    assert result in (OTHER_REFUSALS.get(name), *REFUSALS, KILLED)
    assert [path.name for path in targets.folder.iterdir()] == ["secret"]


@pytest.mark.parametrize(
    "name",
    ["open a file of the user", "open what was handed over by its path", "look at a path", "fork", "clone",
     "connect over TCP", "listen on TCP", "listen on a UNIX socket", "connect to a UNIX socket", "list a folder",
     "turn memory into code", "map a file as code", "control what was handed over", "write a file"],
)  # fmt: skip
def test_it_could_outside_of_the_cage(name: str, tmp_path: Path, free: PageReader) -> None:
    """What is refused above is refused by the cage, and tried in earnest."""
    assert outcome_of(name, tmp_path, free).startswith(planted.SUCCESS)


def samples(folder: Path) -> list[Path]:
    """A file of every kind, sound and damaged ones."""
    for path in CASES.iterdir():
        if path.suffix != ".index":
            shutil.copy(path, folder)
    image = Image.fromarray(NOISE)
    for suffix in ("png", "jpg", "webp", "bmp", "gif", "tif"):
        image.save(folder / f"noise.{suffix}")
        content = (folder / f"noise.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(content[: len(content) * 19 // 20])
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "LAB"):
        made = Image.frombytes("LAB", (60, 40), NOISE.tobytes()) if mode == "LAB" else image.convert(mode)
        made.save(folder / f"{mode}.tif", compression="tiff_lzw")
    image.save(folder / "progressive.jpg", progressive=True)
    (folder / "locked.pdf").write_bytes(encrypted_pdf(b""))
    (folder / "late.pdf").write_bytes(b"something before" + pages_pdf(b"1 0 0 rg 0 0 9 9 re f"))
    font = b"<< /Type /Font /Subtype /TrueType /BaseFont /%s /Encoding /WinAnsiEncoding >>"
    for name in (b"DejaVuSans", b"DejaVuSerif-Bold", b"Helvetica", b"NotThere"):
        text = pages_pdf(b"BT /F3 20 Tf 5 5 Td (Page) Tj ET", more=(font % name,))
        (folder / f"{name.decode()}.pdf").write_bytes(text.replace(b"/XObject <<", b"/Font <<"))
    return sorted(folder.iterdir())


def test_every_kind_is_decoded_as_it_is_outside_of_the_cage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = samples(tmp_path)
    with PageReader(dpi=72, require_sandbox=True) as reader:
        inside = list(reader.read(files))
    monkeypatch.setattr(decoder, "BOOT", PATH + UNCAGED + SERVE)
    with PageReader(dpi=72) as reader:
        outside = list(reader.read(files))
    assert len(inside) > len(files)
    for one, two in zip(inside, outside, strict=True):
        if isinstance(one, PageError):
            assert one == two
        else:
            assert isinstance(two, Page)
            assert (one.path, one.number, one.warning) == (two.path, two.number, two.warning)
            np.testing.assert_array_equal(one.image, two.image, err_msg=one.place)
    assert sum(isinstance(outcome, Page) for outcome in inside) > 30


def test_fonts_of_the_machine_are_read_through_the_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where Landlock leaves nothing else to be opened."""
    (tmp_path / "attempt").write_text("open a font")
    font = next((path for folder in cage.FONTS for path in Path(folder).rglob("*.ttf")), None)
    if font is None:
        pytest.skip("no fonts")
    planting = f"import planted; planted.ATTEMPTS['open a font'] = lambda *_: planted.opened({str(font)!r}); "
    monkeypatch.setattr(decoder, "BOOT", PATH + planting + PLANTED + SERVE)
    with PageReader() as reader:
        assert outcome_of("open a font", tmp_path, reader).startswith(planted.SUCCESS)
    monkeypatch.setattr(decoder, "BOOT", PATH + planting + PLANTED + LACKING["Landlock"] + SERVE)
    decoder._say.cache_clear()
    with PageReader() as reader, pytest.warns(RuntimeWarning, match="Landlock"):
        assert outcome_of("open a font", tmp_path, reader) == "refused: EPERM"


# ---- systems that lack it


@pytest.mark.parametrize("lacking", LACKING)
def test_what_the_system_lacks_is_said_once_or_an_error(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(decoder, "BOOT", PATH + LACKING[lacking] + SERVE)
    decoder._say.cache_clear()
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    for _ in range(2):
        with PageReader() as reader:
            (page,) = reader.read([tmp_path / "a.png"])
            assert isinstance(page, Page)
    (warning,) = (one.message for one in recwarn if one.category is RuntimeWarning)
    assert str(warning).startswith("files are decoded without the protection of ")
    with PageReader(require_sandbox=True) as reader, pytest.raises(CembedError, match=f"required .* lacks {lacking}"):
        list(reader.read([tmp_path / "a.png"]))


def test_both_machines_have_a_filter_that_the_kernel_takes_in_size() -> None:
    for column, architecture in seccomp.MACHINES.values():
        steps = list(cage._filter(column, architecture, fonts=True))
        assert all(len(step) == 8 for step in steps)
        assert len(steps) < 4096


# ---- files that change, and descriptors


def test_a_file_that_is_replaced_is_read_as_it_was_opened(tmp_path: Path) -> None:
    old = pages_pdf(*[b"1 0 0 rg 0 0 100 50 re f"] * 70)
    (tmp_path / "a.pdf").write_bytes(old)
    (tmp_path / "new").write_bytes(old.replace(b"1 0 0 rg", b"0 0 1 rg"))
    with PageReader(dpi=72) as reader:
        pages = reader.read([tmp_path / "a.pdf", tmp_path / "b.pdf"])
        first = next(pages)
        os.replace(tmp_path / "new", tmp_path / "a.pdf")
        *rest, absent = pages
        assert {tuple(page.image[9, 9]) for page in (first, *rest) if isinstance(page, Page)} == {(255, 0, 0)}
        assert len(rest) == 69
        assert absent == PageError(str(tmp_path / "b.pdf"), None, "No such file or directory")
        page, _ = reader.page(tmp_path / "a.pdf", 2)
        assert isinstance(page, Page)
        assert tuple(page.image[9, 9]) == (0, 0, 255)


def test_a_file_that_is_cut_while_it_is_read_costs_its_pages_only(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pages_pdf(*[b"1 0 0 rg 0 0 100 50 re f %" + b"x" * 9999] * 40))
    Image.fromarray(NOISE).save(tmp_path / "b.png")
    with PageReader(dpi=72) as reader:
        pages = reader.read([tmp_path / "a.pdf", tmp_path / "b.png"])
        assert isinstance(next(pages), Page)
        os.truncate(tmp_path / "a.pdf", 100)
        *rest, last = pages
    assert isinstance(last, Page)
    reasons = {outcome.reason for outcome in rest if isinstance(outcome, PageError)}
    assert reasons
    assert all("died (Bus error)" in one or "no PDF" in one or "left out" in one for one in reasons), reasons


def test_many_files_leave_no_descriptors(tmp_path: Path) -> None:
    files = [path for path in samples(tmp_path) if path.name != "a0.tif"]  # it is large
    with PageReader(dpi=36) as reader:
        list(reader.read(files[:3]))
        mine, worker = psutil.Process(), worker_of_this_test()
        before = mine.num_fds(), worker.num_fds()
        for _ in range(10):
            list(reader.read([*files[3:], files[0]]))
            reader.page_count(tmp_path / "absent.pdf")
        assert worker.is_running()
        assert mine.num_fds() == before[0]
        assert worker.num_fds() <= before[1] + 2 + _MOST_HELD


def test_a_pipe_is_never_waited_for_though_it_took_the_place_of_a_file(tmp_path: Path) -> None:
    """Between the look at a path and its opening."""
    os.mkfifo(tmp_path / "a.png")
    Image.fromarray(NOISE).save(tmp_path / "b.png")
    stat = os.stat(tmp_path / "b.png")
    with PageReader() as reader, pytest.MonkeyPatch.context() as patch:
        patch.setattr("cembed.runtime.pages.files.os.stat", lambda *_: stat)
        (refused,) = reader.read([tmp_path / "a.png"])
    assert refused == PageError(str(tmp_path / "a.png"), None, "is not a regular file")


def test_links_are_followed(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    with PageReader() as reader:
        (page,) = reader.read([tmp_path / "b.png"])
    assert isinstance(page, Page)


@pytest.mark.parametrize("size", [3 << 20, 300 << 20])
def test_a_large_pdf_takes_addresses_and_no_memory(tmp_path: Path, size: int) -> None:
    """A file of more than memory_limit can be mapped; what comes after it is limited as ever."""
    content = pages_pdf(b"1 0 0 rg 0 0 100 50 re f")
    with (tmp_path / "a.pdf").open("wb") as file:
        file.write(content)
        file.truncate(size)
        file.seek(0, io.SEEK_END)
        file.write(b"\n" + content[content.rindex(b"startxref") :])
    Image.new("RGB", (8000, 8000)).save(tmp_path / "b.png", compress_level=1)
    Image.fromarray(NOISE).save(tmp_path / "c.png")
    with PageReader(dpi=72, memory_limit=100 << 20) as reader:
        page, *_ = reader.read([tmp_path / "a.pdf", tmp_path / "c.png"])
        assert isinstance(page, Page), page
        (tmp_path / "a.pdf").unlink()
        small, refused = reader.read([tmp_path / "c.png", tmp_path / "b.png"])
    assert isinstance(small, Page)
    assert refused == PageError(str(tmp_path / "b.png"), 1, "needs more than memory_limit, 100 MiB")


def test_readers_of_several_threads_have_cages_of_their_own(tmp_path: Path) -> None:
    """And a process lives on when the thread ends that has started it."""
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    reader, pages = PageReader(), list[Page | PageError]()
    entering = threading.Thread(target=reader.__enter__)
    entering.start()
    entering.join()
    try:
        pages += reader.read([tmp_path / "a.png"])
    finally:
        reader.__exit__()
    assert [type(page) for page in pages] == [Page]


def test_secrets_of_the_environment_stay_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("SOME_TOKEN", "LANGCHAIN_API_KEY", "HOMEBREW_GITHUB_API_TOKEN", "PYTHON_KEYRING_X", "PATH_TO_SECRET")
    for name in secrets:
        monkeypatch.setenv(name, "of another program")
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    with PageReader() as reader:
        assert len(list(reader.read([tmp_path / "a.png"]))) == 1
        told = Path(f"/proc/{worker_of_this_test().pid}/environ").read_bytes()
    assert b"PATH=" in told
    assert not [name for name in secrets if name.encode() in told]

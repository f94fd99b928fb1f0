"""`cembed index` and searches of an index, as a person uses them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_cli import Outcome, cembed, cembed_process, picture
from test_index import CASES

from cembed.index_cli import open_to_add
from cembed.options import PageVectors, Reading, settings_of
from cembed.runtime import Embedder, maxsim
from cembed.runtime.bundle.manifest_file import write_manifest
from cembed.runtime.embed.embedder import Budget
from cembed.runtime.index.index import Index
from cembed.runtime.intake import job as index_job
from cembed.runtime.intake.job import Job, LocalPages
from cembed.runtime.intake.sources import Sources
from cembed.runtime.pages import decoder
from cembed.runtime.pages.documents import Page, PageError, PageReader, find_documents


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A folder of four pages in three files."""
    folder = tmp_path / "scans"
    (folder / "Anhänge").mkdir(parents=True)
    pages = [picture("first"), picture("second", (120, 160))]
    pages[0].save(folder / "report.pdf", save_all=True, append_images=pages[1:])
    picture("photo").save(folder / "Anhänge" / "写真.png")
    picture("letter").save(folder / "letter.png")
    return folder


@dataclass
class Shelf:
    """An index, and what adds to it: the command, or without its start, a job."""

    path: Path
    embedder: Embedder
    reader: PageReader

    @property
    def bundle(self) -> Path:
        return self.embedder.bundle.root

    def add(self, *arguments: object) -> Outcome:
        return cembed("index", "add", self.path, *arguments, "--bundle", self.bundle)

    def run(self, *paths: object, metadata: dict[str, Any] | None = None, reader: PageReader | None = None) -> Job:
        """Ended or interrupted."""
        with open_to_add(self.path, self.embedder, None, ["f16", "u8", "bits"]) as opened:
            pages = LocalPages(self.embedder, reader or self.reader, Budget())
            job = Job(index=opened, pages=pages, settings="[]", metadata=metadata)
            with contextlib.suppress(KeyboardInterrupt):
                job.plan(find_documents(map(str, paths)))
                job.run(lambda: None)
        return job

    def pages(self) -> dict[str, tuple[bytes, dict[str, Any]]]:
        """Vectors and metadata by id."""
        opened = Index.open(self.path)
        return {page.id: (opened.vectors(page.id).tobytes(), dict(page.metadata)) for page in opened.find()}

    def ids(self) -> list[str]:
        return sorted(self.pages())


def counts(job: Job) -> tuple[int, int]:
    """Pages that were added, and that were there."""
    return job.added, job.skipped + job.changed


@pytest.fixture(scope="module")
def parts(causal_bundle: Path) -> Iterator[tuple[Embedder, PageReader]]:
    with PageReader() as reader:
        yield Embedder.load(causal_bundle), reader


@pytest.fixture
def shelf(parts: tuple[Embedder, PageReader], tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf", *parts)


@pytest.fixture
def index(causal_bundle: Path, scans: Path, tmp_path: Path) -> Path:
    path = tmp_path / "pages.index"
    outcome = cembed("index", "add", path, scans, "--bundle", causal_bundle, "--metadata", "year=2024")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{path}: 4 pages added, 0 were there; 4 pages, ")
    return path


def names(index: Path) -> set[str]:
    return {page.id.rpartition("/")[2] for page in Index.open(index).find()}


def test_add_and_search(causal_bundle: Path, scans: Path, index: Path) -> None:
    opened, embedder = Index.open(index), Embedder.load(causal_bundle)
    photo = embedder.embed_images([picture("photo")])[0]
    assert abs(opened.vectors(f"{scans}/Anhänge/写真.png#1") - photo).max() < 1e-3
    outcome = cembed("search", index, "first page", "--bundle", causal_bundle, "--json", "--top", 3)
    assert outcome.status == 0
    rows = json.loads(outcome.out)
    assert [set(row) for row in rows] == [{"rank", "score", "id", "path", "page", "metadata"}] * 3
    query = embedder.embed_query("first page")
    scores = {page.id: maxsim([query], [opened.vectors(page.id)])[0, 0] for page in opened.find()}
    assert [row["id"] for row in rows] == sorted(scores, key=lambda page: -scores[page])[:3]
    assert [row["score"] for row in rows] == pytest.approx([scores[row["id"]] for row in rows], abs=1e-4)
    assert all(row["metadata"] == {"year": 2024} for row in rows)
    table = cembed("search", index, "first page", "--bundle", causal_bundle, "--explain").out
    assert "'first page' among 4 pages" in table
    assert "stages of the search" in table
    assert "写真.png" in table


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ((), ("f16", "u8", "bits")),
        (("--storage", "f32"), ("f32",)),
        (("--storage", "bits,f16"), ("f16", "bits")),
        (("--storage", "bits", "--storage", "f32, u8"), ("f32", "u8", "bits")),
        (("--store", "u8"), ("u8",)),  # as it was called
        (("--store", "u8", "--storage", "f16"), ("f16", "u8")),
    ],
)
def test_how_a_new_index_keeps_vectors(shelf: Shelf, scans: Path, options: tuple[str, ...], kept: tuple[str]) -> None:
    assert shelf.add(scans / "letter.png", *options).status == 0
    assert Index.open(shelf.path).tiers == kept


def test_old_names_of_options_are_not_shown() -> None:
    shown = cembed("index", "add", "--help").out
    assert "--storage" in shown
    assert "--store " not in shown


def test_pages_of_indexes_that_are_there_stay_known() -> None:
    """A page's content hash has these settings in it."""
    assert settings_of(PageVectors(), Reading(dpi=144.0)) == "[null, null, 1, null, 144.0]"
    chosen = PageVectors(num_vectors=8, dim=64, pool_factor=2, max_visual_tokens=96, decode="loop")
    assert settings_of(chosen, Reading(dpi=72.0, timeout=3.0, max_pixels=9)) == "[8, 64, 2, 96, 72.0, 9]"


def test_search_by_image(causal_bundle: Path, scans: Path, index: Path) -> None:
    image = scans / "letter.png"
    outcome = cembed("search", index, "--image", image, "--bundle", causal_bundle, "--json", "--explain")
    shown = json.loads(outcome.out)
    assert shown["pages"][0]["path"] == str(image)
    assert shown["stages"][0].keys() == {"stage", "pages", "kept", "ms", "bytes"}
    both = cembed("search", index, "both", "--image", image, "--bundle", causal_bundle).error
    assert both == "QUERY and --image both say what to look for: give either of them"
    none = cembed("search", index, "--bundle", causal_bundle).error
    assert none == "nothing to look for: give either a QUERY or an --image"


def test_filters_and_stages(causal_bundle: Path, scans: Path, index: Path) -> None:
    command = ("search", index, "page", "--bundle", causal_bundle, "--json")
    assert len(json.loads(cembed(*command, "--source", "*.pdf").out)) == 2
    assert len(json.loads(cembed(*command, "--where", "year=2024").out)) == 4
    assert json.loads(cembed(*command, "--where", "year=2025").out) == []
    assert "KEY=VALUE" in cembed(*command, "--where", "year").error
    shown = json.loads(cembed(*command, "--candidates", 3, "--top", 2, "--explain").out)
    assert [(stage["stage"], stage["kept"]) for stage in shown["stages"]] == [("bits", 3), ("u8", 3), ("f16", 2)]
    shown = json.loads(cembed(*command, "--exact", "--explain").out)
    assert [stage["stage"] for stage in shown["stages"]] == ["f16"]


def test_options_of_an_index_for_a_vector_file(causal_bundle: Path, scans: Path, tmp_path: Path) -> None:
    file = tmp_path / "v.npz"
    assert cembed("embed", causal_bundle, scans, "--out", file).status == 0
    options = ("--explain", "--where", "year=2024")
    said = cembed("search", file, "x", "--bundle", causal_bundle, *options).error
    assert said == f"{file} is a vector file and no index: leave out --where, --explain"
    missing = cembed("search", tmp_path / "none.npz", "x", "--bundle", causal_bundle, "--explain").error
    assert "none.npz" in missing
    assert "leave out" not in missing
    rows = json.loads(cembed("search", file, "--image", scans / "letter.png", "--bundle", causal_bundle, "--json").out)
    assert rows[0]["path"] == str(scans / "letter.png")


def test_adding_again_goes_on(causal_bundle: Path, scans: Path, index: Path) -> None:
    command = ("index", "add", index, scans, "--bundle", causal_bundle)
    assert "0 pages added, 4 were there; 4 pages" in cembed(*command).out
    picture("more").save(scans / "more.png")
    shutil.copy(scans / "letter.png", scans / "copy.png")
    said = cembed(*command).out
    assert "2 pages added, 4 were there; 6 pages" in said
    assert "1 of the added without embedding, as their content was there" in said
    assert names(index) == {"report.pdf#1", "report.pdf#2", "写真.png#1", "letter.png#1", "copy.png#1", "more.png#1"}
    picture("other").save(scans / "report.pdf")
    said = cembed(*command).out
    assert "1 pages added, 4 were there; 5 pages" in said
    assert "1 removed that their files do not have any more" in said
    assert "report.pdf#2" not in names(index)
    assert "5 pages added, 0 were there; 5 pages" in cembed(*command, "--num-vectors", 3).out
    assert {page.vectors for page in Index.open(index).find()} == {3}


def test_add_reports_what_it_could_not_read(causal_bundle: Path, scans: Path, tmp_path: Path) -> None:
    (scans / "empty.pdf").touch()
    outcome = cembed("index", "add", tmp_path / "index", scans, "--bundle", causal_bundle)
    assert outcome.status == 3
    assert outcome.err == f"not embedded: {scans}/empty.pdf: the file is empty\n"
    assert "4 pages added" in outcome.out


# What cannot be read removes nothing.


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def lock_away(path: Path) -> None:
    """A PDF that asks for a password."""
    lock = b"/Encrypt << /Filter /Standard /V 1 /R 2 /O (x) /U (y) /P 0 >> "
    path.write_bytes(path.read_bytes().replace(b"/Root 8 0 R", lock + b"/Root 8 0 R"))


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "half of it": lambda path: cut(path, 900),
    "its start": lambda path: cut(path, 9),
    "empty": lambda path: cut(path, 0),
    "garbage": lambda path: path.write_bytes(os.urandom(3000)),
    "text": lambda path: path.write_text("Dear Sir or Madam"),
    "no pages": lambda path: shortened(path, 0),
    "password": lock_away,
    "pipe": replace_by(os.mkfifo),
    "socket": replace_by(lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))),
    "folder": replace_by(Path.mkdir),
    "dangling link": replace_by(lambda path: path.symlink_to("nowhere.pdf")),
    "link to itself": replace_by(lambda path: path.symlink_to(path)),
    "link to a device": replace_by(lambda path: path.symlink_to("/dev/zero")),
}


@pytest.fixture
def five(shelf: Shelf, tmp_path: Path) -> Path:
    """A PDF of five pages, added with metadata."""
    path = tmp_path / "five.pdf"
    shutil.copy(CASES / "five.pdf", path)
    assert counts(shelf.run(path, metadata={"year": 2024})) == (5, 0)
    return path


def test_files_that_cannot_be_read_remove_nothing(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    files = {kind: tmp_path / f"{kind}.pdf" for kind in UNREADABLE}
    for path in files.values():
        shutil.copy(CASES / "five.pdf", path)
    shelf.run(*files.values())
    before = shelf.pages()
    assert len(before) == 5 * len(UNREADABLE)
    for kind, path in files.items():
        UNREADABLE[kind](path)
    picture("beside them").save("beside.png")
    # What is neither a file nor a folder is a mistake in what is given.
    refused = [path for path in files.values() if not path.is_dir() and not path.is_file()]
    outcome = shelf.add(*(path for path in files.values() if path not in refused), "beside.png")
    assert outcome.status == 3
    for path in refused:
        files.pop(next(kind for kind, file in files.items() if file == path))
        assert shelf.add(path).status == 1
    for kind, path in files.items():  # of a folder only what is in it is asked for
        (line, *more) = [line for line in outcome.err.splitlines() if f"{path}: " in line] or ["a folder"]
        assert not more
        kept = line.startswith("not embedded: ") and "5 pages" in line and line.endswith("stay in the index")
        assert kept or kind == "folder", line
    assert "password.pdf: encrypted" in outcome.err
    after = shelf.pages()
    assert after.pop("beside.png#1")
    assert after == before


def test_a_file_that_is_cut_off_anywhere_loses_no_page(shelf: Shelf, tmp_path: Path) -> None:
    """Of some cuts all that is left can be read, page by page; what is after them stays in the index all the same."""
    pages = [picture(f"page {i}", (60, 40)) for i in range(5)]
    files = [tmp_path / name for name in ("plain.tif", "packed.tif", "drawn.pdf", "five.pdf")]
    for path, options in zip(files[:3], ({}, {"compression": "tiff_lzw"}, {}), strict=True):
        pages[0].save(path, save_all=True, append_images=pages[1:], **options)
    shutil.copy(CASES / "five.pdf", files[3])
    assert counts(shelf.run(*files)) == (20, 0)
    before = shelf.ids()
    whole = {path: path.read_bytes() for path in files}
    for tenths in range(19, 0, -1):
        for path, content in whole.items():
            path.write_bytes(content[: len(content) * tenths // 20])
        job = shelf.run(*files)
        assert len(job.failures) + len(job.warnings) >= 4
        assert shelf.ids() == before
    for path, content in whole.items():
        path.write_bytes(content)
    assert shelf.run(*files).failures == []
    assert shelf.ids() == before


@pytest.mark.parametrize("fault", ["os.kill(os.getpid(), 9)", "time.sleep(99)", "os._exit(3)"])
@pytest.mark.parametrize("changed", [False, True])
def test_a_decoder_that_dies_or_hangs_removes_nothing(
    shelf: Shelf, five: Path, fault: str, changed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so when it opens a file, to count its pages or to read them."""
    before = shelf.pages()
    if changed:
        five.write_bytes(five.read_bytes() + b"\n")
    serve = f"from cembed.runtime.pages import worker as w; w._open = lambda *_: {fault}; w.serve(sys.argv[1])"
    monkeypatch.setattr(decoder, "BOOT", f"import os, sys, time; sys.path[:] = sys.argv[2:]; {serve}")
    with PageReader(timeout=0.5) as reader:
        (failure,) = shelf.run(five, reader=reader).failures
    assert failure.startswith(f"{five}: ")
    assert failure.endswith("; 5 pages of an older version stay in the index") == changed
    assert shelf.pages() == before
    assert counts(shelf.run(five)) == ((5, 0) if changed else (0, 5))
    assert len(shelf.pages()) == 5


def shortened(path: Path, pages: int) -> None:
    """The same file with fewer pages."""
    kids = [b"%d 0 R" % number for number in range(3, 8)]
    old, new = (b"/Count %d /Kids [ %b ]" % (count, b" ".join(kids[:count])) for count in (5, pages))
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new.ljust(len(old))))


def failing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of every file cannot be read."""
    read = PageReader.read

    def instead(self: PageReader, paths: Any) -> Iterator[Page | PageError]:
        for page in read(self, paths):
            yield PageError(page.path, number, "damaged") if page.number == number else page

    monkeypatch.setattr(PageReader, "read", instead)


def test_pages_that_a_file_has_no_longer_go_when_the_others_are_there(
    shelf: Shelf, five: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shortened(five, 3)
    with monkeypatch.context() as patch:
        failing(2, patch)
        job = shelf.run(five)
    assert counts(job) == (2, 0)
    assert job.failures == [f"{five}, page 2: damaged; the index keeps it from an older version of the file"]
    assert job.notes == [
        f"kept: {five}: 2 pages that only an older version of it has; they go when all pages of the file can be read"
    ]
    assert [name[-1] for name in shelf.pages()] == ["2", "4", "5", "1", "3"]  # in the order they were added
    job = shelf.run(five)
    assert (counts(job), job.removed, job.failures, job.notes) == ((1, 2), 2, [], [])
    assert shelf.ids() == [f"{five}#{n}" for n in (1, 2, 3)]
    assert all(metadata == {"year": 2024} for _, metadata in shelf.pages().values())  # none was given: it stays


def test_gaps_among_old_pages_keep_none_of_them(shelf: Shelf, five: Path) -> None:
    assert cembed("index", "remove", shelf.path, f"{five}#4").status == 0
    shortened(five, 3)
    assert shelf.run(five).removed == 1
    assert shelf.ids() == [f"{five}#{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("stop_at", range(7))
def test_an_add_that_is_interrupted_removes_nothing_too_early(
    shelf: Shelf, five: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any of its changes to the index; the next one does the rest, the removal of what is not there any more too."""
    before, made = shelf.pages(), list[str]()
    shortened(five, 3)

    def stop_before(patch: pytest.MonkeyPatch, name: str) -> None:
        wrapped = getattr(Index, name)

        def instead(self: Index, *arguments: Any, **options: Any) -> Any:
            if len(made) == stop_at:
                raise KeyboardInterrupt
            made.append(name)
            return wrapped(self, *arguments, **options)

        patch.setattr(Index, name, instead)

    with monkeypatch.context() as patch:
        patch.setattr(index_job, "FLUSH_PAGES", 1)
        stop_before(patch, "add")
        stop_before(patch, "remove")
        shelf.run(five, metadata={"year": 2025})
    after = shelf.pages()
    changed = [name for name in after if after[name] != before[name]]
    assert len(changed) == min(3, made.count("add"))
    assert len(after) == (3 if "remove" in made else 5)
    assert stop_at < 6 or "remove" in made
    assert not shelf.run(five).failures
    assert shelf.ids() == [f"{five}#{n}" for n in (1, 2, 3)]


def test_a_file_that_changes_while_it_is_read(shelf: Shelf, five: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vectors would count for the bytes that were hashed before."""
    before, read = shelf.pages(), PageReader.read
    shortened(five, 3)

    def instead(self: PageReader, paths: Any) -> Iterator[Page | PageError]:
        for page in read(self, paths):
            if page.number == 2:
                with five.open("ab") as file:
                    file.write(b"\n")
            yield page

    monkeypatch.setattr(PageReader, "read", instead)
    said = "was changed while it was being read: add it again; the index keeps it from an older version of the file"
    job = shelf.run(five, metadata={"year": 2025})
    assert job.failures == [f"{five}, page 2: {said}"]  # once
    assert [name[-1] for name, page in shelf.pages().items() if page == before[name]] == ["2", "3", "4", "5"]


@pytest.mark.parametrize("kind", ["pipe", "socket", "link to a device"])
def test_what_is_no_file_is_not_opened(
    shelf: Shelf, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.png").touch()
    UNREADABLE[kind](Path("x.png"))
    outcome = shelf.add("x.png")
    assert (outcome.status, outcome.err) == (1, "error: x.png is a device, a pipe or a socket: give files or folders\n")


# One file by several paths, and several files with one content.


def test_the_same_file_by_another_spelling(shelf: Shelf, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from another working directory. The first spelling is what is shown."""
    monkeypatch.chdir(scans.parent)
    Path("link").symlink_to(scans)
    Path("one.png").symlink_to(scans / "letter.png")
    assert counts(shelf.run("scans")) == (4, 0)
    expected = [f"scans/{name}" for name in ("Anhänge/写真.png#1", "letter.png#1", "report.pdf#1", "report.pdf#2")]
    assert shelf.ids() == expected
    assert counts(shelf.run("scans", "link", "one.png", scans / "report.pdf")) == (0, 4)
    for spelling in (scans, "./scans/../scans", "link", Path("link").absolute(), f"{scans}/.", "scans//"):
        assert counts(shelf.run(spelling)) == (0, 4), spelling
    assert counts(shelf.run("one.png")) == (0, 1)
    (scans.parent / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for spelling in ("../scans", scans, "../link"):
        assert counts(shelf.run(spelling)) == (0, 4), spelling
    assert shelf.ids() == expected
    picture("other").save("../scans/letter.png")
    assert counts(shelf.run("../link")) == (1, 3)
    assert "1 pages removed" in cembed("index", "remove", shelf.path, "../one.png").out
    assert "1 pages removed" in cembed("index", "remove", shelf.path, "../link/report.pdf#2").out
    assert "neither a page nor a file" in cembed("index", "remove", shelf.path, "../link/report.pdf#3").error
    assert shelf.ids() == [expected[0], expected[2]]


def test_two_files_with_one_relative_path(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From two working directories: they are two."""
    for name in "ab":
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        picture(name).save("page.png")
        assert [counts(shelf.run("page.png")) for _ in range(2)] == [(1, 0), (0, 1)]
    assert shelf.ids() == [f"{tmp_path}/b/page.png#1", "page.png#1"]
    assert {page.folder for page in Index.open(shelf.path).find()} == {f"{tmp_path}/a", None}


def test_an_index_that_moves_with_its_files(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    picture("x").save("page.png")
    shelf.run("page.png")
    monkeypatch.chdir("..")
    Path("here").rename("there")
    monkeypatch.chdir("there")
    assert counts(shelf.run("page.png")) == (0, 1)


def test_an_old_index_has_ids_as_they_were_given(shelf: Shelf, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative ones count from the working directory, as they did."""
    monkeypatch.chdir(scans.parent)
    with monkeypatch.context() as patch:
        patch.setattr(Sources, "name", lambda self, path: (path, None))
        shelf.run("scans")
    assert counts(shelf.run(scans)) == (0, 4)
    assert counts(shelf.run(scans, metadata={"a": 1})) == (0, 4)
    assert {page.folder for page in Index.open(shelf.path).find()} == {None}
    assert all(name.startswith("scans/") for name in shelf.ids())


def test_one_content_under_several_paths(shelf: Shelf, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own metadata, filters and removal; nothing is embedded again."""
    shelf.add(scans, "--metadata", "kind=original")
    copies = Path(shutil.copytree(scans, scans.parent / "copies"))
    monkeypatch.setattr(Embedder, "embed_image", None)
    monkeypatch.setattr(PageReader, "read", lambda self, paths: iter(()))
    outcome = shelf.add(copies, "--metadata", "kind=copy")
    assert (outcome.status, outcome.err) == (0, "")
    assert "4 pages added, 0 were there; 8 pages" in outcome.out
    assert "4 of the added without embedding" in outcome.out
    pages = shelf.pages()
    for name, (vectors, metadata) in pages.items():
        assert metadata == {"kind": "copy" if name.startswith(str(copies)) else "original"}
        assert vectors == pages[name.replace(str(copies), str(scans))][0]
    monkeypatch.undo()
    for kind in ("copy", "original"):
        command = ("search", shelf.path, "first page", "--bundle", shelf.bundle, "--json", "--where", f"kind={kind}")
        assert len(json.loads(cembed(*command).out)) == 4
    command = ("search", shelf.path, "first page", "--bundle", shelf.bundle, "--json", "--top", 2)
    first, second = json.loads(cembed(*command).out)
    assert first["score"] == second["score"]
    assert (first["metadata"], second["metadata"]) == ({"kind": "original"}, {"kind": "copy"})
    assert cembed("index", "remove", shelf.path, f"{scans}/*").status == 0
    assert cembed("index", "compact", shelf.path).status == 0
    assert cembed("index", "verify", shelf.path).status == 0
    assert shelf.pages() == {name: page for name, page in pages.items() if name.startswith(str(copies))}


def test_copies_in_one_run_are_embedded_once(shelf: Shelf, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a file with a page that fails too."""
    for i in range(3):
        shutil.copy(scans / "report.pdf", scans / f"copy {i}.pdf")
    embedded, embed = list[object](), Embedder.embed_image

    def counting(self: Embedder, *arguments: Any) -> Any:
        embedded.append(1)
        return embed(self, *arguments)

    monkeypatch.setattr(Embedder, "embed_image", counting)
    with monkeypatch.context() as patch:
        failing(2, patch)
        job = shelf.run(scans)
    assert (counts(job), job.shared, len(job.failures), len(embedded)) == ((6, 0), 3, 4, 3)
    job = shelf.run(scans)
    assert (counts(job), job.shared, len(job.failures), len(embedded)) == ((4, 6), 3, 0, 4)


def test_files_that_trade_names(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    picture("a").save(a)
    picture("b").save(b)
    shelf.run(a, b)
    before = shelf.pages()
    a.rename(tmp_path / "c")
    b.rename(a)
    (tmp_path / "c").rename(b)
    monkeypatch.setattr(Embedder, "embed_image", None)
    assert counts(shelf.run(a, b)) == (2, 0)
    after = shelf.pages()
    assert (after[f"{a}#1"], after[f"{b}#1"]) == (before[f"{b}#1"], before[f"{a}#1"])


def test_metadata_of_pages_that_are_there(shelf: Shelf, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other metadata replaces it, without embedding; none given leaves it."""
    shelf.add(scans, "--metadata", "year=2024", "--metadata", "team=a")
    vectors = {name: page[0] for name, page in shelf.pages().items()}
    monkeypatch.setattr(Embedder, "embed_image", None)
    steps: list[tuple[tuple[str, ...], int, dict[str, Any]]] = [
        ((), 0, {"year": 2024, "team": "a"}),
        (("team=a", "year=2024"), 0, {"year": 2024, "team": "a"}),
        (("year=2025",), 4, {"year": 2025}),
        (("year=2025",), 0, {"year": 2025}),
        (('year="2025"',), 4, {"year": "2025"}),
    ]
    for pairs, changed, left in steps:
        outcome = shelf.add(scans, *(part for pair in pairs for part in ("--metadata", pair)))
        assert (outcome.status, outcome.err) == (0, "")
        assert "0 pages added, 4 were there; 4 pages" in outcome.out
        assert (f"metadata of {changed} changed" in outcome.out) == bool(changed)
        assert ("changed" in outcome.out) == bool(changed)
        assert shelf.pages() == {name: (page, left) for name, page in vectors.items()}
    assert "are cembed's" in shelf.add(scans, "--metadata", "cembed:warning=x").error


# Pages that were read with doubt.


def test_doubts_are_told_kept_and_counted(
    shelf: Shelf, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = PageReader.read

    def doubtful(self: PageReader, paths: Any) -> Iterator[Page | PageError]:
        for page in read(self, paths):
            doubt = isinstance(page, Page) and page.path.endswith("report.pdf") and page.number == 2
            yield Page(page.path, 2, page.image, "a picture\x1b[2J could not be decoded") if doubt else page

    monkeypatch.setattr(PageReader, "read", doubtful)
    outcome = shelf.add(scans)
    assert outcome.status == 3
    line = f"warning: {scans}/report.pdf, page 2: a picture\\x1b[2J could not be decoded\n"
    assert outcome.err == line
    assert "4 pages added, 0 were there" in outcome.out
    assert outcome.out.endswith("; 1 with a warning\n")
    again = shelf.add(scans, "--metadata", "year=2024")
    assert (again.status, again.err) == (0, "")  # it was told
    assert again.out.endswith("metadata of 4 changed; 1 with a warning\n")
    shutil.copy(scans / "report.pdf", tmp_path / "copy.pdf")
    copied = shelf.add(tmp_path / "copy.pdf")
    assert (copied.status, copied.err) == (3, line.replace(f"{scans}/report", f"{tmp_path}/copy"))
    assert json.loads(cembed("index", "stats", shelf.path, "--json").out)["warnings"] == 2
    assert "with a warning" in cembed("index", "stats", shelf.path).out
    command = ("search", shelf.path, "first page", "--bundle", shelf.bundle)
    rows = json.loads(cembed(*command, "--json", "--top", 9).out)
    assert [row.get("warning") for row in rows if row["page"] == 2] == ["a picture\x1b[2J could not be decoded"] * 2
    assert [row for row in rows if row["page"] == 1 and "warning" in row] == []
    assert all("cembed:warning" not in row["metadata"] for row in rows)
    assert "could not be decoded" in cembed(*command, "--top", 9).out
    assert "warning" in cembed(*command).out
    assert "warning" not in cembed(*command, "--source", "*.png").out
    monkeypatch.undo()
    picture("whole again").save(scans / "report.pdf")
    assert shelf.add(scans).out.endswith("; 1 with a warning\n")


def test_another_bundle(causal_bundle: Path, scans: Path, index: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(causal_bundle, tmp_path / "other"))
    write_manifest(other, (other / "manifest.json").read_text() + "\n")
    assert "use the same bundle" in cembed("index", "add", index, scans, "--bundle", other).error
    assert "another bundle" in cembed("search", index, "x", "--bundle", other).error
    assert (
        "dim 96, these would have 8"
        in cembed("index", "add", index, scans, "--bundle", causal_bundle, "--dim", 8).error
    )


def test_remove_compact_verify_and_stats(scans: Path, index: Path) -> None:
    assert "neither a page nor a file" in cembed("index", "remove", index, "nothing").error
    assert "1 pages removed" in cembed("index", "remove", index, f"{scans}/report.pdf#2").out
    assert "1 pages removed" in cembed("index", "remove", index, f"{scans}/report.pdf").out
    assert "1 pages removed" in cembed("index", "remove", index, "*/Anhänge/*").out
    assert json.loads(cembed("index", "stats", index, "--json").out)["removed"] == 3
    assert "1 pages, " in cembed("index", "compact", index).out
    assert names(index) == {"letter.png#1"}
    table = cembed("index", "stats", index).out
    assert all(word in table for word in ("1, and 0 removed", "8 of 96", "f16  1,536", "bytes a page"))
    outcome = cembed("index", "verify", index)
    assert outcome.status == 0
    assert {line.split()[0] for line in outcome.out.splitlines()} == {"ok"}


def test_damage_is_named_and_mended(causal_bundle: Path, scans: Path, index: Path) -> None:
    path = index / "00000001.bits"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    outcome = cembed("index", "verify", index)
    assert outcome.status == 1
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("FAILED")]
    assert "00000001.bits is damaged between bytes 0 and 96" in line
    assert "--drop-damaged" in cembed("search", index, "x", "--bundle", causal_bundle, "--candidates", 1).error
    outcome = cembed("index", "compact", index, "--drop-damaged")
    assert outcome.err.startswith("dropped: ")
    assert "3 pages" in outcome.out
    assert "1 pages added, 3 were there" in cembed("index", "add", index, scans, "--bundle", causal_bundle).out


def test_one_writer_at_a_time(causal_bundle: Path, scans: Path, index: Path) -> None:
    with Index.open(index, write=True):
        outcome = cembed_process("index", "add", index, scans, "--bundle", causal_bundle)
        assert "another process is writing" in outcome.error
        assert cembed_process("search", index, "x", "--bundle", causal_bundle, "--json").status == 0


@pytest.mark.parametrize("command", ["add", "remove", "compact", "verify", "stats"])
def test_every_command_has_help(command: str) -> None:
    assert f"cembed index {command}" in cembed("index", command, "--help").out
    assert command in cembed("index", "--help").out


def test_what_is_no_index(causal_bundle: Path, tmp_path: Path) -> None:
    for command in ("compact", "verify", "stats"):
        assert "no index" in cembed("index", command, tmp_path).error
    assert "no index" in cembed("search", tmp_path, "x", "--bundle", causal_bundle).error
    assert not list(tmp_path.iterdir())

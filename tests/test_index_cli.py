"""`cembed index` and searches of an index, as a person uses them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_cli import cembed, cembed_process, picture

from cembed.runtime import Embedder, maxsim
from cembed.runtime.index import Index
from cembed.runtime.manifest_file import write_manifest


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


def test_search_by_image(causal_bundle: Path, scans: Path, index: Path) -> None:
    image = scans / "letter.png"
    outcome = cembed("search", index, "--image", image, "--bundle", causal_bundle, "--json", "--explain")
    shown = json.loads(outcome.out)
    assert shown["pages"][0]["path"] == str(image)
    assert shown["stages"][0].keys() == {"stage", "pages", "kept", "ms", "bytes"}
    assert "either" in cembed("search", index, "both", "--image", image, "--bundle", causal_bundle).error
    assert "either" in cembed("search", index, "--bundle", causal_bundle).error


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
    assert "no index" in cembed("search", file, "x", "--bundle", causal_bundle, "--explain").error
    rows = json.loads(cembed("search", file, "--image", scans / "letter.png", "--bundle", causal_bundle, "--json").out)
    assert rows[0]["path"] == str(scans / "letter.png")


def test_adding_again_goes_on(causal_bundle: Path, scans: Path, index: Path) -> None:
    command = ("index", "add", index, scans, "--bundle", causal_bundle)
    assert "0 pages added, 4 were there; 4 pages" in cembed(*command).out
    picture("more").save(scans / "more.png")
    shutil.copy(scans / "letter.png", scans / "copy.png")
    assert "1 pages added, 5 were there; 5 pages" in cembed(*command).out
    assert names(index) == {"report.pdf#1", "report.pdf#2", "写真.png#1", "letter.png#1", "more.png#1"}
    picture("other").save(scans / "report.pdf")
    assert "1 pages added, 4 were there; 4 pages" in cembed(*command).out  # the second page is gone
    assert "report.pdf#2" not in names(index)
    assert "5 pages added, 0 were there; 5 pages" in cembed(*command, "--num-vectors", 3).out
    assert {page.vectors for page in Index.open(index).find()} == {3}


def test_add_reports_what_it_could_not_read(causal_bundle: Path, scans: Path, tmp_path: Path) -> None:
    (scans / "empty.pdf").touch()
    outcome = cembed("index", "add", tmp_path / "index", scans, "--bundle", causal_bundle)
    assert outcome.status == 3
    assert outcome.err == f"not embedded: {scans}/empty.pdf: the file is empty\n"
    assert "4 pages added" in outcome.out


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

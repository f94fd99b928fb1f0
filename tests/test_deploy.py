"""Model updates on a device: versions side by side, one link, patches, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import stat
import sys
import threading
import warnings
import zipfile
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import make_old
from test_cli import cembed

from cembed.runtime import Bundle, CembedError, Embedder, current_hash, deploy, rollback
from cembed.runtime.bundle.bundle import record_files
from cembed.runtime.bundle.manifest import MANIFEST
from cembed.runtime.bundle.manifest_file import upgrade, write_manifest
from cembed.runtime.updates import content as contents
from cembed.runtime.updates import deploy as deploying
from cembed.runtime.updates.deploy import Trial
from cembed.runtime.updates.diff import PAGE, diff
from cembed.runtime.updates.diff import _pieces as pieces_of
from cembed.runtime.updates.patch import RECIPES, apply
from cembed.runtime.updates.versions import Shelf, current, resolve, versions

sys.path.append(str(Path(__file__).parent / "crash"))
from deploys import SAMPLE, look_at_no_graphs, make_all, small, variant

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small bundles have no weights, and so no self-test."""
    look_at_no_graphs(monkeypatch.setattr)
    monkeypatch.setattr(deploying, "try_bundle", lambda bundle, trial: 1.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small bundles a, b and c, which have most files in common, and a patch from a to b. Only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        look_at_no_graphs(patch.setattr)
        return make_all(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "device"


def hash_of(path: Path) -> str:
    return Bundle(path).hash


def states(to: Path) -> dict[str, str]:
    return {version.state: version.hash for version in versions(to)}


def names_in(to: Path) -> set[str]:
    return {path.name for path in to.rglob("*")}


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(CembedError) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_deployed_bundle_is_tried_and_embeds_as_its_source_does(to: Path) -> None:
    done = deploy(SAMPLE, to)
    assert (done.outcome, done.hash, done.shared) == ("deployed", hash_of(SAMPLE), 0)
    assert done.cosine is not None
    assert done.cosine > 0.95
    assert (to / "current").resolve() == done.path == resolve(to / "current")
    mine, theirs = (Embedder.load(path).embed_query("emma foster") for path in (to / "current", SAMPLE))
    assert (mine == theirs).all()


def test_a_bundle_that_computes_something_else_is_refused_and_its_room_freed(to: Path, tmp_path: Path) -> None:
    deploy(SAMPLE, to)
    wrong = Path(shutil.copytree(SAMPLE, tmp_path / "wrong"))
    size = (wrong / "text.data").stat().st_size
    (wrong / "text.data").write_bytes(
        random.Random(1).randbytes(size // 2) + (wrong / "text.data").read_bytes()[size // 2 :]
    )
    write_manifest(wrong, replace(Bundle(SAMPLE).manifest, files=record_files(wrong)).to_json())
    told = refused(lambda: deploy(wrong, to))
    assert "self-test" in told or "NaN" in told
    assert current_hash(to / "current") == hash_of(SAMPLE)
    assert [version.state for version in versions(to)] == ["current"]
    assert hash_of(wrong)[:16] not in names_in(to)


def test_a_variant_passes_with_the_cosine_that_is_asked_for(to: Path, tmp_path: Path) -> None:
    other = variant(tmp_path, "b")
    assert deploy(other, to, trial=Trial(threads=1, min_cosine=0.5)).outcome == "deployed"


@pytest.mark.usefixtures("untried")
def test_versions_share_files_and_rollback_goes_back_and_forth(to: Path, made: dict[str, Path]) -> None:
    first, second = deploy(made["a"], to), deploy(made["b"], to)
    assert second.shared > 0
    assert second.copied == 2 * 900
    assert os.path.samefile(first.path / "vision.data", second.path / "vision.data")
    assert not os.path.samefile(first.path / "text.data", second.path / "text.data")
    assert stat.S_IMODE((second.path / "vision.data").stat().st_mode) == 0o444
    for name, other in ("ab", "ba", "ab"):
        assert rollback(to).hash == hash_of(made[name])
        assert states(to) == {"current": hash_of(made[name]), "previous": hash_of(made[other])}
    version = current(to)
    assert version is not None
    assert (version.model, version.size) == ("model (qwen2.5-vl, causal)", first.copied)


@pytest.mark.usefixtures("untried")
def test_the_source_may_change_once_it_is_deployed(to: Path, tmp_path: Path) -> None:
    source = small(tmp_path, "s")
    deploy(source, to)
    for path in source.iterdir():
        path.write_bytes(b"")
    contents.verify_bundle(to / "current")


@pytest.mark.usefixtures("untried")
def test_what_is_current_already_is_said_so_and_damage_is_repaired(to: Path, made: dict[str, Path]) -> None:
    deploy(made["a"], to)
    deploy(made["b"], to)
    assert deploy(made["b"], to).outcome == "unchanged"
    damages: Mapping[str, Callable[[Path], object]] = {
        "flipped": lambda root: flip(root / "text.data"),
        "shared": lambda root: flip(root / "vision.data"),
        "short": lambda root: os.truncate(root / "text.onnx", 10),
        "gone": lambda root: (root / "tokenizer.json").unlink(),
        "manifest": lambda root: (root / MANIFEST).write_bytes(b"{}"),
        "digest": lambda root: (root / "manifest.sha256").unlink(),
        "stranger": lambda root: (root / "stranger").touch(),
        "link": lambda root: ((root / "vision.onnx").unlink(), (root / "vision.onnx").symlink_to("text.onnx")),
    }
    for damage in damages.values():
        damage(resolve(to / "current"))
        done = deploy(made["b"], to)
        assert done.outcome == "repaired"
        contents.verify_bundle(to / "current", hash_of(made["b"]))
    assert "sha256" in refused(lambda: rollback(to)), "what was shared is damaged in the other version, too"
    assert current_hash(to / "current") == hash_of(made["b"])
    deploy(made["a"], to)
    rollback(to)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


@pytest.mark.usefixtures("untried")
def test_a_damaged_source_changes_nothing(to: Path, tmp_path: Path, made: dict[str, Path]) -> None:
    deploy(made["a"], to)
    before = names_in(to)
    bad = Path(shutil.copytree(made["b"], tmp_path / "bad"))
    flip(bad / "text.data")
    assert refused(lambda: deploy(bad, to)) == (
        f"{bad}: what text.data is made from does not match its sha256: copy it again"
    )
    assert names_in(to) == before
    assert current_hash(to / "current") == hash_of(made["a"])


@pytest.mark.usefixtures("untried")
def test_old_versions_go_after_the_switch_and_what_stood_beside_them(to: Path, made: dict[str, Path]) -> None:
    gone = deploy(made["a"], to, keep=3).path
    gone.with_name(f"{gone.name}.tuned.json").touch()
    gone.with_name(f"{gone.name}.engines").mkdir()
    gone.with_name(f"{gone.name}.engines").joinpath("text.engine").touch()
    deploy(made["b"], to, keep=3)
    deploy(made["c"], to, keep=3)
    assert states(to).keys() == {"current", "previous", "kept"}
    deploy(made["c"], to)
    assert states(to) == {"current": hash_of(made["c"]), "previous": hash_of(made["b"])}
    assert not [name for name in names_in(to) if name.startswith(gone.name)]
    assert "at least 2" in refused(lambda: deploy(made["c"], to, keep=1))


@pytest.mark.usefixtures("untried")
def test_what_was_cut_off_is_gone_on_with_or_removed(to: Path, made: dict[str, Path]) -> None:
    deploy(made["a"], to)
    cut = Shelf(to).path(hash_of(made["b"])[:16])
    cut.mkdir()
    shutil.copy(made["b"] / "text.data", cut)
    inode = (cut / "text.data").stat().st_ino
    for left in (to / ".next", to / "versions" / ".next"):
        left.symlink_to("nowhere")
    (to / "versions" / ".part").write_bytes(b"half")
    assert deploy(made["b"], to).copied == 900
    assert (cut / "text.data").stat().st_ino == inode
    (Shelf(to).path("0" * 16)).mkdir()
    rollback(to)
    assert not {".next", ".part", "0" * 16} & names_in(to)


@pytest.mark.usefixtures("untried")
def test_a_staged_version_waits_until_it_is_deployed(to: Path, made: dict[str, Path]) -> None:
    deploy(made["a"], to)
    staged = deploy(made["b"], to, stage=True)
    assert (staged.outcome, staged.cosine) == ("staged", None)
    staged.path.with_name(f"{staged.path.name}.engines").mkdir()
    assert states(to) == {"current": hash_of(made["a"]), "kept": hash_of(made["b"])}
    assert deploy(made["b"], to).copied == 0
    assert staged.path.with_name(f"{staged.path.name}.engines").exists()
    assert states(to) == {"current": hash_of(made["b"]), "previous": hash_of(made["a"])}


@pytest.mark.usefixtures("untried")
def test_a_full_disk_is_told_before_anything_is_copied(
    to: Path, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy(made["a"], to)
    monkeypatch.setattr(contents.shutil, "disk_usage", lambda path: Usage(1 << 30, 1 << 30, 1 << 20))
    told = refused(lambda: deploy(made["b"], to))
    assert told == f"{to} has 1.0 MiB free, and {made['b']} takes 0.0 MiB there: make room, and run it again"
    assert states(to) == {"current": hash_of(made["a"])}


@pytest.mark.usefixtures("untried")
def test_a_second_deploy_is_sent_away(to: Path, made: dict[str, Path]) -> None:
    deploy(made["a"], to)
    with Shelf(to).locked():
        for action in (lambda: deploy(made["b"], to), lambda: rollback(to)):
            assert refused(action) == f"another process is writing to {to}: wait until it ends"


@pytest.mark.usefixtures("untried")
def test_other_folders_are_left_alone(to: Path, tmp_path: Path, made: dict[str, Path]) -> None:
    strange = Path(shutil.copytree(made["a"], tmp_path / "bundle"))
    assert "has manifest.json in it, no versions" in refused(lambda: deploy(made["a"], strange))
    (tmp_path / "file").touch()
    assert "is no folder" in refused(lambda: deploy(made["a"], tmp_path / "file"))
    assert "has no versions" in refused(lambda: versions(strange))
    assert "has no versions" in refused(lambda: rollback(strange))
    deploy(made["a"], to)
    assert "no previous version" in refused(lambda: rollback(to))


@pytest.mark.usefixtures("untried")
def test_a_link_is_followed_once_and_the_hash_is_never_half(to: Path, made: dict[str, Path]) -> None:
    deploy(made["a"], to)
    opened = Bundle(to / "current")
    deploy(made["b"], to)
    assert opened.path("text.data").read_bytes() == (made["a"] / "text.data").read_bytes()
    shelf, stop, seen = Shelf(to), threading.Event(), set[str | None]()

    def poll() -> None:
        while not stop.is_set():
            seen.add(current_hash(to / "current"))

    thread = threading.Thread(target=poll)
    thread.start()
    for number in range(60):
        shelf.switch(hash_of(made["ab"[number % 2]])[:16])
    stop.set()
    thread.join()
    assert seen == {hash_of(made["a"]), hash_of(made["b"])}


def test_the_hash_is_that_of_the_bundle_or_there_is_none(tmp_path: Path) -> None:
    warnings.simplefilter("ignore", RuntimeWarning)
    root = small(tmp_path, "x")
    assert current_hash(root) == hash_of(root)
    old = make_old(root)
    assert current_hash(root) == hash_of(root) == old
    upgrade(root)
    assert current_hash(root) == hash_of(root) == old
    (root / MANIFEST).write_bytes((root / MANIFEST).read_bytes()[:100])
    assert current_hash(root) is None
    assert current_hash(tmp_path / "nothing") is None


def test_a_patch_has_what_is_new_and_makes_the_same_bundle(tmp_path: Path) -> None:
    other = variant(tmp_path, "b")
    about = diff(SAMPLE, other, tmp_path / "first")
    assert about.files == ("text.data",)
    diff(SAMPLE, other, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert apply(SAMPLE, tmp_path / "first", tmp_path / "made") == hash_of(other)
    assert {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()} == {
        path.name: path.read_bytes() for path in other.iterdir()
    }
    assert diff(other, other, tmp_path / "same").size < 8000
    assert "exists" in refused(lambda: diff(other, other, tmp_path / "same"))
    assert "exists" in refused(lambda: apply(SAMPLE, tmp_path / "first", tmp_path / "made"))


def test_a_change_within_weights_costs_its_pages_only(tmp_path: Path) -> None:
    other = Path(shutil.copytree(SAMPLE, tmp_path / "b"))
    weights = bytearray((other / "text.data").read_bytes())
    weights[1_000_000:1_020_000] = random.Random(0).randbytes(20_000)
    (other / "text.data").write_bytes(weights)
    write_manifest(other, replace(Bundle(SAMPLE).manifest, files=record_files(other)).to_json())
    assert diff(SAMPLE, other, tmp_path / "patch").size < 40_000
    assert apply(SAMPLE, tmp_path / "patch", tmp_path / "made") == hash_of(other)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=80), st.lists(st.integers(0, 40), max_size=80), st.integers(0, PAGE))
def test_pieces_make_the_new_file(
    tmp_path_factory: pytest.TempPathFactory, old: list[int], new: list[int], rest: int
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    contents_ = [b"".join(bytes([page]) * PAGE for page in pages) for pages in (old * 3, old * 2 + new)]
    contents_[1] += b"x" * rest
    (folder / "old").write_bytes(contents_[0])
    (folder / "new").write_bytes(contents_[1])
    found, at = b"", 0
    for place, length in pieces_of(folder / "old", folder / "new"):
        found += contents_[1][at : at + length] if place is None else contents_[0][place : place + length]
        at += length
    assert found == contents_[1]


@pytest.mark.usefixtures("untried")
def test_a_patch_is_deployed_onto_the_versions_that_are_there(to: Path, tmp_path: Path, made: dict[str, Path]) -> None:
    patch = made["b by patch"]
    told = refused(lambda: deploy(patch, to))
    assert told.startswith(f"cannot use the patch {patch}: it is for the bundle {hash_of(made['a'])[:16]}…, ")
    deploy(made["a"], to)
    assert deploy(patch, to).hash == hash_of(made["b"])
    assert deploy(patch, to).outcome == "unchanged"
    assert apply(made["c"], patch, tmp_path / "from c") == hash_of(made["b"]), "it has all that is needed"
    assert "files are not there" in refused(lambda: apply(SAMPLE, patch, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


Entries = dict[str, bytes]


def rewritten(patch: Path, out: Path, change: Callable[[Entries], Any]) -> Path:
    """A patch whose entries were changed."""
    with zipfile.ZipFile(patch) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out


def recipe_changed(change: Callable[[Any], object]) -> Callable[[Entries], None]:
    def run(entries: Entries) -> None:
        raw = json.loads(entries[RECIPES])
        change(raw)
        entries[RECIPES] = json.dumps(raw).encode()

    return run


def first_of(raw: Any) -> Any:
    return next(iter(raw["recipes"].values()))


def blob(entries: Entries) -> str:
    return next(name for name in entries if name.startswith("blobs/"))


def larger(raw: Any) -> None:
    first_of(raw)["pieces"] = [[None, 1 << 40]]


def beyond(entries: Entries) -> None:
    """A piece of an old file that is after its end."""
    old = json.loads(entries[MANIFEST])["files"]["vision.data"]["sha256"]
    del entries[blob(entries)]
    recipe_changed(lambda raw: first_of(raw).update(old=old, pieces=[[1 << 40, 900]]))(entries)


HOSTILE: Mapping[str, tuple[Callable[[Entries], Any], str]] = {
    "a path outside": (lambda entries: entries.update({"../../etc/passwd": b"x"}), "which patch.json does not have"),
    "a stranger": (lambda entries: entries.update({"blobs/" + "0" * 64: b"x"}), "which patch.json does not have"),
    "no recipes": (lambda entries: entries.pop(RECIPES), "patch.json is not in it"),
    "no manifest": (lambda entries: entries.pop(MANIFEST), "manifest.json is not in it"),
    "another manifest": (lambda entries: entries.update({MANIFEST: entries[MANIFEST] + b" "}), "does not match"),
    "no JSON": (lambda entries: entries.update({RECIPES: b"{"}), "is not JSON"),
    "no text": (lambda entries: entries.update({RECIPES: b"\xff"}), "is not UTF-8"),
    "no blob": (lambda entries: entries.pop(blob(entries)), "is not 900 bytes"),
    "a bomb": (lambda entries: entries.update({blob(entries): bytes(1 << 24)}), "is not 900 bytes"),
    "other bytes": (lambda entries: entries.update({blob(entries): bytes(900)}), "does not match its sha256"),
    "a large manifest": (lambda entries: entries.update({MANIFEST: bytes((1 << 24) + 1)}), "has more than"),
    "a later format": (recipe_changed(lambda raw: raw.update(version=2)), "patch.json.version"),
    "another bundle": (recipe_changed(lambda raw: raw.update(new="0" * 64)), "is not that of the bundle 0000"),
    "a huge file": (recipe_changed(larger), "which manifest.json has not"),
    "a negative length": (recipe_changed(lambda raw: first_of(raw).update(pieces=[[None, -1]])), "out of range"),
    "beyond the end": (beyond, "does not match its sha256"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_patch_makes_nothing(what: str, to: Path, tmp_path: Path, made: dict[str, Path]) -> None:
    change, said = HOSTILE[what]
    patch = rewritten(made["b by patch"], tmp_path / "patch", change)
    assert said in refused(lambda: apply(made["a"], patch, tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"patch"}


def test_links_doubles_and_damage_are_refused(tmp_path: Path, made: dict[str, Path]) -> None:
    whole = made["b by patch"].read_bytes()
    linked = zipfile.ZipInfo("blobs/x")
    linked.external_attr = (stat.S_IFLNK | 0o777) << 16
    for number, name in enumerate((linked, zipfile.ZipInfo(MANIFEST))):
        path = tmp_path / f"{number}.patch"
        path.write_bytes(whole)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(name, b"/etc/passwd")
        told = refused(lambda path=path: apply(made["a"], path, tmp_path / "out"))  # type: ignore[misc]
        assert ("no plain file", "twice")[number] in told
    rng = random.Random(0)
    for _ in range(60):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (tmp_path / "damaged").write_bytes(content[: rng.randint(0, len(content))] if rng.random() < 0.3 else content)
        with contextlib.suppress(CembedError):
            assert apply(made["a"], tmp_path / "damaged", tmp_path / "out", force=True) == hash_of(made["b"])


def test_the_commands_say_what_they_did(to: Path, tmp_path: Path) -> None:
    other = variant(tmp_path, "b")
    names = [hash_of(path)[:16] for path in (SAMPLE, other)]
    first = cembed("deploy", SAMPLE, "--to", to).out
    assert first.startswith(
        f"{to}: {names[0]} is current now; 7,928,377 bytes copied, 0 shared with other versions; lowest"
    )
    written = cembed("bundle", "diff", SAMPLE, other, "--out", tmp_path / "p.cembed-patch").out
    assert written.endswith("new in it: text.data\n")
    assert cembed("bundle", "apply", SAMPLE, tmp_path / "p.cembed-patch", "--out", tmp_path / "c").status == 0
    tuned = tmp_path / "p.cembed-patch.tuned.json"
    tuned.touch()
    second = cembed("deploy", tmp_path / "p.cembed-patch", "--to", to, "--json")
    assert json.loads(second.out)["outcome"] == "deployed"
    assert second.err == f"{tuned} is not deployed: run `cembed tune {to}/versions/{names[1]}` on this device\n"
    assert [row["state"] for row in json.loads(cembed("versions", to, "--json").out)] == ["current", "previous"]
    shown = cembed("versions", to).out
    assert all(word in shown for word in (*names, "current", "previous", "(qwen2.5-vl, causal)"))
    assert f"{names[0]} is current now" in cembed("rollback", to).out
    assert "is current already, and all of it is right" in cembed("deploy", SAMPLE, "--to", to).out
    assert cembed("rollback", tmp_path).error.endswith("give a folder that `cembed deploy --to` has made")
    assert "is not a bundle" in cembed("deploy", tmp_path / "nothing", "--to", to).error

"""The manifest as a file: its digest, what else may lie in its place, and bundles of the schema before."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from conftest import GOLDEN
from libcembed import Library
from manifests import library_refuses, make_old, put, python_refuses, read, told
from PIL import Image
from test_cli import cembed

from cembed.runtime import Bundle, CembedError, Embedder, VectorFile
from cembed.runtime.bundle.manifest import DIGEST, MANIFEST, SCHEMA_VERSION
from cembed.runtime.bundle.manifest_file import digest_line, lines_of_upgrade, upgrade, upgraded, write_manifest
from cembed.runtime.engines.build import EngineCache
from cembed.runtime.index.index import Index
from cembed.runtime.verify import verify, verify_and_upgrade
from cembed.runtime.writer import write_self_test

PAGE = GOLDEN / "causalqwen2_5" / "page.png"


@pytest.fixture
def bundle(causal_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(causal_bundle, tmp_path / "bundle"))


@pytest.fixture
def old(bundle: Path) -> Path:
    """A bundle of schema 1."""
    make_old(bundle)
    return bundle


def quietly(root: Path) -> Bundle:
    """Opened without the warning that it is old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return Bundle(root)


# The digest.


def test_an_exported_bundle_has_a_digest(causal_bundle: Path) -> None:
    manifest = Bundle(causal_bundle).manifest
    assert manifest.schema_version == SCHEMA_VERSION == 2
    assert not {MANIFEST, DIGEST} & manifest.files.keys()
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", DIGEST], cwd=causal_bundle, check=True, capture_output=True)
    assert (causal_bundle / DIGEST).read_bytes() == digest_line((causal_bundle / MANIFEST).read_bytes())


@pytest.fixture(scope="module")
def flipped(causal_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a manifest on one line, in which bytes may be changed."""
    root = Path(shutil.copytree(causal_bundle, tmp_path_factory.mktemp("flipped") / "bundle"))
    write_manifest(root, json.dumps(read(root), separators=(",", ":")))
    return root


def flips(content: bytes, bits: int) -> list[bytes]:
    """Every byte with one of its bits changed, or as many as `bits`."""
    found = []
    for place in range(len(content)):
        for bit in range(place % 8, place % 8 + bits):
            one = bytearray(content)
            one[place] ^= 1 << bit % 8
            found.append(bytes(one))
    return found


@pytest.mark.parametrize(("name", "bits"), [(MANIFEST, 1), (DIGEST, 8)])
def test_python_refuses_a_byte_that_changed(flipped: Path, name: str, bits: int) -> None:
    content = (flipped / name).read_bytes()
    for changed in flips(content, bits):
        (flipped / name).write_bytes(changed)
        assert python_refuses(flipped)
    (flipped / name).write_bytes(content)
    assert python_refuses(flipped) is None


@pytest.mark.parametrize(("name", "bits"), [(MANIFEST, 1), (DIGEST, 8)])
def test_the_c_library_refuses_a_byte_that_changed(library: Library, flipped: Path, name: str, bits: int) -> None:
    content = (flipped / name).read_bytes()
    for changed in flips(content, bits):
        (flipped / name).write_bytes(changed)
        assert library_refuses(library, flipped)
    (flipped / name).write_bytes(content)
    assert library_refuses(library, flipped) is None


def version_one(root: Path) -> None:
    """What is left of a version after its byte changed to that of the schema before."""
    (root / MANIFEST).write_bytes(
        (root / MANIFEST).read_bytes().replace(b'"schema_version": 2', b'"schema_version": 1')
    )


def line_for_another(root: Path) -> None:
    (root / DIGEST).write_bytes(digest_line(b"another"))


def lines_for_others(root: Path) -> None:
    (root / DIGEST).write_bytes(digest_line(b"another") + digest_line(b"one more"))


def lines_and_more(root: Path) -> None:
    line = (root / DIGEST).read_bytes()
    (root / DIGEST).write_bytes(line * 3)


def line_and_garbage(root: Path) -> None:
    line = (root / DIGEST).read_bytes()
    (root / DIGEST).write_bytes(line + b"x" * len(line))


DAMAGES: list[Callable[[Path], object]] = [
    version_one,
    line_for_another,
    lines_for_others,
    lines_and_more,
    line_and_garbage,
    lambda root: (root / DIGEST).unlink(),
    lambda root: (root / DIGEST).write_bytes(b""),
    lambda root: (root / DIGEST).write_bytes((root / DIGEST).read_bytes()[:-1]),
    lambda root: (root / DIGEST).write_bytes((root / DIGEST).read_bytes().upper()),
    lambda root: (root / DIGEST).write_bytes((root / DIGEST).read_bytes().replace(b"  ", b" *")),
    lambda root: (root / MANIFEST).write_bytes((root / MANIFEST).read_bytes() + b"\n"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_digest_that_does_not_fit(
    bundle: Path, damage: Callable[[Path], object], request: pytest.FixtureRequest
) -> None:
    damage(bundle)
    assert DIGEST in (python_refuses(bundle) or "")
    assert DIGEST in (library_refuses(request.getfixturevalue("library"), bundle) or "")


def test_verify_false_skips_the_files_and_not_the_manifest(bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes((bundle / MANIFEST).read_bytes() + b"\n")
    assert DIGEST in (told(lambda: Bundle(bundle, verify=False)) or "")


# What may lie in its place.


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root makes devices")


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 8 << 30)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "moved")


PLACED = [pipe, device, huge, endless, link, Path.mkdir]


@pytest.mark.parametrize("name", [MANIFEST, DIGEST])
@pytest.mark.parametrize("place", PLACED)
def test_only_a_plain_file_is_read(
    bundle: Path, name: str, place: Callable[[Path], object], request: pytest.FixtureRequest
) -> None:
    (bundle / name).rename(bundle.parent / "moved")
    place(bundle / name)
    assert name in (python_refuses(bundle) or "")
    assert name in (library_refuses(request.getfixturevalue("library"), bundle) or "")


# Bundles of schema 1.


def test_an_old_bundle_is_read_with_a_warning(old: Path, request: pytest.FixtureRequest) -> None:
    with pytest.warns(RuntimeWarning, match="verify --upgrade"):
        embedder = Embedder.load(old)
    assert embedder.manifest.schema_version == 1
    assert len(embedder.embed_query("total")) == 4
    assert library_refuses(request.getfixturevalue("library"), old) is None


def test_the_command_line_says_it_in_one_line(old: Path) -> None:
    outcome = cembed("inspect", old)
    assert outcome.status == 0
    assert outcome.err.startswith("warning: ")
    assert outcome.err.count("\n") == 1


def test_an_upgraded_bundle_is_the_same_to_everything_that_knows_it(
    old: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """An index, a vector file, a saved state and the name of an engine from before, with the bundle from after."""
    vectors, shelf = tmp_path / "v.npz", tmp_path / "shelf"
    before = quietly(old)
    assert cembed("embed", old, PAGE, "--out", vectors).status == 0
    assert cembed("index", "add", shelf, PAGE, "--bundle", old).status == 0
    with warnings.catch_warnings(record=True):
        Embedder.load(old).start(Image.open(PAGE)).save(tmp_path / "state.safetensors")
    outcome = cembed("verify", "--upgrade", old)
    assert outcome.status == 0, outcome.out
    assert "upgrade: schema 1 to 2" in outcome.out
    embedder = Embedder.load(old)
    assert (embedder.bundle.hash, embedder.manifest.schema_version) == (before.hash, 2)
    assert embedder.manifest.upgraded_from == before.hash
    for place in (vectors, shelf):
        assert cembed("search", place, "total", "--bundle", old).status == 0
    more = cembed("index", "add", shelf, GOLDEN / "causalqwen2_5" / "wide.png", "--bundle", old)
    assert (more.status, more.err) == (0, "")
    assert "1 pages added" in more.out
    with Index.open(shelf) as index:
        index.check_bundle(embedder.bundle.hash)
        assert len(index) == 2
    assert VectorFile.load(vectors).bundle == embedder.bundle.hash
    assert len(embedder.resume(tmp_path / "state.safetensors").extend(8)) == 8
    library = cast(Any, SimpleNamespace(tag="tensorrt-10.15.0"))
    names = {EngineCache(bundle, library, None).path("text").name for bundle in (before, embedder.bundle)}
    assert len(names) == 1
    opened: Library = request.getfixturevalue("library")
    bundle = opened.open(old)
    assert bundle.info.hash.decode() == before.hash
    np.testing.assert_allclose(bundle.embed_query("total"), embedder.embed_query("total"), atol=1e-5)
    bundle.close()


def test_an_upgrade_changes_the_manifest_only_and_once(old: Path) -> None:
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    mode = stat.S_IMODE((old / MANIFEST).stat().st_mode)
    assert [check.name for check in verify_and_upgrade(quietly(old)) if not check.passed] == []
    after = {path.name: path.read_bytes() for path in old.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {MANIFEST, DIGEST}
    assert {stat.S_IMODE((old / name).stat().st_mode) for name in (MANIFEST, DIGEST)} == {mode}
    assert {path.name for path in old.parent.iterdir()} == {old.name}
    assert all(check.passed for check in verify(Bundle(old)))
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", DIGEST], cwd=old, check=True, capture_output=True)
    assert "nothing to do" in cembed("verify", "--upgrade", old).out
    assert {path.name: path.read_bytes() for path in old.iterdir()} == after


@pytest.mark.parametrize("name", ["self_test.png", "text.data", "tokenizer.json"])
def test_a_bundle_that_fails_a_check_is_not_upgraded(old: Path, name: str) -> None:
    content = bytearray((old / name).read_bytes())
    content[len(content) // 2] ^= 1
    (old / name).write_bytes(content)
    before = (old / MANIFEST).read_bytes()
    outcome = cembed("verify", "--upgrade", old)
    assert outcome.status == 1
    assert "FAILED upgrade: nothing was written" in outcome.out
    assert (old / MANIFEST).read_bytes() == before
    assert not (old / DIGEST).exists()
    checks = json.loads(cembed("verify", "--upgrade", old, "--json").out)
    assert checks[-1]["name"] == "upgrade"


@pytest.mark.parametrize(
    "dump",
    [
        {"indent": 4},
        {"separators": (",", ":")},
        {"sort_keys": True},
        {"ensure_ascii": True},
    ],
)
def test_a_manifest_in_any_layout_is_upgraded(old: Path, dump: dict[str, Any], request: pytest.FixtureRequest) -> None:
    raw = read(old)
    raw["source"] = {"model": 'with "schema_version": 1 in it, 名前'}
    (old / MANIFEST).write_text(json.dumps(raw, **dump), encoding="utf-8")
    before = quietly(old).hash
    assert "schema 1 to 2" in upgrade_quietly(old)
    assert Bundle(old).hash == before
    library: Library = request.getfixturevalue("library")
    bundle = library.open(old)
    assert bundle.info.hash.decode() == before
    bundle.close()


def upgrade_quietly(root: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return upgrade(root)


@pytest.mark.parametrize(
    ("old_text", "new_text"),
    [
        (b'"dim": 96', b'"dim":  96'),
        (b'"max_sequence_length": ', b'"max_sequence_length": 1'),
        (b'"upgraded_from": "', b'"upgraded_from":  "'),
        (b', "schema_version"', b',\n "schema_version"'),
        (b'"schema_version": 2', b'"schema_version":  2'),
    ],
)
def test_the_hash_of_another_bundle_cannot_be_claimed(
    old: Path, old_text: bytes, new_text: bytes, request: pytest.FixtureRequest
) -> None:
    """A manifest that was changed after its upgrade, with a digest that fits."""
    upgrade_quietly(old)
    content = (old / MANIFEST).read_bytes()
    assert content.count(old_text) == 1
    put(old, content.replace(old_text, new_text))
    assert "upgraded_from" in (python_refuses(old) or "")
    assert "upgraded_from" in (library_refuses(request.getfixturevalue("library"), old) or "")


def test_what_is_made_of_an_old_bundle_is_new(old: Path) -> None:
    upgrade_quietly(old)
    made = write_self_test(old, Bundle(old).manifest)
    assert (made.schema_version, made.upgraded_from) == (SCHEMA_VERSION, None)
    assert Bundle(old).manifest == made


def test_an_upgrade_is_finished_by_the_next(old: Path, request: pytest.FixtureRequest) -> None:
    """The states between its steps, as a crash leaves them, are bundles that both languages open."""
    library: Library = request.getfixturevalue("library")
    before = (old / MANIFEST).read_bytes()
    name, both = quietly(old).hash, digest_line(before) + digest_line(upgraded(before))
    for content in (before, upgraded(before)):
        (old / DIGEST).write_bytes(both)
        (old / MANIFEST).write_bytes(content)
        assert quietly(old).hash == name
        assert library_refuses(library, old) is None
        assert "schema 1 to 2" in upgrade_quietly(old)
        assert (old / DIGEST).read_bytes() == digest_line(upgraded(before))
        assert Bundle(old).hash == name
    assert lines_of_upgrade(both) == [digest_line(before), digest_line(upgraded(before))]


def test_where_nothing_can_be_written_nothing_is_changed(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("cembed.runtime.disk.Disk.create", refuse)
    with pytest.raises(CembedError, match="Read-only file system"):
        upgrade_quietly(old)
    assert not (old / DIGEST).exists()

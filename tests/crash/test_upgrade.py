"""An upgrade of a bundle, stopped at each of its steps by an error or a power cut: the bundle can always be opened."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path

import pytest
from disks import FaultyDisk, RecordingDisk
from manifests import library_refuses, make_old

from cembed.runtime import Bundle, CembedError
from cembed.runtime.bundle.manifest import DIGEST, MANIFEST
from cembed.runtime.bundle.manifest_file import digest_line, upgrade
from cembed.runtime.disk import Disk

MOST = 40  # operations; it takes fewer
SEEDS = 6


class CutError(Exception):
    pass


@pytest.fixture(scope="module")
def old(causal_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of schema 1, not to be changed."""
    root = Path(shutil.copytree(causal_bundle, tmp_path_factory.mktemp("old") / "bundle"))
    make_old(root)
    return root


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Old bundles warn, and that is tested elsewhere."""
    warnings.simplefilter("ignore", RuntimeWarning)


def copy(old: Path, to: Path) -> Path:
    """Only what is written is copied."""
    to.mkdir(parents=True)
    for path in old.iterdir():
        (to / path.name).write_bytes(path.read_bytes()) if path.name == MANIFEST else (to / path.name).hardlink_to(path)
    return to


def check(root: Path, old: Path, library: object) -> None:
    """It can be opened, is still the same bundle, and the next upgrade finishes."""
    name = Bundle(old).hash
    assert Bundle(root).hash == name
    if library is not None:
        assert library_refuses(library, root) is None  # type: ignore[arg-type]
    upgrade(root)
    assert Bundle(root).manifest.schema_version == 2
    assert Bundle(root).hash == name
    assert (root / DIGEST).read_bytes() == digest_line((root / MANIFEST).read_bytes())


@pytest.fixture(scope="module")
def reader(request: pytest.FixtureRequest) -> object:
    """The C library where it can be built."""
    try:
        return request.getfixturevalue("library")
    except pytest.skip.Exception:
        return None


def test_every_step_fails_once(old: Path, tmp_path: Path, reader: object) -> None:
    failed = 0
    for at in range(1, MOST):
        root = copy(old, tmp_path / str(at) / "bundle")
        try:
            upgrade(root, FaultyDisk(at, 5))
        except CembedError:
            failed += 1
            check(root, old, reader)
    assert 10 < failed < MOST - 1


def test_the_power_is_cut_at_every_step(old: Path, tmp_path: Path, reader: object) -> None:
    cuts = 0
    for at in range(1, MOST):
        for seed in range(SEEDS):
            root = copy(old, tmp_path / f"{at}-{seed}" / "bundle")
            disk = RecordingDisk(root.resolve())

            def stop(disk: RecordingDisk = disk, at: int = at) -> None:
                if disk.count == at:
                    raise CutError

            disk.watch = stop  # type: ignore[method-assign]
            if finishes(root, disk):
                shutil.rmtree(root.parent)
                continue
            left = tmp_path / f"{at}-{seed}-left" / "bundle"
            left.mkdir(parents=True)
            disk.cut_power(random.Random(seed), left)
            for path in left.glob(".*"):
                path.unlink()  # what lay beside the bundle
            check(left, old, reader)
            cuts += 1
            shutil.rmtree(left.parent)
            shutil.rmtree(root.parent)
    assert cuts > 10 * SEEDS


def finishes(root: Path, disk: Disk) -> bool:
    try:
        upgrade(root, disk)
    except CutError:
        return False
    return True

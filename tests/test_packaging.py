"""What is released: versions that agree, units that systemd takes, Debian packages, the interface of libcembed."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import libcembed
import pytest
from libcembed import Library, run

import cembed
from cembed import versions

ROOT = Path(__file__).parents[1]
PACKAGING = ROOT / "packaging"
UNITS = sorted((PACKAGING / "systemd").glob("*.service"))
EXPOSURE = {"cembed-watch": 0.4, "cembed-serve": 1.1, "cembed-service": 1.1}
"""As docs/packages.md says, by systemd 252."""
NEWER = ("RestartSteps", "RestartMaxDelaySec")
"""Settings of units that systemd knows from 254 on, and leaves out before."""
long = pytest.mark.skipif(os.environ.get("CEMBED_PACKAGES") != "long", reason="CEMBED_PACKAGES is not long")


# Versions


def test_the_changelog_knows_the_version() -> None:
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[:2] == ["Unreleased", cembed.__version__]


def test_what_is_said_of_kernels_and_engines() -> None:
    maxsim, engines = versions.details()
    assert maxsim.startswith("MaxSim: ")
    assert re.match(r"engines: ONNX Runtime \d+\.\d+", engines)


def test_an_engine_that_is_not_there_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "ENGINES", {"None": ("cembed-no-such-package",)})
    assert versions.details()[1] == "engines: none"


# Archives


def scripts(name: str) -> str:
    """Code that imports a script of packaging/."""
    return f"import sys; sys.path.insert(0, {str(PACKAGING)!r}); from pathlib import Path; import {name}; "


def test_an_sdist_is_the_same_again(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    code = scripts("wheels") + (
        "files = wheels.copy_tree(Path(sys.argv[1]) / 'files'); work = Path(sys.argv[1]);"
        "[wheels.make_sdist(files, work / name, work / name / 'out', '1700000000') for name in ('a', 'b')]"
    )
    run(sys.executable, "-c", code, tmp_path)
    (one,), (other,) = ((tmp_path / name / "out").iterdir() for name in ("a", "b"))
    assert one.name == other.name == f"cembed-{cembed.__version__}.tar.gz"
    assert filecmp.cmp(one, other, shallow=False)


def test_wheels_have_every_library_that_is_compiled() -> None:
    tomllib = pytest.importorskip("tomllib")
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    names = run(sys.executable, "-c", scripts("wheels") + "print(*wheels.LIBRARIES)").split()
    assert {f"{module['name'].replace('.', '/')}.so" for module in modules} == set(names)


# Debian


def fields(paragraph: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+): ?((?:.|\n )*)", paragraph, re.MULTILINE))


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """debian/ as packages are built with it."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(PACKAGING, tree / "packaging")
    code = scripts("deb") + "deb.write_debian(Path(sys.argv[1]), 'A <a@b.org>', '1700000000')"
    run(sys.executable, "-c", code, tree)
    return tree / "debian"


def test_debian_packages(debian: Path) -> None:
    source, *packages = map(fields, (debian / "control").read_text().split("\n\n"))
    names = {package["Package"] for package in packages}
    assert source["Source"] == "cembed"
    assert f"libcembed{libcembed.ABI_VERSION}" in names, "the package has the number of the ABI in its name"
    assert (debian / "changelog").read_text().startswith(f"cembed ({cembed.__version__}) ")
    assert "@" not in "".join(path.name for path in debian.iterdir())
    owned = {path.name.split(".")[0] for path in debian.glob("*.*") if path.suffix != ".sh"}
    assert owned <= names, "each file is of a package"


def test_every_unit_has_its_package_and_its_settings(debian: Path) -> None:
    installed = {re.sub(r"^cembed\.", "", path.name) for path in debian.glob("*.service")}
    assert installed == {unit.name for unit in UNITS}
    rules = (debian / "rules").read_text()
    for unit in UNITS:
        (settings,) = re.findall(r"^EnvironmentFile=/etc/cembed/(.+)$", unit.read_text(), re.MULTILINE)
        assert f"packaging/etc/{settings}" in rules
        given = set(re.findall(r"^(\w+)=", (PACKAGING / "etc" / settings).read_text(), re.MULTILINE))
        assert set(re.findall(r"\$\{?(\w+)", unit.read_text())) <= given


# systemd

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_takes_the_unit(unit: Path, tmp_path: Path) -> None:
    """With programs that are here in place of those of the packages."""
    text = re.sub(r"(?<==)/usr/bin/cembed\S*", "/bin/true", unit.read_text())
    (tmp_path / unit.name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", tmp_path / unit.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if unit.name in line]
    assert [line for line in ours if not any(name in line for name in NEWER)] == []


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_what_a_unit_may_do_does_not_grow(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (score,) = re.findall(r"exposure level for .*: ([\d.]+)", done.stdout) or pytest.skip("it cannot say so offline")
    assert float(score) <= EXPOSURE[unit.stem]


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_the_service_tells_systemd(
    built: Path, causal_bundle: Path, onnxruntime_library: Path, tmp_path: Path, kind: str
) -> None:
    if lacking := libcembed.missing(libcembed.SAMPLE_HEADERS):
        pytest.skip(f"the samples are not built: {lacking}")
    name = str(tmp_path / "notify") if kind == "path" else f"@cembed-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1) if kind == "abstract" else name)
        listener.settimeout(60)
        told = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "600000", "CEMBED_ONNXRUNTIME": str(onnxruntime_library)}
        command = [built / "samples" / "cembed-service", causal_bundle, str(20000 + os.getpid() % 4000)]
        with subprocess.Popen(command, env=os.environ | told, stdout=subprocess.DEVNULL) as service:
            heard = [listener.recv(1000).decode() for _ in range(3)]
            service.terminate()
            while (last := listener.recv(1000).decode()) == "WATCHDOG=1":
                pass
    assert heard[0].startswith("READY=1\nSTATUS=listening on 127.0.0.1:")
    assert heard[1:] == ["WATCHDOG=1"] * 2
    assert last.startswith("STOPPING=1")
    assert service.returncode == 0


# libcembed


def test_the_interface_of_libcembed_is_that_of_the_release(library: Library, built: Path) -> None:
    code = "import abi; print(*abi.describe(Path(sys.argv[1])), sep='\\n')"
    start = f"import sys; sys.path.insert(0, {str(PACKAGING / 'abi')!r}); from pathlib import Path; "
    now = set(run(sys.executable, "-c", start + code, built / "libcembed.so").splitlines())
    before = set((PACKAGING / "abi" / "libcembed.txt").read_text().splitlines())
    assert before - now == set(), (
        "programs that were compiled before will break. Put it back, or raise CEMBED_ABI_VERSION in cembed.h and "
        "ABI_VERSION in tests/libcembed.py, and write packaging/abi/libcembed.txt anew as packaging/abi/abi.py says"
    )
    assert now == before, "what is new belongs in packaging/abi/libcembed.txt: packaging/abi/abi.py says how"


# What takes long


@long
def test_the_aarch64_wheel_gives_the_same_vectors() -> None:
    run(PACKAGING / "check_aarch64.sh", sys.executable)


@long
def test_packages_are_installed_upgraded_and_purged() -> None:
    run(PACKAGING / "check_deb.sh")

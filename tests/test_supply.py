"""What is built on: bounds and locks without known faults, hashes, licences, the lists of what a release has in it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]
PACKAGING = ROOT / "packaging"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ADVISORIES = tomllib.loads((PACKAGING / "advisories.toml").read_text())["advisory"]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
INPUTS = {"runtime": (), "serve": ("serve",)}
"""The extras in each lock of pyproject.toml."""
MACHINES = ("x86_64", "aarch64")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
sys.path.insert(0, str(PACKAGING))
import lock  # noqa: E402
import sbom  # noqa: E402


def requirements(*extras: str) -> list[Requirement]:
    """Of pyproject.toml: those of the plain install, and of extras."""
    project = PROJECT["project"]
    asked = [*project["dependencies"], *(text for name in extras for text in project["optional-dependencies"][name])]
    return [Requirement(text) for text in asked]


def everything() -> list[Requirement]:
    found = requirements(*PROJECT["project"]["optional-dependencies"])
    return [one for one in found if canonicalize_name(one.name) != "cembed"]


def oldest(requirement: Requirement) -> Version:
    """The lower bound. There has to be one."""
    (version,) = (spec.version for spec in requirement.specifier if spec.operator in (">=", "=="))
    return Version(version)


def good(package: str) -> Version:
    """The first version without a fault that is known."""
    faults = [Version(entry["good"]) for entry in ADVISORIES if entry["package"] == package]
    return max(faults, default=Version("0"))


# Known faults


def test_advisories_are_whole() -> None:
    for entry in ADVISORIES:
        assert entry.keys() == {"package", "good", "id", "about"}
        assert entry["package"] == canonicalize_name(entry["package"])
        assert re.match(r"(CVE|GHSA|PYSEC)-", entry["id"])
    assert sorted(ADVISORIES, key=lambda entry: (entry["package"], Version(entry["good"]))) == ADVISORIES


@pytest.mark.parametrize("requirement", everything(), ids=str)
def test_no_lower_bound_has_a_known_fault(requirement: Requirement) -> None:
    assert oldest(requirement) >= good(canonicalize_name(requirement.name))


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_nothing_locked_has_a_known_fault(path: Path) -> None:
    assert [pin.name for pin in lock.read(path) if Version(pin.version) < good(pin.name)] == []


# Locks


def chosen(path: Path, python: str, machine: str) -> dict[str, lock.Pin]:
    """What pip takes of a lock somewhere."""
    where = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine}
    where |= {"sys_platform": "linux", "implementation_name": "cpython", "platform_python_implementation": "CPython"}
    pins = [pin for pin in lock.read(path) if not pin.marker or Requirement(f"x; {pin.marker}").marker.evaluate(where)]
    assert len({pin.name for pin in pins}) == len(pins), "a package in two versions"
    return {pin.name: pin for pin in pins}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", INPUTS)
def test_a_lock_has_all_that_is_asked_for(name: str, machine: str, python: str) -> None:
    pins = chosen(lock.FOLDER / f"{name}.txt", python, machine)
    for requirement in requirements(*INPUTS[name]):
        assert pins[canonicalize_name(requirement.name)].version in requirement.specifier, "run `make locks`"


def test_the_lock_of_tools_has_them() -> None:
    pins = chosen(lock.FOLDER / "build.txt", "3.11", "x86_64")
    for line in (PACKAGING / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            assert pins[Requirement(line).name].version in Requirement(line).specifier, "run `make locks`"


def test_there_are_no_other_locks() -> None:
    assert {path.stem for path in LOCKS} == lock.LOCKS.keys()


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_each_file_has_a_hash_and_no_place(path: Path) -> None:
    assert all(pin.hashes and all(len(value) == 64 for value in pin.hashes) for pin in lock.read(path))
    text = path.read_text()
    assert "/" not in text
    assert not re.search(r"^--|\bhttps?:", text, re.MULTILINE)


def test_packages_are_made_of_locked_files() -> None:
    deb, make = (PACKAGING / "deb.py").read_text(), (ROOT / "Makefile").read_text()
    assert '"--require-hashes", "--requirement", ROOT / "requirements" / "serve.txt"' in deb
    assert re.search(r"^\$\(TOOLS\)/ready: requirements/build.txt\n.*\n.*pip install .*--require-hashes", make, re.M)
    assert "--no-index" in (PACKAGING / "debian" / "rules").read_text()


# What installing does


def test_installing_runs_nothing_of_ours() -> None:
    """setuptools compiles what pyproject.toml lists. There is no code of ours that could fetch anything."""
    assert PROJECT["build-system"]["build-backend"] == "setuptools.build_meta"
    assert [Requirement(text).name for text in PROJECT["build-system"]["requires"]] == ["setuptools"]
    assert "cmdclass" not in PROJECT["tool"]["setuptools"]
    assert [name for name in ("setup.py", "setup.cfg", "MANIFEST.in") if (ROOT / name).exists()] == []


@pytest.mark.parametrize("script", sorted((PACKAGING / "debian").glob("*.p*")), ids=lambda path: path.name)
def test_scripts_of_packages_fetch_nothing(script: Path) -> None:
    assert not re.search(r"\b(curl|wget|pip|apt|git|https?:)", script.read_text())


# Licences


def test_every_package_has_its_licence() -> None:
    known = sbom.table()["python"]
    assert {pin.name for name in INPUTS for pin in lock.read(lock.FOLDER / f"{name}.txt")} == known.keys()
    assert (PACKAGING / "licences.md").read_text() == sbom.licence_page(), "run packaging/sbom.py --licences"


@pytest.mark.parametrize("name", sbom.table()["python"])
def test_a_licence_is_what_the_package_says(name: str) -> None:
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    said = metadata["License-Expression"]
    if said is not None:
        assert sbom.table()["python"][name] == said
    texts = [said or metadata["License"] or "", *(metadata.get_all("Classifier") or [])]
    assert not any(re.search(r"\bA?GPL|General Public", text) for text in texts)


def test_no_gpl_is_linked() -> None:
    table = sbom.table()
    linked = [part["licence"] for part in table["native"]] + list(table["python"].values())
    assert [text for text in linked if re.search(r"\bA?GPL", text) and " WITH " not in text] == []


# Lists of what is in a release


@pytest.fixture
def artifacts(tmp_path: Path) -> list[Path]:
    names = ("cembed-0.1.0-py3-none-manylinux_2_28_x86_64.whl", "libcembed2_0.1.0_amd64.deb")
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.write_bytes(b"bytes")
    return paths


def test_a_list_is_the_same_again_and_follows_the_schema(artifacts: list[Path]) -> None:
    for artifact in artifacts:
        text = sbom.write(artifact).read_text()
        assert sbom.write(artifact).read_text() == text
        check_schema(text)


def check_schema(text: str) -> None:
    try:
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError:
        return check_fields(json.loads(text))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    return None


def check_fields(document: dict[str, Any]) -> None:
    """What the schema asks for, where it is not here."""
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", document["serialNumber"])
    parts = [document["metadata"]["component"], *document["components"]]
    assert all(part["type"] in ("library", "application") and part["name"] for part in parts)
    (depends,) = document["dependencies"]
    assert {depends["ref"], *depends["dependsOn"]} == {part["bom-ref"] for part in parts}


def test_a_list_names_what_is_needed(artifacts: list[Path]) -> None:
    wheel, library = (sbom.sbom(artifact)["components"] for artifact in artifacts)
    scopes = {part["name"]: part.get("scope") for part in wheel}
    assert (scopes["onnxruntime"], scopes["fastapi"]) == ("required", "optional")
    assert {part["name"] for part in library} >= {"nlohmann-json", "openssl", "zlib", "onnxruntime"}


def test_the_oldest_versions_are_those_of_pyproject() -> None:
    command = [sys.executable, ROOT / "tests" / "oldest.py"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {f"{one.name}=={oldest(one)}" for one in requirements("serve", "quantize")} <= set(told)

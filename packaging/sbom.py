"""What is in each release: a CycloneDX file beside every wheel and Debian package in dist/, and licences.md.

`make sbom` runs it after `make wheels` and `make deb`. Versions and hashes are those of requirements/, licences those
of licences.toml, and versions of what C++ uses those of this machine's packages. Two runs give the same: no times,
and a serial number that is made of the content.

    python packaging/sbom.py              # dist/*.cdx.json
    python packaging/sbom.py --licences   # packaging/licences.md
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lock
from packaging.markers import Marker

FOLDER = Path(__file__).resolve().parent
TABLE = FOLDER / "licences.toml"
PYTHON_LOCKS = {"wheel": "serve", "cembed": "serve"}
"""The lock of what has Python packages."""
Json = dict[str, Any]


def table() -> Json:
    return tomllib.loads(TABLE.read_text())


def kind_of(artifact: Path) -> str:
    """
    >>> kind_of(Path("libcembed2_0.1.0_amd64.deb")), kind_of(Path("cembed-0.1.0-py3-none-any.whl"))
    ('libcembed', 'wheel')
    """
    return "wheel" if artifact.suffix == ".whl" else re.sub(r"\d+$", "", artifact.name.partition("_")[0])


def licences(expression: str) -> list[Json]:
    plain = re.fullmatch(r"[\w.-]+", expression)
    return [{"license": {"id": expression}} if plain else {"expression": expression}]


def python_component(pin: lock.Pin, scope: str) -> Json:
    url = f"pkg:pypi/{pin.name}@{pin.version}"
    return {
        "type": "library",
        "bom-ref": url,
        "name": pin.name,
        "version": pin.version,
        "scope": scope,
        "licenses": licences(table()["python"][pin.name]),
        "purl": url,
        "properties": [
            {"name": "cembed:marker", "value": pin.marker},
            *({"name": "cembed:file:sha256", "value": value} for value in pin.hashes),
        ],
    }


def python_components(artifact: Path) -> Iterator[Json]:
    """A wheel asks for the plain packages and brings none; `cembed.deb` has those in it that its Python needs."""
    kind = kind_of(artifact)
    if kind not in PYTHON_LOCKS:
        return
    plain = {pin.name for pin in lock.read(lock.FOLDER / "runtime.txt")}
    where = debian_python(artifact) if kind == "cembed" else None
    for pin in lock.read(lock.FOLDER / f"{PYTHON_LOCKS[kind]}.txt"):
        if where is None or Marker(pin.marker).evaluate(where):
            yield python_component(pin, "required" if pin.name in plain or where else "optional")


def debian_python(artifact: Path) -> dict[str, str]:
    """What markers ask of the Python that a Debian package depends on."""
    depends = subprocess.run(["dpkg-deb", "-f", artifact, "Depends"], capture_output=True, text=True, check=True).stdout
    version = re.findall(r"python3 \(>= ([\d.]+)\)", depends)[0]
    machine = {"amd64": "x86_64", "arm64": "aarch64"}[artifact.stem.rpartition("_")[2]]
    return {"python_version": version, "python_full_version": version, "platform_machine": machine}


def native_components(kind: str) -> Iterator[Json]:
    for part in table()["native"]:
        if kind in part["in"]:
            version = native_version(part)
            found = {
                "type": "library",
                "bom-ref": f"native:{part['name']}",
                "name": part["name"],
                **({"version": version} if version else {}),
                "licenses": licences(part["licence"]),
                "properties": [{"name": "cembed:how", "value": part["how"]}],
            }
            yield found


def native_version(part: Json) -> str | None:
    """None where nothing here says it."""
    if name := part.get("locked"):
        pins = [pin for path in sorted(lock.FOLDER.glob("*.txt")) for pin in lock.read(path)]
        return next(pin.version for pin in pins if pin.name == name)
    if name := part.get("debian"):
        return debian_version(name)
    return None


def debian_version(package: str) -> str | None:
    try:
        command = ["dpkg-query", "--show", "--showformat=${Version}", package]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout or None
    except (OSError, subprocess.CalledProcessError):
        return None


def subject(artifact: Path) -> Json:
    """The file itself."""
    parts = artifact.name.split("-" if artifact.suffix == ".whl" else "_")
    return {
        "type": "library" if "lib" in parts[0] else "application",
        "bom-ref": artifact.name,
        "name": parts[0],
        "version": parts[1],
        "licenses": licences("Apache-2.0"),
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(artifact.read_bytes()).hexdigest()}],
    }


def sbom(artifact: Path) -> Json:
    """A CycloneDX document."""
    kind = kind_of(artifact)
    components = [*python_components(artifact), *native_components(kind)]
    names = [part["bom-ref"] for part in components]
    assert len(names) == len(set(names)), f"{names = }"
    body: Json = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": subject(artifact)},
        "components": components,
        "dependencies": [{"ref": artifact.name, "dependsOn": names}],
    }
    return body | {"serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(body, sort_keys=True))}"}


def write(artifact: Path) -> Path:
    path = artifact.with_name(f"{artifact.name}.cdx.json")
    path.write_text(json.dumps(sbom(artifact), indent=1) + "\n")
    return path


def licence_page() -> str:
    """licences.md."""
    found = table()
    lines = ["# Licences", "", "Of all that is shipped or linked; `packaging/sbom.py --licences` writes this page."]
    lines += ["Our own code is under Apache-2.0. No GPL is linked but with an exception that allows it.", ""]
    lines += ["| C and C++ | licence | how | in |", "|---|---|---|---|"]
    for part in found["native"]:
        lines += [f"| {part['name']} | {part['licence']} | {part['how']} | {', '.join(part['in'])} |"]
    lines += [
        "",
        "Python packages: needed by the wheel, and in the Debian package `cembed`. Nothing is linked to them.",
        "",
    ]
    lines += ["| package | licence |", "|---|---|", *(f"| {name} | {text} |" for name, text in found["python"].items())]
    return "\n".join(lines) + "\n"


def main(arguments: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="wheels and Debian packages; all in dist/ if none is named")
    parser.add_argument("--licences", action="store_true", help="write licences.md")
    chosen = parser.parse_args(arguments)
    if chosen.licences:
        (FOLDER / "licences.md").write_text(licence_page())
        return
    dist = lock.ROOT / "dist"
    for artifact in chosen.files or sorted([*dist.glob("*.whl"), *dist.glob("*.deb")]):
        print(write(artifact))


if __name__ == "__main__":
    main()

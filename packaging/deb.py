"""The Debian packages, in dist/: `make deb` runs this on Debian or Ubuntu, after `make wheels`.

The package cembed has Python packages for the Python of the system that builds it: they are downloaded here, nothing
when it is installed. Needed: debhelper, and what Build-Depends of debian/control names.
"""

from __future__ import annotations

import argparse
import email.utils
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from wheels import ROOT, copy_tree, run, source_date

WORK = ROOT / "build" / "packages" / "deb"
MAINTAINER = "cembed maintainers <cembed@users.noreply.github.com>"
SYSTEM_PYTHON = "/usr/bin/python3"
UNITS = {
    "cembed-watch.service": "cembed.cembed-watch.service",
    "cembed-serve.service": "cembed.cembed-serve.service",
    "cembed-service.service": "cembed-service.service",
}
"""Units, and what debhelper calls them: PACKAGE.UNIT."""


def version() -> str:
    return found(ROOT / "cembed" / "__init__.py", r'^__version__ = "(.+)"$')


def abi() -> str:
    return found(ROOT / "runtime" / "native" / "include" / "cembed.h", r"^#define CEMBED_ABI_VERSION (\d+)$")


def found(path: Path, pattern: str) -> str:
    match = re.search(pattern, path.read_text(), re.MULTILINE)
    assert match, f"{pattern} is not in {path}"
    return match[1]


def changelog(maintainer: str, date: str) -> str:
    """Debian's, which needs one line and points to CHANGELOG.md."""
    when = email.utils.formatdate(int(date))
    head = f"cembed ({version()}) unstable; urgency=medium"
    return f"{head}\n\n  * See CHANGELOG.md, in the package cembed-common.\n\n -- {maintainer}  {when}\n"


def write_debian(tree: Path, maintainer: str, date: str) -> None:
    """debian/, with the number of the ABI where files and their names have @ABI@."""
    names = {"@ABI@": abi(), "@MAINTAINER@": maintainer}
    debian = shutil.copytree(tree / "packaging" / "debian", tree / "debian")
    for path in [path for path in debian.rglob("*") if path.is_file()]:
        text = path.read_text()
        for name, value in names.items():
            text = text.replace(name, value)
        path.write_text(text)
        path.rename(path.with_name(path.name.replace("@ABI@", abi())))
    for unit, name in UNITS.items():
        shutil.copy(tree / "packaging" / "systemd" / unit, debian / name)
    (debian / "changelog").write_text(changelog(maintainer, date))


def download(wheels: Path) -> None:
    """The wheel of cembed, and what it needs to serve for the system's Python: the files of the lock and no others."""
    made = list((ROOT / "dist").glob(f"cembed-{version()}-py3-none-*_{platform.machine()}.whl"))
    if len(made) != 1:
        sys.exit(f"dist has {len(made)} wheels of cembed {version()} for {platform.machine()}: run `make wheels`")
    python = WORK / "python"
    run(SYSTEM_PYTHON, "-m", "venv", "--without-pip", python)
    pip = sys.executable, "-m", "pip", "--python", python / "bin" / "python"
    locked = "--require-hashes", "--requirement", ROOT / "requirements" / "serve.txt"
    run(*pip, "download", "--quiet", "--only-binary=:all:", "--no-deps", "--dest", wheels, *locked)
    shutil.copy(made[0], wheels)


def build(tree: Path, wheels: Path, date: str) -> list[Path]:
    variables = {
        "PIP": f"{sys.executable} -m pip",
        "WHEELS": str(wheels),
        "SOURCE_DATE_EPOCH": date,
        "ONNXRUNTIME_ROOT": os.environ.get("ONNXRUNTIME_ROOT", "/usr"),
    }
    run("dpkg-buildpackage", "--build=binary", "--no-sign", "--no-check-builddeps", "-j2", cwd=tree, **variables)
    return [Path(shutil.copy(path, ROOT / "dist")) for path in sorted(tree.parent.glob("*.deb"))]


def main(arguments: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maintainer", default=MAINTAINER, help="NAME <ADDRESS>")
    chosen = parser.parse_args(arguments)
    shutil.rmtree(WORK, ignore_errors=True)
    tree, wheels, date = WORK / f"cembed-{version()}", WORK / "wheels", source_date()
    copy_tree(tree)
    write_debian(tree, chosen.maintainer, date)
    download(wheels)
    for path in build(tree, wheels, date):
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

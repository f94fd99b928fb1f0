"""The sdist, and from it one wheel for each processor: `make wheels` runs this with the tools of requirements.txt.

The libraries are opened with ctypes and know no Python, so a wheel is for every Python 3. zig compiles them on any
machine for any of TARGETS, against the symbols of an old glibc. What is written depends on the tree alone: --check
builds all of it a second time, elsewhere and without what the first has cached, and compares the bytes.
"""

from __future__ import annotations

import argparse
import filecmp
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "cembed/runtime/scoring/libmaxsim.so",
    "cembed/runtime/engines/liboperators.so",
    "cembed/runtime/pages/pdf/libpictures.so",
)
BUILD = """
import json, sys, sysconfig
sysconfig.get_config_vars().update(json.loads(sys.argv[3]))  # in place of those of the Python that builds
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


@dataclass(frozen=True)
class Target:
    """A processor. Its glibc is the oldest that a wheel of ONNX Runtime runs with."""

    processor: str
    machine: int  # in the header of its ELF files
    glibc: str = "2.28"

    @property
    def tag(self) -> str:
        return f"manylinux_{self.glibc.replace('.', '_')}_{self.processor}"

    @property
    def compiler(self) -> str:
        return f"{sys.executable} -m ziglang c++ -target {self.processor}-linux-gnu.{self.glibc}"

    @property
    def variables(self) -> dict[str, str]:
        """Of sysconfig, for setuptools."""
        link = f"{self.compiler} -shared -s -Wl,--version-script={ROOT / 'packaging' / 'wheels.map'}"
        compilers = {"CC": self.compiler, "CXX": self.compiler, "LDSHARED": link, "LDCXXSHARED": link}
        return compilers | {"CFLAGS": "-DNDEBUG", "CCSHARED": "-fPIC", "EXT_SUFFIX": ".so", "SHLIB_SUFFIX": ".so"}


TARGETS = {target.processor: target for target in (Target("x86_64", 62), Target("aarch64", 183))}


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """What a command prints. Exits with its errors if it fails."""
    environment = {**os.environ, **variables}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:200]}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def source_date() -> str:
    """The time of the last commit: what every file in an archive is dated."""
    return os.environ.get("SOURCE_DATE_EPOCH") or run("git", "log", "-1", "--format=%ct").strip()


def copy_tree(to: Path) -> Path:
    """The files that git has or would add, and no others."""
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ":!tests")
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


def backend(step: str, tree: Path, out: Path, date: str, variables: dict[str, str], cache: Path) -> Path:
    """What setuptools made of a tree."""
    out.mkdir(parents=True, exist_ok=True)
    settings = {"SOURCE_DATE_EPOCH": date, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
    command = sys.executable, "-c", BUILD, step, out, json.dumps(variables)
    return out / run(*command, cwd=tree, **settings).splitlines()[-1]


def settle(archive: Path, date: str, out: Path) -> Path:
    """The same sdist without what the machine and the moment left in it: owners, times, the order of a folder."""
    raw = io.BytesIO()
    with tarfile.open(archive) as old, tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted((m for m in old if m.isfile()), key=lambda m: m.name):
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.pax_headers = {}
            member.mtime, member.mode = int(date), 0o755 if member.mode & 0o100 else 0o644
            new.addfile(member, old.extractfile(member))
    out.mkdir(parents=True, exist_ok=True)
    (out / archive.name).write_bytes(gzip.compress(raw.getvalue(), mtime=0))
    return out / archive.name


def make_sdist(files: Path, work: Path, out: Path, date: str) -> Path:
    tree = shutil.copytree(files, work / "tree")  # what builds leaves files of its own there
    return settle(backend("build_sdist", tree, work / "sdist", date, {}, work), date, out)


def unpack(sdist: Path, to: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(to, filter="data")
    return next(to.iterdir())


def make_wheel(sdist: Path, target: Target, work: Path, out: Path, date: str, cache: Path) -> Path:
    """A wheel for every Python 3, as the libraries in it need none in particular."""
    tree = unpack(sdist, work / target.processor)
    built = backend("build_wheel", tree, work / f"{target.processor}-wheel", date, target.variables, cache)
    tags = "--python-tag=py3", "--abi-tag=none", f"--platform-tag={target.tag}"
    name = run(sys.executable, "-m", "wheel", "tags", *tags, built, SOURCE_DATE_EPOCH=date).split()[-1]
    check_libraries(built.with_name(name), target)
    return Path(shutil.copy(built.with_name(name), out))


def check_libraries(wheel: Path, target: Target) -> None:
    """setuptools leaves out a library that does not compile; a wheel for others must have all of them."""
    with zipfile.ZipFile(wheel) as archive:
        for name in LIBRARIES:
            machine = int.from_bytes(archive.read(name)[18:20], "little")
            assert machine == target.machine, f"{name} is for {machine = }"
    shown = run(sys.executable, "-m", "auditwheel", "show", wheel)
    if target.tag not in shown.replace("\n", " "):
        sys.exit(f"{wheel.name} is not what its tag says:\n{shown}")


def make_all(files: Path, out: Path, processors: list[str], cache: Path) -> list[Path]:
    date = source_date()
    with tempfile.TemporaryDirectory() as folder:
        sdist = make_sdist(files, Path(folder), out, date)
        wheels = [make_wheel(sdist, TARGETS[name], Path(folder), out, date, cache) for name in processors]
    return [sdist, *wheels]


def check_again(files: Path, made: list[Path], processors: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        again = make_all(files, Path(folder) / "out", processors, Path(folder) / "cache")
        for old, new in zip(made, again, strict=True):
            if not filecmp.cmp(old, new, shallow=False):
                sys.exit(f"{old.name} has other bytes when it is built again")


def main(arguments: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("processors", nargs="*", help=f"of {', '.join(TARGETS)}; all if none is named")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--check", action="store_true", help="build again and compare the bytes")
    chosen = parser.parse_args(arguments)
    processors = chosen.processors or list(TARGETS)
    os.umask(0o022)
    with tempfile.TemporaryDirectory() as folder:
        files = copy_tree(Path(folder))
        made = make_all(files, chosen.out, processors, ROOT / "build" / "packages" / "zig")
        if chosen.check:
            check_again(files, made, processors)
    for path in made:
        print(f"{path}  {path.stat().st_size:,} bytes" + "  the same again" * chosen.check)


if __name__ == "__main__":
    main()

"""Writes requirements/*.txt: the packages that are shipped, each in one version and with the hashes of its files.

`make locks` runs it with the tools of requirements.txt, against whatever index is set up; no place is written. A
version that is locked stays as it is while it fits; --upgrade takes the newest of all. With `--require-hashes`, which
packaging/deb.py and the Makefile say, pip takes no other file.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"
OLDEST_PYTHON = "3.11"
"""ONNX Runtime has no wheels for an older one."""
LOCKS = {
    "runtime": ("pyproject.toml",),
    "serve": ("pyproject.toml", "--extra=serve", "--extra=trust", "--extra=watch"),
    "build": ("packaging/requirements.txt",),
}
"""What each file is made of; `serve` is all that the Debian package has."""
OPTIONS = ("--universal", f"--python-version={OLDEST_PYTHON}", "--generate-hashes", "--no-annotate", "--quiet")


@dataclass(frozen=True)
class Pin:
    """A package of a lock. `marker` says where it is needed, and is empty for everywhere."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]


def read(path: Path) -> list[Pin]:
    """The packages of a lock, in its order."""
    whole = path.read_text().replace("\\\n", " ")
    return [pin(line) for line in whole.splitlines() if line and not line.startswith("#")]


def pin(line: str) -> Pin:
    """
    >>> pin("a-b==1.0 ; python_version < '3.12'  --hash=sha256:0f --hash=sha256:1e")
    Pin(name='a-b', version='1.0', marker="python_version < '3.12'", hashes=('0f', '1e'))
    """
    match = re.match(r"([a-z0-9-]+)==([\w.+!]+)\s*(?:;\s*(.*?))?\s*((?:--hash=\S+\s*)*)$", line)
    assert match, f"{line = }"
    return Pin(match[1], match[2], match[3] or "", tuple(re.findall(r"--hash=sha256:(\w+)", match[4])))


def write(name: str, upgrade: bool) -> Path:
    """Compiles one lock. Raises CalledProcessError: nothing fits, as uv has said."""
    out = FOLDER / f"{name}.txt"
    command = [sys.executable, "-m", "uv", "pip", "compile", *LOCKS[name], *OPTIONS, f"--output-file={out}"]
    command += ["--custom-compile-command=make locks", *(["--upgrade"] if upgrade else [])]
    subprocess.run(command, cwd=ROOT, check=True)
    return out


def main(arguments: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="the newest versions of all")
    chosen = parser.parse_args(arguments)
    FOLDER.mkdir(exist_ok=True)
    for name in LOCKS:
        path = write(name, chosen.upgrade)
        print(f"{path.relative_to(ROOT)}  {len(read(path))} packages")


if __name__ == "__main__":
    main()

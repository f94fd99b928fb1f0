"""Prints the oldest version of each package that pyproject.toml allows, as constraints for pip. Needs Python 3.11."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def main() -> None:
    extras = PROJECT["optional-dependencies"].values()
    asked = {requirement for group in (PROJECT["dependencies"], *extras) for requirement in group}
    for name, version in sorted(found for text in asked for found in re.findall(r"^([\w-]+)>=([\d.]+)", text)):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()

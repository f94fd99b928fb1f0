"""Libraries of native/ that pip compiles: each is beside the module that opens it."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def compiled_library(module: str, name: str) -> Path | None:
    """The library beside the file of a module, or None if it was not built."""
    names = (Path(module).with_name(f"{name}{suffix}") for suffix in EXTENSION_SUFFIXES)
    return next((path for path in names if path.exists()), None)

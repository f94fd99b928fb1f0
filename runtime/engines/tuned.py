"""What `cembed tune` found fastest for a bundle on this machine: a file beside the bundle, never in it."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cembed.runtime.bundle.schema import decode, parse
from cembed.runtime.bundle.vectors import write_whole
from cembed.runtime.engines import processor
from cembed.runtime.errors import CembedError
from cembed.runtime.plain_files import read_plain

MAX_BYTES = 1 << 16
ENGINES = ("onnxruntime", "onnxruntime-gpu", "openvino")


@dataclass(frozen=True)
class Tuned:
    """Providers as in `EngineSettings`, and what they were chosen for: the hash of a bundle, and a machine."""

    providers: tuple[str, ...]
    threads: int | None
    bundle: str
    machine: str


def path_of(root: Path) -> Path:
    """Where the choice for the bundle at `root` is."""
    place = root.resolve()
    return place.with_name(f"{place.name}.tuned.json")


def machine() -> str:
    """The processor, and the engines that are installed."""
    return "; ".join([processor.name(), *filter(None, map(_installed, ENGINES))])


def _installed(name: str) -> str | None:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return None


def write(root: Path, tuned: Tuned) -> Path:
    """Replaces the choice for a bundle. Raises CembedError if it cannot be written."""
    path, text = path_of(root), json.dumps(asdict(tuned), indent=1) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
    return path


def read(root: Path, bundle: str) -> Tuned | None:
    """The choice for the bundle at `root` with this hash, if there is one.

    One of another bundle or machine is a RuntimeWarning, and not used. Raises CembedError if it is damaged.
    """
    path = path_of(root)
    if not path.exists():
        return None
    try:
        found: Tuned = decode(Tuned, parse(read_plain(path, MAX_BYTES).decode("utf-8"), path.name), path.name)
    except (CembedError, UnicodeDecodeError) as error:
        raise CembedError(f"{path} is damaged ({error}): run cembed tune again, or remove it") from error
    if (found.bundle, found.machine) == (bundle, machine()):
        return found
    other = "bundle" if found.bundle != bundle else f"machine, {found.machine}"
    warnings.warn(f"{path} is of another {other}, and not used: run cembed tune again", RuntimeWarning, stacklevel=4)
    return None

"""Files of strangers: manifests, vectors, saved states, logs of an index. Each says whether an input was taken."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from cembed.runtime.bundle.manifest_file import hash_of, parse_manifest
from cembed.runtime.bundle.vectors import VectorFile
from cembed.runtime.embed.state_files import StateSchema, open_state
from cembed.runtime.errors import CembedError
from cembed.runtime.index.records import COMMIT, PLACED, Header, Record, decode_commits, read_log
from cembed.runtime.index.texts import MalformedError

CORPUS = Path(__file__).parent / "corpus"
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
BUNDLE = "0" * 64
SEED, TIERS = 7, 4  # as fuzz_index has them
MEMBER = b"|member|"
"""Stands before each array of an .npz file that is made here, as the sums of a zip file would stop every change."""
MEMBERS = ("vectors", "offsets", "pages", "paths", "bundle", "warnings")


@contextmanager
def written(content: bytes, suffix: str) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(suffix=suffix, dir=MEMORY) as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


def manifest(data: bytes) -> bool:
    try:
        hash_of(data, parse_manifest(data))
    except CembedError:
        return False
    return True


def vectors(data: bytes) -> bool:
    """The first byte says what the others are: a file of either kind, or the arrays of an .npz."""
    kind, data = data[:1], data[1:]
    if kind == b"m":
        with written(b"", ".npz") as path:
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in zip(MEMBERS, data.split(MEMBER)[1:], strict=False):
                    archive.writestr(f"{name}.npy", content)
            return load(path)
    with written(data, ".npz" if kind == b"n" else ".safetensors") as path:
        return load(path)


def load(path: Path) -> bool:
    try:
        found = VectorFile.load(path)
    except CembedError:
        return False
    assert len(found.documents()) == len(found) == len(found.pages)
    assert sum(map(len, found.documents())) == len(found.vectors)
    return True


@cache
def schema() -> StateSchema:
    return StateSchema(BUNDLE, parse_manifest((CORPUS / "manifest" / "causal").read_bytes()), 4)


def state(data: bytes) -> bool:
    with written(data, ".safetensors") as path:
        try:
            open_state(path, schema()).read()
        except CembedError:
            return False
    return True


def commit(data: bytes) -> bool:
    """A record with good sums: its kind and counts, and its payload."""
    kind, pages, removed = data[:3].ljust(3, b"\0")
    header = Header(PLACED if kind == PLACED else COMMIT, pages, removed, 0, 1, len(data[3:]))
    try:
        found = decode_commits([Record(header, 0, data[3:])], TIERS)
    except MalformedError:
        return False
    assert len(found.ids) == len(found.serials) == pages
    return all(isinstance(text, str) for text in (*found.ids, *found.sources, *found.metadata))


def log(data: bytes) -> bool:
    with written(data, ".log") as path, path.open("rb") as file:
        try:
            parts = list(read_log(file.fileno(), SEED, 0, 1))
        except MalformedError:
            return False
    assert parts == [] or parts[-1].end <= len(data)
    return bool(parts)

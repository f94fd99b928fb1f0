"""Writing a bundle: a directory that appears whole or not at all, and the self-test that closes it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw
from safetensors.numpy import save

from cembed.runtime.bundle.bundle import OwnBundle, record_files
from cembed.runtime.bundle.manifest import MANIFEST, SCHEMA_VERSION, Manifest
from cembed.runtime.bundle.manifest_file import write_manifest
from cembed.runtime.embed.embedder import Embedder
from cembed.runtime.engines.operators import same_everywhere
from cembed.runtime.engines.session import EngineSettings
from cembed.runtime.errors import CembedError


def self_test_page() -> Image.Image:
    """A small page with lines of text, drawn alike everywhere."""
    page = Image.new("RGB", (280, 364), "white")
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, 279, 40), fill=(20, 60, 120))
    for row in range(9):
        draw.text((16, 60 + 30 * row), f"Position {row + 1}: {(row * 37) % 91}.50 EUR", fill=(0, 0, 40 * (row % 3)))
    return page


def write_self_test(root: Path, manifest: Manifest) -> Manifest:
    """Embeds the self-test page and query with the bundle as it is, stores the vectors, and completes the manifest."""
    manifest = replace(manifest, schema_version=SCHEMA_VERSION, upgraded_from=None)  # it may be made from an old one's
    page = self_test_page()
    page.save(root / manifest.self_test.image)
    (root / manifest.self_test.vectors).touch()
    write_manifest(root, replace(manifest, files=record_files(root)).to_json())
    embedder = Embedder(OwnBundle(root, verify=False), EngineSettings(same_everywhere(), prepack=False))
    vectors = {"document": embedder.embed_image(page), "query": embedder.embed_query(manifest.self_test.text)}
    (root / manifest.self_test.vectors).write_bytes(save(vectors))
    complete = replace(manifest, files=record_files(root))
    write_manifest(root, complete.to_json())
    return complete


def check_replaceable(out: Path, force: bool) -> None:
    """Raises CembedError if something is at `out`, unless it is a bundle and may be replaced."""
    if not os.path.lexists(out):
        return
    if not force:
        raise CembedError(f"{out} exists: choose another --out, or replace it with --force")
    if not (out / MANIFEST).is_file():
        raise CembedError(f"{out} is not a bundle, so --force does not replace it: remove it yourself")


@contextlib.contextmanager
def directory(out: Path) -> Iterator[Path]:
    """A temporary directory that becomes `out` when the block ends well, replacing a bundle there, or else vanishes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    retired = partial.with_name(partial.name + ".old")
    try:
        yield partial
        partial.chmod(0o755)
        sync([*partial.iterdir(), partial])
        if out.exists():
            out.rename(retired)
        try:
            partial.rename(out)
        except OSError:
            retired.rename(out)
            raise
        sync([out.parent])
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if out.exists():
            shutil.rmtree(retired, ignore_errors=True)


def sync(paths: Iterable[Path]) -> None:
    """Waits until files and directories are on disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""The bundle: one directory, described by `manifest.json`, that holds all a runtime needs.

    manifest.json            `manifest.Manifest`, and every other file's size and sha256
    manifest.sha256          its own sha256, for `sha256sum -c`
    manifest.sig             who signed it (`trust`), if anybody did
    vision.onnx, vision.data the image encoder and its weights
    text.onnx, text.data     the single pass and its weights
    text_step.onnx           the same over a static cache, for latent slots; it shares text.data
    token_embeddings.bin     the embedding table, row-major, memory-mapped
    slot_embeddings.bin      learned slot rows, if there are any
    tokenizer.json           the tokenizer, as the `tokenizers` library writes it
    self_test.*              a page, a query, and the vectors they gave when the bundle was made

A file is checked against the manifest before anything else reads it, once per `Bundle`; the weights of a graph, which
are nothing but numbers, before anything is computed from them: they are hashed while the engine takes them in.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.bundle.external_data import check_external_data
from cembed.runtime.bundle.graph_check import check_graph
from cembed.runtime.bundle.manifest import (
    DIGEST,
    MANIFEST,
    MAX_TOKENIZER,
    SIGNATURES,
    EmbeddingTable,
    FileRecord,
    Graph,
)
from cembed.runtime.bundle.manifest_file import read_bytes, read_manifest
from cembed.runtime.bundle.tokenizer_check import check_tokenizer
from cembed.runtime.bundle.trust import check_trust
from cembed.runtime.errors import CembedError
from cembed.runtime.plain_files import read_plain

DOCUMENTS = {MANIFEST, DIGEST, SIGNATURES}
"""What a manifest does not list."""
_CHUNK = 1 << 22
_HASHING = 4  # threads


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Table:
    """Rows [n, hidden_size] as stored, and what each row [n, 1] is multiplied with, if anything.

    `verify` raises CembedError if a file is damaged; before that nothing is read of it.
    """

    values: NDArray[Any]
    scales: NDArray[np.float32] | None
    verify: Callable[[], None]

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> NDArray[np.float32]:
        """The rows in float32. Raises CembedError: a damaged file, or a row that is not there, as the tokenizer has
        more ids than rows."""
        self.verify()
        if not isinstance(rows, slice) and rows.size and not 0 <= rows.min() <= rows.max() < len(self.values):
            raise CembedError(f"there is no row {rows.max()} in a table of {len(self.values)}")
        picked = np.asarray(self.values[rows], np.float32)
        return picked if self.scales is None else picked * self.scales[rows]


class Bundle:
    """An opened bundle. `path(name)` and `table` are the only ways to a file, and verify it before it is read.

    Raises CembedError: no such directory, no or a newer manifest, one that does not match its digest or contradicts
    itself, a file that is missing, changed, a link, unlisted. A bundle of schema 1, whose manifest has no digest, is a
    RuntimeWarning. Signatures come before all of that, where `trusted` (a public key, or a folder of them) or a policy
    wants one: see `trust`; `signers` are the ids of the keys that are trusted and signed. Where `root` is a link, it is
    followed once: later it may lead to another bundle.
    """

    def __init__(self, root: str | Path, *, verify: bool = True, trusted: str | Path | None = None) -> None:
        self.root = Path(os.path.realpath(root)) if os.path.islink(Path(root)) else Path(root)
        self._trusted = None if trusted is None else Path(os.path.abspath(trusted))
        self.content = read_bytes(self.root)  # once: what is trusted is what is read
        self.signers = self._check_trust()
        self.manifest, self.hash = read_manifest(self.root, self.content)
        self._lock = threading.Lock()
        self._hashes: dict[str, Future[str]] = {}
        self._inspected: set[str] = set()
        self._verify = verify
        self._check_listing()

    def __reduce__(self) -> tuple[Callable[..., Bundle], tuple[str, str, bool, Path | None]]:
        """Pickles as its path; it is opened again, and must be the same, where it is unpickled."""
        return reopen, (os.path.abspath(self.root), self.hash, self._verify, self._trusted)

    def _check_trust(self) -> set[str]:
        return check_trust(self.root, self.content, self._trusted)

    def _check_listing(self) -> None:
        listed, found = set(self.manifest.files), listing(self.root) - DOCUMENTS
        if missing := sorted(listed - found):
            raise CembedError(f"{self.root}: missing {', '.join(missing)}: the bundle is incomplete, copy it again")
        if extra := sorted(found - listed):
            raise CembedError(f"{self.root}: {', '.join(extra)} is not in the manifest: remove it or export again")
        for name in listed:
            status = (self.root / name).lstat()
            if not stat.S_ISREG(status.st_mode):
                raise CembedError(f"{self.root / name} is a link or not a file: a bundle holds plain files only")
            if status.st_size != self.manifest.files[name].size:
                raise CembedError(
                    f"{self.root / name} has {status.st_size} bytes, the manifest says "
                    f"{self.manifest.files[name].size}: the file is damaged, copy the bundle again"
                )

    def path(self, name: str) -> Path:
        """The path of the file `name`, once its sha256 is the manifest's, and of a graph or the tokenizer once it holds
        nothing that no export has."""
        if name not in self.manifest.files:
            raise CembedError(f"{self.root}: the manifest does not list {name!r}")
        if self._verify:
            self.start([name])
            if self._hashes[name].result() != self.manifest.files[name].sha256:
                raise CembedError(f"{self.root / name} does not match its sha256: it is damaged, copy it again")
        self._inspect(name)
        return self.root / name

    def _inspect(self, name: str) -> None:
        """Looks through a file that an engine or the tokenizers library would read."""
        path, graph = self.root / name, self._graphs.get(name)
        if name in self._inspected:
            return
        if graph is not None:
            sizes = {data: self.manifest.files[data].size for data in graph.data}
            check_external_data(path, sizes)
            check_graph(path, graph, sizes)
        if name == self.manifest.tokenizer:
            check_tokenizer(read_plain(path, MAX_TOKENIZER), str(path))
        self._inspected.add(name)

    @property
    def _graphs(self) -> dict[str, Graph]:
        """By the names of their files."""
        return {graph.file: graph for graph in self.manifest.graphs.values()}

    def start(self, names: Iterable[str]) -> None:
        """Hashes files meanwhile, for `path` to compare, and those of them once that were asked for several times."""
        with self._lock:
            new = [name for name in names if self._verify and name not in self._hashes]
            if not new:
                return
            pool = ThreadPoolExecutor(min(len(new), _HASHING), "hash")
            self._hashes |= {name: pool.submit(sha256, self.root / name) for name in new}
            pool.shutdown(wait=False)

    def graph_path(self, name: str) -> Path:
        """The path of a graph's ONNX file; its data files are verified too, and are all that its tensors are in."""
        path, verify_data = self.open_graph(name)
        verify_data()
        return path

    def open_graph(self, name: str) -> tuple[Path, Callable[[], None]]:
        """The path of a graph's ONNX file, which is verified, and what verifies its data files: to be called before
        anything is computed. They are being hashed when this returns."""
        graph = self.manifest.graphs.get(name)
        if graph is None:
            raise CembedError(f"{self.root} has no graph '{name}': it has {', '.join(self.manifest.graphs)}")
        read = [*self._graphs, self.manifest.tokenizer]
        self.start([*graph.data, *read])
        self._verify_all(read)  # all of them before any engine runs
        return self.root / graph.file, partial(self._verify_all, graph.data)

    def table(self, spec: EmbeddingTable) -> Table:
        """A table [rows, hidden_size], memory-mapped and read-only. Its files are being hashed when this returns."""
        names = [spec.file, *([spec.scales] if spec.scales else [])]
        self.start(names)
        values = self._map(spec.file, spec.dtype, (spec.rows, self.manifest.hidden_size))
        scales = self._map(spec.scales, "float32", (spec.rows, 1)) if spec.scales else None
        return Table(values, scales, partial(self._verify_all, names))

    def _verify_all(self, names: Iterable[str]) -> None:
        for name in names:
            self.path(name)

    def _map(self, name: str, dtype: str, shape: tuple[int, int]) -> NDArray[Any]:
        expected = np.dtype(dtype).itemsize * shape[0] * shape[1]
        if self.manifest.files[name].size != expected:
            raise CembedError(f"{self.root / name}: {shape} of {dtype} takes {expected} bytes")
        return np.memmap(self.root / name, dtype=dtype, mode="r", shape=shape)


class OwnBundle(Bundle):
    """A bundle that is made or signed here, so that nobody else can vouch for it yet: no policy is asked."""

    def _check_trust(self) -> set[str]:
        return set()


def listing(root: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(root)}
    except OSError as error:
        raise CembedError(f"cannot list {root}: {error.strerror}") from error


def reopen(root: str, expected: str, verify: bool, trusted: Path | None) -> Bundle:
    """The bundle at `root`, if its hash is `expected`; else CembedError."""
    bundle = Bundle(root, verify=verify, trusted=trusted)
    if bundle.hash != expected:
        raise CembedError(f"{root} is not the bundle that was pickled: its hash is {bundle.hash[:16]}…, load it anew")
    return bundle


def record_files(root: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file of a bundle that is being made."""
    names = sorted(listing(root) - DOCUMENTS)
    return {name: FileRecord((root / name).stat().st_size, sha256(root / name)) for name in names}

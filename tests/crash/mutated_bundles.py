"""Mutated bundles by the thousand: each is refused before an engine runs, or means the same, or is another bundle that
is as good as any.

    python tests/crash/mutated_bundles.py BUNDLE 100000 --seed 1

BUNDLE is a small one, which is copied into memory. The last kind is what somebody makes who changes a file and all
hashes with it, within what bundles may be: only a signature tells, and the second half of the run has one, which has to
refuse all but what is unchanged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from cembed.runtime import Bundle, CembedError
from cembed.runtime.bundle.manifest import DIGEST, MANIFEST, SIGNATURES, Manifest
from cembed.runtime.bundle.manifest_file import digest_line
from cembed.runtime.bundle.prompts import load_tokenizer
from cembed.runtime.engines.quiet import ort

Files = dict[str, bytes]
Json = dict[str, Any]
VALUES = (None, True, False, -1, 0, 1, 2, 7, 0.5, 1.5, 10**6, 2**31, 2**40, 2**63, 10**30, -(2**62), "", "x", "3",
          "float32", "float16", "../x", "text.data", "zero", [], {}, [1], [0, 1], "a" * 300)  # fmt: skip
SECONDS = 5.0


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Bits or bytes changed, bytes taken out or put in, the end cut off."""
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(made) or 1)
        how = rng.randrange(5)
        if how == 0 and made:
            made[at] ^= 1 << rng.randrange(8)
        elif how == 1 and made:
            made[at] = rng.randrange(256)
        elif how == 2:
            del made[at : at + rng.choice((1, 4, 64))]
        elif how == 3:
            made[at:at] = rng.randbytes(rng.choice((1, 4, 16)))
        else:
            del made[rng.randrange(len(made) + 1) :]
    return bytes(made)


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*way, key)
        yield from places(item, (*way, key))


class Maker:
    """Makes the files that change."""

    def __init__(self, good: Files, rng: random.Random) -> None:
        self._good, self._rng = good, rng
        self._manifest: Json = json.loads(good[MANIFEST])
        self._places = list(places(self._manifest))
        self._text = [name for name in good if name.endswith(".onnx") or name == self._manifest["tokenizer"]]

    def bytes_of_a_file(self) -> Files:
        name = self._rng.choice(sorted(self._good))
        return {name: flipped(self._good[name], self._rng)}

    def swapped_files(self) -> Files:
        one, other = self._rng.sample(sorted(self._good), 2)
        return {one: self._good[other], other: self._good[one]}

    def field_without_digest(self) -> Files:
        return {MANIFEST: self._edited()}

    def field_with_digest(self) -> Files:
        return self._with_digest(self._edited())

    def graph_or_tokenizer_with_hashes(self) -> Files:
        name = self._rng.choice(self._text)
        content = flipped(self._good[name], self._rng)
        record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = {**self._manifest, "files": {**self._manifest["files"], name: record}}
        return {name: content} | self._with_digest(json.dumps(manifest).encode())

    def manifest_bytes_with_digest(self) -> Files:
        return self._with_digest(flipped(self._good[MANIFEST], self._rng))

    def laid_out_anew(self) -> Files:
        items = list(self._manifest.items())
        self._rng.shuffle(items)
        return self._with_digest(json.dumps(dict(items), indent=self._rng.choice((None, 1, 3))).encode())

    def kinds(self) -> list[Callable[[], Files]]:
        return [self.bytes_of_a_file, self.swapped_files, self.field_without_digest, self.field_with_digest,
                self.field_with_digest, self.graph_or_tokenizer_with_hashes, self.graph_or_tokenizer_with_hashes,
                self.manifest_bytes_with_digest, self.laid_out_anew]  # fmt: skip

    def _edited(self) -> bytes:
        """The manifest with a field of another value, without one, or with one more."""
        changed = json.loads(self._good[MANIFEST])
        place = self._rng.choice(self._places)
        owner = changed
        for key in place[:-1]:
            owner = owner[key]
        how = self._rng.randrange(8)
        if how == 0:
            del owner[place[-1]]
        elif how == 1 and isinstance(owner, dict):
            owner["stranger"] = 1
        elif how == 2 and isinstance(owner[place[-1]], (int, float)):
            owner[place[-1]] += self._rng.choice((-1, 1, 0.001))
        else:
            owner[place[-1]] = self._rng.choice(VALUES)
        return json.dumps(changed).encode()

    @staticmethod
    def _with_digest(manifest: bytes) -> Files:
        return {MANIFEST: manifest, DIGEST: digest_line(manifest)}


class Run:
    """Opens mutated bundles; of what did not change it knows the hashes."""

    def __init__(self, root: Path, trusted: Path | None) -> None:
        self._root, self._trusted = root, trusted
        self._good = {path.name: path.read_bytes() for path in root.iterdir()}
        self._hashes = {name: hashlib.sha256(content).hexdigest() for name, content in self._good.items()}
        self._manifest = Manifest.from_json(self._good[MANIFEST].decode())
        self.good = {name: content for name, content in self._good.items() if name != SIGNATURES}

    def outcome(self, changed: Files) -> str:
        for name, content in changed.items():
            (self._root / name).write_bytes(content)
        try:
            return self._open(changed)
        finally:
            for name in changed:
                (self._root / name).write_bytes(self._good[name])

    def _open(self, changed: Files) -> str:
        began = time.perf_counter()
        try:
            bundle = Bundle(self._root, trusted=self._trusted)
            for name in self._good.keys() - changed.keys():
                bundle._hashes[name] = Future()
                bundle._hashes[name].set_result(self._hashes[name])
            if bundle.manifest.graphs == self._manifest.graphs:  # nothing else tells what is looked at in a file
                bundle._inspected = self._good.keys() - changed.keys()
            for name in bundle.manifest.files:
                bundle.path(name)
            load_tokenizer(bundle.path(bundle.manifest.tokenizer))
        except CembedError as error:
            return "SEVERAL LINES" if "\n" in str(error) else f"refused: {self._reason(str(error))}"
        finally:
            assert time.perf_counter() - began < SECONDS, changed.keys()
        same = all(self._good[name] == content for name, content in changed.items() if name not in (MANIFEST, DIGEST))
        return "the same" if bundle.manifest == self._manifest and same else "another bundle"

    @staticmethod
    def _reason(message: str) -> str:
        known = {"signed": "signature", "signature": "signature", "sha256: one of": "digest",
                 "its sha256": "sha256", "ONNX file": "graph", "graph of a bundle": "graph",
                 "the manifest says": "size", "tokenizer.json": "tokenizer"}  # fmt: skip
        return next((name for part, name in known.items() if part in message), "manifest")


def never(*_: object, **__: object) -> None:
    raise AssertionError("an engine was asked")


def signed(root: Path, folder: Path) -> Path:
    """Signs a bundle; the public key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from cembed.runtime.bundle import signing

    key, public = Ed25519PrivateKey.generate(), folder / "key.pem"
    private = folder / "private"
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(*pem))
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, spki))
    signing.sign(root, private)
    return public


def run(root: Path, number: int, rng: random.Random, trusted: Path | None) -> Counter[str]:
    opened = Run(root, trusted)
    assert opened.outcome({}) == "the same"
    kinds, found = Maker(opened.good, rng).kinds(), Counter[str]()
    for i in range(number):
        kind = kinds[i % len(kinds)]
        changed = kind()
        outcome = opened.outcome(changed)
        if (
            trusted
            and not outcome.startswith("refused")
            and changed.get(MANIFEST, b"") not in (b"", opened.good[MANIFEST])
        ):
            raise AssertionError(f"{kind.__name__}: {outcome}, though the signature is another's")
        found[f"{kind.__name__}: {outcome}"] += 1
        if i % 5000 == 4999:
            print(f"{i + 1} of {number}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("number", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--unsigned", action="store_true", help="without the half that is signed")
    given = parser.parse_args()
    ort.InferenceSession = never
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        root = Path(shutil.copytree(given.bundle, Path(folder) / "bundle"))
        halves = [("unsigned", None)]
        if not given.unsigned:
            halves.append(("signed", signed(Path(shutil.copytree(root, Path(folder) / "other")), Path(folder))))
        for what, trusted in halves:
            found = run(root.with_name("other") if trusted else root, given.number // len(halves), rng, trusted)
            print(f"{what}:", *(f"  {name}: {count}" for name, count in sorted(found.items())), sep="\n", flush=True)


if __name__ == "__main__":
    main()

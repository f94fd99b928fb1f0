"""Keys for tests, bundles that are signed with them, and bundles that only look like it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from manifests import put

from cembed.runtime.bundle.manifest import MANIFEST, SIGNATURES
from cembed.runtime.bundle.signing import sign
from cembed.runtime.bundle.trust import key_id


class Signer:
    """A key pair: `private` is its file, `id` what it is known by."""

    def __init__(self, folder: Path, name: str) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.raw = self.key.public_key().public_bytes_raw()
        self.id = key_id(self.raw)
        self.pem = self.key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
        self.private = folder / f"{name}.key"
        plain = pem.PrivateFormat.PKCS8, pem.NoEncryption()
        self.private.write_bytes(self.key.private_bytes(pem.Encoding.PEM, *plain))

    def trust(self, folder: Path) -> Path:
        """Puts the public key into a folder of trusted ones; returns its file."""
        folder.mkdir(exist_ok=True)
        (folder / f"{self.id}.pem").write_bytes(self.pem)
        return folder / f"{self.id}.pem"

    def sign(self, root: Path) -> Path:
        sign(root, self.private)
        return root / SIGNATURES


def forgeries(root: Path, seed: int, count: int) -> Iterator[str]:
    """Changes a bundle with one signature, `count` times from what it was: its manifest, whose digest is made right, or
    the signature. Each must be refused where its key is trusted; says what was changed."""
    chance = random.Random(seed)
    manifest, signatures = (root / MANIFEST).read_bytes(), (root / SIGNATURES).read_bytes()
    for number in range(count):
        name = chance.choice((MANIFEST, SIGNATURES))
        before = manifest if name == MANIFEST else signatures
        after = before
        while after == before:
            after = changed(before, chance)
        put(root, after if name == MANIFEST else manifest)
        (root / SIGNATURES).write_bytes(after if name == SIGNATURES else signatures)
        yield f"{name}, number {number} of seed {seed}"
    put(root, manifest)
    (root / SIGNATURES).write_bytes(signatures)


def changed(content: bytes, chance: random.Random) -> bytes:
    """One bit, one byte, a piece that is gone, that is there twice, or that stands elsewhere."""
    first, second = sorted((chance.randrange(len(content)), chance.randrange(len(content))))
    byte = bytes([chance.randrange(256)])
    return chance.choice(
        (
            content[:first] + bytes([content[first] ^ 1 << chance.randrange(8)]) + content[first + 1 :],
            content[:first] + byte + content[first + 1 :],
            content[:first] + byte + content[first:],
            content[:first] + content[second:],
            content[:second] + content[first:],
            content[first:] + content[:first],
        )
    )


def copy_of(bundle: Path, to: Path) -> Path:
    return Path(shutil.copytree(bundle, to))

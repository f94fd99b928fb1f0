"""How a bundle is signed. Who only runs bundles needs `trust`, not this."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cembed.runtime.bundle.bundle import OwnBundle
from cembed.runtime.bundle.manifest import OLDEST_SCHEMA, SIGNATURES
from cembed.runtime.bundle.manifest_file import replace_document
from cembed.runtime.bundle.trust import MAX_KEY, MOST, format_signatures, key_id, message_of, read_signatures
from cembed.runtime.disk import Disk
from cembed.runtime.errors import CembedError, missing_extra
from cembed.runtime.plain_files import read_plain

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def sign(root: Path, key: Path, *, alone: bool = False) -> list[str]:
    """Adds a signature to a bundle, or replaces all of them if it shall be there `alone`; returns the ids of all keys.

    Raises CembedError: no bundle, a damaged one, one of schema 1, whose manifest will be another; no private key of
    Ed25519; too many signatures; nothing can be written there.
    """
    signer = read_private_key(key)
    bundle = OwnBundle(root)
    if bundle.manifest.schema_version == OLDEST_SCHEMA:
        raise CembedError(f"{root} has schema {OLDEST_SCHEMA}: run `cembed verify --upgrade` on it, then sign it")
    bundle.start(bundle.manifest.files)
    for name in bundle.manifest.files:
        bundle.path(name)
    name = key_id(signer.public_key().public_bytes_raw())
    before = {} if alone else read_signatures(bundle.root)
    signatures = before | {name: signer.sign(message_of(bundle.content))}
    if len(signatures) > MOST:
        raise CembedError(f"{root} has {MOST} signatures, and can have no more: replace them with --force")
    try:
        replace_document(Disk(), bundle.root, SIGNATURES, format_signatures(signatures))
    except OSError as error:
        raise CembedError(f"cannot sign {root}: {error.strerror or error}") from error
    return sorted(signatures)


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Raises CembedError: it cannot be read, is none, or has a passphrase."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise missing_extra("signing", "cryptography", "trust", error) from error
    try:
        key = load_pem_private_key(read_plain(path, MAX_KEY), None)
    except TypeError as error:
        raise CembedError(f"{path} has a passphrase: see docs/security.md for how openssl signs with it") from error
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise CembedError(f"{path} is no private key of Ed25519 in PEM: `openssl genpkey -algorithm ed25519` makes one")
    return key

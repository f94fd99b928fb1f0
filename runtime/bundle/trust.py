"""Who signed a bundle, and whether that will do here. It comes first: nothing else of the bundle has been looked at.

What is signed are two lines: `cembed bundle 1`, and that of `manifest.sha256`; the rest of the bundle follows from its
manifest. `manifest.sig` has a line for each signature. A key is known by the first digits of the sha256 of its bytes.

Every demand is met, or the bundle is refused: the device's, in /etc/cembed/trust.toml; one more of the same kind, in
the file that $CEMBED_TRUST names; and the caller's. None takes anything from another, so neither an environment nor an
option makes a device less strict. `runtime/native/lib/trust.cpp` does the same, with the same words.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cembed.runtime.bundle.manifest import MANIFEST, SIGNATURES
from cembed.runtime.errors import CembedError, missing_extra
from cembed.runtime.plain_files import read_plain

POLICY = Path("/etc/cembed/trust.toml")
VARIABLE = "CEMBED_TRUST"
KEY_ENDING = ".pem"
MAX_POLICY = 1 << 16  # bytes
MAX_KEY = 1 << 12
MAX_KEYS = 64
MOST = 16
"""Signatures of a bundle."""
MAX_SIGNATURES = MOST * len("ed25519 " + 16 * "0" + " " + 128 * "0" + "\n")

_SIGNATURE = rb"ed25519 ([0-9a-f]{16}) ([0-9a-f]{128})\n"
_HEAD, _TAIL = b"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA", b"\n-----END PUBLIC KEY-----\n"
_BLANKS, _CONTROLS, _KEY_ID = b" \t", re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]"), rb'"([0-9a-f]{16})"'
_VALUES = {
    b"require": re.compile(rb"true|false"),
    b"keys": re.compile(rb'"/[^"\\]*"'),
    b"revoked": re.compile(rb"\[[ \t]*(%b[ \t]*(,[ \t]*%b[ \t]*)*)?\]" % (_KEY_ID, _KEY_ID)),
}
_EXPECTED = 'it has require = true, keys = "/PATH" and revoked = ["KEYID"], each once'
SMALL_ORDER = (
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
)
"""Every way to write the height of a point of small order: anybody signs for such a key."""


@dataclass(frozen=True)
class Demand:
    """What somebody, or the policy at `origin`, wants of a bundle: raw public `keys` by their ids."""

    origin: Path
    keys: Mapping[str, bytes]
    revoked: frozenset[str] = frozenset()
    require: bool = True

    def check(self, root: Path, message: bytes, signatures: Mapping[str, bytes], revoked: frozenset[str]) -> set[str]:
        """The ids of the keys that it trusts and that signed, but for those that anybody has `revoked`. Raises
        CembedError: there is none though it needs one, or the signature of one is false."""
        good = {name for name in signatures if name in self.keys and name not in revoked}
        if not good and signatures:
            names = ", ".join(name + " (revoked)" * (name in revoked) for name in sorted(signatures))
            raise CembedError(f"{root} is signed by {names}: {self.origin} trusts none of them")
        if not good and self.require:
            raise CembedError(f"{root} is not signed, and {self.origin} wants a signature: get the signed bundle")
        for name in sorted(good):
            if not _verify(self.keys[name], signatures[name], message):
                raise CembedError(
                    f"{root}: the signature of {name} is not for this {MANIFEST}: it was changed, get the bundle again"
                )
        return good


def check_trust(root: Path, manifest: bytes, trusted: str | Path | None = None) -> set[str]:
    """`check_signatures` with the `manifest.sig` of a bundle; what nobody asks for is not read."""
    found = demands(trusted)
    return _check(root, manifest, read_signatures(root) if found else {}, found)


def check_signatures(
    root: Path, manifest: bytes, signatures: bytes | None, trusted: str | Path | None = None
) -> set[str]:
    """The ids of the keys that are trusted, and that signed these bytes of a manifest; none where nobody wants any.

    `trusted` is a public key in PEM, or a folder of them; one of them must have signed. Raises CembedError: a demand is
    not met, or what it stands in cannot be read.
    """
    found = demands(trusted)
    return _check(root, manifest, parse_signatures(root, signatures) if found and signatures is not None else {}, found)


def _check(root: Path, manifest: bytes, signatures: Mapping[str, bytes], found: list[Demand]) -> set[str]:
    message, revoked = message_of(manifest), frozenset[str]().union(*(demand.revoked for demand in found))
    return {name for demand in found for name in demand.check(root, message, signatures, revoked)}


def message_of(manifest: bytes) -> bytes:
    """What is signed.

    >>> message_of(b"{}").decode().splitlines()[0]
    'cembed bundle 1'
    """
    return f"cembed bundle 1\n{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def key_id(key: bytes) -> str:
    """What a raw public key is known by.

    >>> key_id(bytes(32))
    '66687aadf862bd77'
    """
    return hashlib.sha256(key).hexdigest()[:16]


def read_signatures(root: Path) -> dict[str, bytes]:
    """Signatures by the ids of their keys, none of them checked. Raises CembedError: the file is none of signatures."""
    if not os.path.lexists(root / SIGNATURES):
        return {}
    return parse_signatures(root, read_plain(root / SIGNATURES, MAX_SIGNATURES))


def parse_signatures(root: Path, content: bytes) -> dict[str, bytes]:
    """Raises CembedError: a line is none, a key has two, there are too many."""
    pairs = re.findall(_SIGNATURE, content)
    found = {name.decode(): bytes.fromhex(digits.decode()) for name, digits in pairs}
    whole = re.fullmatch(b"(%b){1,%d}" % (_SIGNATURE, MOST), content)
    if not whole or len(found) != len(pairs):
        raise CembedError(f"{root / SIGNATURES} is no list of signatures: it is damaged, get the bundle again")
    return found


def format_signatures(signatures: Mapping[str, bytes]) -> bytes:
    return "".join(f"ed25519 {name} {signatures[name].hex()}\n" for name in sorted(signatures)).encode()


def demands(trusted: str | Path | None) -> list[Demand]:
    """All that has to be met. Raises CembedError: a policy or a key is there that cannot be read."""
    found = [read_policy(POLICY)] if _is_there(POLICY) else []
    if more := os.environ.get(VARIABLE):
        found.append(read_policy(Path(more)))
    if trusted is not None:
        found.append(Demand(Path(trusted), read_keys(Path(trusted))))
    return found


def _is_there(path: Path) -> bool:
    """What may not be looked at counts as there."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def read_policy(path: Path) -> Demand:
    """Raises CembedError: it cannot be read, a line is not as docs/formats.md has it, one is missing."""
    fields: dict[bytes, bytes] = {}
    for number, line in enumerate(read_plain(path, MAX_POLICY).split(b"\n"), 1):
        text = line.strip(_BLANKS)
        name, _, value = (part.strip(_BLANKS) for part in text.partition(b"="))
        is_field = bool(text) and not text.startswith(b"#")
        known = name in _VALUES and name not in fields and _VALUES[name].fullmatch(value)
        if _CONTROLS.search(line) or (is_field and not known):
            raise CembedError(f"{path} is no policy, see line {number}: {_EXPECTED}")
        if is_field:
            fields[name] = value
    if not {b"require", b"keys"} <= fields.keys():
        raise CembedError(f"{path} is no policy, a line is missing: {_EXPECTED}")
    keys = Path(os.fsdecode(fields[b"keys"][1:-1]))
    revoked = frozenset(found.decode() for found in re.findall(_KEY_ID, fields.get(b"revoked", b"")))
    return Demand(path, read_keys(keys), revoked, fields[b"require"] == b"true")


def read_keys(place: Path) -> dict[str, bytes]:
    """Raw public keys by their ids: of one file, or of all in a folder whose names end in .pem. Raises CembedError:
    there is none, or one cannot be read."""
    files = [place] if not _is_folder(place) else [place / name for name in _names(place)]
    if not 1 <= len(files) <= MAX_KEYS:
        raise CembedError(
            f"{place} has {len(files)} files that end in {KEY_ENDING}: it needs 1 to {MAX_KEYS}, one a key"
        )
    keys = [parse_key(path, read_plain(path, MAX_KEY)) for path in files]
    return {key_id(key): key for key in keys}


def _is_folder(place: Path) -> bool:
    try:
        return stat.S_ISDIR(place.lstat().st_mode)
    except OSError:
        return False  # reading it says why


def _names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith(KEY_ENDING))
    except OSError as error:
        raise CembedError(f"cannot list {folder}: {error.strerror}") from error


def parse_key(path: Path, content: bytes) -> bytes:
    """The 32 bytes of a key, from what `openssl pkey -pubout` writes of it, byte for byte. Raises CembedError: it is
    none, or one that anybody signs for."""
    try:
        key = base64.b64decode(content[len(_HEAD) : -len(_TAIL)], validate=True)
    except binascii.Error:
        key = b""
    if len(key) != 32 or _HEAD + base64.b64encode(key) + _TAIL != content:
        raise CembedError(f"{path} is no public key of Ed25519, as `openssl pkey -pubout` writes it: give that")
    if (key[:31] + bytes([key[31] & 127])).hex() in SMALL_ORDER:
        raise CembedError(f"{path} is a key that anybody can sign for: make another")
    return key


def _verify(key: bytes, signature: bytes, message: bytes) -> bool:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        raise missing_extra("checking a signature", "cryptography", "trust", error) from error
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except InvalidSignature:
        return False
    return True

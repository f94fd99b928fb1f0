"""Signatures and trust: what is taken, what is refused, by Python and by the C library alike."""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from libcembed import Library
from manifests import make_old, put, read, told
from signers import Signer, copy_of, forgeries
from test_cli import cembed

from cembed.runtime import Bundle, CembedError, Embedder, deploy, rollback
from cembed.runtime.bundle import bundle as opening
from cembed.runtime.bundle import trust
from cembed.runtime.bundle.manifest import DIGEST, MANIFEST, SIGNATURES
from cembed.runtime.bundle.manifest_file import upgrade, write_manifest
from cembed.runtime.bundle.signing import sign
from cembed.runtime.updates import deploy as deploying
from cembed.runtime.updates.deploy import Trial
from cembed.runtime.updates.diff import diff
from cembed.runtime.updates.patch import apply

ORDER = 2**252 + 27742317777372353535851937790883648493
NOBODY = "0123456789abcdef"


@dataclass
class Desk:
    """A bundle to change, a folder of trusted keys, and keys: `old` and `new` are trusted, `stranger` is not."""

    root: Path
    keys: Path
    old: Signer
    new: Signer
    stranger: Signer

    @property
    def file(self) -> Path:
        return self.root / SIGNATURES

    def line(self, signer: Signer, signature: bytes) -> bytes:
        return f"ed25519 {signer.id} {signature.hex()}\n".encode()

    def policy(self, text: str) -> Path:
        path = self.keys.parent / "trust.toml"
        path.write_text(text.replace("KEYS", str(self.keys)))
        return path


@pytest.fixture
def desk(causal_bundle: Path, tmp_path: Path) -> Desk:
    old, new, stranger = (Signer(tmp_path, name) for name in ("old", "new", "stranger"))
    for signer in (old, new):
        signer.trust(tmp_path / "keys")
    return Desk(copy_of(causal_bundle, tmp_path / "bundle"), tmp_path / "keys", old, new, stranger)


def both(library: Library, root: Path, trusted: Path | None) -> str | None:
    """What both say, which is the same; of files that cannot be read at least that they cannot."""
    ours, theirs = (
        told(lambda: Bundle(root, trusted=trusted)),
        told(lambda: library.open(root, trusted).close()),
    )
    as_one = [None if said is None else said.replace("cannot open", "cannot read") for said in (ours, theirs)]
    if as_one[0] and as_one[1] and "than any such file" in as_one[0]:
        as_one[0] = as_one[0].rpartition(": ")[0]
    assert as_one[0] == as_one[1]
    return ours


def plain(desk: Desk) -> None:
    desk.old.sign(desk.root)


def unsigned(desk: Desk) -> str:
    return f"{desk.root} is not signed, and {desk.keys} wants a signature"


def by_a_stranger(desk: Desk) -> str:
    desk.stranger.sign(desk.root)
    return f"is signed by {desk.stranger.id}: {desk.keys} trusts none of them"


def by_two(desk: Desk) -> None:
    desk.old.sign(desk.root)
    desk.new.sign(desk.root)


def by_one_and_a_stranger(desk: Desk) -> None:
    desk.stranger.sign(desk.root)
    desk.new.sign(desk.root)


def beside_a_false_one(desk: Desk) -> str:
    desk.new.sign(desk.root)
    desk.file.write_bytes(desk.file.read_bytes() + desk.line(desk.old, desk.old.key.sign(b"something else")))
    return f"the signature of {desk.old.id} is not for this"


def under_another_name(desk: Desk) -> str:
    message = trust.message_of((desk.root / MANIFEST).read_bytes())
    desk.file.write_bytes(desk.line(desk.old, desk.stranger.key.sign(message)))
    return f"the signature of {desk.old.id} is not for this"


def without_its_domain(desk: Desk) -> str:
    desk.file.write_bytes(desk.line(desk.old, desk.old.key.sign((desk.root / DIGEST).read_bytes())))
    return f"the signature of {desk.old.id} is not for this"


def of_another_bundle(desk: Desk) -> str:
    plain(desk)
    put(desk.root, (desk.root / MANIFEST).read_bytes() + b"\n")
    return f"the signature of {desk.old.id} is not for this"


def a_flipped_bit(name: str) -> Callable[[Desk], str]:
    def change(desk: Desk) -> str:
        plain(desk)
        content = bytearray((desk.root / name).read_bytes())
        content[len(content) // 2] ^= 1
        (desk.root / name).write_bytes(content)
        return "does not match" if name == DIGEST else "is not for this|no list of signatures"

    return change


def no_digest(desk: Desk) -> str:
    plain(desk)
    (desk.root / DIGEST).unlink()
    return "missing manifest.sha256"


def file_of(change: Callable[[bytes], bytes]) -> Callable[[Desk], str]:
    def garble(desk: Desk) -> str:
        plain(desk)
        desk.file.write_bytes(change(desk.file.read_bytes()))
        return "is no list of signatures|than any such file"

    return garble


def signature_of(change: Callable[[bytes], bytes]) -> Callable[[Desk], str]:
    def garble(desk: Desk) -> str:
        message = trust.message_of((desk.root / MANIFEST).read_bytes())
        desk.file.write_bytes(desk.line(desk.old, change(desk.old.key.sign(message))))
        return "is not for this"

    return garble


def larger_scalar(signature: bytes) -> bytes:
    """The same point of the curve, by a number that is not the least."""
    return signature[:32] + (int.from_bytes(signature[32:], "little") + ORDER).to_bytes(32, "little")


def sixteen(desk: Desk) -> None:
    plain(desk)
    desk.file.write_bytes(desk.file.read_bytes() + b"".join(others(15)))


def seventeen(desk: Desk) -> str:
    plain(desk)
    desk.file.write_bytes(desk.file.read_bytes() + b"".join(others(16)))
    return "than any such file"


def others(count: int) -> list[bytes]:
    return [f"ed25519 {number:016x} {bytes(64).hex()}\n".encode() for number in range(count)]


def instead(make: Callable[[Path], object], told: str) -> Callable[[Desk], str]:
    """Something else in the place of the signatures."""

    def change(desk: Desk) -> str:
        shutil.move(desk.old.sign(desk.root), desk.keys.parent / "moved.sig")
        make(desk.file)
        return told

    return change


def key_file(content: Callable[[Desk], bytes], told: str = "is no public key of Ed25519") -> Callable[[Desk], str]:
    """One more key in the folder, which is none: that it is there is a mistake, and never passed over."""

    def change(desk: Desk) -> str:
        plain(desk)
        (desk.keys / "more.pem").write_bytes(content(desk))
        return told

    return change


def key_place(make: Callable[[Path], object], told: str) -> Callable[[Desk], str]:
    def change(desk: Desk) -> str:
        plain(desk)
        make(desk.keys / "more.pem")
        return told

    return change


def pem_of(raw: bytes) -> bytes:
    inner = base64.b64encode(bytes.fromhex("302a300506032b6570032100") + raw)
    return b"-----BEGIN PUBLIC KEY-----\n" + inner + b"\n-----END PUBLIC KEY-----\n"


def last_bits(content: bytes) -> bytes:
    """The last digit before the = has two bits that say nothing: only one way to write it is taken."""
    at = content.index(b"=") - 1
    digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return content[:at] + digits[digits.index(content[at]) ^ 1 :][:1] + content[at + 1 :]


def no_keys(desk: Desk) -> str:
    plain(desk)
    for path in desk.keys.iterdir():
        path.rename(path.with_suffix(".txt"))
    return "has 0 files that end in .pem"


def many_keys(desk: Desk) -> str:
    plain(desk)
    for number in range(63):
        (desk.keys / f"{number}.pem").write_bytes(desk.new.pem)
    return "has 65 files that end in .pem"


def keys_are(make: Callable[[Path], object], told: str) -> Callable[[Desk], str]:
    def change(desk: Desk) -> str:
        plain(desk)
        shutil.rmtree(desk.keys)
        make(desk.keys)
        return told

    return change


def other_files(desk: Desk) -> None:
    plain(desk)
    for name in ("README", "old.pem~", ".hidden", "key.PEM"):
        (desk.keys / name).write_text("no key")


CASES: dict[str, Callable[[Desk], str | None]] = {
    "signed": plain,
    "signed by two": by_two,
    "signed by one and a stranger": by_one_and_a_stranger,
    "sixteen signatures": sixteen,
    "other files among the keys": other_files,
    "unsigned": unsigned,
    "a stranger's": by_a_stranger,
    "false beside a good one": beside_a_false_one,
    "under another's name": under_another_name,
    "of the digest alone": without_its_domain,
    "of another bundle": of_another_bundle,
    **{f"a bit of {name}": a_flipped_bit(name) for name in (MANIFEST, DIGEST, SIGNATURES)},
    "no digest": no_digest,
    "empty": file_of(lambda _: b""),
    "truncated": file_of(lambda file: file[:-1]),
    "half": file_of(lambda file: file[: len(file) // 2]),
    "one line too many": file_of(lambda file: file + b"\n"),
    "a key twice": file_of(lambda file: file * 2),
    "CRLF": file_of(lambda file: file[:-1] + b"\r\n"),
    "CR": file_of(lambda file: file[:-1] + b"\r"),
    "capitals": file_of(lambda file: file.upper()),
    "capital digits": file_of(lambda file: file[:8] + file[8:].upper()),
    "another algorithm": file_of(lambda file: file.replace(b"ed25519", b"ed448  ")),
    "tabs": file_of(lambda file: file.replace(b" ", b"\t")),
    "zeros": file_of(lambda file: bytes(len(file))),
    "huge": file_of(lambda file: file * 1000),
    "seventeen signatures": seventeen,
    "a signature of zeros": signature_of(lambda _: bytes(64)),
    "the identity's": signature_of(lambda _: b"\1" + bytes(63)),
    "a larger scalar": signature_of(larger_scalar),
    "the sign of R": signature_of(lambda made: made[:31] + bytes([made[31] ^ 128]) + made[32:]),
    "R beyond the field": signature_of(lambda made: b"\xee" + b"\xff" * 30 + b"\x7f" + made[32:]),
    "a link": instead(lambda path: path.symlink_to(path.parent.parent / "moved.sig"), "it is a link"),
    "a dangling link": instead(lambda path: path.symlink_to("nowhere"), "it is a link"),
    "a pipe": instead(os.mkfifo, "is not a plain file"),
    "a folder": instead(os.mkdir, "is not a plain file"),
    "a private key": key_file(lambda desk: desk.new.private.read_bytes()),
    "CRLF in a key": key_file(lambda desk: desk.new.pem.replace(b"\n", b"\r\n")),
    "a key without its end": key_file(lambda desk: desk.new.pem[:-1]),
    "text before a key": key_file(lambda desk: b"# mine\n" + desk.new.pem),
    "two ways to write a key": key_file(lambda desk: last_bits(desk.new.pem)),
    "a key of X25519": key_file(lambda desk: desk.new.pem.replace(b"MCowBQYDK2Vw", b"MCowBQYDK2Vu")),
    "blanks in a key": key_file(lambda desk: desk.new.pem.replace(desk.new.pem[50:54], b"    ")),
    "a short key": key_file(lambda desk: desk.new.pem.replace(desk.new.pem[50:54], b"====")),
    "a huge key": key_file(lambda desk: desk.new.pem * 100, "than any such file"),
    "two keys in a file": key_file(lambda desk: desk.new.pem * 2),
    "an empty key": key_file(lambda _: b""),
    "a key that is a link": key_place(lambda path: path.symlink_to("nowhere"), "it is a link"),
    "a key that is a pipe": key_place(os.mkfifo, "is not a plain file"),
    "a key that is a folder": key_place(os.mkdir, "is not a plain file"),
    "no keys": no_keys,
    "many keys": many_keys,
    "no folder of keys": keys_are(lambda _: None, "No such file"),
    "a link to keys": keys_are(lambda path: path.symlink_to(path.parent), "it is a link"),
    "a pipe for keys": keys_are(os.mkfifo, "is not a plain file"),
    **{
        f"a key of small order, {number}": key_file(lambda _, raw=raw: pem_of(raw), "anybody can sign for")
        for number, raw in enumerate(
            [*map(bytes.fromhex, trust.SMALL_ORDER), b"\1" + bytes(30) + b"\x80", bytes(31) + b"\x80"],
        )
    },
}


@pytest.mark.parametrize("name", CASES)
def test_both_take_and_refuse_the_same(library: Library, desk: Desk, name: str) -> None:
    expected = CASES[name](desk)
    said = both(library, desk.root, desk.keys)
    if expected is None:
        assert said is None
        assert desk.old.id in Bundle(desk.root, trusted=desk.keys).signers or name.endswith("stranger")
    else:
        with pytest.raises(CembedError, match=expected):
            raise CembedError(said or "nothing")


def test_what_nobody_asks_for_is_not_read(library: Library, desk: Desk) -> None:
    desk.file.write_text("garbage")
    assert both(library, desk.root, None) is None
    assert Bundle(desk.root).signers == set()


def test_one_key_is_a_file(library: Library, desk: Desk) -> None:
    by_two(desk)
    for signer in (desk.old, desk.new):
        assert both(library, desk.root, desk.keys / f"{signer.id}.pem") is None
    assert "trusts none" in (both(library, desk.root, desk.stranger.trust(desk.keys.parent)) or "")


def test_signatures_and_manifests_that_were_changed_are_refused(library: Library, desk: Desk) -> None:
    plain(desk)
    for what in forgeries(desk.root, 0, 400):
        assert both(library, desk.root, desk.keys), what
    assert both(library, desk.root, desk.keys) is None


STRICT = 'require = true\nkeys = "KEYS"\n'
POLICIES: dict[str, str | None] = {
    STRICT: None,
    f"# who may sign\n\n\t require =\ttrue \nkeys=\"KEYS\"\nrevoked = [ \"{NOBODY}\" ,\"{NOBODY[::-1]}\"]": None,
    f"{STRICT}revoked = []": None,
    f"{STRICT}revoked = [ ]\n# Schlüssel": None,
    'require = false\nkeys = "KEYS"': None,
    "": "a line is missing",
    "require = true": "a line is missing",
    'keys = "KEYS"': "a line is missing",
    f"{STRICT}require = false": "see line 3",
    f"{STRICT}keys = \"/\"": "see line 3",
    f"{STRICT}revoked = []\nrevoked = []": "see line 4",
    f"{STRICT}revoke = []": "see line 3",
    f"{STRICT}[more]": "see line 3",
    f"{STRICT}= true": "see line 3",
    f"{STRICT}revoked": "see line 3",
    f"{STRICT}revoked = {NOBODY}": "see line 3",
    f"{STRICT}revoked = [{NOBODY}]": "see line 3",
    f"{STRICT}revoked = [\"{NOBODY}\",]": "see line 3",
    f"{STRICT}revoked = [,]": "see line 3",
    f"{STRICT}revoked = [\"{NOBODY}\" \"{NOBODY}\"]": "see line 3",
    f"{STRICT}revoked = [\"{NOBODY.upper()}\"]": "see line 3",
    f"{STRICT}revoked = [\"{NOBODY}0\"]": "see line 3",
    f"{STRICT}revoked = [\n\"{NOBODY}\"]": "see line 3",
    f"{STRICT}revoked = [] # none": "see line 3",
    f"{STRICT}\ufeff": "see line 3",
    f"\ufeff{STRICT}": "see line 1",
    STRICT.replace("\n", "\r\n"): "see line 1",
    f"{STRICT}# a\0b": "see line 3",
    f"{STRICT}\x7f": "see line 3",
    'require = yes\nkeys = "KEYS"': "see line 1",
    'require = "true"\nkeys = "KEYS"': "see line 1",
    'require = True\nkeys = "KEYS"': "see line 1",
    "require = true\nkeys = 'KEYS'": "see line 2",
    'require = true\nkeys = "keys"': "see line 2",
    'require = true\nkeys = ""': "see line 2",
    'require = true\nkeys = "KEYS" "KEYS"': "see line 2",
    'require = true\nkeys = "/nowhere/\\\\keys"': "see line 2",
    'require = true\nkeys = "/nowhere"': "No such file",
    STRICT + "#" * 70_000: "than any such file",
}  # fmt: skip


@pytest.mark.parametrize("text", POLICIES)
def test_policies_are_read_alike(library: Library, desk: Desk, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    plain(desk)
    monkeypatch.setenv(trust.VARIABLE, str(desk.policy(text)))
    said, expected = both(library, desk.root, None), POLICIES[text]
    assert said is None if expected is None else expected in (said or "")


@pytest.mark.parametrize("make", [None, os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_a_policy_that_cannot_be_read_lets_nothing_pass(
    library: Library, desk: Desk, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object] | None
) -> None:
    plain(desk)
    path = desk.keys.parent / "trust.toml"
    if make:
        make(path)
    monkeypatch.setenv(trust.VARIABLE, str(path))
    assert str(path) in (both(library, desk.root, None) or "")


def test_a_policy_wants_signatures_and_knows_who_is_revoked(
    library: Library, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(trust.VARIABLE, str(desk.policy(STRICT)))
    assert "is not signed" in (both(library, desk.root, None) or "")
    desk.old.sign(desk.root)
    assert both(library, desk.root, None) is None
    desk.policy(f'{STRICT}revoked = ["{desk.old.id}"]')
    said = both(library, desk.root, None) or ""
    assert f"is signed by {desk.old.id} (revoked): " in said
    assert both(library, desk.root, desk.keys) == said
    desk.new.sign(desk.root)
    assert both(library, desk.root, desk.keys) is None


def test_without_require_only_unsigned_bundles_pass(
    library: Library, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(trust.VARIABLE, str(desk.policy('require = false\nkeys = "KEYS"')))
    assert both(library, desk.root, None) is None
    assert "is not signed" in (both(library, desk.root, desk.keys) or "")
    desk.stranger.sign(desk.root)
    assert "trusts none" in (both(library, desk.root, None) or "")


def test_neither_the_environment_nor_a_caller_makes_a_device_less_strict(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict, theirs = desk.policy(STRICT).rename(desk.keys.parent / "device.toml"), desk.keys.parent / "theirs"
    monkeypatch.setattr(trust, "POLICY", strict)
    mine = desk.stranger.trust(theirs)
    desk.stranger.sign(desk.root)
    monkeypatch.setenv(trust.VARIABLE, str(desk.policy(f'require = false\nkeys = "{theirs}"')))
    for trusted in (None, mine, theirs):
        assert f"{strict} trusts none" in (told(lambda: Bundle(desk.root, trusted=trusted)) or "")  # noqa: B023
    desk.new.sign(desk.root)
    assert Bundle(desk.root, trusted=theirs).signers == {desk.new.id, desk.stranger.id}
    monkeypatch.delenv(trust.VARIABLE)
    assert Bundle(desk.root).signers == {desk.new.id}


def test_a_key_that_one_policy_revokes_counts_for_nobody(
    library: Library, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = desk.policy(f'{STRICT}revoked = ["{desk.stranger.id}"]')
    theirs = desk.keys.parent / "theirs"
    desk.stranger.trust(theirs)
    desk.stranger.sign(desk.root)
    desk.new.sign(desk.root)
    assert both(library, desk.root, theirs) is None
    monkeypatch.setenv(trust.VARIABLE, str(policy))
    assert f"{theirs} trusts none of them" in (both(library, desk.root, theirs) or "")


def test_a_policy_that_may_not_be_looked_at_counts(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(desk)
    monkeypatch.setattr(trust, "POLICY", desk.root / MANIFEST / "trust.toml")
    assert "cannot read" in (told(lambda: Bundle(desk.root)) or "")
    monkeypatch.setattr(trust, "POLICY", desk.root.parent / "none" / "trust.toml")
    assert Bundle(desk.root).signers == set()


def test_what_was_verified_is_what_is_read(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(desk)
    before, check = (desk.root / MANIFEST).read_bytes(), trust.check_trust

    def swap(root: Path, content: bytes, trusted: Path | None) -> set[str]:
        found = check(root, content, trusted)
        (desk.root / MANIFEST).write_bytes(b"{}")
        return found

    monkeypatch.setattr(opening, "check_trust", swap)
    assert Bundle(desk.root, trusted=desk.keys).content == before


def test_without_cryptography_a_trusted_bundle_is_refused_by_the_extra(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(desk)
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert Bundle(desk.root).signers == set()
    for action in (lambda: Bundle(desk.root, trusted=desk.keys), lambda: sign(desk.root, desk.old.private)):
        assert "cembed[trust]" in (told(action) or "")


def test_an_embedder_and_its_pickle_know_whom_to_trust(desk: Desk) -> None:
    plain(desk)
    embedder = Embedder.load(desk.root, trusted=desk.keys)
    pickled = pickle.dumps(embedder)
    pickle.loads(pickled).embed_query("warranty")
    desk.file.unlink()
    assert "is not signed" in (told(lambda: pickle.loads(pickled)) or "")
    assert "is not signed" in (told(lambda: Embedder.load(desk.root, trusted=desk.keys)) or "")


def test_who_may_not_sign(desk: Desk) -> None:
    key = desk.keys.parent / "wrong.key"
    for content in (b"", desk.old.pem, b"\0" * 200):
        key.write_bytes(content)
        assert "is no private key of Ed25519" in (told(lambda: sign(desk.root, key)) or "")
    (desk.root / "text.data").write_bytes(b"")
    assert "text.data" in (told(lambda: sign(desk.root, desk.old.private)) or "")
    assert not desk.file.exists()


def test_a_changed_bundle_loses_its_signatures(desk: Desk) -> None:
    plain(desk)
    write_manifest(desk.root, (desk.root / MANIFEST).read_text())
    assert not desk.file.exists()


@pytest.mark.filterwarnings("ignore:.*schema 1")
def test_a_bundle_is_upgraded_before_it_is_signed(desk: Desk) -> None:
    make_old(desk.root)
    assert "--upgrade" in (told(lambda: sign(desk.root, desk.old.private)) or "")
    desk.file.write_bytes(others(1)[0])
    assert SIGNATURES in (told(lambda: upgrade(desk.root)) or "")
    desk.file.unlink()
    upgrade(desk.root)
    plain(desk)
    assert Bundle(desk.root, trusted=desk.keys).manifest.upgraded_from


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_openssl_makes_keys_and_signs_as_the_documents_say(library: Library, desk: Desk) -> None:
    page = (Path(__file__).parents[1] / "docs" / "security.md").read_text()
    lines = [line[4:] for line in page.splitlines() if line.startswith("    ") and re.search("openssl|printf", line)]
    script = "\n".join(lines).replace("BUNDLE", str(desk.root))
    subprocess.run(["sh", "-euc", script], cwd=desk.keys.parent, check=True, capture_output=True)
    assert both(library, desk.root, desk.keys.parent / "release.pem") is None
    key = trust.parse_key(Path("key"), (desk.keys.parent / "release.pem").read_bytes())
    assert Bundle(desk.root, trusted=desk.keys.parent / "release.pem").signers == {trust.key_id(key)}


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small bundles have no weights, and so no self-test."""
    monkeypatch.setattr(deploying, "try_bundle", lambda bundle, trial: 1.0)


@pytest.fixture
def made(causal_bundle: Path, tmp_path: Path) -> dict[str, Path]:
    """Two bundles that differ in their manifests."""
    bundles = {name: copy_of(causal_bundle, tmp_path / name) for name in "ab"}
    write_manifest(bundles["b"], json.dumps(read(bundles["b"]) | {"source": {"model": "another"}}))
    return bundles


@pytest.mark.usefixtures("untried")
def test_deploy_copies_nothing_that_is_not_trusted(desk: Desk, made: dict[str, Path], tmp_path: Path) -> None:
    to, trial = tmp_path / "device", Trial(trusted=desk.keys)
    patch = tmp_path / "unsigned.cembed-patch"
    diff(made["a"], made["b"], patch)
    desk.old.sign(made["a"])
    deploy(made["a"], to, trial=trial)
    before = sorted(to.rglob("*"))
    for source in (made["b"], patch):
        assert "is not signed" in (told(lambda: deploy(source, to, trial=trial)) or "")  # noqa: B023
        assert sorted(to.rglob("*")) == before
    desk.new.sign(made["b"])
    diff(made["a"], made["b"], patch, force=True)
    assert deploy(patch, to, trial=trial).outcome == "deployed"
    assert Bundle(to / "current", trusted=desk.keys).signers == {desk.new.id}
    assert rollback(to, trial=trial).outcome == "deployed"
    assert "trusts none" in (told(lambda: rollback(to, trial=Trial(trusted=desk.keys / f"{desk.old.id}.pem"))) or "")
    apply(made["a"], patch, tmp_path / "made", trusted=desk.keys)
    assert (tmp_path / "made" / SIGNATURES).read_bytes() == (made["b"] / SIGNATURES).read_bytes()
    (made["a"] / SIGNATURES).unlink()
    assert deploy(made["b"], to).outcome == "deployed"


@pytest.mark.usefixtures("untried")
def test_a_bundle_that_was_signed_again_is_deployed_again(desk: Desk, made: dict[str, Path], tmp_path: Path) -> None:
    to = tmp_path / "device"
    deploy(made["a"], to)
    for signers in ([desk.old], [desk.old, desk.new]):
        signers[-1].sign(made["a"])
        done = deploy(made["a"], to, trial=Trial(trusted=desk.keys))
        assert (done.outcome, done.copied) == ("repaired", 0)
        assert Bundle(to / "current", trusted=desk.keys).signers == {signer.id for signer in signers}
    assert deploy(made["a"], to).outcome == "unchanged"
    (made["a"] / SIGNATURES).unlink()
    assert deploy(made["a"], to).outcome == "repaired"
    assert not (to / "current" / SIGNATURES).exists()


def test_the_commands(desk: Desk) -> None:
    root, keys = str(desk.root), str(desk.keys)
    assert "is not signed" in cembed("verify", root, "--trusted", keys).err
    assert f"signed by {desk.old.id}" in cembed("sign", root, "--key", str(desk.old.private)).out
    assert cembed("verify", root, "--trusted", keys).status == 0
    shown = json.loads(cembed("inspect", root, "--json").out)
    assert shown["signed_by"] == {desk.old.id: False}
    assert f"{desk.old.id}, not checked" in cembed("inspect", root).out
    assert json.loads(cembed("inspect", root, "--trusted", keys, "--json").out)["signed_by"] == {desk.old.id: True}
    cembed("sign", root, "--key", str(desk.stranger.private), "--force")
    assert "trusts none" in cembed("tune", root, "--trusted", keys).err

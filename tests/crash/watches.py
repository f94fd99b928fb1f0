"""Crash tests of `cembed watch`: functions that count what they tried. `python tests/crash/watches.py plain 100`.

A writer puts files into a folder, changes, moves and deletes them, while a real process watches it and is killed. What
the ledger had said is in the index stays there, and in the end the index is as one made of the folder at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deploys import SAMPLE, variant
from PIL import Image, ImageDraw
from runs import folder

from cembed.options import PageVectors, Reading, settings_of
from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.errors import CembedError
from cembed.runtime.index.files import CURRENT
from cembed.runtime.index.index import Index
from cembed.runtime.index.new_pages import page_content
from cembed.runtime.index.verify import verify_index
from cembed.runtime.intake.ledger import Ledger, ledger_path
from cembed.runtime.intake.swap import next_path

STABLE, EVERY = 0.05, 0.1
SETTINGS = settings_of(PageVectors(), Reading(dpi=144.0))
FOLDERS = ("", "a", "a/b", "Anhänge")
RESTART = 25  # kills, after which there is another index
Pages = dict[str, bytes]
"""Contents by page id."""


@dataclass(frozen=True)
class Version:
    """What a file was: `pages` is 0 for one that cannot be read, None while it was not written to its end."""

    digest: bytes
    pages: int | None

    @classmethod
    def of(cls, data: bytes, pages: int | None) -> Version:
        return cls(hashlib.sha256(data).digest(), pages)

    def content(self, number: int) -> bytes:
        return page_content(self.digest, number, SETTINGS)

    def lacks(self, number: int) -> bool:
        return bool(self.pages) and number > (self.pages or 0)


GONE = Version(b"", None)


def draw(text: str, pages: int) -> bytes:
    images = [Image.new("RGB", (64, 48), "white") for _ in range(pages)]
    for number, image in enumerate(images):
        ImageDraw.Draw(image).text((4, 16), f"{text}.{number}", fill="black")
    buffer = io.BytesIO()
    if pages == 1:
        images[0].save(buffer, "PNG")
    else:
        images[0].save(buffer, "PDF", save_all=True, append_images=images[1:])
    return buffer.getvalue()


@dataclass
class Scans:
    """A folder, and what every file in it ever was, the last one being what it is. `moving`: others move them, too."""

    root: Path
    rng: random.Random
    moving: bool = False
    count: int = 0
    versions: dict[str, list[Version]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in FOLDERS:
            (self.root / name).mkdir(parents=True)

    @property
    def there(self) -> dict[str, Version]:
        return {path: versions[-1] for path, versions in self.versions.items() if versions[-1] != GONE}

    @property
    def good(self) -> dict[str, Version]:
        return {path: version for path, version in self.there.items() if version.pages}

    def act(self) -> None:
        """One thing that a person or a scanner does."""
        kinds = (self.new, self.copy, self.broken, self.change, self.move, self.delete)
        weights = (6, 2, 1, 0, 0, 0) if self.moving else (6, 1, 1, 2, 2, 1)
        self.rng.choices(kinds, weights)[0]()

    def new(self) -> None:
        self.count += 1
        pages = self.rng.choice([1, 1, 1, 3])
        suffix = ".png" if pages == 1 else ".pdf"
        names = [str(self.count), "again"] if self.moving else [str(self.count)]
        self._put(self._free(self.rng.choice(names) + suffix), draw(f"{self.count}", pages), pages)

    def broken(self) -> None:
        self.count += 1
        data = self.rng.choice([b"%d" % self.count, self.rng.randbytes(200)])
        self._put(self._free(f"{self.count}{self.rng.choice(['.png', '.pdf'])}"), data, 0)

    def copy(self) -> None:
        if (path := self._some()) and (data := _read(path)) is not None:
            self.count += 1
            self._put(self._free(f"{self.count}{Path(path).suffix}"), data, self.versions[path][-1].pages)

    def change(self) -> None:
        """It becomes another one, with fewer or more pages, or unreadable."""
        if path := self._some():
            self.count += 1
            pages = self.rng.choice([0, 2, 2, 4]) if path.endswith(".pdf") else self.rng.choice([0, 1, 1])
            self._put(path, draw(f"changed {self.count}", pages) if pages else self.rng.randbytes(200), pages)

    def move(self) -> None:
        if path := self._some():
            self.count += 1
            to = self._free(f"{self.count}{Path(path).suffix}")
            self.versions.setdefault(to, []).append(self.versions[path][-1])
            os.rename(path, to)
            self.versions[path].append(GONE)

    def delete(self) -> None:
        if path := self._some():
            os.unlink(path)
            self.versions[path].append(GONE)

    def _some(self) -> str | None:
        return self.rng.choice(sorted(self.good) or [None])

    def _free(self, name: str) -> str:
        return str(self.root / self.rng.choice(FOLDERS) / name)

    def _put(self, path: str, data: bytes, pages: int | None) -> None:
        """At once, as a whole, or in pieces."""
        way = "whole" if self.moving else self.rng.choice(["whole", "in place", "pieces"])
        if way == "whole":
            self._put_whole(path, data, pages)
            return
        versions = self.versions.setdefault(path, [])
        with open(path, "wb") as file:
            if way == "pieces":
                file.write(data[: len(data) // 2])
                file.flush()
                versions.append(Version.of(data[: len(data) // 2], None))
                time.sleep(self.rng.uniform(0, 4 * STABLE))
                file.write(data[len(data) // 2 :])
            else:
                file.write(data)
        versions.append(Version.of(data, pages))

    def _put_whole(self, path: str, data: bytes, pages: int | None) -> None:
        part = Path(path).with_name(".part")
        part.write_bytes(data)
        try:
            if self.moving:
                os.link(part, path)  # fails if the one before was not moved yet
                part.unlink()
            else:
                os.replace(part, path)
        except FileExistsError:
            return
        self.versions.setdefault(path, []).append(Version.of(data, pages))


def _read(path: str) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return Path(path).read_bytes()
    return None


# The watcher ----------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """Where everything is, and what was said of it: `reported` are files by path and the version's number."""

    root: Path
    options: tuple[str, ...] = ()
    bundle: Path = SAMPLE
    reported: dict[str, int] = field(default_factory=dict)
    told: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.index, self.scans, self.socket = self.root / "index", self.root / "in", self.root / "socket"
        self.done, self.failed, self.log = self.root / "done", self.root / "failed", self.root / "log"

    @property
    def mirror(self) -> bool:
        return "--mirror" in self.options

    def command(self, *options: str) -> list[str]:
        given = ["--index", str(self.index), "--bundle", str(self.bundle), "--threads", "1", *self.options, *options]
        pace = ["--stable-for", str(STABLE), "--every", str(EVERY)]
        return [sys.executable, "-m", "cembed", "watch", str(self.scans), *given, *pace]

    @contextlib.contextmanager
    def watching(self, *options: str) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
        """A process, and what it tells systemd."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard, open(self.log, "w") as log:
            self.socket.unlink(missing_ok=True)
            heard.bind(str(self.socket))
            environment = {**os.environ, "NOTIFY_SOCKET": str(self.socket)}
            with subprocess.Popen(
                self.command(*options),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            ) as process:
                yield process, heard
        assert wait_for(lambda: not members(process.pid)), "processes are left"
        self.told.update(line for line in self.log.read_text().splitlines() if line.startswith("not embedded: "))

    def once(self, *options: str, log: str | None = None) -> str:
        """A run to the end: what it printed."""
        with self.watching("--once", *options) as (process, _):
            printed = process.communicate(timeout=120)[0]
        said = self.log.read_text()
        assert process.returncode in (0, 3), (process.returncode, printed, said)
        assert log is None or said == log, said
        return printed

    def pages(self) -> Pages:
        """Of the index, all of whose bytes are checked."""
        return pages_of(self.index)


def pages_of(path: Path) -> Pages:
    assert all(check.passed for check in verify_index(path)), list(verify_index(path))
    index = Index.open(path)
    found = index.find()
    assert len({page.id for page in found}) == len(found) == len(index)
    assert all(page.id == f"{page.source}#{page.page}" for page in found)
    return {page.id: index.content_of(page.id) or b"" for page in found}


def vectors_of(path: Path) -> dict[str, bytes]:
    index = Index.open(path)
    return {page.id: index.vectors(page.id).tobytes() for page in index.find()}


def members(group: int) -> list[str]:
    """Processes of a group that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
            found += [stat.parent.name] if int(of) == group and state != "Z" else []
    return found


def wait_for(condition: object, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False


def is_ready(process: subprocess.Popen[str], heard: socket.socket) -> bool:
    heard.settimeout(0.5)
    while process.poll() is None:
        with contextlib.suppress(TimeoutError):
            if heard.recv(4096).startswith(b"READY"):
                return True
    return False


def cut_short(place: Place, scans: Scans, rng: random.Random, number: int = signal.SIGKILL, *options: str) -> str:
    """Files come while a watcher runs, which is then ended by a signal: while it starts, or some time after."""
    with place.watching(*options) as (process, heard):
        starting = rng.random() < 0.2
        if not starting:
            assert is_ready(process, heard), place.log.read_text()
        end = time.monotonic() + rng.uniform(0, 1.5)
        quiet = rng.uniform(0, 1.0)
        while (left := end - time.monotonic()) > 0:
            if left > quiet:
                scans.act()
            time.sleep(min(left, rng.choice([0.0, 0.02, 0.2])))
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode in ({-number, 128 + number} if starting else {-9 if number == 9 else 128 + number})
    return "while starting" if starting else "later"


# What has to be -------------------------------------------------------------------------------------------------------


def note_reported(place: Place, scans: Scans, rng: random.Random) -> None:
    """Takes in what the ledger says, which may have been left in the middle of a change: from a copy of it, or not."""
    path = place.index
    if not ledger_path(path).exists():
        return
    if rng.random() < 0.5:
        path = place.root / "copy"
        for suffix in ("", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(f"{ledger_path(place.index)}{suffix}", f"{ledger_path(path)}{suffix}")
    try:
        with Ledger.beside(path, write=False) as ledger:
            entries = ledger.entries("indexed")
    except CembedError as error:
        if "no such table" in str(error):  # it was just made
            return
        raise
    for entry in entries:
        versions = scans.versions.get(entry.path, [])
        numbers = [number for number, version in enumerate(versions) if version.digest == entry.digest]
        if numbers:
            place.reported[entry.path] = max(numbers)


def check_reported(place: Place, scans: Scans) -> None:
    """All that was ever reported is in the index, or what the file was later."""
    if not place.reported and not (place.index / CURRENT).exists():
        return
    pages = place.pages()
    paths = Counter(digest for versions in scans.versions.values() for digest in {v.digest for v in versions})
    for path, number in place.reported.items():
        version, *later = scans.versions[path][number:]
        for page in range(1, (version.pages or 1) + 1):
            there = pages.get(f"{path}#{page}")
            if there is None:
                left = GONE in later and (place.mirror or paths[version.digest] > 1)
                assert left or any(v.lacks(page) for v in later), (path, page, version, later)
            else:
                assert there in [v.content(page) for v in (version, *later)], (path, page)


def check_moved(place: Place, scans: Scans) -> None:
    """Every file that was put is in one of the folders, with its bytes; the ledger's are in the index."""
    wanted = {(stem(path), v.digest) for path, versions in scans.versions.items() for v in versions}
    where = Counter[tuple[str, bytes]]()
    for root in (place.scans, place.done, place.failed):
        for path in (p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")):
            relative = stem(str(place.scans / path.relative_to(root)))
            where[relative, hashlib.sha256(path.read_bytes()).digest()] += 1
    assert wanted == set(where), wanted ^ set(where)
    assert set(where.values()) <= {1}, where
    if (place.index / CURRENT).exists() and ledger_path(place.index).exists():
        pages = place.pages()
        with contextlib.suppress(CembedError), Ledger.beside(place.index, write=False) as ledger:
            for entry in ledger.entries("indexed"):
                assert entry.pages, entry
                contents = [Version(entry.digest, entry.pages).content(n) for n in range(1, entry.pages + 1)]
                assert [pages.get(f"{entry.path}#{n}") for n in range(1, entry.pages + 1)] == contents, entry


def stem(path: str) -> str:
    return re.sub(r" \(\d+\)(?=\.\w+$)", "", path)


def expected(scans: Scans) -> Pages:
    """What the index has to have of what is in the folder."""
    good = scans.good.items()
    return {f"{path}#{n}": v.content(n) for path, v in good for n in range(1, (v.pages or 0) + 1)}


def check_end(place: Place, scans: Scans) -> Counter[str]:
    """After a run to the end: as if the folder had been added at once, and nothing is done or said twice."""
    place.once()
    check_reported(place, scans)
    pages, wanted = place.pages(), expected(scans)
    assert wanted.items() <= pages.items(), wanted.items() - pages.items()
    more = {page.rpartition("#")[0] for page in pages.keys() - wanted.keys()}
    assert not more & scans.good.keys(), more
    assert not place.mirror or more <= scans.there.keys(), more
    with Ledger.beside(place.index, write=False) as ledger:
        bad = scans.there.keys() - scans.good.keys()
        assert {entry.path for entry in ledger.entries("failed")} == bad
        assert ledger.counts() == {k: n for k, n in (("failed", len(bad)), ("indexed", len(scans.good))) if n}
    compare(place, place.scans, place.index, pages.keys() - wanted.keys())
    assert place.once(log="").startswith(f"{place.index}: 0 pages added\n")
    return Counter({"said again": said_again(place, scans), "files": len(scans.there)})


def said_again(place: Place, scans: Scans) -> int:
    """Files of which it was said more than once that they cannot be read, as a kill came before that was noted."""
    said = Counter(line.removeprefix("not embedded: ").partition(": ")[0] for line in place.told.elements())
    for path, version in scans.there.items():
        assert version.pages or said[path], (path, said)
    bad = {path: sum(not v.pages and v != GONE for v in versions) for path, versions in scans.versions.items()}
    return sum(max(0, count - bad.get(path, 0)) for path, count in said.items())


def compare(place: Place, of: Path, index: Path, beside: object = ()) -> None:
    """An index has, bit for bit, what a new one of this folder has."""
    fresh = place.root / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    command = [sys.executable, "-m", "cembed", "index", "add", str(fresh), str(of), "--bundle", str(place.bundle)]
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stderr
    ours = {page: vectors for page, vectors in vectors_of(index).items() if page not in beside}  # type: ignore[operator]
    assert ours == vectors_of(fresh)
    for path in (fresh, ledger_path(fresh)):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# Runs -----------------------------------------------------------------------------------------------------------------


def kills(rounds: int, seed: int, *options: str, number: int = signal.SIGKILL) -> Counter[str]:
    rng, counts = random.Random(seed), Counter[str]()
    while rounds > 0:
        with folder() as root:
            place, scans = Place(root, options), Scans(root / "in", rng)
            for _ in range(min(rounds, RESTART)):
                counts[cut_short(place, scans, rng, number)] += 1
                note_reported(place, scans, rng)
                check_reported(place, scans)
            counts += check_end(place, scans) + Counter({"reported": len(place.reported)})
        rounds -= RESTART
    return counts


def plain(rounds: int, seed: int = 0) -> Counter[str]:
    return kills(rounds, seed)


def mirror(rounds: int, seed: int = 1) -> Counter[str]:
    return kills(rounds, seed, "--mirror")


def stops(rounds: int, seed: int = 2) -> Counter[str]:
    """SIGTERM, as of systemd, instead of SIGKILL."""
    return kills(rounds, seed, number=signal.SIGTERM)


def moved(rounds: int, seed: int = 3) -> Counter[str]:
    """Files go to one folder when they are in the index, and to another when they cannot be read."""
    rng, counts = random.Random(seed), Counter[str]()
    while rounds > 0:
        with folder() as root:
            place = Place(root, ("--move-done", str(root / "done"), "--move-failed", str(root / "failed")))
            scans = Scans(root / "in", rng, moving=True)
            for _ in range(min(rounds, RESTART)):
                counts[cut_short(place, scans, rng)] += 1
                check_moved(place, scans)
            place.once()
            check_moved(place, scans)
            assert not [path for path in place.scans.rglob("*") if path.is_file() and path.name != ".part"]
            compare(place, place.done, place.index)
            with Ledger.beside(place.index, write=False) as ledger:
                assert ledger.counts().keys() <= {"indexed", "failed"}, ledger.counts()
                bad = {entry.path for entry in ledger.entries("failed")}
            assert bad == {str(path) for path in place.failed.rglob("*") if path.is_file()}
            assert place.once(log="").startswith(f"{place.index}: 0 pages added\n")
            counts["files"] += len(scans.versions)
        rounds -= RESTART
    return counts


def anew(rounds: int, seed: int = 4) -> Counter[str]:
    """An index is made anew with another bundle, again and again, while some files are gone."""
    rng, counts = random.Random(seed), Counter[str]()
    with folder() as root:
        bundles = [SAMPLE, variant(root, "b")]
        place, scans = Place(root), Scans(root / "in", rng)
        add_others(place, scans)
        while rounds > 0:
            bundles.reverse()
            place.bundle = bundles[0]
            kept, wanted = place.pages(), expected(scans)
            for _ in range(min(rounds, rng.randint(1, 5))):
                counts[kill_anew(place, rng)] += 1
                assert bundle_of(place) in {Bundle(bundle).hash for bundle in bundles}
                assert wanted.items() <= place.pages().items()
                rounds -= 1
            counts += end_anew(place, scans, kept)
    return counts


def add_others(place: Place, scans: Scans) -> None:
    """An index of files in the folder, and of one beside it."""
    for _ in range(40):
        scans.act()
    other = place.root / "other.png"
    other.write_bytes(draw("other", 1))
    scans.versions[str(other)] = [Version.of(other.read_bytes(), 1)]
    command = [sys.executable, "-m", "cembed", "index", "add", str(place.index), str(place.scans), str(other)]
    done = subprocess.run([*command, "--bundle", str(SAMPLE)], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stderr


def bundle_of(place: Place) -> str:
    return Index.open(place.index).bundle


def kill_anew(place: Place, rng: random.Random) -> str:
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    old = bundle_of(place)
    with place.watching("--reembed", *rng.choice([["--once"], []])) as (process, heard):
        if rng.random() < 0.9:
            is_ready(process, heard)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, 2.0))
        process.send_signal(number)
        process.communicate(timeout=60)
    state = "changed" if bundle_of(place) != old else "made in part" if next_path(place.index).exists() else "not begun"
    return f"anew: {state}"


def end_anew(place: Place, scans: Scans, kept: Pages) -> Counter[str]:
    place.once("--reembed")
    pages, wanted = place.pages(), expected(scans)
    assert bundle_of(place) == Bundle(place.bundle).hash
    assert pages == wanted, pages.keys() ^ wanted.keys()
    assert not next_path(place.index).exists()
    assert not ledger_path(next_path(place.index)).exists()
    compare(place, place.scans, place.index, {page for page in pages if "/other.png#" in page})
    lost = kept.keys() - pages.keys()
    if lost:
        kept_aside = [path for path in place.index.parent.glob("*.before*") if path.is_dir()]
        assert lost <= {page for path in kept_aside for page in pages_of(path)}
    assert place.once("--reembed", log="").startswith(f"{place.index}: 0 pages added\n")
    path = scans.rng.choice(sorted(path for path in scans.good if str(place.scans) in path))
    os.unlink(path)
    scans.versions[path].append(GONE)
    return Counter({"anew: with pages that are lost": bool(lost), "anew: all": 1})


KINDS = ("older", "empty", "garbage", "cut", "gone", "another's", "zeros", "journal", "texts")


def ledgers(rounds: int, seed: int = 5) -> Counter[str]:
    """After a power cut, the ledger may be anything: the index stays as it is, and nothing is embedded again."""
    rng, counts = random.Random(seed), Counter[str]()
    while rounds > 0:
        with folder() as root:
            place, scans = Place(root, rng.choice([(), ("--mirror",)])), Scans(root / "in", rng)
            older = [grow(place, scans, rng) for _ in range(2)][:-1]
            older += [b""] if rng.random() < 0.3 else []
            wanted = expected(scans)
            kinds = rng.sample(KINDS, min(rounds, len(KINDS)))
            for kind in kinds:
                damage(ledger_path(place.index), kind, rng, older)
                if kind == "texts":  # is noticed when it is read
                    subprocess.run(place.command("--once"), capture_output=True, check=False)
                printed = place.once()
                assert printed.startswith(f"{place.index}: 0 pages added"), (kind, printed)
                pages = place.pages()
                assert wanted.items() <= pages.items(), kind
                assert not place.mirror or {page.rpartition("#")[0] for page in pages} <= scans.there.keys()
                counts[f"ledger: {kind}"] += 1
            rounds -= len(kinds)
    return counts


def grow(place: Place, scans: Scans, rng: random.Random) -> bytes:
    """More files, all in the index: the ledger then, at a moment between or in the end."""
    with place.watching() as (process, heard):
        assert is_ready(process, heard)
        for _ in range(20):
            scans.act()
        time.sleep(rng.uniform(0, 1))
        ledger = ledger_path(place.index).read_bytes()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    place.once()
    return rng.choice([ledger, ledger_path(place.index).read_bytes()])


def damage(path: Path, kind: str, rng: random.Random, older: list[bytes]) -> None:
    whole = path.read_bytes()
    if kind == "gone":
        path.unlink()
    elif kind == "journal":
        path.with_name(f"{path.name}-journal").write_bytes(rng.randbytes(3000))
    elif kind == "texts":
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
            table, column = rng.choice(
                [("files", "told"), ("files", "stamp"), ("contents", "told"), ("facts", "value")]
            )
            database.execute(f"UPDATE {table} SET {column} = '{{'")
    elif kind == "another's":
        path.unlink()
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE others (name TEXT)")
    else:
        half = len(whole) // 2
        found = {"older": rng.choice(older), "empty": b"", "garbage": rng.randbytes(5000), "cut": whole[:half]}
        path.write_bytes(found[kind] if kind in found else whole[:half] + bytes(len(whole) - half))


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    begin = time.perf_counter()
    found = globals()[name](*map(int, arguments))
    print(name, arguments, dict(found), f"in {time.perf_counter() - begin:.1f} s")

"""A fuzz target for the reader of indexes: whatever the files hold, an index gives a CembedError or an answer.

python tests/fuzz_index.py --seconds 60 --seed 1

Bytes are changed at random, and texts and numbers in places where they hurt; then all CRCs are made good again, so that
the checks after them are what is tested. Or a file becomes a thing of another kind or size. `one_input(data)`
is there for coverage-guided fuzzers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np

from cembed.runtime.errors import CembedError
from cembed.runtime.index import segments
from cembed.runtime.index.files import CURRENT
from cembed.runtime.index.index import Index
from cembed.runtime.index.new_pages import NewPage
from cembed.runtime.index.records import aligned, seed_of
from cembed.runtime.index.search import Stage
from cembed.runtime.index.verify import verify_index

DIM = 8
MEMORY = 1 << 30  # more than it takes, and far less than a number in a header can ask for
WORDS = (0, 1, 2, 63, 64, 127, 128, 255, 1 << 15, (1 << 16) - 1, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
LONG_WORDS = (*WORDS, 1 << 40, 1 << 60, (1 << 62) - 64, (1 << 63) - 1, (1 << 64) - 1)


def make_index(folder: Path) -> None:
    """Commits of both kinds and a removal, with all tiers."""
    rng = np.random.default_rng(0)
    with Index.create(folder, dim=DIM, bundle="b", storage=("f32", "f16", "u8", "bits")) as index:
        for first in (0, 3):
            pages = [
                NewPage(f"p{i}", rng.standard_normal((i + 1, DIM)).astype(np.float32), f"s{i}", i, {"k": i}, b"c%d" % i)
                for i in range(first, first + 3)
            ]
            index.add(pages, bundle="b")
        index.remove(["p1"])
        new = NewPage("p6", np.ones((3, DIM), np.float32), content=b"c6", warning="doubtful")
        index.add([new, *(NewPage(f"p{i + 7}", None, content=b"c%d" % i, folder="/") for i in (2, 6))], bundle="b")


@cache
def template() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        make_index(Path(folder) / "index")
        return {path.name: path.read_bytes() for path in (Path(folder) / "index").iterdir()}


def one_input(data: bytes) -> str:
    """Uses an index changed as `data` says. Anything but a CembedError that comes out of it is a bug."""
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(prefix="cembed-fuzz-", dir=memory if memory.is_dir() else None))
    try:
        write_changed(data, place / "index")
        return use(place / "index")
    finally:
        shutil.rmtree(place)


def write_changed(data: bytes, folder: Path) -> None:
    """An index in a new folder, changed as `data` says."""
    files, rng = {name: bytearray(content) for name, content in template().items()}, random.Random(data)
    log = next(name for name in files if name.endswith(".log"))
    kind = rng.choice(("log", "log", "log", "current", "raw", "fragments", "file"))
    seed = seed_of(json.loads(template()[CURRENT].rpartition(b" ")[0])["index"], 1)
    if kind == "log":
        change_log(files[log], rng, seed)
    elif kind == "fragments":
        add_fragments(files[log], rng, seed)
    elif kind == "current":
        files[CURRENT] = change_current(bytes(files[CURRENT]), rng)
    elif kind == "raw":
        change_raw(files[rng.choice(sorted(files))], rng)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if kind == "file":
        change_file(folder / rng.choice(sorted(files)), rng)


def change_raw(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        if content:
            content[rng.randrange(len(content))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    if rng.random() < 0.3:
        del content[rng.randint(0, len(content)) :]
    if rng.random() < 0.2:
        content.extend(rng.randbytes(rng.randint(1, 300)))


def change_log(log: bytearray, rng: random.Random, seed: int) -> None:
    """Changes words of headers and payloads, and makes the CRCs good."""
    records = list(split(log))
    for _ in range(rng.randint(1, 4)):
        offset, length = rng.choice(records)
        first, last = rng.choice(((offset + 8, offset + 40), (offset + 64, offset + 64 + length)))
        if last - first >= 8:
            size = rng.choice((1, 4, 8))
            place = rng.randrange(first, last - size + 1)
            place -= place % size
            word = rng.choice(LONG_WORDS if size == 8 else WORDS) + rng.choice((-1, 0, 0, 1))
            log[place : place + size] = (word % (1 << 8 * size)).to_bytes(size, "little")
    for offset, length in records:
        seal(log, offset, length, seed)


def seal(log: bytearray, offset: int, length: int, seed: int) -> None:
    """Makes the CRCs of a record good."""
    end = offset + 64 + aligned(length)
    log[offset + 20 : offset + 24] = struct.pack("<I", zlib.crc32(log[offset + 64 : end], seed))
    seal_header(log, offset, seed)


def seal_header(log: bytearray, offset: int, seed: int) -> None:
    log[offset + 60 : offset + 64] = struct.pack("<I", zlib.crc32(log[offset : offset + 60], seed))


def split(log: bytes | bytearray) -> list[tuple[int, int]]:
    """Offset and payload length of each record."""
    records, offset = [], 0
    while offset < len(log):
        length = struct.unpack_from("<Q", log, offset + 32)[0]
        records.append((offset, length))
        offset += 64 + aligned(length)
    return records


def add_fragments(log: bytearray, rng: random.Random, seed: int) -> None:
    """Headers that are good, of records that are not: each asks for its payload to be read."""
    for _ in range(rng.randint(1, 100)):
        kind, length = rng.randint(1, 3), rng.choice((0, 64, 1000, 1 << 16, 1 << 28))
        header = struct.pack("<8sIIIIQQ20s", b"\x8ecembed\n", kind, 1, 0, 0, rng.randint(0, 9), length, bytes(20))
        log += header + struct.pack("<I", zlib.crc32(header, seed)) + bytes(64 * rng.randint(0, 3))


def change_file(path: Path, rng: random.Random) -> None:
    """To one of another kind, or with a hole at its end that no disk has room for."""
    kind = rng.choice(("pipe", "folder", "link", "device", "huge", "huge", "large", "cut"))
    if kind in ("huge", "large", "cut"):
        os.truncate(path, {"huge": 1 << 42, "large": 1 << 26, "cut": path.stat().st_size // 2}[kind])
        return
    moved = path.rename(path.with_name("moved"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(moved if kind == "link" else "/dev/zero")


def change_current(raw: bytes, rng: random.Random) -> bytearray:
    fields = json.loads(raw.rpartition(b" ")[0])
    values = [None, -1, 0, 1, 7, 1 << 70, 1.5, "x", "", "../x", [], [1, 1], [0, 1, 2], ["f32"], ["x"], {}, True, [[]]]
    for _ in range(rng.randint(1, 2)):
        fields[rng.choice([*fields, "more"])] = rng.choice(values)
    if rng.random() < 0.2:
        fields.pop(rng.choice(list(fields)))
    text = json.dumps(fields).encode()
    return bytearray(text + b" %08x\n" % zlib.crc32(text))


def use(folder: Path) -> str:
    return " ".join(outcome(action, folder) for action in (read_all, check_all, mend, read_all))


def outcome(action: Callable[[Path], None], folder: Path) -> str:
    try:
        action(folder)
    except CembedError:
        return "refused"
    return "ok"


def read_all(folder: Path) -> None:
    index = Index.open(folder)
    index.stats()
    for tier in index.tiers:
        found = index.search(np.ones((2, index.dim), np.float32), 100, plan=(Stage(tier, 100),), threads=1)
        assert all(np.isfinite(hit.score) for hit in found.hits)
    for page in index.find(where={"k": 1}) + index.find():
        assert index.vectors(page.id).shape[1] == index.dim


def check_all(folder: Path) -> None:
    list(verify_index(folder))


def mend(folder: Path) -> None:
    with Index.open(folder, write=True, damaged=True) as index:
        index.compact(drop_damaged=True)
        index.add([NewPage("new", np.ones((1, index.dim), np.float32), content=b"new")], bundle=index.bundle)
        copies = [NewPage(f"copy {name}", None, content=name) for name in (b"c2", b"new") if index.has_content(name)]
        index.add(copies, bundle=index.bundle)
        index.sources()


@patch.object(segments, "RETRY_SECONDS", 0)
def fuzz(seconds: float, seed: int, most: int | None = None) -> Counter[str]:
    counts, end, number = Counter[str](), time.monotonic() + seconds, 0
    while time.monotonic() < end and number != most:
        data = f"{seed}/{number}".encode()
        try:
            counts[one_input(data)] += 1
        except BaseException:
            print(f"input {data!r} does it")
            raise
        number += 1
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    result = fuzz(given.seconds, given.seed)
    print(sum(result.values()), "inputs:", dict(result.most_common()))

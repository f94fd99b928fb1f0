"""The log of a segment: records that make pages count, or no longer count.

A record starts at a multiple of 64 bytes. Its header, 64 bytes, little-endian:

    magic 8s, kind u32, pages n u32, removed m u32, payload CRC u32, number u64, bytes u64, 20 zeros,
    header CRC u32

CRCs are zlib's CRC-32, seeded by the index and the segment, so that a record of another file is no record here. The
payload of `COMMIT`, with T tiers:

    bases int64 [T], serials int64 [n], removed int64 [m], rows int32 [n], numbers int32 [n], source int32 [n],
    metadata int32 [n], scales float32 [n], crcs uint32 [T, n], contents uint8 [n, 16]
    ids, sources, metadata: each count uint32, ends uint32 [count], and the text in UTF-8

`PLACED` is a COMMIT with pages whose bytes were there before: `bases` is where each tier ends after it, and
`starts int64 [T, n]`, where the bytes of each page are, follows `contents`. Pages with the same starts share them.

`CLOSE` has no payload: a writer that ends well leaves it, so that damage before it cannot pass for a torn write.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.errors import CembedError
from cembed.runtime.index.texts import MalformedError, Texts

COMMIT, CLOSE, PLACED = 1, 2, 3
ALIGNMENT = 64
CONTENT_BYTES = 16
MAX_PAYLOAD = 1 << 28
MAX_NUMBER = 1 << 60  # above serials, numbers of records and offsets: one more is a number too
MAX_GAPS = 64  # a log with more has nothing left to read
MAX_LOG = 1 << 32  # a segment ends at half of that
FRAGMENT_BYTES = 1 << 29  # of what looks like a record and is none: more of it is no accident
MAGIC = b"\x8ecembed\n"
HEADER = dict(
    zip(
        ("magic", "kind", "pages", "removed", "crc", "sequence", "length", "zeros"),
        ("8s", "I", "I", "I", "I", "Q", "Q", "20s"),
        strict=True,
    )
)
"""What stands before the header's own CRC, as `struct` has it."""

_HEADER = struct.Struct("<" + "".join(HEADER.values()))
_CRC = struct.Struct("<I")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Header:
    kind: int
    pages: int
    removed: int
    crc: int
    sequence: int
    length: int


@dataclass(frozen=True, eq=False)
class Record:
    """A record that was read whole: its place in the log, and its payload."""

    header: Header
    offset: int
    payload: bytes

    @property
    def end(self) -> int:
        return self.offset + ALIGNMENT + aligned(self.header.length)


@dataclass(frozen=True)
class Gap:
    """Bytes of the log that are no records; the `tail` has no record after it: a write that was cut off."""

    offset: int
    end: int
    tail: bool


@dataclass(frozen=True, eq=False)
class Commit:
    """What a COMMIT or PLACED says, or several do; shapes as in the module, `bases` [commits, T]; `starts` [T, 0] for
    a COMMIT. Texts are bytes until asked for."""

    bases: NDArray[np.int64]
    serials: NDArray[np.int64]
    removed: NDArray[np.int64]
    rows: NDArray[np.int32]
    numbers: NDArray[np.int32]
    source: NDArray[np.integer[Any]]
    metadatum: NDArray[np.integer[Any]]
    scales: NDArray[np.float32]
    crcs: NDArray[np.uint32]
    contents: NDArray[np.uint8]
    starts: NDArray[np.int64]
    ids: Texts
    sources: Texts
    metadata: Texts


def aligned(size: int) -> int:
    """
    >>> [aligned(size) for size in (0, 1, 64, 65)]
    [0, 64, 64, 128]
    """
    return -(-size // ALIGNMENT) * ALIGNMENT


def seed_of(index: str, segment: int) -> int:
    """What the CRCs of a segment's records start from."""
    return zlib.crc32(f"{index}/{segment}".encode())


def encode_record(seed: int, sequence: int, kind: int, pages: int = 0, removed: int = 0, payload: bytes = b"") -> bytes:
    """A record, ready to be appended. Raises CembedError: it would be larger than what is read again."""
    if len(payload) > MAX_PAYLOAD:
        raise CembedError(
            f"{pages} pages and {removed} removals take {len(payload)} bytes in a record: do less at once"
        )
    padded = payload.ljust(aligned(len(payload)), b"\0")
    crc = zlib.crc32(padded, seed)
    header = _HEADER.pack(MAGIC, kind, pages, removed, crc, sequence, len(payload), bytes(20))
    return header + _CRC.pack(zlib.crc32(header, seed)) + padded


def encode_commit(seed: int, sequence: int, commit: Commit) -> bytes:
    """The record of a commit: PLACED where it has starts. Raises as encode_record()."""
    arrays = [getattr(commit, name) for name, _ in _COLUMNS]
    columns = b"".join(np.ascontiguousarray(a, d).tobytes() for a, (_, d) in zip(arrays, _COLUMNS, strict=True))
    payload = columns + b"".join(texts.encode() for texts in (commit.ids, commit.sources, commit.metadata))
    kind = PLACED if commit.starts.size else COMMIT
    return encode_record(seed, sequence, kind, len(commit.serials), len(commit.removed), payload)


_COLUMNS = (
    ("bases", "<i8"),
    ("serials", "<i8"),
    ("removed", "<i8"),
    ("rows", "<i4"),
    ("numbers", "<i4"),
    ("source", "<i4"),
    ("metadatum", "<i4"),
    ("scales", "<f4"),
    ("crcs", "<u4"),
    ("contents", "u1"),
    ("starts", "<i8"),
)
_WIDE = ("crcs", "starts")  # with a row for each tier


def decode_commits(records: Sequence[Record], tiers: int) -> Commit:
    """The commits in records with good CRCs as one, checked as if there were none. Raises MalformedError: one of them
    makes no sense; which, is found out one by one."""
    pages = np.array([record.header.pages for record in records], np.int64)
    parts = list(zip(*(_split(record, tiers) for record in records), strict=True))
    columns: dict[str, Any] = _join_columns(parts[:-6], tiers)
    kinds = {"ids": parts[-6:-4], "sources": parts[-4:-2], "metadata": parts[-2:]}  # ends and texts of each record
    counts = {name: np.array([len(part) // 4 for part in ends]) for name, (ends, _) in kinds.items()}
    if (counts["ids"] != pages).any():
        raise MalformedError("it has more or fewer ids than pages")
    columns |= {name: _join_texts(*kind) for name, kind in kinds.items()}
    for column, texts in (("source", "sources"), ("metadatum", "metadata")):
        columns[column] = _shifted(columns[column], counts[texts], pages)
    _check(commit := Commit(**columns))
    return commit


def _join_columns(parts: Sequence[Sequence[bytes]], tiers: int) -> dict[str, Any]:
    """The arrays of commits; `parts` are each column's bytes in each record, of `_WIDE` ones for each tier."""
    columns, rest = dict[str, Any](), iter(parts)
    for name, dtype in _COLUMNS:
        count = tiers if name in _WIDE else 1
        taken = [np.frombuffer(b"".join(next(rest)), dtype) for _ in range(count)]
        columns[name] = np.stack(taken) if name in _WIDE else taken[0]
    columns["bases"] = columns["bases"].reshape(-1, tiers)
    columns["contents"] = columns["contents"].reshape(-1, CONTENT_BYTES)
    return columns


def _split(record: Record, tiers: int) -> list[bytes]:
    """The columns of a payload, one for each tier of `crcs` and `starts`, and ends and text of each kind of texts."""
    n, m, data, at, parts = record.header.pages, record.header.removed, record.payload, 0, list[bytes]()
    starts = 8 * n if record.header.kind == PLACED else 0
    for size in (8 * tiers, 8 * n, 8 * m, *[4 * n] * (5 + tiers), CONTENT_BYTES * n, *[starts] * tiers):
        parts.append(data[at : at + size])
        at += size
    for _ in range(3):
        first = at + _CRC.size
        at = first + 4 * _CRC.unpack_from(data, at)[0] if first <= len(data) else first
        size = _CRC.unpack_from(data, at - 4)[0] if first < at <= len(data) else 0
        parts += data[first:at], data[at : at + size]
        at += size
    if at != len(data):
        raise MalformedError("it is shorter or longer than its counts say")
    return parts


def _join_texts(ends: Sequence[bytes], texts: Sequence[bytes]) -> Texts:
    bases = np.cumsum([0, *map(len, texts[:-1])])
    joined = np.frombuffer(b"".join(ends), "<u4") + np.repeat(bases, [len(part) // 4 for part in ends])
    if (joined[1:] < joined[:-1]).any():
        raise MalformedError("its texts do not follow each other")
    found = Texts(joined, b"".join(texts))
    found.check()
    return found


def _shifted(which: NDArray[np.int32], counts: NDArray[np.int64], pages: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of a record's texts, of which there are `counts`, as numbers of all records' texts."""
    if (which < 0).any() or (which >= np.repeat(counts, pages)).any():
        raise MalformedError("its pages name texts that are not there")
    bases: NDArray[np.int64] = np.repeat(np.cumsum(counts) - counts, pages)
    return which + bases


def _check(commit: Commit) -> None:
    rising = bool((np.diff(commit.serials) > 0).all())
    sane = bool((commit.rows > 0).all() and (commit.bases >= 0).all())
    numbered = bool((commit.serials >= 0).all() and (commit.serials < MAX_NUMBER).all())
    placed = bool(((commit.starts >= 0) & (commit.starts < MAX_NUMBER) & (commit.starts % ALIGNMENT == 0)).all())
    if not (rising and sane and numbered and placed and np.isfinite(commit.scales).all()):
        raise MalformedError("its columns do not fit each other")


def read_record(handle: int, seed: int, offset: int, size: int) -> Record | None:
    """The record at `offset` of a log of `size` bytes, None if there is no whole one with good CRCs."""
    header = _read_header(handle, seed, offset, size)
    if header is None or offset + ALIGNMENT + aligned(header.length) > size:
        return None
    padded = os.pread(handle, aligned(header.length), offset + ALIGNMENT)
    if len(padded) != aligned(header.length) or zlib.crc32(padded, seed) != header.crc:
        return None
    return Record(header, offset, padded[: header.length])


def _read_header(handle: int, seed: int, offset: int, size: int) -> Header | None:
    raw = os.pread(handle, ALIGNMENT, offset) if offset + ALIGNMENT <= size else b""
    if len(raw) != ALIGNMENT or _CRC.unpack(raw[-4:])[0] != zlib.crc32(raw[:-4], seed):
        return None
    magic, kind, pages, removed, crc, sequence, length, zeros = _HEADER.unpack(raw[:-4])
    known = magic == MAGIC and kind in (COMMIT, CLOSE, PLACED) and zeros == bytes(20)
    possible = sequence < MAX_NUMBER and length <= MAX_PAYLOAD
    return Header(kind, pages, removed, crc, sequence, length) if known and possible else None


def read_log(handle: int, seed: int, offset: int, sequence: int) -> Iterator[Record | Gap]:
    """The records of a log from `offset` on, the first of which has number `sequence`, and what is between them.

    Only what the log held when the first was asked for is looked at, and another process may append meanwhile.
    Raises MalformedError: hardly anything in it can be read.
    """
    size, gaps = os.fstat(handle).st_size, 0
    if size > MAX_LOG:
        raise MalformedError(f"it has {size} bytes, more than any log")
    fragments = _Fragments()
    while offset < size:
        record = read_record(handle, seed, offset, size)
        if record is not None and record.header.sequence == sequence:
            yield record
            offset, sequence = record.end, sequence + 1
            continue
        found = _find_record(handle, seed, offset + ALIGNMENT, size, sequence, fragments)
        gaps += 1
        if gaps > MAX_GAPS:
            raise MalformedError(f"more than {MAX_GAPS} places of it are damaged")
        yield Gap(offset, size if found is None else found.offset, found is None)
        if found is None:
            return
        offset, sequence = found.offset, found.header.sequence


class _Fragments:
    """What was looked at and is no record that counts."""

    def __init__(self) -> None:
        self._count = self._bytes = 0

    def add(self, size: int) -> None:
        """Raises MalformedError: there are too many."""
        self._count, self._bytes = self._count + 1, self._bytes + size
        if self._count > MAX_GAPS or self._bytes > FRAGMENT_BYTES:
            raise MalformedError(f"{self._count} fragments of records are in it, of {self._bytes} bytes")


def _find_record(handle: int, seed: int, offset: int, size: int, sequence: int, fragments: _Fragments) -> Record | None:
    """The first whole record after `offset` and `sequence`. Raises MalformedError: there are too many fragments."""
    magic = np.frombuffer(MAGIC, np.uint64)[0]
    while (start := _skip_hole(handle, offset, size)) < size:
        chunk, offset = os.pread(handle, min(_CHUNK, size - start), start), start + _CHUNK
        words = np.frombuffer(chunk, np.uint64, len(chunk) // ALIGNMENT * ALIGNMENT // 8)[:: ALIGNMENT // 8]
        for place in np.flatnonzero(words == magic):
            at = start + int(place) * ALIGNMENT
            record = read_record(handle, seed, at, size)
            if record is not None and record.header.sequence > sequence:
                return record
            header = _read_header(handle, seed, at, size)
            fragments.add(header.length if header else ALIGNMENT)
    return None


def _skip_hole(handle: int, offset: int, size: int) -> int:
    """The first place from `offset` on, a multiple of 64, that is in no hole of the file; `size` if there is none."""
    if offset >= size or not hasattr(os, "SEEK_DATA"):
        return offset
    try:
        return max(offset, os.lseek(handle, offset, os.SEEK_DATA) // ALIGNMENT * ALIGNMENT)
    except OSError as error:
        return size if error.errno == errno.ENXIO else offset  # no data; or this file system does not say

"""The files of an index, and the one that says which of them count.

    CURRENT              one line of JSON, a space, and its CRC-32 in eight hexadecimal digits; replaced by a rename
    LOCK                 an empty file that the one writer locks
    00000001.log         records of segment 1, see `records`
    00000001.bits, …     vectors of segment 1, a file for each storage type: page after page, 64-byte aligned

Other files with such names are left over from a writer that was killed, and go when the next one starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cembed.runtime.disk import Disk, open_to_read
from cembed.runtime.errors import CembedError
from cembed.runtime.scoring.storage import STORAGE, by_exactness, check_dim

CURRENT, LOCK, NEXT = "CURRENT", "LOCK", "CURRENT.new"
FORMAT = "cembed index"
VERSION, PLACED_VERSION = 1, 2  # the latter may have PLACED records; an index is one when it gets its first
MAX_DIM = 1 << 14
MAX_SEGMENTS = 1 << 16
MAX_SEGMENT = 99_999_999  # the number of one
MAX_CURRENT = 1 << 21  # bytes

_SEGMENT_FILE = re.compile(rf"(\d{{8}})\.(log|{'|'.join(STORAGE)})")


class _VersionError(CembedError):
    """An index of another version, which is nothing that is damaged."""


@dataclass(frozen=True)
class Current:
    """What CURRENT says: `tiers` are storage types, the most exact first; `next_serial` is above every page's.

    `version` is that of the format.
    """

    index: str
    dim: int
    tiers: tuple[str, ...]
    bundle: str
    segments: tuple[int, ...]
    next_segment: int
    next_serial: int
    version: int = VERSION

    def __post_init__(self) -> None:
        """Raises CembedError: something that is not so in any index."""
        numbers = (self.dim, self.next_segment, self.next_serial, *self.segments)
        if not all(type(number) is int and 0 <= number < 1 << 60 for number in numbers):
            raise CembedError("a number is out of range")
        if not all(isinstance(text, str) for text in (self.index, self.bundle)):
            raise CembedError("a name is no text")
        self._check_tiers()
        self._check_segments()

    def _check_tiers(self) -> None:
        if not 1 <= self.dim <= MAX_DIM:
            raise CembedError(f"dim is {self.dim}: 1 to {MAX_DIM} are possible")
        if not self.tiers or self.tiers != by_exactness(self.tiers):
            raise CembedError(f"storage types {self.tiers!r}: cembed has {', '.join(by_exactness())}")
        for tier in self.tiers:
            check_dim(tier, self.dim)

    def _check_segments(self) -> None:
        if len(self.segments) > MAX_SEGMENTS or len(set(self.segments)) != len(self.segments):
            raise CembedError("its list of segments is impossible")
        if not max(self.segments, default=0) < self.next_segment <= MAX_SEGMENT:
            raise CembedError("its next segment is one that is there")

    def encode(self) -> bytes:
        text = json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=True).encode()
        return text + b" %08x\n" % zlib.crc32(text)

    @classmethod
    def decode(cls, raw: bytes) -> Current:
        """Raises CembedError: damaged, of a later version, not of an index."""
        text, space, crc = raw.removesuffix(b"\n").rpartition(b" ")
        if not space or b"%08x" % zlib.crc32(text) != crc or not raw.endswith(b"\n"):
            raise CembedError("its CRC does not match")
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CembedError("it is no JSON") from error
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise CembedError("it is of another format")
        if type(version := fields.get("version")) is not int or version not in (VERSION, PLACED_VERSION):
            raise _VersionError(
                f"version {version!r}, this cembed reads {VERSION} to {PLACED_VERSION}: use a newer cembed"
            )
        return cls._of(fields)

    @classmethod
    def _of(cls, fields: Mapping[str, Any]) -> Current:
        if set(fields) != set(cls.__dataclass_fields__):
            raise CembedError("its fields are not those of an index")
        lists = {name: fields[name] for name in ("tiers", "segments")}
        if not all(isinstance(value, list) and value for value in lists.values()):
            raise CembedError("its fields are not those of an index")
        try:
            return cls(**{**fields, **{name: tuple(value) for name, value in lists.items()}})
        except TypeError as error:
            raise CembedError("its fields are not those of an index") from error


def read_current(folder: Path) -> Current:
    """Raises CembedError: no index there, or CURRENT is damaged."""
    try:
        handle = open_regular(folder / CURRENT)
    except OSError as error:
        raise CembedError(f"{folder} is no index: cannot read {CURRENT} ({error.strerror})") from error
    try:
        raw = os.read(handle, MAX_CURRENT)
    finally:
        os.close(handle)
    try:
        return Current.decode(raw)
    except _VersionError as error:
        raise CembedError(f"{folder} is an index of {error}") from error
    except CembedError as error:
        raise CembedError(f"{folder / CURRENT} is damaged: {error}; take that file from a copy of the index") from error


def write_current(disk: Disk, folder: Path, current: Current) -> None:
    """Puts `current` in force, durably: the files it names must be on disk, names and all. Raises OSError."""
    handle = disk.create(folder / NEXT)
    try:
        disk.write(handle, current.encode(), 0)
        disk.sync(handle)
    finally:
        disk.close(handle)
    disk.rename(folder / NEXT, folder / CURRENT)
    disk.sync_folder(folder)


def segment_path(folder: Path, segment: int, suffix: str) -> Path:
    """
    >>> segment_path(Path("index"), 7, "u8").name
    '00000007.u8'
    """
    return folder / f"{segment:08}.{suffix}"


def orphans(folder: Path, current: Current | None) -> list[Path]:
    """Files with names of an index's that no CURRENT names."""
    used = set(current.segments) if current else set()
    names = sorted(entry.name for entry in os.scandir(folder))
    found = [(name, _SEGMENT_FILE.fullmatch(name)) for name in names]
    return [folder / name for name, match in found if name == NEXT or (match and int(match[1]) not in used)]


def open_regular(path: Path) -> int:
    """A handle to read from. Raises OSError: not there, a link, a folder, a device."""
    handle = open_to_read(path)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(0, "not a plain file")
    return handle


def make_folder(disk: Disk, folder: Path) -> None:
    """Raises CembedError: something is there that an index has not left; OSError."""
    if not os.path.lexists(folder):
        disk.make_folder(folder)
    elif not folder.is_dir() or set(folder.iterdir()) - {folder / LOCK, *orphans(folder, None)}:
        raise CembedError(f"{folder} is there and no index: choose another place")


def remove_orphans(disk: Disk, folder: Path, current: Current | None) -> None:
    """Removes what nothing names; the CURRENT that names the others must be on disk."""
    for path in orphans(folder, current):
        disk.remove(path)


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Makes a CembedError of an OSError."""
    try:
        yield
    except OSError as error:
        raise CembedError(f"cannot write to {folder}: {error.strerror or error}") from error


def take_lock(folder: Path) -> int:
    """A handle that holds the lock until it is closed. Raises CembedError: another process has it."""
    import fcntl

    with writing_to(folder):
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise CembedError(f"{folder / LOCK} is no plain file: remove it")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise CembedError(f"another process is writing to {folder}: wait until it ends") from error
    except CembedError:
        os.close(handle)
        raise
    return handle

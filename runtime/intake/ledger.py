"""What was done with each file, in an SQLite file beside the index.

It saves work and remembers what is wrong; the index alone says which pages are there. So one that is lost or damaged is
made anew: files are hashed again, and those that cannot be read are tried once more.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cembed.runtime.errors import CembedError

State = Literal["indexed", "failed", "blank", "waiting", "moving"]
VERSION = 1
BUSY_SECONDS = 10.0
_TABLES = """
CREATE TABLE IF NOT EXISTS files (folder BLOB, name BLOB, stamp TEXT, digest BLOB, state TEXT, told TEXT,
    PRIMARY KEY (folder, name)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_state ON files (state);
CREATE TABLE IF NOT EXISTS contents (digest BLOB PRIMARY KEY, told TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Missing:
    """A page of a file, or the rest of it if `number` is None, that is not in the index: it is blank, or why not."""

    number: int | None
    reason: str
    blank: bool = False


@dataclass(frozen=True)
class Content:
    """What is known of a file's bytes: how many pages they have, 0 where that is not known, and which are missing."""

    pages: int
    missing: tuple[Missing, ...] = ()

    @property
    def lacks(self) -> Mapping[int | None, Missing]:
        return {missing.number: missing for missing in self.missing}


@dataclass(frozen=True)
class Entry:
    """A file: `stamp` and sha256 as they were when it was read; `to` is where it is being moved.

    `pages` of it are indexed, `reasons` say why others are not, or why it waits. `when` is the time of the clock then.
    """

    path: str
    stamp: tuple[int, ...]
    state: State
    digest: bytes = b""
    pages: int = 0
    blank: int = 0
    reasons: tuple[str, ...] = field(default=())
    to: str = ""
    when: float = 0.0


class Ledger:
    """May be used by several threads of the one process that writes; other processes read it meanwhile."""

    def __init__(self, path: Path, *, write: bool) -> None:
        """Raises CembedError: it cannot be opened; one that is damaged is made anew where it may be written."""
        self.path, self._write, self._lock = path, write, threading.RLock()
        try:
            self._database = self._open(write)
        except sqlite3.DatabaseError as error:
            if not write or isinstance(error, sqlite3.OperationalError):
                raise CembedError(f"cannot open {path}: {error}") from None
            self._set_aside()
            self._database = self._open(write)

    @classmethod
    def beside(cls, index: Path, *, write: bool) -> Ledger:
        """The ledger of an index. Raises CembedError: it cannot be opened, or there is none to read."""
        return cls(ledger_path(index), write=write)

    def _open(self, write: bool) -> sqlite3.Connection:
        if write:
            return self._connect("rwc", write)
        try:
            return self._connect("rw", write)  # a writer that was killed has left a journal that is to be rolled back
        except sqlite3.OperationalError:
            return self._connect("ro", write)

    def _connect(self, mode: str, write: bool) -> sqlite3.Connection:
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        database = sqlite3.connect(uri, uri=True, check_same_thread=False, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            if write:
                database.execute("PRAGMA synchronous = FULL")
                database.execute("PRAGMA temp_store = MEMORY")
                self._check_version(database)
                database.executescript(_TABLES)
                if (found := database.execute("PRAGMA quick_check(1)").fetchone()) != ("ok",):
                    raise sqlite3.DatabaseError(f"damaged: {found}")
            database.execute("SELECT folder FROM files LIMIT 1").fetchall()
        except BaseException:
            database.close()
            raise
        return database

    def _check_version(self, database: sqlite3.Connection) -> None:
        found = database.execute("PRAGMA user_version").fetchone()[0]
        if found > VERSION:
            raise CembedError(f"{self.path} is of a newer cembed: use that one, or remove the file")
        database.execute(f"PRAGMA user_version = {VERSION}")

    def _set_aside(self) -> None:
        with contextlib.suppress(OSError):
            os.replace(self.path, self.path.with_name(f"{self.path.name}.damaged"))
        for suffix in ("-journal", "-wal", "-shm"):
            self.path.with_name(f"{self.path.name}{suffix}").unlink(missing_ok=True)

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Everything that is written inside is durable when it ends, or none of it. Raises CembedError: it fails."""
        with self._lock:
            try:
                if self._database.in_transaction:
                    yield
                    return
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._database.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):
                        self._database.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                self._give_up_damaged(error)
                raise CembedError(f"cannot write to {self.path}: {error}") from error

    def _rows(self, query: str, *values: Any, of: Callable[[Any], Any] = lambda row: row) -> list[Any]:
        """What `of` makes of each row that is found."""
        try:
            with self._lock:
                return [of(row) for row in self._database.execute(query, values)]
        except (sqlite3.Error, ValueError, TypeError, LookupError) as error:  # or texts that are none of ours
            self._give_up_damaged(error)
            raise CembedError(f"cannot read {self.path}: {error}") from error

    def _give_up_damaged(self, error: Exception) -> None:
        """The next one that opens it for writing shall find none."""
        passing = isinstance(error, sqlite3.Error) and type(error) is not sqlite3.DatabaseError
        if self._write and not passing:
            self._set_aside()

    # Files ------------------------------------------------------------------------------------------------------------

    def put(self, entry: Entry) -> None:
        folder, name = _split(entry.path)
        told = asdict(entry)
        for column in ("path", "stamp", "state", "digest"):
            del told[column]
        row = (folder, name, _stamp_text(entry.stamp), entry.digest, entry.state, json.dumps(told))
        with self.changing():
            self._database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", row)

    def forget(self, paths: Iterable[str]) -> None:
        with self.changing():
            self._database.executemany("DELETE FROM files WHERE folder = ? AND name = ?", map(_split, paths))

    def folder(self, folder: str) -> dict[str, tuple[tuple[int, ...], State]]:
        """Stamp and state of the files right in a folder, by their names."""
        query = "SELECT name, stamp, state FROM files WHERE folder = ?"
        return dict(self._rows(query, os.fsencode(folder), of=lambda r: (os.fsdecode(r[0]), (_stamp_of(r[1]), r[2]))))

    def folders(self) -> list[str]:
        """Folders of which there are files."""
        return [os.fsdecode(folder) for (folder,) in self._rows("SELECT DISTINCT folder FROM files")]

    def get(self, path: str) -> Entry | None:
        rows = self._rows("SELECT * FROM files WHERE folder = ? AND name = ?", *_split(path), of=_entry)
        return rows[0] if rows else None

    def entries(self, *states: State, limit: int = -1) -> list[Entry]:
        """Files in these states."""
        marks = ",".join("?" * len(states))
        return self._rows(f"SELECT * FROM files WHERE state IN ({marks}) LIMIT ?", *states, limit, of=_entry)

    def counts(self) -> dict[str, int]:
        """Files by state."""
        return dict(self._rows("SELECT state, COUNT(*) FROM files GROUP BY state"))

    def reread_all(self, where: str = "1") -> None:
        """Every file shall be looked at again; the device it was on stays known."""
        with self.changing():
            self._database.execute(f"UPDATE files SET stamp = substr(stamp, 1, instr(stamp, ' ')) WHERE {where}")

    # Contents ---------------------------------------------------------------------------------------------------------

    def learn(self, digest: bytes, content: Content) -> None:
        told = {"pages": content.pages, "missing": [[m.number, m.reason, m.blank] for m in content.missing]}
        with self.changing():
            self._database.execute("INSERT OR REPLACE INTO contents VALUES (?, ?)", (digest, json.dumps(told)))

    def content(self, digest: bytes) -> Content | None:
        rows = self._rows("SELECT told FROM contents WHERE digest = ?", digest, of=_content)
        return rows[0] if rows else None

    def forget_contents(self) -> None:
        """What could not be read, and all files that had it, shall be tried again."""
        with self.changing():
            self._database.execute("DELETE FROM contents")
            self.reread_all("state <> 'indexed'")

    # Facts ------------------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        return dict(self._rows("SELECT name, value FROM facts", of=lambda row: (row[0], json.loads(row[1]))))

    def tell(self, **facts: Any) -> None:
        rows = [(name, json.dumps(value)) for name, value in facts.items()]
        with self.changing():
            self._database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)

    def adopt(self, **reading: str) -> None:
        """Says what the files are read for: an index, settings, a bundle, a version. If it is another than it was,
        nothing of what is known holds any more."""
        facts = self.facts()
        if facts.get("reading") == reading:
            return
        with self.changing():
            if "reading" in facts:
                self._database.execute("DELETE FROM contents")
                self.reread_all()
            self.tell(reading=reading)


def ledger_path(index: Path) -> Path:
    """
    >>> ledger_path(Path("shelf/pages.index")).as_posix()
    'shelf/pages.index.ledger'
    """
    absolute = Path(os.path.abspath(index)) if index.name in ("", "..") else index
    return absolute.with_name(f"{absolute.name}.ledger")


def _split(path: str) -> tuple[bytes, bytes]:
    folder, name = os.path.split(path)
    return os.fsencode(folder), os.fsencode(name)


def _stamp_text(stamp: Sequence[int]) -> str:
    return " ".join(map(str, stamp))


def _stamp_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


def _content(row: Sequence[Any]) -> Content:
    told = json.loads(row[0])
    return Content(told["pages"], tuple(Missing(*missing) for missing in told["missing"]))


def _entry(row: Sequence[Any]) -> Entry:
    folder, name, stamp, digest, state, told = row
    fields = json.loads(told)
    fields["reasons"] = tuple(fields["reasons"])
    path = os.path.join(os.fsdecode(folder), os.fsdecode(name))
    return Entry(path=path, stamp=_stamp_of(stamp), digest=digest, state=state, **fields)

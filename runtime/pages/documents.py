"""Finds documents, and reads PDFs and pictures into RGB pages."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cembed.runtime.errors import CembedError, one_line
from cembed.runtime.pages.decoder import Decoder, LostError
from cembed.runtime.pages.file_kinds import START_BYTES, kind_of
from cembed.runtime.pages.images import Drawn, Settings
from cembed.runtime.pages.pdf import codes as pdf_codes

SUFFIXES = (".pdf", ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".webp", ".bmp", ".gif")

STRIKES = 30  # pages in a row that failed, and a file is given up: it may claim a million pages
_LOSS_STRIKES = 10


def place_of(path: str, number: int | None) -> str:
    """A page, or a whole file, as messages name it.

    >>> place_of("scan.pdf", 3), place_of("scan.pdf", None)
    ('scan.pdf, page 3', 'scan.pdf')
    """
    return path if number is None else f"{path}, page {number}"


@dataclass(frozen=True, eq=False)
class Page:
    """A page of a file: `number` counts PDF pages from 1, or TIFF frames that are neither thumbnails nor masks; `image`
    is RGB uint8 [height, width, 3].

    `warning` is one line for a person where something of the page may be missing or wrong, else None.
    """

    path: str
    number: int
    image: npt.NDArray[np.uint8]
    warning: str | None = None

    @property
    def place(self) -> str:
        """As messages name it."""
        return place_of(self.path, self.number)


@dataclass(frozen=True)
class PageError:
    """A page that could not be read or embedded, or a whole file if `number` is None; `reason` is one line for a
    person."""

    path: str
    number: int | None
    reason: str

    @property
    def place(self) -> str:
        """As messages name it."""
        return place_of(self.path, self.number)


def given_up(path: str, number: int, pages: int) -> PageError:
    """For the pages of a file from `number` on, after STRIKES."""
    return PageError(path, None, f"pages {number} to {pages} left out, as too many in a row failed")


def require_pages(pages: Iterable[Page | PageError]) -> Iterator[Page]:
    """`pages`, where none may be missing. Raises CembedError for the first that could not be read."""
    for page in pages:
        if isinstance(page, PageError):
            raise CembedError(f"{page.place} cannot be read: {page.reason}")
        yield page
        del page  # it may be the largest thing in memory, and the next one is about to come


def find_documents(paths: Iterable[str | Path]) -> list[Path]:
    """The documents at `paths`, each once, in the order given; folders are searched to any depth, in order of name.

    Within a folder, hidden files and folders, files with other suffixes, and links to folders are passed over; a file
    that is given itself may have any name, if its content is of a known type. Raises CembedError for a path that does
    not exist or is a device, pipe or socket, a file of unknown type, a folder that cannot be listed, or no result.
    """
    given = [Path(path) for path in _several(paths)]
    found: dict[str, Path] = {}
    for file in (file for path in given for file in (_walk(path) if path.is_dir() else [_checked(path)])):
        found.setdefault(os.path.abspath(file), file)
    if not found:
        where = ", ".join(one_line(str(path)) for path in given) or "no path"
        raise CembedError(f"found no documents in {where}: give files or folders with {', '.join(SUFFIXES)}")
    return list(found.values())


def _several(paths: Iterable[str | Path]) -> Iterable[str | Path]:
    """Raises CembedError for one path alone, of which a string would be taken apart."""
    if isinstance(paths, (str, Path)):
        raise CembedError("paths must be a list or another iterable: put the one you have into brackets")
    return paths


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise CembedError(f"cannot list the folder {one_line(str(error.filename))}: {error.strerror}")

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (Path(root, name) for name in sorted(files) if not name.startswith(".")):
            if file.suffix.lower() in SUFFIXES and file.is_file():
                yield file


def _checked(path: Path) -> Path:
    name = one_line(str(path))
    if not os.path.exists(path):
        raise CembedError(f"no such file or folder: {name}")
    if not path.is_file():
        raise CembedError(f"{name} is a device, a pipe or a socket: give files or folders")
    if path.suffix.lower() not in SUFFIXES and _kind(path) is None:
        raise CembedError(f"{name} is not a document of a known type: give {', '.join(SUFFIXES)}")
    return path


def _kind(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return kind_of(file.read(START_BYTES))
    except OSError as error:
        raise CembedError(f"cannot read {one_line(str(path))}: {error.strerror}") from None


def _outcome(path: str, number: int, pages: int, reply: Drawn | str) -> Page | PageError:
    """What the decoding process said of a page, in a file of `pages`, 0 where that is not known."""
    if isinstance(reply, str):
        return PageError(path, number if pages else None, reply)
    return Page(path, number, reply.image, reply.warning)


class PageReader:
    """Decodes documents in a process of its own, one page ahead of the caller; leaving the `with` block ends it.

    `dpi` is the resolution of PDF pages. A page of more than `max_pixels` is drawn smaller, or reduced while it is
    decoded (TIFF, JPEG); other pictures that have more are refused. `timeout` is in seconds, for each page.
    `memory_limit` is in bytes on top of what the idle process takes (None: no limit) and needs a system with RLIMIT_AS.
    The process can open no file, and do little else than to decode those it is given (docs/security.md); what the
    system lacks for that is a RuntimeWarning, or an error if `require_sandbox`.
    Raises CembedError for a setting that is not above 0, when the process does not start, and for calls that its one
    process cannot answer: outside of the block, or during a `read`.
    """

    def __init__(
        self,
        *,
        dpi: float = 144.0,
        timeout: float = 60.0,
        max_pixels: int = 100_000_000,
        memory_limit: int | None = 2 << 30,
        require_sandbox: bool = False,
    ) -> None:
        self._settings, self._timeout = Settings(dpi, max_pixels, memory_limit), min(timeout, threading.TIMEOUT_MAX)
        for name, value in {**asdict(self._settings), "timeout": timeout}.items():
            if value is not None and not 0 < value < math.inf:
                raise CembedError(f"{name} is {value}: give a number above 0")
        self._worker: Decoder | None = None
        self._require_sandbox = require_sandbox
        self._entered = self._reading = False

    def __enter__(self) -> PageReader:
        self._require(not self._entered, "is open already: give what its read() yields to embed_pages")
        pdf_codes.load()  # warns here where it is missing, as nobody sees what the other process says
        self._entered, self._worker = True, Decoder(self._settings, self._require_sandbox)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered = False
        self._end_worker()

    def count_pages(self, paths: Iterable[str | Path]) -> int:
        """How many pages `paths` have together; a file that cannot be read counts as 1. Not during a `read`."""
        return sum(self.page_count(path) or 1 for path in _several(paths))

    def page_count(self, path: str | Path) -> int | None:
        """How many pages a file has; None if it cannot be read, not in time, or only after a repair that may have lost
        some. Not during a `read`."""
        self._require(not self._reading, "counts before read() only")
        worker = self._live_worker()
        try:
            worker.send(str(path), 0)
            reply = worker.receive(self._timeout)
        except LostError:
            return None
        return None if isinstance(reply, str) or reply.warning else worker.pages or None

    def pages_of(self, path: str | Path) -> int:
        """How many pages can be read of a file, as far as is known before they are; 0 of one that cannot be read."""
        self._require(not self._reading, "counts before read() only")
        worker = self._live_worker()
        try:
            worker.send(str(path), 0)
            worker.receive(self._timeout)
        except LostError:
            return 0
        return worker.pages

    def page(self, path: str | Path, number: int) -> tuple[Page | PageError, int]:
        """One page of a file, and how many pages the file has, 0 where that is not known. Not during a `read`."""
        self._require(not self._reading, "reads single pages before read() only")
        worker = self._live_worker()
        try:
            worker.send(str(path), number)
            reply = worker.receive(self._timeout)
        except LostError as lost:
            reply = str(lost)
        if worker.pages and not 1 <= number <= worker.pages:
            reply = f"there is no page {number}: the file has {worker.pages}"
        return _outcome(str(path), number, worker.pages, reply), worker.pages

    def read(self, paths: Iterable[str | Path]) -> Iterator[Page | PageError]:
        """Every page of every file in order, or the reason why it is missing; bad input never raises.

        The page after the one handed out is already being decoded, so `paths` is consumed one ahead. After 30 pages in
        a row that failed, or 3 that took too long or ended the process, one PageError stands for the rest of the file.
        """
        self._require(not self._reading, "has one process to answer: finish or close() the running read() first")
        self._reading = True
        held: list[Page | PageError] = []
        try:
            for step in (step for path in _several(paths) for step in self._steps(str(path))):
                if step is not None:
                    held.append(step)
                    continue
                yield from held
                held.clear()
            yield from held
        except BaseException:  # with a request under way, this process can serve no other read
            self._end_worker()
            raise
        finally:
            self._reading = False

    def _steps(self, path: str) -> Iterator[Page | PageError | None]:
        """Outcomes, and None when the next request is under way: the moment to hand out what came before it."""
        number, pages, strikes = 1, 0, 0
        while number <= max(pages, 1):
            worker = self._live_worker()
            try:
                worker.send(path, number)
                yield None
                reply = worker.receive(self._timeout)
                pages, strikes = worker.pages, strikes + 1 if isinstance(reply, str) else 0
            except LostError as lost:
                reply = str(lost)
                pages, strikes = worker.pages or pages, strikes + _LOSS_STRIKES
            yield _outcome(path, number, pages, reply)
            del reply  # it may be the largest thing in memory, and the next one is about to come
            number += 1
            if strikes >= STRIKES and number <= pages:
                yield given_up(path, number, pages)
                return

    def _live_worker(self) -> Decoder:
        self._require(self._entered, "is not open: use it in a with block")
        if self._worker is None or not self._worker.alive:
            self._end_worker()
            self._worker = Decoder(self._settings, self._require_sandbox)
        self._worker.await_ready()
        return self._worker

    @staticmethod
    def _require(right: bool, otherwise: str) -> None:
        if not right:
            raise CembedError(f"this PageReader {otherwise}")

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.end()

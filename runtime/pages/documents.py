"""Reads PDFs and pictures into RGB pages. One process does all decoding: it may be slow, exhaust memory or crash.

A request is a line of JSON, `[path, number]`, with number 0 when only the page count is wanted. Replies are headers in
JSON, each after its length: `{"pages": n}`, then `{"shape": [h, w, 3], "warning": text or null}` and the bytes;
`{"error": text}` for either.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cembed.runtime.errors import CembedError, one_line
from cembed.runtime.pages.file_kinds import START_BYTES, kind_of
from cembed.runtime.pages.images import Drawn, Settings
from cembed.runtime.pages.pdf import codes as pdf_codes

SUFFIXES = (".pdf", ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".webp", ".bmp", ".gif")

_START_SECONDS = 120.0
_STRIKES = 30  # in a row, and a file is given up: it may claim a million pages
_LOSS_STRIKES = 10
_HEADER_BYTES, _PAGES, _TEXT = 1 << 16, 1 << 31, 500  # what a reply may have, whatever befell the decoding process
_PIPE = 1 << 20  # bytes: what Linux allows everybody
# Not `python -m`: that takes modules from the working directory and misses what a script has put on sys.path.
_BOOT = "import sys; sys.path[:] = sys.argv[2:]; from cembed.runtime.pages.worker import serve; serve(sys.argv[1])"


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


@dataclass(frozen=True)
class PageError:
    """A page that could not be read, or a whole file if `number` is None; `reason` is one line for a person."""

    path: str
    number: int | None
    reason: str


def find_documents(paths: Iterable[str | Path]) -> list[Path]:
    """The documents at `paths`, each once, in the order given; folders are searched to any depth, in order of name.

    Within a folder, hidden files and folders, files with other suffixes, and links to folders are passed over; a file
    that is given itself may have any name, if its content is of a known type. Raises CembedError for a path that does
    not exist or is a device, pipe or socket, a file of unknown type, a folder that cannot be listed, or no result.
    """
    given = [Path(path) for path in paths]
    found: dict[str, Path] = {}
    for file in (file for path in given for file in (_walk(path) if path.is_dir() else [_checked(path)])):
        found.setdefault(os.path.abspath(file), file)
    if not found:
        where = ", ".join(one_line(str(path)) for path in given) or "no path"
        raise CembedError(f"found no documents in {where}: give files or folders with {', '.join(SUFFIXES)}")
    return list(found.values())


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


class PageReader:
    """Decodes documents in a process of its own, one page ahead of the caller; leaving the `with` block ends it.

    `dpi` is the resolution of PDF pages. A page of more than `max_pixels` is drawn smaller, or reduced while it is
    decoded (TIFF, JPEG); other pictures that have more are refused. `timeout` is in seconds, for each page.
    `memory_limit` is in bytes on top of what the idle process takes (None: no limit) and needs a system with RLIMIT_AS.
    Raises CembedError for a setting that is not above 0, and when the process does not start.
    """

    def __init__(
        self,
        *,
        dpi: float = 144.0,
        timeout: float = 60.0,
        max_pixels: int = 100_000_000,
        memory_limit: int | None = 2 << 30,
    ) -> None:
        self._settings, self._timeout = Settings(dpi, max_pixels, memory_limit), min(timeout, threading.TIMEOUT_MAX)
        for name, value in {**asdict(self._settings), "timeout": timeout}.items():
            if value is not None and not 0 < value < math.inf:
                raise CembedError(f"{name} is {value}: give a number above 0")
        self._worker: _Worker | None = None
        self._entered = self._reading = False

    def __enter__(self) -> PageReader:
        pdf_codes.load()  # warns here where it is missing, as nobody sees what the other process says
        self._entered, self._worker = True, _Worker(self._settings)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered = False
        self._end_worker()

    def count_pages(self, paths: Iterable[str | Path]) -> int:
        """How many pages `paths` have together; a file that cannot be read counts as 1. Not during a `read`."""
        return sum(self.page_count(path) or 1 for path in paths)

    def page_count(self, path: str | Path) -> int | None:
        """How many pages a file has; None if it cannot be read, not in time, or only after a repair that may have lost
        some. Not during a `read`."""
        assert not self._reading, "count before read()"
        worker = self._live_worker()
        try:
            worker.send(str(path), 0)
            reply = worker.receive(self._timeout)
        except _LostError:
            return None
        return None if isinstance(reply, str) or reply.warning else worker.pages or None

    def read(self, paths: Iterable[str | Path]) -> Iterator[Page | PageError]:
        """Every page of every file in order, or the reason why it is missing; bad input never raises.

        The page after the one handed out is already being decoded, so `paths` is consumed one ahead. After 30 pages in
        a row that failed, or 3 that took too long or ended the process, one PageError stands for the rest of the file.
        """
        assert not self._reading, "finish or close() the running read() first: there is one process to answer"
        self._reading = True
        held: list[Page | PageError] = []
        try:
            for step in (step for path in paths for step in self._steps(str(path))):
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
            except _LostError as lost:
                reply = str(lost)
                pages, strikes = worker.pages or pages, strikes + _LOSS_STRIKES
            if isinstance(reply, str):
                yield PageError(path, number if pages else None, reply)
            else:
                yield Page(path, number, reply.image, reply.warning)
            del reply  # it may be the largest thing in memory, and the next one is about to come
            number += 1
            if strikes >= _STRIKES and number <= pages:
                yield PageError(path, None, f"pages {number} to {pages} left out, as too many in a row failed")
                return

    def _live_worker(self) -> _Worker:
        assert self._entered, "use PageReader in a with block"
        if self._worker is None or not self._worker.alive:
            self._end_worker()
            self._worker = _Worker(self._settings)
        self._worker.await_ready()
        return self._worker

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.end()


def _widen(pipe: Any) -> None:
    """A page is megabytes, and on Linux a pipe takes 64 kB at once, unless it is told to take more."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)


class _LostError(Exception):
    """The decoding process is gone, or was ended, before it had answered."""


class _NonsenseError(Exception):
    """A reply that the decoding process cannot have meant."""


class _Worker:
    """The decoding process as the reading side sees it; `pages` is what it said of the file last asked for."""

    def __init__(self, settings: Settings) -> None:
        command = [sys.executable, "-c", _BOOT, json.dumps(asdict(settings)), *map(str, sys.path)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        _widen(self._process.stdout)
        self._requests: Any = self._process.stdin
        self._replies: Any = self._process.stdout
        self._ready, self.pages, self._max_pixels = False, 0, settings.max_pixels
        self._owner = os.getpid()

    @property
    def _ours(self) -> bool:
        """Whether this process started it, and did not come by it by a fork."""
        return os.getpid() == self._owner

    @property
    def alive(self) -> bool:
        return self._ours and self._process.poll() is None

    def await_ready(self) -> None:
        try:
            self._ready = self._ready or self.receive(_START_SECONDS) is not None
        except _LostError as lost:
            hint = f"check that `{sys.executable} -c 'import PIL, pypdfium2'` works and memory_limit is not too small"
            raise CembedError(f"the process that reads documents did not start: {lost}; {hint}") from None

    def send(self, path: str, number: int) -> None:
        self.pages = 0
        self._check_owner()
        try:
            self._requests.write(json.dumps([os.path.abspath(path), number]).encode() + b"\n")
            self._requests.flush()
        except OSError:
            raise _LostError(self._ending()) from None

    def receive(self, seconds: float) -> Drawn | str:
        """The image asked for (empty if none was) or why there is none; ends the process when `seconds` have passed."""
        self._check_owner()
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        reply: Drawn | str | None = None
        failure: str | None = None
        try:
            reply = self._reply()
        except EOFError:
            pass
        except (_NonsenseError, ValueError, RecursionError):
            failure = "the decoding process gave an answer that makes no sense"
        except MemoryError:
            failure = "no memory is left for it"
        except BaseException:  # half a reply would be taken for the start of the next
            self.end()
            raise
        finally:
            timer.cancel()
            timer.join()
        if expired.is_set():
            self.end()
            raise _LostError(f"took longer than {seconds:g} s")
        if failure is not None:
            self.end()
            raise _LostError(failure)
        if reply is None:
            raise _LostError(self._ending())
        return reply

    def _reply(self) -> Drawn | str:
        header = self._header()
        if "pages" in header:
            if type(header["pages"]) is not int or not 0 <= header["pages"] < _PAGES:
                raise _NonsenseError
            self.pages = header["pages"]
            header = self._header()
        if "error" in header:
            return one_line(str(header["error"]))[:_TEXT]
        image = np.empty(self._shape(header.get("shape")), np.uint8)
        self._fill(image.data.cast("B") if image.size else bytearray())
        warning = header.get("warning")
        return Drawn(image, None if warning is None else one_line(str(warning))[:_TEXT])

    def _shape(self, shape: Any) -> list[int]:
        """A shape that a page of these settings can have, or [0]."""
        if shape == [0]:
            return [0]
        if not isinstance(shape, list) or len(shape) != 3 or not all(type(side) is int and side > 0 for side in shape):
            raise _NonsenseError
        if shape[0] * shape[1] > self._max_pixels or shape[2] != 3:
            raise _NonsenseError
        return shape

    def _header(self) -> dict[str, Any]:
        prefix = bytearray(4)
        self._fill(prefix)
        length = int.from_bytes(prefix, "big")
        if length > _HEADER_BYTES:
            raise _NonsenseError
        text = bytearray(length)
        self._fill(text)
        header = json.loads(text)
        if not isinstance(header, dict):
            raise _NonsenseError
        return header

    def _fill(self, buffer: bytearray | memoryview) -> None:
        if self._replies.readinto(buffer) != len(buffer):
            raise EOFError

    def _check_owner(self) -> None:
        if not self._ours:
            raise _LostError("it was asked for before a fork, and the answer goes to the other process")

    def _ending(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self.end()
        code = self._process.returncode
        what = signal.strsignal(-code) if code < 0 else f"exit status {code}"
        return f"the decoding process died ({what})"

    def end(self) -> None:
        if self._ours:
            self._process.kill()
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                pipe.close()
        if self._ours:
            self._process.wait()

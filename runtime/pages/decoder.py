"""The decoding process as the reading side sees it. It may be slow, exhaust memory or crash: then a page is lost.

A request is a message over a socket, in JSON: `[number, whether the file is named as a PDF]`, with number 0 when only
the page count is needed; with it goes the open file. In the place of both it has null for the file that is there.
Replies come through a pipe: headers in JSON, each after its length: `{"pages": n}`, then `{"shape": [h, w, 3],
"warning": text or null}` and the bytes; `{"error": text}` for either. The first, `{"shape": [0], "warning": text}`,
says that the process is in its cage, and what that lacks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import warnings
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np

from cembed.runtime.errors import CembedError, one_line
from cembed.runtime.pages.files import File
from cembed.runtime.pages.images import Drawn, RefusedError, Settings

# Not `python -m`: that takes modules from the working directory and misses what a script has put on sys.path.
BOOT = "import sys; sys.path[:] = sys.argv[2:]; from cembed.runtime.pages.worker import serve; serve(sys.argv[1])"

_START_SECONDS = 120.0
_HEADER_BYTES, _PAGES, _TEXT = 1 << 16, 1 << 31, 500  # what a reply may have, whatever befell the decoding process
# Of the environment, which has secrets of programs at times: what Python, its libraries and the loader go by.
_KEPT = (
    "PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE",
    "PYTHONNOUSERSITE", "PYTHONSAFEPATH", "PYTHONPLATLIBDIR", "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE",
    "PYTHONUTF8", "PYTHONCOERCECLOCALE", "PYTHONIOENCODING", "PYTHONHASHSEED", "PYTHONMALLOC", "PYTHONOPTIMIZE",
    "PYTHONWARNINGS", "PYTHONDEVMODE", "PYTHONFAULTHANDLER", "PYTHONUNBUFFERED",
)  # fmt: skip
_KEPT_FAMILIES = ("LC_", "LD_", "DYLD_", "MALLOC_", "GLIBC_")
_NO_THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # of numpy, started by it
_PIPE = 1 << 20  # bytes: what Linux allows everybody


def _widen(pipe: Any) -> None:
    """A page is megabytes, and on Linux a pipe takes 64 kB at once, unless it is told to take more."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in os.environ if name in _KEPT or name.startswith(_KEPT_FAMILIES)}
    return kept | _NO_THREADS


@cache
def _say(lacking: str) -> None:
    """Once."""
    warnings.warn(f"files are decoded without the protection of {lacking}", RuntimeWarning, stacklevel=2)


class LostError(Exception):
    """The decoding process is gone, or was ended, before it had answered."""


class _NonsenseError(Exception):
    """A reply that the decoding process cannot have meant."""


class Decoder:
    """The decoding process as the reading side sees it; `pages` is what it said of the file last asked for."""

    def __init__(self, settings: Settings, require_sandbox: bool = False) -> None:
        command = [sys.executable, "-c", BOOT, json.dumps(asdict(settings)), *map(str, sys.path)]
        self._requests, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
            )
        self._requests.shutdown(socket.SHUT_RD)
        _widen(self._process.stdout)
        self._replies: Any = self._process.stdout
        self._ready, self.pages, self._max_pixels = False, 0, settings.max_pixels
        self._require_sandbox, self._owner = require_sandbox, os.getpid()
        self._place: str | None = None
        self._refusal: str | None = None
        self._addresses, self._last_size = resource.RLIM_INFINITY, 0

    @property
    def _ours(self) -> bool:
        """Whether this process started it, and did not come by it by a fork."""
        return os.getpid() == self._owner

    @property
    def alive(self) -> bool:
        return self._ours and self._process.poll() is None

    def await_ready(self) -> None:
        try:
            if not self._ready:
                self._started(self.receive(_START_SECONDS))
        except LostError as lost:
            hint = f"check that `{sys.executable} -c 'import PIL, pypdfium2'` works and memory_limit is not too small"
            raise CembedError(f"the process that reads documents did not start: {lost}; {hint}") from None

    def _started(self, reply: Drawn | str) -> None:
        """Raises CembedError for a cage that lacks something, if all of it is required; else that is a warning."""
        lacking = None if isinstance(reply, str) else reply.warning
        if lacking and self._require_sandbox:
            self.end()
            raise CembedError(f"the sandbox that was required cannot be had: this system lacks {lacking}")
        if lacking:
            _say(lacking)
        with contextlib.suppress(AttributeError, OSError):  # not Linux
            self._addresses = resource.prlimit(self._process.pid, resource.RLIMIT_AS)[0]
        self._ready = True

    def send(self, path: str, number: int) -> None:
        """Opens the file, unless it is the last one and a later page. What speaks against that is the next reply."""
        self.pages, self._refusal = 0, None
        self._check_owner()
        place = os.path.abspath(path)
        known, self._place = place == self._place and number > 1, None
        try:
            if known:
                self._ask(number)
            else:
                self._hand_over(place, number)
            self._place = place
        except RefusedError as refused:
            self._refusal = str(refused)

    def _hand_over(self, place: str, number: int) -> None:
        try:
            file = File.at(place)
        except (OSError, ValueError) as error:
            raise RefusedError(getattr(error, "strerror", None) or os.strerror(errno.ENOENT)) from None
        with file:
            self._make_room(file.size)
            self._ask(number, file)

    def _make_room(self, size: int) -> None:
        """A mapped file takes addresses, which are limited, and no memory; the last one may be mapped still."""
        if self._addresses != resource.RLIM_INFINITY:
            soft = self._addresses + self._last_size + size
            with contextlib.suppress(ValueError, OSError):  # it is gone, as will be noticed, or limited from outside
                hard = resource.prlimit(self._process.pid, resource.RLIMIT_AS)[1]
                resource.prlimit(self._process.pid, resource.RLIMIT_AS, (soft, hard))
        self._last_size = size

    def _ask(self, number: int, file: File | None = None) -> None:
        request = json.dumps([number, None if file is None else file.named_pdf]).encode()
        try:
            socket.send_fds(self._requests, [request], [] if file is None else [file.descriptor])
        except OSError:
            raise LostError(self._ending()) from None

    def receive(self, seconds: float) -> Drawn | str:
        """The image asked for (empty if none was) or why there is none; ends the process when `seconds` have passed."""
        self._check_owner()
        if self._refusal is not None:
            return self._refusal
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
            raise LostError(f"took longer than {seconds:g} s")
        if failure is not None:
            self.end()
            raise LostError(failure)
        if reply is None:
            raise LostError(self._ending())
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
            raise LostError("it was asked for before a fork, and the answer goes to the other process")

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

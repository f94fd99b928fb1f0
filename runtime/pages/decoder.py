"""The decoding process as the reading side sees it. It may be slow, exhaust memory or crash: then a page is lost.

A request is a line of JSON, `[path, number]`, with number 0 when only the page count is needed. Replies are headers in
JSON, each after its length: `{"pages": n}`, then `{"shape": [h, w, 3], "warning": text or null}` and the bytes;
`{"error": text}` for either.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from typing import Any

import numpy as np

from cembed.runtime.errors import CembedError, one_line
from cembed.runtime.pages.images import Drawn, Settings

# Not `python -m`: that takes modules from the working directory and misses what a script has put on sys.path.
BOOT = "import sys; sys.path[:] = sys.argv[2:]; from cembed.runtime.pages.worker import serve; serve(sys.argv[1])"

_START_SECONDS = 120.0
_HEADER_BYTES, _PAGES, _TEXT = 1 << 16, 1 << 31, 500  # what a reply may have, whatever befell the decoding process
_PIPE = 1 << 20  # bytes: what Linux allows everybody


def _widen(pipe: Any) -> None:
    """A page is megabytes, and on Linux a pipe takes 64 kB at once, unless it is told to take more."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)


class LostError(Exception):
    """The decoding process is gone, or was ended, before it had answered."""


class _NonsenseError(Exception):
    """A reply that the decoding process cannot have meant."""


class Decoder:
    """The decoding process as the reading side sees it; `pages` is what it said of the file last asked for."""

    def __init__(self, settings: Settings) -> None:
        command = [sys.executable, "-c", BOOT, json.dumps(asdict(settings)), *map(str, sys.path)]
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
        except LostError as lost:
            hint = f"check that `{sys.executable} -c 'import PIL, pypdfium2'` works and memory_limit is not too small"
            raise CembedError(f"the process that reads documents did not start: {lost}; {hint}") from None

    def send(self, path: str, number: int) -> None:
        self.pages = 0
        self._check_owner()
        try:
            self._requests.write(json.dumps([os.path.abspath(path), number]).encode() + b"\n")
            self._requests.flush()
        except OSError:
            raise LostError(self._ending()) from None

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

"""The decoding process of `cembed.runtime.pages.documents`: opens PDFs and pictures and answers with RGB pages."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image, TiffImagePlugin, _imaging

from cembed.runtime.errors import one_line
from cembed.runtime.pages.file_kinds import KINDS, START_BYTES, kind_of
from cembed.runtime.pages.images import Drawn, Pixels, RefusedError, Settings
from cembed.runtime.pages.pdf.pages import Pdf
from cembed.runtime.pages.pictures import Picture
from cembed.runtime.pages.tiff.pages import Tiff

_NOTHING: Pixels = np.empty(0, np.uint8)
_KEPT_BLOCKS = 64  # of a megabyte: memory of a picture, for the next one
_WATCH_SECONDS = 1.0
_REOPEN_PAGES = 64  # PDFium keeps the streams of every page it has drawn: a long scan would run into the memory limit


def serve(settings_json: str) -> None:
    """The decoding process: answers requests until its standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the reading side, which then ends this process
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may get among the replies
    settings = Settings(**json.loads(settings_json))
    Image.MAX_IMAGE_PIXELS = None  # sizes are checked here, before decoding, and without a warning
    TiffImagePlugin.READ_LIBTIFF = True  # see tiff_codecs
    requests: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    Image.init()
    _imaging.set_blocks_max(_KEPT_BLOCKS)
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    _limit_memory(settings.memory_limit)
    decoder = _Decoder(settings)
    _write(replies, {"shape": [0]})
    while True:
        for header, body in decoder.answers(*requests.get()):
            _write(replies, header, body)


def _write(replies: IO[bytes], header: dict[str, Any], body: Pixels = _NOTHING) -> None:
    text = json.dumps(header).encode()
    replies.write(len(text).to_bytes(4, "big") + text)
    replies.write(body.data)
    replies.flush()


def _listen(requests: queue.SimpleQueue[tuple[str, int]]) -> None:
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    os._exit(0)  # the reading side is gone, so even a page in the middle of decoding is of no use


def _watch(parent: int) -> None:
    """Ends with the reading side, though a process that it forked may keep standard input open."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(0)


def _limit_memory(allowed: int | None) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if allowed is not None:
        idle = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
        with contextlib.suppress(ValueError, OSError):  # a lower limit is in force already, or the system has none
            resource.setrlimit(resource.RLIMIT_AS, (idle + int(allowed), resource.getrlimit(resource.RLIMIT_AS)[1]))


Document: TypeAlias = Pdf | Picture | Tiff


@dataclass
class _Decoder:
    """Keeps the last document open, since its pages are asked for one after the other."""

    settings: Settings
    path: str | None = None
    document: Document | None = None

    def answers(self, path: str, number: int) -> Iterator[tuple[dict[str, Any], Pixels]]:
        try:
            worn = isinstance(self.document, Pdf) and number % _REOPEN_PAGES == 1
            if self.document is None or path != self.path or number <= 1 or worn:
                self.document = None
                self.document, self.path = _open(path, self.settings), path
            yield {"pages": self.document.pages}, _NOTHING
            drawn = self.document.page(number) if number else Drawn(_NOTHING, self.document.doubt)
            warning = None if drawn.warning is None else one_line(drawn.warning)
            yield {"shape": drawn.image.shape, "warning": warning}, drawn.image
        except Exception as error:  # decoders of damaged files raise every type there is
            self.document = None
            yield {"error": one_line(_reason(error, self.settings))}, _NOTHING


def _open(path: str, settings: Settings) -> Document:
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise RefusedError("is a folder" if stat.S_ISDIR(about.st_mode) else "is not a regular file")
    if about.st_size == 0:
        raise RefusedError("the file is empty")
    with open(path, "rb") as file:
        kind = kind_of(file.read(START_BYTES))
    if kind == "PDF" or (kind is None and path.lower().endswith(".pdf")):
        return Pdf(path, settings)
    if kind is None:
        raise RefusedError(f"not a {', '.join(KINDS[:-1])} or {KINDS[-1]} file, or damaged from the start")
    return Tiff(path, settings) if kind == "TIFF" else Picture(path, settings, kind)


def _reason(error: Exception, settings: Settings) -> str:
    """One line for a person: Python's own texts speak of objects and addresses."""
    text = " ".join(re.sub(r"<[^<>]*>", "file", str(error)).split())[:200]
    if isinstance(error, RefusedError):
        return text
    if isinstance(error, MemoryError):
        return f"needs more than memory_limit, {(settings.memory_limit or 0) >> 20} MiB"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"damaged, or of a kind that cannot be decoded: {type(error).__name__} {text}"

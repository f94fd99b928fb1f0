"""The decoding process of `cembed.runtime.documents`: opens PDFs and pictures and answers with RGB pages."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import queue
import re
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from cembed.runtime.images import Pixels, to_rgb

_NOTHING: Pixels = np.empty(0, np.uint8)
_PICTURE_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")
_REOPEN_PAGES = 64  # PDFium keeps the streams of every page it has drawn: a long scan would run into the memory limit


@dataclass(frozen=True)
class Settings:
    dpi: float
    max_pixels: int
    memory_limit: int | None


class _RefusedError(Exception):
    """Input that is left alone, for the reason given."""


def serve(settings_json: str) -> None:
    """The decoding process: answers requests until its standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the reading side, which then ends this process
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may get among the replies
    settings = Settings(**json.loads(settings_json))
    Image.MAX_IMAGE_PIXELS = None  # sizes are checked here, before decoding, and without a warning
    requests: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    importlib.import_module("pypdfium2")  # now, so that neither the memory nor the time of a page is charged with it
    Image.init()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
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


@dataclass
class _Decoder:
    """Keeps the last document open, since its pages are asked for one after the other."""

    settings: Settings
    path: str | None = None
    document: _Pdf | _Picture | None = None

    def answers(self, path: str, number: int) -> Iterator[tuple[dict[str, Any], Pixels]]:
        try:
            if self.document is None or path != self.path or number == 0 or number % _REOPEN_PAGES == 1:
                self.document = None
                self.document, self.path = _open(path, self.settings), path
            yield {"pages": self.document.pages}, _NOTHING
            image = self.document.page(number) if number else _NOTHING
            yield {"shape": image.shape}, image
        except Exception as error:  # decoders of damaged files raise every type there is
            self.document = None
            yield {"error": _reason(error, self.settings)}, _NOTHING


def _open(path: str, settings: Settings) -> _Pdf | _Picture:
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise _RefusedError("is a folder" if stat.S_ISDIR(about.st_mode) else "is not a regular file")
    if about.st_size == 0:
        raise _RefusedError("the file is empty")
    with open(path, "rb") as file:
        start = file.read(5)
    return (_Pdf if path.lower().endswith(".pdf") or start == b"%PDF-" else _Picture)(path, settings)


class _Pdf:
    def __init__(self, path: str, settings: Settings) -> None:
        import pypdfium2  # only here: the reading side has no use for it

        self._settings = settings
        self._document = pypdfium2.PdfDocument(path)
        self._document.init_forms()  # without it, fields that have been filled in stay blank
        self.pages = len(self._document)

    def page(self, number: int) -> Pixels:
        page = self._document[number - 1]
        width, height = page.get_size()
        scale = self._settings.dpi / 72
        while math.ceil(width * scale) * math.ceil(height * scale) > self._settings.max_pixels:
            scale *= 0.99
        image = np.array(page.render(scale=scale, rev_byteorder=True).to_numpy()[..., :3], order="C")
        page.close()
        return image


class _Picture:
    def __init__(self, path: str, settings: Settings) -> None:
        self._limit = settings.max_pixels
        self._image = Image.open(path, formats=_PICTURE_FORMATS)
        self.pages = self._image.n_frames if isinstance(self._image, TiffImagePlugin.TiffImageFile) else 1

    def page(self, number: int) -> Pixels:
        self._image.seek(number - 1)
        width, height = self._image.size
        if width * height > self._limit:
            raise _RefusedError(f"{width} x {height} pixels are over the limit of {self._limit} (max_pixels)")
        self._image.load()
        return np.array(to_rgb(self._image), order="C")


def _reason(error: Exception, settings: Settings) -> str:
    """One line for a person: Python's own texts speak of objects and addresses."""
    text = " ".join(re.sub(r"<[^<>]*>", "file", str(error)).split())[:200]
    if isinstance(error, _RefusedError):
        return text
    if isinstance(error, MemoryError):
        return f"needs more than memory_limit, {(settings.memory_limit or 0) >> 20} MiB"
    if isinstance(error, UnidentifiedImageError):
        return f"not a {', '.join(_PICTURE_FORMATS)} or PDF file, or damaged from the start"
    if type(error).__name__ == "PdfiumError":
        if "assword" in text:
            return "encrypted: save a copy that opens without a password"
        return "has no pages, is damaged, or is no PDF" if "document" in text else f"damaged: {text}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"damaged, or of a kind that cannot be decoded: {type(error).__name__} {text}"

"""The decoding process of `cembed.runtime.pages.documents`: draws pages of PDFs and pictures in RGB, in a cage."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image, TiffImagePlugin, _imaging

from cembed.runtime.errors import one_line
from cembed.runtime.pages import cage
from cembed.runtime.pages.file_kinds import KINDS, START_BYTES, kind_of
from cembed.runtime.pages.files import File
from cembed.runtime.pages.images import Drawn, Pixels, RefusedError, Settings
from cembed.runtime.pages.pdf.pages import Pdf, second_thread
from cembed.runtime.pages.pictures import Picture
from cembed.runtime.pages.tiff.pages import Tiff
from cembed.runtime.pages.warmup import warm_up

_NOTHING: Pixels = np.empty(0, np.uint8)
_KEPT_BLOCKS = 64  # of a megabyte: memory of a picture, for the next one
_WATCH_SECONDS = 1.0
_REOPEN_PAGES = 64  # PDFium keeps the streams of every page it has drawn: a long scan would run into the memory limit
_REQUEST_BYTES = 1 << 12
_HIGHEST_DESCRIPTOR = 256  # that a process can have which has just started
_MOST_DESCRIPTORS, _MOST_WRITTEN = 64, 1 << 20  # a file and what is overheard of libtiff; bytes of the latter


def serve(settings_json: str) -> None:
    """The decoding process: answers requests until its standard input, a socket, ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the reading side, which then ends this process
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may get among the replies
    settings = Settings(**json.loads(settings_json))
    Image.MAX_IMAGE_PIXELS = None  # sizes are checked here, before decoding, and without a warning
    TiffImagePlugin.READ_LIBTIFF = True  # see tiff_codecs
    Image.init()
    _imaging.set_blocks_max(_KEPT_BLOCKS)
    decoder, channel = _Decoder(settings), socket.socket(fileno=0)
    warm_up(settings)
    lacking = _enter_cage(settings.memory_limit, replies.fileno())
    _write(replies, {"shape": [0], "warning": lacking})
    for file, number in _requests(channel):
        if file is not None:
            decoder.take(file)
        for header, body in decoder.answers(number):
            _write(replies, header, body)


def _write(replies: IO[bytes], header: dict[str, Any], body: Pixels = _NOTHING) -> None:
    text = json.dumps(header).encode()
    replies.write(len(text).to_bytes(4, "big") + text)
    replies.write(body.data)
    replies.flush()


def _requests(channel: socket.socket) -> Iterator[tuple[File | None, int]]:
    """Which page is asked for, and of which file where it is not the last one."""
    while True:
        text, descriptors, _, _ = socket.recv_fds(channel, _REQUEST_BYTES, 1)
        if not text:
            os._exit(0)  # the reading side is gone
        number, named_pdf = json.loads(text)
        yield (None if named_pdf is None else File(descriptors[0], named_pdf)), number


def _watch(parent: int) -> None:
    """Ends with the reading side, even in the middle of a page, of which there is no use then."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(0)


def _enter_cage(memory_limit: int | None, replies: int) -> str | None:
    """Gives up what decoding does not need. Returns what the system lacks for it."""
    gc.collect()  # what the samples have left; what stays need not be looked through again
    gc.freeze()
    for descriptor in range(3, _HIGHEST_DESCRIPTOR):
        with contextlib.suppress(OSError):  # there is none of that number
            if descriptor != replies and os.fstat(descriptor):
                os.dup2(2, descriptor, inheritable=False)  # whoever has it may close it later, when it is another one
    with _own_size() as size:
        no_files = cage.lock_files()  # of this thread and of those that come: hence the order
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
        second_thread()
        _limit(memory_limit, size)
    no_calls = cage.filter_calls(fonts=no_files is None)
    return " and ".join(lack for lack in (no_files, no_calls) if lack) or None


def _own_size() -> IO[str]:
    """Of addresses, in pages, once it is read; opened while files can be."""
    statm = Path("/proc/self/statm")
    return statm.open() if statm.exists() else io.StringIO("0")


def _limit(memory: int | None, size: IO[str]) -> None:
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: _MOST_DESCRIPTORS,
        resource.RLIMIT_FSIZE: _MOST_WRITTEN,
    }
    for kind, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # a lower limit is in force
            resource.setrlimit(kind, (most, most))
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))  # a lower one is for the process that started this
    if memory is not None:
        most = int(size.read().split()[0]) * resource.getpagesize() + int(memory)
        with contextlib.suppress(ValueError, OSError):
            # The reading side moves it for files that are mapped, and the filter of calls lets nobody here do so.
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


Document: TypeAlias = Pdf | Picture | Tiff


@dataclass
class _Decoder:
    """Keeps the last document open, since its pages are asked for one after the other."""

    settings: Settings
    file: File | None = None
    document: Document | None = None

    def take(self, file: File) -> None:
        self.document = None
        if self.file is not None:
            self.file.close()
        self.file = file

    def answers(self, number: int) -> Iterator[tuple[dict[str, Any], Pixels]]:
        try:
            worn = isinstance(self.document, Pdf) and number % _REOPEN_PAGES == 1
            if self.document is None or worn:
                self.document = None
                self.document = _open(self.file, self.settings)
            yield {"pages": self.document.pages}, _NOTHING
            drawn = self.document.page(number) if number else Drawn(_NOTHING, self.document.doubt)
            warning = None if drawn.warning is None else one_line(drawn.warning)
            yield {"shape": drawn.image.shape, "warning": warning}, drawn.image
        except Exception as error:  # decoders of damaged files raise every type there is
            self.document = None
            yield {"error": one_line(_reason(error, self.settings))}, _NOTHING


def _open(file: File | None, settings: Settings) -> Document:
    assert file is not None, "a page was asked for before there was a file"
    kind = kind_of(os.pread(file.descriptor, START_BYTES, 0))
    if kind == "PDF" or (kind is None and file.named_pdf):
        return Pdf(file, settings)
    if kind is None:
        raise RefusedError(f"not a {', '.join(KINDS[:-1])} or {KINDS[-1]} file, or damaged from the start")
    return Tiff(file, settings) if kind == "TIFF" else Picture(file, settings, kind)


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

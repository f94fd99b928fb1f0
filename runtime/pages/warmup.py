"""Decodes a file of every kind before the decoding process enters its cage, where no module can be loaded any more."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Iterator

import numpy.random  # numpy loads it when it is first used
from PIL import Image

from cembed.runtime.pages.files import File
from cembed.runtime.pages.images import Settings
from cembed.runtime.pages.pdf import codes as pdf_codes
from cembed.runtime.pages.pdf.pages import Pdf
from cembed.runtime.pages.pictures import Picture
from cembed.runtime.pages.tiff.pages import Tiff

# Functions for C to call need memory that is code. This one stays, and with it the room that it shares with others.
_CALLED_BACK = ctypes.CFUNCTYPE(None)(lambda: None)
_TIFF_CODECS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "group3", "group4", "packbits", "zstd", "webp", "lzma")
# Text in a font of the machine, so that PDFium looks for them; without a table of objects, so that it is repaired.
_PDF = b"""%PDF-1.4
1 0 obj
<< /Type /Catalog /Pages 2 0 R >>
endobj
2 0 obj
<< /Type /Pages /Kids [3 0 R] /Count 1 >>
endobj
3 0 obj
<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R /Resources << /Font << /F 5 0 R >> >> >>
endobj
4 0 obj
<< /Length 26 >>
stream
BT /F 9 Tf (a) Tj ET 0 0 1
endstream
endobj
5 0 obj
<< /Type /Font /Subtype /TrueType /BaseFont /Unknown /Encoding /WinAnsiEncoding >>
endobj
trailer << /Root 1 0 R >>
"""


def warm_up(settings: Settings) -> None:
    if sys.platform != "linux":  # there is no cage
        return
    numpy.random.default_rng(0)
    pdf_codes.load()
    for kind, content in _samples():
        file = File(_in_memory(content))
        with file, contextlib.suppress(Exception):  # Pillow may have been built without it
            _opened(file, kind, settings).page(1)


def _opened(file: File, kind: str, settings: Settings) -> Pdf | Tiff | Picture:
    if kind == "PDF":
        return Pdf(file, settings)
    return Tiff(file, settings) if kind == "TIFF" else Picture(file, settings, kind)


def _in_memory(content: bytes) -> int:
    descriptor = os.memfd_create("sample")
    os.write(descriptor, content)
    return descriptor


def _samples() -> Iterator[tuple[str, bytes]]:
    grey = Image.new("L", (16, 16), 99)
    yield "TIFF", _saved(Image.new("LAB", (16, 16)), "TIFF")
    for kind in ("PNG", "GIF", "BMP", "WEBP"):
        yield kind, _saved(grey, kind)
    stream = _saved(grey, "JPEG", progressive=True)
    yield from (("JPEG", stream), ("JPEG", stream[:-9]), ("PDF", _PDF))
    for codec in _TIFF_CODECS:
        yield "TIFF", _saved(grey.convert("1") if codec.startswith("group") else grey, "TIFF", compression=codec)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    with contextlib.suppress(Exception):
        image.save(file, kind, **options)
    return file.getvalue()

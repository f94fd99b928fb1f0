"""Opens PDF files: whole ones, encrypted ones, and damaged ones after a repair."""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
from dataclasses import dataclass

import numpy as np
import pypdfium2
import pypdfium2.raw as pdfium

from cembed.runtime.pages.files import File
from cembed.runtime.pages.images import RefusedError
from cembed.runtime.pages.pdf.objects import Objects

_JUNK = 1 << 16  # bytes that may come before a file's %PDF-
_REPAIRED = 1 << 28  # bytes of a file that is repaired, or decrypted as a whole
_REASONS = {
    pdfium.FPDF_ERR_PASSWORD: "encrypted: save a copy that opens without a password",
    pdfium.FPDF_ERR_SECURITY: "encrypted in a way that cannot be read (/Filter /{}): save a copy without protection",
}


@dataclass(frozen=True, eq=False)
class Opened:
    """`data` is what was made of the file, without encryption, or None for the file itself; `repair` is what was done.

    An encrypted file that is too large to be decrypted as a whole leads to no `data`.
    """

    document: pypdfium2.PdfDocument
    data: bytes | None = None
    repair: str | None = None


def open_pdf(file: File) -> Opened:
    """Raises RefusedError for what cannot be opened."""
    try:
        document = pypdfium2.PdfDocument(_bytes_of(file.mapped))
    except pypdfium2.PdfiumError:
        if (code := pdfium.FPDF_GetLastError()) in _REASONS:
            raise RefusedError(_REASONS[code].format(Objects(file.mapped).encryption)) from None
        return _repaired(file.mapped)
    if pdfium.FPDF_GetSecurityHandlerRevision(document) < 0:
        return Opened(document)
    return Opened(document, _decrypted(file, document))


def _bytes_of(mapped: mmap.mmap) -> ctypes.Array[ctypes.c_ubyte]:
    """A mapped file as PDFium's binding takes it, which keeps it as long as the document."""
    view = np.frombuffer(mapped, np.uint8)
    found = (ctypes.c_ubyte * view.size).from_address(view.ctypes.data)
    found.view = view  # type: ignore[attr-defined]  # it keeps the file mapped
    return found


def _decrypted(file: File, document: pypdfium2.PdfDocument) -> bytes:
    if file.size > _REPAIRED:
        return b""
    copy = io.BytesIO()
    document.save(copy, flags=pdfium.FPDF_REMOVE_SECURITY)
    return copy.getvalue()


def _repaired(data: mmap.mmap) -> Opened:
    start = data.find(b"%PDF-", 0, _JUNK)
    if len(data) > _REPAIRED:
        raise RefusedError("damaged, and too large to be repaired, or no PDF")
    if start > 0:
        with contextlib.suppress(pypdfium2.PdfiumError):
            rest = data[start:]
            return Opened(pypdfium2.PdfDocument(rest), rest, f"{start} bytes before its start were left out")
    objects = Objects(data)
    if objects.encryption:
        raise RefusedError("damaged, and cannot be repaired because it is encrypted")
    try:
        written = objects.rewritten()
        return Opened(pypdfium2.PdfDocument(written), written, "its table of objects was made anew, parts may be lost")
    except (LookupError, pypdfium2.PdfiumError):
        raise RefusedError("has no pages, is damaged beyond repair, or is no PDF") from None

"""Opens PDF files: whole ones, encrypted ones, and damaged ones after a repair."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import weakref
from dataclasses import dataclass

import pypdfium2
import pypdfium2.raw as pdfium

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


def open_pdf(path: str) -> Opened:
    """Raises RefusedError for what cannot be opened."""
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError:
        if (code := pdfium.FPDF_GetLastError()) in _REASONS:
            raise RefusedError(_REASONS[code].format(Objects(mapped(path)).encryption)) from None
        return _repaired(path)
    if pdfium.FPDF_GetSecurityHandlerRevision(document) < 0:
        return Opened(document)
    return Opened(document, _decrypted(path, document))


def mapped(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        allowed = _move_limit(size)
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if allowed:
        weakref.finalize(found, _move_limit, -size)
    return found


def _move_limit(size: int) -> bool:
    """Moves the limit of addresses, for a mapped file counts for it but takes no memory. False if there is none."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_AS, (soft + size, hard))
            return True
    return False


def _decrypted(path: str, document: pypdfium2.PdfDocument) -> bytes:
    if os.path.getsize(path) > _REPAIRED:
        return b""
    copy = io.BytesIO()
    document.save(copy, flags=pdfium.FPDF_REMOVE_SECURITY)
    return copy.getvalue()


def _repaired(path: str) -> Opened:
    data = mapped(path)
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

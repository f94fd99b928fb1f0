"""Pages of PDF files, drawn by PDFium; in the decoding process only.

PDFium leaves out what it cannot decode and says nothing. So a second thread looks through the pictures of a page while
it is drawn, and what is damaged of them comes as a warning, or as an error where nothing was drawn at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import numpy as np
import pypdfium2
import pypdfium2.raw as pdfium

from cembed.runtime.pages.files import File
from cembed.runtime.pages.images import Drawn, Pixels, RefusedError, Settings
from cembed.runtime.pages.pdf.drawn import count_undrawn, is_plain, scan_scale
from cembed.runtime.pages.pdf.objects import Objects
from cembed.runtime.pages.pdf.pictures import ANY, Found, Pictures, Verdict
from cembed.runtime.pages.pdf.repair import Opened, open_pdf

_SMALL = 500.0  # points: the longer side of a page that is too small for a scan of A5
_MOST_REASONS = 3
_M_ARENA_MAX = -8  # of malloc.h
_UNKNOWN = Found(verdicts=[Verdict(doubtful=ANY)])  # of a page that only PDFium can read


class Pdf:
    """A page is drawn at `dpi`, or smaller if it would have more than max_pixels.

    A page smaller than A5 that is one scan and nothing else is drawn at the scan's own resolution if that is higher:
    what says how large the page is may be made up. Raises RefusedError.
    """

    def __init__(self, file: File, settings: Settings) -> None:
        self._settings = settings
        opened = open_pdf(file)
        self._document = opened.document
        self._document.init_forms()  # without it, fields that have been filled in stay blank
        self.pages = len(self._document)
        self._pictures = _pictures_of(file, opened)
        self.doubt = f"the file was repaired: {opened.repair}" if opened.repair else None
        self._notes = [self.doubt] if self.doubt else []
        if self._pictures and "Collection" in self._pictures.objects.catalog:
            count = pdfium.FPDFDoc_GetAttachmentCount(self._document)
            self._notes.append(f"a portfolio, of which this is the cover: the files in it ({count}) were not read")

    def page(self, number: int) -> Drawn:
        try:
            page = self._document[number - 1]
        except pypdfium2.PdfiumError:
            raise RefusedError("damaged: the page is missing in the file, or cannot be read") from None
        found = self._look(number)
        scale = self._scale(page, found.unit)
        wait = self._try_out_beside(found)
        image = np.array(page.render(scale=scale, rev_byteorder=True).to_numpy()[..., :3], order="C")
        wait()
        faults = _faults(page, image, found)
        notes = [*self._notes, *self._form_notes(page)]
        page.close()
        if faults and is_plain(image):
            raise RefusedError(f"damaged: nothing of it could be drawn: {'; '.join(faults)}")
        return Drawn(image, "; ".join(notes + faults) or None)

    def _scale(self, page: pypdfium2.PdfPage, unit: float) -> float:
        """Pixels for each unit of the page."""
        width, height = page.get_size()
        scale = self._settings.dpi / 72 * unit
        if max(width, height) * unit < _SMALL:
            scale = max(scale, scan_scale(page))
        while math.ceil(width * scale) * math.ceil(height * scale) > self._settings.max_pixels:
            scale *= 0.99
        return scale

    def _look(self, number: int) -> Found:
        try:
            return self._pictures.of_page(number) if self._pictures else _UNKNOWN
        except Exception:  # what is so damaged that only PDFium can follow it: PDFium is asked
            return _UNKNOWN

    def _try_out_beside(self, found: Found) -> Callable[[], object]:
        """Tries the pictures in a thread; the function returned waits for it."""
        if self._pictures is None or not found.untried:
            return lambda: None
        tried = second_thread().submit(self._pictures.try_out, found)
        return lambda: wait([tried])

    def _form_notes(self, page: pypdfium2.PdfPage) -> list[str]:
        kind = pdfium.FPDF_GetFormType(self._document)
        static = kind == pdfium.FORMTYPE_XFA_FOREGROUND
        stands_in = static and self.pages == 1 and not pdfium.FPDFPage_GetAnnotCount(page)
        if kind != pdfium.FORMTYPE_XFA_FULL and not stands_in:
            return []
        return ["an XFA form, which is not drawn: its pages are only what other readers are to show"]


@cache
def second_thread() -> ThreadPoolExecutor:
    """Runs already, since the decoding process can start none when it reads files.

    glibc sets addresses aside for the heap of each thread, 64 MB, which count for memory_limit: one has to do.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    executor = ThreadPoolExecutor(1)
    executor.submit(int).result()
    return executor


def _pictures_of(file: File, opened: Opened) -> Pictures | None:
    try:
        if opened.data is not None:
            return Pictures(Objects(opened.data))
        file.found = file.found or Pictures(Objects(file.mapped))  # a long document is opened again and again
        found: Pictures = file.found
        return found
    except Exception:  # only PDFium can follow it
        return None


def _faults(page: pypdfium2.PdfPage, image: Pixels, found: Found) -> list[str]:
    """What is wrong with the page, in a few words each."""
    damaged = [verdict.fault for verdict in found.verdicts if verdict.fault]
    kinds = {verdict.doubtful for verdict in found.verdicts if verdict.doubtful}
    if found.verdicts and not damaged and is_plain(image):
        kinds.add(ANY)
    least = sum(verdict.inline for verdict in found.verdicts if verdict.doubtful)
    undrawn = count_undrawn(page, image, kinds, least) if kinds else 0
    lost, pictures = len(damaged) + undrawn, max(len(found.verdicts), undrawn)
    others = list(dict.fromkeys(found.others))[:_MOST_REASONS]
    if not lost:
        return others
    which = "its picture" if pictures == 1 else f"{min(lost, pictures)} of {pictures} pictures"
    reasons = list(dict.fromkeys(damaged))[:_MOST_REASONS] or ["damaged, or of a kind that is not known"]
    return [f"{which} could not be read whole ({'; '.join(reasons)})", *others]

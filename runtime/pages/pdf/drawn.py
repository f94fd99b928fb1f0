"""What PDFium knows of the pictures on a page: where they lie, and whether it could decode them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pypdfium2
import pypdfium2.raw as pdfium

from cembed.runtime.pages.images import Pixels
from cembed.runtime.pages.pdf.pictures import ANY

_MOST = 20_000  # objects of a page that are looked at
_DEPTH = 12  # of forms in forms
_COVERED = 0.9  # of a page, by a scan
_INVISIBLE = 3  # text render mode


class Matrix(NamedTuple):
    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    def then(self, after: Matrix) -> Matrix:
        return Matrix(
            self.a * after.a + self.b * after.c,
            self.a * after.b + self.b * after.d,
            self.c * after.a + self.d * after.c,
            self.c * after.b + self.d * after.d,
            self.e * after.a + self.f * after.c + after.e,
            self.e * after.b + self.f * after.d + after.f,
        )


@dataclass(frozen=True, eq=False)
class Leaf:
    """An object of a page that is no form; `matrix` leads from its own units to the page's."""

    handle: Any
    kind: int
    matrix: Matrix

    @property
    def corners(self) -> list[tuple[float, float]]:
        """Of a picture, on the page."""
        a, b, c, d, e, f = self.matrix
        return [(e, f), (e + a, f + b), (e + c, f + d), (e + a + c, f + b + d)]

    def pixels(self) -> tuple[int, int]:
        """Width and height of a picture."""
        width, height = ctypes.c_uint(), ctypes.c_uint()
        pdfium.FPDFImageObj_GetImagePixelSize(self.handle, width, height)
        return width.value, height.value

    def filter(self) -> str:
        """The last filter of a picture, which says how it is coded."""
        text = ctypes.create_string_buffer(64)
        last = pdfium.FPDFImageObj_GetImageFilterCount(self.handle) - 1
        pdfium.FPDFImageObj_GetImageFilter(self.handle, last, text, len(text))
        return text.value.decode("latin-1")

    def decoded(self) -> Pixels | None:
        """The pixels of a picture, [height, width, channels], or None if PDFium cannot decode it."""
        if not (bitmap := pdfium.FPDFImageObj_GetBitmap(self.handle)):
            return None
        return np.array(pypdfium2.PdfBitmap.from_raw(bitmap).to_numpy())


def leaves(page: pypdfium2.PdfPage) -> Iterator[Leaf]:
    """The objects of a page and of its forms, of the first 20,000."""
    count, at, one = pdfium.FPDFPage_CountObjects, pdfium.FPDFPage_GetObject, Matrix(1, 0, 0, 1, 0, 0)
    first = zip(range(_MOST), _walk(page.raw, count, at, one, 0), strict=False)
    return (leaf for _, leaf in first if leaf.kind != pdfium.FPDF_PAGEOBJ_FORM)


def _walk(holder: Any, count: Any, at: Any, matrix: Matrix, depth: int) -> Iterator[Leaf]:
    for index in range(count(holder)):
        handle = at(holder, index)
        kind = pdfium.FPDFPageObj_GetType(handle)
        inner = (
            _matrix(handle).then(matrix) if kind in (pdfium.FPDF_PAGEOBJ_IMAGE, pdfium.FPDF_PAGEOBJ_FORM) else matrix
        )
        yield Leaf(handle, kind, inner)
        if kind == pdfium.FPDF_PAGEOBJ_FORM and depth < _DEPTH:
            forms = pdfium.FPDFFormObj_CountObjects, pdfium.FPDFFormObj_GetObject
            yield from _walk(handle, *forms, inner, depth + 1)


def _matrix(handle: Any) -> Matrix:
    found = pdfium.FS_MATRIX(1, 0, 0, 1, 0, 0)
    pdfium.FPDFPageObj_GetMatrix(handle, found)
    return Matrix(found.a, found.b, found.c, found.d, found.e, found.f)


def count_undrawn(page: pypdfium2.PdfPage, drawn: Pixels, kinds: set[str], least: int) -> int:
    """How many pictures PDFium could not decode, of those with one of these filters, or of all if ANY is one.

    There should be `least` of them at least: PDFium drops those that stand in a content.

    A picture is not tried where the page `drawn` shows something, unless that may be another picture.
    """
    pictures = [leaf for leaf in leaves(page) if leaf.kind == pdfium.FPDF_PAGEOBJ_IMAGE]
    tried = [leaf for leaf in pictures if ANY in kinds or leaf.filter() in kinds]
    undrawn = sum(
        _is_black(leaf)
        if leaf.filter() in kinds & {"DCTDecode"}
        else _is_undrawn(page, leaf, drawn, len(pictures) == 1)
        for leaf in tried
    )
    return undrawn + max(least - len(tried), 0)


def _is_black(picture: Leaf) -> bool:
    """Whether a JPEG of a doubtful kind was not decoded: PDFium leaves it black, or has nothing."""
    return (pixels := picture.decoded()) is None or not pixels.any()


def _is_undrawn(page: pypdfium2.PdfPage, picture: Leaf, drawn: Pixels, alone: bool) -> bool:
    plain, reduced = is_plain(_place(page, picture, drawn)), picture.filter() == "JPXDecode"
    if not plain and (alone or reduced):
        return False
    if (pixels := picture.decoded()) is None:
        return True
    # PDFium halves JPEG 2000 while it decodes, and draws nothing where that is more often than the picture allows.
    return plain and reduced and not is_plain(pixels)


def _place(page: pypdfium2.PdfPage, picture: Leaf, drawn: Pixels) -> Pixels:
    """The part of a drawn page where a picture lies."""
    height, width, _ = drawn.shape
    x, y = ctypes.c_int(), ctypes.c_int()
    places = []
    for corner in picture.corners:
        pdfium.FPDF_PageToDevice(page.raw, 0, 0, width, height, 0, *corner, x, y)
        places.append((min(max(x.value, 0), width), min(max(y.value, 0), height)))
    (left, right), (top, bottom) = ((min(values), max(values)) for values in zip(*places, strict=True))
    return drawn[top:bottom, left:right]


def is_plain(image: Pixels) -> bool:
    """Whether all pixels are of one colour, or there are none."""
    if not image.size:
        return True
    return bool((image[::37, ::37] == image[0, 0]).all()) and bool((image == image[0, 0]).all())


def scan_scale(page: pypdfium2.PdfPage) -> float:
    """Of a page that is a scan, in one picture or in parts: its pixels for each unit of the page. 0 for other pages.

    What a picture of the whole page covers, and text that is not to be seen, may be there too.
    """
    pictures: list[Leaf] = []
    covered, others = 0.0, False
    for leaf in leaves(page):
        if leaf.kind == pdfium.FPDF_PAGEOBJ_IMAGE:
            share = _share(page, leaf)
            if share >= _COVERED:
                pictures, covered, others = [], 0.0, False
            pictures.append(leaf)
            covered += share
        elif leaf.kind != pdfium.FPDF_PAGEOBJ_TEXT or pdfium.FPDFTextObj_GetTextRenderMode(leaf.handle) != _INVISIBLE:
            others = True
    return max(map(_resolution, pictures)) if covered >= _COVERED and not others else 0.0


def _share(page: pypdfium2.PdfPage, picture: Leaf) -> float:
    """How much of the page a picture covers."""
    left, bottom, right, top = page.get_bbox()
    x, y = (sorted(values) for values in zip(*picture.corners, strict=True))
    across, down = min(right, x[-1]) - max(left, x[0]), min(top, y[-1]) - max(bottom, y[0])
    return float(max(across, 0) * max(down, 0) / ((right - left) * (top - bottom)))


def _resolution(picture: Leaf) -> float:
    a, b, c, d, _, _ = picture.matrix
    width, height = picture.pixels()
    return max(width / (math.hypot(a, b) or math.inf), height / (math.hypot(c, d) or math.inf))

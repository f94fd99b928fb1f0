"""Walks coded pictures of PDFs from end to end with the library in native/pictures, which says what is damaged.

pip builds the library. Where it could not be built these functions raise LookupError, and most damage goes unnoticed.
"""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from cembed.runtime.compiled import compiled_library

WHOLE, UNKNOWN, HEADER, SHORT, CODE, LEFT_OVER, MISSING = range(7)  # pictures_fault of native/pictures/pictures.h


class Report(ctypes.Structure):
    """pictures_report: a fault, the size of a JPEG or of JBIG2's page (-1: open), how many of all units were whole."""

    _fields_ = (
        ("fault", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("components", ctypes.c_int32),
        ("done", ctypes.c_int64),
        ("all", ctypes.c_int64),
    )
    fault: int
    width: int
    height: int
    components: int
    done: int
    all: int


@dataclass(frozen=True)
class Fax:
    """What the data of a fax leave open: /K, /Columns, rows (0: those that come), /EncodedByteAlign, /EndOfBlock."""

    k: int
    columns: int
    rows: int
    aligned: bool
    block: bool


@cache
def load() -> ctypes.CDLL | None:
    """The library, or None and one warning where it cannot be had."""
    reason = "it was not built. Install cembed where a C++ compiler is"
    if file := compiled_library(__file__, "libpictures"):
        try:
            return _declared(ctypes.CDLL(str(file)))
        except (OSError, AttributeError) as error:
            reason = str(error)
    warnings.warn(f"damaged pictures in PDFs are not noticed without the library for it: {reason}", stacklevel=3)
    return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    number, report, flag = ctypes.c_int32, ctypes.POINTER(Report), ctypes.POINTER(ctypes.c_int32)
    data = (ctypes.c_void_p, ctypes.c_int64)
    library.pictures_jpeg.argtypes = (*data, report)
    library.pictures_fax.argtypes = (*data, number, number, number, number, number, report)
    library.pictures_jbig2.argtypes = (*data, *data, report)
    library.pictures_lzw.argtypes = (*data, number, *data, flag)
    library.pictures_runs.argtypes = (*data, *data, flag)
    library.pictures_jpeg.restype = library.pictures_fax.restype = library.pictures_jbig2.restype = None
    library.pictures_lzw.restype = library.pictures_runs.restype = ctypes.c_int64
    return library


def _needed() -> ctypes.CDLL:
    if (library := load()) is None:
        raise LookupError("libpictures was not built")
    return library


def walk_jpeg(data: bytes | memoryview) -> Report:
    report, view = Report(), _bytes(data)
    _needed().pictures_jpeg(view.ctypes.data, len(view), report)
    return report


def walk_fax(data: bytes | memoryview, fax: Fax) -> Report:
    report, view = Report(), _bytes(data)
    settings = (fax.k, fax.columns, fax.rows, fax.aligned, fax.block)
    _needed().pictures_fax(view.ctypes.data, len(view), *settings, report)
    return report


def walk_jbig2(shared: bytes, data: bytes | memoryview) -> Report:
    """`shared` are the JBIG2Globals."""
    report, first, view = Report(), _bytes(shared), _bytes(data)
    _needed().pictures_jbig2(first.ctypes.data, len(first), view.ctypes.data, len(view), report)
    return report


def decode_lzw(data: bytes | memoryview, out: npt.NDArray[np.uint8] | None, room: int, early: int) -> tuple[int, bool]:
    """Fills `out`, uint8 [room], or only counts; returns how many bytes there are and whether the data have an end.

    Stops at a code that does not exist, and when there are more than `room` bytes.
    """
    whole, view = ctypes.c_int32(), _bytes(data)
    to = None if out is None else out.ctypes.data
    return _needed().pictures_lzw(view.ctypes.data, len(view), early, to, room, whole), bool(whole.value)


def decode_runs(data: bytes | memoryview, out: npt.NDArray[np.uint8] | None, room: int) -> tuple[int, bool]:
    """The same of RunLengthDecode."""
    whole, view = ctypes.c_int32(), _bytes(data)
    to = None if out is None else out.ctypes.data
    return _needed().pictures_runs(view.ctypes.data, len(view), to, room, whole), bool(whole.value)


def _bytes(data: bytes | memoryview) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)

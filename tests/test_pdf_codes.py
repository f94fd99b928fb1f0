"""The library that walks coded pictures: whole ones of every shape are whole, and what is damaged is said where."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from cembed.runtime.pages.pdf import codes as pdf_codes
from cembed.runtime.pages.pdf.codes import CODE, HEADER, LEFT_OVER, MISSING, SHORT, UNKNOWN, WHOLE, Fax

pytestmark = pytest.mark.skipif(pdf_codes.load() is None, reason="the library was not built")

SHAPES = st.tuples(st.integers(1, 90), st.integers(1, 70))
SCANS = [
    {},
    {"progressive": True},
    {"restart_marker_blocks": 3},
    {"subsampling": 0},
    {"subsampling": 1},
    {"optimize": True},
]


def noise(shape: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8))


def jpeg(shape: tuple[int, int], seed: int, mode: str, scan: int, quality: int = 75) -> bytes:
    buffer = io.BytesIO()
    noise(shape, seed).convert(mode).save(buffer, "JPEG", quality=quality, **SCANS[scan])
    return buffer.getvalue()


def fax(bits: np.ndarray, group: int) -> list[tuple[bytes, int]]:
    """Strips, and how many rows each has."""
    buffer = io.BytesIO()
    Image.fromarray(bits).save(buffer, "TIFF", compression=f"group{group}")
    content = buffer.getvalue()
    with Image.open(io.BytesIO(content)) as opened:
        assert isinstance(opened, TiffImageFile)
        tags = opened.tag_v2
        places, lengths, rows = tags[273], tags[279], tags[278]
    return [
        (content[place : place + length], min(rows, len(bits) - index * rows))
        for index, (place, length) in enumerate(zip(places, lengths, strict=True))
    ]


@given(SHAPES, st.integers(0, 99), st.sampled_from(["RGB", "L", "CMYK"]), st.integers(0, 5), st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_whole_jpegs_are_whole(shape: tuple[int, int], seed: int, mode: str, scan: int, quality: int) -> None:
    content = jpeg(shape, seed, mode, scan, quality)
    for data in (content, content[:-2], content + b"\r\n", b"before" + content):
        found = pdf_codes.walk_jpeg(data)
        assert (found.fault, found.height, found.width) == (WHOLE, *shape)
    assert pdf_codes.walk_jpeg(content[: len(content) * 2 // 3]).fault in (SHORT, HEADER)


@given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from([3, 4]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_whole_faxes_are_whole(width: int, often: float, group: int, seed: int) -> None:
    changes = np.random.default_rng(seed).random((20, width)) < often**4
    for data, rows in fax(np.cumsum(changes, 1) % 2 == 1, group):
        settings_of = Fax(k=-1 if group == 4 else 0, columns=width, rows=rows, aligned=False, block=True)
        found = pdf_codes.walk_fax(data, settings_of)
        assert (found.fault, found.done, found.all) == (WHOLE, rows, rows)


def test_where_a_fax_is_damaged() -> None:
    bits = np.random.default_rng(0).random((100, 200)) < 0.3
    ((data, rows),) = fax(bits, 4)
    settings_of = Fax(-1, 200, rows, aligned=False, block=True)
    spoiled = data[: len(data) // 2] + bytes(20) + data[len(data) // 2 + 20 :]
    found = pdf_codes.walk_fax(spoiled, settings_of)
    assert found.fault == CODE
    assert 30 < found.done < 70
    assert pdf_codes.walk_fax(data[: len(data) // 2], settings_of).fault == SHORT
    assert pdf_codes.walk_fax(data, Fax(-1, 200, 120, aligned=False, block=True)).fault == SHORT
    assert pdf_codes.walk_fax(data, Fax(-1, 200, 0, aligned=False, block=True)).done == rows
    assert pdf_codes.walk_fax(data, Fax(-1, 0, rows, aligned=False, block=True)).fault == UNKNOWN


def test_a_fax_has_no_run_of_no_length_between_two_rows() -> None:
    """PDFium ends the row there, others do not."""
    first, row_of_none = "0010001110101", "00010000101"  # white 1, black 1, white; pass, two to the left
    bits = (first + row_of_none).ljust(32, "0")
    data = int(bits, 2).to_bytes(4, "big")
    found = pdf_codes.walk_fax(data, Fax(k=-1, columns=4, rows=2, aligned=False, block=False))
    assert (found.fault, found.done) == (CODE, 1)
    whole = int((first + "1" * 3).ljust(32, "0"), 2).to_bytes(4, "big")
    assert pdf_codes.walk_fax(whole, Fax(k=-1, columns=4, rows=2, aligned=False, block=False)).fault == WHOLE


def test_what_is_wrong_with_a_jpeg() -> None:
    content = jpeg((64, 64), 0, "L", 0)
    scan = content.index(b"\xff\xda") + 10
    assert pdf_codes.walk_jpeg(b"").fault == HEADER
    assert pdf_codes.walk_jpeg(content[:scan]).fault in (SHORT, HEADER)
    assert pdf_codes.walk_jpeg(content[:-2] + bytes(5000) + content[-2:]).fault == LEFT_OVER
    ones = content[: scan + 200] + b"\xfe" * 200 + content[scan + 400 :]
    assert pdf_codes.walk_jpeg(ones).fault in (CODE, SHORT, LEFT_OVER)
    arithmetic = content.replace(b"\xff\xc0", b"\xff\xc9", 1)
    assert pdf_codes.walk_jpeg(arithmetic).fault == UNKNOWN
    tables = content.replace(b"\xff\xdb", b"\xff\xfe", 1)  # a comment in place of quantisation
    assert pdf_codes.walk_jpeg(tables).fault == HEADER


def test_segments_that_lead_nowhere() -> None:
    page = struct.pack(">IBBBI", 0, 48, 0, 1, 19) + struct.pack(">IIIIBH", 8, 8, 0, 0, 0, 0)
    text = struct.pack(">IBBBBI", 1, 6, 1 << 5, 7, 1, 0)
    assert pdf_codes.walk_jbig2(b"", page + text).fault == MISSING
    assert pdf_codes.walk_jbig2(b"", page).fault == SHORT
    assert pdf_codes.walk_jbig2(b"", page[:-5]).fault == SHORT
    assert pdf_codes.walk_jbig2(b"", b"").fault == HEADER


@pytest.mark.parametrize("early", [0, 1])
def test_lzw_and_runs(early: int) -> None:
    """Codes of 9 bits: clear, 65, 258 = 65 65, the end."""
    codes = int("1000000000010000011000000101000000010000", 2).to_bytes(5, "big")
    out = np.zeros(9, np.uint8)
    assert pdf_codes.decode_lzw(codes, out, 9, early) == (3, True)
    assert out[:3].tobytes() == b"AAA"
    assert pdf_codes.decode_lzw(codes[:3], None, 9, early) == (1, False)
    assert pdf_codes.decode_lzw(b"\xff" * 9, None, 9, early) == (0, False)
    assert pdf_codes.decode_runs(b"\2abc\xfed\x80rest", out, 9) == (6, True)
    assert out[:6].tobytes() == b"abcddd"
    assert pdf_codes.decode_runs(b"\2ab", None, 9) == (2, False)
    assert pdf_codes.decode_runs(b"\x81a" * 99, None, 9)[0] > 9


@given(st.binary(max_size=300), st.integers(-1, 1), st.integers(1, 300), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_survived(data: bytes, k: int, columns: int, rows: int) -> None:
    for found in (
        pdf_codes.walk_jpeg(data),
        pdf_codes.walk_fax(data, Fax(k, columns, rows, aligned=False, block=True)),
        pdf_codes.walk_jbig2(data[:9], data[9:]),
    ):
        assert WHOLE <= found.fault <= MISSING
    pdf_codes.decode_lzw(data, np.zeros(50, np.uint8), 50, 1)
    pdf_codes.decode_runs(data, np.zeros(50, np.uint8), 50)

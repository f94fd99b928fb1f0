"""How large pages of PDFs are drawn, and files that stand for something else, are locked or are damaged as a whole."""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pdf_files
import pytest
from pdf_files import DRAWN, about, page, pictures, stream

from cembed.runtime.pages.documents import Page, PageReader
from cembed.runtime.pages.files import File
from cembed.runtime.pages.images import RefusedError, Settings
from cembed.runtime.pages.pdf.objects import Objects
from cembed.runtime.pages.pdf.pages import Pdf
from cembed.runtime.pages.pdf.values import Reference, read_value

PICTURE = pictures()["flate"].object()
SCAN = zlib.compress(np.random.default_rng(0).integers(0, 255, (560, 400), dtype=np.uint8).tobytes())
SCANNED = stream(SCAN, about((400, 560), b"/FlateDecode", b"/DeviceGray"))
TINY = b"0 0 30 42"
WHOLE_PAGE = b"q 30 0 0 42 0 0 cm /P Do Q "
HIDDEN_TEXT = b"BT 3 Tr /T 9 Tf (a) Tj ET "
RESOURCES = b"/XObject << /P 5 0 R >> /Font << /T << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >>"


def opened(tmp_path: Path, content: bytes, dpi: float = 72, max_pixels: int = 10_000_000) -> Pdf:
    (tmp_path / "a.pdf").write_bytes(content)
    return Pdf(File.at(tmp_path / "a.pdf"), Settings(dpi, max_pixels, None))


def size(tmp_path: Path, content: bytes, dpi: float = 72, max_pixels: int = 10_000_000) -> tuple[int, int]:
    """Width and height of the first page."""
    height, width, _ = opened(tmp_path, content, dpi, max_pixels).page(1).image.shape
    return width, height


# ---- sizes


@pytest.mark.parametrize(
    ("unit", "expected"),
    [(b"10", (300, 400)), (b"0.5", (15, 20)), (b"0", (30, 40)), (b"-3", (30, 40)), (b"/Ten", (30, 40)),
     (b"1e9", (30, 40)), (b"5 0 R", (90, 120))],
)  # fmt: skip
def test_units_may_be_larger_than_a_point(tmp_path: Path, unit: bytes, expected: tuple[int, int]) -> None:
    content = page(b"", b"3", about=b"/UserUnit " + unit, box=b"0 0 30 40", resources=b"")
    assert size(tmp_path, content) == expected


def test_large_units_keep_to_max_pixels(tmp_path: Path) -> None:
    content = page(b"", about=b"/UserUnit 75000", box=b"0 0 200 100", resources=b"")
    width, height = size(tmp_path, content, max_pixels=90_000)
    assert 80_000 < width * height <= 90_000
    assert width / height == pytest.approx(2, rel=0.02)


SCANS = {
    "one picture": (WHOLE_PAGE, (400, 560)),
    "with hidden text": (WHOLE_PAGE + HIDDEN_TEXT, (400, 560)),
    "over something": (b"0 0 9 9 re f " + WHOLE_PAGE, (400, 560)),
    "in two parts": (b"q 30 0 0 21 0 0 cm /P Do Q q 30 0 0 21 0 21 cm /P Do Q", (800, 1120)),
    "a little smaller than the page": (b"q 29 0 0 41 0 0 cm /P Do Q", (414, 580)),
}


@pytest.mark.parametrize("kind", SCANS)
def test_a_scan_in_a_tiny_box_is_drawn_at_its_own_resolution(tmp_path: Path, kind: str) -> None:
    content, expected = SCANS[kind]
    assert size(tmp_path, page(content, SCANNED, box=TINY, resources=RESOURCES)) == expected


@pytest.mark.parametrize(
    ("content", "box", "dpi", "expected"),
    [
        (WHOLE_PAGE + b"0 0 9 9 re f", TINY, 72, (30, 42)),  # something else can be seen
        (b"q 15 0 0 21 0 0 cm /P Do Q", TINY, 72, (30, 42)),  # a picture on a page
        (b"", TINY, 72, (30, 42)),
        (b"q 595 0 0 842 0 0 cm /P Do Q", b"0 0 595 842", 36, (298, 421)),  # a page as large as pages are
        (WHOLE_PAGE, TINY, 1440, (600, 840)),  # dpi asks for more
    ],
)
def test_other_pages_are_drawn_at_dpi(
    tmp_path: Path, content: bytes, box: bytes, dpi: float, expected: tuple[int, int]
) -> None:
    assert size(tmp_path, page(content, SCANNED, box=box, resources=RESOURCES), dpi) == expected


def test_a_scan_may_be_turned_cropped_and_over_max_pixels(tmp_path: Path) -> None:
    turned = page(WHOLE_PAGE, SCANNED, box=TINY, about=b"/Rotate 90")
    assert size(tmp_path, turned) == (560, 400)
    cropped = page(WHOLE_PAGE, SCANNED, box=TINY, about=b"/CropBox [0 0 15 42]")
    assert size(tmp_path, cropped) == (200, 560)
    width, height = size(tmp_path, page(WHOLE_PAGE, SCANNED, box=TINY), max_pixels=50_000)
    assert 45_000 < width * height <= 50_000
    within = stream(WHOLE_PAGE, b"/Type /XObject /Subtype /Form /BBox [0 0 30 42] /Matrix [.5 0 0 .5 0 0]"
                    b" /Resources << /XObject << /P 5 0 R >> >>")  # fmt: skip
    form = page(b"2 0 0 2 0 0 cm /F Do", SCANNED, within, box=TINY, resources=b"/XObject << /F 6 0 R >>")
    assert size(tmp_path, form) == (400, 560)


# ---- what stands for something else


def test_the_cover_of_a_portfolio_says_what_it_is(tmp_path: Path) -> None:
    files = b"/Names << /EmbeddedFiles << /Names [(a) << /Type /Filespec /F (a) /EF << /F 5 0 R >> >>] >> >>"
    attached = stream(b"text", b"/Type /EmbeddedFile")
    warning = opened(tmp_path, page(b"", attached, catalog=files + b" /Collection << /View /D >>")).page(1).warning
    assert warning == "a portfolio, of which this is the cover: the files in it (1) were not read"
    assert opened(tmp_path, page(b"", attached, catalog=files)).page(1).warning is None


@pytest.mark.parametrize(
    ("catalog", "about_page", "expected"),
    [
        (b"/NeedsRendering true /AcroForm << /Fields [] /XFA 5 0 R >>", b"", True),
        (b"/AcroForm << /Fields [] /XFA 5 0 R >>", b"", True),  # nothing to fill in on its only page
        (b"/AcroForm << /Fields [6 0 R] /XFA 5 0 R >>", b"/Annots [6 0 R]", False),
        (b"/AcroForm << /Fields [6 0 R] >>", b"/Annots [6 0 R]", False),
    ],
)
def test_forms_that_only_their_makers_draw_say_so(
    tmp_path: Path, catalog: bytes, about_page: bytes, expected: bool
) -> None:
    field = b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (a) /F 4 /Rect [10 10 90 40] >>"
    content = page(b"0 0 9 9 re f", stream(b"<xdp/>"), field, catalog=catalog, about=about_page, resources=b"")
    assert ("XFA" in (opened(tmp_path, content).page(1).warning or "")) == expected


# ---- what is locked, or damaged as a whole


def test_ways_of_locking_are_told_apart(tmp_path: Path) -> None:
    strange = b"/ID [(a) (a)] /Encrypt << /Filter /Strange /V 9 /R 9 >>"
    with pytest.raises(RefusedError, match=r"cannot be read .*Strange"):
        opened(tmp_path, pdf_files.pdf([b"<< /Type /Catalog >>"], strange))
    with pytest.raises(RefusedError, match="is no PDF"):
        opened(tmp_path, b"Dear Sir or Madam")


WHOLE = page(DRAWN, PICTURE)
PACKED = pdf_files.compressed(
    [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R /Resources 6 0 R >>",
        stream(DRAWN),
        PICTURE,
        b"<< /XObject << /P 5 0 R >> >>",
    ]
)
BROKEN = {
    "rubbish before it": b"rubbish\n" * 300 + WHOLE,
    "much rubbish before it": bytes(50_000) + WHOLE,
    "rubbish before what was cut": b"rubbish\n" * 300 + WHOLE[: WHOLE.rindex(b"trailer")],
    "no trailer": WHOLE[: WHOLE.rindex(b"trailer")],
    "half a trailer": WHOLE[: WHOLE.rindex(b"/Root")],
    "no table": WHOLE[: WHOLE.rindex(b"xref\n0")],
    "no end of the last object": WHOLE[: WHOLE.rindex(b"endstream")],
    "no head": WHOLE[9:],
    "a wrong length": WHOLE[: WHOLE.rindex(b"xref\n0")].replace(b"/Length 28", b"/Length 9999"),
    "objects in a stream, and no table": PACKED[: PACKED.rindex(b"/XRef") - 40],
    "objects in a stream, and half a table": PACKED[:-60],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_damaged_files_are_repaired_and_say_so(tmp_path: Path, kind: str) -> None:
    expected = opened(tmp_path, WHOLE).page(1)
    document = opened(tmp_path, BROKEN[kind])
    drawn = document.page(1)
    assert document.pages == 1
    assert (drawn.warning or "").startswith("the file was repaired: ")
    assert np.array_equal(drawn.image, expected.image)


def test_what_a_cut_file_has_lost_is_told(tmp_path: Path) -> None:
    """Object 5, the picture, is the last one: first its end is missing, then all of it."""
    warning = opened(tmp_path, WHOLE[: WHOLE.index(b"5 0 obj") + 3000]).page(1).warning or ""
    assert "repaired" in warning
    assert "its picture could not be read whole (FlateDecode: its data end early" in warning
    with pytest.raises(RefusedError, match="nothing of it could be drawn: a picture or form that it draws is missing"):
        opened(tmp_path, WHOLE[: WHOLE.index(b"5 0 obj")]).page(1)


def test_a_page_that_is_lost_is_an_error_and_the_others_are_read(tmp_path: Path) -> None:
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R 5 0 R] /Count 2 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 60 80] /Contents 4 0 R >>",
        stream(b"0 0 9 9 re f"),
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 60 80] /Contents 4 0 R >>",
    ]
    content = pdf_files.pdf(objects)
    document = opened(tmp_path, content[: content.index(b"5 0 obj")])
    assert document.pages == 2
    assert "repaired" in (document.page(1).warning or "")
    with pytest.raises(RefusedError, match="the page is missing in the file"):
        document.page(2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS")
def test_a_file_may_be_larger_than_the_memory_that_is_allowed(tmp_path: Path) -> None:
    """A hole of 300 MB in the file, in a stream that nothing uses."""
    whole, hole = page(DRAWN, PICTURE, stream(b"", b"/Unused true")), 300 << 20
    start = whole.rindex(b"\nendstream")
    head = whole[:start].replace(b"/Length 0 /Unused", b"/Length %d /Unused" % hole)
    table = whole.rindex(b"xref\n0")
    tail = whole[start:].replace(b"startxref\n%d" % table, b"startxref\n%d" % (table + hole + len(head) - start))
    with open(tmp_path / "a.pdf", "wb") as file:
        file.write(head)
        file.seek(hole, os.SEEK_CUR)
        file.write(tail)
    with PageReader(dpi=72, memory_limit=100 << 20) as reader:
        (drawn,) = reader.read([tmp_path / "a.pdf"])
    assert isinstance(drawn, Page), drawn
    assert drawn.warning is None


# ---- objects


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"<< /A 1 /B#20C (a(b)\\)) /D [1 0 R -2.5 <4 1> true null] >>",
         {"A": 1, "B C": b"a(b)\\)", "D": [Reference(1), -2.5, b"A", True, None]}),
        (b"% note\n[ /A/B<<>>]", ["A", "B", {}]),
        (b"12 0 R", Reference(12)),
        (b"12 0 Rest", 12),
    ],
)  # fmt: skip
def test_values_are_read(text: bytes, expected: object) -> None:
    assert read_value(text, 0)[0] == expected


@pytest.mark.parametrize("text", [b"", b"<< /A 1", b"[1 2", b"(open", b">>", b"endobj", b"[" * 60 + b"]" * 60])
def test_what_is_no_value_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"no value|invalid literal"):
        read_value(text, 0)


def test_the_last_object_with_a_number_counts() -> None:
    old = pdf_files.pdf([b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Kids [] >>", stream(b"9 0 obj\n1\nendobj")])
    objects = Objects(old + b"2 0 obj\n<< /Kids [7 0 R] >>\nendobj\n7 0 obj\n<< /Type /Page /Rotate 90 >>\nendobj\n")
    assert objects.page(1)["Rotate"] == 90
    assert objects.page(2) == {}
    assert objects.get(Reference(9)) is None  # inside of a stream


@pytest.mark.parametrize("kids", [b"[2 0 R 3 0 R]", b"[[2 0 R]]", b"2 0 R", b"(a)"])
def test_trees_of_pages_may_lead_back(kids: bytes) -> None:
    objects = Objects(
        pdf_files.pdf([b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Kids %s >>" % kids, b"<< /Kids 3 0 R >>"])
    )
    assert objects.page(1) == {}

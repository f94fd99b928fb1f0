"""Damaged pictures in PDFs, in every way of coding and place to be drawn: never without a word. Whole ones: none."""

from __future__ import annotations

import base64
import shutil
import zlib
from pathlib import Path

import numpy as np
import pdf_files
import pytest
from pdf_files import DRAWN, FRAMED, Coded, about, image, page, pictures, saved, stream

from cembed.runtime.pages.files import File
from cembed.runtime.pages.images import Drawn, RefusedError, Settings
from cembed.runtime.pages.pdf import codes as pdf_codes
from cembed.runtime.pages.pdf.pages import Pdf

SIZE = (pdf_files.WIDTH, pdf_files.HEIGHT)
PICTURES = pictures()
JPEG, FLATE = PICTURES["jpeg"], PICTURES["flate"]
UNNOTICED = {"plain", "jpeg 2000", "jpeg 2000, codestream", "jbig2, text"}
"""Holes make other pixels of these; of the last one because its code is a few bytes."""
needs_library = pytest.mark.skipif(pdf_codes.load() is None, reason="the library was not built")


def read(tmp_path: Path, content: bytes, dpi: float = 72) -> Drawn:
    (tmp_path / "a.pdf").write_bytes(content)
    return Pdf(File.at(tmp_path / "a.pdf"), Settings(dpi, 10_000_000, None)).page(1)


def told(tmp_path: Path, content: bytes, dpi: float = 72) -> str | None:
    """The warning, or why there is no page."""
    try:
        return read(tmp_path, content, dpi).warning
    except RefusedError as error:
        return str(error)


def test_the_library_is_built_where_it_can_be() -> None:
    assert pdf_codes.load() is not None or shutil.which("c++") is None


# ---- ways of coding


@pytest.mark.parametrize("kind", PICTURES)
def test_a_whole_picture_is_drawn_without_a_word(tmp_path: Path, kind: str) -> None:
    drawn = read(tmp_path, PICTURES[kind].on_page())
    assert drawn.warning is None
    assert drawn.image.std() > 5


@needs_library
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_that_was_cut_is_told(tmp_path: Path, kind: str, share: float) -> None:
    assert "picture could not be read whole" in (told(tmp_path, PICTURES[kind].cut(share).on_page(FRAMED)) or "")


@needs_library
@pytest.mark.parametrize("part", [(0.3, 0.5), (0.8, 0.9)])
@pytest.mark.parametrize("kind", sorted(PICTURES.keys() - UNNOTICED))
def test_a_picture_with_a_hole_is_told(tmp_path: Path, kind: str, part: tuple[float, float]) -> None:
    assert "picture could not be read whole" in (told(tmp_path, PICTURES[kind].zeroed(*part).on_page(FRAMED)) or "")


@needs_library
@pytest.mark.parametrize("start", [0.1, 0.2, 0.3, 0.4, 0.5])
@pytest.mark.parametrize("kind", sorted(kind for kind in PICTURES if kind.startswith("jbig2")))
def test_jbig2_that_ends_in_zeros_is_told(tmp_path: Path, kind: str, start: float) -> None:
    """They may decode up to the end, and PDFium draws what they make."""
    assert "picture could not be read whole" in (told(tmp_path, PICTURES[kind].zeroed(start, 1).on_page(FRAMED)) or "")


@needs_library
@pytest.mark.parametrize(("kind", "head"), [("jbig2", 41), ("jbig2, text", 42)])
@pytest.mark.parametrize("field", range(4))
def test_jbig2_whose_region_lies_off_its_page_is_told(tmp_path: Path, kind: str, head: int, field: int) -> None:
    """Its width, height, x or y is 40 more; PDFium draws what is left on the page, if anything is."""
    data, at = bytearray(PICTURES[kind].data), head + 4 * field
    data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") + 40).to_bytes(4, "big")
    assert "picture could not be read whole" in (
        told(tmp_path, Coded(bytes(data), PICTURES[kind].about).on_page()) or ""
    )


@needs_library
@pytest.mark.parametrize("kind", ["jpeg", "jpeg, progressive", "jpeg, restarts", "jpeg, grey", "flate", "lzw"])
def test_most_single_bytes_that_change_the_page_are_told(tmp_path: Path, kind: str) -> None:
    coded, generator, missed = PICTURES[kind], np.random.default_rng(1), []
    whole = read(tmp_path, coded.on_page()).image.astype(int)
    for place in generator.integers(len(coded.data) // 4, len(coded.data) - 2, 40):
        data = bytearray(coded.data)
        data[place] ^= 1 << generator.integers(8)
        content = Coded(bytes(data), coded.about).on_page()
        if told(tmp_path, content) is None:
            changed = np.abs(read(tmp_path, content).image - whole).max(axis=-1) > 64
            missed += [place] if changed.mean() > 0.05 else []
    assert len(missed) <= 4, missed


HARMLESS = {
    "no end of a JPEG": Coded(JPEG.data[:-2], JPEG.about),
    "a line end after a JPEG": Coded(JPEG.data + b"\r\n", JPEG.about),
    "zeros after a JPEG": Coded(JPEG.data + bytes(99), JPEG.about),
    "zeros before the end of a JPEG": Coded(JPEG.data[:-2] + bytes(20) + JPEG.data[-2:], JPEG.about),
    "rubbish before the end of a JPEG": Coded(JPEG.data[:-2] + bytes(range(1, 200)) + JPEG.data[-2:], JPEG.about),
    "no checksum": Coded(FLATE.data[:-4], FLATE.about),
    "half a checksum": Coded(FLATE.data[:-2], FLATE.about),
    "more rows than it says": Coded(zlib.compress(image().tobytes() + bytes(900)), FLATE.about),
    "more pixels than it says": Coded(PICTURES["plain"].data + bytes(5000), PICTURES["plain"].about),
    "no end of a fax": Coded(PICTURES["fax, group 4"].data[:-3], PICTURES["fax, group 4"].about),
    "spaces in ASCII85": Coded(
        PICTURES["flate in ascii85"].data.replace(b"a", b"\na"), PICTURES["flate in ascii85"].about
    ),
    "no end of ASCII85": Coded(PICTURES["flate in ascii85"].data[:-2], PICTURES["flate in ascii85"].about),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_loses_no_pixel_is_not_told(tmp_path: Path, kind: str) -> None:
    assert told(tmp_path, HARMLESS[kind].on_page()) is None


WRONG = {
    "an unknown filter": (Coded(FLATE.data, about(SIZE, b"/Sharp")), "Sharp is no known filter"),
    "no size": (Coded(FLATE.data, about((0, 80), b"/FlateDecode")), "no size"),
    "a colour space that is missing": (Coded(FLATE.data, about(SIZE, b"/FlateDecode", b"99 0 R")), "colour space"),
    "a colour space that is unknown": (Coded(FLATE.data, about(SIZE, b"/FlateDecode", b"/Murky")), "colour space"),
    "a mask that is missing": (
        Coded(FLATE.data, about(SIZE, b"/FlateDecode", more=b"/SMask 99 0 R")),
        "mask is missing",
    ),
    "no picture at all": (Coded(bytes(range(200)), JPEG.about), "no such picture"),
    "a wrong checksum": (Coded(FLATE.data[:-1] + b"?", FLATE.about), "checksum"),
    "too few pixels": (Coded(PICTURES["plain"].data[:7200], PICTURES["plain"].about), "50 % are there"),
    "no JBIG2Globals": (
        Coded(PICTURES["jbig2, text"].data, PICTURES["jbig2, text"].about.replace(b"6 0 R", b"99 0 R")),
        "JBIG2Globals",
    ),
    "empty JBIG2Globals": (Coded(PICTURES["jbig2, text"].data, PICTURES["jbig2, text"].about), "JBIG2Globals"),
}


@needs_library
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said(tmp_path: Path, kind: str) -> None:
    coded, message = WRONG[kind]
    assert message in (told(tmp_path, coded.on_page(FRAMED)) or "")


def test_a_page_on_which_nothing_was_drawn_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="nothing of it could be drawn: its picture could not be read"):
        read(tmp_path, Coded(b"no JPEG", JPEG.about).on_page())
    assert "its picture" in (read(tmp_path, Coded(b"no JPEG", JPEG.about).on_page(FRAMED)).warning or "")


def test_a_blank_page_without_damage_is_none(tmp_path: Path) -> None:
    white = Coded(zlib.compress(bytes([255]) * 14400), FLATE.about)
    for content in (page(b""), white.on_page()):
        assert (read(tmp_path, content).image == 255).all()
        assert told(tmp_path, content) is None


def test_jpeg_2000_that_pdfium_reduces_too_much_is_told(tmp_path: Path) -> None:
    """It asks for a quarter of the size, and draws nothing if the picture can only be halved."""
    coded = Coded(saved(image(), "JPEG2000", num_resolutions=2), about(SIZE, b"/JPXDecode", b""))
    assert told(tmp_path, coded.on_page(), dpi=72) is None
    assert "picture" in (told(tmp_path, coded.on_page(), dpi=1) or "")


# ---- places

CUT = FLATE.cut(0.5)
FORM = b"/Type /XObject /Subtype /Form /BBox [0 0 600 800] /Resources << /XObject << /P 5 0 R >> >>"
IN_FORM = b"/Type /XObject /Subtype /Form /BBox [0 0 600 800] /Resources << /XObject << /F 6 0 R >> >>"
TILE = FORM.replace(
    b"/XObject /Subtype /Form", b"/Pattern /PatternType 1 /PaintType 1 /TilingType 1 /XStep 600 /YStep 800"
)
GROUP = FORM + b" /Group << /S /Transparency /CS /DeviceGray >>"


def masked(mask: Coded, key: bytes) -> bytes:
    return page(DRAWN, Coded(FLATE.data, FLATE.about + b" /%s 6 0 R" % key).object(), mask.object())


def grey(coded: Coded) -> Coded:
    whole = zlib.compress(image("L").tobytes())
    return Coded(whole[: len(whole) // 2] if coded is CUT else whole, about(SIZE, b"/FlateDecode", b"/DeviceGray"))


def stencil(coded: Coded) -> Coded:
    whole = PICTURES["flate, stencil"]
    return whole.cut(0.5) if coded is CUT else whole


def indexed(coded: Coded) -> bytes:
    table = zlib.compress(bytes(range(96)) * 8)
    space = b"[/Indexed /DeviceRGB 255 6 0 R]"
    pixels = Coded(zlib.compress(image("L").tobytes()), about(SIZE, b"/FlateDecode", space))
    table = table[: len(table) // 2] if coded is CUT else table
    return page(DRAWN, pixels.object(), stream(table, b"/Filter /FlateDecode"))


def inline(coded: Coded, name: bytes = b"/Fl") -> bytes:
    data = base64.a85encode(coded.data) + b"~>"
    about = b"/W 60 /H 80 /BPC 8 /CS /RGB /F [/A85 %s]" % name
    return page(b"q 600 0 0 800 0 0 cm BI %s ID %s\nEI Q 9 9 9 9 re f" % (about, data))


def annotated(coded: Coded) -> bytes:
    stamp = b"<< /Type /Annot /Subtype /Stamp /F 4 /Rect [0 0 600 800] /AP << /N 6 0 R >> >>"
    return page(b"", coded.object(), stream(DRAWN, FORM), stamp, resources=b"", about=b"/Annots [7 0 R]")


def as_glyph(coded: Coded) -> bytes:
    font = (
        b"<< /Type /Font /Subtype /Type3 /FontBBox [0 0 600 800] /FontMatrix [1 0 0 1 0 0] /CharProcs << /a 6 0 R >>"
        b" /Encoding << /Differences [97 /a] >> /FirstChar 97 /LastChar 97 /Widths [600]"
        b" /Resources << /XObject << /P 5 0 R >> >> >>"
    )
    glyph = stream(b"600 0 d0 " + DRAWN)
    return page(b"BT /T 1 Tf (a) Tj ET", coded.object(), glyph, font, resources=b"/Font << /T 7 0 R >>")


PLACES = {
    "a form": lambda coded: page(b"/F Do", coded.object(), stream(DRAWN, FORM), resources=b"/XObject << /F 6 0 R >>"),
    "a form in a form": lambda coded: page(
        b"/F Do", coded.object(), stream(DRAWN, FORM), stream(b"/F Do", IN_FORM), resources=b"/XObject << /F 7 0 R >>"
    ),
    "a pattern": lambda coded: page(
        b"/Pattern cs /T scn 0 0 600 800 re f",
        coded.object(),
        stream(DRAWN, TILE),
        resources=b"/Pattern << /T 6 0 R >>",
    ),
    "a soft mask": lambda coded: page(
        b"/G gs 0 0 1 rg 0 0 600 800 re f",
        coded.object(),
        stream(DRAWN, GROUP),
        resources=b"/ExtGState << /G << /SMask << /S /Luminosity /G 6 0 R >> >> >>",
    ),
    "a content": inline,
    "an annotation": annotated,
    "a glyph": as_glyph,
    "a mask of levels": lambda coded: masked(grey(coded), b"SMask"),
    "a mask of bits": lambda coded: masked(stencil(coded), b"Mask"),
    "a palette": indexed,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_picture_is_found_wherever_it_is(tmp_path: Path, place: str) -> None:
    drawn = read(tmp_path, PLACES[place](FLATE))
    assert drawn.warning is None
    assert drawn.image.std() > 20
    assert "early" in (told(tmp_path, PLACES[place](CUT)) or "")


@pytest.mark.parametrize("field", ["kind", "precision", "height", "width", "components"])
def test_a_jpeg_that_pdfium_drops_is_told(tmp_path: Path, field: str) -> None:
    """PDFium draws it black, or keeps no object of a picture in a content."""
    whole = JPEG.data
    assert read(tmp_path, inline(Coded(whole, b""), b"/DCT")).warning is None
    start, count, value = {
        "kind": (1, 1, 0xCB),
        "precision": (4, 1, 9),
        "height": (5, 2, 0),
        "width": (7, 2, 0),
        "components": (9, 1, 0),
    }[field]
    at = whole.index(b"\xff\xc0") + start
    damaged = whole[:at] + value.to_bytes(count, "big") + whole[at + count :]
    assert "picture" in (told(tmp_path, inline(Coded(damaged, b""), b"/DCT")) or "")


def test_pictures_are_counted_and_those_not_drawn_are_not_looked_at(tmp_path: Path) -> None:
    both = b"/XObject << /P 5 0 R /Q 6 0 R >>"
    content = page(DRAWN + b" q 99 0 0 99 0 0 cm /Q Do Q", FLATE.object(), CUT.object(), resources=both)
    assert "1 of 2 pictures could not be read whole (FlateDecode: its data end early" in (told(tmp_path, content) or "")
    assert told(tmp_path, page(DRAWN, FLATE.object(), CUT.object(), resources=both)) is None


def test_pictures_that_every_page_draws_are_told_on_every_page(tmp_path: Path) -> None:
    pages = [b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 3 0 R >>"] * 3
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [5 0 R 6 0 R 7 0 R] /Count 3 /Resources << /XObject << /P 4 0 R >> >> >>",
        stream(FRAMED),
        CUT.object(),
        *pages,
    ]
    (tmp_path / "a.pdf").write_bytes(pdf_files.pdf(objects))
    document = Pdf(File.at(tmp_path / "a.pdf"), Settings(72, 10_000_000, None))
    assert all("early" in (document.page(number).warning or "") for number in (1, 2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (page(b"/Q Do 9 9 99 99 re f"), "a picture or form that it draws is missing"),
        (page(DRAWN + b" 9 9 99 99 re f", resources=b"/XObject << /P 99 0 R >>"), "is missing"),
        (page(b"").replace(b"/Contents 4 0 R", b"/Contents 9 0 R"), "its content is missing"),
        (page(b"").replace(b"/Contents 4 0 R", b"/Contents [4 0 R 9 0 R]"), "a part of its content is missing"),
    ],
)
def test_what_is_missing_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in (told(tmp_path, content) or "")


def test_damaged_contents_and_fonts_are_told(tmp_path: Path) -> None:
    data = zlib.compress(b"0 0 9 9 re f " * 500)
    whole = page(b"").replace(stream(b""), stream(data, b"/Filter /FlateDecode"))
    cut = page(b"").replace(stream(b""), stream(data[:-20], b"/Filter /FlateDecode"))
    flushed = zlib.compressobj()
    open_end = flushed.compress(b"0 0 9 9 re f") + flushed.flush(zlib.Z_SYNC_FLUSH)
    left_open = page(b"").replace(stream(b""), stream(open_end, b"/Filter /FlateDecode"))
    assert told(tmp_path, whole) is None
    assert "its content: FlateDecode: its data end early" in (told(tmp_path, cut) or "")
    assert told(tmp_path, left_open) is None
    font = b"<< /Type /Font /Subtype /TrueType /BaseFont /A /FontDescriptor << /FontFile2 6 0 R >> >>"
    content = page(
        b"BT /T 9 Tf ET", font, stream(data[:-20], b"/Filter /FlateDecode"), resources=b"/Font << /T 5 0 R >>"
    )
    assert "a font: FlateDecode" in (told(tmp_path, content) or "")


@pytest.mark.parametrize("kind", ["flate", "fax, group 4", "jbig2"])
def test_encrypted_pictures_are_looked_through_too(tmp_path: Path, kind: str) -> None:
    assert told(tmp_path, pdf_files.encrypted(PICTURES[kind])) is None
    if pdf_codes.load() is not None:
        assert "picture" in (told(tmp_path, pdf_files.encrypted(PICTURES[kind].cut(0.5))) or "")


def test_objects_in_streams_are_found(tmp_path: Path) -> None:
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 60 80] /UserUnit 10 /Contents 4 0 R /Resources 6 0 R >>",
        stream(b"q 60 0 0 80 0 0 cm /P Do Q"),
        Coded(CUT.data, about(SIZE, b"/FlateDecode", b"7 0 R")).object(),
        b"<< /XObject << /P 5 0 R >> >>",
        b"/DeviceRGB",
    ]
    drawn = read(tmp_path, pdf_files.compressed(objects))
    assert drawn.image.shape == (800, 600, 3)
    assert "its picture could not be read whole (FlateDecode: its data end early" in (drawn.warning or "")


@pytest.mark.parametrize("seed", range(40))
def test_no_damage_is_an_error_of_ours(tmp_path: Path, seed: int) -> None:
    """Bytes changed anywhere in a file: a page, or a reason."""
    generator = np.random.default_rng(seed)
    content = bytearray(PICTURES[sorted(PICTURES)[seed % len(PICTURES)]].on_page())
    for place in generator.integers(0, len(content), 1 + seed % 9):
        content[place] = generator.integers(256)
    told(tmp_path, bytes(content))

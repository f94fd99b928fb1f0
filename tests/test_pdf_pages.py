"""Pages of PDF files that PDFium would leave out, draw in part, or take for something else: never without a word."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cembed.runtime.pages.documents import Page, PageError, PageReader

CASES = Path(__file__).parent / "cases"
FILTERS = {"DCTDecode": "RGB", "CCITTFaxDecode": "1", "JPXDecode": "RGBA"}
"""As Pillow writes pictures of a mode."""


@pytest.fixture(scope="module")
def reader() -> Iterator[PageReader]:
    with PageReader(dpi=72) as shared:
        yield shared


def read(reader: PageReader, path: Path) -> list[Page | PageError]:
    return list(reader.read([path]))


def warning_of(reader: PageReader, path: Path) -> str | None:
    (page,) = read(reader, path)
    assert isinstance(page, Page), page
    return page.warning


def told(reader: PageReader, path: Path) -> str | None:
    """What is said of a file of one page: why it cannot be read, or its warning."""
    (page,) = read(reader, path)
    return page.warning if isinstance(page, Page) else page.reason


def picture(mode: str) -> Image.Image:
    rows, columns = np.indices((240, 160))
    noise = np.random.default_rng(0).integers(0, 40, (240, 160))
    grey = ((rows // 12 + columns // 9) % 5 * 50 + noise).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB").convert(mode)


def document(mode: str) -> bytes:
    buffer = io.BytesIO()
    picture(mode).save(buffer, "PDF")
    return buffer.getvalue()


def spoiled(content: bytes, first: float, last: float) -> bytes:
    """The file with zeros in place of a part of its largest stream: the picture's data."""
    streams = [match.span(1) for match in re.finditer(rb"stream\r?\n(.*?)\r?\nendstream", content, re.DOTALL)]
    start, end = max(streams, key=lambda span: span[1] - span[0])
    a, b = start + int((end - start) * first), start + int((end - start) * last)
    return content[:a] + bytes(b - a) + content[b:]


@pytest.mark.parametrize("name", ["ccitt_flip", "jpx_noeoc", "jpg_broken"])
def test_a_picture_that_cannot_be_decoded_whole_is_told(reader: PageReader, name: str) -> None:
    assert told(reader, CASES / f"{name}.pdf")


@pytest.mark.parametrize("name", FILTERS)
def test_a_whole_picture_has_no_warning(reader: PageReader, tmp_path: Path, name: str) -> None:
    (tmp_path / "a.pdf").write_bytes(document(FILTERS[name]))
    assert name.encode() in (tmp_path / "a.pdf").read_bytes()
    assert warning_of(reader, tmp_path / "a.pdf") is None


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, part) for name in ("DCTDecode", "CCITTFaxDecode") for part in ((0, 0.1), (0.3, 0.6), (0.8, 0.9))),
        *((name, part) for name in FILTERS for part in ((0, 0.1), (0.5, 1))),
    ],
)
def test_a_spoiled_picture_is_told(reader: PageReader, tmp_path: Path, name: str, part: tuple[float, float]) -> None:
    """Zeros in the middle of JPEG 2000 data become other pixels, which no decoder notices."""
    (tmp_path / "a.pdf").write_bytes(spoiled(document(FILTERS[name]), *part))
    assert told(reader, tmp_path / "a.pdf")


@pytest.mark.parametrize(("name", "size"), [("userunit10", (300, 400)), ("scan_tiny_box", (400, 560))])
def test_the_size_of_a_page(reader: PageReader, name: str, size: tuple[int, int]) -> None:
    """Units may be larger than 1/72 inch, and a scan in a tiny box has a resolution of its own."""
    (page,) = read(reader, CASES / f"{name}.pdf")
    assert isinstance(page, Page), page
    assert page.image.shape[1::-1] == size
    assert page.warning is None


def test_a_portfolio_is_told(reader: PageReader) -> None:
    assert "portfolio" in (told(reader, CASES / "portfolio.pdf") or "")


@pytest.mark.parametrize("kind", ["junk", "no trailer", "cut"])
def test_a_damaged_file_is_repaired_and_told(reader: PageReader, tmp_path: Path, kind: str) -> None:
    """PDFium itself reads a file without the place of its table; that pages are lost it would show by their errors."""
    whole = (CASES / "five.pdf").read_bytes()
    tail = whole.rindex(b"startxref")
    content = {"junk": b"x" * 2048 + whole, "no trailer": whole[: whole.rindex(b"trailer")], "cut": whole[:tail]}[kind]
    (tmp_path / "five.pdf").write_bytes(content)
    pages = read(reader, tmp_path / "five.pdf")
    assert len(pages) == 5
    before = read(reader, CASES / "five.pdf")
    for page, old in zip(pages, before, strict=True):
        assert isinstance(page, Page), page
        assert isinstance(old, Page), old
        assert np.array_equal(page.image, old.image)
        assert ("repaired" in (page.warning or "")) == (kind != "cut")
    assert reader.page_count(tmp_path / "five.pdf") == (5 if kind == "cut" else None)


def test_an_unknown_way_of_encrypting_is_named(reader: PageReader, tmp_path: Path) -> None:
    content = (CASES / "five.pdf").read_bytes()
    root = re.search(rb"/Root \d+ 0 R", content)
    assert root is not None
    strange = root[0] + b" /ID [(a) (a)] /Encrypt << /Filter /Strange /V 9 /R 9 >>"
    (tmp_path / "a.pdf").write_bytes(content.replace(root[0], strange))
    (error,) = read(reader, tmp_path / "a.pdf")
    assert isinstance(error, PageError), error
    assert "Strange" in error.reason

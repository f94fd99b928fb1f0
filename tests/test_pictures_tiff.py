"""TIFF pages against the colours that were written; the files are made here, the decoding process is the real one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiff_grid
from PIL import Image
from tiffs import (
    BLACK,
    DEFLATE,
    FAX,
    G4,
    JPEG,
    LZW,
    NONE,
    PACKBITS,
    PALETTE,
    RGB,
    WHITE,
    Frame,
    tiff,
)

from cembed.runtime.pages.documents import Page, PageError, PageReader

CASES = Path(__file__).with_name("cases")
STEP = 7  # of all combinations, coprime to the numbers of each; 1 takes minutes
COLOUR = np.asarray(Image.open(CASES / "colour.png").convert("RGB"))
GREY = np.asarray(Image.open(CASES / "grey.png").convert("L"))[..., None]


@pytest.fixture(scope="module")
def reader() -> Iterator[PageReader]:
    with PageReader() as shared:
        yield shared


def pages(reader: PageReader, path: Path, *frames: Frame, content: bytes | None = None) -> list[Page | PageError]:
    path = path / "a.tif"
    path.write_bytes(tiff(*frames) if content is None else content)
    outcomes = list(reader.read([path]))
    assert reader.count_pages([path]) == len(outcomes)
    assert [outcome.number for outcome in outcomes] == list(range(1, len(outcomes) + 1))
    return outcomes


def page(reader: PageReader, path: Path, *frames: Frame, content: bytes | None = None) -> Page:
    (outcome,) = pages(reader, path, *frames, content=content)
    assert isinstance(outcome, Page), outcome
    return outcome


def reason(reader: PageReader, path: Path, *frames: Frame, content: bytes | None = None) -> str:
    (outcome,) = pages(reader, path, *frames, content=content)
    assert isinstance(outcome, PageError)
    return outcome.reason


def off(page: Page | PageError, right: np.ndarray[Any, Any]) -> float:
    """The mean absolute difference of levels."""
    assert isinstance(page, Page), page
    assert page.image.shape[:2] == right.shape[:2]
    return float(np.abs(page.image - right.astype(float)).mean())


# ---- pixels


def test_every_combination_of_tags_is_read_as_it_was_written(reader: PageReader, tmp_path: Path) -> None:
    cases = list(islice(tiff_grid.cases(), 0, None, STEP))
    files = [tmp_path / f"{case.name}.tif" for case in cases]
    for file, case in zip(files, cases, strict=True):
        file.write_bytes(case.content)
    wrong = []
    for case, outcome in zip(cases, reader.read(files), strict=True):
        assert isinstance(outcome, Page), (case.name, outcome)
        apart = np.abs(outcome.image - case.right)
        if apart.mean() > case.tolerance or apart.max() > 8 * case.tolerance or outcome.warning:
            wrong.append((case.name, apart.mean(), apart.max(), outcome.warning))
    assert not wrong, wrong[:9]
    assert len(cases) > 600


@pytest.mark.parametrize(
    ("frame", "right"),
    [
        (Frame(GREY.astype(np.uint16) * 257 ^ 0xFFFF, 16, WHITE), GREY),
        (Frame(COLOUR.astype(np.uint16) * 257, 16, RGB, planar=True), COLOUR),
        (Frame(GREY, 8, PALETTE, tags={320: ("H", [*range(256)] * 3)}), GREY),
        (Frame((GREY.astype(np.uint32) * 4095 // 255).astype(np.uint16), 12), GREY),
        (Frame(GREY.astype(np.uint32) * 0x01010101, 32), GREY),
        (Frame(GREY.astype(np.uint32), 32), GREY),
        (Frame(GREY.astype(np.int16), 16), GREY),
        (Frame((GREY.astype(np.int32) * 257 - 32768).astype(np.int16), 16), GREY),
        (Frame(GREY.astype(np.float32), 32), GREY),
    ],
)
def test_what_used_to_be_wrong(reader: PageReader, tmp_path: Path, frame: Frame, right: np.ndarray[Any, Any]) -> None:
    assert off(page(reader, tmp_path, replace(frame, rows=100)), right) < 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [NONE, LZW])
def test_pages_are_brought_upright(reader: PageReader, tmp_path: Path, orientation: int, compression: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    stored = {
        1: noise,
        2: noise[:, ::-1],
        3: noise[::-1, ::-1],
        4: noise[::-1],
        5: noise.transpose(1, 0, 2),
        6: noise.transpose(1, 0, 2)[::-1],
        7: noise[::-1, ::-1].transpose(1, 0, 2),
        8: noise.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    frame = Frame(np.ascontiguousarray(stored), 8, RGB, compression, tags={274: ("H", [orientation])})
    np.testing.assert_array_equal(page(reader, tmp_path, frame).image, noise)


def test_nan_is_black_and_said(reader: PageReader, tmp_path: Path) -> None:
    values = np.array([[np.nan, 1, 0.5, 1]], "f4")[..., None]
    outcome = page(reader, tmp_path, Frame(values, 32))
    assert outcome.image[0, :, 0].tolist() == [0, 255, 128, 255]
    assert outcome.warning == "damaged, what is here may be wrong: some of its values are NaN or infinite"


def test_a_last_sample_of_which_nothing_is_said_is_alpha_unless_it_is_zero(reader: PageReader, tmp_path: Path) -> None:
    samples = np.array([[[9, 99, 199, 0], [9, 99, 199, 255]]], np.uint8)
    assert page(reader, tmp_path, Frame(samples, 8, RGB)).image.tolist() == [[[255] * 3, [9, 99, 199]]]
    samples[..., 3] = 0
    assert page(reader, tmp_path, Frame(samples, 8, RGB)).image.tolist() == [[[9, 99, 199]] * 2]


@pytest.mark.parametrize(
    ("photometric", "compression", "right"), [(BLACK, NONE, 255), (RGB, NONE, 255), (WHITE, G4, 0)]
)
def test_without_a_photometric_interpretation(
    reader: PageReader, tmp_path: Path, photometric: int, compression: int, right: int
) -> None:
    samples = np.ones((8, 8, 3 if photometric == RGB else 1), np.uint8)
    frame = Frame(
        samples * (255 if compression == NONE else 1), 8 if compression == NONE else 1, photometric, compression
    )
    assert (page(reader, tmp_path, replace(frame, tags={262: None})).image == right).all()


REFUSED = {
    "JPEG XL": {259: ("H", [50002])},
    "Compression 12345": {259: ("H", [12345])},
    "CFA": {262: ("H", [32803])},
    "PhotometricInterpretation 777": {262: ("H", [777])},
    "BitsPerSample 8/8/4": {258: ("H", [8, 8, 4])},
    "SampleFormat 6": {339: ("H", [6, 6, 6])},
    "Predictor 9": {259: ("H", [5]), 317: ("H", [9])},
    "too few samples": {277: ("H", [2])},
    "ImageDepth": {32997: ("I", [5])},
    "YCBCR": {262: ("H", [6]), 284: ("H", [2])},
    "ColorMap of 6 values": {262: ("H", [3]), 277: ("H", [1]), 258: ("H", [8]), 320: ("H", [0] * 6)},
    "without strips": {273: None},
    "of 0 x 32 pixels": {256: ("I", [0])},
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_cannot_be_read_right_is_refused_by_name(reader: PageReader, tmp_path: Path, named: str) -> None:
    frame = Frame(np.zeros((32, 32, 3), np.uint8), 8, RGB, rows=32, tags=REFUSED[named])
    text = reason(reader, tmp_path, frame)
    assert named in text
    assert "\n" not in text


def test_inks_that_are_not_cmyk_are_refused(reader: PageReader, tmp_path: Path) -> None:
    frame = Frame(np.zeros((8, 8, 4), np.uint8), 8, 5, tags={332: ("H", [2])})
    assert "inks other than CMYK" in reason(reader, tmp_path, frame)


def test_jpeg_of_the_old_style(reader: PageReader, tmp_path: Path) -> None:
    whole = COLOUR[:64]
    stream = tiff_grid.tiffs._jpeg(whole, Frame(whole, 8, 6))
    offset = {513: ("I", [8]), 514: ("I", [len(stream)]), 512: ("H", [1]), 259: ("H", [6])}
    frame = Frame(whole, 8, 6, JPEG, rows=64, tags=offset)
    assert off(page(reader, tmp_path, frame), whole) < 3


@pytest.mark.parametrize("compression", ["zstd", "lzma", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA", "I;16", "LAB"])
def test_what_pillow_writes(reader: PageReader, tmp_path: Path, compression: str, mode: str) -> None:
    image = Image.fromarray(GREY[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(COLOUR)
    image = image if mode in ("RGB", "LAB", "I;16") else image.convert(mode)
    if mode == "LAB":
        image = Image.frombytes("LAB", image.size, image.tobytes())
    try:
        image.save(tmp_path / "a.tif", compression=compression)
    except OSError:
        pytest.skip("not by this Pillow's libtiff")
    right = Image.fromarray(GREY[..., 0]) if mode == "I;16" else image
    (outcome,) = reader.read([tmp_path / "a.tif"])
    assert off(outcome, np.asarray(right.convert("RGB"))) < (6 if compression == "jpeg" else 0.01)


# ---- frames


def small(level: int, **more: Any) -> Frame:
    return Frame(np.full((6, 5, 1), level, np.uint8), **more)


def subfile(tag: int, value: int) -> dict[int, Any]:
    return {tag: ("I" if tag == 254 else "H", [value])}


def test_thumbnails_and_masks_are_no_pages(reader: PageReader, tmp_path: Path) -> None:
    skipped = [small(9, tags=subfile(*kind)) for kind in ((254, 1), (255, 2), (254, 4), (254, 5), (254, 3))]
    kept = [small(0), small(1, tags=subfile(254, 0)), small(2, tags=subfile(254, 2)), small(3, tags=subfile(255, 3))]
    frames = [skipped[0], kept[0], *skipped[1:3], kept[1], kept[2], *skipped[3:], kept[3]]
    outcomes = pages(reader, tmp_path, *frames)
    assert [int(each.image[0, 0, 0]) for each in outcomes if isinstance(each, Page)] == [0, 1, 2, 3]


def test_a_file_of_nothing_but_thumbnails_has_them_for_pages(reader: PageReader, tmp_path: Path) -> None:
    assert len(pages(reader, tmp_path, *[small(7, tags=subfile(254, 1))] * 2)) == 2


def test_the_picture_beneath_a_thumbnail_is_the_page(reader: PageReader, tmp_path: Path) -> None:
    thumbnail, picture = small(9, tags=subfile(254, 1) | {330: ("I", [0])}), small(200)
    content = tiff(thumbnail, picture)
    first = int.from_bytes(content[4:8], "little")
    link = first + 2 + 12 * int.from_bytes(content[first : first + 2], "little")
    second = int.from_bytes(content[link : link + 4], "little")
    nested = tiff(small(9, tags=subfile(254, 1) | {330: ("I", [second])}), picture)
    torn_off = nested[:link] + bytes(4) + nested[link + 4 :]
    assert page(reader, tmp_path, content=torn_off).image[0, 0, 0] == 200


@pytest.mark.parametrize("big", [False, True])
def test_each_frame_stands_for_itself(reader: PageReader, tmp_path: Path, big: bool) -> None:
    odd = [small(9, tags={259: ("H", [50002])}), small(9, tags={257: None}), small(9, tags={258: ("H", [99])})]
    content = tiff(small(0), odd[0], small(1), odd[1], odd[2], small(2), big=big, order=">")
    outcomes = pages(reader, tmp_path, content=content)
    found = [int(each.image[0, 0, 0]) if isinstance(each, Page) else None for each in outcomes]
    assert found == [0, None, 1, None, None, 2]
    assert isinstance(outcomes[1], PageError)
    assert outcomes[1].reason.startswith("this compression is not read: Compression 50002 (JPEG XL)")


def test_a_torn_chain_of_frames_is_said(reader: PageReader, tmp_path: Path) -> None:
    content = tiff(small(0), small(1))
    outcomes = pages(reader, tmp_path, content=content[:-40])
    assert isinstance(outcomes[0], Page)
    assert isinstance(outcomes[-1], PageError)
    assert "chain of frames is torn" in outcomes[-1].reason


def test_a_chain_that_bites_its_tail_ends(reader: PageReader, tmp_path: Path) -> None:
    content = tiff(small(3))
    assert page(reader, tmp_path, content=content[:-4] + content[4:8]).image[0, 0, 0] == 3


def test_frames_of_three_kinds_are_three_pages(reader: PageReader) -> None:
    outcomes = list(reader.read([CASES / "mix_rgb_p_p.tif"]))
    assert [off(outcome, COLOUR) < 1 for outcome in outcomes] == [True] * 3


# ---- more pixels than there may be


@pytest.mark.parametrize(
    "frame",
    [
        Frame(COLOUR, 8, RGB, rows=50),
        Frame(COLOUR, 8, RGB, LZW, rows=7),
        Frame(COLOUR, 8, RGB, JPEG, rows=16),
        Frame(COLOUR, 8, RGB, DEFLATE, tile=(64, 48)),
        Frame(COLOUR.astype(np.uint16) * 257, 16, RGB, PACKBITS, planar=True, rows=100),
        Frame(COLOUR / np.float32(255), 32, RGB, DEFLATE, predictor=3, rows=100),
    ],
)
def test_larger_pages_are_read_reduced(tmp_path: Path, frame: Frame) -> None:
    with PageReader(max_pixels=30_000) as reader:
        outcome = page(reader, tmp_path, frame)
    whole = Image.fromarray(COLOUR).reduce(3)
    assert outcome.warning is None
    assert off(outcome, np.asarray(whole)) < 2


def test_a_drawing_of_a_square_metre(reader: PageReader) -> None:
    (outcome,) = reader.read([CASES / "a0.tif"])
    assert isinstance(outcome, Page)
    assert outcome.image.shape == (7022, 4967, 3)
    assert outcome.image.min() == 0
    assert outcome.image.max() == 255


# ---- damage


def torn(frame: Frame, share: float) -> bytes:
    """The only strip of a frame cut to a share of its bytes, and put at the end of the file."""
    content = tiff(frame)
    (strip,) = list(tiff_grid.tiffs._encoded(frame, "<"))
    place, short = len(content), strip[: int(len(strip) * share)]
    return tiff(replace(frame, tags=frame.tags | {273: ("I", [place])})) + short


PATTERN = np.kron(np.random.default_rng(3).integers(0, 2, (40, 9), dtype=np.uint8), np.ones((4, 11), np.uint8))[
    ..., None
]


@pytest.mark.parametrize("compression", [*FAX, LZW, DEFLATE, PACKBITS, NONE])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.85])
def test_a_torn_strip_is_an_error(reader: PageReader, tmp_path: Path, compression: int, share: float) -> None:
    frame = Frame(PATTERN, 1, BLACK, compression, rows=160)
    assert page(reader, tmp_path, frame).warning is None
    assert reason(reader, tmp_path, content=torn(frame, share))


@pytest.mark.parametrize("compression", [*FAX, NONE])
def test_what_is_missing_of_a_page_is_said_and_white(reader: PageReader, tmp_path: Path, compression: int) -> None:
    frame = Frame(PATTERN, 1, BLACK, compression, rows=160)
    whole, outcome = page(reader, tmp_path, frame), page(reader, tmp_path, content=torn(frame, 0.95))
    assert outcome.warning is not None
    assert "% of the page is missing, and white here" in outcome.warning
    np.testing.assert_array_equal(outcome.image[:140], whole.image[:140])
    assert (outcome.image[-1] == 255).all()


def test_a_torn_jpeg_strip_is_an_error(reader: PageReader, tmp_path: Path) -> None:
    frame = Frame(COLOUR, 8, RGB, JPEG, rows=560)
    for share in (0.3, 0.7):
        assert "missing" in reason(reader, tmp_path, content=torn(frame, share))


def test_one_bad_strip_of_many_is_white(reader: PageReader, tmp_path: Path) -> None:
    content = bytearray(tiff(Frame(COLOUR, 8, RGB, DEFLATE, rows=40)))
    content[8 + 12] ^= 0xFF
    outcome = page(reader, tmp_path, content=bytes(content))
    assert outcome.warning is not None
    assert outcome.warning.startswith("7.1 % of the page is missing, and white here: ZIPDecode")
    assert (outcome.image[:40] == 255).all()
    np.testing.assert_array_equal(outcome.image[40:], COLOUR[40:])


def test_bad_codes_of_a_fax_are_said(reader: PageReader, tmp_path: Path) -> None:
    content = bytearray(tiff(Frame(PATTERN, 1, BLACK, G4, rows=160)))
    content[100] ^= 0x55
    (outcome,) = pages(reader, tmp_path, content=bytes(content))
    said = outcome.reason if isinstance(outcome, PageError) else outcome.warning
    assert said is not None
    assert "Fax4Decode" in said or "truncated" in said


def test_dimensions_that_cannot_be_are_refused_at_once(reader: PageReader, tmp_path: Path) -> None:
    frame = Frame(PATTERN, 8, BLACK, LZW, tags={257: ("I", [1 << 30])})
    assert "99 x 1073741824 pixels cannot be in a file of" in reason(reader, tmp_path, frame)

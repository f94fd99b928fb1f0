"""Pictures that are no TIFF: what they hold, whatever their metadata, their names and their ends are like."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cembed.runtime.errors import CembedError
from cembed.runtime.pages.documents import Page, PageError, PageReader, find_documents
from cembed.runtime.pages.images import to_rgb

CASES = Path(__file__).with_name("cases")
COLOUR = Image.open(CASES / "colour.png").convert("RGB")
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def reader() -> Iterator[PageReader]:
    with PageReader() as shared:
        yield shared


def outcome(reader: PageReader, path: Path, content: bytes, name: str = "a.png") -> Page | PageError:
    (path / name).write_bytes(content)
    (only,) = reader.read([path / name])
    return only


def page(reader: PageReader, path: Path, content: bytes, name: str = "a.png") -> Page:
    only = outcome(reader, path, content, name)
    assert isinstance(only, Page), only
    return only


def encoded(kind: str, image: Image.Image = COLOUR, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ---- PNG


def chunk(kind: bytes, content: bytes, sound: bool = True) -> bytes:
    checksum = zlib.crc32(kind + content) ^ (not sound)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(values: Array, bits: int, colour: int, *chunks: bytes, interlaced: bool = False) -> bytes:
    """A PNG of samples [height, width, samples], written without a filter."""
    height, width, _ = values.shape
    sevenths = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = (values[y::down, x::along] for y, x, down, along in (sevenths if interlaced else [(0, 0, 1, 1)]))
    rows = (row for part in parts if part.size for row in part.reshape(len(part), -1))
    data = b"".join(b"\0" + np.packbits(row[:, None] >> np.arange(bits - 1, -1, -1) & 1).tobytes() for row in rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def png_kinds() -> Iterator[tuple[int, int, bool, bool]]:
    depths = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
    for colour, bits in ((colour, bits) for colour, each in depths.items() for bits in each):
        for interlaced, keyed in itertools.product((False, True), (False, True)):
            if not keyed or colour < 4:
                yield colour, bits, interlaced, keyed


@pytest.mark.parametrize(("colour", "bits", "interlaced", "keyed"), list(png_kinds()))
def test_png_of_every_kind(
    reader: PageReader, tmp_path: Path, colour: int, bits: int, interlaced: bool, keyed: bool
) -> None:
    random = np.random.default_rng(bits)
    values = random.integers(0, 1 << bits, (13, 19, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]))
    values[3:6, 4:9] = values[0, 0]
    levels = values * (255 / ((1 << bits) - 1))
    chunks = []
    if colour == 3:
        palette, alpha = random.integers(0, 256, (1 << bits, 3)), random.integers(0, 256, 1 << bits)
        chunks = [chunk(b"PLTE", palette.astype(np.uint8).tobytes())]
        chunks += [chunk(b"tRNS", alpha.astype(np.uint8).tobytes())] if keyed else []
        share = alpha[values] / 255 if keyed else 1.0
        right = palette[values[..., 0]] * share + 255 * (1 - share)
    elif colour in (4, 6):
        right = levels[..., :-1] * levels[..., -1:] / 255 + 255 - levels[..., -1:]
    else:
        chunks = [chunk(b"tRNS", values[0, 0].astype(">u2").tobytes())] if keyed else []
        right = np.where(keyed & (values == values[0, 0]).all(2, keepdims=True), 255, levels)
    image = page(reader, tmp_path, png(values, bits, colour, *chunks, interlaced=interlaced)).image
    assert np.abs(image - right).max() < 2


TEXTS = (b"", b"a", b"a\0\0" + zlib.compress(bytes(20 << 20)), b"\xff" * 7, bytes(70))
UNUSED = (
    b"zTXt",
    b"iTXt",
    b"tEXt",
    b"iCCP",
    b"gAMA",
    b"cHRM",
    b"pHYs",
    b"sRGB",
    b"eXIf",
    b"sBIT",
    b"acTL",
    b"fcTL",
    b"prVt",
)


@pytest.mark.parametrize("kind", UNUSED)
def test_no_metadata_loses_a_page(reader: PageReader, tmp_path: Path, kind: bytes) -> None:
    content = encoded("PNG")
    for text, sound, place in itertools.product(TEXTS, (True, False), (33, len(content) - 12)):
        odd = content[:place] + chunk(kind, text, sound) + content[place:]
        only = page(reader, tmp_path, odd)
        assert only.warning is None
        np.testing.assert_array_equal(only.image, COLOUR)


@pytest.mark.parametrize("name", ["big_ztxt.png", "badcrc_text.png"])
def test_pngs_that_were_refused_for_a_text(reader: PageReader, name: str) -> None:
    (only,) = reader.read([CASES / name])
    assert isinstance(only, Page), only
    np.testing.assert_array_equal(only.image, COLOUR)


def test_a_wrong_checksum_of_pixels_is_said(reader: PageReader, tmp_path: Path) -> None:
    content = bytearray(encoded("PNG"))
    content[-13] ^= 1
    only = page(reader, tmp_path, bytes(content))
    assert only.warning == "damaged, what is here may be wrong: the checksum of IDAT does not fit"
    np.testing.assert_array_equal(only.image, COLOUR)


# ---- JPEG


def test_a_jpeg_that_lacks_only_its_end_is_read(reader: PageReader) -> None:
    (only,) = reader.read([CASES / "noeoi.jpg"])
    assert isinstance(only, Page)
    assert only.warning is None
    assert np.abs(only.image - np.asarray(COLOUR).astype(int)).mean() < 6


JPEGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "whole chroma": {"subsampling": 0},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_blocks": 5},
}
ENDS = {"nothing": b"", "an end": b"\xff\xd9", "zeros": bytes(9000), "noise": bytes(range(1, 200))}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_jpeg_cut_in_the_middle_is_an_error(
    reader: PageReader, tmp_path: Path, options: dict[str, Any], mode: str, end: bytes
) -> None:
    noise = np.random.default_rng(0).integers(-9, 9, (560, 400, 3))
    image = Image.fromarray((np.asarray(COLOUR) + noise).clip(0, 255).astype(np.uint8)).convert(mode)
    whole = encoded("JPEG", image, **options)
    for share in (0.2, 0.5, 0.8):
        only = outcome(reader, tmp_path, whole[: int(len(whole) * share)] + end)
        assert isinstance(only, PageError)
        assert "% of the page is missing" in only.reason
    assert page(reader, tmp_path, whole[:-2]).warning is None


def test_a_jpeg_of_which_little_is_missing_says_so(reader: PageReader, tmp_path: Path) -> None:
    whole = encoded("JPEG", COLOUR.resize((800, 1120)).rotate(180))
    only = page(reader, tmp_path, whole[: int(len(whole) * 0.97)])
    assert only.warning is not None
    assert only.warning.endswith("% of the page is missing, and white here: the file is truncated")
    assert (only.image[-1] == 255).all()
    complete = page(reader, tmp_path, whole).image
    np.testing.assert_array_equal(only.image[:1000], complete[:1000])


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_a_progressive_jpeg_cut_in_the_middle_is_said_to_be_coarse(
    reader: PageReader, tmp_path: Path, share: float
) -> None:
    whole = encoded("JPEG", COLOUR, progressive=True)
    only = outcome(reader, tmp_path, whole[: int(len(whole) * share)])
    said = only.reason if isinstance(only, PageError) else only.warning
    assert said is not None
    assert page(reader, tmp_path, whole).warning is None


def test_grey_at_the_end_of_a_jpeg_may_be_what_was_there(reader: PageReader, tmp_path: Path) -> None:
    grey = Image.new("RGB", (200, 100), (128, 128, 128))
    grey.paste(COLOUR.resize((200, 50)))
    for content in (encoded("JPEG", grey), encoded("JPEG", grey)[:-2]):
        only = page(reader, tmp_path, content)
        assert only.warning is None
        assert abs(int(only.image[-1, -1, 0]) - 128) < 2


@pytest.mark.parametrize("marker", [*range(0xE0, 0xF0), 0xFE])
def test_no_application_data_of_a_jpeg_loses_a_page(reader: PageReader, tmp_path: Path, marker: int) -> None:
    whole = encoded("JPEG", COLOUR)
    right = page(reader, tmp_path, whole).image
    for text in (
        b"",
        b"JFIF",
        b"JFIF\0",
        b"Exif\0\0",
        b"Exif\0\0II",
        b"ICC_PROFILE\0",
        b"ICC_PROFILE\0\1",
        b"Adobe",
        b"MPF\0a",
    ):
        segment = bytes([0xFF, marker]) + (len(text) + 2).to_bytes(2, "big") + text
        only = page(reader, tmp_path, whole[:2] + segment + whole[2:])
        assert only.warning is None
        np.testing.assert_array_equal(only.image, right)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_larger_jpegs_are_read_reduced(tmp_path: Path, mode: str, progressive: bool) -> None:
    content = encoded("JPEG", COLOUR.convert(mode), quality=95, progressive=progressive)
    for limit, scale in ((56_000, 2), (14_000, 4), (3_500, 8), (900, 16)):
        with PageReader(max_pixels=limit) as reader:
            only = page(reader, tmp_path, content)
        right = np.asarray(COLOUR.convert(mode).reduce(scale).convert("RGB")).astype(int)
        assert only.warning is None
        assert only.image.shape == right.shape
        assert np.abs(only.image - right).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF"])
def test_others_that_are_larger_name_the_flag(tmp_path: Path, kind: str) -> None:
    with PageReader(max_pixels=200_000) as reader:
        only = outcome(reader, tmp_path, encoded(kind))
    assert isinstance(only, PageError)
    assert only.reason == (
        f"400 x 560 pixels are over the limit of 200000, and a {kind} file cannot be reduced while it is read: set a "
        "higher one (--max-pixels)"
    )


# ---- BMP, WebP


def bmp(alpha: Array, masks: tuple[int, ...], size: int) -> bytes:
    """32 bits a pixel, with a header of `size`."""
    pixels = np.concatenate([np.asarray(COLOUR)[..., ::-1], alpha], axis=2)[::-1].tobytes()
    method = 3 if masks else 0
    header = struct.pack("<IiiHHIIiiII", size, 400, 560, 1, 32, method, 0, 0, 0, 0, 0) + struct.pack(
        f"<{len(masks)}I", *masks
    )
    start = 14 + max(len(header), size)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header.ljust(size, b"\0") + pixels


RGB_MASKS = (0xFF0000, 0xFF00, 0xFF)


@pytest.mark.parametrize(
    ("masks", "size"), [((), 40), (RGB_MASKS, 40), *(((*RGB_MASKS, 0xFF << 24), n) for n in (56, 108, 124))]
)
def test_an_alpha_plane_of_zeros_in_a_bmp_is_none(
    reader: PageReader, tmp_path: Path, masks: tuple[int, ...], size: int
) -> None:
    content = bmp(np.zeros((560, 400, 1), np.uint8), masks, size)
    np.testing.assert_array_equal(page(reader, tmp_path, content).image, COLOUR)
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(to_rgb(image), COLOUR)


def test_another_alpha_plane_of_a_bmp_is_one(reader: PageReader, tmp_path: Path) -> None:
    alpha = np.zeros((560, 400, 1), np.uint8)
    alpha[:280] = 255
    image = page(reader, tmp_path, bmp(alpha, (*RGB_MASKS, 0xFF << 24), 124)).image
    np.testing.assert_array_equal(image[:280], np.asarray(COLOUR)[:280])
    assert (image[280:] == 255).all()


def test_a_webp_of_a_download_that_was_not_finished(reader: PageReader, tmp_path: Path) -> None:
    whole = encoded("WEBP")
    only = outcome(reader, tmp_path, whole[: len(whole) // 2].ljust(len(whole), b"\0"))
    assert only.reason if isinstance(only, PageError) else only.warning
    assert page(reader, tmp_path, whole).warning is None


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_pictures_are_errors(reader: PageReader, tmp_path: Path, kind: str, share: float) -> None:
    whole = encoded(kind)
    assert isinstance(outcome(reader, tmp_path, whole[: int(len(whole) * share)]), PageError)


# ---- names and kinds


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("name", ["a.tif", "a.pdf", "a.jfif", "a.jpe", "a.dat", "a"])
def test_content_decides_and_not_the_name(reader: PageReader, tmp_path: Path, kind: str, name: str) -> None:
    right = Image.open(io.BytesIO(encoded(kind))).convert("RGB")
    np.testing.assert_array_equal(page(reader, tmp_path, encoded(kind), name).image, right)
    assert find_documents([tmp_path / name]) == [tmp_path / name]


def test_folders_are_searched_for_every_suffix_of_a_jpeg(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpeg", "c.jpe", "d.JFIF", "e.dat"):
        (tmp_path / name).touch()
    assert [path.name for path in find_documents([tmp_path])] == ["a.jpg", "b.jpeg", "c.jpe", "d.JFIF"]


def test_a_file_of_an_unknown_kind_and_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_bytes(b"BM or so")
    with pytest.raises(CembedError, match="not a document of a known type"):
        find_documents([tmp_path / "a.dat"])


# ---- images of callers


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_deep_greys_with_a_transparent_one(mode: str) -> None:
    values = np.array([[0, 25700, 65535]], {"I": np.int32, "I;16B": ">u2"}.get(mode, "<u2"))
    image = Image.frombytes(mode, (3, 1), values.tobytes())
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 100, 255]
    image.info["transparency"] = 25700
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_every_mode_with_alpha_lies_on_white(mode: str) -> None:
    image = Image.new("P", (3, 1)).convert("PA") if mode == "PA" else Image.new("RGBA", (3, 1))
    image.putalpha(Image.frombytes("L", (3, 1), bytes([0, 255, 100])))
    for step in {"La": ("LA", "La"), "PA": ()}.get(mode, (mode,)):
        image = image.convert(step)
    assert image.mode == mode
    assert np.abs(np.asarray(to_rgb(image)).astype(int)[0, :, 0] - [255, 0, 155]).max() <= 1


@pytest.mark.parametrize("transparency", [(1, 2), "x", None, 70000, b"", 2.5, -1])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_transparency_that_makes_no_sense_is_none(mode: str, transparency: object) -> None:
    image = COLOUR.convert(mode)
    right = image.convert("RGB")
    image.info["transparency"] = transparency
    assert to_rgb(image).size == right.size
    if transparency is None or isinstance(transparency, (str, float)):
        np.testing.assert_array_equal(to_rgb(image), right)

"""Reading of real and of broken files, all made here; the decoding process is the real one throughout."""

import functools
import hashlib
import json
import os
import re
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from pdf_files import pdf, rc4, stream
from PIL import Image, ImageOps

from cembed.runtime.errors import CembedError
from cembed.runtime.pages import decoder
from cembed.runtime.pages.documents import Page, PageError, PageReader, find_documents
from cembed.runtime.pages.images import to_rgb

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def reader() -> Iterator[PageReader]:
    with PageReader(dpi=72, max_pixels=200_000) as shared:
        yield shared


def one(reader: PageReader, path: Path) -> Page:
    (page,) = reader.read([path])
    assert isinstance(page, Page), page
    return page


def reason(reader: PageReader, path: Path) -> str:
    (error,) = reader.read([path])
    assert isinstance(error, PageError), error
    assert error.path == str(path)
    assert "\n" not in error.reason
    assert "0x" not in error.reason
    return error.reason


def worker_of_this_test() -> psutil.Process:
    return max(psutil.Process().children(), key=lambda process: process.create_time())


def pages_pdf(*pages: bytes, box: bytes = b"0 0 100 50", more: tuple[bytes, ...] = ()) -> bytes:
    """A PDF of these page contents; `more` objects are numbered from 3 and are the resources F3, F4, ..."""
    first = 3 + len(more)
    kids = b" ".join(b"%d 0 R" % (first + 2 * index) for index in range(len(pages)))
    forms = b" ".join(b"/F%d %d 0 R" % (number, number) for number in range(3, first))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(pages)),
        *more,
    ]
    for index, content in enumerate(pages):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [%s] /Contents %d 0 R /Resources << /XObject << %s >> >> >>"
            % (box, first + 2 * index + 1, forms)
        )
        objects.append(stream(content))
    return pdf(objects)


def endless_pdf(*pages: bytes) -> bytes:
    """Pages for which `/F3 Do` draws 30**7 rectangles."""
    forms = []
    for level in range(3, 10):
        inner = b"/F%d Do " % (level + 1) * 30 if level < 9 else b"0 0 90 40 re f " * 30
        use = b"/Resources << /XObject << /F%d %d 0 R >> >>" % (level + 1, level + 1) if level < 9 else b""
        forms.append(stream(inner, b"/Type /XObject /Subtype /Form /BBox [0 0 100 50] " + use))
    return pages_pdf(*pages, more=tuple(forms))


def encrypted_pdf(password: bytes) -> bytes:
    """Standard security handler, version 1 revision 2 (ISO 32000-1, 7.6.3)."""
    fill = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")
    padded, document_id, permissions = (password + fill)[:32], b"0123456789abcdef", struct.pack("<i", -4)
    owner = rc4(hashlib.md5(padded).digest()[:5], padded)
    key = hashlib.md5(padded + owner + permissions + document_id).digest()[:5]
    return pdf(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 100 50] >>",
            b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>"
            % (owner.hex().encode(), rc4(key, fill).hex().encode()),
        ],
        b"/Encrypt 4 0 R /ID [<%s> <%s>]" % ((document_id.hex().encode(),) * 2),
    )


def png(width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 1, colour: int = 0) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
             for kind, data in (header, *chunks, (b"IEND", b""))]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# ---- finding


def test_folders_are_walked_in_order_and_hidden_or_unknown_files_left_out(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.pdf", "c.txt", ".d.png", "sub/z.tiff", "sub/a.webp", ".git/x.png", "Sub.pdf/q.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_documents([tmp_path / "sub" / "z.tiff", tmp_path, tmp_path / "sub" / ".." / "a.pdf"])
    names = [str(path.relative_to(tmp_path)) for path in found]
    assert names == ["sub/z.tiff", "a.pdf", "b.PNG", "Sub.pdf/q.jpeg", "sub/a.webp"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.png", "no such file"), ("notes.txt", r"known type: give \.pdf"), ("empty", "no documents")],
)
def test_mistaken_paths_are_one_line(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CembedError, match=message) as caught:
        find_documents([str(tmp_path / name)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pipe.png", "socket.png", "device.png"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path, name: str) -> None:
    if name == "pipe.png":
        os.mkfifo(tmp_path / name)
    elif name == "device.png":
        (tmp_path / name).symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(tmp_path / name))
    with pytest.raises(CembedError, match="is a device, a pipe or a socket"):
        find_documents([tmp_path / name])
    with pytest.raises(CembedError, match="found no documents"):
        find_documents([tmp_path])


def test_names_cannot_make_lines_or_steer_a_terminal(reader: PageReader, tmp_path: Path) -> None:
    name = "a\n\x1b[31m\x85.xyz"
    (tmp_path / name).write_bytes(b"no")
    for path in (tmp_path / name, tmp_path / f"{name}absent"):
        with pytest.raises(CembedError) as caught:
            find_documents([path])
        assert str(caught.value).isprintable()
        assert "a\\n\\x1b[31m\\x85" in str(caught.value)
    content = b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 262, 3, 1, 7) + bytes(4)
    (tmp_path / "b\n.tif").write_bytes(content)
    assert reason(reader, tmp_path / "b\n.tif").isprintable()


# ---- pictures


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.bmp", "a.gif", "wrong-suffix.tif.png"])
def test_opaque_pictures_are_bit_equal_to_pillow(reader: PageReader, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    Image.fromarray(NOISE).save(path, format="TIFF" if "wrong" in name else None)
    page = one(reader, path)
    assert (page.path, page.number, page.image.dtype, page.image.flags.c_contiguous) == (str(path), 1, np.uint8, True)
    np.testing.assert_array_equal(page.image, np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB"])
def test_other_modes_are_converted_as_pillow_does(reader: PageReader, tmp_path: Path, mode: str) -> None:
    """As it is before it is saved: Pillow before 13 cannot read its own YCbCr."""
    lab = Image.frombytes("LAB", (60, 40), NOISE.tobytes())
    image = lab if mode == "LAB" else Image.fromarray(NOISE).convert(mode)
    image.save(tmp_path / "a.tif")
    np.testing.assert_array_equal(one(reader, tmp_path / "a.tif").image, np.asarray(image.convert("RGB")))


def test_cmyk_jpeg(reader: PageReader, tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    assert abs(one(reader, tmp_path / "red.jpg").image[8, 8].astype(int) - [254, 0, 0]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_orientation(reader: PageReader, tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(NOISE).save(path, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert expected.shape == ((60, 40, 3) if orientation > 4 else (40, 60, 3))
    np.testing.assert_array_equal(one(reader, path).image, expected)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_greys_are_scaled_and_not_clipped(reader: PageReader, tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257, 25700, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    image = one(reader, tmp_path / f"a.{suffix}").image
    assert image[0].tolist() == [[grey] * 3 for grey in (0, 0, 1, 1, 100, 255)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0, np.nan]], np.float32), [0, 128, 255, 0]),
        (np.array([[-10.0, 0.0, 10.0, 10.0]], np.float32), [0, 128, 255, 255]),
        (np.array([[0, 65535, 25700, 0]], np.int32), [0, 255, 100, 0]),
        (np.array([[-200000, 0, 200000, 200000]], np.int32), [0, 128, 255, 255]),
        (np.array([[np.nan] * 4], np.float32), [0] * 4),
    ],
)
def test_deep_greys(reader: PageReader, tmp_path: Path, values: np.ndarray, expected: list[int]) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert one(reader, tmp_path / "a.tif").image[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_lies_on_white(reader: PageReader, tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "RGB":
        Image.fromarray(np.array([[[9, 9, 9], [0, 0, 0]]], np.uint8)).save(tmp_path / "a.png", transparency=(9, 9, 9))
    elif mode == "P":
        Image.frombytes("P", (2, 1), b"\0\1").save(tmp_path / "a.png", transparency=b"\0\xff")
        expected = Image.open(tmp_path / "a.png").convert("RGBA").getpixel((1, 0))
        assert isinstance(expected, tuple)
        assert one(reader, tmp_path / "a.png").image.tolist() == [[[255] * 3, list(expected[:3])]]
        return
    else:
        image.convert(mode).save(tmp_path / "a.png")
    assert one(reader, tmp_path / "a.png").image.tolist() == [[[255] * 3, [0] * 3]]


def test_half_transparency(reader: PageReader, tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (200, 100, 0, 128)).save(tmp_path / "a.webp", lossless=True)
    assert abs(one(reader, tmp_path / "a.webp").image[0, 0].astype(int) - [227, 177, 127]).max() <= 1


def test_every_frame_of_a_tiff_is_a_page(reader: PageReader, tmp_path: Path) -> None:
    frames = [Image.fromarray(NOISE), Image.new("1", (30, 20), 1), Image.fromarray(NOISE[::-1])]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:], compression="tiff_lzw")
    pages = list(reader.read([tmp_path / "a.tif"]))
    assert [page.number for page in pages] == [1, 2, 3]
    for page, frame in zip(pages, frames, strict=True):
        assert isinstance(page, Page)
        np.testing.assert_array_equal(page.image, np.asarray(frame.convert("RGB")))
    assert reader.count_pages([tmp_path / "a.tif", tmp_path / "absent.png"]) == 4


def test_to_rgb_refuses_what_is_no_image() -> None:
    assert to_rgb(NOISE).size == (60, 40)
    with pytest.raises(CembedError, match=r"float32 \[2, 2\]: give uint8"):
        to_rgb(np.zeros((2, 2), np.float32))


# ---- PDF


def test_pdf_pages_are_drawn_at_dpi_in_rgb(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pages_pdf(b"1 0 0 rg 0 0 100 50 re f", b""))
    with PageReader(dpi=144) as reader:
        red, blank = reader.read([tmp_path / "a.pdf"])
    assert isinstance(red, Page)
    assert isinstance(blank, Page)
    assert red.image.shape == blank.image.shape == (100, 200, 3)
    assert (red.image == [255, 0, 0]).all()
    assert (blank.image == 255).all()


def test_a_pdf_is_one_whatever_its_name_and_what_comes_before_it(reader: PageReader, tmp_path: Path) -> None:
    for name in ("a.dat", "a.png"):
        (tmp_path / name).write_bytes(b"HTTP/1.1 200 OK\r\n\r\n" + pages_pdf(b""))
        assert find_documents([tmp_path / name]) == [tmp_path / name]
        assert one(reader, tmp_path / name).image.shape == (50, 100, 3)


@pytest.mark.parametrize(("box", "wide"), [(b"0 0 14400 7200", 2.0), (b"0 0 14400 1", 14400.0)])
def test_huge_pdf_pages_are_drawn_smaller(reader: PageReader, tmp_path: Path, box: bytes, wide: float) -> None:
    (tmp_path / "a.pdf").write_bytes(pages_pdf(b"", box=box))
    height, width, _ = one(reader, tmp_path / "a.pdf").image.shape
    assert width * height <= 200_000
    assert width / height == pytest.approx(wide, rel=0.01)


def test_fields_that_were_filled_in_are_drawn(reader: PageReader, tmp_path: Path) -> None:
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [4 0 R] >> >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 100 50] /Annots [4 0 R] >>",
        b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (a) /F 4 /Rect [10 10 90 40] /AP << /N 5 0 R >> >>",
        stream(b"0 0 1 rg 0 0 80 30 re f", b"/Type /XObject /Subtype /Form /BBox [0 0 80 30]"),
    ]
    (tmp_path / "a.pdf").write_bytes(pdf(objects))
    image = one(reader, tmp_path / "a.pdf").image
    assert image[25, 50].tolist() == [0, 0, 255]
    assert image[2, 2].tolist() == [255, 255, 255]


# ---- bad input


@functools.cache
def bad_files() -> dict[str, tuple[bytes, str]]:
    row = (b"IDAT", zlib.compress(b"\0\0"))
    whole = pages_pdf(b"")
    return {
        "zero.png": (b"", "empty"),
        "zero.pdf": (b"", "empty"),
        "text.png": (b"Dear Sir or Madam", "not a PNG, JPEG"),
        "text.pdf": (b"Dear Sir or Madam", "no PDF"),
        "half.pdf": (whole[:60], "no PDF"),
        "pageless.pdf": (pages_pdf(), "no pages"),
        "locked.pdf": (encrypted_pdf(b"secret"), "password"),
        "wide.png": (png(1000, 1000, row), r"1000 x 1000 pixels .* 200000"),
        "wider.png": (png(2**31 - 1, 2**31 - 1, row), "pixels are over .*--max-pixels"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_files_give_a_reason(reader: PageReader, tmp_path: Path, name: str) -> None:
    content, message = bad_files()[name]
    (tmp_path / name).write_bytes(content)
    assert re.search(message, reason(reader, tmp_path / name))


def test_a_pdf_that_opens_without_password_is_read(reader: PageReader, tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(encrypted_pdf(b""))
    assert one(reader, tmp_path / "a.pdf").image.shape == (50, 100, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp", "gif"])
def test_truncated_pictures_are_errors(reader: PageReader, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(NOISE).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert reason(reader, path)


def test_what_is_no_file_any_more_or_never_was(reader: PageReader, tmp_path: Path) -> None:
    (tmp_path / "folder.pdf").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert "No such file" in reason(reader, tmp_path / "gone.png")
    assert "folder" in reason(reader, tmp_path / "folder.pdf")
    assert "regular" in reason(reader, tmp_path / "pipe.png")
    assert reason(reader, tmp_path / "nul\0.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(reader: PageReader, tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(stat.S_IWUSR)
    assert reason(reader, tmp_path / "a.png") == "Permission denied"


def test_a_broken_file_does_not_stop_the_rest(reader: PageReader, tmp_path: Path) -> None:
    for name in ("a", "c"):
        Image.fromarray(NOISE).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no")
    outcomes = list(reader.read(find_documents([tmp_path])))
    assert [type(outcome) for outcome in outcomes] == [Page, PageError, Page]
    assert [Path(outcome.path).name for outcome in outcomes] == ["a.png", "b.png", "c.png"]


def test_file_names_need_not_be_text(reader: PageReader, tmp_path: Path) -> None:
    for name, content in ((b"\xff.pdf", pages_pdf(b"")), (b"\xfe\n.png", png(1, 1, (b"IDAT", zlib.compress(b"\0\0"))))):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(content)
    assert all(isinstance(page, Page) for page in reader.read(find_documents([tmp_path])))


# ---- the process


def test_too_slow_a_page_is_left_out_and_the_next_one_read(tmp_path: Path) -> None:
    (tmp_path / "slow.pdf").write_bytes(endless_pdf(b"", b"/F3 Do", b""))
    with PageReader(timeout=1) as reader:
        first, second, third = reader.read([tmp_path / "slow.pdf"])
    assert isinstance(first, Page)
    assert second == PageError(str(tmp_path / "slow.pdf"), 2, "took longer than 1 s")
    assert isinstance(third, Page)
    assert third.number == 3


def test_a_dead_process_costs_one_page(tmp_path: Path) -> None:
    (tmp_path / "slow.pdf").write_bytes(endless_pdf(b"", b"/F3 Do", b""))
    with PageReader() as reader:
        pages = reader.read([tmp_path / "slow.pdf"])
        assert isinstance(next(pages), Page)
        threading.Timer(0.3, worker_of_this_test().kill).start()
        second, third = pages
    assert isinstance(second, PageError)
    assert second.number == 2
    assert "died (Killed)" in second.reason
    assert isinstance(third, Page)


def test_a_file_is_given_up_after_three_losses_in_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(endless_pdf(*[b"/F3 Do"] * 5))
    Image.fromarray(NOISE).save(tmp_path / "b.png")
    with PageReader(timeout=0.8) as reader:
        outcomes = list(reader.read(find_documents([tmp_path])))
    assert [outcome.number for outcome in outcomes] == [1, 2, 3, None, 1], outcomes[-1]
    assert isinstance(outcomes[3], PageError)
    assert "pages 4 to 5" in outcomes[3].reason
    assert isinstance(outcomes[4], Page)


def test_a_file_that_claims_a_million_pages_is_given_up(reader: PageReader, tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pages_pdf(b"").replace(b"/Count 1", b"/Count 900000"))
    *outcomes, last = reader.read([tmp_path / "a.pdf"])
    assert len(outcomes) == 31
    assert isinstance(outcomes[0], Page)
    assert last == PageError(str(tmp_path / "a.pdf"), None, "pages 32 to 900000 left out, as too many in a row failed")


def test_long_pdfs_are_read_to_the_end(reader: PageReader, tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pages_pdf(*[b"%f g 0 0 100 50 re f" % (index / 255) for index in range(130)]))
    greys = [page.image[0, 0, 0] for page in reader.read([tmp_path / "a.pdf"]) if isinstance(page, Page)]
    assert greys == list(range(130))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS")
def test_memory_is_limited(tmp_path: Path) -> None:
    Image.new("RGB", (8000, 8000)).save(tmp_path / "a.png", compress_level=1)
    Image.fromarray(NOISE).save(tmp_path / "b.png")
    with PageReader(memory_limit=100 << 20) as reader:
        error, page = reader.read(find_documents([tmp_path]))
    assert error == PageError(str(tmp_path / "a.png"), 1, "needs more than memory_limit, 100 MiB")
    assert isinstance(page, Page)


def test_the_next_page_is_decoded_meanwhile(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.fromarray(NOISE).save(tmp_path / f"{name}.png")
    with PageReader() as reader:
        pages = reader.read(find_documents([tmp_path]))
        next(pages)
        with pytest.raises(CembedError, match="running read"):
            next(reader.read([tmp_path / "a.png"]))
        time.sleep(0.3)
        (tmp_path / "b.png").unlink()
        assert isinstance(next(pages), Page)


def test_leaving_the_block_or_the_iteration_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "slow.pdf").write_bytes(endless_pdf(b"", b"/F3 Do"))
    with PageReader() as reader:
        pages = reader.read([tmp_path / "slow.pdf"])
        next(pages)
        process = worker_of_this_test()
        pages.close()  # type: ignore[attr-defined]
        assert not process.is_running()
        pages = reader.read([tmp_path / "slow.pdf"])
        next(pages)
        process = worker_of_this_test()
        assert process.is_running()
    assert not process.is_running()


SCRIPT = """
import sys, os
from cembed.runtime.pages.documents import PageReader
print("started")
with PageReader() as reader:
    for page in reader.read(sys.argv[1:]):
        print(page.number, flush=True)
        import psutil
        print(psutil.Process().children()[0].pid, flush=True)
        if len(sys.argv) > 2:
            os.kill(os.getpid(), 9)
"""


def test_a_script_without_main_guard_and_with_stray_modules_around_it(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "run.py").write_text(SCRIPT)
    command = [sys.executable, "script/run.py", "a.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.stdout.split()[:2] == ["started", "1"], done
    assert done.stderr == ""


def test_the_process_ends_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    (tmp_path / "slow.pdf").write_bytes(endless_pdf(b"", b"/F3 Do"))
    path = str(tmp_path / "slow.pdf")
    done = subprocess.run([sys.executable, tmp_path / "run.py", path, path], capture_output=True, text=True, timeout=30)
    wait_for_end(int(done.stdout.split()[2]))


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the decoding process outlived its parent"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["dpi", "timeout", "max_pixels", "memory_limit"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_settings_are_checked(name: str, value: float) -> None:
    with pytest.raises(CembedError, match=f"{name} is {value}: give a number above 0"):
        PageReader(**{name: value})


def framed(*headers: object) -> bytes:
    texts = [header if isinstance(header, bytes) else json.dumps(header).encode() for header in headers]
    return b"".join(len(text).to_bytes(4, "big") + text for text in texts)


NONSENSE = {
    "a length": b"\xff\xff\xff\xff",
    "no JSON": framed(b"{"),
    "no object": framed([1]),
    "no shape": framed({}),
    "deep JSON": framed(b"[" * 60_000),
    "pages": framed({"pages": "many"}, {"shape": [0]}),
    "negative pages": framed({"pages": -3}, {"shape": [0]}),
    "no end of pages": framed({"pages": 10**12}, {"shape": [0]}),
    "a large shape": framed({"pages": 1}, {"shape": [1 << 40, 1 << 40, 3]}),
    "more than max_pixels": framed({"pages": 1}, {"shape": [1000, 1000, 3]}),
    "negative shape": framed({"pages": 1}, {"shape": [-2, 2, 3]}),
    "a shape of words": framed({"pages": 1}, {"shape": ["a", "b", "c"]}),
    "a shape of floats": framed({"pages": 1}, {"shape": [1.0, 1.0, 3.0]}),
    "no list": framed({"pages": 1}, {"shape": {"a": 1}}),
    "four channels": framed({"pages": 1}, {"shape": [1, 1, 4]}),
}


@pytest.mark.parametrize("reply", NONSENSE.values(), ids=NONSENSE)
def test_a_reply_that_makes_no_sense_is_a_lost_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: bytes
) -> None:
    (tmp_path / "reply").write_bytes(framed({"shape": [0]}) + reply)
    script = f"import sys, time; sys.stdout.buffer.write(open({str(tmp_path / 'reply')!r}, 'rb').read())"
    monkeypatch.setattr(decoder, "BOOT", f"{script}; sys.stdout.flush(); time.sleep(60)")
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    with PageReader(max_pixels=200_000, timeout=20) as reader:
        (lost,) = reader.read([tmp_path / "a.png"])
        assert reader.count_pages([tmp_path / "a.png"]) == 1
    assert isinstance(lost, PageError)
    assert lost.reason == "the decoding process gave an answer that makes no sense"


def test_texts_of_a_reply_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixel = framed({"pages": 1}, {"shape": [1, 1, 3], "warning": "a\n\x1b[1mb" * 999}) + b"abc"
    (tmp_path / "reply").write_bytes(framed({"shape": [0]}) + pixel + framed({"error": "a\nb"}))
    script = f"import sys, time; sys.stdout.buffer.write(open({str(tmp_path / 'reply')!r}, 'rb').read())"
    monkeypatch.setattr(decoder, "BOOT", f"{script}; sys.stdout.flush(); time.sleep(60)")
    for name in ("a.png", "b.png"):
        Image.fromarray(NOISE).save(tmp_path / name)
    with PageReader() as reader:
        warned, failed = reader.read([tmp_path / "a.png", tmp_path / "b.png"])
    assert isinstance(warned, Page)
    assert warned.warning is not None
    assert warned.warning.isprintable()
    assert len(warned.warning) <= 500
    assert failed == PageError(str(tmp_path / "b.png"), None, "a\\nb")


FORKS = """
import os, sys, time, psutil
from cembed.runtime.pages.documents import PageReader
with PageReader() as reader:
    pages = reader.read(sys.argv[1:])
    next(pages)
    print(psutil.Process().children()[0].pid, flush=True)
    if os.fork() == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    os._exit(9)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_forked_child_does_not_keep_the_process(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(FORKS)
    for name in ("a.png", "b.png"):
        Image.fromarray(NOISE).save(tmp_path / name)
    command = [sys.executable, tmp_path / "run.py", tmp_path / "a.png", tmp_path / "b.png"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=30)
    wait_for_end(int(done.stdout))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_forked_child_cannot_spoil_what_its_parent_reads(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(NOISE).save(tmp_path / name)
    with PageReader() as reader:
        pages = reader.read(find_documents([tmp_path]))
        next(pages)
        child = os.fork()
        if child == 0:
            try:  # as code does that a child inherited: it goes on reading, and leaves the block
                mine = [type(outcome).__name__ for outcome in pages]
                reader.__exit__()
                os._exit(0 if mine == ["PageError", "Page"] else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert [type(outcome) for outcome in pages] == [Page, Page]


def test_a_process_that_cannot_start_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "PIL.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with PageReader() as reader, pytest.raises(CembedError, match=r"did not start: .*exit status 3"):
        list(reader.read([tmp_path / "a.png"]))


def test_calls_that_the_one_process_cannot_answer(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    reader = PageReader()
    for call in (lambda: next(reader.read([tmp_path / "a.png"])), lambda: reader.page_count(tmp_path / "a.png")):
        with pytest.raises(CembedError, match="is not open: use it in a with block"):
            call()
    one: Any = tmp_path / "a.png"
    for call in (lambda: next(reader.read(one)), lambda: next(reader.read(str(one))), lambda: reader.count_pages(one)):
        with reader, pytest.raises(CembedError, match="put the one you have into brackets"):
            call()
    with reader:
        pages = reader.read([tmp_path / "a.png"])
        next(pages)
        with pytest.raises(CembedError, match=r"counts before read\(\) only"):
            reader.page_count(tmp_path / "a.png")

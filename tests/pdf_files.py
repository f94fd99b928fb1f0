"""PDF files made by hand, and pictures in every way of coding them: no library decides what is in them."""

from __future__ import annotations

import base64
import hashlib
import io
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

SEEDS = Path(__file__).parent / "native" / "seeds" / "pictures"
WIDTH, HEIGHT = 60, 80


def pdf(objects: list[bytes], trailer: bytes = b"") -> bytes:
    body, offsets = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    end = b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, len(body))
    return body + head + table + end


def stream(content: bytes, about: bytes = b"") -> bytes:
    return b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(content), about, content)


def page(
    content: bytes,
    *others: bytes,
    resources: bytes = b"/XObject << /P 5 0 R >>",
    about: bytes = b"",
    box: bytes = b"0 0 600 800",
    catalog: bytes = b"",
) -> bytes:
    """A PDF of one page, whose content is object 4; `others` are numbered from 5."""
    return pdf(
        [
            b"<< /Type /Catalog /Pages 2 0 R %s >>" % catalog,
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [%s] /Contents 4 0 R /Resources << %s >> %s >>"
            % (box, resources, about),
            stream(content),
            *others,
        ]
    )


def compressed(objects: list[bytes]) -> bytes:
    """The same objects in a stream of objects, but for streams; with a table that is a stream too."""
    body, places, packed = b"%PDF-1.7\n", {}, []
    for number, content in enumerate(objects, 1):
        if b"endstream" in content:
            places[number] = len(body)
            body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
        else:
            packed.append((number, content))
    count, offsets, texts = len(objects), [], b""
    for number, content in packed:
        offsets.append(b"%d %d " % (number, len(texts)))
        texts += content + b" "
    head, holder = b"".join(offsets), len(body)
    about = b"/Type /ObjStm /Filter /FlateDecode /N %d /First %d" % (len(packed), len(head))
    body += b"%d 0 obj\n%s\nendobj\n" % (count + 1, stream(zlib.compress(head + texts), about))
    entries = {number: (1, place, 0) for number, place in places.items()} | {count + 1: (1, holder, 0)}
    entries |= {number: (2, count + 1, index) for index, (number, _) in enumerate(packed)} | {0: (0, 0, 0)}
    entries[count + 2] = (1, len(body), 0)
    table = b"".join(
        bytes([kind]) + place.to_bytes(4, "big") + index.to_bytes(2, "big")
        for _, (kind, place, index) in sorted(entries.items())
    )
    about = b"/Type /XRef /Root 1 0 R /Size %d /W [1 4 2]" % (count + 3)
    return body + b"%d 0 obj\n%s\nendobj\nstartxref\n%d\n%%%%EOF\n" % (count + 2, stream(table, about), len(body))


def rc4(key: bytes, data: bytes) -> bytes:
    box, j, out = list(range(256)), 0, bytearray()
    for i in range(256):
        j = (j + box[i] + key[i % len(key)]) % 256
        box[i], box[j] = box[j], box[i]
    i = j = 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + box[i]) % 256
        box[i], box[j] = box[j], box[i]
        out.append(byte ^ box[(box[i] + box[j]) % 256])
    return bytes(out)


def encrypted(picture: Coded) -> bytes:
    """A page of the picture, by the standard handler with no password, version 1 revision 2 (ISO 32000-1, 7.6.3)."""
    padded = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")
    name, permissions = b"0123456789abcdef", (0xFFFFFFFC).to_bytes(4, "little")
    owner = rc4(hashlib.md5(padded).digest()[:5], padded)
    key = hashlib.md5(padded + owner + permissions + name).digest()[:5]

    def sealed(number: int, content: bytes, about: bytes = b"") -> bytes:
        own = hashlib.md5(key + number.to_bytes(3, "little") + bytes(2)).digest()[:10]
        return stream(rc4(own, content), about)

    handler = b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R"
        b" /Resources << /XObject << /P 5 0 R >> >> >>",
        sealed(4, DRAWN),
        sealed(5, picture.data, picture.about),
        handler % (owner.hex().encode(), rc4(key, padded).hex().encode()),
    ]
    return pdf(objects, b"/Encrypt 6 0 R /ID [<%s> <%s>]" % ((name.hex().encode(),) * 2))


# ---- pictures

DRAWN = b"q 600 0 0 800 0 0 cm /P Do Q"
FRAMED = b"q 300 0 0 400 50 50 cm /P Do Q 1 0 0 rg 500 700 50 50 re f"
"""The picture, and a red square beside it."""


@dataclass(frozen=True)
class Coded:
    """The data of a picture and what its dictionary says; `shared` are JBIG2Globals, which are object 6."""

    data: bytes
    about: bytes
    shared: bytes = b""

    def object(self) -> bytes:
        return stream(self.data, self.about)

    def on_page(self, content: bytes = DRAWN) -> bytes:
        return page(content, self.object(), stream(self.shared))

    def cut(self, share: float) -> Coded:
        return replace(self, data=self.data[: int(len(self.data) * share)])

    def zeroed(self, first: float, last: float) -> Coded:
        a, b = int(len(self.data) * first), int(len(self.data) * last)
        return replace(self, data=self.data[:a] + bytes(b - a) + self.data[b:])


def image(mode: str = "RGB") -> Image.Image:
    rows, columns = np.indices((HEIGHT, WIDTH))
    grey = ((rows // 9 + columns // 7) % 5 * 50 + np.random.default_rng(0).integers(0, 40, (HEIGHT, WIDTH))).clip(
        0, 255
    )
    return Image.merge("RGB", [Image.fromarray((grey * k % 256).astype(np.uint8)) for k in (1, 2, 3)]).convert(mode)


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def about(
    size: tuple[int, int], filters: bytes = b"", space: bytes = b"/DeviceRGB", bits: int = 8, more: bytes = b""
) -> bytes:
    colours = b"/ColorSpace %s /BitsPerComponent %d" % (space, bits) if space else b""
    text = b"/Type /XObject /Subtype /Image /Width %d /Height %d %s %s" % (*size, colours, more)
    return text + (b" /Filter " + filters if filters else b"")


def _seed(name: str) -> bytes:
    return (SEEDS / name).read_bytes()[4:]


def _fax(k: int) -> Coded:
    tiff = saved(image("1"), "TIFF", compression="group4" if k < 0 else "group3")
    with Image.open(io.BytesIO(tiff)) as opened:
        assert isinstance(opened, TiffImageFile)
        (start,), (length,) = opened.tag_v2[273], opened.tag_v2[279]
    parameters = b"/DecodeParms << /K %d /Columns %d /Rows %d >>" % (k, WIDTH, HEIGHT)
    size = (WIDTH, HEIGHT)
    return Coded(tiff[start : start + length], about(size, b"/CCITTFaxDecode", b"/DeviceGray", 1, parameters))


def _jbig2_text() -> Coded:
    data, split = _seed("jbig2_text"), (SEEDS / "jbig2_text").read_bytes()[2]
    at = len(data) * split // 256
    parameters = b"/DecodeParms << /JBIG2Globals 6 0 R >>"
    return Coded(data[at:], about((33, 24), b"/JBIG2Decode", b"/DeviceGray", 1, parameters), data[:at])


def _predicted() -> Coded:
    rows = np.asarray(image("L")).astype(np.int16)
    up = (rows - np.vstack([rows[:1] * 0, rows[:-1]])).astype(np.uint8)
    data = np.hstack([np.full((HEIGHT, 1), 2, np.uint8), up]).tobytes()
    parameters = b"/DecodeParms << /Predictor 15 /Columns %d >>" % WIDTH
    return Coded(zlib.compress(data), about((WIDTH, HEIGHT), b"/FlateDecode", b"/DeviceGray", more=parameters))


def pictures() -> dict[str, Coded]:
    size, grey = (WIDTH, HEIGHT), image("L")
    rgb, flate = image().tobytes(), zlib.compress(image().tobytes())
    jpeg = saved(image(), "JPEG")
    return {
        "jpeg": Coded(jpeg, about(size, b"/DCTDecode")),
        "jpeg, progressive": Coded(saved(image(), "JPEG", progressive=True), about(size, b"/DCTDecode")),
        "jpeg, restarts": Coded(saved(image(), "JPEG", restart_marker_rows=1), about(size, b"/DCTDecode")),
        "jpeg, grey": Coded(saved(grey, "JPEG"), about(size, b"/DCTDecode", b"/DeviceGray")),
        "jpeg, cmyk": Coded(saved(image("CMYK"), "JPEG"), about(size, b"/DCTDecode", b"/DeviceCMYK")),
        "jpeg in flate": Coded(zlib.compress(jpeg), about(size, b"[/FlateDecode /DCTDecode]")),
        "flate": Coded(flate, about(size, b"/FlateDecode")),
        "flate in ascii85": Coded(base64.a85encode(flate) + b"~>", about(size, b"[/ASCII85Decode /FlateDecode]")),
        "flate, predicted": _predicted(),
        "flate, one bit": Coded(
            zlib.compress(image("1").tobytes()), about(size, b"/FlateDecode", b"/DeviceGray", 1, b"/Decode [1 0]")
        ),
        "flate, stencil": Coded(
            zlib.compress(image("1").tobytes()), about(size, b"/FlateDecode", b"", 1, b"/ImageMask true")
        ),
        "hexadecimal": Coded(grey.tobytes().hex().encode() + b">", about(size, b"/ASCIIHexDecode", b"/DeviceGray")),
        "plain": Coded(rgb, about(size)),
        "jpeg 2000": Coded(saved(image(), "JPEG2000"), about(size, b"/JPXDecode", b"")),
        "jpeg 2000, codestream": Coded(saved(image(), "JPEG2000", no_jp2=True), about(size, b"/JPXDecode")),
        "fax, group 3": _fax(0),
        "fax, group 4": _fax(-1),
        "jbig2": Coded(_seed("jbig2_generic"), about((33, 24), b"/JBIG2Decode", b"/DeviceGray", 1)),
        "jbig2, text": _jbig2_text(),
        "lzw": Coded(_seed("lzw"), about((33, 24), b"/LZWDecode", b"/DeviceGray")),
        "runs": Coded(_seed("runs"), about((20, 18), b"/RunLengthDecode", b"/DeviceGray")),
    }

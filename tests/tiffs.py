"""Writes TIFF files of every kind from samples that are known. Only fax and JPEG data come from Pillow's encoders."""

from __future__ import annotations

import io
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

NONE, RLE, G3, G4, LZW, JPEG, DEFLATE, PACKBITS, OLD_DEFLATE, LZMA = 1, 2, 3, 4, 5, 7, 8, 32773, 32946, 34925
WHITE, BLACK, RGB, PALETTE, MASK, CMYK, YCBCR, LAB, ICC_LAB = 0, 1, 2, 3, 4, 5, 6, 8, 9
FAX = {RLE: "tiff_ccitt", G3: "group3", G4: "group4"}
CODES = {"B": 1, "H": 3, "I": 4, "R": 5, "Q": 16}  # TIFF's types; R is a fraction, its parts are given one by one


@dataclass(frozen=True)
class Frame:
    """`samples` [height, width, samples] as they are stored; `tile` is its width and height, `tags` go over all."""

    samples: np.ndarray[Any, Any]
    bits: int = 8
    photometric: int = BLACK
    compression: int = NONE
    planar: bool = False
    tile: tuple[int, int] | None = None
    rows: int = 13
    predictor: int = 1
    fill_order: int = 1
    tables: bool = False  # JPEG's quantisation and codes apart, in JPEGTables
    subsampled: bool = False  # YCbCr
    tags: dict[int, tuple[str, list[int] | bytes] | None] = field(default_factory=dict)


def tiff(*frames: Frame, order: str = "<", big: bool = False) -> bytes:
    """A file of these frames, directories after the pixels."""
    word = "Q" if big else "I"
    start = struct.pack(order + "HHH" if big else order + "H", *((43, 8, 0) if big else (42,)))
    body = (b"II" if order == "<" else b"MM") + start + bytes(struct.calcsize(word))
    link = len(body) - struct.calcsize(word)
    for frame in frames:
        offsets = []
        pieces = list(_encoded(frame, order))
        for piece in pieces:
            offsets.append(len(body))
            body += piece
        body += b"\0" * (len(body) % 2)
        body = body[:link] + struct.pack(order + word, len(body)) + body[link + struct.calcsize(word) :]
        entries = _tags(frame, offsets, [len(piece) for piece in pieces])
        body += _directory(entries, len(body), order, word)
        link = len(body) - len(_outside(entries, order, word)) - struct.calcsize(word)
    return body


def _tags(frame: Frame, offsets: list[int], counts: list[int]) -> dict[int, tuple[str, list[int] | bytes]]:
    height, width, samples = frame.samples.shape
    layout = "I" if max(offsets) < 1 << 32 else "Q"
    tags: dict[int, tuple[str, list[int] | bytes] | None] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [frame.bits] * samples),
        259: ("H", [frame.compression]),
        262: ("H", [frame.photometric]),
        277: ("H", [samples]),
        284: ("H", [2 if frame.planar else 1]),
    }
    if frame.tile:
        tags |= {322: ("I", [frame.tile[0]]), 323: ("I", [frame.tile[1]]), 324: (layout, offsets), 325: ("I", counts)}
    else:
        tags |= {278: ("I", [frame.rows]), 273: (layout, offsets), 279: ("I", counts)}
    if frame.fill_order != 1:
        tags[266] = ("H", [frame.fill_order])
    if frame.predictor != 1:
        tags[317] = ("H", [frame.predictor])
    if frame.samples.dtype.kind in "if":
        tags[339] = ("H", [{"i": 2, "f": 3}[frame.samples.dtype.kind]] * samples)
    if frame.tables:
        plane = 1 if frame.planar else samples
        tags[347] = ("B", _jpeg_tables(_jpeg(np.zeros((16, 16, plane), np.uint8), frame))[0])
    if frame.photometric == YCBCR:
        tags[530] = ("H", [2, 2] if frame.subsampled else [1, 1])
    return {tag: value for tag, value in sorted((tags | frame.tags).items()) if value is not None}


def _packed(values: list[int] | bytes, code: str, order: str) -> bytes:
    return bytes(values) if code == "B" else struct.pack(f"{order}{len(values)}{code.replace('R', 'I')}", *values)


def _outside(entries: dict[int, tuple[str, list[int] | bytes]], order: str, word: str) -> bytes:
    data = (_packed(values, code, order) for code, values in entries.values())
    return b"".join(each + b"\0" * (len(each) % 2) for each in data if len(each) > struct.calcsize(word))


def _directory(entries: dict[int, tuple[str, list[int] | bytes]], start: int, order: str, word: str) -> bytes:
    inline = struct.calcsize(word)
    place = start + struct.calcsize("Q" if word == "Q" else "H") + (4 + 2 * inline) * len(entries) + inline
    table = struct.pack(order + ("Q" if word == "Q" else "H"), len(entries))
    for tag, (code, values) in entries.items():
        data = _packed(values, code, order)
        if len(data) > inline:
            place, data = place + len(data) + len(data) % 2, struct.pack(order + word, place)
        count = len(values) // 2 if code == "R" else len(values)
        table += struct.pack(order + "HH" + word, tag, CODES[code], count) + data.ljust(inline, b"\0")
    return table + bytes(inline) + _outside(entries, order, word)


# ---- pixels


def _encoded(frame: Frame, order: str) -> Iterator[bytes]:
    planes = np.split(frame.samples, frame.samples.shape[2], axis=2) if frame.planar else [frame.samples]
    for plane in planes:
        for segment in _segments(plane, frame):
            data = _compressed(segment, frame, order)
            yield _reversed(data) if frame.fill_order == 2 and frame.compression != JPEG else data


def _segments(plane: np.ndarray[Any, Any], frame: Frame) -> Iterator[np.ndarray[Any, Any]]:
    height, width, _ = plane.shape
    if frame.tile is None:
        yield from (plane[top : top + frame.rows] for top in range(0, height, frame.rows))
        return
    wide, high = frame.tile
    padded = np.pad(plane, ((0, -height % high), (0, -width % wide), (0, 0)), mode="edge")
    for top in range(0, height, high):
        yield from (padded[top : top + high, left : left + wide] for left in range(0, width, wide))


def _compressed(segment: np.ndarray[Any, Any], frame: Frame, order: str) -> bytes:
    if frame.compression == JPEG:
        data = _jpeg(segment, frame)
        return _jpeg_tables(data)[1] if frame.tables else data
    if frame.compression in FAX:
        return _fax(segment[..., 0], frame)
    rows = packed_bits(_predicted(segment, frame, order), frame.bits, order)
    if frame.photometric == YCBCR and frame.subsampled:
        rows = _data_units(segment)
    return CODECS[frame.compression](rows)


def packed_bits(values: np.ndarray[Any, Any], bits: int, order: str) -> np.ndarray[Any, Any]:
    """Rows of bytes; samples of odd depths one after the other, from the upper bit down."""
    flat = np.ascontiguousarray(values).reshape(len(values), -1)
    if bits in (8, 16, 32, 64):
        return np.ascontiguousarray(flat.astype(flat.dtype.newbyteorder(order))).view(np.uint8)
    if bits == 24:
        each = flat.astype(order + "u4")[..., None].view(np.uint8)
        return np.ascontiguousarray(each[..., :3] if order == "<" else each[..., 1:]).reshape(len(values), -1)
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits(
        (flat[..., None].astype(np.int64) >> shifts & 1).reshape(len(values), -1).astype(np.uint8), axis=1
    )


def _predicted(segment: np.ndarray[Any, Any], frame: Frame, order: str) -> np.ndarray[Any, Any]:
    if frame.predictor == 2:
        whole = segment.view(f"u{segment.dtype.itemsize}")
        return np.diff(whole, axis=1, prepend=np.zeros_like(whole[:, :1]))
    if frame.predictor == 3:
        height, _, samples = segment.shape
        size = segment.dtype.itemsize
        flat = segment.astype(segment.dtype.newbyteorder(">")).reshape(height, -1)[..., None].view(np.uint8)
        planes = flat.reshape(height, -1, size).transpose(0, 2, 1).reshape(height, -1)
        before = np.concatenate([np.zeros((height, samples), np.uint8), planes[:, :-samples]], axis=1)
        return (planes - before).view(f"{order}u{size}")
    return segment


def _data_units(segment: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Four values of Y and one of Cb and Cr each; colour is the same in 2 x 2 pixels already."""
    padded = np.pad(segment, ((0, len(segment) % 2), (0, segment.shape[1] % 2), (0, 0)), mode="edge")
    height, width, _ = padded.shape
    blocks = padded.reshape(height // 2, 2, width // 2, 2, 3).transpose(0, 2, 1, 3, 4)
    luma = blocks[..., 0].reshape(height // 2, width // 2, 4)
    return np.concatenate([luma, blocks[:, :, 0, 0, 1:]], axis=2).reshape(height // 2, -1)


def _reversed(data: bytes) -> bytes:
    return bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)


def lzw(rows: np.ndarray[Any, Any]) -> bytes:
    codes: list[tuple[int, int]] = [(256, 9)]
    table, width, word = {bytes([value]): value for value in range(256)}, 9, b""
    following = 258
    for value in rows.tobytes():
        longer = word + bytes([value])
        if longer in table:
            word = longer
            continue
        codes.append((table[word], width))
        table[longer], word = following, bytes([value])
        width = {511: 10, 1023: 11, 2047: 12}.get(following, width)
        following += 1
        if following == 4095:
            codes.append((256, width))
            table, width, following = {bytes([value]): value for value in range(256)}, 9, 258
    codes.append((table[word], width))
    width = {511: 10, 1023: 11, 2047: 12}.get(following, width)
    codes.append((257, width))
    bits = np.array([bit for code, size in codes for bit in f"{code:0{size}b}"]) == "1"
    return np.packbits(bits).tobytes()


def packbits(rows: np.ndarray[Any, Any]) -> bytes:
    out = b""
    for row in rows:
        for value, run in groupby(row.tobytes()):
            count = len(list(run))
            for start in range(0, count, 128):
                length = min(128, count - start)
                out += bytes([257 - length, value]) if length > 1 else bytes([0, value])
    return out


CODECS: dict[int, Callable[[np.ndarray[Any, Any]], bytes]] = {
    NONE: lambda rows: rows.tobytes(),
    LZW: lzw,
    PACKBITS: packbits,
    DEFLATE: lambda rows: zlib.compress(rows.tobytes()),
    OLD_DEFLATE: lambda rows: zlib.compress(rows.tobytes(), 1),
    LZMA: lambda rows: lzma.compress(rows.tobytes()),
}


def _fax(values: np.ndarray[Any, Any], frame: Frame) -> bytes:
    file = io.BytesIO()
    tags = {tag: value[1][0] for tag, value in frame.tags.items() if tag == 292 and value is not None}
    image = Image.fromarray(values.astype(bool))
    image.save(file, "TIFF", compression=FAX[frame.compression], tiffinfo={278: len(values), **tags})
    written = Image.open(file).tag_v2
    return file.getvalue()[written[273][0] :][: written[279][0]]


def _jpeg(segment: np.ndarray[Any, Any], frame: Frame) -> bytes:
    """Samples as they are, but YCbCr, which is made of RGB."""
    file, samples = io.BytesIO(), segment.shape[2]
    if samples == 4:
        image = Image.fromarray(255 - segment, "CMYK")  # Pillow stores it inverted
        image.save(file, "JPEG", quality=95)
    elif samples == 3:
        image = Image.fromarray(segment)
        ours = frame.photometric == YCBCR
        image.save(file, "JPEG", quality=95, keep_rgb=not ours, subsampling=2 if frame.subsampled else 0)
    else:
        Image.fromarray(segment[..., 0]).save(file, "JPEG", quality=95)
    return file.getvalue()


def _jpeg_tables(data: bytes) -> tuple[bytes, bytes]:
    """The abbreviated stream of tables, and the one of the picture."""
    tables, picture, place = b"\xff\xd8", b"\xff\xd8", 2
    while data[place + 1] != 0xDA:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] in (0xDB, 0xC4):
            tables += data[place:end]
        elif data[place + 1] & 0xF0 != 0xE0:
            picture += data[place:end]
        place = end
    return tables + b"\xff\xd9", picture + data[place:]

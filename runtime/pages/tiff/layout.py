"""What the tags of a TIFF frame say of its pixels, and which combinations are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum

from cembed.runtime.pages.images import RefusedError
from cembed.runtime.pages.tiff.tags import Directory, Values


class Tag(IntEnum):
    ImageWidth = 256
    ImageLength = 257
    BitsPerSample = 258
    Compression = 259
    PhotometricInterpretation = 262
    FillOrder = 266
    StripOffsets = 273
    Orientation = 274
    SamplesPerPixel = 277
    RowsPerStrip = 278
    StripByteCounts = 279
    PlanarConfiguration = 284
    T4Options = 292
    T6Options = 293
    Predictor = 317
    ColorMap = 320
    TileWidth = 322
    TileLength = 323
    TileOffsets = 324
    TileByteCounts = 325
    InkSet = 332
    ExtraSamples = 338
    SampleFormat = 339
    JPEGTables = 347
    YCbCrCoefficients = 529
    YCbCrSubSampling = 530
    ReferenceBlackWhite = 532
    ImageDepth = 32997


class Compression(IntEnum):
    NONE = 1
    CCITT_RLE = 2
    CCITT_G3 = 3
    CCITT_G4 = 4
    LZW = 5
    OLD_JPEG = 6
    JPEG = 7
    DEFLATE = 8
    JBIG_T85 = 9
    JBIG_T43 = 10
    JPEG_XR = 22610
    NEXT = 32766
    CCITT_RLEW = 32771
    PACKBITS = 32773
    THUNDERSCAN = 32809
    PIXAR_FILM = 32908
    PIXAR_LOG = 32909
    OLD_DEFLATE = 32946
    APERIO_JPEG_2000_YCBCR = 33003
    APERIO_JPEG_2000_RGB = 33005
    JBIG = 34661
    SGI_LOG = 34676
    SGI_LOG_24 = 34677
    JPEG_2000 = 34712
    LERC = 34887
    LOSSY_JPEG = 34892
    LZMA = 34925
    ZSTD = 50000
    WEBP = 50001
    JPEG_XL = 50002
    JPEG_XL_DNG = 52546


class Photometric(IntEnum):
    WHITE_IS_ZERO = 0
    BLACK_IS_ZERO = 1
    RGB = 2
    PALETTE = 3
    MASK = 4
    CMYK = 5
    YCBCR = 6
    CIE_LAB = 8
    ICC_LAB = 9
    ITU_LAB = 10
    CFA = 32803
    LOG_L = 32844
    LOG_LUV = 32845
    LINEAR_RAW = 34892


# Samples of a pixel without those that are extra.
COLOURS: dict[int, int] = {
    Photometric.WHITE_IS_ZERO: 1,
    Photometric.BLACK_IS_ZERO: 1,
    Photometric.RGB: 3,
    Photometric.PALETTE: 1,
    Photometric.MASK: 1,
    Photometric.CMYK: 4,
    Photometric.YCBCR: 3,
    Photometric.CIE_LAB: 3,
    Photometric.ICC_LAB: 3,
}
GREYS = (Photometric.WHITE_IS_ZERO, Photometric.BLACK_IS_ZERO, Photometric.MASK)
LAB = (Photometric.CIE_LAB, Photometric.ICC_LAB)
FAX = (Compression.CCITT_RLE, Compression.CCITT_G3, Compression.CCITT_G4)
PREDICTED = (Compression.LZW, Compression.DEFLATE, Compression.OLD_DEFLATE, Compression.LZMA, Compression.ZSTD)
LOSSLESS = (Compression.NONE, Compression.PACKBITS, *PREDICTED)
KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}  # SampleFormat as numpy names it; 4 is undefined, for which integers are usual
FLOAT_BITS, PREDICTED_BITS = (16, 32, 64), (8, 16, 32, 64)
# Bytes that one byte of a file can become, and rows that it can hold the codes of; others are without such limits.
_MOST_BYTES: dict[int, int] = {
    Compression.NONE: 1,
    Compression.PACKBITS: 64,
    Compression.LZW: 3000,
    Compression.DEFLATE: 1100,
    Compression.OLD_DEFLATE: 1100,
    Compression.LZMA: 20_000,
}
_MOST_ROWS: dict[int, int] = dict.fromkeys(FAX, 8)
_LONGEST_SIDE = (1 << 31) - 1
_PIECE_BYTES = 1 << 20
ASSOCIATED, UNASSOCIATED = 1, 2  # values of ExtraSamples


@dataclass(frozen=True)
class Segments:
    """Strips or tiles: `across` of them side by side, each `width` x `height` pixels, tiles at the edges too."""

    tiled: bool
    width: int
    height: int
    across: int
    down: int
    offsets: list[int]
    counts: list[int] | None


@dataclass(frozen=True, eq=False)
class Layout:
    """A frame that can be read; `layout_of` makes and checks it. `alpha` is the number of that sample,
    `made_rgb` says that libtiff hands out RGB.
    """

    frame: Directory
    width: int
    height: int
    bits: int
    samples: int
    planes: int
    kind: str
    photometric: int
    compression: int
    predictor: int
    fill_order: int
    orientation: int
    alpha: int | None
    associated: bool
    segments: Segments
    made_rgb: bool

    @property
    def colours(self) -> int:
        return COLOURS[self.photometric]

    @property
    def tabled(self) -> bool:
        """Whether pixels are less than bytes, so that a table tells the colours of a whole byte."""
        single = self.samples == 1 and self.bits in (1, 2, 4) and self.kind == "u"
        return single and self.photometric in (*GREYS, Photometric.PALETTE)

    @property
    def plane_samples(self) -> int:
        return 1 if self.planes > 1 else self.samples

    @property
    def row_bytes(self) -> int:
        """Of a row of one segment, decoded."""
        return -(-self.segments.width * self.plane_samples * self.bits // 8)

    def rows(self, down: int) -> int:
        """Rows of the segments number `down` from the top, as they are stored."""
        whole = self.segments.height
        return whole if self.segments.tiled else min(whole, self.height - down * whole)


def layout_of(frame: Directory) -> Layout:
    """What is to be known to read a frame. Raises RefusedError, with its tags, where it cannot be read right."""
    width, height = frame.number(Tag.ImageWidth, 0), frame.number(Tag.ImageLength, 0)
    if not (0 < width <= _LONGEST_SIDE and 0 < height <= _LONGEST_SIDE):
        raise RefusedError(f"damaged: a frame of {width} x {height} pixels")
    compression, samples = frame.number(Tag.Compression, 1), frame.number(Tag.SamplesPerPixel, 1)
    photometric = _photometric(frame, compression, samples)
    alpha, associated = _alpha(frame, photometric, samples)
    layout = Layout(
        frame=frame,
        width=width,
        height=height,
        bits=_alike(frame, Tag.BitsPerSample, 1, samples),
        samples=samples,
        planes=samples if frame.number(Tag.PlanarConfiguration, 1) == 2 else 1,
        kind="u" if photometric in LAB else KINDS.get(_alike(frame, Tag.SampleFormat, 1, samples), "complex"),
        photometric=photometric,
        compression=compression,
        predictor=frame.number(Tag.Predictor, 1) if compression in PREDICTED else 1,
        fill_order=frame.number(Tag.FillOrder, 1),
        orientation=frame.number(Tag.Orientation, 1),
        alpha=alpha,
        associated=associated,
        segments=_segments(frame, width, height),
        made_rgb=photometric == Photometric.YCBCR and not _plain_luma(frame, compression),
    )
    layout = replace(layout, segments=_cut(layout))
    if _too_large(layout):
        raise RefusedError(f"damaged: {width} x {height} pixels cannot be in a file of {frame.file.size} bytes")
    for wrong, why in (*_refused_storage(layout), *_refused_colours(layout)):
        if wrong:
            raise refusal(frame, why)
    return layout


def _photometric(frame: Directory, compression: int, samples: int) -> int:
    """PhotometricInterpretation; where it is missing, what libtiff takes it for."""
    fax = Photometric.WHITE_IS_ZERO if compression in FAX else Photometric.BLACK_IS_ZERO
    photometric = frame.number(Tag.PhotometricInterpretation, Photometric.RGB if samples >= 3 else fax)
    if photometric not in COLOURS:
        raise refusal(frame, "pixels of this kind are not read")
    if samples < COLOURS[photometric]:
        raise refusal(frame, "damaged: there are too few samples for these colours")
    return photometric


def _alike(frame: Directory, tag: Tag, default: int, samples: int) -> int:
    values = frame.values(tag)
    if values is None:
        return default
    if len(set(values.flat[:samples].tolist())) > 1:
        raise refusal(frame, f"samples of several kinds ({tag.name}) are not read")
    return int(values.flat[0])


def _alpha(frame: Directory, photometric: int, samples: int) -> tuple[int | None, bool]:
    """The number of the sample that is alpha, and whether the colours have been multiplied by it."""
    extra = frame.values(Tag.ExtraSamples)
    if extra is None and samples == COLOURS[photometric] + 1 and photometric != Photometric.PALETTE:
        return samples - 1, False  # most who say nothing of the last sample mean that
    for index, meaning in enumerate([] if extra is None else extra.tolist(), COLOURS[photometric]):
        if meaning in (ASSOCIATED, UNASSOCIATED) and index < samples:
            return index, meaning == ASSOCIATED
    return None, False


def _plain_luma(frame: Directory, compression: int) -> bool:
    """Whether YCbCr is that of JFIF and as wide as Y; else libtiff makes RGB of it."""
    sampling, reference = frame.values(Tag.YCbCrSubSampling), frame.values(Tag.ReferenceBlackWhite)
    usual = reference is None or reference.tolist() == [[0, 1], [255, 1], [128, 1], [255, 1], [128, 1], [255, 1]]
    whole = sampling is not None and sampling.tolist() == [1, 1] and frame.values(Tag.YCbCrCoefficients) is None
    return compression != Compression.JPEG and whole and usual


def _segments(frame: Directory, width: int, height: int) -> Segments:
    tiled = frame.values(Tag.TileWidth) is not None
    offsets = frame.values(Tag.TileOffsets if tiled else Tag.StripOffsets)
    counts = frame.values(Tag.TileByteCounts if tiled else Tag.StripByteCounts)
    if tiled:
        size = frame.number(Tag.TileWidth, 0), frame.number(Tag.TileLength, 0)
    else:
        size = width, min(frame.number(Tag.RowsPerStrip, height) or height, height)
    if offsets is None or min(size) < 1:
        raise RefusedError("damaged: a frame without strips or tiles")
    across, down = -(-width // size[0]), -(-height // size[1])
    return Segments(tiled, *size, across, down, offsets.tolist(), None if counts is None else counts.tolist())


def _too_large(layout: Layout) -> bool:
    """Whether the greater part of a page cannot be there: dimensions are wrong, or the file has been cut."""
    size, rows = layout.frame.file.size, layout.height * layout.planes
    length = rows * layout.width * layout.plane_samples * layout.bits // 8
    most_bytes = length if layout.made_rgb else _MOST_BYTES.get(layout.compression, length)
    return length > 2 * size * most_bytes or rows > 2 * size * _MOST_ROWS.get(layout.compression, rows)


def _cut(layout: Layout) -> Segments:
    """One strip for all of an uncompressed frame is cut, as if there were many, to be read piece by piece."""
    old = layout.segments
    if layout.compression != Compression.NONE or layout.made_rgb or old.tiled or old.down > 1:
        return old
    height = max(1, _PIECE_BYTES // layout.row_bytes)
    down = -(-layout.height // height)
    offsets = [start + row * height * layout.row_bytes for start in old.offsets[: layout.planes] for row in range(down)]
    return replace(old, height=min(height, layout.height), down=down, offsets=offsets, counts=None)


def _refused_storage(layout: Layout) -> Iterator[tuple[bool, str]]:
    bits, samples, compression = layout.bits, layout.plane_samples, layout.compression
    yield compression not in (*LOSSLESS, *FAX, Compression.JPEG), "this compression is not read"
    yield layout.kind == "complex" or (layout.kind == "f" and bits not in FLOAT_BITS), "such numbers are not read"
    yield not (1 <= bits <= 32 or bits == 64), "so many bits are not read"
    yield compression in FAX and (bits, samples) != (1, 1), "damaged: fax compression is for single bits"
    yield compression == Compression.JPEG and (bits != 8 or samples > 4), "JPEG like this is not read"
    yield layout.predictor not in (1, 2, 3), "this predictor is not read"
    yield layout.predictor == 2 and bits not in PREDICTED_BITS, "this predictor is not read with so many bits"
    yield layout.predictor == 3 and layout.kind != "f", "damaged: predictor 3 is for floats"
    yield layout.frame.number(Tag.ImageDepth, 1) != 1, "volumes (ImageDepth) are not read"


def _refused_colours(layout: Layout) -> Iterator[tuple[bool, str]]:
    photometric, bits, extra = layout.photometric, layout.bits, layout.samples - layout.colours
    if photometric == Photometric.PALETTE:
        yield bits > 16 or layout.kind != "u", "damaged: no number in a palette is like this"
        yield layout.compression == Compression.JPEG, "damaged: JPEG of a palette"
    plain = (bits, layout.samples, layout.planes, layout.kind) == (8, 3, 1, "u")
    yield photometric == Photometric.YCBCR and not plain, "YCbCr like this is not read"
    yield photometric in LAB and bits not in (8, 16), "Lab colours with so many bits are not read"
    yield (
        photometric == Photometric.CMYK and layout.frame.number(Tag.InkSet, 1) != 1,
        "inks other than CMYK are not read",
    )
    yield photometric in GREYS and extra > 1 and layout.alpha is None, "several channels without a colour are not read"
    plus = photometric in (Photometric.BLACK_IS_ZERO, Photometric.RGB)
    yield layout.associated and not plus, "colours of this kind that alpha was multiplied into are not read"


def refusal(frame: Directory, why: str) -> RefusedError:
    """Names the tags on which the reading of a frame depends."""
    tags = (Tag.Compression, Tag.PhotometricInterpretation, Tag.BitsPerSample, Tag.SampleFormat, Tag.SamplesPerPixel,
            Tag.PlanarConfiguration, Tag.ExtraSamples, Tag.Predictor)  # fmt: skip
    found = [(tag, frame.values(tag)) for tag in tags]
    return RefusedError(f"{why}: {', '.join(_told(tag, values) for tag, values in found if values is not None)}")


def _told(tag: Tag, values: Values) -> str:
    numbers = [int(value) for value in values.flat[:8]]
    text = str(numbers[0]) if len(set(numbers)) == 1 else "/".join(map(str, numbers))
    names: dict[Tag, type[IntEnum]] = {Tag.Compression: Compression, Tag.PhotometricInterpretation: Photometric}
    known = [member.name for member in names.get(tag, ()) if member == numbers[0]]
    return f"{tag.name} {text}" + "".join(f" ({name.replace('_', ' ')})" for name in known)

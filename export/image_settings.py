"""How a checkpoint's images are prepared: which of its files counts, and what it says; as transformers 5 does it.

transformers takes the `image_processor` in `processor_config.json` before `preprocessor_config.json`, and what neither
says from the class of the processor. An adapter's own files go before those of its base: it was trained with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from cembed.export.settings import Settings, is_number, read_json
from cembed.runtime.bundle.image_processing import MAX_TILES, ImageProcessing, Tiles
from cembed.runtime.embed.tiles import keep_ratio, whole_tiles
from cembed.runtime.errors import CembedError

NESTED, LEGACY = "processor_config.json", "preprocessor_config.json"
SHARED: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
QWEN: dict[str, Any] = SHARED | {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
SIGLIP: dict[str, Any] = SHARED | {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "do_pad": False,
}
IDEFICS3: dict[str, Any] = SHARED | {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 1,
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
}
RESAMPLE = {"smart": 3, "fixed": 3, "tiles": 1}
"""Pillow's numbers of bicubic and Lanczos resampling."""
IDEFICS3_EDGE = 4096
"""What its processor makes of pages at most."""


@dataclass(frozen=True)
class Geometry:
    """What a backbone says of its images, as in `manifest.ImageProcessing`."""

    resize: Literal["smart", "fixed", "tiles"]
    patch_size: int
    merge_size: int
    window_size: int = 0


def find_settings(places: Sequence[Path]) -> list[Settings]:
    """The image settings in `places`, those that count first. Raises CembedError if there are none."""
    found: list[Settings] = []
    for place in places:
        if (place / NESTED).exists():
            nested = Settings(str(place / NESTED), read_json(place / NESTED))
            found += [nested.section("image_processor")] if nested.has("image_processor") else []
        if (place / LEGACY).exists():
            found.append(Settings.read(place / LEGACY))
    if not found:
        raise CembedError(f"{places[-1] / LEGACY} is missing")
    return found


def warn_of_others(found: Sequence[Settings], parse: Callable[[Settings], ImageProcessing]) -> None:
    """A warning for the first of several settings that says otherwise than the one that counts."""
    used = parse(found[0])
    for other in found[1:]:
        if words := difference(used, other, parse):
            message = f"images are prepared as {found[0].where} says, not {other.where}: {words}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return


def difference(used: ImageProcessing, other: Settings, parse: Callable[[Settings], ImageProcessing]) -> str:
    try:
        theirs = parse(other)
    except CembedError as error:
        return str(error)
    names = [field.name for field in fields(used) if getattr(used, field.name) != getattr(theirs, field.name)]
    return ", ".join(f"{name} {getattr(used, name)}, not {getattr(theirs, name)}" for name in names)


def smart_image(given: Settings, geometry: Geometry, frames: int) -> ImageProcessing:
    """Settings of a Qwen2VLImageProcessor, for a tower whose patches are `frames` images deep."""
    check_type(given, "Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")
    processor = given.over(QWEN)
    if not given.has("size"):
        processor = Settings(given.where, {**processor.values, "size": QWEN["size"]})
    processor.require("patch_size", geometry.patch_size)
    processor.require("merge_size", geometry.merge_size)
    processor.require("temporal_patch_size", frames)
    smallest, largest = pixel_limits(processor)
    return image_processing(processor, geometry, smallest, largest)


def pixel_limits(processor: Settings) -> tuple[int, int]:
    """Areas in pixels: `size` has them as shortest_edge and longest_edge, and min_pixels and max_pixels go before."""
    size = dict(processor.section("size").values)
    for edge, pixels in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if processor.has(pixels):
            size.pop(pixels, None)
            size[edge] = processor.values[pixels]
    limits = Settings(f"{processor.where}: size", size)
    if unknown := size.keys() - {"shortest_edge", "longest_edge"}:
        limits.refuse(sorted(unknown)[0], "shortest_edge and longest_edge, or min_pixels and max_pixels beside size")
    smallest, largest = (limits.count(edge, most=1 << 40) for edge in ("shortest_edge", "longest_edge"))
    if smallest > largest:
        limits.refuse("longest_edge", f"a number of pixels from shortest_edge, {smallest}, on")
    return smallest, largest


def fixed_image(given: Settings, geometry: Geometry, side: int) -> ImageProcessing:
    """Settings of a SiglipImageProcessor, for a tower that sees `side` x `side` pixels."""
    check_type(given, "SiglipImageProcessor")
    processor = given.over(SIGLIP)
    for switch in ("do_center_crop", "do_pad"):
        processor.require(switch, False, None)
    size = square_size(processor)
    for name in ("height", "width"):
        size.require(name, side)
    if given.has("image_seq_length"):
        given.require("image_seq_length", (side // geometry.patch_size) ** 2)
    return image_processing(processor, geometry, side**2, side**2)


def square_size(processor: Settings) -> Settings:
    """Height and width, which may come as a list."""
    size = processor.values["size"]
    both = dict(zip(("height", "width"), size, strict=False)) if isinstance(size, list) else size
    found = Settings(processor.where, {"size": both}).section("size")
    if unknown := found.values.keys() - {"height", "width"}:
        found.refuse(sorted(unknown)[0], "height and width")
    return found


def tiled_image(given: Settings, geometry: Geometry, side: int) -> ImageProcessing:
    """Settings of an Idefics3ImageProcessor, for a tower that sees tiles of `side` x `side` pixels."""
    check_type(given, "Idefics3ImageProcessor")
    processor = given.over(IDEFICS3)
    for size in ("size", "max_image_size"):
        if not given.has(size):
            processor = Settings(given.where, {**processor.values, size: IDEFICS3[size]})
    processor.require("do_image_splitting", True)
    edges = edge_of(processor, "max_image_size"), edge_of(processor, "size")
    if edges[0] != side:
        processor.section("max_image_size").refuse("longest_edge", f"{side}, the image_size of the vision tower")
    row = whole_tiles(*keep_ratio(1, 1, edges[1]), side)[0] // side  # a square page has the most
    most = Tiles.count(row, row)
    if most > MAX_TILES:
        processor.section("size").refuse("longest_edge", f"a number that makes at most {MAX_TILES} tiles of {side}")
    whole = "<fake_token_around_image><global-img>{image}<fake_token_around_image>"
    tile = "<fake_token_around_image><row_{row}_col_{column}>{image}"
    tiles = Tiles(*edges, tile=tile, row_end="\n", page="\n" + whole, alone=whole)
    return replace(image_processing(processor, geometry, side**2, most * side**2), tiles=tiles)


def edge_of(processor: Settings, name: str) -> int:
    """The longest_edge of a size that says no more than that."""
    size = processor.section(name)
    for unknown in sorted(size.values.keys() - {"longest_edge"}):
        if size.has(unknown):
            size.refuse(unknown, "longest_edge alone")
    return size.count("longest_edge", most=IDEFICS3_EDGE)


def check_type(given: Settings, *known: str) -> None:
    """Raises CembedError for the settings of another image processor; each has had variants of its own name."""
    if given.has("image_processor_type"):
        kind = given.text("image_processor_type")
        if kind.removesuffix("Fast").removesuffix("Pil") not in known:
            given.refuse("image_processor_type", known[0])


def image_processing(processor: Settings, geometry: Geometry, smallest: int, largest: int) -> ImageProcessing:
    for switch in ("do_resize", "do_rescale", "do_normalize"):
        processor.require(switch, True)
    processor.require("resample", RESAMPLE[geometry.resize])
    if 0 in (std := channels(processor, "image_std")):
        processor.refuse("image_std", "numbers other than 0")
    return ImageProcessing(
        resize=geometry.resize,
        patch_size=geometry.patch_size,
        merge_size=geometry.merge_size,
        min_pixels=smallest,
        max_pixels=largest,
        rescale_factor=processor.positive("rescale_factor"),
        mean=channels(processor, "image_mean"),
        std=std,
        window_size=geometry.window_size,
    )


def channels(processor: Settings, name: str) -> tuple[float, float, float]:
    """A number for each channel, or one for all three."""
    value = processor.values.get(name)
    values = value if isinstance(value, list) else [value] * 3
    if len(values) != 3 or not all(map(is_number, values)):
        processor.refuse(name, "three numbers, or one")
    red, green, blue = map(float, values)
    return red, green, blue

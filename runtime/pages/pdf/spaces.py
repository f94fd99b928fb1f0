"""Colour spaces of PDF pictures: how many numbers a pixel has, and what is missing."""

from __future__ import annotations

from typing import Any

from cembed.runtime.pages.pdf.filters import SHORT
from cembed.runtime.pages.pdf.objects import Objects
from cembed.runtime.pages.pdf.values import Stream

_COMPONENTS = {
    "DeviceGray": 1, "G": 1, "CalGray": 1, "Indexed": 1, "I": 1, "Separation": 1,
    "DeviceRGB": 3, "RGB": 3, "CalRGB": 3, "Lab": 3, "DeviceCMYK": 4, "CMYK": 4,
}  # fmt: skip


def components(objects: Objects, space: Any, resources: dict[str, Any]) -> int:
    """Numbers of a pixel, 0 if unknown."""
    space = objects.get(space)
    if isinstance(space, str) and space not in _COMPONENTS:
        return components(objects, objects.dictionary(resources, "ColorSpace").get(space), {})
    family = objects.get(space[0]) if isinstance(space, list) and space else space
    if family == "ICCBased":
        return objects.number(objects.get(space[1]), "N") if len(space) > 1 else 0
    if family == "DeviceN":
        names = objects.get(space[1]) if len(space) > 1 else None
        return len(names) if isinstance(names, list) else 0
    return _COMPONENTS.get(str(family), 0)


def is_lost(objects: Objects, space: Any, resources: dict[str, Any]) -> bool:
    """Whether a space, or a part of it, is not there."""
    space = objects.get(space)
    if isinstance(space, str) and space not in _COMPONENTS:
        space = objects.entry(objects.dictionary(resources, "ColorSpace"), space)
    return space is None or (isinstance(space, list) and any(objects.get(part) is None for part in space))


def palette_fault(objects: Objects, space: Any, resources: dict[str, Any]) -> str | None:
    """What is wrong with the table of an indexed space."""
    space = objects.get(space)
    if not isinstance(space, list) or len(space) < 4 or objects.get(space[0]) not in ("Indexed", "I"):
        return None
    last, table = objects.get(space[2]), objects.get(space[3])
    if not isinstance(table, Stream) or not isinstance(last, int):
        return None
    data, fault = objects.decoded(table)
    needed = (last + 1) * components(objects, space[1], resources)
    return f"its palette: {fault or SHORT}" if fault or len(data) < needed else None

"""The pictures that a page of a PDF draws, however deep, and what is damaged of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cembed.runtime.pdf_content import Content, content_of
from cembed.runtime.pdf_damage import DoubtError, Picture, fault_of
from cembed.runtime.pdf_objects import Objects
from cembed.runtime.pdf_spaces import components, is_lost, palette_fault
from cembed.runtime.pdf_values import Stream

_DEPTH = 12  # of forms in forms
_MOST = 5000  # pictures, forms and fonts of a page that are looked at
ANY = "any"
_HIDDEN = 2 | 32  # flags of an annotation


@dataclass
class Found:
    """What a page draws: how many pictures, what is wrong with each damaged one, and with what is no picture.

    `doubtful` are filters, or ANY: of pictures with these only PDFium can tell whether they could be drawn.
    """

    pictures: int = 0
    damaged: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)


class Pictures:
    """Looks through the pages of a document. What was found of a picture is kept: a logo is on every page."""

    def __init__(self, objects: Objects) -> None:
        self.objects = self._objects = objects
        self._verdicts: dict[int, tuple[str | None, set[str]]] = {}  # by the number of the object
        self._contents: dict[int, Content] = {}

    def unit(self, number: int) -> float:
        """/UserUnit of a page: 1/72 inches."""
        unit = self._objects.entry(self._objects.page(number), "UserUnit")
        return float(unit) if isinstance(unit, (int, float)) and 0 < unit < math.inf else 1.0

    def of_page(self, number: int) -> Found:
        """Of a page, counted from 1. Raises LookupError if it is not found."""
        if not (page := self._objects.page(number)):
            raise LookupError(f"page {number} was not found")
        found, seen = Found(), set[int]()
        resources = self._objects.dictionary(page, "Resources")
        parts, content = self._objects.entry(page, "Contents"), b""
        if parts is None and page.get("Contents") is not None:
            found.others.append("its content is missing")
        for part in map(self._objects.get, parts if isinstance(parts, list) else [parts]):
            if isinstance(part, Stream):
                data, fault = self._objects.decoded(part)
                content += data + b"\n"
                found.others += [f"its content: {fault}"] if fault else []
            elif isinstance(parts, list):
                found.others.append("a part of its content is missing")
        self._draw(content_of(content), resources, found, seen, 0)
        for form in self._annotations(page):
            self._form(form, resources, found, seen, 0)
        return found

    def _annotations(self, page: dict[str, Any]) -> Iterator[Stream]:
        annotations = self._objects.entry(page, "Annots")
        for annotation in map(self._objects.get, annotations if isinstance(annotations, list) else []):
            if self._objects.number(annotation, "F") & _HIDDEN:
                continue
            normal = self._objects.entry(self._objects.entry(annotation, "AP"), "N")
            if isinstance(normal, dict):
                normal = self._objects.entry(normal, str(self._objects.entry(annotation, "AS")))
            if isinstance(normal, Stream):
                yield normal

    def _draw(self, content: Content, resources: dict[str, Any], found: Found, seen: set[int], depth: int) -> None:
        found.others += [content.fault] if content.fault else []
        for picture in content.inline:
            self._judge(picture, resources, found)
        for kind, name in sorted(content.used):
            things = self._objects.dictionary(resources, kind)
            thing = self._objects.get(things.get(name))
            if kind == "XObject" and thing is None:
                found.others.append("a picture or form that it draws is missing")
            elif isinstance(thing, Stream):
                self._stream(thing, resources, found, seen, depth)
            elif kind == "ExtGState":
                group = self._objects.entry(self._objects.entry(thing, "SMask"), "G")
                self._form(group, resources, found, seen, depth)
            elif kind == "Font":
                self._font(thing, found, seen, depth)

    def _stream(self, thing: Stream, resources: dict[str, Any], found: Found, seen: set[int], depth: int) -> None:
        if self._objects.entry(thing, "Subtype") != "Image":
            self._form(thing, resources, found, seen, depth)
        elif self._is_new(thing, seen):
            self._judge(thing, resources, found)

    def _form(self, form: Any, resources: dict[str, Any], found: Found, seen: set[int], depth: int) -> None:
        if not isinstance(form, Stream) or depth >= _DEPTH or not self._is_new(form, seen):
            return
        if form.number not in self._contents:
            if len(self._contents) > _MOST:
                self._contents.clear()
            data, fault = self._objects.decoded(form)
            self._contents[form.number] = content_of(data, fault and f"a form that it draws: {fault}")
        inner = self._objects.entry(form, "Resources")
        inner = inner if isinstance(inner, dict) else resources
        self._draw(self._contents[form.number], inner, found, seen, depth + 1)

    def _font(self, font: Any, found: Found, seen: set[int], depth: int) -> None:
        resources = self._objects.dictionary(font, "Resources")
        for glyph in self._objects.dictionary(font, "CharProcs").values():
            self._form(self._objects.get(glyph), resources, found, seen, depth)
        inner = self._objects.entry(font, "DescendantFonts")
        for one in [font, *(inner if isinstance(inner, list) else [])]:
            descriptor = self._objects.dictionary(self._objects.get(one), "FontDescriptor")
            for file in (self._objects.entry(descriptor, key) for key in ("FontFile", "FontFile2", "FontFile3")):
                if isinstance(file, Stream) and self._is_new(file, seen) and (fault := self._font_fault(file)):
                    found.others.append(f"a font: {fault}")

    def _font_fault(self, file: Stream) -> str | None:
        if file.number not in self._verdicts:
            self._verdicts[file.number] = (self._objects.decoded(file)[1], set())
        return self._verdicts[file.number][0]

    @staticmethod
    def _is_new(stream: Stream, seen: set[int]) -> bool:
        if stream.number in seen or len(seen) > _MOST:
            return False
        seen.add(stream.number)
        return True

    def _judge(self, stream: Stream, resources: dict[str, Any], found: Found) -> None:
        verdict = self._verdicts.get(stream.number) or self._verdict(stream, resources)
        if stream.number:
            self._verdicts[stream.number] = verdict
        fault, doubtful = verdict
        found.pictures += 1
        found.damaged += [fault] if fault else []
        found.doubtful |= doubtful

    def _verdict(self, stream: Stream, resources: dict[str, Any]) -> tuple[str | None, set[str]]:
        """A fault, and the filter that is in doubt."""
        doubtful: set[str] = set()
        for key, part in [("", stream), *((key, stream.about.get(key)) for key in ("SMask", "Mask"))]:
            part = self._objects.get(part)
            if part is None and stream.about.get(key) is not None:
                return "its mask is missing", doubtful
            try:
                if isinstance(part, Stream) and (fault := self._fault(part, resources)):
                    return f"its mask: {fault}" if key else fault, doubtful
            except DoubtError:
                doubtful = {what.name for what in self._objects.filters(stream)[-1:]} or {ANY}
        return None, doubtful

    def _fault(self, stream: Stream, resources: dict[str, Any]) -> str | None:
        about, filters = stream.about, tuple(self._objects.filters(stream))
        mask = self._objects.entry(about, "ImageMask") is True
        coded = filters[-1].name if filters else ""
        space, shared = about.get("ColorSpace"), b""
        if space is not None and not mask and coded != "JPXDecode" and is_lost(self._objects, space, resources):
            return "its colour space is missing"
        if coded == "JBIG2Decode" and "JBIG2Globals" in filters[-1].parameters:
            if not isinstance(common := self._objects.entry(filters[-1].parameters, "JBIG2Globals"), Stream):
                return "what it shares with others (JBIG2Globals) is missing"
            shared, fault = self._objects.decoded(common)
            if fault:
                return f"JBIG2Globals: {fault}"
        picture = Picture(
            width=self._objects.number(about, "Width"),
            height=self._objects.number(about, "Height"),
            bits=1 if mask else self._objects.number(about, "BitsPerComponent"),
            components=1 if mask else components(self._objects, space, resources),
            filters=filters,
            raw=stream.raw,
            shared=shared,
        )
        return fault_of(picture) or palette_fault(self._objects, space, resources)

"""The pictures that a page of a PDF draws, however deep, and what is damaged of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cembed.runtime.pages.pdf.content import Content, content_of
from cembed.runtime.pages.pdf.damage import Picture, fault_of
from cembed.runtime.pages.pdf.filters import Filter
from cembed.runtime.pages.pdf.objects import Objects
from cembed.runtime.pages.pdf.spaces import components, is_lost, palette_fault
from cembed.runtime.pages.pdf.values import Reference, Stream

ANY = "any"
_DEPTH = 12  # of forms in forms
_MOST = 5000  # pictures, forms and fonts of a page that are looked at
_FONT_FILES = ("FontFile", "FontFile2", "FontFile3")
_MOST_UNITS = 75_000.0  # of a page
_HEAD_START = 0.005  # seconds until PDFium should be drawing
_HIDDEN = 2 | 32  # flags of an annotation


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a picture, and the filter, or ANY, because of which only PDFium can tell the rest.

    `inline`: the picture stands in a content, where PDFium drops what it cannot decode.
    """

    fault: str | None = None
    doubtful: str | None = None
    inline: bool = False


@dataclass(frozen=True, eq=False)
class Candidate:
    """A picture and its masks, in the order in which they are tried; of some it is known already what is wrong."""

    number: int
    parts: tuple[tuple[str, Picture | str], ...]

    @property
    def holds_others(self) -> bool:
        """Whether Pillow decodes a part: no other thread of Python goes on then."""
        return any(isinstance(part, Picture) and part.coded == "JPXDecode" for _, part in self.parts)

    def verdict(self) -> Verdict:
        doubtful: str | None = None
        for label, part in self.parts:
            try:
                fault = part if isinstance(part, str) else fault_of(part)
            except Exception:  # DoubtError, or whatever a decoder stumbles over
                fault, doubtful = None, (isinstance(part, Picture) and part.coded) or ANY
            if fault:
                return Verdict(label + fault, doubtful)
        return Verdict(None, doubtful, inline=self.number == 0)


@dataclass(eq=False)
class Found:
    """What a page draws, and its /UserUnit, of 1/72 inch.

    `others` is what is wrong with anything that is no picture, `untried` are pictures still to be tried.
    """

    unit: float = 1.0
    verdicts: list[Verdict] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    untried: list[Candidate] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)  # objects

    def is_new(self, stream: Stream) -> bool:
        if stream.number in self.seen or len(self.seen) > _MOST:
            return False
        self.seen.add(stream.number)
        return True


class Pictures:
    """Looks through the pages of a document. What was found of a picture is kept: a logo is on every page."""

    def __init__(self, objects: Objects) -> None:
        self.objects = self._objects = objects
        self._verdicts: dict[int, Verdict] = {}  # by the number of the object, as all of these
        self._contents: dict[int, Content] = {}
        self._harmless: set[int] = set()  # fonts that draw no picture and are whole

    def of_page(self, number: int) -> Found:
        """Of a page, counted from 1. Raises LookupError if it is not found."""
        if not (page := self._objects.page(number)):
            raise LookupError(f"page {number} was not found")
        found, resources = Found(self._unit(page)), self._objects.dictionary(page, "Resources")
        self._draw(content_of(self._page_content(page, found)), resources, found, 0)
        for form in self._annotations(page):
            self._form(form, resources, found, 0)
        return found

    def try_out(self, found: Found) -> None:
        """Tries what is untried. Touches no objects: it may be done in another thread, while PDFium draws."""
        if any(candidate.holds_others for candidate in found.untried):
            time.sleep(_HEAD_START)
        for candidate in found.untried:
            verdict = candidate.verdict()
            found.verdicts.append(verdict)
            if candidate.number:
                self._verdicts[candidate.number] = verdict
        found.untried.clear()

    def _unit(self, page: dict[str, Any]) -> float:
        unit = self._objects.entry(page, "UserUnit")
        return float(unit) if isinstance(unit, (int, float)) and 0 < unit <= _MOST_UNITS else 1.0

    def _page_content(self, page: dict[str, Any], found: Found) -> bytes:
        parts, content = self._objects.entry(page, "Contents"), []
        if parts is None and page.get("Contents") is not None:
            found.others.append("its content is missing")
        for part in map(self._objects.get, parts if isinstance(parts, list) else [parts]):
            if isinstance(part, Stream):
                data, fault = self._objects.decoded(part)
                content.append(data)
                found.others += [f"its content: {fault}"] if fault else []
            elif isinstance(parts, list):
                found.others.append("a part of its content is missing")
        return b"\n".join(content)

    def _annotations(self, page: dict[str, Any]) -> Iterator[Stream]:
        annotations = self._objects.entry(page, "Annots")
        for annotation in annotations if isinstance(annotations, list) else []:
            if not self._objects.mentions(annotation, b"/AP") or self._objects.number(annotation, "F") & _HIDDEN:
                continue
            normal = self._objects.entry(self._objects.entry(annotation, "AP"), "N")
            if isinstance(normal, dict):
                normal = self._objects.entry(normal, str(self._objects.entry(annotation, "AS")))
            if isinstance(normal, Stream):
                yield normal

    def _draw(self, content: Content, resources: dict[str, Any], found: Found, depth: int) -> None:
        found.others += [content.fault] if content.fault else []
        for picture in content.inline:
            self._judge(picture, resources, found)
        for kind, name in sorted(content.used):
            self._use(kind, self._objects.dictionary(resources, kind).get(name), resources, found, depth)

    def _use(self, kind: str, place: Any, resources: dict[str, Any], found: Found, depth: int) -> None:
        number = place.number if isinstance(place, Reference) else 0
        if number in self._harmless:
            return
        thing = self._objects.get(place)
        if isinstance(thing, Stream):
            self._stream(thing, resources, found, depth)
        elif kind == "XObject" and thing is None:
            found.others.append("a picture or form that it draws is missing")
        elif kind == "ExtGState":
            self._form(self._objects.entry(self._objects.entry(thing, "SMask"), "G"), resources, found, depth)
        elif kind == "Font" and self._font(thing, found, depth) and number:
            self._harmless.add(number)

    def _stream(self, thing: Stream, resources: dict[str, Any], found: Found, depth: int) -> None:
        if self._objects.entry(thing, "Subtype") != "Image":
            self._form(thing, resources, found, depth)
        elif found.is_new(thing):
            self._judge(thing, resources, found)

    def _form(self, form: Any, resources: dict[str, Any], found: Found, depth: int) -> None:
        if not isinstance(form, Stream) or depth >= _DEPTH or not found.is_new(form):
            return
        if form.number not in self._contents:
            if len(self._contents) > _MOST:
                self._contents.clear()
            data, fault = self._objects.decoded(form)
            self._contents[form.number] = content_of(data, fault and f"a form that it draws: {fault}")
        inner = self._objects.entry(form, "Resources")
        self._draw(self._contents[form.number], inner if isinstance(inner, dict) else resources, found, depth + 1)

    def _font(self, font: Any, found: Found, depth: int) -> bool:
        """Whether it draws no pictures and is whole."""
        resources, glyphs = self._objects.dictionary(font, "Resources"), self._objects.dictionary(font, "CharProcs")
        for glyph in glyphs.values():
            self._form(self._objects.get(glyph), resources, found, depth)
        faults = self._font_faults(font)
        found.others += [f"a font: {fault}" for fault in faults]
        return not glyphs and not faults

    def _font_faults(self, font: Any) -> list[str]:
        """What is wrong with the files of a font and those below it."""
        inner = self._objects.entry(font, "DescendantFonts")
        fonts = [font, *(inner if isinstance(inner, list) else [])]
        descriptors = [self._objects.dictionary(one, "FontDescriptor") for one in fonts]
        files = [self._objects.entry(about, key) for about in descriptors for key in _FONT_FILES]
        faults = [self._objects.decoded(file)[1] for file in files if isinstance(file, Stream)]
        return [fault for fault in faults if fault]

    def _judge(self, stream: Stream, resources: dict[str, Any], found: Found) -> None:
        if verdict := self._verdicts.get(stream.number):
            found.verdicts.append(verdict)
        else:
            found.untried.append(Candidate(stream.number, tuple(self._parts(stream, resources))))

    def _parts(self, stream: Stream, resources: dict[str, Any]) -> Iterator[tuple[str, Picture | str]]:
        yield "", self._picture(stream, resources)
        for key in ("SMask", "Mask"):
            mask = self._objects.entry(stream, key)
            if isinstance(mask, Stream):
                yield "its mask: ", self._picture(mask, resources)
            elif mask is None and stream.about.get(key) is not None:
                yield "", "its mask is missing"
        if fault := palette_fault(self._objects, stream.about.get("ColorSpace"), resources):
            yield "", fault

    def _picture(self, stream: Stream, resources: dict[str, Any]) -> Picture | str:
        """What has to be known to try a picture, or what is wrong with it."""
        filters, space = tuple(self._objects.filters(stream)), stream.about.get("ColorSpace")
        mask, coded = self._objects.entry(stream, "ImageMask") is True, filters[-1].name if filters else ""
        if space is not None and not mask and coded != "JPXDecode" and is_lost(self._objects, space, resources):
            return "its colour space is missing"
        shared, fault = self._shared(filters[-1]) if coded == "JBIG2Decode" else (b"", None)
        if fault:
            return fault
        return Picture(
            width=self._objects.number(stream, "Width"),
            height=self._objects.number(stream, "Height"),
            bits=1 if mask else self._objects.number(stream, "BitsPerComponent"),
            components=1 if mask else components(self._objects, space, resources),
            filters=filters,
            raw=stream.raw,
            shared=shared,
        )

    def _shared(self, jbig2: Filter) -> tuple[bytes, str | None]:
        """What a picture shares with others, if anything, and what is wrong with it."""
        if "JBIG2Globals" not in jbig2.parameters:
            return b"", None
        if not isinstance(common := self._objects.entry(jbig2.parameters, "JBIG2Globals"), Stream):
            return b"", "what it shares with others (JBIG2Globals) is missing"
        shared, fault = self._objects.decoded(common)
        return shared, fault and f"JBIG2Globals: {fault}"

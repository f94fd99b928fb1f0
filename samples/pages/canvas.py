"""A page while it is drawn: the picture, and where every character and word of it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random

from fonts import Face, faces
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
PUNCTUATION = ".,:;!?()-'\""


@dataclass(frozen=True)
class Style:
    heading: Face
    body: Face
    size: int
    paper: Colour
    ink: Colour
    accent: Colour
    leading: float
    margin: int

    @classmethod
    def draw_lots(cls, random: Random, held_out_faces: bool) -> Style:
        known = faces(held_out_faces)
        light = random.random() < 0.85
        paper = shade(random, 215, 255) if light else shade(random, 10, 70)
        ink = shade(random, 0, 80) if light else shade(random, 190, 255)
        accent = tuple(random.randint(0, 140) if light else random.randint(150, 255) for _ in range(3))
        return cls(
            heading=random.choice(known),
            body=random.choice(known),
            size=random.randint(14, 20),
            paper=paper,
            ink=ink,
            accent=(accent[0], accent[1], accent[2]),
            leading=random.uniform(1.15, 1.7),
            margin=random.randint(8, 26),
        )


def shade(random: Random, low: int, high: int) -> Colour:
    """Nearly grey."""
    grey = random.randint(low, high)
    red, green, blue = (min(255, max(0, grey + random.randint(-12, 12))) for _ in range(3))
    return red, green, blue


@dataclass(frozen=True)
class Mark:
    """Something legible and the point it is centred at, in pixels."""

    text: str
    x: float
    y: float


@dataclass
class Word:
    text: str
    characters: list[Mark]


@dataclass
class Canvas:
    """`y` is the cursor that `line` and `row` move down the page."""

    width: int
    height: int
    style: Style
    random: Random
    y: float = 0.0
    words: list[Word] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.image = Image.new("RGB", (self.width, self.height), self.style.paper)
        self.pen = ImageDraw.Draw(self.image)
        self.y = self.y or self.style.margin

    @property
    def inner(self) -> int:
        return self.width - 2 * self.style.margin

    @property
    def room(self) -> float:
        """Height left above the lower margin."""
        return self.height - self.style.margin / 2 - self.y

    def text(self, x: float, y: float, text: str, face: Face, size: int, ink: Colour | None = None) -> None:
        """Draw at the upper left corner; what leaves the page is not recorded."""
        font = face.load(size)
        baseline = y + font.getmetrics()[0]
        self.pen.text((x, baseline), text, fill=ink or self.style.ink, font=font, anchor="ls")
        start = 0
        for piece in text.split(" "):
            left = x + face.width(text[:start], size)
            edges = list(accumulate((face.width(character, size) for character in piece), initial=left))
            if piece and edges[-1] <= self.width and baseline <= self.height:
                middle = baseline - 0.32 * size
                marks = [Mark(c, (a + b) / 2, middle) for c, a, b in zip(piece, edges, edges[1:], strict=False)]
                self.words.append(Word(piece, marks))
            start += len(piece) + 1

    def line(
        self,
        text: str,
        *,
        size: int | None = None,
        face: Face | None = None,
        ink: Colour | None = None,
        x: float | None = None,
        width: float | None = None,
        align: float = 0.0,
        gap: float | None = None,
    ) -> None:
        """One line at the cursor, shrunk until it fits the width; align 0 left, 0.5 centred, 1 right."""
        face, size = face or self.style.body, size or self.style.size
        x, width = self.style.margin if x is None else x, self.inner if width is None else width
        while face.width(text, size) > width and size > 11:
            size -= 1
        self.text(x + align * max(0.0, width - face.width(text, size)), self.y, text, face, size, ink)
        self.y += size * (gap or self.style.leading)

    def heading(self, text: str, scale: float = 1.5, align: float = 0.0) -> None:
        ink = self.style.accent if self.random.random() < 0.5 else self.style.ink
        if self.random.random() < 0.2:
            text = text.upper()
        self.paragraph(text, size=round(self.style.size * scale), face=self.style.heading, ink=ink, align=align)

    def row(self, left: str, right: str, x: float | None = None, width: float | None = None) -> None:
        """A line with one text at each end."""
        x, width = self.style.margin if x is None else x, self.inner if width is None else width
        top, size = self.y, self.style.size
        taken = self.style.body.width(right, size) + 8
        self.line(left, x=x, width=width - taken)
        bottom, self.y = self.y, top
        self.line(right, x=x + width - taken, width=taken, align=1.0)
        self.y = max(bottom, self.y)

    def paragraph(
        self,
        text: str,
        *,
        x: float | None = None,
        width: float | None = None,
        size: int | None = None,
        face: Face | None = None,
        ink: Colour | None = None,
        align: float = 0.0,
        bottom: float | None = None,
    ) -> None:
        """Lines broken at spaces, as many as fit above `bottom`."""
        face, size, width = face or self.style.body, size or self.style.size, self.inner if width is None else width
        line = ""
        for word in [*text.split(" "), ""]:
            longer = f"{line} {word}".strip()
            if word and face.width(longer, size) <= width:
                line = longer
                continue
            if self.y + size * 1.2 > (bottom or self.height):
                return
            self.line(
                line,
                size=size,
                face=face,
                ink=ink,
                x=x,
                width=width,
                align=align,
                gap=max(1.1, self.style.leading * 0.9),
            )
            line = word

    def rule(self) -> None:
        self.pen.line((self.style.margin, self.y, self.width - self.style.margin, self.y), fill=self.style.accent)
        self.y += 5

    def space(self, share: float) -> None:
        self.y += share * self.style.size

    def rotate(self, degrees: float) -> None:
        """Turn picture and marks about the centre, counter-clockwise."""
        self.image = self.image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=self.style.paper)
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        cx, cy = self.width / 2, self.height / 2
        for word in self.words:
            word.characters = [
                Mark(m.text, cx + c * (m.x - cx) + s * (m.y - cy), cy - s * (m.x - cx) + c * (m.y - cy))
                for m in word.characters
            ]

    def distort(self, wide: float, high: float, slant: float) -> None:
        """Stretch picture and marks from the upper left corner, and slant them; words that leave the page go."""
        undo = (1 / wide, -slant / wide, 0.0, 0.0, 1 / high, 0.0)
        self.image = self.image.transform(
            self.image.size, Image.Transform.AFFINE, undo, Image.Resampling.BILINEAR, fillcolor=self.style.paper
        )
        for word in self.words:
            word.characters = [Mark(m.text, wide * m.x + slant * high * m.y, high * m.y) for m in word.characters]
        size = self.style.size
        self.words = [
            word
            for word in self.words
            if all(0 <= m.x < self.width - size / 4 and 0 <= m.y < self.height - size / 3 for m in word.characters)
        ]

    def vocabulary(self) -> frozenset[str]:
        """The words on the page, in lower case, without punctuation at their ends."""
        return frozenset(word.text.strip(PUNCTUATION).lower() for word in self.words)

"""The faces pages are set in, by Debian package; those held out are met in the test set alone.

apt-get install $(python samples/pages/fonts.py)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import ImageFont

FOLDER = Path("/usr/share/fonts")
TRAINED = {  # package -> file names without suffix
    "fonts-dejavu-core": "DejaVuSans DejaVuSans-Bold DejaVuSerif DejaVuSerif-Bold DejaVuSansMono",
    "fonts-liberation": "LiberationSans-Regular LiberationSans-Bold LiberationSerif-Regular LiberationSerif-Bold "
    "LiberationSans-Italic LiberationMono-Regular LiberationSerif-Italic",
    "fonts-lato": "Lato-Regular Lato-Bold Lato-Medium",
    "fonts-roboto-unhinted": "Roboto-Regular Roboto-Medium RobotoCondensed-Regular RobotoCondensed-Bold",
    "fonts-open-sans": "OpenSans-Regular OpenSans-Semibold",
    "fonts-crosextra-caladea": "Caladea-Regular Caladea-Bold",
    "fonts-inconsolata": "Inconsolata",
    "fonts-cantarell": "Cantarell-Regular Cantarell-Bold",
    "fonts-linuxlibertine": "LinLibertine_R LinLibertine_RB",
    "fonts-quicksand": "Quicksand-Medium Quicksand-Bold",
    "fonts-urw-base35": "NimbusSansNarrow-Regular C059-Roman URWBookman-Light URWGothic-Book P052-Roman "
    "NimbusMonoPS-Bold",
    "fonts-cabin": "Cabin-Regular Cabin-Bold",
    "fonts-sil-charis": "CharisSIL-Regular",
    "fonts-go": "Go-Regular Go-Mono",
    "fonts-karla": "Karla-Regular Karla-Bold",
    "fonts-averia-sans-gwf": "AveriaSansGWF-Regular",
}
HELD_OUT = {
    "fonts-crosextra-carlito": "Carlito-Regular Carlito-Bold",
    "fonts-freefont-ttf": "FreeSans FreeSerif FreeMonoBold",
    "fonts-sil-gentium": "Gentium-R",
    "fonts-vollkorn": "Vollkorn-Regular",
    "fonts-mononoki": "mononoki-Regular",
    "fonts-play": "Play-Regular",
    "fonts-junicode": "JunicodeTwoBeta-Medium",
    "fonts-jura": "Jura-Medium",
    "fonts-hack": "Hack-Regular",
    "fonts-comfortaa": "Comfortaa-Regular",
}


class MissingFontsError(RuntimeError):
    """Some faces are not installed; the message has the command that installs them."""


@dataclass(frozen=True, eq=False)
class Face:
    path: Path

    def width(self, text: str, size: int) -> float:
        """Pixels, without kerning."""
        return sum(advance(self, character, size) for character in text)

    def load(self, size: int) -> ImageFont.FreeTypeFont:
        return load(self, size)


@cache
def load(face: Face, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(face.path, size, layout_engine=ImageFont.Layout.BASIC)


@cache
def advance(face: Face, character: str, size: int) -> float:
    return face.load(size).getlength(character)


@cache
def installed() -> dict[str, Path]:
    return {path.stem: path for path in sorted(FOLDER.rglob("*")) if path.suffix in (".ttf", ".otf")}


@cache
def faces(held_out: bool) -> tuple[Face, ...]:
    """All faces of one part. Raises MissingFontsError."""
    needed = HELD_OUT if held_out else TRAINED
    missing = [package for package, names in needed.items() if not set(names.split()) <= installed().keys()]
    if missing:
        raise MissingFontsError(f"some fonts are not installed: apt-get install {' '.join(missing)}")
    return tuple(Face(installed()[name]) for names in needed.values() for name in names.split())


if __name__ == "__main__":
    print(*TRAINED, *HELD_OUT)

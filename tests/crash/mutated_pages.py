"""Pages of every format with bytes changed, cut or repeated, one after the other through one caged decoding process.

`python tests/crash/mutated_pages.py 200000 7` reads so many, from a seed. None may hang, nor end the process that
reads; a sound page must be the same, bit by bit, after each thousand. Ends of the decoding process are counted: they
cost one page.
"""

from __future__ import annotations

import io
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from cembed.runtime.pages.documents import Page, PageError, PageReader

CASES = Path(__file__).parents[1] / "cases"
SAVED: dict[str, list[dict[str, Any]]] = {
    "PNG": [{}],
    "JPEG": [{}, {"progressive": True}],
    "WEBP": [{}, {"lossless": True}],
    "BMP": [{}],
    "GIF": [{}],
    "TIFF": [{"compression": codec} for codec in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")],
}
PDFS = ("five.pdf", "ccitt_flip.pdf", "jpg_broken.pdf", "jpx_noeoc.pdf", "portfolio.pdf", "userunit10.pdf")
EACH = 1000
HUNG = ("took longer than", "the decoding process gave an answer that makes no sense")
LOST = (*HUNG, "the decoding process died")
ENDS = ("read", "read with a warning", "refused")


def seeds() -> list[bytes]:
    """A small file of each format and codec."""
    image = Image.open(CASES / "colour.png").convert("RGB").resize((100, 140))
    found = [(CASES / name).read_bytes() for name in PDFS]
    for mode in ("RGB", "L", "1"):
        for kind, all_options in SAVED.items():
            for options in all_options:
                fax = mode == "1" and options.get("compression") == "jpeg"
                found.append(saved(image.convert(mode), kind, {"compression": "group4"} if fax else options))
    return found


def saved(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def mutated(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.choice((1, 2, 8, 40))):
        place = chance.randrange(len(data))
        kind = chance.randrange(6)
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place] = chance.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            data[place : place + 4] = chance.randbytes(4)
        elif kind == 3:
            data[place:place] = data[max(0, place - 64) : place]
        elif kind == 4:
            del data[place : place + chance.choice((1, 16, 256))]
        elif chance.random() < 0.1:
            del data[place:]
        if not data:
            return b"\0"
    return bytes(data)


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Page | PageError]:
    """The first page of each mutated file; with it every thousandth time a sound one, which is compared."""
    chance, sound, kinds = random.Random(seed), CASES / "five.pdf", seeds()
    path = folder / "mutated"
    with PageReader(dpi=36, timeout=60, max_pixels=4_000_000, memory_limit=1 << 30, require_sandbox=True) as reader:
        golden, _ = reader.page(sound, 2)
        assert isinstance(golden, Page)
        descriptors = psutil.Process().num_fds()
        for number in range(1, count + 1):
            path.write_bytes(mutated(chance.choice(kinds), chance))
            outcome, _ = reader.page(path, 1)
            if name_of(outcome) not in ENDS:
                (Path(tempfile.gettempdir()) / f"mutated-{seed}-{number}").write_bytes(path.read_bytes())
            yield outcome
            if number % EACH == 0 or number == count:
                again, _ = reader.page(sound, 2)
                assert isinstance(again, Page), again
                np.testing.assert_array_equal(again.image, golden.image)
                assert psutil.Process().num_fds() <= descriptors + 1


def name_of(outcome: Page | PageError) -> str:
    if isinstance(outcome, Page):
        return ENDS[outcome.warning is not None]
    return outcome.reason if outcome.reason.startswith(LOST) else ENDS[2]


def main(count: int, seed: int) -> int:
    counts: Counter[str] = Counter()
    room = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=room) as folder:
        for number, outcome in enumerate(outcomes(count, seed, Path(folder)), 1):
            counts[name_of(outcome)] += 1
            if number % EACH == 0:
                print(number, dict(counts), flush=True)
    print(f"{sum(counts.values())} mutated pages: {dict(counts)}")
    return sum(number for name, number in counts.items() if name.startswith(HUNG))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0) > 0)

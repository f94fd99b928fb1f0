"""Draws docs/ranked.png, the picture of the README: the best pages of the sample for a query.

python docs/ranked.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cembed.runtime import Embedder, maxsim

ROOT = Path(__file__).resolve().parents[1]
QUERY = "notice about the pension seminar with emma foster"
HEIGHT, GAP, TOP = 300, 16, 4


def main() -> None:
    embedder = Embedder.load(ROOT / "samples" / "bundle")
    paths = sorted((ROOT / "samples" / "pages" / "sample" / "pages").iterdir())
    images = [Image.open(path, formats=["JPEG"]).convert("RGB") for path in paths]
    scores = maxsim(embedder.embed_queries([QUERY]), embedder.embed_images(images))[0]
    best = np.argsort(-scores)[:TOP]
    pages = [images[i].resize((round(images[i].width * HEIGHT / images[i].height), HEIGHT)) for i in best]
    picture = Image.new("RGB", (sum(page.width + GAP for page in pages) + GAP, HEIGHT + 100), "#f3f4f6")
    draw, large, small = ImageDraw.Draw(picture), ImageFont.load_default(20), ImageFont.load_default(15)
    draw.text((GAP, GAP), f"“{QUERY}”", fill="#111827", font=large)
    left = GAP
    for rank, (number, page) in enumerate(zip(best, pages, strict=True), 1):
        picture.paste(page, (left, 56))
        colour = "#15803d" if rank == 1 else "#9ca3af"
        draw.rectangle((left, 56, left + page.width - 1, 55 + HEIGHT), outline=colour, width=3 if rank == 1 else 1)
        draw.text(
            (left, 64 + HEIGHT), f"{rank}.  {scores[number]:.2f}  {paths[number].name}", fill="#111827", font=small
        )
        left += page.width + GAP
    picture.quantize(128).save(ROOT / "docs" / "ranked.png", optimize=True)


if __name__ == "__main__":
    main()

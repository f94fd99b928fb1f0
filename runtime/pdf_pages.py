"""Pages of PDF files, drawn by PDFium; in the decoding process only."""

from __future__ import annotations

import math

import numpy as np
import pypdfium2

from cembed.runtime.images import Drawn, Settings


class Pdf:
    def __init__(self, path: str, settings: Settings) -> None:
        self._settings = settings
        self._document = pypdfium2.PdfDocument(path)
        self._document.init_forms()  # without it, fields that have been filled in stay blank
        self.pages = len(self._document)

    def page(self, number: int) -> Drawn:
        page = self._document[number - 1]
        width, height = page.get_size()
        scale = self._settings.dpi / 72
        while math.ceil(width * scale) * math.ceil(height * scale) > self._settings.max_pixels:
            scale *= 0.99
        image = np.array(page.render(scale=scale, rev_byteorder=True).to_numpy()[..., :3], order="C")
        page.close()
        return Drawn(image)

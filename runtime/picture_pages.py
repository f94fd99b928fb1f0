"""Pages of picture files, read by Pillow; in the decoding process only."""

from __future__ import annotations

import numpy as np
from PIL import Image, TiffImagePlugin

from cembed.runtime.images import Drawn, RefusedError, Settings, to_rgb

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")


class Picture:
    def __init__(self, path: str, settings: Settings) -> None:
        self._limit = settings.max_pixels
        self._image = Image.open(path, formats=FORMATS)
        self.pages = self._image.n_frames if isinstance(self._image, TiffImagePlugin.TiffImageFile) else 1

    def page(self, number: int) -> Drawn:
        self._image.seek(number - 1)
        width, height = self._image.size
        if width * height > self._limit:
            raise RefusedError(f"{width} x {height} pixels are over the limit of {self._limit} (max_pixels)")
        self._image.load()
        return Drawn(np.array(to_rgb(self._image), order="C"))

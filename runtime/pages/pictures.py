"""Pages of picture files, by Pillow; in the decoding process only."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from cembed.runtime.pages import jpegs, pngs
from cembed.runtime.pages.files import File
from cembed.runtime.pages.images import Drawn, RefusedError, Settings, to_rgb, too_many_pixels

_ZEROS = bytes(64)


class Picture:
    """A file of one picture, of a `kind` that Pillow knows by that name."""

    pages = 1
    doubt: str | None = None

    def __init__(self, file: File, settings: Settings, kind: str) -> None:
        self._file, self._kind, self._limit = file, kind, settings.max_pixels

    def page(self, _: int) -> Drawn:
        """The picture, or its first frame. Raises RefusedError, and whatever Pillow raises for damage."""
        try:
            return {"JPEG": self._jpeg, "PNG": self._png, "WEBP": self._webp}.get(self._kind, self._plain)()
        except UnidentifiedImageError:
            raise RefusedError(
                f"damaged from the start: it begins like a {self._kind} file, and then is none"
            ) from None

    def _plain(self, data: bytes | None = None, warning: str | None = None) -> Drawn:
        with self._file.stream() if data is None else io.BytesIO(data) as source:
            image = Image.open(source, formats=(self._kind,))
            width, height = image.size
            if width * height > self._limit:
                raise too_many_pixels(width, height, self._limit, f"a {self._kind} file")
            return Drawn(np.array(to_rgb(image), order="C"), warning)

    def _png(self) -> Drawn:
        data = self._file.read()
        doubt = pngs.doubt(data)
        try:
            return self._plain(data, doubt)
        except (RefusedError, MemoryError):
            raise
        except Exception:  # it may be only text or a profile, of which there is no use
            return self._plain(pngs.needed(data), doubt)

    def _jpeg(self) -> Drawn:
        try:
            with self._file.stream() as stream:
                image = jpegs.opened(stream, self._limit)
        except MemoryError:
            raise
        except Exception:
            return jpegs.read(self._file.read(), self._limit)
        if jpegs.grey_end(image):
            return jpegs.read(self._file.read(), self._limit)
        coarse = "progressive" in image.info and jpegs.lacks_scans(self._file.read())
        return jpegs.finished(image, self._limit, jpegs.COARSE if coarse else None)

    def _webp(self) -> Drawn:
        with self._file.stream() as file:
            size = int.from_bytes(file.read(8)[4:], "little") + 8  # as RIFF says it
            file.seek(max(0, size - len(_ZEROS)))
            torn = file.read(len(_ZEROS)) == _ZEROS
        return self._plain(None, "the end of the file is zeros: part of the page may be missing" if torn else None)

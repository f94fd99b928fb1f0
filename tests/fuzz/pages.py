"""Pictures and PDFs, in this process: there is no cage, and what crashes a decoder crashes the fuzzer."""

from __future__ import annotations

import json
import os

from PIL import Image, TiffImagePlugin

from cembed.runtime.pages import worker
from cembed.runtime.pages.files import File
from cembed.runtime.pages.images import Settings

SETTINGS = Settings(dpi=36, max_pixels=100_000, memory_limit=None)
Image.MAX_IMAGE_PIXELS = None
TiffImagePlugin.READ_LIBTIFF = True  # as the decoding process has it


def page(data: bytes) -> bool:
    """The number of pages, and the first one, in replies that the reading side takes. Says whether a page was drawn."""
    taken = False
    descriptor = os.memfd_create("page")
    os.write(descriptor, data)
    with File(descriptor) as file:
        decoder = worker._Decoder(SETTINGS)
        decoder.file = file
        for number in (0, 1) if data else ():
            for header, body in decoder.answers(number):
                assert len(json.dumps(header)) < 1 << 16
                assert body.size <= 3 * SETTINGS.max_pixels
                assert body.size == 0 or (body.ndim == 3 and body.shape[2] == 3 and body.dtype == "u1")
                taken = taken or body.size > 0
        decoder.document = decoder.file = None
    return taken

"""What a file is, by its first bytes; names may say anything."""

from __future__ import annotations

import re

START_BYTES = 1024  # readers of PDF look that far for its mark

# A bitmap's two letters are not much of a mark, so the size of the header that follows must be one of those there are.
_MARKS = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "TIFF": rb"II[*+]\0|MM\0[*+]|II\0\*|MM\*\0",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "GIF": rb"GIF8[79]a",
    "PDF": rb".*?%PDF-",
}
KINDS = tuple(_MARKS)


def kind_of(start: bytes) -> str | None:
    """The name of what begins like `start`, or None: it is nothing that is read here."""
    return next((kind for kind, mark in _MARKS.items() if re.match(mark, start[:START_BYTES], re.DOTALL)), None)

"""Pictures of pages that commands write into a folder."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from cembed.runtime.errors import CembedError


def make_folder(folder: Path) -> Path:
    """Raises CembedError: it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CembedError(f"cannot make {folder}: {error.strerror}") from error
    return folder


def picture_path(folder: Path, number: int, source: str, page: int) -> Path:
    """Pictures stand in the folder in the order of their numbers."""
    return folder / f"{number:05}-{Path(source).stem[:80]}-{page}.png"


def save_picture(picture: Image.Image, path: Path) -> None:
    """Raises CembedError: it cannot be written."""
    try:
        picture.save(path)
    except OSError as error:
        raise CembedError(f"cannot write {path}: {error.strerror}") from error

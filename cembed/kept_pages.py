"""`cembed embed --show-kept`: pictures of what is read of each page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from cembed.pictures import make_folder, picture_path, save_picture
from cembed.runtime.embed.embedder import Embedder
from cembed.runtime.errors import CembedError
from cembed.runtime.pages.documents import Page, PageError
from cembed.runtime.pages.images import to_rgb


def kept_folder(folder: Path, embedder: Embedder) -> Path:
    """Raises CembedError: it cannot be made, or nothing is skipped."""
    if not embedder.inputs.image.skip_blank:
        raise CembedError("--show-kept shows what --skip-blank leaves unread: give both")
    return make_folder(folder)


def shown_pages(embedder: Embedder, pages: Iterable[Page | PageError], folder: Path) -> Iterator[Page | PageError]:
    """`pages`; of each, numbered as they come, there is a picture in `folder` before it is given.

    Raises CembedError: it cannot be written.
    """
    for number, page in enumerate(pages, 1):
        if isinstance(page, Page):
            write_picture(embedder, page, picture_path(folder, number, page.path, page.number))
        yield page
        del page


def write_picture(embedder: Embedder, page: Page, path: Path) -> None:
    try:
        picture = kept_picture(embedder, page)
    except CembedError:  # a page that cannot be embedded, which is told there
        return
    save_picture(picture, path)


def kept_picture(embedder: Embedder, page: Page) -> Image.Image:
    """The page, with what is not read in grey."""
    pixels, read = np.asarray(to_rgb(page.image)), embedder.kept(page.image)
    rows, columns = (np.arange(size) * count // size for size, count in zip(pixels.shape[:2], read.shape, strict=True))
    return Image.fromarray(np.where(read[rows][:, columns, None], pixels, pixels // 3 + 85))

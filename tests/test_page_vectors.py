"""From documents to vectors, one page at a time."""

from __future__ import annotations

import resource
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from cembed.runtime import (
    Budget,
    CembedError,
    EmbeddedPage,
    Embedder,
    Page,
    PageError,
    PageReader,
    embed_documents,
    embed_pages,
    find_documents,
)
from cembed.runtime.page_vectors import NO_MEMORY
from cembed.runtime.pages.documents import require_pages

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def embedder(causal_bundle: Path) -> Embedder:
    return Embedder.load(causal_bundle)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A PDF of two pages, a file that is no picture, and a picture."""
    pages = [Image.new("RGB", (120, 160), colour) for colour in COLOURS]
    (tmp_path / "pages").mkdir()
    pages[0].save(tmp_path / "pages" / "a.pdf", save_all=True, append_images=pages[1:2])
    (tmp_path / "pages" / "b.png").write_bytes(b"no picture")
    pages[2].save(tmp_path / "pages" / "c.png")
    return tmp_path / "pages"


def children() -> list[psutil.Process]:
    return psutil.Process().children()


def outcomes(pages: Iterator[EmbeddedPage | PageError]) -> dict[str, bool]:
    """Whether each page was embedded."""
    return {Path(page.place).name: isinstance(page, EmbeddedPage) for page in pages}


def test_every_page_has_its_vectors_or_its_reason(embedder: Embedder, folder: Path) -> None:
    first, second, lost, last = embed_documents(embedder, [folder])
    with PageReader() as reader:
        images = [page.image for page in reader.read(find_documents([folder])) if isinstance(page, Page)]
    for page, image in zip((first, second, last), images, strict=True):
        assert isinstance(page, EmbeddedPage)
        assert np.array_equal(page.vectors, embedder.embed_image(image))
        assert page.warning is None
    assert [page.place for page in (first, second, last)] == [
        f"{folder}/a.pdf, page 1",
        f"{folder}/a.pdf, page 2",
        f"{folder}/c.png, page 1",
    ]
    assert isinstance(lost, PageError)
    assert (lost.place, lost.number) == (f"{folder}/b.png", None)


def test_budget_and_reader_are_those_given(embedder: Embedder, folder: Path) -> None:
    pages = list(embed_documents(embedder, [folder / "c.png"], Budget(3), PageReader(max_pixels=50_000)))
    assert [page.vectors.shape for page in pages if isinstance(page, EmbeddedPage)] == [(3, embedder.dim)]
    (lost,) = embed_documents(embedder, [folder / "c.png"], reader=PageReader(max_pixels=5000))
    assert isinstance(lost, PageError)
    assert "over the limit of 5000" in lost.reason


@pytest.mark.parametrize(
    ("paths", "budget", "said"),
    [
        (["none.pdf"], Budget(), "no such file or folder: none.pdf"),
        ("c.png", Budget(), "paths must be a list"),
        (Path("c.png"), Budget(), "paths must be a list"),
        (["c.png"], Budget(9000), "positions"),
        (["c.png"], Budget(dim=9000), "dim is 9000"),
    ],
)
def test_mistakes_are_told_before_the_first_page(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch, paths: Any, budget: Budget, said: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(CembedError, match=said):
        embed_documents(embedder, paths, budget)


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception) -> None:
    """The call with this number, from 1, raises."""
    embed_image, calls = Embedder.embed_image, list[int]()

    def embed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise error
        return embed_image(*arguments)

    monkeypatch.setattr(Embedder, "embed_image", embed)


def test_a_page_that_cannot_be_embedded_is_alone(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 2, CembedError("graph text gave NaN"))
    pages = list(embed_documents(embedder, [folder]))
    assert pages[1] == PageError(f"{folder}/a.pdf", 2, "graph text gave NaN")
    assert outcomes(iter(pages)) == {
        "a.pdf, page 1": True,
        "a.pdf, page 2": False,
        "b.png": False,
        "c.png, page 1": True,
    }


def test_what_is_no_fault_of_a_page_ends_the_run(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 2, MemoryError())
    before, pages = children(), embed_documents(embedder, [folder])
    assert isinstance(next(pages), EmbeddedPage)
    with pytest.raises(MemoryError):
        next(pages)
    assert children() == before


def test_where_memory_was_bounded_a_page_is_alone_that_needs_more(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 2, MemoryError())
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1 << 40, resource.RLIM_INFINITY))
    pages = list(embed_documents(embedder, [folder]))
    assert pages[1] == PageError(f"{folder}/a.pdf", 2, NO_MEMORY)
    assert sum(isinstance(page, EmbeddedPage) for page in pages) == 2


def test_the_decoding_process_ends_with_the_iteration(embedder: Embedder, folder: Path) -> None:
    before = children()
    pages = embed_documents(embedder, [folder])
    assert children() == before  # nothing was asked for yet
    next(pages)
    assert len(children()) == len(before) + 1
    pages.close()  # type: ignore[attr-defined]
    assert children() == before


@dataclass
class Source:
    """Pages that watch how many of their images are still there when the next one is asked for."""

    pages: Sequence[Page]
    left: list[int] = field(default_factory=list)

    def read(self) -> Iterator[Page]:
        images = list[weakref.ref[Any]]()
        for page in self.pages:
            copy = page.image.copy()
            images.append(weakref.ref(copy))
            given = [replace(page, image=copy)]
            del copy
            yield given.pop()
            self.left.append(sum(image() is not None for image in images))


def test_one_image_is_in_memory_at_a_time(embedder: Embedder) -> None:
    image = np.zeros((56, 56, 3), np.uint8)
    source = Source([Page("a.pdf", number, image) for number in (1, 2, 3)])
    assert sum(1 for _ in embed_pages(embedder, require_pages(source.read()))) == 3
    assert source.left == [0, 0, 0]


def test_errors_are_passed_on_or_raised(embedder: Embedder) -> None:
    lost = PageError("a.pdf", 7, "damaged")
    assert list(embed_pages(embedder, [lost])) == [lost]
    with pytest.raises(CembedError, match=r"^a\.pdf, page 7 cannot be read: damaged$"):
        list(require_pages([lost]))


def test_a_reader_is_opened_once(embedder: Embedder, folder: Path) -> None:
    """Else the first decoding process would be lost sight of."""
    with PageReader() as reader, pytest.raises(CembedError, match="open already"):
        next(embed_documents(embedder, [folder], reader=reader))

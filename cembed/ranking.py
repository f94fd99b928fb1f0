"""What `cembed search` ranks: the pages of a vector file, or those of an index."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cembed.display import complain
from cembed.runtime.bundle.vectors import VectorFile, Vectors
from cembed.runtime.embed.embedder import Budget, Embedder
from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.index.metadata import parse_pairs
from cembed.runtime.index.search import Stage
from cembed.runtime.index.shards import Shards
from cembed.runtime.pages.documents import PageReader, require_pages
from cembed.runtime.scoring.maxsim import maxsim

Row = dict[str, Any]


@dataclass(frozen=True)
class Tuning:
    """Options that only an index has."""

    where: tuple[str, ...]
    source: str | None
    candidates: int | None
    exact: bool
    explain: bool

    @property
    def given(self) -> list[str]:
        """The names of those that are given."""
        return [f"--{name}" for name, value in vars(self).items() if value]


@dataclass(frozen=True)
class Origin:
    """Where a page comes from: its file as far as is known, and its number there; how many vectors are kept of it."""

    path: Path
    number: int
    vectors: int


class RankedPages(Protocol):
    """Pages, and the bundle and dim of their vectors."""

    @property
    def bundle(self) -> str: ...
    @property
    def dim(self) -> int: ...
    def __len__(self) -> int: ...
    def rank(self, query: Vectors, top: int, threads: int | None) -> tuple[list[Row], list[Row]]:
        """The best pages, and the stages that found them."""

    def origin(self, row: Row) -> Origin:
        """Of a page that `rank` gave."""


def open_pages(path: Path, tuning: Tuning) -> RankedPages:
    """Raises CembedError: neither a vector file nor an index, options of an index for a vector file."""
    shards = sorted(glob.glob(str(path))) if glob.has_magic(str(path)) and not path.exists() else []
    if shards or path.is_dir():
        return IndexPages(shards or [path], tuning)
    pages = FilePages(path)
    if tuning.given:
        raise CembedError(f"{path} is a vector file and no index: leave out {', '.join(tuning.given)}")
    return pages


class FilePages:
    def __init__(self, path: Path) -> None:
        self._content = VectorFile.load(path)
        self.bundle, self.dim = self._content.bundle, self._content.vectors.shape[1]

    def __len__(self) -> int:
        return len(self._content)

    def rank(self, query: Vectors, top: int, threads: int | None) -> tuple[list[Row], list[Row]]:
        content = self._content
        scores = maxsim([query], content.documents())[0]
        best = np.argsort(-scores, kind="stable")[:top]
        rows: list[Row] = [
            {"rank": rank, "score": float(scores[i]), "path": content.paths[i], "page": int(content.pages[i])}
            for rank, i in enumerate(best, 1)
        ]
        for row, i in zip(rows, best, strict=True):
            if content.warnings and content.warnings[i]:
                row["warning"] = content.warnings[i]
        return rows, []

    def origin(self, row: Row) -> Origin:
        content, place = self._content, (row["path"], row["page"])
        page = next(i for i, found in enumerate(zip(content.paths, content.pages, strict=True)) if found == place)
        return Origin(Path(row["path"]), row["page"], int(content.offsets[page + 1] - content.offsets[page]))


class IndexPages:
    """Those of one index, or of several shards."""

    def __init__(self, paths: Sequence[str | Path], tuning: Tuning) -> None:
        self._where = parse_pairs("--where", tuning.where)
        self._tuning, self._index = tuning, Index.open(paths[0]) if len(paths) == 1 else Shards(paths)
        self.bundle, self.dim = self._index.bundle, self._index.dim

    def __len__(self) -> int:
        return len(self._index)

    def rank(self, query: Vectors, top: int, threads: int | None) -> tuple[list[Row], list[Row]]:
        tuning = self._tuning
        found = self._index.search(
            query,
            top,
            where=self._where,
            source=tuning.source,
            candidates=tuning.candidates,
            plan=(Stage(self._index.tiers[0], top),) if tuning.exact else None,
            threads=threads,
        )
        rows = [
            {
                "rank": rank,
                "score": hit.score,
                "id": hit.id,
                "path": hit.source,
                "page": hit.page,
                "metadata": hit.metadata,
                **({"index": hit.index} if hit.index else {}),
                **({"warning": hit.warning} if hit.warning else {}),
            }
            for rank, hit in enumerate(found.hits, 1)
        ]
        stages = [
            {"stage": stage.tier, "pages": stage.pages, "kept": stage.kept, "ms": stage.ms, "bytes": stage.bytes}
            for stage in found.stages
        ]
        return rows, stages

    def origin(self, row: Row) -> Origin:
        index = self._index
        info = index.info(row["id"], row["index"]) if isinstance(index, Shards) else index.info(row["id"])
        then = Path(info.folder or "") / info.source
        return Origin(then if then.exists() else Path(info.source), info.page, info.vectors)


def embed_image(embedder: Embedder, path: Path, budget: Budget) -> Vectors:
    """The vectors of the first page of a file. Raises CembedError: it cannot be read."""
    with PageReader() as reader:
        page = next(require_pages(reader.read([path])))
    if page.warning:
        complain(f"warning: {page.place}: {page.warning}")
    return embedder.embed_image(page.image, budget)

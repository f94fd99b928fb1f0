"""What a watcher is told, and where its model is: in its own process, or in workers of a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from cembed.runtime.embed.embedder import FULL, Budget, Embedder
from cembed.runtime.embed.loading import Loading
from cembed.runtime.index.index import Index
from cembed.runtime.intake.folders import Folders
from cembed.runtime.intake.job import LocalPages, Pages
from cembed.serve.watcher import Rules
from cembed.serve.worker import checked


@dataclass(frozen=True)
class Watching:
    """What `cembed watch` is told; `page_settings` is what vectors of pages depend on beside a file's bytes."""

    loading: Loading
    index: Path
    folders: Folders
    rules: Rules
    budget: Budget = FULL
    page_settings: str = "[]"
    storage: Sequence[str] = ()
    metadata: dict[str, Any] | None = None
    skip_blank_pages: bool = False
    retry_failed: bool = False
    reembed: bool = False


class Model(Protocol):
    """A bundle that was loaded, and has passed its self-test."""

    @property
    def bundle(self) -> str:
        """Its hash."""

    @property
    def dim(self) -> int:
        """Of its vectors, as they are asked for."""

    def pages(self) -> AbstractContextManager[Pages]:
        """What embeds with it."""


class Host(Protocol):
    """Where models are loaded and used."""

    def load(self, bundle: Path) -> Model:
        """Raises CembedError: no bundle, a damaged one, or one that computes other vectors here than it should."""

    def use(self, model: Model, index: Index) -> None:
        """From now on this is the index, open for writing, and this the model that its vectors are of."""

    def check(self) -> None:
        """Is called between pages, and raises to stop."""


@dataclass(frozen=True)
class LocalModel:
    """A `Model` in this process."""

    embedder: Embedder
    told: Watching

    @property
    def bundle(self) -> str:
        return self.embedder.bundle.hash

    @property
    def dim(self) -> int:
        return self.told.budget.dim or self.embedder.dim

    @contextmanager
    def pages(self) -> Iterator[Pages]:
        with self.told.loading.reader() as reader:
            yield LocalPages(self.embedder, reader, self.told.budget, self.told.skip_blank_pages)


@dataclass(frozen=True)
class LocalHost:
    """A `Host` that has one model, in this process."""

    told: Watching

    def load(self, bundle: Path) -> LocalModel:
        embedder = replace(self.told.loading, bundle=str(bundle)).load()
        embedder.check(embedder.manifest.document, self.told.budget)
        checked(embedder, self.told.loading.require_sandbox)
        embedder.prepare("document", self.told.budget)
        return LocalModel(embedder, self.told)

    def use(self, model: Model, index: Index) -> None:
        pass

    def check(self) -> None:
        pass

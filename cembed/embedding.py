"""`cembed embed`: pages become vectors, and what there is of them is written whatever ends the run."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cembed.display import complain
from cembed.runtime.bundle.vectors import VectorParts, Vectors
from cembed.runtime.embed.embedder import Budget, Embedder
from cembed.runtime.errors import CembedError
from cembed.runtime.pages.documents import Page, PageError
from cembed.signals import StopSignals


@dataclass(frozen=True, eq=False)
class Embedded:
    """A page's vectors, and where they come from."""

    vectors: Vectors
    path: str
    number: int
    warning: str


@dataclass
class Harvest:
    """What a run has made so far, of `total` pages, for the vector file `out`."""

    out: Path
    embedder: Embedder
    budget: Budget
    total: int = 0
    pages: list[Embedded] = field(default_factory=list)
    failures: list[PageError] = field(default_factory=list)

    @property
    def seen(self) -> int:
        return len(self.pages) + len(self.failures)

    @property
    def doubtful(self) -> bool:
        return bool(self.failures) or any(page.warning for page in self.pages)

    def run(
        self, pages: Iterable[Page | PageError], signals: StopSignals, done: Callable[[], None]
    ) -> BaseException | None:
        """Embeds page after page; gives what ended it before the last one, if something did. Then no signal does."""
        try:
            for page in pages:
                self.take(page)
                done()
            signals.hold()
        except BaseException as error:  # of whatever kind: the pages before it are worth their time
            signals.hold()
            return error
        return None

    def take(self, page: Page | PageError) -> None:
        if isinstance(page, PageError):
            self.failures.append(page)
            return
        try:
            vectors = self.embedder.embed_image(page.image, self.budget)
        except CembedError as error:
            self.failures.append(PageError(page.path, page.number, str(error)))
        else:
            self.pages.append(Embedded(vectors, page.path, page.number, page.warning or ""))

    def report(self) -> None:
        """One line for each page that is missing, or doubtful."""
        for page in self.pages:
            if page.warning:
                complain(f"warning: {page.path}, page {page.number}: {page.warning}")
        for failure in self.failures:
            number = "" if failure.number is None else f", page {failure.number}"
            complain(f"not embedded: {failure.path}{number}: {failure.reason}")

    def save(self) -> None:
        """Writes `out`; where it cannot be written, a folder for temporary files, and a CembedError that says so."""
        try:
            self.content().save(self.out)
        except CembedError as error:
            raise CembedError(f"{error}{self.rescue()}") from error

    def rescue(self) -> str:
        with contextlib.suppress(CembedError, OSError):
            path = Path(tempfile.mkdtemp(prefix="cembed-"), self.out.with_suffix(".npz").name)
            self.content().save(path)
            return f"; its {len(self.pages)} pages are in {path}: move it to where there is room"
        return ""

    def content(self) -> VectorParts:
        return VectorParts.of(
            [page.vectors for page in self.pages],
            [page.path for page in self.pages],
            [page.number for page in self.pages],
            self.embedder.bundle.hash,
            [page.warning for page in self.pages],
        )

    def stopped(self) -> str:
        """What a run that ended early has left."""
        left = f"has {len(self.pages)} pages" if self.pages else "was not written"
        return f"after {self.seen} of {self.total} pages: {self.out} {left}"

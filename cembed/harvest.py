"""`cembed embed`: pages become vectors, and what there is of them is written whatever ends the run."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cembed.display import complain
from cembed.runtime.bundle.vectors import VectorParts
from cembed.runtime.errors import CembedError
from cembed.runtime.page_vectors import EmbeddedPage
from cembed.runtime.pages.documents import PageError
from cembed.signals import StopSignals


@dataclass
class Harvest:
    """What a run has made so far, of `total` pages, for the vector file `out`; `bundle` is the hash of its maker."""

    out: Path
    bundle: str
    total: int = 0
    pages: list[EmbeddedPage] = field(default_factory=list)
    failures: list[PageError] = field(default_factory=list)

    @property
    def seen(self) -> int:
        return len(self.pages) + len(self.failures)

    @property
    def doubtful(self) -> bool:
        return bool(self.failures) or any(page.warning for page in self.pages)

    def run(
        self, pages: Iterable[EmbeddedPage | PageError], signals: StopSignals, done: Callable[[], None]
    ) -> BaseException | None:
        """Takes page after page; gives what ended it before the last one, if something did. Then no signal does."""
        try:
            for page in pages:
                if isinstance(page, PageError):
                    self.failures.append(page)
                else:
                    self.pages.append(page)
                done()
            signals.hold()
        except BaseException as error:  # of whatever kind: the pages before it are worth their time
            signals.hold()
            return error
        return None

    def report(self) -> None:
        """One line for each page that is missing, or doubtful."""
        for page in self.pages:
            if page.warning:
                complain(f"warning: {page.place}: {page.warning}")
        for failure in self.failures:
            complain(f"not embedded: {failure.place}: {failure.reason}")

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
            self.bundle,
            [page.warning or "" for page in self.pages],
        )

    def stopped(self) -> str:
        """What a run that ended early has left."""
        left = f"has {len(self.pages)} pages" if self.pages else "was not written"
        return f"after {self.seen} of {self.total} pages: {self.out} {left}"

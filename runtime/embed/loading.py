"""How another process embeds: what `Embedder.load` and `PageReader` are told there, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from cembed.runtime.embed.embedder import Embedder
from cembed.runtime.pages.documents import PageReader


@dataclass(frozen=True)
class Loading:
    """Arguments of `Embedder.load`, then those of `PageReader`; nothing but what JSON can hold.

    `max_memory` is in bytes, of the process that embeds; where that is `confined`, it can open what the bundle has, and
    what `reads` names, and write nothing.
    """

    bundle: str
    providers: tuple[str, ...] = ()
    threads: int | None = None
    prepack: bool | None = True
    max_visual_tokens: int | None = None
    skip_blank: bool | None = None
    trusted: str | None = None
    dpi: float = 144.0
    timeout: float = 60.0
    max_pixels: int = 100_000_000
    require_sandbox: bool = False
    confined: bool = False
    reads: tuple[str, ...] = ()
    max_memory: int | None = None

    def load(self) -> Embedder:
        """Raises CembedError as `Embedder.load`."""
        return Embedder.load(
            self.bundle,
            providers=self.providers or None,
            threads=self.threads,
            prepack=self.prepack,
            max_visual_tokens=self.max_visual_tokens,
            skip_blank=self.skip_blank,
            trusted=self.trusted,
        )

    def reader(self) -> PageReader:
        """Not open yet."""
        return PageReader(
            dpi=self.dpi,
            timeout=self.timeout,
            max_pixels=self.max_pixels,
            require_sandbox=self.require_sandbox,
        )

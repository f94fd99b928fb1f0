"""Folders that a server watches: the watcher is a thread, and its pages are embedded by the server's workers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.intake.job import BlankPage, Outcome, Pages, Wanted
from cembed.runtime.page_vectors import EmbeddedPage
from cembed.runtime.pages.documents import STRIKES, PageError, given_up
from cembed.serve.errors import RefusalError
from cembed.serve.following import load
from cembed.serve.hosts import Model, Watching
from cembed.serve.pool import Pool, Reply
from cembed.serve.service import Service
from cembed.serve.watching import Watch
from cembed.serve.worker import COUNT

AHEAD = 2
"""Pages that workers have beside the one that is waited for."""
BUSY_SECONDS = 0.5
log = logging.getLogger("cembed.serve")
T = TypeVar("T")


class EndedError(Exception):
    """The server ends."""


@dataclass
class PoolPages:
    """`Pages` by the workers of a pool, in the order of the pages, with some on their way."""

    host: ServerHost
    pool: Pool
    bundle: str
    _counts: dict[str, int] = field(default_factory=dict)

    def prepare(self) -> None:
        pass  # workers are

    def page_count(self, path: str) -> int | None:
        header, _ = self.host.wait(self._page(path, COUNT))
        self._counts[path] = header["pages"]
        return header["pages"] or None

    async def _page(self, path: str, number: int) -> Reply:
        """Raises RefusalError: what is wrong with the page, or with the workers."""
        told = self.host.told
        while self.pool.full or not self.pool.ready:
            await asyncio.sleep(BUSY_SECONDS)  # clients come first
        async with self.pool.place():
            return await self.host.service.page(
                Path(path), number, told.budget, pool=self.pool, skip_blank=told.skip_blank_pages
            )

    def embed(self, paths: Sequence[str], wanted: Wanted) -> Iterator[Outcome]:
        for path in paths:
            yield from self._embed(path, wanted)
            self._counts.pop(path, None)

    def _embed(self, path: str, wanted: Wanted) -> Iterator[Outcome]:
        pages, strikes = max(1, self._counts.get(path, 1)), 0
        under_way = deque[tuple[int, Future[Reply]]]()
        for number in range(1, pages + 1):
            if wanted(path, number):
                under_way.append((number, self.host.submit(self._page(path, number))))
            while len(under_way) > AHEAD or (under_way and number == pages):
                outcome = self._outcome(path, *under_way.popleft())
                strikes = strikes + 1 if isinstance(outcome, PageError) else 0
                yield outcome
            if strikes >= STRIKES and number < pages:
                for _, reply in under_way:
                    reply.cancel()
                yield given_up(path, number + 1, pages)
                return

    def _outcome(self, path: str, number: int, reply: Future[Reply]) -> Outcome:
        try:
            header, arrays = self.host.result(reply)
        except RefusalError as refusal:
            if refusal.status == 504:
                return PageError(path, number, refusal.message)
            if refusal.status != 422:
                raise CembedError(refusal.message) from None
            return PageError(path, number if self._counts.get(path) else None, refusal.message)
        if header.get("blank"):
            return BlankPage(path, number)
        return EmbeddedPage(path, number, arrays["vectors"], header["warning"])


@dataclass(frozen=True)
class ServerModel:
    """A `Model` in worker processes."""

    host: ServerHost
    opened: Bundle
    pool: Pool

    @property
    def bundle(self) -> str:
        return self.opened.hash

    @property
    def dim(self) -> int:
        return self.host.service.dim_of(self.opened.manifest)

    @contextmanager
    def pages(self) -> Iterator[Pages]:
        yield PoolPages(self.host, self.pool, self.bundle)


class ServerHost:
    """A `Host` whose models are in workers; the one that is used answers the server's clients, too."""

    def __init__(self, service: Service, told: Watching, loop: asyncio.AbstractEventLoop) -> None:
        self.service, self.told, self._loop = service, told, loop
        self.ended = threading.Event()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def result(self, future: Future[T]) -> T:
        """Raises EndedError, too."""
        while True:
            self.check()
            try:
                return future.result(1.0)
            except TimeoutError:
                if future.done():
                    raise

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self.result(self.submit(work))

    def load(self, bundle: Path) -> ServerModel:
        opened = Bundle(bundle, verify=False, trusted=self.service.settings.worker.trusted)
        if opened.hash == self.service.bundle.hash:
            return ServerModel(self, self.service.bundle, self.service.pool)
        return ServerModel(self, *self.wait(load(self.service, bundle)))

    def use(self, model: Model, index: Index) -> None:
        assert isinstance(model, ServerModel)
        if model.pool is not self.service.pool:
            self.wait(self.service.change(model.opened, model.pool, index))
        elif self.service.shelf is None:
            self.service.put_on_shelf(index)
        else:
            self.service.shelf.change(model.bundle, index)

    def check(self) -> None:
        if self.ended.is_set():
            raise EndedError


class Watched:
    """The watcher's thread."""

    def __init__(self, service: Service, told: Watching) -> None:
        self._host = ServerHost(service, told, asyncio.get_running_loop())
        self._watch = Watch(told, self._host, say=log.warning)
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pause = 1.0
        while True:
            try:
                self._watch.run()
            except EndedError:
                return
            except CembedError as error:
                log.error("the folders are not watched: %s; it is tried again in %g s", error, pause)
            except Exception:
                log.exception("the watcher failed; it is tried again in %g s", pause)
            if self._host.ended.wait(pause):
                return
            pause = min(2 * pause, 60.0)

    async def end(self) -> None:
        self._host.ended.set()
        await asyncio.to_thread(self._thread.join)

"""What the routes of every API stand on: vectors of texts and pictures, scores, the index."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cembed import __version__
from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.manifest import Manifest, Side
from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.embed.embedder import FULL, Budget, check_slots
from cembed.runtime.errors import CembedError
from cembed.runtime.index.index import Index
from cembed.runtime.index.new_pages import NewPage, page_content
from cembed.runtime.index.search import Hit
from cembed.runtime.index.views import PageInfo
from cembed.runtime.intake.opening import bundle_of
from cembed.runtime.plain_files import open_plain
from cembed.runtime.scoring.maxsim import maxsim
from cembed.runtime.updates.versions import CURRENT, resolve
from cembed.serve.each import each
from cembed.serve.errors import RefusalError
from cembed.serve.fetching import Fetcher, Url
from cembed.serve.inputs import Given, Item, Role, Stored, Text
from cembed.serve.metrics import Metrics
from cembed.serve.pool import Pool, Reply
from cembed.serve.room import Room, Share
from cembed.serve.settings import MIB, Settings
from cembed.serve.shelf import Shelf, source_path

PICTURE = 1280
"""Pixels of the longer side of the picture that is kept of a page: enough for the visual tokens of most models."""
MAX_NAME = 255
MAX_FILE = 2 << 30
LOG_SAYS = "the server's log says why"  # which may name paths
SUFFIXES: Mapping[str, Role] = {"-query": "query", "-passage": "document"}
T = TypeVar("T")
log = logging.getLogger("cembed.serve")


@dataclass(frozen=True)
class Added:
    """A page of a file that was sent: its place in the index, or why it has none."""

    number: int
    pages: int
    page: PageInfo | None = None
    error: str | None = None


class Service:
    """One bundle, its workers, and an index if there is one."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        root = resolve(Path(settings.worker.bundle))  # what is read later shall be of this one, too
        self.bundle = Bundle(root, verify=False, trusted=settings.worker.trusted)  # workers verify what they load
        self.name = settings.name or name_of(Path(settings.worker.bundle))
        check_budget(self.manifest, self.manifest.document, settings.budget)
        self._folder = tempfile.TemporaryDirectory(prefix="cembed-")
        self.pool = self.pool_of(root)
        self.fetch = Fetcher(settings.url_hosts, settings.limits.body, settings.limits.fetch)
        self.room = Room(settings.limits.bodies, lambda: self.pool.busy())  # for bodies, and what is fetched
        self._copying = asyncio.Semaphore(1)  # large files would fill the disk, or the memory, that copies are in
        self.shelf: Shelf | None = None
        self.failure: str | None = None  # why the workers did not start
        self.metrics = Metrics(self._gauges())
        self.metrics.tell(bundle=self.bundle.hash, model=self.name, version=__version__)

    def pool_of(self, root: Path) -> Pool:
        """Workers for a bundle; they are not started yet."""
        told = self.settings.worker
        reads = (*told.reads, self._folder.name)
        return Pool(replace(told, bundle=str(root), reads=reads), self.settings.workers, self.settings.limits)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def dim(self) -> int:
        """Length of a page's vector, as this server makes them."""
        return self.dim_of(self.manifest)

    def dim_of(self, manifest: Manifest) -> int:
        budget = self.settings.budget
        return budget.dim or manifest.document.vector_dim(manifest.dim, budget.num_vectors)

    async def change(self, bundle: Bundle, pool: Pool, index: Index | None = None) -> None:
        """From now on answers with another bundle and its workers, and with the index that is of it, if it is another
        object. What was begun is answered as it was begun."""
        old = self.pool
        async with old.still():
            self.bundle, self.pool = bundle, pool
            if self.shelf is not None:
                self.shelf.change(bundle.hash, index)
            elif index is not None:
                self.put_on_shelf(index)
            self.metrics.tell(bundle=bundle.hash, model=self.name, version=__version__)
        await old.close()

    def _gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        return {
            "cembed_queue_depth": ("Requests that wait for a worker.", lambda: self.pool.waiting),
            "cembed_in_flight": ("Requests that have a place.", lambda: self.pool.requests),
            "cembed_ready": ("1 once the self-test has passed.", lambda: self.pool.ready),
            "cembed_self_test_cosine": ("Lowest cosine of the self-test.", lambda: self.pool.cosine),
            "cembed_pages": ("Pages in the index.", lambda: len(self.shelf.index) if self.shelf else 0),
        }

    def open_index(self) -> None:
        """Raises CembedError: it is not there, damaged, or of another bundle."""
        settings = self.settings
        if settings.index is None:
            return
        watch, there = settings.watch, bundle_of(settings.index)
        if watch is not None and watch.reembed and there not in (None, self.bundle.hash):
            return  # it will be made anew
        self.shelf = Shelf.open(
            settings.index, self.bundle.hash, self.dim, settings.read_only, settings.limits.pictures
        )
        if watch is not None:
            self.shelf.close()  # the watcher is who writes to it

    def put_on_shelf(self, index: Index) -> None:
        """Serves an index that is open for writing."""
        self.shelf = Shelf(index, self.bundle.hash, False, self.settings.limits.pictures)

    async def close(self) -> None:
        await self.pool.close()
        if self.shelf is not None:
            self.shelf.close()
        self._folder.cleanup()

    def role_of_model(self, model: str | None) -> Role | None:
        """What the suffix of a model's name says. Raises RefusalError: another model."""
        if not model or model == self.name:
            return None
        for suffix, role in SUFFIXES.items():
            if model == self.name + suffix:
                return role
        raise RefusalError(
            404, f"there is no model {model[:100]!r} here, but {self.name!r}", "model", "model_not_found"
        )

    def budget(self, item: Item, dim: int | None = None, num_vectors: int | None = None) -> Budget:
        """For an item, what was asked for, or else as this server makes pages. Raises RefusalError."""
        given = self.settings.budget
        side = self.manifest.query if isinstance(item, Text) else self.manifest.document
        usual = Budget(dim=given.dim, decode=given.decode) if isinstance(item, Text) else given
        budget = replace(usual, dim=dim or usual.dim, num_vectors=num_vectors or usual.num_vectors)
        try:
            check_budget(self.manifest, side, budget)
        except CembedError as error:
            raise RefusalError(400, str(error), "dimensions") from None
        return budget

    def pools(self, item: Given, num_vectors: int | None = None) -> bool:
        """Whether a query or page becomes one vector."""
        side = self.manifest.query if isinstance(item, Text) else self.manifest.document
        return side.pooling != "none" or (num_vectors or side.num_vectors) == 1

    def check_text(self, text: str) -> str:
        """Raises RefusalError: too long, or no text."""
        if len(text) > self.settings.limits.text:
            raise RefusalError(400, f"a text has at most {self.settings.limits.text} characters", "input")
        if not text.isprintable() and any(0xD800 <= ord(character) < 0xE000 for character in text):
            raise RefusalError(400, "a text has half of a character (a lone surrogate)", "input")
        return text

    @contextlib.contextmanager
    def stored(self, data: bytes) -> Iterator[Path]:
        """A file of these bytes, for as long as the block takes."""
        handle, name = tempfile.mkstemp(dir=self._folder.name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            yield Path(name)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(name)

    async def embed(self, item: Item, budget: Budget) -> Vectors:
        """Vectors of a query, or of the first page of a file. Raises RefusalError."""
        if isinstance(item, Text):
            job = {"kind": "query", "budget": astuple(budget), "text": self.check_text(item.text)}
            return (await self.pool.run(job))[1]["vectors"]
        with self.stored(item.data) as path:
            return (await self.page(path, 1, budget))[1]["vectors"]

    async def page(self, path: Path, number: int, budget: Budget, pool: Pool | None = None, **more: Any) -> Reply:
        """A page of a file: `vectors`, how many `pages` the file has, and more that is asked. Raises RefusalError."""
        job = {"kind": "page", "budget": astuple(budget), "path": str(path), "number": number, **more}
        return await (pool or self.pool).run(job)

    async def embed_all(
        self, items: Sequence[Item], dim: int | None = None, num_vectors: int | None = None
    ) -> list[Vectors]:
        """Vectors of each. Raises RefusalError: the first that cannot be embedded."""
        pairs = self._pairs(items, dim, num_vectors)
        async with self.pool.place():
            return await self._embed_each(pairs)

    async def fetched(self, given: Sequence[T | Url], share: Share) -> list[T]:
        """All inputs of a request, with the files of URLs, which are in its `share`. Raises RefusalError: too many,
        or one that cannot be fetched."""
        if len(given) > self.settings.limits.inputs:
            raise RefusalError(400, f"{len(given)} inputs: send {self.settings.limits.inputs} at most", "input")
        urls = [one for one in given if isinstance(one, Url)]
        files: Iterator[Any] = iter(await self.fetch(urls, share.take) if urls else ())
        return [next(files) if isinstance(one, Url) else one for one in given]

    def _pairs(
        self, items: Sequence[Item], dim: int | None = None, num_vectors: int | None = None
    ) -> list[tuple[Item, Budget]]:
        return [(item, self.budget(item, dim, num_vectors)) for item in items]

    async def _embed_each(self, pairs: Sequence[tuple[Item, Budget]]) -> list[Vectors]:
        return await each(lambda pair: self.embed(*pair), pairs, self.pool.capacity)

    async def scores(self, query: Item, documents: Sequence[Item | Stored]) -> list[float]:
        """MaxSim of a query with each document. Raises RefusalError."""
        pairs = self._pairs([query, *(item for item in documents if not isinstance(item, Stored))])
        async with self.pool.place():  # all of it by one model
            stored = {i: self.vectors_of(item) for i, item in enumerate(documents) if isinstance(item, Stored)}
            first, *others = await self._embed_each(pairs)
        new = iter(others)
        vectors = [stored[i] if i in stored else next(new) for i in range(len(documents))]
        return [float(score) for score in maxsim([first], vectors)[0]] if vectors else []

    def vectors_of(self, page: Stored) -> Vectors:
        """Raises RefusalError: there is no such page."""
        try:
            return self.require_shelf().index.vectors(self.require_shelf().find(page.name).id)
        except CembedError:
            raise RefusalError(404, f"there is no page {page.name[:100]!r} in the index", "documents") from None

    async def search(self, query: Vectors, top: int, where: Mapping[str, Any], source: str | None) -> Sequence[Hit]:
        """Pages of the index, the best first. Raises RefusalError: it cannot be read."""
        try:
            return await self.require_shelf().search(query, top, where, source)
        except CembedError as error:
            log.error("the index cannot be searched: %s", error)
            raise RefusalError(500, f"the index cannot be searched; {LOG_SAYS}") from None

    def require_shelf(self) -> Shelf:
        """Raises RefusalError: there is no index."""
        if self.shelf is None and self.settings.index is not None:
            raise RefusalError(503, "the index is being made anew: try again later", retry_after=60)
        if self.shelf is None:
            raise RefusalError(404, "this server has no index: start it with --index", code="no_index")
        return self.shelf

    def find(self, serial: str) -> PageInfo:
        """Raises RefusalError: there is no such page."""
        try:
            return self.require_shelf().find(serial)
        except CembedError:
            raise RefusalError(404, "there is no such page", code="page_not_found") from None

    async def add(self, data: bytes, name: str, metadata: Mapping[str, Any]) -> AsyncGenerator[Added, None]:
        """Adds every page of a file, each of which is on disk when it is given here.

        Pages with the same content take vectors that are there. Raises RefusalError, before the first.
        """
        shelf = self.require_shelf()
        if shelf.read_only:
            raise RefusalError(403, "this server was started with --read-only", code="read_only")
        digest = await asyncio.to_thread(lambda: hashlib.sha256(data).digest())
        source = name or digest.hex()[:16]
        number, pages, whole = 1, 1, True
        async with self.pool.place():
            with self.stored(data) as path:
                while number <= pages:
                    try:
                        new, picture, pages = await self._new_page(path, digest, source, number)
                    except RefusalError as refusal:
                        if refusal.status != 422:
                            raise
                        whole = False
                        yield Added(number, pages, error=refusal.message)
                    else:
                        info = await self._add(shelf, replace(new, metadata=metadata), picture)
                        self.metrics.added()
                        yield Added(number, pages, info)
                    number += 1
        if whole:
            await shelf.remove_after(source, pages)

    async def _add(self, shelf: Shelf, page: NewPage, picture: bytes) -> PageInfo:
        """Raises RefusalError: the index cannot be written now."""
        try:
            return await shelf.add(page, picture)
        except CembedError as error:
            log.error("the index cannot be written now: %s", error)
            raise RefusalError(503, f"the index cannot be written now; {LOG_SAYS}", retry_after=5) from None

    async def _new_page(self, path: Path, digest: bytes, source: str, number: int) -> tuple[NewPage, bytes, int]:
        """A page to add, its picture, and how many pages the file has. Raises RefusalError."""
        index = self.require_shelf().index
        content = page_content(digest, number, self.settings.page_settings)
        known = index.has_content(content)
        kind = "picture" if known else "page"
        header, arrays = await self.page(path, number, self.settings.budget, kind=kind, picture=PICTURE)
        new = NewPage(
            id=f"{source}#{number}",
            vectors=None if known else arrays["vectors"],
            source=source,
            page=number,
            content=content,
            warning=index.warning_of(content) if known else header["warning"],
        )
        return new, arrays["picture"].tobytes(), header["pages"]

    async def picture(self, page: PageInfo) -> bytes:
        """The picture that is kept of a page; of one that `cembed index add` added, it is made now.

        Raises RefusalError: there is none, and no file that has what was indexed.
        """
        shelf = self.require_shelf()
        kept = await asyncio.to_thread(shelf.pictures.read, page.serial)
        if kept is not None:
            return kept
        source = source_path(page)
        if source is None:
            raise no_picture()
        async with self.pool.place(), self._copying:
            with self.stored(b"") as copy:
                await asyncio.to_thread(self._copy_indexed, page, source, copy)
                _, arrays = await self.page(copy, page.page, FULL, kind="picture", picture=PICTURE)
        made = arrays["picture"].tobytes()
        await asyncio.to_thread(shelf.pictures.put, page.serial, made)
        return made

    def _copy_indexed(self, page: PageInfo, source: Path, copy: Path) -> None:
        """The bytes that a page is of: its file may be another one by now, or the index a stranger's, which names any.

        Raises RefusalError: there are others, or none.
        """
        try:
            digest = copy_file(source, copy)
        except (OSError, CembedError):
            raise no_picture() from None
        content = page_content(digest, page.page, self.settings.page_settings)
        if self.require_shelf().index.content_of(page.id) != content:
            raise no_picture()

    async def explain(self, page: PageInfo, query: str) -> Reply:
        """Where a page matches a query. Raises RefusalError."""
        text = self.check_text(query)
        budget = replace(self.settings.budget, pool_factor=1)
        picture = await self.picture(page)
        async with self.pool.place():
            with self.stored(picture) as path:
                return await self.page(path, 1, budget, kind="explain", text=text)


def no_picture() -> RefusalError:
    return RefusalError(404, "no picture is kept of this page", code="no_picture")


def copy_file(source: Path, copy: Path) -> bytes:
    """The sha256 of a file's bytes as they were copied. Raises OSError and CembedError: they cannot be read."""
    digest = hashlib.sha256()
    with open_plain(Path(os.path.realpath(source)), MAX_FILE) as (file, size), open(copy, "wb") as new:
        for _ in range(0, size, MIB):  # no more, if it grows
            part = file.read(MIB)
            digest.update(part)
            new.write(part)
    return digest.digest()


def name_of(bundle: Path) -> str:
    """The name of a model by its path as it was given, which leads to other versions later.

    >>> name_of(Path("/srv/scans/current")), name_of(Path("/srv/models/causalqwen"))
    ('scans', 'causalqwen')
    """
    path = Path(os.path.abspath(bundle))
    return path.parent.name if path.name == CURRENT else path.name


def check_budget(manifest: Manifest, side: Side, budget: Budget) -> None:
    """Raises CembedError: vectors that a bundle does not make."""
    if budget.num_vectors is not None:
        check_slots(side, budget)
        side.check_budget(budget.num_vectors)
    length = side.vector_dim(manifest.dim, budget.num_vectors)
    if budget.dim is not None and not 1 <= budget.dim <= length:
        raise CembedError(f"dim is {budget.dim}: this bundle's vectors have {length}")


def check_name(name: str) -> str:
    """A file's name that a client gave, as the index keeps it: never a path of this machine. Raises RefusalError."""
    name = name.strip().lstrip("/\\")
    if ".." in name.replace("\\", "/").split("/"):
        raise RefusalError(400, "name: give a file's name, without parts that are ..", "name")
    if len(name) > MAX_NAME or not name.isprintable():
        raise RefusalError(400, f"name: give at most {MAX_NAME} printable characters", "name")
    return name


def as_bytes(vectors: Sequence[Vectors], dtype: str) -> bytes:
    """Rows one after the other, little-endian: `f32` or `f16`."""
    kind = {"f32": "<f4", "f16": "<f2"}[dtype]
    return b"".join(rows.astype(kind).tobytes() for rows in vectors)

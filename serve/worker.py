"""The process that embeds for the server: an Embedder, and the decoding process of its PageReader.

A job is a frame with `kind`: `query` with `text`; `page` and `picture` with `path` and `number`, and `picture`, the
longer side of a picture to give of it, and `skip_blank` if a blank one is not to be embedded; `explain` with `path`,
`number` and `text`. `budget` has a Budget's fields. Jobs are answered in order; while one is computed, the page of the
next is decoded. What is wrong with a page or query is `error` in its answer.
"""

from __future__ import annotations

import gc
import io
import json
import os
import select
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from cembed.runtime.embed.blank import is_blank
from cembed.runtime.embed.embedder import Budget, Embedder
from cembed.runtime.embed.loading import Loading
from cembed.runtime.errors import CembedError, one_line
from cembed.runtime.page_vectors import NO_MEMORY
from cembed.runtime.pages.documents import Page, PageError, PageReader
from cembed.runtime.verify import self_test
from cembed.serve.frames import PREFIX, Array, Header, pack, sizes, unpack

COUNT = 0
"""The number of a page that asks how many pages a file has; 0 if it cannot be read."""
AHEAD = 1
"""Pages that are decoded before their turn."""
READ_BYTES = 1 << 16
JPEG_QUALITY = 82
SELF_TEST_COSINE = 0.9
"""Engines of lower precision, and int8 weights that are packed, stay above it; one that is broken does not."""

Answer = tuple[Header, dict[str, Array]]
Reading = tuple[Page | Header, int]
"""A page, or the answer where there is none; and how many pages its file has."""


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server ends it, by closing its input
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may get among the replies
    settings = Loading(**json.loads(sys.argv[1]))
    try:
        embedder = settings.load()
        embedder.prepare("document")
        embedder.prepare("query")
        reader = settings.reader()
        replies.write(pack({"cosine": checked(embedder, settings.require_sandbox)}))
    except CembedError as error:
        replies.write(pack({"error": str(error)}))
        replies.flush()
        return
    replies.flush()
    gc.collect()
    gc.freeze()  # or the collector looks at it all again and again
    with reader, ThreadPoolExecutor(1) as decoding:
        for job, page in jobs(sys.stdin.fileno(), reader, decoding):
            replies.write(pack(*answer(embedder, job, page)))
            replies.flush()
            del page  # it may be the largest thing in memory
    os._exit(0)


def checked(embedder: Embedder, require_sandbox: bool = False) -> float:
    """The lowest cosine of a vector of the bundle's self-test with the one it was exported with.

    Raises CembedError: less than an engine of lower precision would give.
    """
    worst, cosine = self_test(embedder, require_sandbox=require_sandbox)
    if not (worst <= embedder.manifest.self_test.tolerance or cosine >= SELF_TEST_COSINE):
        raise CembedError(
            f"the self-test of {embedder.bundle.root} gives other vectors here: their cosine is {cosine:.4f}"
        )
    return cosine


def jobs(handle: int, reader: PageReader, decoding: Executor) -> Iterator[tuple[Header, Reading | None]]:
    """Jobs in the order of their coming, with their page, until the server is gone.

    Pages are decoded one ahead. Queries need no other thread, which would take the interpreter from this one.
    """
    data, waiting = bytearray(), deque[tuple[Header, Future[Reading] | None]]()
    while True:
        while not waiting or readable(handle):
            if not (part := os.read(handle, READ_BYTES)):
                return
            data += part
            waiting.extend((job, None) for job in frames(data))
        decode_ahead(waiting, reader, decoding)
        job, page = waiting.popleft()
        yield job, None if page is None else page.result()
        del page


def readable(handle: int) -> bool:
    return bool(select.select([handle], [], [], 0)[0])


def frames(data: bytearray) -> Iterator[Header]:
    """The jobs that are whole; they are taken from `data`."""
    while len(data) >= PREFIX:
        header, arrays = sizes(bytes(data[:PREFIX]))
        end = PREFIX + header + arrays
        if len(data) < end:
            return
        yield unpack(bytes(data[PREFIX : PREFIX + header]), bytes(data[PREFIX + header : end]))[0]
        del data[:end]


def decode_ahead(waiting: deque[tuple[Header, Future[Reading] | None]], reader: PageReader, decoding: Executor) -> None:
    """Begins to read the pages of the first jobs that have one: of the next, and of so many after it."""
    pages = [i for i, (job, _) in enumerate(waiting) if "path" in job]
    for i in pages[: 1 + AHEAD]:
        job, page = waiting[i]
        if page is None:
            waiting[i] = job, decoding.submit(read_page, reader, job["path"], job["number"])


def read_page(reader: PageReader, path: str, number: int) -> Reading:
    """A page, or the answer that says why there is none; and how many pages the file has."""
    try:
        if number == COUNT:
            return {"pages": reader.page_count(path) or 0}, 0
        page, pages = reader.page(path, number)
    except CembedError as error:
        print(error, file=sys.stderr)  # it names paths of this machine
        return {"fault": "the decoding process does not start; the server's log says why"}, 0
    return ({"error": page.reason, "pages": pages} if isinstance(page, PageError) else page), pages


def answer(embedder: Embedder, job: Header, reading: Reading | None) -> Answer:
    page, job["pages"] = reading or (None, 0)
    if isinstance(page, dict):
        return page, {}
    try:
        return JOBS[job["kind"]](embedder, job, page)
    except CembedError as error:
        return {"error": one_line(str(error)), "pages": job["pages"]}, {}
    except MemoryError:
        return {"fault": f"this {NO_MEMORY}"}, {}
    except Exception:
        traceback.print_exc()
        return {"fault": "the worker failed"}, {}


def query(embedder: Embedder, job: Header, page: Page | None) -> Answer:
    return {}, {"vectors": embedder.embed_query(job["text"], Budget(*job["budget"]))}


def document(embedder: Embedder, job: Header, page: Page | None) -> Answer:
    assert page is not None
    if job.get("skip_blank") and is_blank(page.image):
        return {"pages": job["pages"], "blank": True}, {}
    arrays = {"vectors": embedder.embed_image(page.image, Budget(*job["budget"]))}
    if job.get("picture"):
        arrays["picture"] = np.frombuffer(jpeg(page.image, job["picture"]), np.uint8)
    return {"pages": job["pages"], "warning": page.warning}, arrays


def picture(embedder: Embedder, job: Header, page: Page | None) -> Answer:
    assert page is not None
    return {"pages": job["pages"]}, {"picture": np.frombuffer(jpeg(page.image, job["picture"]), np.uint8)}


def explain(embedder: Embedder, job: Header, page: Page | None) -> Answer:
    assert page is not None
    found = embedder.explain(page.image, job["text"], Budget(*job["budget"]))
    return {"score": float(found.score), "hottest": list(map(float, found.hottest))}, {"heat": found.heat}


JOBS: Mapping[str, Callable[[Embedder, Header, Page | None], Answer]] = {
    "query": query,
    "page": document,
    "picture": picture,
    "explain": explain,
}


def jpeg(image: Any, side: int) -> bytes:
    """A page as a JPEG file whose longer side is `side` at most."""
    small = Image.fromarray(image)
    small.thumbnail((side, side), Image.Resampling.BOX if max(small.size) > 3 * side else Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


if __name__ == "__main__":
    main()

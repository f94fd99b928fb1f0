"""A Ray cluster embeds: documents are split into pages, pages are given to actors, their rows come back to one writer.

    documents ──> PageSplitter ──> PageEmbedder (an actor for each so many CPUs) ──> Parts, in this process

Ray runs again what a lost node had begun. A row is written once: by its key, here, and the next run goes on from what
is written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cembed.runtime.errors import CembedError, missing_extra
from cembed.scale.embed import PageEmbedder, PageSplitter, WorkerOptions
from cembed.scale.parts import Keys, Parts

PAGES_AT_ONCE = 4
"""That an actor is given together: a few, as one may take seconds."""
DOCUMENTS_AT_ONCE = 8
SPLIT_CPUS = 0.25
"""Of a splitter: it hashes files and counts their pages, far faster than they are embedded."""
BLOCK_DOCUMENTS = 16
SMALL = 1 << 20


@dataclass(frozen=True)
class Progress:
    """What is done: pages, those of them with an error, documents seen of `documents`, seconds since the start."""

    pages: int
    errors: int
    seen: int
    documents: int
    seconds: float

    @property
    def rate(self) -> float:
        """Pages a second."""
        return self.pages / max(self.seconds, 1e-9)

    @property
    def left(self) -> float | None:
        """Seconds that the other documents take, if they have as many pages as those so far."""
        return self.seconds * (self.documents - self.seen) / self.seen if self.seen else None


def connect(address: str) -> Any:
    """Ray, connected to the cluster at `address`; `auto` is the one of this machine, or a local one that is started.

    Raises CembedError: there is no Ray, or no cluster at this address.
    """
    try:
        import ray
    except ImportError as error:
        raise missing_extra("--cluster", "ray[data]", "ray", error) from error
    if ray.is_initialized():
        return ray
    quiet = {"log_to_driver": False, "logging_level": "warning"}
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        if address != "auto":
            raise CembedError(f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}") from error
        ray.init(include_dashboard=False, **quiet)
    return ray


def embed_documents(
    ray: Any,
    paths: Sequence[str],
    options: WorkerOptions,
    parts: Parts,
    done: Callable[[Progress], None],
    actors: int | None = None,
) -> Progress:
    """Embeds documents into `parts`, by `actors` processes, as many as the cluster has room for by default.

    Paths must mean the same on every node: a shared folder, or URIs. Raises CembedError: no actor can load the bundle.
    """
    start, seen, pages, errors = time.monotonic(), set[str](), 0, 0
    progress = Progress(0, 0, 0, len(paths), 0.0)
    for batch in stream(ray, paths, options, parts.done.keys, actors):
        pages += parts.add_batch(batch)
        errors += len(batch) - batch.column("error").null_count
        seen.update(batch.column("path").unique().to_pylist())
        progress = Progress(pages, errors, len(seen), len(paths), time.monotonic() - start)
        done(progress)
    return progress


def stream(
    ray: Any, paths: Sequence[str], options: WorkerOptions, keys: Keys, actors: int | None = None
) -> Iterator[Any]:
    """Record batches of rows as they are made, in no order; pages whose key is in `keys` are left out."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    threads = options.threads or 1
    room = max(1, int((ray.cluster_resources().get("CPU", 1) - SPLIT_CPUS) // threads))
    held = np.asarray(keys)
    if held.nbytes > SMALL:
        held = ray.put(held)  # once for each node, in memory that its processes share
    blocks = max(1, -(-len(paths) // BLOCK_DOCUMENTS))
    documents = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=blocks)
    split = documents.map_batches(
        SplitterOnNode,
        fn_constructor_args=(options, held),
        batch_size=DOCUMENTS_AT_ONCE,
        batch_format="numpy",
        num_cpus=SPLIT_CPUS,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    rows = split.map_batches(
        PageEmbedder,
        fn_constructor_args=(options,),
        batch_size=PAGES_AT_ONCE,
        batch_format="numpy",
        num_cpus=threads,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors or room),
    )
    for table in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        yield from (batch for batch in as_table(table, options).to_batches() if len(batch))


class SplitterOnNode(PageSplitter):
    """A PageSplitter whose keys are in Ray's memory."""

    def __init__(self, options: WorkerOptions, keys: Any) -> None:
        import ray

        super().__init__(options, ray.get(keys) if isinstance(keys, ray.ObjectRef) else keys)


def as_table(table: Any, options: WorkerOptions) -> Any:
    """Rows with their schema's own metadata, which engines drop."""
    schema = options.schema.arrow
    return pa.table({name: table.column(name).combine_chunks() for name in schema.names}).cast(schema)

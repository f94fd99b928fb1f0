"""A Daft frame embeds: a column `path` of documents becomes rows, one for each page, as columns of the frame.

    frame = embed_frame(daft.from_glob_path("scans/**")…, options, processes=2)
    frame.write_parquet("pages.parquet")

Daft runs in this process's machine or on a Ray cluster, as it was told (`daft.set_runner_ray()`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from cembed.runtime.errors import missing_extra
from cembed.scale.embed import PageEmbedder, PageSplitter, WorkerOptions
from cembed.scale.parts import Keys
from cembed.scale.rows import KEY_BYTES

PAGES_AT_ONCE = 4
GIVEN = ("path", "page", "sha256")
PAGES = pa.list_(pa.struct([("page", pa.int32()), ("sha256", pa.string())]))


def embed_frame(frame: Any, options: WorkerOptions, processes: int = 1, keys: Keys | None = None) -> Any:
    """`frame` with a row for each page of the documents in its column `path`, and the columns of `scale.rows`.

    `processes` embed, each with `options.threads`. Pages whose key is in `keys`, sorted, are left out. Nothing that is
    wrong with a page raises. Raises CembedError: there is no Daft.
    """
    try:
        import daft
    except ImportError as error:
        raise missing_extra("embed_frame", "daft", "daft", error) from error
    done = np.empty(0, f"S{KEY_BYTES}") if keys is None else np.asarray(keys)
    splitter = daft.cls(_splitter(daft), max_concurrency=1, use_process=True)(options, done)
    embedder = daft.cls(
        _embedder(daft, options), cpus=options.threads or 1, max_concurrency=processes, use_process=True
    )
    pages = (
        frame.with_column("found", splitter.pages(frame["path"])).explode("found").where(daft.col("found").not_null())
    )
    pages = pages.with_columns({name: pages["found"][name] for name in GIVEN[1:]}).exclude("found")
    rows = pages.with_column("row", embedder(options).rows(*(pages[name] for name in GIVEN)))
    return rows.with_columns({field.name: rows["row"][field.name] for field in made_of(options)}).exclude("row")


def made_of(options: WorkerOptions) -> list[Any]:
    """The fields that a PageEmbedder fills; a page of 0 is none then."""
    return [field for field in options.schema.arrow if field.name not in ("path", "sha256")]


def batches(frame: Any, options: WorkerOptions) -> Iterator[Any]:
    """The rows of a frame as record batches with their own schema, which `Parts.add_batch` takes."""
    schema = options.schema.arrow
    for batch in frame.to_arrow_iter():
        columns = [batch.column(name).cast(schema.field(name).type) for name in schema.names]
        yield pa.record_batch(columns, schema=schema)


def _splitter(daft: Any) -> type:
    class Splitter(PageSplitter):
        @daft.method.batch(return_dtype=daft.DataType.from_arrow_type(PAGES), batch_size=PAGES_AT_ONCE)
        def pages(self, path: Any) -> Any:
            found = [PageSplitter.pages(self, one) for one in path.to_pylist()]
            return pa.array([[{"page": p, "sha256": s} for p, s in pages] for pages in found], PAGES)

    return Splitter


def _embedder(daft: Any, options: WorkerOptions) -> type:
    made = made_of(options)

    class Embedder(PageEmbedder):
        @daft.method.batch(return_dtype=daft.DataType.from_arrow_type(pa.struct(made)), batch_size=PAGES_AT_ONCE)
        def rows(self, path: Any, page: Any, sha256: Any) -> Any:
            given = {"path": path.to_pylist(), "page": page.to_pylist(), "sha256": sha256.to_pylist()}
            table = self(given).combine_chunks()
            columns = [table.column(field.name).chunk(0) for field in made]
            return pa.StructArray.from_arrays(columns, fields=made)

    return Embedder

"""Indexes on the nodes of a Ray cluster, searched as one over HTTP; see README.md.

python samples/ray_serve/serve_shards.py 'shelf-*' --bundle samples/bundle
"""

import asyncio
import contextlib
import glob
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray
import typer
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayError
from starlette.requests import Request

from cembed.runtime import CembedError, Embedder, Index

ATTEMPTS, SECONDS = 3, 10.0


class Shard:
    """One index."""

    def __init__(self, path: str) -> None:
        self._index = Index.open(path)

    def search(self, query: NDArray[np.float32], top: int) -> list[dict[str, Any]]:
        hits = self._index.search(query, top).hits
        return [{"score": hit.score, "id": hit.id, "source": hit.source, "page": hit.page} for hit in hits]


class Router:
    """Embeds a query, asks all shards, and merges what they have found."""

    def __init__(self, bundle: str, shards: dict[str, Any]) -> None:
        self._embedder, self._shards = Embedder.load(bundle, threads=1, prepack=None), shards

    async def __call__(self, request: Request) -> dict[str, Any]:
        text, top = request.query_params.get("q", ""), int(request.query_params.get("top", "10"))
        try:
            query = self._embedder.embed_query(text)
        except CembedError as error:
            return {"error": str(error)}
        names = list(self._shards)
        found = await asyncio.gather(*(self._ask(self._shards[name], query, top) for name in names))
        pages = [{**page, "index": name} for name, part in zip(names, found, strict=True) for page in part or ()]
        missing = [name for name, part in zip(names, found, strict=True) if part is None]
        return {"pages": sorted(pages, key=lambda page: -page["score"])[:top], "missing": missing}

    async def _ask(self, shard: Any, query: NDArray[np.float32], top: int) -> list[dict[str, Any]] | None:
        """A replica that died is left out by the next attempt; None where there is none."""
        for _ in range(ATTEMPTS):
            with contextlib.suppress(RayError, asyncio.TimeoutError):
                found: list[dict[str, Any]] = await asyncio.wait_for(shard.search.remote(query, top), SECONDS)
                return found
            await asyncio.sleep(0.1)
        return None


def application(paths: list[str], bundle: str, replicas: int) -> Any:
    """Each shard is an application of its own, so that one that fails to start does not keep the others from it."""
    shards = {}
    for number, path in enumerate(paths):
        shard = serve.deployment(Shard, num_replicas=replicas, ray_actor_options={"num_cpus": 0.1}).bind(path)
        shards[path] = serve.run(shard, name=f"shard-{number}", route_prefix=None)
    return serve.deployment(Router, ray_actor_options={"num_cpus": 0.5}).bind(bundle, shards)


def main(
    pattern: Annotated[str, typer.Argument(help="Indexes, as 'shelf-*'.")],
    bundle: Annotated[Path, typer.Option(help="The bundle that made their vectors.")],
    replicas: Annotated[int, typer.Option(min=1, help="Of each shard.")] = 2,
    port: Annotated[int, typer.Option(help="Of HTTP.")] = 8000,
    address: Annotated[str | None, typer.Option(help="Of the cluster; one is started here if there is none.")] = None,
) -> None:
    """Serve shards until Ctrl-C."""
    ray.init(address=address, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    paths = sorted(str(Path(path).absolute()) for path in glob.glob(pattern))
    serve.run(application(paths, str(bundle.absolute()), replicas), name="search", route_prefix="/")
    print(f"searching {len(paths)} shards at http://127.0.0.1:{port}", flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    typer.run(main)

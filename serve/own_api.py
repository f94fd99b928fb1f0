"""cembed's own routes: bytes in and out, the index, where a page matched."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field

from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.errors import CembedError
from cembed.runtime.index.metadata import check_metadata, parse_pairs
from cembed.runtime.index.search import Hit
from cembed.runtime.index.views import PageInfo
from cembed.serve.errors import RefusalError
from cembed.serve.fetching import File
from cembed.serve.inputs import Item, Text
from cembed.serve.responses import refusals, service_of
from cembed.serve.service import Added, Service, as_bytes, check_name
from cembed.serve.shelf import shown_source

MAX_TOP = 1000
LINES = "application/x-ndjson"
router = APIRouter(tags=["pages"], responses=refusals())

BYTES = {"schema": {"type": "string", "format": "binary"}}
FILE = {"requestBody": {"required": True, "content": {"application/octet-stream": BYTES}}}
FILE_OR_TEXT = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": BYTES, "text/plain": {"schema": {"type": "string"}}},
    }
}
VECTORS = {"content": {"application/octet-stream": BYTES}, "description": "Rows of numbers, little-endian."}
SAME = {"description": "The picture that the client has."}
PICTURE = {"content": {"image/jpeg": BYTES}, "description": "A picture."}

Size = Annotated[int, Query(ge=1, le=1 << 20)]
Top = Annotated[int, Query(ge=1, le=MAX_TOP, description="Pages to give.")]
Serial = Annotated[str, Field(max_length=500)]


async def body_of(request: Request) -> bytes:
    """Raises RefusalError: it is empty."""
    body = await request.body()
    if not body:
        raise RefusalError(400, "the body is empty: send a picture, a PDF or a text")
    return body


def item_of(body: bytes, content_type: str) -> Item:
    """A query for text/plain, else a file. Raises RefusalError: not UTF-8."""
    if content_type.partition(";")[0].strip().lower() != "text/plain":
        return File(body)
    try:
        return Text(body.decode())
    except UnicodeDecodeError:
        raise RefusalError(400, "the text is not UTF-8") from None


@router.post("/embed", response_class=Response, responses={200: VECTORS}, openapi_extra=FILE_OR_TEXT)
async def embed(
    request: Request,
    dtype: Literal["f32", "f16"] = "f32",
    page: Size | None = None,
    num_vectors: Size | None = None,
    dim: Size | None = None,
) -> Response:
    """Vectors of each page of a file, or of a query (text/plain), as bytes: rows of `Cembed-Dim` numbers, those of all
    pages one after the other, so many of each as `Cembed-Rows` lists. `page` is the only one to embed."""
    service = service_of(request)
    item = item_of(await body_of(request), request.headers.get("content-type", ""))
    budget = service.budget(item, dim, num_vectors)
    async with service.pool.place():
        if isinstance(item, Text):
            many = [await service.embed(item, budget)]
        else:
            with service.stored(item.data) as path:
                many = list[Vectors]()
                number, last = page or 1, page or 1
                while number <= last:
                    header, arrays = await service.page(path, number, budget)
                    last = last if page else header["pages"]
                    many.append(arrays["vectors"])
                    number += 1
    headers = {"Cembed-Rows": ",".join(str(len(rows)) for rows in many), "Cembed-Dim": str(many[0].shape[1])}
    return Response(as_bytes(many, dtype), media_type="application/octet-stream", headers=headers)


class Found(BaseModel):
    """A page of the index."""

    id: str
    source: str
    page: int
    score: float
    metadata: dict[str, Any] = {}
    warning: str | None = None


class SearchResponse(BaseModel):
    pages: list[Found]
    total: int


def where_of(pairs: list[str] | None) -> dict[str, Any]:
    """Raises RefusalError: no KEY=VALUE, or a key that is cembed's, such as that of a file's folder."""
    try:
        found = parse_pairs("where", pairs or ())
        check_metadata(found)
    except CembedError as error:
        raise RefusalError(400, str(error), "where") from None
    return found


def about(page: Hit | PageInfo) -> dict[str, Any]:
    """What is told of a page wherever it is named."""
    return {
        "id": str(page.serial),
        "source": shown_source(page),
        "page": page.page,
        "metadata": dict(page.metadata),
        "warning": page.warning,
    }


async def searched(service: Service, item: Item, top: int, where: list[str] | None, source: str | None) -> Any:
    shelf = service.require_shelf()
    filters = where_of(where)
    async with service.pool.place():
        query = await service.embed(item, service.budget(item, dim=shelf.index.dim))
        hits = await service.search(query, top, filters, source)
    pages = [{**about(hit), "score": hit.score} for hit in hits]
    return {"pages": pages, "total": len(shelf.index)}


@router.get("/search", response_model=SearchResponse)
async def search(
    request: Request,
    q: Annotated[str, Query(min_length=1, max_length=10_000, description="What to look for.")],
    top: Top = 10,
    where: Annotated[list[str] | None, Query(description="KEY=VALUE of the metadata; all must hold.")] = None,
    source: Annotated[str | None, Query(max_length=1000, description="A pattern of files, such as scans/*.")] = None,
) -> Any:
    """Pages of the index by MaxSim with a query, the best first."""
    return await searched(service_of(request), Text(q), top, where, source)


@router.post("/search", response_model=SearchResponse, openapi_extra=FILE)
async def search_like(
    request: Request, top: Top = 10, where: Annotated[list[str] | None, Query()] = None, source: str | None = None
) -> Any:
    """Pages like the one in the body, its first page if it has more."""
    return await searched(service_of(request), File(await body_of(request)), top, where, source)


class PageAdded(BaseModel):
    """A page of the file: its `id`, or why it was not added."""

    number: int
    pages: int
    id: str | None = None
    error: str | None = None
    warning: str | None = None


class PagesResponse(BaseModel):
    source: str
    added: int
    pages: list[PageAdded]


def told(added: Added) -> dict[str, Any]:
    page = added.page
    about = {"id": str(page.serial), "warning": page.warning} if page else {"error": added.error}
    return {"number": added.number, "pages": added.pages, **about}


@router.post(
    "/pages",
    response_model=PagesResponse,
    response_model_exclude_none=True,
    responses={**refusals(), 200: {"content": {LINES: {"schema": {"type": "string"}}}}},
    openapi_extra=FILE,
)
async def add_pages(
    request: Request,
    name: Annotated[str, Query(max_length=255, description="The file's name; by default its hash.")] = "",
    metadata: Annotated[str, Query(max_length=10_000, description="JSON, for filters.")] = "{}",
) -> Any:
    """Adds the pages of a file to the index; each is on disk when it is answered. A file with the name of another one
    replaces it. With `Accept: application/x-ndjson` pages are answered one by one, a line each."""
    service = service_of(request)
    source, body = check_name(name), await body_of(request)
    pages = service.add(body, source, metadata_of(metadata))
    first = await anext(pages)
    if LINES in request.headers.get("accept", ""):
        return StreamingResponse(lines(first, pages), media_type=LINES)
    async with contextlib.aclosing(pages):
        all_pages = [first, *[page async for page in pages]]
    added = [page for page in all_pages if page.page]
    if not added:
        raise RefusalError(422, str(first.error))
    shown = added[0].page.source if added[0].page else source
    return {"source": shown, "added": len(added), "pages": [told(page) for page in all_pages]}


async def lines(first: Added, others: AsyncIterator[Added]) -> AsyncIterator[bytes]:
    yield json.dumps(told(first)).encode() + b"\n"
    try:
        async for page in others:
            yield json.dumps(told(page)).encode() + b"\n"
    except RefusalError as refusal:
        yield json.dumps({"error": refusal.message}).encode() + b"\n"


def metadata_of(text: str) -> dict[str, Any]:
    """Raises RefusalError: no JSON object."""
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise RefusalError(400, "metadata: give a JSON object", "metadata")
        check_metadata(found)
    except (ValueError, RecursionError, CembedError) as error:
        raise RefusalError(400, f"metadata: {error}", "metadata") from None
    return found


class PageAbout(BaseModel):
    id: str
    source: str
    page: int
    vectors: int
    metadata: dict[str, Any] = {}
    warning: str | None = None


@router.get("/pages/{page}", response_model=PageAbout)
async def page_about(request: Request, page: Serial) -> Any:
    """What is told of a page."""
    found = service_of(request).find(page)
    return {**about(found), "vectors": found.vectors}


@router.get("/pages/{page}/thumbnail", response_class=Response, responses={200: PICTURE, 304: SAME})
async def thumbnail(request: Request, page: Serial) -> Response:
    """The picture that was kept of a page when it was added."""
    service = service_of(request)
    found = service.find(page)
    headers = {
        "Cache-Control": "private, no-cache",
        "ETag": f'"{service.require_shelf().index.identity}-{found.serial}"',
    }
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(await service.picture(found), media_type="image/jpeg", headers=headers)


class Explanation(BaseModel):
    """`heat` [rows][columns] over the page from 0 to 1, and the box x0, y0, x1, y1, in shares of the page, where it is
    hottest."""

    score: float
    heat: list[list[float]]
    hottest: list[float]


@router.get("/pages/{page}/explain", response_model=Explanation)
async def explain(
    request: Request,
    page: Serial,
    q: Annotated[str, Query(min_length=1, max_length=10_000, description="The query.")],
) -> Response:
    """Where a page matches a query."""
    service = service_of(request)
    header, arrays = await service.explain(service.find(page), q)
    heat = [[round(float(value), 4) for value in row] for row in arrays["heat"]]
    return JSONResponse({"score": header["score"], "heat": heat, "hottest": header["hottest"]})

"""Scores and orders of documents for a query: vLLM's, Jina's and Cohere's shapes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from cembed.serve.errors import RefusalError
from cembed.serve.fetching import File, Url
from cembed.serve.inputs import Given, Item, Stored, Text, part_items, picture_item, role_of, text_item
from cembed.serve.openai_api import Part, Usage, encoded
from cembed.serve.responses import CohereError, fetched, refusals, service_of
from cembed.serve.service import Service

router = APIRouter(tags=["rerank"], responses=refusals())
cohere_router = APIRouter(tags=["cohere"], responses=refusals(CohereError))

Dimension = Annotated[int, Field(ge=1, le=1 << 20)]
Top = Annotated[int, Field(ge=1)]


class Content(BaseModel):
    """A document or query of parts."""

    model_config = ConfigDict(extra="allow")
    content: str | list[Part]


Document = str | Content | Part
"""A data: URI of a page, a page of the index by its id, or parts."""


class RerankRequest(BaseModel):
    model: str | None = None
    query: Document
    documents: list[Document] = Field(min_length=1)
    top_n: Top | None = None
    return_documents: bool = True


class RerankResult(BaseModel):
    model_config = ConfigDict(extra="allow")
    index: int
    relevance_score: float


class RerankResponse(BaseModel):
    id: str
    model: str
    usage: Usage = Usage()
    results: list[RerankResult]


def query_item(given: Document, service: Service) -> Given:
    """A text is a query; a page may be one too. Raises RefusalError."""
    if isinstance(given, str):
        return picture_item(given, "query", service.fetch) if given.startswith("data:") else Text(given)
    return only(given, "query", service)


def document_item(given: Document, service: Service) -> File | Url | Stored:
    """Raises RefusalError: a text that is no page of the index."""
    if isinstance(given, str):
        is_file = given.startswith(("data:", "http:", "https:"))
        return picture_item(given, "documents", service.fetch) if is_file else Stored(given)
    item = only(given, "documents", service)
    return Stored(item.text) if isinstance(item, Text) else item


def only(given: Content | Part, param: str, service: Service) -> Given:
    content = given.content if isinstance(given, Content) else [given]
    parts = content if isinstance(content, str) else [part.model_dump(exclude_none=True) for part in content]
    items = part_items(parts, None, param, service.fetch)
    pictures = [item for item in items if not isinstance(item, Text)] or items
    if len(pictures) != 1:
        raise RefusalError(400, f"{param}: give one picture or text for each", param)
    return pictures[0]


async def ranked(request: Request, asked: RerankRequest) -> list[tuple[int, float]]:
    """Numbers of documents and their scores, the best first. Raises RefusalError."""
    service_of(request).role_of_model(asked.model)
    scores = await scores_of(request, [asked.query], asked.documents)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [(i, scores[i]) for i in order[: asked.top_n]]


@router.post("/rerank", response_model=RerankResponse)
@router.post("/v1/rerank", response_model=RerankResponse)
async def rerank(request: Request, asked: RerankRequest) -> Any:
    """Documents by MaxSim with a query, the best first. A document is a page as a data: URI, or the id of one that is
    in the index."""
    service = service_of(request)
    results = [result(asked, i, score) for i, score in await ranked(request, asked)]
    return {"id": "rerank-" + request.state.id, "model": service.name, "usage": Usage(), "results": results}


def result(asked: RerankRequest, index: int, score: float) -> dict[str, Any]:
    """With the id of a page of the index; a picture is not sent back."""
    document = asked.documents[index]
    told = asked.return_documents and isinstance(document, str) and not document.startswith("data:")
    return {"index": index, "relevance_score": score, **({"document": {"text": document}} if told else {})}


class ScoreRequest(BaseModel):
    """One query and its documents, or as many of either. vLLM calls them `text_1` and `text_2` as well."""

    model: str | None = None
    queries: Document | list[Document] | None = None
    documents: Document | list[Document] | None = None
    text_1: Document | list[Document] | None = None
    text_2: Document | list[Document] | None = None


class Score(BaseModel):
    index: int
    object: str = "score"
    score: float


class ScoreResponse(BaseModel):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Score]
    usage: Usage = Usage()


def listed(given: Any, name: str) -> list[Document]:
    if given is None or given == []:
        raise RefusalError(400, f"{name}: give at least one", name)
    return list(given) if isinstance(given, list) else [given]


@router.post("/score", response_model=ScoreResponse)
@router.post("/v1/score", response_model=ScoreResponse)
async def score(request: Request, asked: ScoreRequest) -> Any:
    """MaxSim of a query with each document, or of each query with its own."""
    service = service_of(request)
    service.role_of_model(asked.model)
    queries = listed(asked.queries if asked.queries is not None else asked.text_1, "queries")
    documents = listed(asked.documents if asked.documents is not None else asked.text_2, "documents")
    if len(queries) not in (1, len(documents)):
        raise RefusalError(
            400, f"{len(queries)} queries and {len(documents)} documents: give one query, or as many", "queries"
        )
    values = await scores_of(request, queries, documents)
    data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(values)]
    about = {"id": "score-" + request.state.id, "object": "list", "created": int(time.time())}
    return {**about, "model": service.name, "data": data, "usage": Usage()}


async def scores_of(request: Request, queries: Sequence[Document], documents: Sequence[Document]) -> list[float]:
    """MaxSim of one query with each document, or of each query with its own. Raises RefusalError."""
    service = service_of(request)
    asked = [query_item(query, service) for query in queries]
    given = [*asked, *(document_item(document, service) for document in documents)]
    items: list[Item | Stored] = await fetched(request, given)
    texts = [item for item in items[: len(asked)] if not isinstance(item, Stored)]
    pages = items[len(asked) :]
    if len(texts) == 1:
        return await service.scores(texts[0], pages)
    return [(await service.scores(text, [page]))[0] for text, page in zip(texts, pages, strict=True)]


class CohereMeta(BaseModel):
    api_version: dict[str, str] = {"version": "2"}
    billed_units: dict[str, float] = {}


class CohereRerankResponse(BaseModel):
    id: str
    results: list[RerankResult]
    meta: CohereMeta = CohereMeta()


@cohere_router.post("/v2/rerank", response_model=CohereRerankResponse)
async def cohere_rerank(request: Request, asked: RerankRequest) -> Any:
    """`/rerank` for Cohere's clients."""
    results = [{"index": i, "relevance_score": score} for i, score in await ranked(request, asked)]
    return {"id": request.state.id, "results": results, "meta": CohereMeta()}


class CohereInput(BaseModel):
    content: list[Part]


class CohereEmbedRequest(BaseModel):
    model: str | None = None
    input_type: str
    texts: list[str] | None = None
    images: list[str] | None = None
    inputs: list[CohereInput] | None = None
    embedding_types: list[str] | None = None
    output_dimension: Dimension | None = None


class CohereEmbeddings(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    float_: list[list[float]] | None = Field(None, alias="float")
    base64: list[str] | None = None


class CohereEmbedResponse(BaseModel):
    id: str
    embeddings: CohereEmbeddings
    texts: list[str] = []
    meta: CohereMeta = CohereMeta()
    response_type: str = "embeddings_by_type"


@cohere_router.post("/v2/embed", response_model=CohereEmbedResponse, response_model_exclude_none=True)
async def cohere_embed(request: Request, asked: CohereEmbedRequest) -> Any:
    """One vector for each input, of a bundle that pools; `float` and `base64` are there."""
    service = service_of(request)
    role = role_of(asked.input_type, service.role_of_model(asked.model))
    kinds = asked.embedding_types or ["float"]
    if unknown := set(kinds) - {"float", "base64"}:
        raise RefusalError(400, f"embedding_types: {', '.join(sorted(unknown))} is not there: ask for float or base64")
    items: list[Given] = [text_item(text, role) for text in asked.texts or ()]
    items += [picture_item(image, "images", service.fetch) for image in asked.images or ()]
    items += [only(Content(content=one.content), "inputs", service) for one in asked.inputs or ()]
    if not items:
        raise RefusalError(400, "give texts, images or inputs", "texts")
    if not all(service.pools(item) for item in items):
        raise RefusalError(400, "this model makes more than one vector of an input: use /v2/rerank or /pooling")
    given: list[Item] = await fetched(request, items)
    many = await service.embed_all(given, asked.output_dimension)
    made = {kind: [encoded(rows, kind, one=True)["value"] for rows in many] for kind in kinds}
    return {"id": request.state.id, "embeddings": made, "texts": asked.texts or [], "meta": CohereMeta()}

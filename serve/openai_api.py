"""OpenAI's embeddings, with the fields of Jina, NIM and vLLM, and vLLM's pooling."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cembed.runtime.bundle.vectors import Vectors
from cembed.serve.errors import RefusalError
from cembed.serve.inputs import Given, Item, Role, message_items, part_item, picture_item, role_of, text_item
from cembed.serve.responses import fetched, refusals, service_of
from cembed.serve.service import Service

TOKENS = (
    "token ids are not taken, as the model has a tokenizer of its own: send texts (langchain-openai does so with "
    "check_embedding_ctx_length=False)"
)
MANY = (
    "this model makes more than one vector of an input, which a plain client cannot take: ask with "
    "return_multivector=true (rows; in base64 beside their shape), or use /pooling or /rerank"
)
URLS = ("data:", "http:", "https:")
router = APIRouter(tags=["embeddings"], responses=refusals())

Count = Annotated[int, Field(ge=1, le=1 << 20)]


class Part(BaseModel):
    """One input: a query's text, or a page as a data: URI or base64."""

    model_config = ConfigDict(extra="allow")
    type: str | None = None
    text: str | None = None
    image: str | None = None
    image_url: str | dict[str, Any] | None = None


class Message(BaseModel):
    """What is said, as in chat."""

    role: str = "user"
    content: str | list[Part]


class EmbeddingsRequest(BaseModel):
    """`input` or `messages`. A text is a query, and a picture a page, whatever `input_type` leaves open."""

    model: str | None = None
    input: str | Part | list[str | Part] | None = None
    messages: list[Message] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    num_vectors: Count | None = None
    input_type: str | None = None
    task: str | None = None
    return_multivector: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_tokens(cls, values: Any) -> Any:
        given = values.get("input") if isinstance(values, dict) else None
        if isinstance(given, list) and given and all(isinstance(part, (int, list)) for part in given):
            raise ValueError(TOKENS)
        return values

    def items(self, service: Service) -> list[Given]:
        """Raises RefusalError: neither input nor messages, or both."""
        role = role_of(self.input_type or self.embedding_task, service.role_of_model(self.model))
        if (self.input is None) == (self.messages is None):
            raise RefusalError(400, "give either input or messages", "input")
        if self.messages is not None:
            messages = [message.model_dump(exclude_none=True) for message in self.messages]
            return message_items(messages, role, service.fetch)
        given = self.input if isinstance(self.input, list) else [self.input]
        if not given:
            raise RefusalError(400, "input: the list is empty", "input")
        return [self._item(one, role, service) for one in given]

    @property
    def embedding_task(self) -> str | None:
        """Jina's `task`; vLLM's has other words for the kind of the result."""
        return self.task if self.task and self.task.startswith("retrieval.") else None

    def _item(self, given: str | Part | None, role: Role | None, service: Service) -> Given:
        if isinstance(given, Part):
            return part_item(given.model_dump(exclude_none=True), role, "input", service.fetch)
        assert given is not None
        if given.startswith("data:image/") or (role == "document" and given.startswith(URLS)):
            return picture_item(given, "input", service.fetch)
        return text_item(given, role)


class Embedding(BaseModel):
    """A vector, or rows of them; in base64 little-endian float32 values, with the `shape` of more than one row."""

    model_config = ConfigDict(extra="allow")
    object: str = "embedding"
    index: int
    embedding: str | list[float] | list[list[float]]
    shape: list[int] | None = None


class Usage(BaseModel):
    """Inputs are pages: tokens are not counted."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class EmbeddingsResponse(BaseModel):
    object: str = "list"
    data: list[Embedding]
    model: str
    usage: Usage = Usage()


def encoded(rows: Vectors, encoding: str, one: bool) -> dict[str, Any]:
    """Rows as a reply has them; `one` row alone is a plain vector."""
    rows = np.asarray(rows, "<f4")
    if encoding == "base64":
        text = base64.b64encode(rows.tobytes()).decode()
        return {"value": text, "shape": None if one else list(rows.shape)}
    return {"value": rows[0].tolist() if one else rows.tolist(), "shape": None}


@router.post("/v1/embeddings", response_model=EmbeddingsResponse, response_model_exclude_none=True)
async def embeddings(request: Request, asked: EmbeddingsRequest) -> Any:
    """Vectors of queries and pages. Many a vector needs `return_multivector`, unless the model pools them."""
    service = service_of(request)
    items = asked.items(service)
    one = not asked.return_multivector
    if one and not all(service.pools(item, asked.num_vectors) for item in items):
        raise RefusalError(400, MANY, "return_multivector")
    given: list[Item] = await fetched(request, items)
    many = await service.embed_all(given, asked.dimensions, asked.num_vectors)
    data = []
    for index, rows in enumerate(many):
        made = encoded(rows, asked.encoding_format, one)
        data.append({"object": "embedding", "index": index, "embedding": made["value"], "shape": made["shape"]})
    return reply(service, {"data": [{k: v for k, v in row.items() if v is not None} for row in data]})


class PoolingData(BaseModel):
    model_config = ConfigDict(extra="allow")
    index: int
    object: str = "pooling"
    data: str | list[list[float]]
    shape: list[int] | None = None


class PoolingResponse(BaseModel):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[PoolingData]
    usage: Usage = Usage()


@router.post("/pooling", response_model=PoolingResponse, response_model_exclude_none=True)
async def pooling(request: Request, asked: EmbeddingsRequest) -> Any:
    """All vectors of each input, as vLLM gives them for `token_embed`."""
    service = service_of(request)
    items: list[Item] = await fetched(request, asked.items(service))
    many = await service.embed_all(items, asked.dimensions, asked.num_vectors)
    data = []
    for index, rows in enumerate(many):
        made = encoded(rows, asked.encoding_format, one=False)
        shape = {} if made["shape"] is None else {"shape": made["shape"]}
        data.append({"index": index, "object": "pooling", "data": made["value"], **shape})
    return reply(service, {"id": "pool-" + request.state.id, "created": int(time.time()), "data": data})


def reply(service: Service, more: Mapping[str, Any]) -> dict[str, Any]:
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    return {"object": "list", "model": service.name, "usage": usage, **more}


class Model(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "cembed"


class Models(BaseModel):
    object: str = "list"
    data: list[Model]


def model_of(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": 0, "owned_by": "cembed"}


@router.get("/v1/models", response_model=Models)
async def models(request: Request) -> Any:
    """The one model."""
    return {"object": "list", "data": [model_of(service_of(request))]}


@router.get("/v1/models/{name}", response_model=Model)
async def model(request: Request, name: str) -> Any:
    """The model, if that is its name."""
    service_of(request).role_of_model(name)
    return model_of(service_of(request))

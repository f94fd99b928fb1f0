"""What all routes share: the service, and how a refusal is documented."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel

from cembed.serve.fetching import Url
from cembed.serve.service import Service

T = TypeVar("T")

TEXTS = {
    400: "The request is not as it should be.",
    401: "The server's token is missing.",
    403: "Not allowed.",
    404: "There is no such thing.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is compressed.",
    421: "Another host is meant.",
    422: "The page or text cannot be embedded.",
    429: "Too many requests are waiting.",
    500: "The server failed.",
    503: "The server is not ready, or waited too long.",
    504: "It took too long.",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """As OpenAI's clients read it."""

    error: ErrorDetail


class CohereError(BaseModel):
    """As Cohere's clients read it."""

    message: str


class KServeError(BaseModel):
    """As KServe's clients read it."""

    error: str


def refusals(body: type[BaseModel] = ErrorBody) -> dict[int | str, dict[str, Any]]:
    """For FastAPI's `responses`."""
    return {status: {"model": body, "description": text} for status, text in TEXTS.items()}


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def fetched(request: Request, given: Sequence[T | Url]) -> list[T]:
    """All inputs of a request, none of which is a URL any more. Raises RefusalError."""
    return await service_of(request).fetched(given, request.state.share)

"""Bodies of requests, as far as the server's own process takes them apart: no model, no picture is decoded."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError

from cembed.serve import kserve_api, openai_api, own_api, rerank_api
from cembed.serve.errors import RefusalError
from cembed.serve.fetching import Fetcher

SERVICE: Any = SimpleNamespace(fetch=Fetcher((), 1 << 20, 1.0), role_of_model=lambda name: None)


def embeddings(given: Any) -> None:
    openai_api.EmbeddingsRequest.model_validate(given).items(SERVICE)


def rerank(given: Any) -> None:
    asked = rerank_api.RerankRequest.model_validate(given)
    rerank_api.query_item(asked.query, SERVICE)
    for document in asked.documents:
        rerank_api.document_item(document, SERVICE)


def score(given: Any) -> None:
    asked = rerank_api.ScoreRequest.model_validate(given)
    for document in rerank_api.listed(asked.documents or asked.text_2, "documents"):
        rerank_api.document_item(document, SERVICE)


def cohere(given: Any) -> None:
    rerank_api.CohereEmbedRequest.model_validate(given)


def kserve(data: bytes) -> None:
    """The header that says where the JSON ends, a line of its own, and the body."""
    header, _, body = data.partition(b"\n")
    asked, tail = kserve_api.parse(body, header.decode("latin-1") or None)
    list(kserve_api.items_of(asked, tail))


def own(data: bytes) -> None:
    own_api.item_of(data, "text/plain")
    text = data.decode()
    if text.startswith("{"):
        own_api.metadata_of(text)
    else:
        own_api.where_of(text.split("\n"))


JSON: dict[bytes, Callable[[Any], None]] = {b"e": embeddings, b"r": rerank, b"s": score, b"c": cohere}
BYTES: dict[bytes, Callable[[bytes], None]] = {b"k": kserve, b"o": own}


def body(data: bytes) -> bool:
    """The first byte says which request it is. Says whether it was taken."""
    kind, data = data[:1], data[1:]
    try:
        if kind in BYTES:
            BYTES[kind](data)
        elif kind in JSON:
            JSON[kind](parsed(data))
    except (RefusalError, ValidationError):
        return False
    return True


def parsed(data: bytes) -> Any:
    """As FastAPI does it."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise RefusalError(400, "no JSON") from None

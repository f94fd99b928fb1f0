"""From what clients send to texts and picture files: roles, data URIs, content parts."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cembed.serve.errors import RefusalError
from cembed.serve.fetching import Fetcher, File, Url

Role = Literal["query", "document"]
ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("query", "search_query", "retrieval.query"), "query"),
    **dict.fromkeys(("document", "passage", "search_document", "retrieval.passage", "image"), "document"),
}
"""`input_type` of NIM and Cohere, `task` of Jina."""
DATA_URI = re.compile(r"data:[^,]{0,200},", re.ASCII)


@dataclass(frozen=True)
class Text:
    """A query."""

    text: str


@dataclass(frozen=True)
class Stored:
    """A page of the index, by its serial or its id."""

    name: str


Item = Text | File
Given = Item | Url
"""What a request has in the place of an item; a URL is fetched when all of the request is known to be in order."""


def role_of(input_type: str | None, model_role: Role | None = None) -> Role | None:
    """Raises RefusalError: it is none that is known."""
    if input_type is None:
        return model_role
    if input_type not in ROLES:
        raise RefusalError(400, f"input_type {input_type!r} is not known: give one of {', '.join(ROLES)}", "input_type")
    return ROLES[input_type]


def text_item(text: str, role: Role | None) -> Text:
    """Raises RefusalError: a text cannot be a document."""
    if role == "document":
        raise RefusalError(400, "documents are pictures of pages: send image_url data URIs; a text is a query", "input")
    return Text(text)


def decode_base64(text: str, param: str) -> bytes:
    """Raises RefusalError: it is none."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (ValueError, binascii.Error):
        raise RefusalError(400, f"{param}: not base64", param) from None
    if not data:
        raise RefusalError(400, f"{param}: the picture is empty", param)
    return data


def picture_item(value: str, param: str, fetch: Fetcher) -> File | Url:
    """A data URI, a URL of a host that is allowed, or base64 alone. Raises RefusalError."""
    if found := DATA_URI.match(value):
        if not found[0].endswith(";base64,"):
            raise RefusalError(400, f"{param}: a data: URI must be in base64, as data:image/png;base64,…", param)
        return File(decode_base64(value[found.end() :], param))
    if value.startswith(("http:", "https:")):
        return fetch.url(value, param)
    return File(decode_base64(value, param))


def part_items(content: Any, role: Role | None, param: str, fetch: Fetcher) -> list[Given]:
    """The items of a message's `content`: a text, or parts of type text, image_url, image or input_image.

    Raises RefusalError: another type.
    """
    if isinstance(content, str):
        return [text_item(content, role)]
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise RefusalError(400, f"{param}: give a text, or a list of parts of type text or image_url", param)
    return [part_item(part, role, param, fetch) for part in content]


def part_item(part: Mapping[str, Any], role: Role | None, param: str, fetch: Fetcher) -> Given:
    """`{type: text, text}`, `{type: image_url, image_url: {url}}`, Jina's `{text}`, `{image}`. Raises RefusalError."""
    for key in ("image_url", "image", "input_image", "image_base64"):
        value = part.get(key)
        value = value.get("url") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            return picture_item(value, param, fetch)
    if isinstance(part.get("text"), str):
        return text_item(part["text"], role)
    raise RefusalError(400, f"{param}: a part has neither text nor image_url", param)


def message_items(messages: Iterable[Mapping[str, Any]], role: Role | None, fetch: Fetcher) -> list[Given]:
    """The one input of a conversation, as vLLM takes it: the picture, or else the text, of what users say.

    Raises RefusalError: there is nothing, or more than one picture.
    """
    said = [
        item
        for message in messages
        if message.get("role", "user") == "user"
        for item in part_items(message.get("content"), None, "messages", fetch)
    ]
    pictures = [item for item in said if not isinstance(item, Text)]
    texts = [item.text for item in said if isinstance(item, Text)]
    if len(pictures) > 1:
        raise RefusalError(400, "messages: more than one picture; send one request for each page", "messages")
    if not pictures and not any(texts):
        raise RefusalError(400, "messages: there is neither a text nor a picture", "messages")
    return list(pictures) or [text_item("\n".join(texts), role)]

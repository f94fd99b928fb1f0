"""From what clients send to texts and picture files: roles, data URIs, content parts."""

from __future__ import annotations

import base64
import binascii
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from cembed.serve.errors import RefusalError

Role = Literal["query", "document"]
ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("query", "search_query", "retrieval.query"), "query"),
    **dict.fromkeys(("document", "passage", "search_document", "retrieval.passage", "image"), "document"),
}
"""`input_type` of NIM and Cohere, `task` of Jina."""
DATA_URI = re.compile(r"data:[^,]{0,200},", re.ASCII)
FETCH_SECONDS = 20.0
ONLY_DATA = "send the picture itself as a data: URI; this server fetches no URLs"


@dataclass(frozen=True)
class Text:
    """A query."""

    text: str


@dataclass(frozen=True, repr=False)
class File:
    """A page: bytes of a picture or a PDF, not decoded yet."""

    data: bytes


@dataclass(frozen=True)
class Stored:
    """A page of the index, by its serial or its id."""

    name: str


Item = Text | File


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


def picture_item(value: str, param: str, fetch: Fetcher) -> File:
    """A data URI, a URL of a host that is allowed, or base64 alone. Raises RefusalError."""
    if found := DATA_URI.match(value):
        if not found[0].endswith(";base64,"):
            raise RefusalError(400, f"{param}: a data: URI must be in base64, as data:image/png;base64,…", param)
        return File(decode_base64(value[found.end() :], param))
    if value.startswith(("http:", "https:")):
        return File(fetch(value, param))
    return File(decode_base64(value, param))


@dataclass(frozen=True)
class Fetcher:
    """Fetches pictures from `hosts` and from nowhere else, not through redirects, of `limit` bytes at most."""

    hosts: tuple[str, ...]
    limit: int

    def __call__(self, url: str, param: str) -> bytes:
        """Raises RefusalError."""
        try:
            host = urlsplit(url).hostname
        except ValueError:
            host = None
        if host not in self.hosts:
            raise RefusalError(400, f"{param}: {ONLY_DATA if not self.hosts else 'this host is not allowed'}", param)
        opener = urllib.request.build_opener(NoRedirects(), urllib.request.ProxyHandler({}))
        try:
            with opener.open(url, timeout=FETCH_SECONDS) as answer:
                data: bytes = answer.read(self.limit + 1)
        except (OSError, ValueError) as error:
            what = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else "it cannot be read"
            raise RefusalError(400, f"{param}: the URL gave no picture: {what}", param) from None
        if len(data) > self.limit:
            raise RefusalError(400, f"{param}: the URL gives more than {self.limit} bytes", param)
        return data


class NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def part_items(content: Any, role: Role | None, param: str, fetch: Fetcher) -> list[Item]:
    """The items of a message's `content`: a text, or parts of type text, image_url, image or input_image.

    Raises RefusalError: another type.
    """
    if isinstance(content, str):
        return [text_item(content, role)]
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise RefusalError(400, f"{param}: give a text, or a list of parts of type text or image_url", param)
    return [part_item(part, role, param, fetch) for part in content]


def part_item(part: Mapping[str, Any], role: Role | None, param: str, fetch: Fetcher) -> Item:
    """`{type: text, text}`, `{type: image_url, image_url: {url}}`, Jina's `{text}`, `{image}`. Raises RefusalError."""
    for key in ("image_url", "image", "input_image", "image_base64"):
        value = part.get(key)
        value = value.get("url") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            return picture_item(value, param, fetch)
    if isinstance(part.get("text"), str):
        return text_item(part["text"], role)
    raise RefusalError(400, f"{param}: a part has neither text nor image_url", param)


def message_items(messages: Iterable[Mapping[str, Any]], role: Role | None, fetch: Fetcher) -> list[Item]:
    """The one input of a conversation, as vLLM takes it: the picture, or else the text, of what users say.

    Raises RefusalError: there is nothing, or more than one picture.
    """
    said = [
        item
        for message in messages
        if message.get("role", "user") == "user"
        for item in part_items(message.get("content"), None, "messages", fetch)
    ]
    pictures = [item for item in said if isinstance(item, File)]
    texts = [item.text for item in said if isinstance(item, Text)]
    if len(pictures) > 1:
        raise RefusalError(400, "messages: more than one picture; send one request for each page", "messages")
    if not pictures and not any(texts):
        raise RefusalError(400, "messages: there is neither a text nor a picture", "messages")
    return list(pictures) or [text_item("\n".join(texts), role)]

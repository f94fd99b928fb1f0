"""Refusals, in the shapes that the clients of each API read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cembed.runtime.errors import one_line

COHERE = ("/v2/embed", "/v2/rerank")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(eq=False)
class RefusalError(Exception):
    """A request is answered with `status` and `message`, one line that says what to do. `param` is the field at fault,
    `retry_after` in seconds."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def error_body(path: str, refusal: RefusalError) -> Mapping[str, Any]:
    """The JSON that clients of the API at `path` parse: Cohere's `message`, KServe's `error`, OpenAI's object."""
    message = one_line(refusal.message)
    if path in COHERE:
        return {"message": message}
    if path.startswith("/v2"):
        return {"error": message}
    kind = TYPES.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": refusal.param, "code": refusal.code}}

"""The application: routes, the door before them, the page, and uvicorn around it all."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import re
import resource
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from cembed import __version__
from cembed.runtime.errors import CembedError
from cembed.serve import kserve_api, openai_api, own_api, rerank_api
from cembed.serve.connections import end_unread, protocol
from cembed.serve.errors import RefusalError, error_body
from cembed.serve.following import follow
from cembed.serve.guard import App, Guard
from cembed.serve.notify import Notifier
from cembed.serve.responses import refusals, service_of
from cembed.serve.service import SUFFIXES, Service
from cembed.serve.settings import Settings
from cembed.serve.watched import Watched

STATIC = Path(__file__).with_name("static")
DESCRIPTION = "Embeds pages and queries with one bundle, and searches one index."
log = logging.getLogger("cembed.serve")


def create_app(service: Service, stop: Callable[[], None]) -> App:
    """The server as an ASGI application; its workers start with it, and `stop` is called if they cannot."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.ensure_future(run(service, stop))
        try:
            yield
        finally:
            running.cancel()
            await asyncio.wait([running])
            await service.close()

    app = FastAPI(
        title="cembed", version=__version__, description=DESCRIPTION, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service = service
    for routes in (openai_api, rerank_api, kserve_api, own_api):
        app.include_router(routes.router)
    app.include_router(rerank_api.cohere_router)
    add_usual_routes(app)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.openapi = lambda: document(app, service)  # type: ignore[method-assign]
    app.exception_handler(RefusalError)(refused)
    app.exception_handler(RequestValidationError)(invalid)
    app.exception_handler(HTTPException)(unknown)
    return traced(Guard(app, service))


async def run(service: Service, stop: Callable[[], None]) -> None:
    """Workers, in the background: until they are ready, /health/ready says so. Then what goes on beside requests."""
    notifier = Notifier()
    try:
        await service.pool.start()
    except CembedError as error:
        service.failure = str(error)
        stop()
        return
    log.info('{"ready": true}')
    notifier.ready()
    try:
        await asyncio.gather(keep_alive(notifier), accompany(service))
    finally:
        notifier.stopping()


async def keep_alive(notifier: Notifier) -> None:
    while True:
        notifier.alive()
        await asyncio.sleep(1.0)


async def accompany(service: Service) -> None:
    """Watches folders, or only whether there is another bundle."""
    if service.settings.watch is None:
        await follow(service)
        return
    watched = Watched(service, service.settings.watch)
    try:
        await asyncio.Event().wait()
    finally:
        await watched.end()


def traced(app: App) -> App:
    """With OpenTelemetry's spans, where its package is installed."""
    try:
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    except ImportError:
        return app
    return OpenTelemetryMiddleware(app)  # type: ignore[no-any-return]


class Alive(BaseModel):
    status: str


def add_usual_routes(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/health/live", response_model=Alive, tags=["health"])
    async def live() -> Any:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/health/ready", response_model=Alive, responses=refusals(), tags=["health"])
    async def ready(request: Request) -> Any:
        """Workers have passed the self-test."""
        kserve_api.require_ready(service_of(request))
        return {"status": "ready"}

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **refusals()}, tags=["health"])
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusalError)
    return JSONResponse(error_body(request.url.path, error), error.status, error.headers)


async def invalid(request: Request, error: Exception) -> Response:
    """The first thing that is wrong, as OpenAI's API says it: 400."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    message = str(first["msg"]).removeprefix("Value error, ")
    text = f"{'.'.join(where)}: {message}" if where else message
    return await refused(request, RefusalError(400, text[:500], where[0] if where else None))


async def unknown(request: Request, error: Exception) -> Response:
    """No such route, or another method."""
    assert isinstance(error, HTTPException)
    body = error_body(request.url.path, RefusalError(error.status_code, str(error.detail)))
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(methods_of(request)))
    return JSONResponse(body, error.status_code, headers)


def methods_of(request: Request) -> set[str]:
    """Of all routes at the request's path."""
    at = request.url.path
    return {
        method.upper()
        for path, methods in request.app.openapi()["paths"].items()
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), at)
        for method in methods
    }


def document(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI document: FastAPI's, the tensors of KServe that it does not see, and the names of the one model."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = found["components"]["schemas"]
        schemas |= kserve_api.SCHEMAS
        for schema in schemas.values():
            if (model := schema.get("properties", {}).get("model", {})).get("anyOf"):
                model["anyOf"][0]["enum"] = [service.name, *(service.name + suffix for suffix in SUFFIXES)]
        app.openapi_schema = found
    return app.openapi_schema


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or Ctrl-C, and then until what was begun is answered.

    Raises CembedError: the bundle or the index is not as it should be, workers do not start, the port is taken.
    """
    raise_file_limit()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    limits = settings.limits
    service = Service(settings)
    service.open_index()
    listening = bind(settings.host, settings.port)
    end_unread(listening, limits.body_time)
    app: Any = create_app(service, lambda: setattr(server, "should_exit", True))
    config = uvicorn.Config(
        app,
        http=protocol(service),
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(limits.header_time),
        timeout_graceful_shutdown=int(limits.drain),
        backlog=2048,
    )
    server = uvicorn.Server(config)
    settle()
    host, port = listening.getsockname()[:2]
    print(f"cembed serves {service.name} at http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr)
    server.run(sockets=[listening])
    if service.failure:
        raise CembedError(service.failure)


def settle() -> None:
    """What is there by now stays: the collector need not look at it again, for tens of milliseconds at a time."""
    gc.collect()
    gc.freeze()


def bind(host: str, port: int) -> socket.socket:
    """Raises CembedError: the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise CembedError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from None
    return listening


def raise_file_limit() -> None:
    """Connections take a file each, and many systems allow 1,024 unless asked for more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

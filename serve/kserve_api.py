"""The Open Inference Protocol (KServe V2), with Triton's binary tensors.

Inputs, either or both, each [n] of BYTES: `text`, queries; `image`, files of pages (base64 where they come as JSON).
Outputs: `vectors` FP32 [rows, dim], those of all inputs one after the other, texts first, and `rows` INT64 [n].
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cembed import __version__
from cembed.serve.errors import RefusalError
from cembed.serve.fetching import File
from cembed.serve.inputs import Item, Text, decode_base64
from cembed.serve.responses import KServeError, fetched, refusals, service_of
from cembed.serve.service import Service

HEADER = "inference-header-content-length"
router = APIRouter(prefix="/v2", tags=["kserve"], responses=refusals(KServeError))
Side = Annotated[int, Field(ge=-1, le=1 << 40)]
"""Of a shape. A product of longer numbers takes long."""
INPUTS = [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in ("text", "image")]


class Parameters(BaseModel):
    model_config = ConfigDict(extra="allow")
    binary_data_size: Annotated[int, Field(ge=0)] | None = None
    binary_data: bool = False
    binary_data_output: bool = False


class InferInput(BaseModel):
    name: str
    shape: list[Side] = Field(max_length=8)
    datatype: str
    parameters: Parameters = Parameters()
    data: list[Any] | None = None


class InferOutput(BaseModel):
    name: str
    parameters: Parameters = Parameters()


class InferRequest(BaseModel):
    id: str | None = None
    inputs: list[InferInput] = Field(min_length=1)
    outputs: list[InferOutput] = []
    parameters: Parameters = Parameters()


class Tensor(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    data: list[float] | list[int] | None = None
    parameters: dict[str, Any] | None = None


class InferResponse(BaseModel):
    model_name: str
    model_version: str = "1"
    id: str | None = None
    outputs: list[Tensor]


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class ModelReady(BaseModel):
    name: str
    ready: bool


class ServerAbout(BaseModel):
    name: str = "cembed"
    version: str = __version__
    extensions: list[str] = ["binary_tensor_data"]


class ModelAbout(BaseModel):
    model_config = ConfigDict(protected_namespaces=())
    name: str
    versions: list[str] = ["1"]
    platform: str = "cembed"
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]


@router.get("", response_model=ServerAbout)
async def server() -> Any:
    """What answers."""
    return ServerAbout()


@router.get("/health/live", response_model=Live)
async def live() -> Any:
    """The process answers."""
    return {"live": True}


@router.get("/health/ready", response_model=Ready)
async def ready(request: Request) -> Any:
    """Workers have passed the self-test."""
    require_ready(service_of(request))
    return {"ready": True}


def require_ready(service: Service) -> None:
    if not service.pool.ready:
        raise RefusalError(503, "the server is starting or stopping", retry_after=5)


@router.get("/models/{name}", response_model=ModelAbout)
@router.get("/models/{name}/versions/{version}", response_model=ModelAbout)
async def about(request: Request, name: str, version: str = "1") -> Any:
    """Inputs and outputs."""
    service = checked(request, name, version)
    outputs = [
        {"name": "vectors", "datatype": "FP32", "shape": [-1, service.dim]},
        {"name": "rows", "datatype": "INT64", "shape": [-1]},
    ]
    return {"name": service.name, "versions": ["1"], "platform": "cembed", "inputs": INPUTS, "outputs": outputs}


@router.get("/models/{name}/ready", response_model=ModelReady)
@router.get("/models/{name}/versions/{version}/ready", response_model=ModelReady)
async def model_ready(request: Request, name: str, version: str = "1") -> Any:
    """Workers have passed the self-test."""
    service = checked(request, name, version)
    require_ready(service)
    return {"name": service.name, "ready": True}


def checked(request: Request, name: str, version: str) -> Service:
    """Raises RefusalError: another model, or another version than 1."""
    service = service_of(request)
    service.role_of_model(name)
    if version != "1":
        raise RefusalError(404, f"there is no version {version[:20]!r} of the model, but 1")
    return service


SCHEMA = InferRequest.model_json_schema(ref_template="#/components/schemas/{model}")
SCHEMAS: dict[str, Any] = SCHEMA.pop("$defs")
"""What the schema of a request names; FastAPI finds those only that it reads itself."""
BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": SCHEMA}}}}


@router.post("/models/{name}/infer", response_model=InferResponse, openapi_extra=BODY)
@router.post("/models/{name}/versions/{version}/infer", response_model=InferResponse, openapi_extra=BODY)
async def infer(request: Request, name: str, version: str = "1") -> Response:
    """Vectors of `text` and `image`."""
    service = checked(request, name, version)
    asked, tail = parse(await request.body(), request.headers.get(HEADER))
    items = sorted(items_of(asked, tail), key=lambda item: isinstance(item, File))
    many = await service.embed_all(await fetched(request, items))
    arrays = {
        "vectors": np.concatenate(many).astype("<f4"),
        "rows": np.array([len(rows) for rows in many], "<i8"),
    }
    return answer(service, asked, arrays)


def parse(body: bytes, header: str | None) -> tuple[InferRequest, bytes]:
    """The JSON of a request and the bytes after it. Raises RefusalError."""
    if header is not None and not (re.fullmatch(r"[0-9]{1,12}", header) and int(header) <= len(body)):
        raise RefusalError(400, "Inference-Header-Content-Length: give the bytes of the JSON at the body's start")
    size = len(body) if header is None else int(header)
    try:
        return InferRequest.model_validate_json(body[:size]), body[size:]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RefusalError(400, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from None


def items_of(asked: InferRequest, tail: bytes) -> Iterator[Item]:
    """Raises RefusalError: other inputs than a text or image of BYTES, sizes that do not fit."""
    start = 0
    for tensor in asked.inputs:
        if tensor.name not in ("text", "image") or tensor.datatype != "BYTES":
            raise RefusalError(
                400, f"input {tensor.name[:50]!r} {tensor.datatype[:20]}: there are text and image, of BYTES"
            )
        size = tensor.parameters.binary_data_size
        if size is None:
            values = [from_json(value, tensor.name) for value in flat(tensor.data or [])]
        else:
            values = list(split_bytes(tail[start : start + size]))
            start += size
        if len(values) != math.prod(tensor.shape) or min(tensor.shape, default=0) < 0:
            raise RefusalError(400, f"input {tensor.name}: {len(values)} values, by its shape {tensor.shape} others")
        for value in values:
            yield File(value) if tensor.name == "image" else Text(as_text(value))
    if start != len(tail):
        raise RefusalError(400, f"{len(tail)} bytes of binary data, {start} are named by the inputs")


def flat(data: Sequence[Any]) -> Iterator[Any]:
    for value in data:
        if isinstance(value, list):
            yield from value
        else:
            yield value


def from_json(value: Any, name: str) -> bytes:
    if not isinstance(value, str):
        raise RefusalError(400, f"input {name}: data must be strings")
    return decode_base64(value, name) if name == "image" else value.encode("utf-8", "surrogatepass")


def as_text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise RefusalError(400, "input text: not UTF-8") from None


def split_bytes(data: bytes) -> Iterator[bytes]:
    """Elements of a BYTES tensor: each has its length before it, 4 bytes, little-endian. Raises RefusalError.

    >>> list(split_bytes(bytes([1, 0, 0, 0, 97, 0, 0, 0, 0])))
    [b'a', b'']
    """
    start = 0
    while start < len(data):
        end = start + 4 + int.from_bytes(data[start : start + 4], "little")
        if end > len(data):
            raise RefusalError(400, "binary data of BYTES ends too early")
        yield data[start + 4 : end]
        start = end


def answer(service: Service, asked: InferRequest, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Response:
    """The outputs that were asked for, as JSON or behind it. Raises RefusalError: there is no such one."""
    wanted = asked.outputs or [InferOutput(name=name) for name in arrays]
    if unknown := [output.name for output in wanted if output.name not in arrays]:
        raise RefusalError(400, f"there is no output {unknown[0][:50]!r}, but vectors and rows")
    outputs, tail = list[dict[str, Any]](), b""
    for output in wanted:
        array = arrays[output.name]
        kind = "INT64" if output.name == "rows" else "FP32"
        tensor: dict[str, Any] = {"name": output.name, "datatype": kind, "shape": list(array.shape)}
        if output.parameters.binary_data or asked.parameters.binary_data_output:
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            tail += array.tobytes()
        else:
            tensor["data"] = array.reshape(-1).tolist()
        outputs.append(tensor)
    about = {"model_name": service.name, "model_version": "1", **({"id": asked.id} if asked.id else {})}
    text = json.dumps({**about, "outputs": outputs}).encode()
    if not tail:
        return Response(text, media_type="application/json")
    headers = {"Inference-Header-Content-Length": str(len(text))}
    return Response(text + tail, media_type="application/octet-stream", headers=headers)

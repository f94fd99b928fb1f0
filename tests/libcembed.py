"""The C library: how it is built, and what cembed.h declares through ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cembed.runtime.bundle.vectors import Vectors

ROOT = Path(__file__).resolve().parents[1]
HEADERS = ("onnxruntime_c_api.h", "nlohmann/json.hpp", "openssl/evp.h", "zlib.h")
FOLDERS = ("", "include", "include/onnxruntime", "usr/include/onnxruntime", "include/onnxruntime/core/session")
SAMPLE_HEADERS = ("boost/beast/version.hpp", "png.h", "turbojpeg.h")
ABI_VERSION = 2
OK, ARGUMENT, BUNDLE, ENGINE, INDEX, MEMORY, CAPACITY = range(7)


def missing(headers: Sequence[str] = HEADERS) -> str | None:
    """What a build lacks here, in words."""
    if tools := [tool for tool in ("cmake", "c++", "cc") if shutil.which(tool) is None]:
        return f"no {', '.join(tools)}"
    root = Path(os.environ.get("ONNXRUNTIME_ROOT", "/usr"))
    places = [f"-I{root / folder}" for folder in FOLDERS]
    for header in headers:
        command = ["c++", "-x", "c++", "-E", *places, "-include", header, os.devnull]
        if subprocess.run(command, capture_output=True).returncode:
            return f"no {header}; ONNXRUNTIME_ROOT is {os.environ.get('ONNXRUNTIME_ROOT', 'not set')}"
    return None


def run(*command: str | Path, **variables: str) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env={**os.environ, **variables})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build() -> Path:
    """The folder with the library, and the samples where their headers are."""
    folder, samples = ROOT / "build" / "lib", "OFF" if missing(SAMPLE_HEADERS) else "ON"
    options = f"-DONNXRUNTIME_ROOT={os.environ.get('ONNXRUNTIME_ROOT', '')}", f"-DCEMBED_BUILD_SAMPLES={samples}"
    run("cmake", "-S", ROOT / "runtime" / "native", "-B", folder, *options)
    run("cmake", "--build", folder, "--parallel", "2")
    return folder


class Options(ctypes.Structure):
    _fields_ = (
        ("abi_version", ctypes.c_uint32),
        ("threads", ctypes.c_int32),
        ("provider", ctypes.c_char_p),
        ("onnxruntime", ctypes.c_char_p),
        ("max_visual_tokens", ctypes.c_int32),
        ("skip_blank", ctypes.c_int32),
        ("mapped_weights", ctypes.c_int32),
        ("state_memory", ctypes.c_uint64),
    )


class Info(ctypes.Structure):
    _fields_ = (
        ("hash", ctypes.c_char_p),
        ("backbone", ctypes.c_char_p),
        ("document_vectors", ctypes.c_int32),
        ("document_dim", ctypes.c_int32),
        ("query_vectors", ctypes.c_int32),
        ("query_dim", ctypes.c_int32),
        ("max_visual_tokens", ctypes.c_int32),
    )


class RgbImage(ctypes.Structure):
    _fields_ = (
        ("pixels", ctypes.c_void_p),
        ("width", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("stride", ctypes.c_int64),
    )


class Budget(ctypes.Structure):
    _fields_ = (("num_vectors", ctypes.c_int32), ("dim", ctypes.c_int32), ("loop", ctypes.c_int32))


class VectorBuffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("capacity", ctypes.c_size_t),
        ("rows", ctypes.c_size_t),
        ("dim", ctypes.c_size_t),
        ("owned", ctypes.c_int32),
    )


class Hit(ctypes.Structure):
    _fields_ = (
        ("score", ctypes.c_float),
        ("page", ctypes.c_int32),
        ("id", ctypes.c_char_p),
        ("source", ctypes.c_char_p),
        ("metadata", ctypes.c_char_p),
    )


class Hits(ctypes.Structure):
    _fields_ = (("hits", ctypes.POINTER(Hit)), ("count", ctypes.c_size_t), ("owner", ctypes.c_void_p))


class Filter(ctypes.Structure):
    _fields_ = (("where", ctypes.c_char_p), ("source", ctypes.c_char_p))


class IndexInfo(ctypes.Structure):
    _fields_ = (("bundle", ctypes.c_char_p), ("pages", ctypes.c_int64), ("dim", ctypes.c_int32))


def text(raw: bytes) -> str:
    """As an index keeps it, half of a surrogate pair included."""
    return raw.decode("utf-8", "surrogatepass")


class CallError(Exception):
    """A status other than OK, and the library's message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


class Library:
    """The library, and the ONNX Runtime that bundles are opened with."""

    def __init__(self, path: Path, onnxruntime: Path) -> None:
        self.dll, self.onnxruntime = ctypes.CDLL(str(path)), onnxruntime
        for name in ("cembed_error", "cembed_version", "cembed_kernels"):
            getattr(self.dll, name).restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Raises CallError."""
        if status := getattr(self.dll, name)(*arguments):
            raise CallError(status, self.dll.cembed_error().decode())

    def options(self, **changed: Any) -> Options:
        fields = {"abi_version": ABI_VERSION, "onnxruntime": str(self.onnxruntime).encode()}
        return Options(**{**fields, **changed})

    def open(self, path: Path, trusted: Path | None = None, **options: Any) -> Bundle:
        return Bundle(self, path, self.options(**options), trusted)

    def vectors(self, fill: Callable[[Any], None]) -> Vectors:
        """Vectors that the library allocates, copied."""
        buffer = VectorBuffer()
        fill(ctypes.byref(buffer))
        try:
            shape = (buffer.rows, buffer.dim)
            return np.ctypeslib.as_array(buffer.data, shape).copy() if buffer.rows else np.empty(shape, np.float32)
        finally:
            self.dll.cembed_vectors_free(ctypes.byref(buffer))

    def maxsim(self, query: Vectors, pages: Sequence[Vectors]) -> NDArray[np.float32]:
        rows, scores = np.array([len(page) for page in pages], np.int32), np.empty(len(pages), np.float32)
        flat = np.concatenate(pages) if pages else np.empty((0, query.shape[1]), np.float32)
        places = [ctypes.c_void_p(array.ctypes.data) for array in (query, flat, rows, scores)]
        self.call("cembed_maxsim", places[0], *query.shape, *places[1:3], ctypes.c_size_t(len(pages)), 0, places[3])
        return scores


def rgb(image: Image.Image | NDArray[np.uint8]) -> tuple[RgbImage, Any]:
    """An image for the library, and what must live as long."""
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    return RgbImage(pixels.ctypes.data, pixels.shape[1], pixels.shape[0], pixels.strides[0]), pixels


def budget(chosen: dict[str, int]) -> Any:
    return ctypes.byref(Budget(**chosen)) if chosen else None


class Bundle:
    def __init__(self, library: Library, path: Path, options: Options, trusted: Path | None = None) -> None:
        self.library, self.handle = library, ctypes.c_void_p()
        name = "cembed_open" if trusted is None else "cembed_open_trusted"
        keys = [] if trusted is None else [str(trusted).encode()]
        library.call(name, str(path).encode(), *keys, ctypes.byref(options), ctypes.byref(self.handle))

    def close(self) -> None:
        self.library.dll.cembed_close(self.handle)
        self.handle = ctypes.c_void_p()

    @property
    def info(self) -> Info:
        info = Info()
        self.library.call("cembed_get_info", self.handle, ctypes.byref(info))
        return info

    def embed_image(self, image: Image.Image | NDArray[np.uint8], **chosen: int) -> Vectors:
        struct, _pixels = rgb(image)
        arguments = self.handle, ctypes.byref(struct), budget(chosen)
        return self.library.vectors(lambda to: self.library.call("cembed_embed_image", *arguments, to))

    def embed_query(self, text: str | bytes, **chosen: int) -> Vectors:
        raw = text.encode() if isinstance(text, str) else text
        arguments = self.handle, raw, ctypes.c_size_t(len(raw)), budget(chosen)
        return self.library.vectors(lambda to: self.library.call("cembed_embed_query", *arguments, to))

    def start(self, item: Image.Image | str, max_vectors: int = 0) -> State:
        handle = ctypes.c_void_p()
        if isinstance(item, str):
            raw = item.encode()
            call: tuple[Any, ...] = "cembed_start_query", self.handle, raw, ctypes.c_size_t(len(raw))
            self.library.call(*call, max_vectors, ctypes.byref(handle))
        else:
            struct, _pixels = rgb(item)
            call = "cembed_start_image", self.handle, ctypes.byref(struct)
            self.library.call(*call, max_vectors, ctypes.byref(handle))
        return State(self.library, handle)


class State:
    def __init__(self, library: Library, handle: ctypes.c_void_p) -> None:
        self.library, self.handle = library, handle

    def extend(self, num_vectors: int) -> Vectors:
        return self.library.vectors(lambda to: self.library.call("cembed_extend", self.handle, num_vectors, to))

    def close(self) -> None:
        self.library.dll.cembed_state_close(self.handle)


class Index:
    def __init__(self, library: Library, path: Path) -> None:
        self.library, self.handle = library, ctypes.c_void_p()
        library.call("cembed_index_open", ABI_VERSION, str(path).encode(), ctypes.byref(self.handle))

    @property
    def info(self) -> IndexInfo:
        info = IndexInfo()
        self.library.call("cembed_index_get_info", self.handle, ctypes.byref(info))
        return info

    def search(
        self, query: Vectors, top: int = 10, where: str | bytes | None = None, source: str | bytes | None = None
    ) -> list[tuple[str, float, str, int, str]]:
        """Id, score, source, page and metadata of the best pages."""
        hits, name, filters = Hits(), "cembed_index_search", list[Any]()
        if where is not None or source is not None:
            name += "_filtered"
            filters = [ctypes.byref(Filter(*(t.encode() if isinstance(t, str) else t for t in (where, source))))]
        arguments = self.handle, ctypes.c_void_p(query.ctypes.data), *query.shape, top, 2
        self.library.call(name, *arguments, *filters, ctypes.byref(hits))
        try:
            found = [hits.hits[i] for i in range(hits.count)]
            return [(text(h.id), h.score, text(h.source), h.page, text(h.metadata)) for h in found]
        finally:
            self.library.dll.cembed_hits_free(ctypes.byref(hits))

    def close(self) -> None:
        self.library.dll.cembed_index_close(self.handle)

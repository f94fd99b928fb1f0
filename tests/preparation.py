"""libcembed's tokenizer, image processing and positions, by ctypes: tests/native/preparation.cpp."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray

from cembed.runtime.bundle.image_processing import ImageProcessing

pillows_pixels = pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13, reason="the C library makes the pixels of Pillow 13"
)
TESTS = Path(__file__).parent
LIBRARY = TESTS.parent / "runtime" / "native" / "lib"
PARTS = ("blank", "bpe", "image", "matcher", "positions", "prompts", "tokenizer", "unicode", "words")
COMPILE = ["-std=c++17", "-O2", "-ffp-contract=off", "-pthread", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
Array = NDArray[Any]
Ints = NDArray[np.int64]


class RefusedError(Exception):
    """An error of the library: its code and message."""


def missing() -> str | None:
    """What is not there to compile the library with."""
    if shutil.which("g++") is None:
        return "there is no g++"
    probe = ["g++", "-fsyntax-only", "-x", "c++", "-"]
    found = subprocess.run(probe, input=b"#include <nlohmann/json.hpp>\n", capture_output=True)
    return "nlohmann/json.hpp is missing (nlohmann-json3-dev)" if found.returncode else None


def compile_library(out: Path) -> None:
    sources = [str(TESTS / "native" / "preparation.cpp"), *(str(LIBRARY / f"{part}.cpp") for part in PARTS)]
    subprocess.run(["g++", *COMPILE, *sources, "-o", str(out)], check=True)


class Library:
    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.cembed_tokenizer.restype = ctypes.c_void_p

    def call(self, name: str, dtype: type, *arguments: int | bytes | Array | ctypes.c_void_p | None) -> Array:
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64
        size = function(*map(_pointer, arguments))
        if size < 0:
            raise RefusedError(-size, self._copy(self._library.cembed_message()).tobytes().decode())
        return self._copy(size).view(dtype)

    def _copy(self, size: int) -> NDArray[np.uint8]:
        out = np.empty(size, np.uint8)
        self._library.cembed_copy(_pointer(out))
        return out

    def tokenizer(self, json: str | bytes) -> Encoder:
        data = json if isinstance(json, bytes) else json.encode()
        handle = self._library.cembed_tokenizer(data, ctypes.c_int64(len(data)))
        if not handle:
            raise RefusedError(2, self._copy(self._library.cembed_message()).tobytes().decode())
        return Encoder(self, ctypes.c_void_p(handle))

    def close(self, handle: ctypes.c_void_p) -> None:
        self._library.cembed_close(handle)

    def resize(self, image: Array, height: int, width: int, lanczos: bool = False) -> Array:
        values = self.call("cembed_resize", np.uint8, *_image(image), width, height, int(lanczos))
        return values.reshape(height, width, 3)

    def page_prompt(self, prompt: str, spec: ImageProcessing, grid: tuple[int, int]) -> str:
        return self.call("cembed_page_prompt", np.uint8, prompt.encode(), *grid, *processing(spec)).tobytes().decode()

    def preprocess(self, image: Array, spec: ImageProcessing) -> tuple[Array, tuple[int, int]]:
        grid = np.empty(2, np.int64)
        values = self.call("cembed_preprocess", np.float32, *_image(image), *processing(spec), grid)
        return values.reshape(-1, 3 * spec.patch_size**2), (int(grid[0]), int(grid[1]))


class Encoder:
    def __init__(self, library: Library, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle

    def __del__(self) -> None:
        self._library.close(self._handle)

    def ids(self, text: str | bytes) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode()
        found: list[int] = self._library.call("cembed_encode", np.int64, self._handle, data, len(data)).tolist()
        return found

    def document(self, image: int, prompt: str, tokens: int) -> Ints:
        return self._library.call("cembed_document", np.int64, self._handle, image, prompt.encode(), tokens)

    def query(self, image: int, prompt: str, text: str) -> Ints:
        data = text.encode()
        return self._library.call("cembed_query", np.int64, self._handle, image, prompt.encode(), data, len(data))


def _pointer(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.ctypes.data_as(ctypes.c_void_p)
    return ctypes.c_int64(value) if isinstance(value, int) else value


def _image(image: Array) -> Sequence[Any]:
    """Data, width, height, stride: rows may be apart."""
    assert image.strides[1:] == (3, 1), f"{image.strides = }"
    return image, image.shape[1], image.shape[0], image.strides[0]


RESIZE = ("smart", "fixed", "tiles")
MARKERS = {"tile": "[{row}.{column}{image}]", "row_end": "/", "page": "~{image}", "alone": "={image}"}
"""Those of the tiles that preparation.cpp makes."""


def processing(spec: ImageProcessing) -> tuple[Ints, NDArray[np.float64]]:
    sizes = [RESIZE.index(spec.resize), spec.patch_size, spec.merge_size, spec.min_pixels, spec.max_pixels]
    tiles = (spec.tiles.side, spec.tiles.longest_edge) if spec.tiles else (0, 0)
    levels = np.array([spec.rescale_factor, *spec.mean, *spec.std])
    return np.array([*sizes, spec.window_size, *tiles, spec.skip_blank], np.int64), levels

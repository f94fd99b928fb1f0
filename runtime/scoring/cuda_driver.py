"""The few calls of CUDA's driver that kernels need: memory, modules, launches. By ctypes: no package, no torch.

Everything runs in the default stream of the first device's primary context, which is torch's too: it is in order with
what torch does there.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.errors import CembedError

_DRIVERS = ("libcuda.so.1", "nvcuda.dll")
_OLDEST = 12  # CUDA's major version
_MAJOR, _MINOR, _PROCESSORS, _SHARED_OF_PROCESSOR, _SHARED_OF_BLOCK = 75, 76, 16, 81, 97  # CUdevice_attribute
_SHARED_OF_KERNEL, _CARVEOUT = 8, 9  # CUfunction_attribute
_ADDRESS = c_uint64
_SIGNATURES: Mapping[str, Sequence[Any]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuOccupancyMaxActiveBlocksPerMultiprocessor": (POINTER(c_int), c_void_p, c_int, c_size_t),
    "cuMemAlloc_v2": (POINTER(_ADDRESS), c_size_t),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemcpyHtoD_v2": (_ADDRESS, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, _ADDRESS, c_size_t),
    "cuMemsetD8_v2": (_ADDRESS, ctypes.c_ubyte, c_size_t),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}


@dataclass(frozen=True)
class DeviceLimits:
    """What launches are planned with."""

    name: str
    cuda: int  # major version of what the driver runs
    architecture: int  # 90 is sm_90
    processors: int
    shared_of_block: int  # bytes
    shared_of_processor: int


class Driver:
    """The first device. Raises CembedError: no driver, no device, or what a call says."""

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self._library = _load(_DRIVERS, "a GPU needs NVIDIA's driver") if library is None else library
        for name, arguments in _SIGNATURES.items():
            getattr(self._library, name).argtypes = arguments
        device, self._context = c_int(), c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), device)
        self.limits = self._limits(device)

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            text = c_char_p()
            self._library.cuGetErrorString(status, byref(text))
            raise CembedError(f"the GPU cannot do {name}: {(text.value or b'unknown error').decode()}")

    def _do(self, name: str, *arguments: Any) -> None:
        """A call that belongs to the context, from whatever thread."""
        self._call("cuCtxSetCurrent", self._context)
        self._call(name, *arguments)

    def _limits(self, device: c_int) -> DeviceLimits:
        name, version, found = ctypes.create_string_buffer(256), c_int(), dict[int, int]()
        self._call("cuDeviceGetName", name, len(name), device)
        self._call("cuDriverGetVersion", byref(version))
        for attribute in (_MAJOR, _MINOR, _PROCESSORS, _SHARED_OF_BLOCK, _SHARED_OF_PROCESSOR):
            value = c_int()
            self._call("cuDeviceGetAttribute", byref(value), attribute, device)
            found[attribute] = value.value
        architecture = 10 * found[_MAJOR] + found[_MINOR]
        rest = (found[key] for key in (_PROCESSORS, _SHARED_OF_BLOCK, _SHARED_OF_PROCESSOR))
        return DeviceLimits(name.value.decode(), version.value // 1000, architecture, *rest)

    def allocate(self, nbytes: int) -> DeviceMemory:
        address = _ADDRESS()
        self._do("cuMemAlloc_v2", byref(address), max(nbytes, 16))
        return DeviceMemory(self, address.value, nbytes)

    def upload(self, array: NDArray[Any]) -> DeviceMemory:
        memory = self.allocate(array.nbytes)
        memory.write(array)
        return memory

    def load(self, image: bytes) -> Module:
        module = c_void_p()
        self._do("cuModuleLoadData", byref(module), image)
        return Module(self, module)


class DeviceMemory:
    """Memory of the device, given back when it is closed or dropped."""

    def __init__(self, driver: Driver, address: int, nbytes: int) -> None:
        self._driver, self.address, self.nbytes = driver, address, nbytes
        self.close = weakref.finalize(self, driver._do, "cuMemFree_v2", address)
        self.close.atexit = False  # the context may be gone by then

    def write(self, array: NDArray[Any]) -> None:
        array = np.ascontiguousarray(array)
        assert array.nbytes <= self.nbytes, f"{array.nbytes = }, {self.nbytes = }"
        if array.nbytes:
            self._driver._do("cuMemcpyHtoD_v2", self.address, array.ctypes.data, array.nbytes)

    def read(self, count: int, kind: Any) -> NDArray[Any]:
        """The first `count` numbers, after all that was launched before."""
        array = np.empty(count, kind)
        assert array.nbytes <= self.nbytes, f"{array.nbytes = }, {self.nbytes = }"
        if count:
            self._driver._do("cuMemcpyDtoH_v2", array.ctypes.data, self.address, array.nbytes)
        return array

    def clear(self) -> None:
        self._driver._do("cuMemsetD8_v2", self.address, 0, self.nbytes)


class Module:
    """Kernels by name."""

    def __init__(self, driver: Driver, handle: c_void_p) -> None:
        self._driver, self._handle = driver, handle

    def _kernel(self, name: str) -> c_void_p:
        kernel = c_void_p()
        self._driver._do("cuModuleGetFunction", byref(kernel), self._handle, name.encode())
        return kernel

    def resident(self, name: str, block: int, shared: int, side_by_side: int) -> int:
        """Blocks with `shared` bytes that run at once: up to `side_by_side` of them on a processor, the rest of whose
        memory stays a cache."""
        kernel, found, limits = self._kernel(name), c_int(), self._driver.limits
        share = -(
            -100 * side_by_side * (shared + 1024) // limits.shared_of_processor
        )  # 1 KiB of a block is the system's
        self._driver._do("cuFuncSetAttribute", kernel, _SHARED_OF_KERNEL, shared)
        self._driver._do("cuFuncSetAttribute", kernel, _CARVEOUT, min(100, share))
        self._driver._do("cuOccupancyMaxActiveBlocksPerMultiprocessor", byref(found), kernel, block, shared)
        return max(1, found.value) * limits.processors

    def launch(self, name: str, grid: int, block: int, shared: int, *arguments: Any) -> None:
        """Arguments are of ctypes, and as the kernel declares them."""
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        sizes = (grid, 1, 1, block, 1, 1, shared)
        self._driver._do("cuLaunchKernel", self._kernel(name), *sizes, None, pointers, None)


# NVRTC ---------------------------------------------------------------------------------------------------------------


def compile_kernels(source: str, headers: Mapping[str, str], architecture: int, cuda: int) -> bytes:
    """CUDA C++ as a cubin, by an NVRTC that is not newer than the driver's CUDA. Raises CembedError: no NVRTC, or what
    it says."""
    nvrtc = _load(_compilers(cuda), f"kernels need NVRTC of CUDA {cuda}: install cembed's extra 'gpu', or CUDA")
    program = c_void_p()
    texts = (c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    names = (c_char_p * len(headers))(*(name.encode() for name in headers))
    _said(nvrtc, nvrtc.nvrtcCreateProgram(byref(program), source.encode(), None, len(headers), texts, names))
    try:
        options = (c_char_p * 2)(b"-std=c++17", f"-arch=sm_{architecture}".encode())
        if nvrtc.nvrtcCompileProgram(program, len(options), options):
            raise CembedError(f"NVRTC has no kernels for sm_{architecture}: {_log(nvrtc, program)}")
        return _text(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


def _log(nvrtc: ctypes.CDLL, program: c_void_p) -> str:
    lines = _text(nvrtc, program, "ProgramLog").rstrip(b"\0").decode().splitlines()
    return lines[0] if lines else "it does not know it"


def _text(nvrtc: ctypes.CDLL, program: c_void_p, what: str) -> bytes:
    size = c_size_t()
    _said(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _said(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.raw


def _said(nvrtc: ctypes.CDLL, status: int) -> None:
    nvrtc.nvrtcGetErrorString.restype = c_char_p
    if status:
        raise CembedError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")


def _compilers(cuda: int) -> list[str]:
    """By name, then where pip and CUDA put it."""
    packages = [Path(folder) / "nvidia" for folder in sys.path]
    folders = [f for package in packages for f in (package / f"cu{cuda}" / "lib", package / "cuda_nvrtc" / "lib")]
    folders.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "lib64")
    names = [f"libnvrtc.so.{version}" for version in range(cuda, _OLDEST - 1, -1)]
    return [*names, *(str(path) for f in folders for name in names if (path := f / name).exists())]


def _load(names: Sequence[str], otherwise: str) -> ctypes.CDLL:
    for name in names:
        with suppress(OSError):
            return ctypes.CDLL(name)
    raise CembedError(otherwise)

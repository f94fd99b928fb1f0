"""The processor of this machine, as Linux describes it."""

from __future__ import annotations

import platform
from pathlib import Path

_BYTE_PRODUCTS = {"avx512_vnni", "avx_vnni"}


def name() -> str:
    """What its maker calls it; elsewhere than on Linux its architecture."""
    return _described("model name") or platform.machine()


def adds_bytes_in_16_bits() -> bool:
    """Whether two products of bytes are added in 16 bits, so that ONNX Runtime's integers by row have activations of
    seven bits (`quantize.rows`): x86 without VNNI, where Linux says so."""
    flags = set(_described("flags").split())
    return bool(flags) and not flags & _BYTE_PRODUCTS


def _described(what: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == what), "")

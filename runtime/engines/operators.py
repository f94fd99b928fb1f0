"""cembed's own operators in ONNX Runtime's sessions: attention in bfloat16 (native/operators.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.manifest import Manifest
from cembed.runtime.compiled import compiled_library
from cembed.runtime.engines.session import EngineSettings, OrtSession, opened_while_hashed
from cembed.runtime.errors import CembedError

BF16 = "onnxruntime-bf16"
SINCE_OPSET = 24  # of the graphs whose attention is one node


def bf16_sessions(bundle: Bundle, settings: EngineSettings) -> Callable[[str], OrtSession]:
    """Sessions of ONNX Runtime on the CPU whose attention without a mask is multiplied in bfloat16.

    Raises CembedError: the processor does not multiply it, the library was not built, the bundle has no such attention.
    """
    check_bundle(bundle.manifest)
    library = operators()
    chosen = replace(settings, providers=EngineSettings().providers)
    return lambda name: opened_while_hashed(bundle, name, chosen, library)


def check_bundle(manifest: Manifest) -> None:
    """Raises CembedError for a bundle whose attention is written otherwise, or computed in half floats."""
    if manifest.target != "onnxruntime" or manifest.opset < SINCE_OPSET:
        raise CembedError(f"{BF16} runs bundles of --target onnxruntime; this one's attention is in basic operators")
    if manifest.dtype == "fp16":
        raise CembedError(f"{BF16} is for bundles that compute in float32; this one does in fp16")


def operators() -> Path:
    """The library that a session registers. Raises CembedError: it is not there, or has nothing for this processor."""
    path = compiled_library(__file__, "liboperators")
    if path is None:
        raise CembedError(f"{BF16} needs a library that was not built: install cembed where a C++ compiler is")
    try:
        able = ctypes.CDLL(str(path)).multiplies_bfloat16()
    except (OSError, AttributeError) as error:
        raise CembedError(f"{BF16} needs a library that cannot be loaded: {error}") from error
    if not able:
        raise CembedError(f"this processor has no bfloat16 arithmetic (AVX-512 BF16), which {BF16} multiplies in")
    return path

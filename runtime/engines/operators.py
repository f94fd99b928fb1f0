"""cembed's operators in ONNX Runtime's sessions (native/operators.cpp): bfloat16 attention, exact sums of bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.manifest import Manifest
from cembed.runtime.compiled import compiled_library
from cembed.runtime.engines import processor
from cembed.runtime.engines.session import CPU, EngineSettings, OrtSession, opened_while_hashed
from cembed.runtime.errors import CembedError

BF16, EXACT = "onnxruntime-bf16", "onnxruntime-exact"
SINCE_OPSET = 24  # of the graphs whose attention is one node


def bf16_sessions(bundle: Bundle, settings: EngineSettings) -> Callable[[str], OrtSession]:
    """Sessions of ONNX Runtime on the CPU whose attention without a mask is multiplied in bfloat16.

    Raises CembedError: the processor does not multiply it, the library was not built, the bundle has no such attention.
    """
    check_bundle(bundle.manifest)
    return _sessions(bundle, settings, dict.fromkeys(bundle.manifest.graphs, operators()))


def exact_sessions(bundle: Bundle, settings: EngineSettings) -> Callable[[str], OrtSession]:
    """Sessions of ONNX Runtime on the CPU whose products by row have activations of eight bits on every processor.

    Raises CembedError: the processor adds products of bytes in 16 bits, and there is no library for it.
    """
    library = byte_products()
    if library is None and processor.adds_bytes_in_16_bits():
        raise CembedError(f"{EXACT} needs a library that was not built, or that has nothing for this processor")
    found = bundle.manifest.quantisation  # other graphs may be without the operators' domain, and then fail to load
    own = {name: library for name in bundle.manifest.graphs if found is not None and found.by_row(name)}
    return _sessions(bundle, settings, own)


def _sessions(
    bundle: Bundle, settings: EngineSettings, libraries: Mapping[str, Path | None]
) -> Callable[[str], OrtSession]:
    chosen = replace(settings, providers=CPU)
    return lambda name: opened_while_hashed(bundle, name, chosen, libraries.get(name))


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


def byte_products() -> Path | None:
    """The library that adds products of bytes exactly, where ONNX Runtime adds them in 16 bits and it was built for the
    processor: x86 with AVX2, without AVX-512 and VNNI."""
    path = compiled_library(__file__, "liboperators")
    try:
        return path if path and ctypes.CDLL(str(path)).multiplies_bytes() else None
    except (OSError, AttributeError):
        return None


def same_everywhere() -> tuple[str, ...]:
    """The provider whose digits are those of other processors, as far as there is one here: for what bundles state."""
    return (EXACT,) if byte_products() else CPU

"""The device side: numpy, ONNX Runtime, and nothing of torch.

from cembed.runtime import Embedder, maxsim
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cembed.runtime.bundle import Bundle
    from cembed.runtime.embedder import Embedder
    from cembed.runtime.errors import CembedError
    from cembed.runtime.index import Index
    from cembed.runtime.new_pages import NewPage
    from cembed.runtime.scoring import maxsim
    from cembed.runtime.vectors import VectorFile

_MODULES = {
    "Bundle": "bundle",
    "CembedError": "errors",
    "Embedder": "embedder",
    "Index": "index",
    "NewPage": "new_pages",
    "VectorFile": "vectors",
    "maxsim": "scoring",
}

__all__ = ["Bundle", "CembedError", "Embedder", "Index", "NewPage", "VectorFile", "maxsim"]


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that the page reader's worker does not load an engine."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

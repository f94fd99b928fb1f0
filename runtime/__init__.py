"""The device side: numpy, ONNX Runtime, and nothing of torch.

from cembed.runtime import Embedder, embed_documents, maxsim
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cembed.runtime.bundle.bundle import Bundle
    from cembed.runtime.bundle.vectors import VectorFile
    from cembed.runtime.embed.embedder import Budget, Embedder
    from cembed.runtime.embed.explain import Explanation
    from cembed.runtime.errors import CembedError
    from cembed.runtime.index.index import Index
    from cembed.runtime.index.new_pages import NewPage
    from cembed.runtime.index.shards import Shards
    from cembed.runtime.page_vectors import EmbeddedPage, embed_documents, embed_pages
    from cembed.runtime.pages.documents import Page, PageError, PageReader, find_documents
    from cembed.runtime.scoring.maxsim import maxsim
    from cembed.runtime.updates.deploy import deploy, rollback
    from cembed.runtime.updates.versions import current_hash

_MODULES = {
    "Budget": "embed.embedder",
    "Bundle": "bundle.bundle",
    "CembedError": "errors",
    "EmbeddedPage": "page_vectors",
    "Embedder": "embed.embedder",
    "Explanation": "embed.explain",
    "Index": "index.index",
    "NewPage": "index.new_pages",
    "Page": "pages.documents",
    "PageError": "pages.documents",
    "PageReader": "pages.documents",
    "Shards": "index.shards",
    "VectorFile": "bundle.vectors",
    "current_hash": "updates.versions",
    "deploy": "updates.deploy",
    "embed_documents": "page_vectors",
    "embed_pages": "page_vectors",
    "find_documents": "pages.documents",
    "maxsim": "scoring.maxsim",
    "rollback": "updates.deploy",
}

__all__ = [
    "Budget",
    "Bundle",
    "CembedError",
    "EmbeddedPage",
    "Embedder",
    "Explanation",
    "Index",
    "NewPage",
    "Page",
    "PageError",
    "PageReader",
    "Shards",
    "VectorFile",
    "current_hash",
    "deploy",
    "embed_documents",
    "embed_pages",
    "find_documents",
    "maxsim",
    "rollback",
]


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that the page reader's worker does not load an engine."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

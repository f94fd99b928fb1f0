"""From the providers that were asked for to the sessions of a bundle's graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

from cembed.runtime.bundle import Bundle
from cembed.runtime.errors import CembedError
from cembed.runtime.session import EngineSettings, OrtSession, Session, check_providers

TENSORRT = "tensorrt"
"""Engines that `cembed build-engine` made. Every other provider is one of ONNX Runtime's."""


def open_sessions(bundle: Bundle, settings: EngineSettings) -> Callable[[str], Session]:
    """What gives the session of a graph by its name.

    Raises CembedError if TensorRT was asked for and cannot be had; if another provider was named after it, that is a
    RuntimeWarning, and the other one is taken.
    """
    others = tuple(name for name in settings.providers if name != TENSORRT)
    check_providers(others)
    if settings.providers[0] == TENSORRT:
        try:
            return tensorrt_sessions(bundle)
        except CembedError as error:
            if not others:
                raise
            warnings.warn(f"{error}; going on with {others[0]}", RuntimeWarning, stacklevel=4)
    chosen = replace(settings, providers=others)
    return lambda name: OrtSession(bundle.graph_path(name), chosen)


def tensorrt_sessions(bundle: Bundle) -> Callable[[str], Session]:
    """Sessions of the engines beside the bundle; all engines it cannot do without must be there."""
    from cembed.runtime.cuda import Cuda
    from cembed.runtime.engines import EngineCache, Library, needed_graphs
    from cembed.runtime.trt_session import Device, TrtSession

    library = Library.load()
    library.check(bundle.manifest)
    cuda = Cuda()
    cache, device = EngineCache(bundle, library, cuda.gpu()), Device(library.trt, cuda)
    for name in needed_graphs(bundle.manifest, loop=False):
        cache.require(name)
    causal = bundle.manifest.prompt_attention == "causal"

    def session(name: str) -> Session:
        engine = device.load(cache.read(name), name)
        return TrtSession(device, engine, bundle.manifest.graphs[name], name, causal and name == "text")

    return session

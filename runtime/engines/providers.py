"""From the providers that were asked for to the sessions of a bundle's graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.engines.openvino import PRECISIONS, openvino_sessions
from cembed.runtime.engines.session import EngineSettings, OrtSession, Session, check_providers
from cembed.runtime.errors import CembedError


def open_sessions(bundle: Bundle, settings: EngineSettings) -> Callable[[str], Session]:
    """What gives the session of a graph by its name.

    Raises CembedError if an engine of `ENGINES` was asked for and cannot be had; if another provider was named after
    it, that is a RuntimeWarning, and the other one is taken.
    """
    first, *rest = settings.providers
    others = tuple(name for name in settings.providers if name not in ENGINES)
    check_providers(others)
    if first not in ENGINES:
        chosen = replace(settings, providers=others, prepack=settings.packs(bundle.manifest))
        return lambda name: OrtSession(bundle.graph_path(name), chosen)
    try:
        return ENGINES[first](bundle, settings)
    except CembedError as error:
        if not rest:
            raise
        warnings.warn(f"{error}; going on with {rest[0]}", RuntimeWarning, stacklevel=4)
        return open_sessions(bundle, replace(settings, providers=tuple(rest)))


def tensorrt_sessions(bundle: Bundle, settings: EngineSettings) -> Callable[[str], Session]:
    """Sessions of the engines beside the bundle; all engines it cannot do without must be there."""
    from cembed.runtime.engines.build import EngineCache, Library, needed_graphs
    from cembed.runtime.engines.cuda import Cuda
    from cembed.runtime.engines.tensorrt import Device, TrtSession

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


ENGINES: dict[str, Callable[[Bundle, EngineSettings], Callable[[str], Session]]] = {
    "tensorrt": tensorrt_sessions,
    **dict.fromkeys(PRECISIONS, openvino_sessions),
}
"""What opens the graphs of a bundle, by provider. Every other provider is one of ONNX Runtime's."""

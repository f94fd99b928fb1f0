"""From the providers that were asked for to the sessions of a bundle's graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.engines.openvino import PRECISIONS, openvino_sessions
from cembed.runtime.engines.operators import BF16, EXACT, bf16_sessions, exact_sessions
from cembed.runtime.engines.session import CPU, EngineSettings, Session, check_providers, opened_while_hashed
from cembed.runtime.errors import CembedError


def open_sessions(bundle: Bundle, settings: EngineSettings) -> Callable[[str], Session]:
    """What gives the session of a graph by its name.

    Raises CembedError if an engine of `ENGINES` was asked for and cannot be had; if another provider was named after
    it, that is a RuntimeWarning, and the other one is taken.
    """
    lists = providers_by_graph(settings.providers, bundle.manifest.graphs)
    opened = {chosen: _open(bundle, replace(settings, providers=chosen)) for chosen in dict.fromkeys(lists.values())}
    common = next(iter(opened.values()))
    return lambda name: opened[lists[name]](name) if name in lists else common(name)


def providers_by_graph(given: Sequence[str], graphs: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The providers of each graph, in order of preference: those given as `GRAPH=PROVIDER`, then those for all.

    Raises CembedError: a graph that is not there.

    >>> providers_by_graph(["vision=openvino", "CPUExecutionProvider"], ["vision", "text"])
    {'vision': ('openvino', 'CPUExecutionProvider'), 'text': ('CPUExecutionProvider',)}
    >>> providers_by_graph(["text=openvino"], ["vision", "text"])
    {'vision': ('CPUExecutionProvider',), 'text': ('openvino',)}
    """
    own = [name.partition("=")[::2] for name in given if "=" in name]
    if unknown := [graph for graph, _ in own if graph not in graphs]:
        raise CembedError(f"provider for graph {unknown[0]!r:.80}: the bundle has {', '.join(graphs)}")
    common = [name for name in given if "=" not in name]
    found = {name: (*(provider for graph, provider in own if graph == name), *common) for name in graphs}
    return {name: providers or CPU for name, providers in found.items()}


def _open(bundle: Bundle, settings: EngineSettings) -> Callable[[str], Session]:
    first, *rest = settings.providers
    others = tuple(name for name in settings.providers if name not in ENGINES)
    check_providers(others)
    if first not in ENGINES:
        chosen = replace(settings, providers=others)
        return lambda name: opened_while_hashed(bundle, name, chosen)
    try:
        return ENGINES[first](bundle, settings)
    except CembedError as error:
        if not rest:
            raise
        warnings.warn(f"{error}; going on with {rest[0]}", RuntimeWarning, stacklevel=4)
        return _open(bundle, replace(settings, providers=tuple(rest)))


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
    BF16: bf16_sessions,
    EXACT: exact_sessions,
}
"""What opens the graphs of a bundle, by provider. Every other provider is one of ONNX Runtime's."""

"""`cembed build-engine`: TensorRT engines of a bundle, on the device they are for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cembed.display import say, show_table
from cembed.export.choices import require_choice
from cembed.options import BundlePath, Trusted, one_of
from cembed.runtime.errors import CembedError

if TYPE_CHECKING:
    from cembed.runtime.bundle.manifest import Manifest
    from cembed.runtime.engines.build import Library
    from cembed.runtime.engines.cuda import GpuInfo

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "int8", "int4", "w8a8")


def build_engine(
    bundle: BundlePath,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar=one_of(PRECISIONS),
            help="What the bundle has to be: engines compute as their graphs do. tf32: float32, with rounded factors.",
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Pages that may run at once.")] = 1,
    max_visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="Visual tokens a page may take; the bundle's limit by default.")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(min=1, metavar="MIB", help="Most scratch memory of a layer; all by default.")
    ] = None,
    loop: Annotated[
        bool, typer.Option("--loop", help="Also the engine of the loop, with a copy of the weights of its own.")
    ] = False,
    trusted: Trusted = None,
    force: Annotated[
        bool, typer.Option("--force", help="Build even if memory does not suffice, and what is there already.")
    ] = False,
) -> None:
    """Build TensorRT engines beside a bundle, for this device, after a look at its memory."""
    from cembed.runtime.bundle.bundle import Bundle
    from cembed.runtime.engines.build import BuildOptions, EngineCache, Library, build_engines, needed_graphs
    from cembed.runtime.engines.memory import EngineLimits, Fit, Model

    opened, library = Bundle(bundle, trusted=trusted), Library.load()
    library.check(opened.manifest)
    options = BuildOptions(
        EngineLimits.of(opened, max_batch, max_visual_tokens), workspace, is_tf32(opened.manifest, precision)
    )
    gpu, free = find_gpu(library)
    graphs = needed_graphs(opened.manifest, loop)
    model = Model.of(opened.manifest, graphs)
    fit = Fit(model.needs(options.limits), model.build(options.limits, gpu is not None and gpu.integrated), free)
    show_table(f"memory of {gpu.name if gpu else 'a device'}, with activations estimated", ["for", "MiB"], fit.rows())
    if not force:
        fit.check()
    for path in build_engines(EngineCache(opened, library, gpu), graphs, options, say, force):
        say(f"{path}: {path.stat().st_size:,} bytes")


def is_tf32(manifest: Manifest, precision: str | None) -> bool:
    """Whether products round their factors. Raises CembedError if the bundle is of another precision."""
    held = manifest.quantisation.weights if manifest.quantisation else manifest.dtype
    if precision is None or precision == held:
        return False
    require_choice("precision", precision, PRECISIONS)
    if precision == "tf32" and manifest.dtype != "fp16":
        return True
    raise CembedError(
        f"this bundle is {held}: for an engine in {precision}, make a bundle of it with `cembed quantize` or "
        "`cembed export --dtype`"
    )


def find_gpu(library: Library) -> tuple[GpuInfo | None, int | None]:
    """The device and its free bytes. TensorRT for RTX builds without one, too."""
    from cembed.runtime.engines.cuda import Cuda
    from cembed.runtime.engines.memory import available_memory

    try:
        cuda = Cuda()
        gpu = cuda.gpu()
    except CembedError:
        if library.name != "tensorrt_rtx":
            raise
        return None, None
    return gpu, available_memory() if gpu.integrated else cuda.free_memory()

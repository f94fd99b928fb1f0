"""`cembed export` and `cembed quantize`: bundles are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cembed.display import show_manifest, step_bar
from cembed.export import choices
from cembed.options import BundlePath, Force, Threads, one_of, require_packages, spread

if TYPE_CHECKING:
    from cembed.quantize.plan import QuantiseOptions


@dataclass(frozen=True)
class ExportFlags:
    """The fields of `ExportOptions`, which imports torch."""

    backbone: Annotated[
        str | None,
        typer.Option(
            metavar=one_of(list(choices.BACKBONES)), help="Architecture; what the checkpoint says by default."
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_HUB_ID",
            help="Checkpoint: safetensors, configuration, tokenizer; or an adapter, which is merged into its base. By "
            "default the released one that people use of the backbone.",
        ),
    ] = None
    head: Annotated[
        str | None,
        typer.Option(metavar=one_of(choices.HEADS), help="How vectors are made; found from the checkpoint by default."),
    ] = None
    num_vectors: Annotated[int | None, typer.Option(help="Vectors of a page; by default 32, or all learned slots.")] = (
        None
    )
    query_vectors: Annotated[
        int | None, typer.Option(help="Vectors of a query; by default 16, or all learned slots.")
    ] = None
    head_weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE.safetensors", help="Learned slot rows and projection, see docs/formats.md."),
    ] = None
    head_spec: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="A head of your own, see docs/formats.md.")
    ] = None
    pooling: Annotated[
        str | None,
        typer.Option(metavar=one_of(choices.POOLING), help="Pool the vectors into one; the head's by default."),
    ] = None
    slot_positions: Annotated[
        str | None,
        typer.Option(
            metavar=one_of(choices.SLOT_POSITIONS), help="Rotary positions of latent slots; the backbone's by default."
        ),
    ] = None
    latent_token: Annotated[str, typer.Option(help="Token fed to latent slots.")] = "<|latent|>"
    prompt_attention: Annotated[
        str | None,
        typer.Option(
            metavar=one_of(choices.PROMPT_ATTENTION), help="What a prompt attends to; the backbone's by default."
        ),
    ] = None
    query_prefix: Annotated[str, typer.Option(help="Text put before every query, such as 'Query: '.")] = ""
    max_visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="Visual tokens a page may take; the checkpoint's limit by default.")
    ] = None
    skip_blank: Annotated[
        bool,
        typer.Option("--skip-blank", help="Blank paper is not read, unless the user of the bundle says otherwise."),
    ] = False
    num_layers: Annotated[
        int | None, typer.Option(min=1, help="Keep the first layers of the decoder only (2D Matryoshka).")
    ] = None
    dtype: Annotated[
        str,
        typer.Option(
            metavar=one_of(choices.DTYPES), help="fp16 computes in half; bf16 stores bfloat16, computes in float32."
        ),
    ] = "fp32"
    adapter: Annotated[
        str | None, typer.Option(metavar="DIR_OR_HUB_ID", help="LoRA adapter to merge into the checkpoint.")
    ] = None
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_HUB_ID", help="Model that --model, an adapter, is merged into; the one it names."),
    ] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None
    target: Annotated[
        str,
        typer.Option(
            metavar=one_of(choices.TARGETS),
            help="onnxruntime uses its attention kernels; onnx is standard only; tensorrt is for build-engine.",
        ),
    ] = "onnxruntime"
    opset: Annotated[
        int, typer.Option(help="ONNX opset, 18 to 25; below 23 everything is decomposed, for JetPack 6 give 20.")
    ] = 24


@spread
def export(
    flags: ExportFlags,
    out: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Directory to write; by default named as the checkpoint is.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar=one_of(choices.WEIGHTS), help="Quantise as `cembed quantize --weights` does.")
    ] = None,
    force: Force = False,
) -> None:
    """Turn a checkpoint into a bundle."""
    if weights is not None:
        choices.require_choice("weights", weights, choices.WEIGHTS)
    require_packages("export", "torch", "transformers", "onnx", "onnx_ir", "onnxscript", "huggingface_hub")
    from cembed.export.exporter import export as run
    from cembed.export.plan import ExportOptions

    out = out or default_out(flags)
    with step_bar("reading the checkpoint") as tell:
        options = ExportOptions(**vars(flags))
        if weights is None:
            manifest = run(options, out, force=force, progress=tell)
        else:
            from cembed.quantize.quantizer import export_quantised

            manifest = export_quantised(
                lambda path: run(options, path, progress=tell), weights, out, force=force, progress=tell
            )
    show_manifest(out, manifest)


def default_out(flags: ExportFlags) -> Path:
    """Of a hub id its last part; beside a folder of the same name it would be in the way."""
    from cembed.export.sources import usual_checkpoint

    name = flags.model or usual_checkpoint(flags.backbone)
    return Path(f"{Path(name).resolve().name}-bundle") if Path(name).is_dir() else Path(Path(name).name)


@dataclass(frozen=True)
class QuantizeFlags:
    """What `QuantiseOptions`, which imports onnx, are made of."""

    weights: Annotated[
        str,
        typer.Option(
            metavar=one_of(choices.WEIGHTS), help="int8 and int4 leave the arithmetic in float; fp16 is for GPUs."
        ),
    ] = "int8"
    w8a8: Annotated[
        bool, typer.Option("--w8a8", help="Activations too, with ranges from the calibration set: for long pages.")
    ] = False
    rounding: Annotated[
        str,
        typer.Option(
            metavar=one_of(choices.ROUNDINGS), help="gptq rounds for what weights meet on the calibration set: better."
        ),
    ] = "nearest"
    ranges: Annotated[
        str, typer.Option(metavar=one_of(choices.RANGES), help="How --w8a8 finds the range of an activation.")
    ] = "mse"
    embeddings: Annotated[
        str | None,
        typer.Option(
            metavar=one_of(choices.EMBEDDINGS),
            help="How the table of token embeddings is kept; by default int8, with --weights fp16 or --mixed fp16.",
        ),
    ] = None
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Weights to keep in float, such as 'layers.0.*'; may be repeated."),
    ] = None
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Pages to judge the loss on: files, folders, or one data set as for eval; may be repeated.",
        ),
    ] = None
    query: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A query to judge the loss on; may be repeated.")
    ] = None
    min_cosine: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Lowest cosine of a vector; unless pages are judged, 0.995 by default, int4 and W8A8 0.95.",
        ),
    ] = None
    max_ndcg_drop: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Fall of nDCG@5 on judged pages; by default 0.002, int4 0.01, W8A8 0.005."),
    ] = None
    mixed: Annotated[
        bool, typer.Option("--mixed", help="A finer type for the most sensitive layers, as many as the limits ask.")
    ] = False
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Rank the layers by the damage each does alone, and draw it."),
    ] = None
    accept_loss: Annotated[bool, typer.Option("--accept-loss", help="Write the bundle whatever was lost.")] = False
    threads: Threads = None

    def check(self) -> None:
        """Raises CembedError: a value that is not known."""
        choices.require_choice("weights", self.weights, choices.WEIGHTS)
        if self.embeddings is not None:
            choices.require_choice("embeddings", self.embeddings, choices.EMBEDDINGS)
        choices.require_choice("ranges", self.ranges, choices.RANGES)
        choices.require_choice("rounding", self.rounding, choices.ROUNDINGS)

    def options(self) -> QuantiseOptions:
        from cembed.quantize.plan import QuantiseOptions

        return QuantiseOptions(
            weights="w8a8" if self.w8a8 else self.weights,
            embeddings=self.embeddings,
            ranges=self.ranges,
            keep=tuple(self.keep or ()),
            calibration=tuple(self.calibration or ()),
            queries=tuple(self.query or ()),
            min_cosine=self.min_cosine,
            max_ndcg_drop=self.max_ndcg_drop,
            rounding=self.rounding,
            mixed=self.mixed,
            report=self.report,
            accept_loss=self.accept_loss,
            threads=self.threads,
        )


@spread
def quantize(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option(metavar="BUNDLE2", help="Directory to write.")],
    flags: QuantizeFlags,
    force: Force = False,
) -> None:
    """Make a bundle smaller, and measure what it loses before it is written."""
    flags.check()
    require_packages("quantize", "onnx")
    from cembed.quantize.quantizer import quantise

    with step_bar("reading the bundle") as tell:
        manifest = quantise(bundle, flags.options(), out, force=force, progress=tell)
    show_manifest(out, manifest)

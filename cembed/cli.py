"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cembed import __version__
from cembed.display import complain as complain
from cembed.display import progress_bar, say, show_json, show_manifest, show_table
from cembed.export import choices
from cembed.runtime.errors import CembedError, Check
from cembed.signals import Stopped, StopSignals
from cembed.streams import allow_any_text, flush_output, held_stderr, printable

if TYPE_CHECKING:
    from cembed.embedding import Harvest
    from cembed.runtime.embed.embedder import Decode, Embedder

EXIT_FAILED = 1
EXIT_INCOMPLETE = 3
EXIT_INTERRUPTED = 130
EXIT_USAGE = 2
FLOATS = ("--dpi", "--timeout", "--min-cosine", "--max-ndcg-drop")
SHOW_WARNING = warnings.showwarning

app = typer.Typer(
    name="cembed",
    help="Visual document embeddings without torch: export a checkpoint to a bundle, embed pages, search them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory made by `cembed export`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Providers = Annotated[
    list[str] | None,
    typer.Option(
        "--provider",
        help="Engines in order of preference: 'tensorrt' (see build-engine), 'openvino', 'openvino-bf16', or ONNX "
        "Runtime's execution providers.",
        metavar="NAME",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads per operator; by default all cores.")]


Paths = Annotated[list[Path], typer.Argument(metavar="PATH", help="PDF and image files, or folders of them.")]
NumVectors = Annotated[int | None, typer.Option(min=1, help="Vectors of a page; the bundle's full budget by default.")]
MaxVisualTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Visual tokens a page may take, at most the bundle's limit: fewer are faster."),
]
Dpi = Annotated[float, typer.Option(min=1, max=2400, help="Resolution at which PDF pages are drawn.")]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds that reading one page may take.")]
MaxPixels = Annotated[
    int,
    typer.Option(min=1, help="Pixels a page may have. Larger PDF, TIFF and JPEG pages are reduced, others refused."),
]
MAX_PIXELS = 100_000_000
VectorDim = Annotated[int | None, typer.Option(min=1, help="Keep the first components of vectors, normalised again.")]
PoolFactor = Annotated[
    int, typer.Option(min=1, help="Merge the vectors of a bundle with one for every token to a part of them.")
]
DecodeOption = Annotated[
    str | None,
    typer.Option(metavar="{single-pass,loop}", help="Latent slots in one pass, or one by one; the former if possible."),
]


def as_decode(value: str | None) -> Decode | None:
    choices.require_choice("decode", value or "loop", ("single-pass", "loop"))
    return "single-pass" if value == "single-pass" else "loop" if value else None


def one_of(values: tuple[str, ...]) -> str:
    return "{" + ",".join(values) + "}"


def version(value: bool) -> None:
    if value:
        typer.echo(f"cembed {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def export(
    backbone: Annotated[str, typer.Option(metavar=one_of(choices.BACKBONES), help="Architecture of the checkpoint.")],
    model: Annotated[
        str, typer.Option(metavar="DIR_OR_HUB_ID", help="Checkpoint: safetensors, configuration, tokenizer.")
    ],
    out: Annotated[Path, typer.Option(metavar="BUNDLE", help="Directory to write.")],
    head: Annotated[
        str | None,
        typer.Option(metavar=one_of(choices.HEADS), help="How vectors are made; found from the checkpoint by default."),
    ] = None,
    num_vectors: Annotated[
        int | None, typer.Option(help="Vectors of a page; by default 32, or all learned slots.")
    ] = None,
    query_vectors: Annotated[
        int | None, typer.Option(help="Vectors of a query; by default 16, or all learned slots.")
    ] = None,
    head_weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE.safetensors", help="Learned slot rows and projection, see docs/formats.md."),
    ] = None,
    head_spec: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="A head of your own, see docs/formats.md.")
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(metavar=one_of(choices.POOLING), help="Pool the vectors into one; the head's by default."),
    ] = None,
    slot_positions: Annotated[
        str | None,
        typer.Option(
            metavar=one_of(choices.SLOT_POSITIONS), help="Rotary positions of latent slots; the backbone's by default."
        ),
    ] = None,
    latent_token: Annotated[str, typer.Option(help="Token fed to latent slots.")] = "<|latent|>",
    prompt_attention: Annotated[
        str | None,
        typer.Option(
            metavar=one_of(choices.PROMPT_ATTENTION), help="What a prompt attends to; the backbone's by default."
        ),
    ] = None,
    query_prefix: Annotated[str, typer.Option(help="Text put before every query, such as 'Query: '.")] = "",
    max_visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="Visual tokens a page may take; the checkpoint's limit by default.")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(min=1, help="Keep the first layers of the decoder only (2D Matryoshka).")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar=one_of(choices.DTYPES), help="fp16 computes in half; bf16 stores bfloat16, computes in float32."
        ),
    ] = "fp32",
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="LoRA adapter to merge into the checkpoint.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    target: Annotated[
        str,
        typer.Option(
            metavar=one_of(choices.TARGETS),
            help="onnxruntime uses its attention kernels; onnx is standard only; tensorrt is for build-engine.",
        ),
    ] = "onnxruntime",
    opset: Annotated[
        int, typer.Option(help="ONNX opset, 18 to 25; below 23 everything is decomposed, for JetPack 6 give 20.")
    ] = 24,
    weights: Annotated[
        str | None, typer.Option(metavar=one_of(choices.WEIGHTS), help="Quantise as `cembed quantize --weights` does.")
    ] = None,
    force: Force = False,
) -> None:
    """Turn a checkpoint into a bundle."""
    arguments = {name: value for name, value in locals().items() if name not in ("out", "force", "weights")}
    if weights is not None:
        choices.require_choice("weights", weights, choices.WEIGHTS)
    require_packages("export", "torch", "transformers", "onnx", "onnx_ir", "onnxscript", "huggingface_hub")
    from cembed.export.exporter import export as run
    from cembed.export.plan import ExportOptions

    with progress_bar("{task.description}") as progress:
        task = progress.add_task("reading the checkpoint", total=None)

        def tell(step: str) -> None:
            progress.update(task, description=printable(step))

        if weights is None:
            manifest = run(ExportOptions(**arguments), out, force=force, progress=tell)
        else:
            from cembed.quantize.quantizer import export_quantised

            options = ExportOptions(**arguments)
            manifest = export_quantised(
                lambda path: run(options, path, progress=tell), weights, out, force=force, progress=tell
            )
    show_manifest(out, manifest)


def require_packages(extra: str, *names: str) -> None:
    from importlib.util import find_spec

    if missing := [name for name in names if find_spec(name) is None]:
        raise CembedError(f"{extra} needs {', '.join(missing)}: install cembed with its extra '{extra}'")


@app.command()
def quantize(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option(metavar="BUNDLE2", help="Directory to write.")],
    weights: Annotated[
        str,
        typer.Option(
            metavar=one_of(choices.WEIGHTS), help="int8 and int4 leave the arithmetic in float; fp16 is for GPUs."
        ),
    ] = "int8",
    w8a8: Annotated[
        bool, typer.Option("--w8a8", help="Activations too, with ranges from the calibration set: for long pages.")
    ] = False,
    rounding: Annotated[
        str,
        typer.Option(
            metavar=one_of(choices.ROUNDINGS), help="gptq rounds for what weights meet on the calibration set: better."
        ),
    ] = "nearest",
    ranges: Annotated[
        str, typer.Option(metavar=one_of(choices.RANGES), help="How --w8a8 finds the range of an activation.")
    ] = "mse",
    embeddings: Annotated[
        str, typer.Option(metavar=one_of(choices.EMBEDDINGS), help="How the table of token embeddings is kept.")
    ] = "fp16",
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Weights to keep in float, such as 'layers.0.*'; may be repeated."),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Pages to judge the loss on: files, folders, or one data set as for eval."),
    ] = None,
    query: Annotated[list[str] | None, typer.Option(help="A query to judge the loss on; may be repeated.")] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Lowest cosine of a vector; unless pages are judged, 0.995 by default, int4 and W8A8 0.95.",
        ),
    ] = None,
    max_ndcg_drop: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Fall of nDCG@5 on judged pages; by default 0.002, int4 0.01, W8A8 0.005."),
    ] = None,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="A finer type for the most sensitive layers, as many as the limits ask.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Rank the layers by the damage each does alone, and draw it."),
    ] = None,
    accept_loss: Annotated[bool, typer.Option("--accept-loss", help="Write the bundle whatever was lost.")] = False,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Make a bundle smaller, and measure what it loses before it is written."""
    choices.require_choice("weights", weights, choices.WEIGHTS)
    choices.require_choice("embeddings", embeddings, choices.EMBEDDINGS)
    choices.require_choice("ranges", ranges, choices.RANGES)
    choices.require_choice("rounding", rounding, choices.ROUNDINGS)
    require_packages("quantize", "onnx")
    from cembed.quantize.plan import QuantiseOptions
    from cembed.quantize.quantizer import quantise

    options = QuantiseOptions(
        "w8a8" if w8a8 else weights,
        embeddings,
        ranges,
        tuple(keep or ()),
        tuple(calibration or ()),
        tuple(query or ()),
        min_cosine,
        max_ndcg_drop,
        rounding,
        mixed,
        report,
        accept_loss,
        threads,
    )
    with progress_bar("{task.description}") as progress:
        task = progress.add_task("reading the bundle", total=None)
        manifest = quantise(
            bundle, options, out, force=force, progress=lambda step: progress.update(task, description=printable(step))
        )
    show_manifest(out, manifest)


@app.command()
def inspect(bundle: BundlePath, as_json: AsJson = False) -> None:
    """Show what a bundle holds and how it was made."""
    from cembed.runtime.bundle.bundle import Bundle

    opened = Bundle(bundle)
    if as_json:
        show_json({"hash": opened.hash, **json.loads(opened.manifest.to_json())})
    else:
        show_manifest(bundle, opened.manifest)


@app.command()
def verify(
    bundle: BundlePath,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="If all is well, give an old bundle's manifest its digest (schema 2).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every file's hash, the graphs, and that the stored page still gives the stored vectors."""
    from cembed.runtime import verify as checks
    from cembed.runtime.bundle.bundle import Bundle

    run = checks.verify_and_upgrade if upgrade else checks.verify
    with held_stderr():
        show_checks(run(Bundle(bundle)), as_json)


def show_checks(found: Iterable[Check], as_json: bool) -> None:
    """Each check as it is done, or all of them as JSON; exits with 1 if one failed."""
    checks = []
    for check in found:
        checks.append(check)
        if not as_json:
            say(f"{'ok    ' if check.passed else 'FAILED'} {check.name}: {check.detail}")
    if as_json:
        show_json([vars(check) for check in checks])
    if not all(check.passed for check in checks):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def embed(
    bundle: BundlePath,
    paths: Paths,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Vector file to write: .npz or .safetensors.")],
    num_vectors: NumVectors = None,
    max_visual_tokens: MaxVisualTokens = None,
    dpi: Dpi = 144,
    timeout: Timeout = 60,
    max_pixels: MaxPixels = MAX_PIXELS,
    dim: VectorDim = None,
    decode: DecodeOption = None,
    pool_factor: PoolFactor = 1,
    provider: Providers = None,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Embed the pages of documents into one vector file.

    Exits with 3 if some pages could not be read, or not without doubt. When it is interrupted, the pages so far are
    written.
    """
    from cembed.embedding import Harvest
    from cembed.runtime.bundle.vectors import check_writable
    from cembed.runtime.embed.embedder import Budget
    from cembed.runtime.pages.documents import PageReader, find_documents

    check_writable(out, force)
    files = find_documents(paths)
    embedder = load_embedder(bundle, provider, threads, max_visual_tokens)
    budget = Budget(num_vectors, dim, as_decode(decode), pool_factor)
    embedder.prepare("document", budget)
    harvest = Harvest(out, embedder, budget)
    with StopSignals() as signals:
        reading = PageReader(dpi=dpi, timeout=timeout, max_pixels=max_pixels)
        with reading as reader, progress_bar() as progress:
            harvest.total = reader.count_pages(files)
            task = progress.add_task("embedding", total=harvest.total)
            ended = harvest.run(reader.read(files), signals, lambda: progress.advance(task))
        finish_embedding(harvest, ended)


def finish_embedding(harvest: Harvest, ended: BaseException | None) -> None:
    """Writes what there is, and says what there is not; `ended` is what ended the run before the last page."""
    try:
        if harvest.pages:
            harvest.save()
    finally:
        harvest.report()
    if isinstance(ended, Stopped):
        ended.message = f"interrupted {harvest.stopped()}"
    elif ended is not None:
        complain(f"ended {harvest.stopped()}")
    if ended is not None:
        raise ended
    if not harvest.pages:
        raise CembedError(f"none of the {harvest.seen} pages could be embedded: {harvest.out} was not written")
    rows, dim = sum(len(page.vectors) for page in harvest.pages), harvest.pages[0].vectors.shape[1]
    size = harvest.out.stat().st_size
    say(f"{harvest.out}: {len(harvest.pages)} pages, {rows} vectors of {dim}, {size:,} bytes")
    if harvest.doubtful:
        raise typer.Exit(EXIT_INCOMPLETE)


def load_embedder(
    bundle: Path,
    provider: list[str] | None,
    threads: int | None,
    max_visual_tokens: int | None = None,
    prepack: bool | None = True,
) -> Embedder:
    from cembed.runtime.embed.embedder import CPU, Embedder

    with held_stderr():
        return Embedder.load(
            bundle,
            providers=provider or CPU,
            threads=threads,
            prepack=prepack,
            max_visual_tokens=max_visual_tokens,
        )


@app.command()
def search(
    file: Annotated[
        Path, typer.Argument(metavar="FILE_OR_INDEX", help="Made by `cembed embed` or `cembed index add`.")
    ],
    bundle: Annotated[Path, typer.Option(metavar="BUNDLE", help="The bundle that made the vectors.")],
    query: Annotated[str | None, typer.Argument(metavar="QUERY", help="What to look for.")] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Look for pages like this one, in place of QUERY.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Pages to show.")] = 5,
    query_vectors: Annotated[int | None, typer.Option(min=1, help="Vectors of the query; all by default.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Index only: pages with this metadata; may be repeated."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Index only: pages of files such as 'scans/2024/*'.")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Index only: pages that the first stage leaves to the next.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Index only: one exact stage over all pages.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Index only: show the stages of the search.")] = False,
    decode: DecodeOption = None,
    as_json: AsJson = False,
    provider: Providers = None,
    threads: Threads = None,
) -> None:
    """Rank the pages of a vector file or an index by MaxSim with a query."""
    from cembed import ranking
    from cembed.runtime.embed.embedder import Budget

    pages = ranking.open_pages(file, ranking.Tuning(tuple(where or ()), source, candidates, exact, explain))
    if (query is None) == (image is None):
        raise CembedError("give either a QUERY or an --image")
    embedder = load_embedder(bundle, provider, threads, prepack=None)  # for one query
    if pages.bundle != embedder.bundle.hash:
        raise CembedError(f"{file} was made by another bundle than {bundle}: use that one, or embed the pages again")
    budget = Budget(query_vectors, pages.dim, as_decode(decode))
    with held_stderr():
        vectors = ranking.embed_image(embedder, image, budget) if image else embedder.embed_query(query or "", budget)
    rows, stages = pages.rank(vectors, top, threads)
    if as_json:
        show_json({"pages": rows, "stages": stages} if explain else rows)
        return
    warned = ["warning"] if any("warning" in row for row in rows) else []
    cells = [{"warning": "", **row} for row in rows]
    show_table(f"{query or str(image)!r} among {len(pages)} pages", ["rank", "score", "path", "page", *warned], cells)
    if explain:
        show_table("stages of the search", ["stage", "pages", "kept", "ms", "bytes"], stages)


@app.command(name="eval")
def evaluate(
    bundle: BundlePath,
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="Folder with pages/, queries.jsonl and qrels.tsv.")
    ],
    budgets: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="Vectors of a page to compare; by default powers of two up to all."),
    ] = None,
    storage: Annotated[
        str, typer.Option(metavar="TYPE,TYPE,…", help="How vectors are kept: f32, f16, u8 or bits (one bit).")
    ] = "f32",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw quality against bytes and milliseconds a page.")
    ] = None,
    as_json: AsJson = False,
    provider: Providers = None,
    threads: Threads = None,
) -> None:
    """Measure how well a bundle finds judged pages: nDCG, recall and MRR by budget and storage type."""
    from cembed.runtime import evaluate as evaluation

    data = evaluation.Dataset.read(dataset)
    embedder = load_embedder(bundle, provider, threads)
    with progress_bar() as progress:
        task = progress.add_task("embedding", total=None)
        result = evaluation.evaluate(
            embedder,
            data,
            as_numbers("budgets", budgets),
            storage.split(","),
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        show_json(asdict(result))
    else:
        title = f"{dataset.name}: {result.pages} pages, {result.rows[0].questions} questions; bytes, ms: of a page"
        show_table(title, evaluation.COLUMNS, [evaluation.table_row(row) for row in result.rows])
    if plot is not None:
        evaluation.plot(result, plot)


def as_numbers(name: str, value: str | None) -> list[int] | None:
    try:
        return None if value is None else [int(part) for part in value.split(",")]
    except ValueError as error:
        raise CembedError(f"--{name} is {value!r}: give whole numbers with commas between") from error


def show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Ours on one line, without where they come from; others as ever."""
    if category is RuntimeWarning:
        complain(f"warning: {message}")
    else:
        SHOW_WARNING(message, category, *where, **more)


from cembed.bench_cli import bench_app  # noqa: E402 they use what is above
from cembed.engine_cli import engine_app  # noqa: E402
from cembed.index_cli import index_app  # noqa: E402

app.add_typer(engine_app)
app.add_typer(index_app)
app.add_typer(bench_app)


def refuse_nan(arguments: list[str]) -> None:
    """NaN by its name: to the limits of an option it would only be above one or below the other."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith(FLOATS) else [word])]
    for option, value in pairwise(words):
        if option in FLOATS and value.lower().lstrip("+-") == "nan":
            complain(f"error: {option} is {value}: give a number")
            raise SystemExit(EXIT_USAGE)


def main() -> None:
    """Runs the command; an error of the user's is one line and exit status 1, unless --debug asks for more."""
    debug = "--debug" in sys.argv[1:]
    if not debug:
        warnings.showwarning = show_warning
    allow_any_text()
    try:
        status = run([argument for argument in sys.argv[1:] if argument != "--debug"])
    except BaseException as error:  # a panic of a native library is no Exception
        if debug and not isinstance(error, Stopped):
            raise
        status, message = explain(error)
        with contextlib.suppress(OSError):  # then nobody listens
            complain(message)
    raise SystemExit(status)


def run(arguments: list[str]) -> int:
    """The command's exit status, once its output is out."""
    try:
        refuse_nan(arguments)
        app(arguments, prog_name="cembed")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    if status == EXIT_INTERRUPTED:
        complain("interrupted")
    flush_output()
    return status


def explain(error: BaseException) -> tuple[int, str]:
    """Exit status and line for what ended a command."""
    if isinstance(error, Stopped):
        return error.status, error.message
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, CembedError):
        return EXIT_FAILED, f"error: {error}"
    if isinstance(error, MemoryError):
        return EXIT_FAILED, "error: there is not enough memory (--debug shows where)"
    if isinstance(error, (OSError, ImportError)):
        return EXIT_FAILED, f"error: {reason(error)} (--debug shows where)"
    return EXIT_FAILED, f"error: {type(error).__name__}: {error} (--debug shows where; please report it)"


def reason(error: OSError | ImportError) -> str:
    """What the system says, of which file, and what to do where that is known."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    place = "" if error.filename is None else f": {os.fsdecode(error.filename)}"
    return f"{error.strerror}{place}{': raise `ulimit -n`' if error.errno == errno.EMFILE else ''}"

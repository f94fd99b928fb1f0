"""The command line, put together. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from cembed import __version__
from cembed.bench_cli import bench_app
from cembed.deploy_cli import bundle_app, deploy, rollback, versions
from cembed.display import complain
from cembed.embed_cli import embed
from cembed.endings import EXIT_INTERRUPTED, explain, refuse_nan, show_warning
from cembed.engine_cli import build_engine
from cembed.eval_cli import evaluate
from cembed.export_cli import export, quantize
from cembed.index_cli import index_app
from cembed.inspect_cli import inspect, verify
from cembed.scale_cli import scale_app
from cembed.search_cli import search
from cembed.serve_cli import export_triton, serve
from cembed.sign_cli import sign
from cembed.signals import Stopped
from cembed.streams import allow_any_text, flush_output
from cembed.tune_cli import tune
from cembed.upload_cli import upload
from cembed.watch_cli import status, watch

COMMANDS: dict[str, Callable[..., None]] = {
    "export": export,
    "quantize": quantize,
    "inspect": inspect,
    "verify": verify,
    "sign": sign,
    "embed": embed,
    "search": search,
    "eval": evaluate,
    "build-engine": build_engine,
    "tune": tune,
    "watch": watch,
    "status": status,
    "serve": serve,
    "export-triton": export_triton,
    "upload": upload,
    "deploy": deploy,
    "rollback": rollback,
    "versions": versions,
}
app = typer.Typer(
    name="cembed",
    help="Visual document embeddings without torch: export a checkpoint to a bundle, embed pages, search them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(index_app)
app.add_typer(bundle_app)
app.add_typer(bench_app)
app.add_typer(scale_app)


def show_version(value: bool) -> None:
    if value:
        from cembed.versions import details

        typer.echo("\n".join([f"cembed {__version__}", *details()]))
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


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

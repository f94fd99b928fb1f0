"""`cembed tune`: which engine runs each graph of a bundle fastest here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cembed.display import complain, say, show_json, show_table
from cembed.options import AsJson, BundlePath, Threads, Trusted
from cembed.runtime.errors import CembedError
from cembed.streams import held_stderr

if TYPE_CHECKING:
    from cembed.runtime.bundle.bundle import Bundle
    from cembed.runtime.pages.images import Pixels
    from cembed.runtime.tuning import Trial

STANDARD = "the bundle is for onnxruntime alone: export it with --target onnx --opset 20 to try OpenVINO as well"


def tune(
    bundle: BundlePath,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PATH]…", help="Pages to try it on; by default the one that the bundle brings."),
    ] = None,
    pages: Annotated[int, typer.Option(min=1, help="How many pages of PATH at most.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each page is embedded.")] = 3,
    min_cosine: Annotated[
        float, typer.Option(min=0, max=1, help="The lowest cosine of a vector with ONNX Runtime's that is accepted.")
    ] = 0.999,
    threads: Threads = None,
    trusted: Trusted = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Choose, and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Try each engine on this machine and keep the fastest for each graph beside the bundle, where loading finds it."""
    from cembed.runtime.bundle.bundle import Bundle
    from cembed.runtime.engines import tuned
    from cembed.runtime.tuning import Way, attempt, best, mixture, try_all

    opened = Bundle(bundle, trusted=trusted)
    images = read_pages(opened, paths, pages)
    if opened.manifest.target == "onnxruntime":
        complain(STANDARD)
    with held_stderr():
        trials = list(try_all(Way(bundle, threads=threads), images, rounds))
        if trials[0].failure:
            raise CembedError(trials[0].failure)
        mixed = mixture(trials, min_cosine)
        if mixed not in [trial.providers for trial in trials]:
            trials.append(attempt(Way(bundle, mixed, threads), images, rounds))
    chosen = best(trials, min_cosine).providers
    show(trials, chosen, as_json)
    if not dry_run:
        path = tuned.write(opened.root, tuned.Tuned(chosen, threads, opened.hash, tuned.machine()))
        if not as_json:
            say(f"wrote {path}")


def read_pages(bundle: Bundle, paths: list[Path] | None, most: int) -> list[Pixels]:
    """The first pages at `paths`, or the bundle's own. Raises CembedError: there is none that can be read."""
    from cembed.runtime.pages.documents import Page, PageReader, find_documents
    from cembed.runtime.verify import read_page

    if not paths:
        return [read_page(bundle)]
    found: list[Pixels] = []
    with PageReader() as reader:
        for page in reader.read(find_documents(paths)):
            found += [page.image] if isinstance(page, Page) else []
            if len(found) == most:
                break
    if not found:
        raise CembedError(f"no page of {', '.join(map(str, paths))} can be read")
    return found


def show(trials: list[Trial], chosen: tuple[str, ...], as_json: bool) -> None:
    rows = [row(trial, trials[0]) for trial in trials]
    if as_json:
        show_json({"trials": rows, "chosen": list(chosen)})
        return
    names = dict.fromkeys(name for made in rows for name in made if name != "failure")
    show_table("milliseconds, medians", list(names), [{n: made.get(n, "") for n in names} for made in rows])
    for made in rows:
        if "failure" in made:
            say(f"{made['providers']}: {made['failure']}")
    say(f"chosen: {', '.join(chosen)}")


def row(trial: Trial, right: Trial) -> dict[str, str | float]:
    name = ", ".join(trial.providers)
    if trial.failure:
        return {"providers": name, "failure": trial.failure}
    shown: dict[str, str | float] = {f"{part} ms": round(1000 * s, 2) for part, s in trial.seconds.items()}
    lowest = trial.lowest_cosine(right)
    return {
        "providers": name,
        **shown,
        "lowest cosine": math.floor(1e6 * lowest) / 1e6,
        "peak MiB": round(trial.memory),
    }

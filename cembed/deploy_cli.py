"""`cembed deploy`, `rollback`, `versions` and `cembed bundle`: a device gets a new bundle."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cembed.display import complain, say, show_json, show_table
from cembed.options import AsJson, Engine, Force, Trusted, split, spread
from cembed.streams import held_stderr

if TYPE_CHECKING:
    from cembed.runtime.updates.deploy import Deployed, Trial

bundle_app = typer.Typer(name="bundle", help="Patches: what is new in a bundle, and no more.", no_args_is_help=True)
Versions = Annotated[Path, typer.Argument(metavar="DIR", help="Folder made by `cembed deploy --to`.")]
MinCosine = Annotated[
    float,
    typer.Option(min=0, max=1, help="The lowest cosine of the self-test that is accepted beyond its own tolerance."),
]
OldBundle = Annotated[Path, typer.Argument(metavar="OLD", help="The bundle that is there.")]


@spread
def deploy(
    *,
    bundle: Annotated[
        Path,
        typer.Argument(metavar="BUNDLE", help="Directory made by `cembed export`, or a patch for a version in DIR."),
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder of versions; made if it is not there.")],
    keep: Annotated[int, typer.Option(min=2, help="Versions that stay, with the current one and the one before.")] = 2,
    stage: Annotated[
        bool, typer.Option("--stage", help="Only copy and verify it, for build-engine; deploy it again to use it.")
    ] = False,
    min_cosine: MinCosine = 0.95,
    engine: Engine,
    as_json: AsJson = False,
) -> None:
    """Copy a bundle beside the one in use, try it on this device, and then switch DIR/current to it, all at once.

    Until then the old one stays the current one, whatever happens. Run it again after an interruption.
    """
    from cembed.runtime.updates.deploy import deploy as put

    with held_stderr():
        done = put(bundle, to, trial=trial_of(engine, min_cosine), keep=keep, stage=stage)
    report(to, done, as_json)
    tell_of_tuning(bundle, done.path)


@spread
def rollback(*, to: Versions, min_cosine: MinCosine = 0.95, engine: Engine, as_json: AsJson = False) -> None:
    """Switch DIR/current back to the version before, once it has been verified and tried; again, to come back."""
    from cembed.runtime.updates.deploy import rollback as go_back

    with held_stderr():
        done = go_back(to, trial=trial_of(engine, min_cosine))
    report(to, done, as_json)


def versions(to: Versions, as_json: AsJson = False) -> None:
    """Show the versions in DIR: which one is used, and which one `cembed rollback` goes back to."""
    from cembed.runtime.updates.versions import versions as list_versions

    found = list_versions(to)
    if as_json:
        show_json([{**asdict(version), "path": str(version.path)} for version in found])
        return
    rows = [
        {
            "version": version.path.name,
            "state": version.state,
            "model": version.model,
            "copied": time.strftime("%Y-%m-%d %H:%M", time.localtime(version.copied)),
            "bytes": f"{version.size:,}",
        }
        for version in found
    ]
    show_table(str(to), list(rows[0]) if rows else [], rows)


@bundle_app.command()
def diff(
    old: OldBundle,
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The bundle that shall be there.")],
    out: Annotated[Path, typer.Option("--out", metavar="PATCH", help="File to write, for instance NEW.cembed-patch.")],
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write what NEW has that OLD has not into one file, for `cembed bundle apply` and `cembed deploy`."""
    from cembed.runtime.updates.diff import diff as write

    made = write(old, new, out, force=force)
    if as_json:
        show_json(asdict(made))
        return
    names = ", ".join(made.files) or "no file"
    say(f"{out}: {made.size:,} bytes, {made.size / made.whole:.1%} of {new}; new in it: {names}")


@bundle_app.command("apply")
def apply_patch(
    old: OldBundle,
    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="File made by `cembed bundle diff`.")],
    out: Annotated[Path, typer.Option("--out", metavar="NEW", help="Directory to write the new bundle to.")],
    force: Force = False,
    trusted: Trusted = None,
) -> None:
    """Make the new bundle of the old one and a patch. Every file is compared with its sha256."""
    from cembed.runtime.updates.patch import apply

    say(f"{out}: {apply(old, patch, out, force=force, trusted=trusted)}")


def trial_of(engine: Engine, min_cosine: float) -> Trial:
    from cembed.runtime.updates.deploy import Trial

    return Trial(tuple(split(engine.provider)) or None, engine.threads, min_cosine, engine.trusted)


def report(to: Path, done: Deployed, as_json: bool) -> None:
    if as_json:
        show_json({**asdict(done), "path": str(done.path)})
        return
    said = {
        "deployed": "is current now",
        "unchanged": "is current already, and all of it is right",
        "repaired": "is current already, and was damaged: it is repaired",
        "staged": f"is at {done.path}, and not used before it is deployed again without --stage",
    }
    copied = f"; {done.copied:,} bytes copied, {done.shared:,} shared with other versions"
    tried = "" if done.cosine is None else f"; lowest cosine of the self-test {done.cosine:.4f}"
    say(f"{to}: {done.hash[:16]} {said[done.outcome]}{copied if done.copied + done.shared else ''}{tried}")


def tell_of_tuning(bundle: Path, version: Path) -> None:
    """What was tuned for the bundle elsewhere may not suit this device."""
    from cembed.runtime.engines.tuned import path_of

    if path_of(bundle).exists() and not path_of(version).exists():
        complain(f"{path_of(bundle)} is not deployed: run `cembed tune {version}` on this device")

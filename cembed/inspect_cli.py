"""`cembed inspect` and `cembed verify`: a bundle is looked at."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated

import typer

from cembed.display import say, show_json, show_manifest
from cembed.options import EXIT_FAILED, AsJson, BundlePath, Trusted
from cembed.runtime.errors import Check
from cembed.streams import held_stderr


def inspect(bundle: BundlePath, trusted: Trusted = None, as_json: AsJson = False) -> None:
    """Show what a bundle holds and how it was made."""
    from cembed.runtime.bundle.bundle import Bundle
    from cembed.runtime.bundle.trust import read_signatures

    opened = Bundle(bundle, trusted=trusted)
    signed_by = {name: name in opened.signers for name in read_signatures(opened.root)}
    if as_json:
        show_json({"hash": opened.hash, "signed_by": signed_by, **json.loads(opened.manifest.to_json())})
    else:
        show_manifest(bundle, opened.manifest, signed_by)


def verify(
    bundle: BundlePath,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="If all is well, give an old bundle's manifest its digest (schema 2).")
    ] = False,
    trusted: Trusted = None,
    as_json: AsJson = False,
) -> None:
    """Check every file's hash, the graphs, and that the stored page still gives the stored vectors."""
    from cembed.runtime import verify as checks
    from cembed.runtime.bundle.bundle import Bundle

    run = checks.verify_and_upgrade if upgrade else checks.verify
    with held_stderr():
        show_checks(run(Bundle(bundle, trusted=trusted)), as_json)


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

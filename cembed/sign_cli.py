"""`cembed sign`: who makes bundles puts a name to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cembed.display import say
from cembed.options import BundlePath, Force


def sign(
    bundle: BundlePath,
    key: Annotated[
        Path, typer.Option("--key", metavar="KEY", help="Private key of Ed25519, in PEM: openssl genpkey makes it.")
    ],
    force: Force = False,
) -> None:
    """Sign a bundle, once the hash of each of its files was compared, for those who trust the key.

    Signatures by other keys stay, unless --force is given: while one key follows another, a bundle may have both.
    """
    from cembed.runtime.bundle.signing import sign as put

    say(f"{bundle}: signed by {', '.join(put(bundle, key, alone=force))}")

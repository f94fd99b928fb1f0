"""A server that takes another bundle when its path leads to one, as `cembed deploy` makes it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.errors import CembedError
from cembed.runtime.intake.opening import bundle_of
from cembed.runtime.updates.versions import current_hash, resolve
from cembed.serve.pool import Pool
from cembed.serve.service import Service, check_budget

LOOK_SECONDS = 1.0
log = logging.getLogger("cembed.serve")


async def follow(service: Service) -> None:
    """Until it is cancelled. A bundle that cannot be used is refused once, with a line; the old one goes on."""
    path, refused = Path(service.settings.worker.bundle), ""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        found = await asyncio.to_thread(current_hash, path)
        if found in (None, service.bundle.hash, refused):
            continue
        try:
            if await asyncio.to_thread(may_change, service, str(found)):
                await take(service, resolve(path))
                refused = ""
        except CembedError as error:
            refused = str(found)
            log.error("another bundle is at %s, and cannot be used: %s; the old one stays in use", path, error)


def may_change(service: Service, bundle: str) -> bool:
    """Whether the server can take this bundle now: its index is of it, or there is none.

    One that another process writes to will be. Raises CembedError: this one writes to it.
    """
    shelf = service.shelf
    if shelf is None:
        return True
    there = bundle_of(shelf.index.folder)
    if there != bundle and not shelf.read_only:
        raise CembedError(f"{shelf.index.folder} has vectors of bundle {str(there)[:12]}, not of {bundle[:12]}")
    return there == bundle


async def load(service: Service, bundle: Path) -> tuple[Bundle, Pool]:
    """A bundle and workers that have passed its self-test. Raises CembedError: there are none."""
    settings, opened = service.settings, Bundle(bundle, verify=False, trusted=service.settings.worker.trusted)
    check_budget(opened.manifest, opened.manifest.document, settings.budget)
    pool = service.pool_of(bundle)
    await pool.start()
    return opened, pool


async def take(service: Service, bundle: Path) -> None:
    """Raises CembedError: the bundle cannot be used."""
    opened, pool = await load(service, bundle)
    before = service.bundle.hash
    await service.change(opened, pool)
    log.info("another bundle: %s, in place of %s", opened.hash[:12], before[:12])

"""What a pass over the folders finds, beside what the ledger says: what is new or changed, and what is gone.

A file that is gone may be on a disk that is not mounted now. So it is missed only where its folder can be listed, is on
the device where the file was, and is not an empty one in the place of another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cembed.runtime.intake.folders import Folders, Listing, Stamp
from cembed.runtime.intake.ledger import Ledger, State

SETTLED: frozenset[State] = frozenset({"indexed", "failed", "blank"})


@dataclass
class Survey:
    """`unsettled` files are there, and are new, changed, or waiting; `gone` ones are not, by what the ledger says of
    them; `troubles` are what is wrong with folders."""

    unsettled: dict[str, Stamp] = field(default_factory=dict)
    gone: dict[str, Stamp] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)
    renumbered: dict[int, int] = field(default_factory=dict)
    """Devices that have another number than they had."""

    def compare(self, listing: Listing, files: Mapping[str, Stamp], known: Mapping[str, tuple[Stamp, State]]) -> None:
        for name, stamp in files.items():
            before, state = known.get(name, ((), "waiting"))
            if before[1:] != stamp[1:] or state not in SETTLED:
                self.unsettled[os.path.join(listing.path, name)] = stamp
            elif before[0] != stamp[0]:
                self.renumbered[before[0]] = stamp[0]
        self.miss(listing.path, known, files)

    def miss(self, folder: str, known: Mapping[str, tuple[Stamp, State]], files: Mapping[str, Stamp]) -> None:
        for name in known.keys() - files.keys():
            self.gone[os.path.join(folder, name)] = known[name][0]

    def is_held(self, path: str) -> bool:
        """Whether a file that is gone may come back with the disk that it is on."""
        if any(_is_below(path, folder) for folder in self.troubles):
            return True
        device = self.gone[path][0] if self.gone[path] else None
        here = _device_at(path)
        return device is not None and here is not None and here not in (device, self.renumbered.get(device))


def survey(folders: Folders, ledger: Ledger, between: Callable[[], None]) -> Survey:
    """One pass. Raises CembedError: the ledger cannot be read or written."""
    found, seen = Survey(documents=dict.fromkeys(folders.roots, 0)), set[str]()
    for listing in folders.walk():
        between()
        seen.add(listing.path)
        if listing.files is None:
            found.troubles[listing.path] = listing.reason
            continue
        found.documents[folders.root_of(listing.path) or ""] += len(listing.files)
        found.compare(listing, listing.files, ledger.folder(listing.path))
    for folder in ledger.folders():
        if folder not in seen and folders.root_of(folder):
            found.miss(folder, ledger.folder(folder), {})
    _check_places(found, ledger)
    return found


def _check_places(found: Survey, ledger: Ledger) -> None:
    """Roots that are empty, and other folders than those where files were; remembers those that are not."""
    places: dict[str, list[int]] = ledger.facts().get("places", {})
    now = {root: _place_of(root) for root in found.documents if root not in found.troubles}
    for root, place in now.items():
        unknown = root not in places and not any(_is_below(path, root) for path in found.gone)
        if not found.documents[root] and not unknown and places.get(root) != place:
            found.troubles[root] = "is empty, and not the folder that it was: is its disk mounted?"
    filled = {root: place for root, place in now.items() if found.documents[root] and place is not None}
    if places | filled != places:
        ledger.tell(places=places | filled)


def _place_of(folder: str) -> list[int] | None:
    try:
        about = os.stat(folder)
    except OSError:
        return None
    return [about.st_dev, about.st_ino]


def _device_at(path: str) -> int | None:
    """The device of the nearest folder of a path that is there."""
    while (folder := os.path.dirname(path)) != path:
        if (place := _place_of(folder)) is not None:
            return place[0]
        path = folder
    return None


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))

"""JSON with one field changed: dropped, null, of another kind, or out of any bounds."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

DROPPED = object()
KINDS = (DROPPED, None, "x", "3", -1, 0, 1.5, True, [], {}, [1, "a"], float("nan"), 10**30)
Place = tuple[str | int, ...]


def places(value: Any, before: Place = ()) -> Iterator[Place]:
    """Where there is anything in objects and lists, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*before, key)
        yield from places(item, (*before, key))


def mutations(value: Any) -> Iterator[tuple[str, str]]:
    """The name of each change, and the JSON it makes."""
    for place in places(value):
        for kind in KINDS:
            name = f"{'.'.join(map(str, place))} {'dropped' if kind is DROPPED else kind!r}"
            yield name, json.dumps(changed(value, place, kind))


def changed(value: Any, place: Place, kind: Any) -> Any:
    """A copy with another value in one place."""
    made = copy.deepcopy(value)
    owner = made
    for key in place[:-1]:
        owner = owner[key]
    if kind is DROPPED:
        del owner[place[-1]]
    else:
        owner[place[-1]] = kind
    return made

"""What an index tells of a page besides its place: metadata of the user's, and what cembed adds, in one JSON object.

Names that start with `cembed:` are cembed's own: `cembed:warning` is why something of the page may be missing,
`cembed:folder` where a relative source starts. Filters see them too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cembed.runtime.errors import CembedError
from cembed.runtime.index.records import Commit
from cembed.runtime.index.texts import MalformedError

RESERVED = "cembed:"
WARNING, FOLDER = "cembed:warning", "cembed:folder"
MAX_TEXT = 1 << 20

_WARNED = f'"{WARNING}":'  # in JSON a quotation mark within a text has a backslash, so this is a name


@dataclass(frozen=True)
class Notes:
    """The user's metadata, and what cembed adds, None where it is not there."""

    metadata: Mapping[str, Any]
    warning: str | None = None
    folder: str | None = None

    def encode(self, page: str) -> str:
        """As JSON, for the page with this id. Raises CembedError: not what JSON can hold, a name that is cembed's."""
        check_metadata(self.metadata)
        added = {name: value for name, value in ((WARNING, self.warning), (FOLDER, self.folder)) if value is not None}
        if not self.metadata and not added:
            return "{}"
        try:
            text = json.dumps({**self.metadata, **added}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            raise CembedError(f"the metadata of page {page!r} cannot be kept as JSON: {error}") from error
        if len(text) > MAX_TEXT:
            raise CembedError(f"the metadata of page {page!r} is longer than {MAX_TEXT}")
        return text

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Notes:
        """What parse_metadata() gives, taken apart."""
        added = {name: fields[name] for name in (WARNING, FOLDER) if isinstance(fields.get(name), str)}
        metadata = {name: value for name, value in fields.items() if name not in added} if added else fields
        return cls(metadata, added.get(WARNING), added.get(FOLDER))


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raises CembedError: a name that is cembed's."""
    if taken := [name for name in metadata if isinstance(name, str) and name.startswith(RESERVED)]:
        raise CembedError(f"metadata {taken[0]!r}: names that start with {RESERVED!r} are cembed's, choose another")


def parse_metadata(commit: Commit, which: int) -> Mapping[str, Any]:
    """One of a record's texts of metadata. Raises MalformedError: not a JSON object."""
    try:
        value = json.loads(commit.metadata[which])
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"metadata is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise MalformedError("metadata is no JSON object")
    return value


def sources_of(commit: Commit, alive: NDArray[np.bool_]) -> Iterator[tuple[str, list[int], str | None]]:
    """Each source of a record's pages that are `alive`, numbers of these pages, and the folder of the last one.

    Raises MalformedError: metadata is no JSON object.
    """
    texts = np.unique(commit.metadatum[alive]).tolist()
    folders = {which: Notes.of(parse_metadata(commit, which)).folder for which in texts}
    order = np.argsort(commit.source, kind="stable")
    order = order[alive[order]]
    edges = np.flatnonzero(np.diff(commit.source[order])) + 1
    for places in np.split(order, edges) if len(order) else ():
        source, folder = commit.sources[commit.source[places[0]]], folders[int(commit.metadatum[places[-1]])]
        yield source, commit.numbers[places].tolist(), folder


def warnings_of(commit: Commit) -> Mapping[int, str]:
    """The warnings in a record's texts of metadata, by their number; texts that are no JSON have none."""
    if not commit.metadata.mention(_WARNED):
        return {}
    found = {}
    for which, text in enumerate(commit.metadata):
        if _WARNED in text and (warning := _warning_in(text)) is not None:
            found[which] = warning
    return found


def _warning_in(text: str) -> str | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return Notes.of(value).warning if isinstance(value, dict) else None


@lru_cache(maxsize=1024)
def canonical(text: str) -> str:
    """The same for objects that differ in the order of their names only. Raises ValueError, RecursionError.

    >>> canonical('{"b":1,"a":true}') == canonical('{"a": true, "b": 1}') != canonical('{"a":1,"b":1}')
    True
    """
    return json.dumps(json.loads(text), sort_keys=True)


def parse_pairs(option: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Metadata that a person wrote: values are JSON where they can be, text otherwise. Raises CembedError.

    >>> parse_pairs("--where", ("year=2024", "lang=de", "title=a=b", "name=NaN"))
    {'year': 2024, 'lang': 'de', 'title': 'a=b', 'name': 'NaN'}
    """
    metadata = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise CembedError(f"{option} {pair!r}: give KEY=VALUE")
        try:
            metadata[key] = json.loads(value, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            metadata[key] = value
    return metadata


def _refuse_constant(name: str) -> float:
    """Python's parser takes NaN and Infinity, which JSON does not have."""
    raise ValueError(name)

"""Checks all of an index: every record and every page's vectors in every tier."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cembed.runtime.errors import CembedError, Check
from cembed.runtime.index.files import CURRENT, orphans, read_current, segment_path
from cembed.runtime.index.segments import Segment
from cembed.runtime.index.views import View

_MANY = 20  # damaged pages of a tier that are named


def verify_index(folder: Path) -> Iterator[Check]:
    """A check for CURRENT, and for each segment one for its log and for each tier; those that fail say what is damaged.

    Raises CembedError: there is no index at all.
    """
    try:
        current = read_current(folder)
    except CembedError as error:
        if not os.path.lexists(folder / CURRENT):
            raise
        yield Check(CURRENT, False, str(error))
        return
    yield Check(CURRENT, True, f"{len(current.segments)} segments{_left_over(len(orphans(folder, current)))}")
    for number in current.segments:
        try:
            segment = Segment(folder, current, number)
        except CembedError as error:
            yield Check(f"segment {number}", False, str(error))
            continue
        yield _check_log(segment, number == current.segments[-1])
        yield from _check_tiers(segment)


def _left_over(files: int) -> str:
    return f", {files} files left over from a writer that was killed" if files else ""


def _check_log(segment: Segment, last: bool) -> Check:
    damage = [*segment.damage]
    if not last and not segment.closed:
        damage.append(f"{segment.path} lacks its end")
    torn = f", {segment.torn} bytes of a write that was not finished" if segment.torn else ""
    good = f"{segment.records} records, {segment.count} pages{torn}"
    return Check(segment.path.name, not damage, "; ".join(damage) or good)


def _check_tiers(segment: Segment) -> Iterator[Check]:
    view = View.of(segment, np.empty(0, np.int64))
    for tier in segment.ends:
        name = segment_path(segment.folder, segment.number, tier).name
        try:
            damage = [_describe(view, tier, page) for page in view.damaged(tier, None)]
        except CembedError as error:
            damage = [str(error)]
        more = f"; and {len(damage) - _MANY} more" if len(damage) > _MANY else ""
        good = f"{len(view)} pages, {segment.ends[tier]:,} bytes"
        yield Check(name, not damage, "; ".join(damage[:_MANY]) + more or good)


def _describe(view: View, tier: str, page: int) -> str:
    removed = "" if view.alive[page] else " (removed)"
    return view.describe(tier, page) + removed

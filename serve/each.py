"""The same for several values, so many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


async def each(function: Callable[[T], Awaitable[R]], values: Sequence[T], at_once: int) -> list[R]:
    """`function` of each value, in their order, `at_once` of them at a time; the first error ends the others."""
    found: dict[int, R] = {}
    left = enumerate(values)

    async def work() -> None:
        for i, value in left:
            found[i] = await function(value)

    tasks = [asyncio.ensure_future(work()) for _ in values[:at_once]]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return [found[i] for i in range(len(found))]

"""Many things at once, but not too many: the one loop behind decisions, routes and exams. It knows tasks, and nothing of what they do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from lmgraph.errors import SettingsError

Item = TypeVar("Item")


async def abreast(work: Callable[[Item], Awaitable[None]], items: Sequence[Item], at_once: int) -> None:
    """Do all items, begun in their order, at most `at_once` at a time.

    The first exception cancels what still runs, starts nothing more and propagates as it is; so does a cancellation from outside.
    Raises SettingsError for less than one at a time.
    """
    if at_once < 1:
        raise SettingsError(f"concurrency is {at_once}, expected at least 1.")
    todo = iter(items)

    async def take() -> None:
        for item in todo:  # one iterator for all: each item is taken once, none waits in a queue
            await work(item)

    tasks = [asyncio.create_task(take()) for _ in range(min(at_once, len(items)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

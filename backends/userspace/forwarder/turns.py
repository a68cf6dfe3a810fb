"""Long work of a worker, in parts, so that its connections have their turn in between.

Lives here: the parts. Must not: know what is done.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

AT_ONCE = 20
"""Places that are changed, about 2 ms, before connections have their turn."""

T = TypeVar("T")


async def in_turns(todo: Sequence[T]) -> AsyncIterator[T]:
    """Yield what there is to be done; connections have their turn after every AT_ONCE of it."""
    for number, one in enumerate(todo, 1):
        yield one
        if number % AT_ONCE == 0:
            await asyncio.sleep(0)

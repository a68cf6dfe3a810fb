"""Waiting for what no event tells of, in asynchronous tests."""

import asyncio
from collections.abc import Callable

DEADLINE_SECONDS = 20.0


async def until(holds: Callable[[], object]) -> None:
    """Let others run until it holds; a TimeoutError where that takes too long."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.002)

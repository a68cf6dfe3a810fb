"""A document that several may ask for at once: made once for all who wait, and kept for a moment.

Lives here: just that. Must not: know what the document says.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """What `make` returns, at most `keep_seconds` old; a stranger who asks often costs little."""

    def __init__(self, make: Callable[[], Awaitable[T]], keep_seconds: float) -> None:
        self._make, self._keep_seconds = make, keep_seconds
        self._task: asyncio.Future[T] | None = None
        self._until = 0.0

    async def get(self) -> T:
        """Return it. Raise what `make` raised; the next call makes it anew."""
        loop = asyncio.get_running_loop()
        if self._task is None or (self._task.done() and not self._is_fresh(loop.time())):
            self._task = asyncio.ensure_future(self._made())
        return await asyncio.shield(self._task)

    def _is_fresh(self, now: float) -> bool:
        failed = self._task is None or self._task.cancelled() or self._task.exception() is not None
        return not failed and now < self._until

    async def _made(self) -> T:
        made = await self._make()
        self._until = asyncio.get_running_loop().time() + self._keep_seconds
        return made

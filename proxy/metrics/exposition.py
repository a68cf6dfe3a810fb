"""The text that Prometheus reads, made when somebody asks.

Lives here: what is asked in which order, and off the event loop. Must not: know any one metric, or
speak HTTP.
"""

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable, Iterator

from vipd.proxy import lean
from vipd.proxy.http.shared import Shared
from vipd.proxy.metrics.subjects import Subjects
from vipd.proxy.status import Status

FRESH_SECONDS = 1.0
"""Whoever asks within it gets the same text: several Prometheus servers are told once."""
_SWITCH_SECONDS = 0.0005
"""How long a thread computes before it lets another one of Python: the event loop must not wait for
5 ms, which is the default, each time that it wakes up while a long text is made."""


class Metrics:
    """Tells what the subjects have counted. `status` returns how the daemon is."""

    def __init__(self, subjects: Subjects, status: Callable[[], Awaitable[Status]]) -> None:
        self._subjects = subjects
        self._status = status
        self._text = Shared(self._make, FRESH_SECONDS)

    async def exposition(self) -> bytes:
        """Return all metrics in Prometheus's text format 0.0.4."""
        return await self._text.get()

    async def stop(self) -> None:
        """End what is under way."""
        await self._subjects.counters.stop()

    async def _make(self) -> bytes:
        if self._subjects.counted is not None:
            await self._subjects.counted.refresh()
        return await asyncio.to_thread(self._write, await self._status())

    def _write(self, status: Status) -> bytes:
        with _yielding():
            lean.with_openssl()  # prometheus-client serves HTTPS, too
            from vipd.proxy.metrics import written

            return written.text(self._subjects, status)


@contextlib.contextmanager
def _yielding() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)

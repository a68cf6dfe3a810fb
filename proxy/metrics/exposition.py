"""The text that Prometheus reads, made when somebody asks.

Lives here: what is asked in which order, and off the event loop. Must not: know any one metric, or
speak HTTP.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Iterator

from vipd.proxy import lean
from vipd.proxy.metrics.subjects import Subjects
from vipd.proxy.status import Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
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
        self._one = asyncio.Lock()
        self._text = b""
        self._made: float | None = None

    async def exposition(self) -> bytes:
        """Return all metrics in Prometheus's text format 0.0.4."""
        async with self._one:
            if self._made is None or time.monotonic() - self._made >= FRESH_SECONDS:
                if self._subjects.counted is not None:
                    await self._subjects.counted.refresh()
                status = await self._status()
                self._text = await asyncio.to_thread(self._write, status)
                self._made = time.monotonic()
            return self._text

    async def stop(self) -> None:
        """End what is under way."""
        await self._subjects.counters.stop()

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

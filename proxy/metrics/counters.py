"""Reading what the serving dataplane counts: off the path of syncs, one reading at a time.

Lives here: when it is read again, and for how long whoever asks waits. Must not: add up
(connections.py), or know what a dataplane counts with.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable

import structlog

from vipd.backends.counts import Tallying
from vipd.proxy.dataplane import Dataplane
from vipd.proxy.errors import DataplaneError
from vipd.proxy.metrics.connections import Connections
from vipd.proxy.virtualserver import Table

SHORTEST_PAUSE_SECONDS = 5.0
"""Between two readings, however short they are."""
SHARE = 0.05
"""Readings take no more than this part of the time."""
PATIENCE_SECONDS = 3.0
"""How long a scrape waits for a reading; after that it tells of the one before."""
LONGEST_SECONDS = 30.0
"""After so long a reading is given up."""

log = structlog.get_logger()


class Counters:
    """Keeps `connections` up to date for whoever asks. `serving` and `table` return what is so."""

    def __init__(
        self,
        connections: Connections,
        serving: Callable[[], Dataplane],
        table: Callable[[], Table],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.connections = connections
        self.failures = 0
        self.took: float | None = None
        """Seconds of the last reading; None before the first."""
        self.read_at: float | None = None
        """When that was, by the clock."""
        self._serving = serving
        self._table = table
        self._clock = clock
        self._due = 0.0
        self._task: asyncio.Task[None] | None = None
        self._failing = ""

    async def refresh(self) -> None:
        """Read if it is time to; return when that is done or takes too long."""
        if self._task is None:
            if self._clock() < self._due:
                return
            self._task = asyncio.ensure_future(self._read())
            self._task.add_done_callback(self._ended)
        await asyncio.wait({self._task}, timeout=PATIENCE_SECONDS)

    async def stop(self) -> None:
        """Wait for no reading any more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def age(self) -> float | None:
        """Return how long ago connections were read; None: never."""
        return None if self.read_at is None else self._clock() - self.read_at

    async def _read(self) -> None:
        dataplane, table = self._serving(), self._table()
        if not isinstance(dataplane.driver, Tallying) or not dataplane.synced:
            return
        began = self._clock()
        reading = self.connections.reading(dataplane.mode)
        why = ""
        try:
            servers = table.virtual_servers()
            await dataplane.driver.tally(servers, reading.take, LONGEST_SECONDS)
            reading.done()
        except DataplaneError as error:
            reading.broken_off()
            self.failures += 1
            why = str(error)
        await asyncio.to_thread(self.connections.keep, self._table())
        if why and why != self._failing:
            log.warning("connections are not counted", mode=dataplane.mode, why=why)
        self._failing = why
        self.read_at = self._clock()
        self.took = self.read_at - began
        self._due = self.read_at + max(SHORTEST_PAUSE_SECONDS, self.took / SHARE)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._task = None
        if not task.cancelled() and task.exception() is not None:
            self.failures += 1
            self._due = self._clock() + LONGEST_SECONDS
            log.error("connections are not counted", why=repr(task.exception()))

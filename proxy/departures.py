"""Endpoints that left: their open flows go on, but not for ever.

Lives here: what left a virtual server, and the wait until its flows are ended. Must not: end flows
itself (who makes `Departures` says how), or know a dataplane.

No dataplane sends a new connection to an endpoint that is not in the table any more. What was open
goes on, until it ends or the deadline of the Service or of the node is reached. An endpoint that is
merely not ready keeps its flows as long as it lives: readiness that comes and goes cuts nobody off.
Flows that hang on an address that does not answer any more go sooner, see stale.py.
Nothing is ended before the commit that takes the endpoint out: a flow would begin anew to it.
Source: KEP-1669 (terminating endpoints).
"""

import asyncio
import contextlib
import heapq
import itertools
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from enum import Enum

import structlog
from msgspec import Struct

from vipd.backends.protocol import Departed
from vipd.proxy.errors import Busy, DataplaneError
from vipd.proxy.names import Address, ServicePortName
from vipd.proxy.snapshot import Snapshot
from vipd.proxy.virtualserver import Changes, Key, Table, VirtualServer

LATE_LOOK_SECONDS = 60.0
"""How often it is looked at whether an endpoint beyond its deadline is still there, and the pause
after a cut that failed."""
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
"""The pause after a cut for which the kernel was busy; it doubles from the first to the longest."""
MOST_PENDING = 100_000
"""Departures that are remembered; flows of more than that go on until they end."""
MOST_STALE = 1000
"""Entries of the queue that mean nothing any more, beyond as many as there are departures."""

Cut = Callable[[Sequence[Departed]], Awaitable[int]]
"""Ends the flows of departed endpoints and returns how many there were."""
Spot = tuple[Address, int]
"""Address and port of an endpoint."""

log = structlog.get_logger()


class Standing(Enum):
    """How an endpoint stands in its service's slices, whether or not it is chosen."""

    THERE = "there"
    TERMINATING = "terminating"
    GONE = "gone"


class Departure(Struct, frozen=True):
    """An endpoint that left a virtual server, and how long its flows have."""

    departed: Departed
    owner: ServicePortName
    drain_seconds: float


def departures(before: Table, changes: Changes, drain_seconds: float) -> Iterator[Departure]:
    """Yield the endpoints that the changes take from virtual servers that go on.

    The flows of a virtual server that is gone itself are not ended: nobody said their endpoints
    are. `drain_seconds` counts where the Service says nothing.
    """
    for key, server in changes.virtual_servers.items():
        claims = before.claims.get(key)
        if server is None or not claims or claims[0].owner != server.owner:
            continue
        seconds = drain_seconds if server.drain_seconds is None else float(server.drain_seconds)
        for address, port in _spots(claims[0]) - _spots(server):
            yield Departure(Departed(key, address, port), server.owner, seconds)


def standings(snapshot: Snapshot, owner: ServicePortName) -> dict[Spot, Standing]:
    """Return how each endpoint of a service's port stands; those that are gone are not in it."""
    found: dict[Spot, Standing] = {}
    for one in snapshot.slices.get(owner.service, ()):
        numbers = [
            port.port
            for port in one.ports
            if port.name == owner.port and port.protocol is owner.protocol
        ]
        for endpoint in one.endpoints:
            for number in numbers:
                spot = (endpoint.address, number)
                if not endpoint.terminating:
                    found[spot] = Standing.THERE
                else:
                    found.setdefault(spot, Standing.TERMINATING)
    return found


def _spots(server: VirtualServer) -> set[Spot]:
    return {(one.address, one.port) for one in (*server.cluster, *server.local)}


class _Pending(Struct):
    """A departure that waits; `look_at` is set once the dataplane has taken the endpoint out."""

    owner: ServicePortName
    deadline: float
    look_at: float | None = None


class Departures:
    """Remembers departures and ends their flows at the deadline. One task runs it.

    `now` returns the snapshot and table as they are.
    """

    def __init__(
        self,
        drain_seconds: float,
        cut: Cut,
        now: Callable[[], tuple[Snapshot, Table]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.drain_seconds = drain_seconds
        """Counts for those that leave from now on."""
        self.flows_cut = 0
        """Flows that were ended, since the start."""
        self._cut = cut
        self._now = now
        self._clock = clock
        self._pending: dict[Key, dict[Spot, _Pending]] = {}
        self._size = 0
        self._queue: list[tuple[float, int, Key, Spot]] = []
        """A heap by `look_at`; the number only keeps keys from being compared. An entry of one that
        came back stays until its time comes, or there are too many of them."""
        self._number = itertools.count()
        self._sooner = asyncio.Event()
        self._pause = FIRST_PAUSE_SECONDS
        self._overflowed = False

    @property
    def pending(self) -> int:
        """Return how many endpoints may still have flows from before they left."""
        return self._size

    def note(self, before: Table, changes: Changes) -> None:
        """Remember what the changes take away, and forget what they bring back. O(change)."""
        for key, server in changes.virtual_servers.items():
            if server is not None and key in self._pending:
                for spot in self._pending[key].keys() & _spots(server):
                    self._drop(key, spot)
        if self._size <= MOST_PENDING // 2:
            self._overflowed = False
        now = self._clock()
        for one in departures(before, changes, self.drain_seconds):
            if self._size >= MOST_PENDING:
                if not self._overflowed:
                    log.warning("too many departures", remembered=MOST_PENDING)
                self._overflowed = True
                return
            waiting = self._pending.setdefault(one.departed.key, {})
            spot = (one.departed.address, one.departed.port)
            self._size += spot not in waiting
            waiting[spot] = _Pending(one.owner, now + one.drain_seconds)

    def committed(self, keys: Collection[Key]) -> None:
        """Say that these are programmed: no flow begins at what they lost. O(keys)."""
        now = self._clock()
        for key in keys if self._pending else ():
            for spot, one in self._pending.get(key, {}).items():
                if one.look_at is None:
                    self._look(key, spot, one, max(now, one.deadline))
                    self._sooner.set()
        if len(self._queue) > 2 * self._size + MOST_STALE:
            self._rebuild_queue()

    async def run(self) -> None:
        """End flows as their deadlines come, until cancelled."""
        while True:
            self._sooner.clear()
            await self.end_due()
            left = max(0.0, self._queue[0][0] - self._clock()) if self._queue else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._sooner.wait()

    async def end_due(self) -> None:
        """End the flows of those whose time has come and who are not there any more."""
        due = self._due()
        if not due:
            return
        # Out of the way first: an endpoint may come back, and leave again, while flows are cut.
        waited = [self._drop(one.key, (one.address, one.port)) for one in due]
        try:
            flows = await self._cut(due)
        except DataplaneError as error:
            log.warning("flows of departed endpoints go on for now", why=str(error))
            later = self._clock() + self._after(error)
            for departed, one in zip(due, waited, strict=True):
                self._put_back(departed, one, later)
            return
        self._pause = FIRST_PAUSE_SECONDS
        self.flows_cut += flows
        if flows:
            log.info("flows of departed endpoints ended", endpoints=len(due), flows=flows)

    def _after(self, error: DataplaneError) -> float:
        """Return how many seconds after an error the cut is tried again."""
        if not isinstance(error, Busy):
            return LATE_LOOK_SECONDS
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return pause

    def _due(self) -> list[Departed]:
        """Return what is to be cut now; what is to be looked at again later waits on."""
        now, due = self._clock(), []
        snapshot, _ = self._now()
        known: dict[ServicePortName, dict[Spot, Standing]] = {}
        while self._queue and self._queue[0][0] <= now:
            look_at, _, key, spot = heapq.heappop(self._queue)
            one = self._pending.get(key, {}).get(spot)
            if one is None or one.look_at != look_at:
                continue  # it came back meanwhile
            if one.owner not in known:
                known[one.owner] = standings(snapshot, one.owner)
            if known[one.owner].get(spot, Standing.GONE) is Standing.THERE:
                self._look(key, spot, one, now + LATE_LOOK_SECONDS)
            else:
                due.append(Departed(key, *spot))
        return due

    def _look(self, key: Key, spot: Spot, one: _Pending, at: float) -> None:
        one.look_at = at
        heapq.heappush(self._queue, (at, next(self._number), key, spot))

    def _rebuild_queue(self) -> None:
        self._queue = [
            (one.look_at, next(self._number), key, spot)
            for key, waiting in self._pending.items()
            for spot, one in waiting.items()
            if one.look_at is not None
        ]
        heapq.heapify(self._queue)

    def _put_back(self, departed: Departed, one: _Pending, look_at: float) -> None:
        waiting = self._pending.setdefault(departed.key, {})
        spot = (departed.address, departed.port)
        if spot not in waiting:
            waiting[spot] = one
            self._size += 1
            self._look(departed.key, spot, one, look_at)

    def _drop(self, key: Key, spot: Spot) -> _Pending:
        waiting = self._pending[key]
        self._size -= 1
        one = waiting.pop(spot)
        if not waiting:
            del self._pending[key]
        return one

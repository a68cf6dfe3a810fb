"""Endpoints that left: their open flows go on, but not for ever.

Lives here: what left a virtual server, and the wait until its flows are ended. Must not: end flows
itself (who makes `Departures` says how), or know a dataplane.

No dataplane sends a new connection to an endpoint that is not in the table any more. What was open
goes on, until it ends or the deadline of the Service or of the node is reached. An endpoint that is
merely not ready keeps its flows as long as it lives: readiness that comes and goes cuts nobody off.
Source: KEP-1669 (terminating endpoints).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import structlog
from msgspec import Struct

from vipd.backends.protocol import Departed
from vipd.proxy.errors import DataplaneError
from vipd.proxy.names import Address, NamespacedName
from vipd.proxy.snapshot import Snapshot
from vipd.proxy.virtualserver import Changes, Table, VirtualServer

MOST_PENDING = 100_000
"""Departures that are remembered; flows of more than that go on until they end."""

Cut = Callable[[Sequence[Departed]], Awaitable[int]]
"""Ends the flows of departed endpoints and returns how many there were."""

log = structlog.get_logger()


class Departure(Struct, frozen=True):
    """An endpoint that left a virtual server of a service, and how long its flows have."""

    departed: Departed
    service: NamespacedName
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
        for address, port in _places(claims[0]) - _places(server):
            yield Departure(Departed(key, address, port), server.owner.service, seconds)


def is_back(table: Table, departed: Departed) -> bool:
    """Return whether the virtual server has the endpoint again, so that nothing is to be ended."""
    claims = table.claims.get(departed.key)
    return claims is not None and (departed.address, departed.port) in _places(claims[0])


def lives(snapshot: Snapshot, service: NamespacedName, address: Address) -> bool:
    """Return whether the service still tells of the endpoint, and not that it terminates."""
    return any(
        one.address == address and not one.terminating
        for told in snapshot.slices.get(service, ())
        for one in told.endpoints
    )


def _places(server: VirtualServer) -> set[tuple[Address, int]]:
    return {(one.address, one.port) for one in (*server.cluster, *server.local)}


class Departures:
    """Remembers departures and ends their flows at the deadline. One task runs it."""

    def __init__(
        self,
        drain_seconds: float,
        cut: Cut,
        now: Callable[[], tuple[Snapshot, Table]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.flows_cut = 0
        """Flows that were ended at a deadline, since the start."""
        self._drain_seconds = drain_seconds
        self._cut = cut
        self._now = now
        self._clock = clock
        self._deadlines: dict[Departed, tuple[float, Departure]] = {}
        self._sooner = asyncio.Event()

    @property
    def pending(self) -> int:
        """Return how many endpoints may still have flows from before they left."""
        return len(self._deadlines)

    def note(self, before: Table, changes: Changes) -> None:
        """Remember what the changes take away."""
        for one in departures(before, changes, self._drain_seconds):
            if len(self._deadlines) >= MOST_PENDING:
                log.warning("too many departures", remembered=MOST_PENDING)
                return
            self._deadlines[one.departed] = (self._clock() + one.drain_seconds, one)
            self._sooner.set()

    async def run(self) -> None:
        """End flows as their deadlines come, until cancelled."""
        while True:
            left = self._next()
            self._sooner.clear()
            try:
                async with asyncio.timeout(left):
                    await self._sooner.wait()
            except TimeoutError:
                await self.end_due()

    def _next(self) -> float | None:
        """Return the seconds to the next deadline, or None where there is none."""
        if not self._deadlines:
            return None
        return max(0.0, min(when for when, _ in self._deadlines.values()) - self._clock())

    async def end_due(self) -> None:
        """End the flows of those whose deadline has come and who are not back."""
        now = self._clock()
        due = [(one, told) for one, (when, told) in self._deadlines.items() if when <= now]
        snapshot, table = self._now()
        gone = []
        for one, told in due:
            del self._deadlines[one]
            if is_back(table, one):
                continue
            if lives(snapshot, told.service, one.address):
                self._deadlines[one] = (now + max(1.0, told.drain_seconds), told)
            else:
                gone.append(one)
        if not gone:
            return
        try:
            flows = await self._cut(gone)
        except DataplaneError as error:
            log.warning("flows of departed endpoints go on", why=str(error))
            return
        self.flows_cut += flows
        if flows:
            log.info("flows ended at their deadline", endpoints=len(gone), flows=flows)

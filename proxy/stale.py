"""Flows that lead nowhere, and when they are forgotten.

Lives here: which virtual servers are looked at, when, and who may answer for them. Must not: touch
connection tracking itself, or end flows that still lead somewhere (departures.py does, in time).

The kernel decides about translation once, at the first packet of a flow; every further packet
renews the entry. So a client that keeps its port never gets away by itself from

- an address that was not served when it began (kubernetes/kubernetes#48370, #48719, #114668): the
  untranslated entry is forgotten as soon as the virtual server is programmed, unless it was
  answered;
- an endpoint that does not serve any more (#125467, #101968): entries of UDP and SCTP, and those
  of TCP that wait for their first answer, are forgotten a second after the commit. One that
  terminates and still serves is living, wherever it runs and whatever policies say; so flows go on
  to it until it stops, or until its deadline (departures.py).

The first commit of a daemon is a look at everything, by which nothing of the living goes: what
left while no daemon ran is found (#122740).
"""

import asyncio
import contextlib
import functools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

import structlog
from msgspec import Struct

from vipd.proxy.errors import DataplaneError, Unsupported
from vipd.proxy.measured import SYNC_SECONDS, Distribution
from vipd.proxy.model import EndpointSlice, SliceEndpoint
from vipd.proxy.names import Address, Family, NamespacedName, Protocol, ServicePortName
from vipd.proxy.snapshot import Snapshot, Touched
from vipd.proxy.virtualserver import Changes, Key, Table, VirtualServer

GRACE_SECONDS = 1.0
"""How long the flows of an endpoint that stopped serving stay after the commit: for answers that
are under way (kubernetes/kubernetes#45976). What stops meanwhile is looked for at the same time, so
it is also the shortest time between two looks."""
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
"""Before another look where the kernel was busy; the pause doubles from the first to the longest.
"""
REST = 9
"""Times as long as a look took, before the next one: a large table takes a tenth of a processor."""

Spot = tuple[Address, int]
"""Address and port of an endpoint."""
Alive = Callable[[Key], Collection[Spot]]
"""Returns who may answer for a virtual server; from whatever thread."""
Forget = Callable[[Collection[Key], Alive, Collection[Spot] | None], Awaitable[int]]
"""Deletes what leads nowhere of these virtual servers, and counts it: where spots are given, what
leads to these and they are not alive; else what leads to anybody not alive, or was not answered
before there was anybody."""

log = structlog.get_logger()


class _Lost(Struct):
    """Endpoints of a service that stopped serving, and when the last of it was heard of."""

    since: float
    spots: set[Spot]


class StaleFlows:
    """Waits for commits, then forgets the flows that they left behind. One task runs it.

    Off the path of a sync: no commit waits for it. `now` returns the snapshot and table as they
    are.
    """

    def __init__(
        self,
        forget: Forget,
        now: Callable[[], tuple[Snapshot, Table]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.deleted: Counter[Family] = Counter()
        """Entries that were forgotten, since the start."""
        self.took = {family: Distribution(SYNC_SECONDS) for family in Family}
        """Seconds of each look."""
        self._forget, self._now, self._clock = forget, now, clock
        self._begun = False
        """Whether there was a commit. The first is about everything."""
        self._uncommitted: set[Key] = set()
        self._on: set[Key] = set()
        """Switched on or taken over by what is not committed yet."""
        self._due: set[Key] = set()
        self._lost: dict[NamespacedName, _Lost] = {}
        self._sooner = asyncio.Event()
        self._pause = FIRST_PAUSE_SECONDS

    def folded(self, before: Snapshot, after: Snapshot, touched: Touched) -> None:
        """Remember whose endpoints stopped serving. O(change)."""
        for name in touched.services if self._begun else ():
            spots = stopped(before.slices.get(name, ()), after.slices.get(name, ()))
            if spots:
                self._lose(name, spots)

    def note(self, before: Table, changes: Changes) -> None:
        """Remember what the changes switch on or give to another service. O(change)."""
        self._uncommitted.update(changes.virtual_servers)
        self._on |= taken(before, changes) if self._begun else changes.virtual_servers.keys()

    def committed(self, keys: Collection[Key]) -> None:
        """Say that these are programmed. The first time, nobody knows what was served before."""
        if not self._begun:
            # Of what was rejected, too: it may be accepted later.
            self._on.update(self._now()[1].claims, keys)
            self._begun = True
        due = self._on.intersection(keys)
        self._uncommitted.difference_update(keys)
        self._on -= due
        self._due |= due
        claims = self._now()[1].claims if self._lost else {}
        for key in keys if claims else ():
            lost = self._lost.get(claims[key][0].owner.service) if key in claims else None
            if lost is not None:
                lost.since = self._clock()
        if self._due or self._lost:
            self._sooner.set()

    async def run(self) -> None:
        """Forget, one look at a time; until cancelled."""
        while True:
            self._sooner.clear()
            started = time.perf_counter()
            if await self.look():
                self._pause = FIRST_PAUSE_SECONDS
                await asyncio.sleep(REST * (time.perf_counter() - started))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._until_next()):
                        await self._sooner.wait()
            else:
                await asyncio.sleep(self._pause)
                self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)

    async def look(self) -> bool:
        """Forget what is due now; return whether that is done, or has to be tried again."""
        due, self._due = self._due, set()
        lost = self._ripe()
        if not due and not lost:
            return True
        try:
            await self._forget_all(due, lost)
        except Unsupported as error:
            log.warning("stale flows are not forgotten", why=str(error))
        except DataplaneError as error:
            if self._pause == FIRST_PAUSE_SECONDS:
                log.warning("stale flows are not forgotten yet", why=str(error))
            self._due |= due
            for name, one in lost.items():
                self._lose(name, one.spots)
            return False
        return True

    def _lose(self, name: NamespacedName, spots: set[Spot]) -> None:
        lost = self._lost.setdefault(name, _Lost(0.0, set()))
        lost.spots |= spots
        lost.since = self._clock()
        self._sooner.set()

    def _ripe(self) -> dict[NamespacedName, _Lost]:
        """Take what was lost a while ago.

        What of these services is not programmed yet, or was rejected, is looked at when it is.
        """
        due = self._clock() - GRACE_SECONDS
        ripe = {name: one for name, one in self._lost.items() if one.since <= due}
        for name in ripe:
            del self._lost[name]
            self._on |= self._uncommitted & _keys(self._now()[1], name)
        return ripe

    def _until_next(self) -> float | None:
        """Return how many seconds are left until something is ripe, if anything will be."""
        due = self._clock() - GRACE_SECONDS
        return min((max(0.0, one.since - due) for one in self._lost.values()), default=None)

    async def _forget_all(self, due: set[Key], lost: Mapping[NamespacedName, _Lost]) -> None:
        snapshot, table = self._now()
        later = {name: frozenset(one.spots) for name, one in self._lost.items()}

        @functools.cache
        def alive(key: Key) -> Collection[Spot]:
            owner = table.claims[key][0].owner
            found = serving(snapshot.slices.get(owner.service, ()), owner, key.family)
            return found | later.get(owner.service, frozenset())

        due = {key for key in due if key in table.claims}
        those = {key for name in lost for key in _keys(table, name)} - due - self._uncommitted
        spots = {spot for one in lost.values() for spot in one.spots}
        for family in Family:
            every = {key for key in due if key.family is family}
            some = {key for key in those if key.family is family}
            if not every and not some:
                continue
            started = time.perf_counter()
            flows = 0
            if every:
                flows += await self._forget(every, alive, None)
            if some:
                flows += await self._forget(some, alive, spots)
            seconds = time.perf_counter() - started
            self.took[family].observe(seconds)
            self.deleted[family] += flows
            if flows:
                milliseconds = round(seconds * 1000, 1)
                log.info("stale flows forgotten", family=str(family), flows=flows, ms=milliseconds)


def taken(before: Table, changes: Changes) -> set[Key]:
    """Return the virtual servers that have endpoints now, and had none, or were another service's.

    Those that were not there are among them: their address may have been in use before.
    """
    on = set()
    for key, server in changes.virtual_servers.items():
        if server is None or not _serves(server):
            continue
        claims = before.claims.get(key)
        if not claims or not _serves(claims[0]) or claims[0].owner != server.owner:
            on.add(key)
    return on


def stopped(before: Sequence[EndpointSlice], after: Sequence[EndpointSlice]) -> set[Spot]:
    """Return where somebody served by the one set of slices, and nobody does by the other."""
    gone = [one for one in before if not any(one is other for other in after)]
    come = [one for one in after if not any(one is other for other in before)]
    return {spot for *_, spot in _spots(gone, _is_serving) - _spots(come, _is_serving)}


def serving(
    slices: Iterable[EndpointSlice], owner: ServicePortName, family: Family
) -> frozenset[Spot]:
    """Return who may answer for a port of a service: all that serve, on whatever node.

    Where none does, all that are there: nobody could answer in their place.
    """
    theirs = [one for one in slices if one.family is family and not one.headless]
    port = (owner.port, owner.protocol)
    for wanted in (_is_serving, _is_there):
        found = {spot for *of, spot in _spots(theirs, wanted) if tuple(of) == port}
        if found:
            return frozenset(found)
    return frozenset()


def _is_serving(told: SliceEndpoint) -> bool:
    return told.ready or told.serving


def _is_there(told: SliceEndpoint) -> bool:
    return True


def _spots(
    slices: Iterable[EndpointSlice], wanted: Callable[[SliceEndpoint], bool]
) -> set[tuple[str, Protocol, Spot]]:
    return {
        (port.name, port.protocol, (told.address, port.port))
        for one in slices
        for told in one.endpoints
        if wanted(told)
        for port in one.ports
    }


def _serves(server: VirtualServer) -> bool:
    return bool(server.cluster or server.local)


def _keys(table: Table, service: NamespacedName) -> set[Key]:
    """Return the virtual servers that are a service's, and not another's that claims them, too."""
    wanted = table.by_service.get(service, ())
    return {one.key for one in wanted if table.claims[one.key][0].owner.service == service}

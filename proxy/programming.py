"""What is measured on the way from an event to the kernel: changes, syncs, their stages and times.

Lives here: the numbers, over all dataplanes since the daemon's start. Must not: know how they are
shown (metrics/), or commit anything. Costs O(change), and nothing where nothing happens.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from vipd.proxy.events import Applied, Deleted, Event, Kind, OwnAddresses
from vipd.proxy.measured import SYNC_SECONDS, Distribution
from vipd.proxy.model import EndpointSlice, Namespace, Node, Pod, Service, ServiceCIDR
from vipd.proxy.names import Family, NamespacedName
from vipd.proxy.snapshot import Snapshot
from vipd.proxy.virtualserver import Changes, Key, Table

NETWORK_PROGRAMMING_SECONDS = (
    0.25, 0.5, *map(float, range(1, 60)), *map(float, range(60, 120, 5)),
    *map(float, range(120, 301, 30)),
)  # fmt: skip
"""As kube-proxy's (pkg/proxy/metrics/metrics.go, v1.36)."""
MOST_WAITING = 10_000
"""Triggers that wait for their commit; where there are more, those that wait longest are forgotten,
so that services which are never committed (rejected ones) keep nothing from being measured."""
MOST_WAITING_EACH = 16
"""The same of one service and family; more than the first of them are not measured."""

KINDS: Mapping[type, Kind] = {
    Service: Kind.SERVICE,
    EndpointSlice: Kind.ENDPOINT_SLICE,
    Pod: Kind.POD,
    Node: Kind.NODE,
    Namespace: Kind.NAMESPACE,
    ServiceCIDR: Kind.SERVICE_CIDR,
}
"""The kind of each type of object."""

Waiting = dict[tuple[NamespacedName, Family], list[float]]


class Stage(StrEnum):
    """A part of a sync."""

    OBSERVE = "observe"
    """Waiting for what the kernel has."""
    PLAN = "plan"
    """Compiling, and planning the difference."""
    COMMIT = "commit"


class Kinds(NamedTuple):
    """What kind of sync it was, and of which mode."""

    mode: str
    full: bool


class Changed:
    """Events about one kind of object: how many there were, and how many no sync has begun with."""

    def __init__(self) -> None:
        self.total = 0
        self.taken = 0

    @property
    def pending(self) -> int:
        """Return how many came since the last sync began."""
        return self.total - self.taken


class Programming:
    """Counts what is programmed. `started` is when the daemon did, `clock` what tells the time:
    seconds since the epoch."""

    def __init__(
        self, started: float | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.started = clock() if started is None else started
        self.changes = {Kind.SERVICE: Changed(), Kind.ENDPOINT_SLICE: Changed()}
        self.last_event: dict[str, float] = {}
        """When something was last told of a kind, by its name."""
        self.latency: dict[Family, Distribution] = {}
        """From a change of endpoints, as its controller stamped it, to its commit: seconds."""
        self.syncs: dict[tuple[Family, bool], Distribution] = {}
        """Seconds of syncs that concerned a family, the full ones apart."""
        self.synced_at: dict[Family, float] = {}
        self.queued_at: dict[Family, float] = {}
        """When something was last to be programmed."""
        self.counts: Counter[bool] = Counter()
        """Syncs, the full ones apart, whatever family they concerned."""
        self.failed_syncs: Counter[Kinds] = Counter()
        self.failures: Counter[tuple[Kinds, Family]] = Counter()
        """The same by family: syncs that were given up, to be tried again."""
        self.stages = {one: Distribution(SYNC_SECONDS) for one in Stage}
        self.objects = 0
        """Kernel objects that were added or removed."""
        self._clock = clock
        self._fresh: Waiting = {}
        self._waiting: Waiting = {}
        self._size = 0

    # What comes in

    def told(self, events: Sequence[Event], before: Snapshot, *, listed: bool) -> None:
        """Note events; their triggers matter once everything has been listed."""
        self._fresh = {}
        kinds: Counter[Kind] = Counter()
        # By type first, as kinds hash slowly, and the first list has 100,000 objects.
        applied = Counter(type(one.object) for one in events if isinstance(one, Applied))
        for of, number in applied.items():
            kinds[KINDS[of]] += number
        kinds.update(one.kind for one in events if isinstance(one, Deleted))
        now = self._clock()
        for kind, number in kinds.items():
            self.last_event[kind.value] = now
            if kind in self.changes:
                self.changes[kind].total += number
        if any(isinstance(one, OwnAddresses) for one in events):
            self.last_event["Address"] = now
        if listed and EndpointSlice in applied:
            for one in events:
                if isinstance(one, Applied) and isinstance(one.object, EndpointSlice):
                    self._trigger(one.object, before)

    def _trigger(self, one: EndpointSlice, before: Snapshot) -> None:
        if one.triggered is None or one.triggered.timestamp() < self.started:
            return
        known = before.slices.get(one.service, ())
        if not any(one.name == old.name and one.triggered == old.triggered for old in known):
            times = self._fresh.setdefault((one.service, one.family), [])
            times.append(one.triggered.timestamp())

    def updated(self, before: Table, changes: Changes) -> None:
        """Note what the last events made of the table; what they did not change is no latency."""
        if self._waiting:
            self._gone(before, changes)
        for key, server in changes.virtual_servers.items() if self._fresh else ():
            if server is None:
                continue
            place = (server.owner.service, key.family)
            if times := self._fresh.pop(place, None):
                waiting = self._waiting.setdefault(place, [])
                more = times[: MOST_WAITING_EACH - len(waiting)]
                waiting += more
                self._size += len(more)
        while self._size > MOST_WAITING:
            self._forget(next(iter(self._waiting)))

    def _gone(self, before: Table, changes: Changes) -> None:
        """Forget triggers of what nobody commits any more."""
        for key, server in changes.virtual_servers.items():
            claims = before.claims.get(key)
            if claims and (server is None or server.owner.service != claims[0].owner.service):
                self._forget((claims[0].owner.service, key.family))

    def _forget(self, place: tuple[NamespacedName, Family]) -> list[float]:
        times = self._waiting.pop(place, [])
        self._size -= len(times)
        return times

    # What dataplanes say

    def queued(self, keys: Iterable[Key]) -> None:
        """Say that these are to be programmed."""
        now = self._clock()
        for family in families(keys):
            self.queued_at[family] = now

    def begun(self) -> None:
        """Say that a sync begins with everything that is known."""
        for one in self.changes.values():
            one.taken = one.total

    @contextlib.contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Measure a stage that succeeds."""
        began = time.perf_counter()
        yield
        self.stages[stage].observe(time.perf_counter() - began)

    def synced(self, keys: Collection[Key], seconds: float, objects: int, *, full: bool) -> None:
        """Say that a sync of these has succeeded."""
        now = self._clock()
        self.objects += objects
        self.counts[full] += 1
        for family in families(keys):
            self.synced_at[family] = now
            self.syncs.setdefault((family, full), Distribution(SYNC_SECONDS)).observe(seconds)

    def failed(self, kinds: Kinds, keys: Collection[Key]) -> None:
        """Say that a sync of these has failed as a whole."""
        self.failed_syncs[kinds] += 1
        self.failures.update((kinds, family) for family in families(keys))

    def committed(self, keys: Collection[Key], table: Table) -> None:
        """Say that these are in the kernel as the table has them."""
        if not self._waiting:
            return
        now = self._clock()
        for key in keys:
            claims = table.claims.get(key)
            place = (claims[0].owner.service, key.family) if claims else None
            for at in self._forget(place) if place is not None else ():
                self.latency.setdefault(
                    key.family, Distribution(NETWORK_PROGRAMMING_SECONDS)
                ).observe(max(0.0, now - at))


def families(keys: Iterable[Key]) -> set[Family]:
    """Return the families of keys; that of a node without any is IPv4."""
    return {key.family for key in keys} or {Family.IPV4}

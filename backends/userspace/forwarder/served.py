"""One place in a worker: who may connect, and which endpoint each connection gets.

Lives here: the state of a place, put together of balance, affinity and health, and what operators
are shown of it. Pure: the clock and the chance are given. Must not: know sockets.

The rules are cheap for those who have none: a place without source ranges, whose endpoints are the
same for everyone, never parses an address of a client.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from msgspec import Struct

from vipd.backends.userspace.forwarder.affinity import Affinity
from vipd.backends.userspace.forwarder.balance import (
    Balance,
    Chance,
    Load,
    Spot,
    balance,
    spot_of,
)
from vipd.backends.userspace.forwarder.health import Health
from vipd.backends.userspace.forwarder.sources import Sources
from vipd.backends.userspace.objects import Forwarding, Place, Surroundings
from vipd.proxy.names import Protocol
from vipd.proxy.virtualserver import Endpoint


class EndpointReport(Struct, frozen=True, kw_only=True):
    """An endpoint as operators see it."""

    address: str
    port: int
    connections: int
    """Open now; sessions, for UDP."""
    so_far: int
    """Established since the worker began to serve the place."""
    failures: int
    """Refused or timed out since then."""
    set_aside_until: float | None = None
    """On the monotonic clock; None: it is in use. A trial may already be due or under way."""
    departed: bool = False
    """No endpoint of the place any more; its connections go on."""


class ServedReport(Struct, frozen=True, kw_only=True):
    """A place as operators see it; all counters are since the worker began to serve it."""

    endpoints: tuple[EndpointReport, ...]
    so_far: int
    """Connections or sessions that were established, of endpoints that left too."""
    denied: int
    """Connections of sources that are not allowed. One datagram of UDP is one."""
    unserved: int
    """Connections that found no endpoint at all."""
    remembered: int
    """Clients that are remembered for affinity."""
    forgotten: int
    """Clients that were forgotten before their time, for lack of room."""


class _Side:
    """The endpoints for the sources of one side, and whose turn it is among them."""

    def __init__(self, endpoints: tuple[Endpoint, ...], choice: Balance) -> None:
        self.endpoints = endpoints
        self.choice = choice
        self._by_spot: dict[Spot, Endpoint] | None = None

    def find(self, spot: Spot) -> Endpoint | None:
        if self._by_spot is None:
            self._by_spot = {spot_of(one): one for one in self.endpoints}
        return self._by_spot.get(spot)


class Served:
    """The state of one place: what is asked for each new connection, and told of each.

    After a `choose` that returned an endpoint, one of `began`, `failed` and `withdrawn`; `ended`
    after `began`. `client` is an address as accept() and recvfrom() return it; `now` is the
    monotonic clock, in seconds.
    """

    def __init__(
        self,
        place: Place,
        forwarding: Forwarding,
        surroundings: Surroundings,
        chance: Chance,
    ) -> None:
        self.place = place
        self.forwarding = forwarding
        self._chance = chance
        self._loads: dict[Spot, Load] = {}
        self._health = Health()
        self._affinity: Affinity | None = None
        self._so_far = 0
        self._denied = 0
        self._unserved = 0
        self._sources = Sources(forwarding, surroundings, place.address)
        self._inside, self._outside = self._sides(forwarding, None)
        self._take(forwarding)

    def update(self, forwarding: Forwarding, surroundings: Surroundings) -> None:
        """Serve like this from now on. What is known of endpoints that stay is kept."""
        before, self.forwarding = self.forwarding, forwarding
        self._sources = Sources(forwarding, surroundings, self.place.address)
        if (before.algorithm, before.inside, before.outside) != (
            forwarding.algorithm,
            forwarding.inside,
            forwarding.outside,
        ):
            self._inside, self._outside = self._sides(forwarding, (self._inside, self._outside))
        self._take(forwarding)

    def allows(self, client: str) -> bool:
        """Return whether the source may connect at all."""
        if self._sources.allows(client):
            return True
        self._denied += 1
        return False

    @property
    def asks_interface(self) -> bool:
        """Whether `came_by` has to be called before `choose`."""
        return self._sources.asks_interface

    def came_by(self, client: str, interface: str) -> None:
        """Note the interface that a client came in by."""
        self._sources.came_by(client, interface)

    def choose(
        self, client: str, client_port: int, now: float, tried: Sequence[Endpoint] = ()
    ) -> Endpoint | None:
        """Return the endpoint for a new connection; None: there is none (left).

        Endpoints of `tried` are not returned; those set aside only where no other is left.
        """
        side = self._inside if self._sources.is_inside(client) else self._outside
        if not tried and not self._health and self._affinity is None:  # nearly always
            chosen = side.choice.choose(client, client_port, frozenset())
            if chosen is None:
                self._unserved += 1
            else:
                self._load(chosen).pending += 1
            return chosen
        refused = {spot_of(one) for one in tried}
        passed = refused | self._health.passed_over(now) if self._health else refused
        chosen = self._held(side, client, now, passed)
        if chosen is None:
            chosen = side.choice.choose(client, client_port, passed)
        if chosen is None and len(passed) > len(refused):
            chosen = side.choice.choose(client, client_port, refused)
        if chosen is None:
            self._unserved += not tried
            return None
        self._load(chosen).pending += 1
        spot = spot_of(chosen)
        if self._health:
            self._health.chosen(spot, now)
        if self._affinity is not None:
            # Now, not when it is established: a client may open several at once.
            self._affinity.stays(client, spot, now)
        return chosen

    def shows(self, client: str, endpoint: Endpoint) -> bool:
        """Return whether the endpoint may see the client's address."""
        return self._sources.shows(client, endpoint.address)

    def began(self, client: str, endpoint: Endpoint, now: float) -> None:
        """Note an established connection, or a new session."""
        spot = spot_of(endpoint)
        load = self._load(endpoint)
        _settle(load)
        load.connections += 1
        load.so_far += 1
        self._so_far += 1
        if self._affinity is not None:
            self._affinity.stays(client, spot, now)
        if self._health and self.place.protocol is not Protocol.UDP:
            self._health.succeeded(spot)

    def withdrawn(self, endpoint: Endpoint) -> None:
        """Note that a choice came to nothing, which says nothing of the endpoint."""
        load = self._load(endpoint)
        _settle(load)
        self._forget(spot_of(endpoint), load)

    def takes_over(
        self, client: str, endpoint: Endpoint, now: float, *, pending: bool = False
    ) -> None:
        """Note a connection or session of whatever served the place before.

        It is open, or `pending`: chosen for. It is not counted as one that began here.
        """
        load = self._load(endpoint)
        if pending:
            load.pending += 1
        else:
            load.connections += 1
        if self._affinity is not None:
            self._affinity.stays(client, spot_of(endpoint), now)

    def answered(self, endpoint: Endpoint) -> None:
        """Note that an endpoint of UDP lives: there, a session that began proves nothing."""
        if self._health:
            self._health.succeeded(spot_of(endpoint))

    def ended(self, endpoint: Endpoint) -> None:
        """Note that a connection or session that began is over."""
        load = self._load(endpoint)
        load.connections = max(0, load.connections - 1)
        self._forget(spot_of(endpoint), load)

    def failed(self, endpoint: Endpoint, now: float) -> None:
        """Note that a connection was refused or timed out."""
        spot = spot_of(endpoint)
        load = self._load(endpoint)
        _settle(load)
        load.failures += 1
        if self.forwarding.sets_aside:
            self._health.failed(spot, now)
        self._forget(spot, load)

    def told(self) -> ServedReport:
        """Return what operators are shown."""
        kept = self._affinity
        there = {spot_of(one) for one in (*self._inside.endpoints, *self._outside.endpoints)}
        return ServedReport(
            endpoints=tuple(
                EndpointReport(
                    address=str(load.endpoint.address),
                    port=load.endpoint.port,
                    connections=load.connections,
                    so_far=load.so_far,
                    failures=load.failures,
                    set_aside_until=self._health.until(spot),
                    departed=spot not in there,
                )
                for spot, load in self._loads.items()
            ),
            so_far=self._so_far,
            denied=self._denied,
            unserved=self._unserved,
            remembered=len(kept) if kept is not None else 0,
            forgotten=kept.forgotten if kept is not None else 0,
        )

    def remembered(self, client: str, now: float) -> tuple[Endpoint, float] | None:
        """Return where affinity sends a client, and for how many seconds yet."""
        known = self._affinity.held(client, now) if self._affinity is not None else None
        if known is None:
            return None
        side = self._inside if self._sources.is_inside(client) else self._outside
        endpoint = side.find(known[0])
        return None if endpoint is None else (endpoint, known[1])

    def has(self, endpoint: Endpoint) -> bool:
        """Return whether it still is an endpoint of this place, for whichever sources."""
        spot = spot_of(endpoint)
        return self._outside.find(spot) is not None or self._inside.find(spot) is not None

    def _held(
        self, side: _Side, client: str, now: float, passed: AbstractSet[Spot]
    ) -> Endpoint | None:
        """Return the endpoint that the client stays with, if it can be used."""
        spot = self._affinity.of(client, now) if self._affinity is not None else None
        return side.find(spot) if spot is not None and spot not in passed else None

    def _sides(
        self, forwarding: Forwarding, before: tuple[_Side, _Side] | None
    ) -> tuple[_Side, _Side]:
        """Return the two sides, one and the same where all sources have the same endpoints."""
        there = {spot_of(one): one for one in (*forwarding.inside, *forwarding.outside)}
        for spot, endpoint in there.items():
            if spot in self._loads:
                self._loads[spot].endpoint = endpoint
            else:
                self._loads[spot] = Load(endpoint)
        for spot in [one for one in self._loads if one not in there]:
            if _is_idle(self._loads[spot]):
                del self._loads[spot]
        inside = self._side(forwarding, forwarding.inside, before[0] if before else None)
        if forwarding.outside == forwarding.inside:
            return inside, inside
        return inside, self._side(forwarding, forwarding.outside, before[1] if before else None)

    def _side(
        self, forwarding: Forwarding, endpoints: tuple[Endpoint, ...], before: _Side | None
    ) -> _Side:
        loads = [self._loads[spot_of(one)] for one in endpoints]
        choice = before.choice if before is not None else None
        return _Side(endpoints, balance(forwarding.algorithm, loads, self._chance, choice))

    def _take(self, forwarding: Forwarding) -> None:
        """Adapt affinity and health."""
        if forwarding.affinity_seconds is None:
            self._affinity = None
        elif self._affinity is None:
            self._affinity = Affinity(forwarding.affinity_seconds)
        else:
            self._affinity.seconds = forwarding.affinity_seconds
        self._health.update((self._inside.endpoints, self._outside.endpoints))
        if not forwarding.sets_aside:
            self._health.clear()

    def _load(self, endpoint: Endpoint) -> Load:
        spot = spot_of(endpoint)
        load = self._loads.get(spot)
        if load is None:  # it left while somebody was connecting to it
            load = self._loads[spot] = Load(endpoint)
        return load

    def _forget(self, spot: Spot, load: Load) -> None:
        """Forget an endpoint that departed with its last connection."""
        if _is_idle(load) and not self.has(load.endpoint):
            self._loads.pop(spot, None)


def _settle(load: Load) -> None:
    """Note that it is known what became of a choice. One of UDP may fail after it began."""
    if load.pending:
        load.pending -= 1


def _is_idle(load: Load) -> bool:
    return not load.connections and not load.pending

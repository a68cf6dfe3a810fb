"""Health-check node ports: where load balancers ask whether this node has endpoints of a service.

Lives here: which services have one, where it listens, and what is answered. Must not: open sockets
itself (listeners.py), or decide how healthy the proxy is (health.py).
Source: pkg/proxy/healthcheck/service_health.go of Kubernetes v1.36.

What is answered is read from the snapshot when somebody asks, so that it is right as soon as an
EndpointSlice has come, whatever commits wait for. A service that changes costs what it has itself.
"""

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address

from vipd.proxy.events import Event, OwnAddresses
from vipd.proxy.http.answer import JSON, Answer, Respond
from vipd.proxy.http.crowd import Crowd
from vipd.proxy.http.health import Health
from vipd.proxy.http.listeners import Listener, Place
from vipd.proxy.model import EndpointSlice
from vipd.proxy.names import Address, Family, NamespacedName, family_of
from vipd.proxy.resolve import health_port
from vipd.proxy.snapshot import Snapshot
from vipd.proxy.sources.addresses import FollowedAddresses
from vipd.proxy.sync import Sync
from vipd.proxy.virtualserver import NodeNetwork

MOST_CONNECTIONS = 256
"""For all services together."""
MOST_TOLD = 20
"""Sentences of trouble; services beyond are counted."""
_ANY = {Family.IPV4: ip_address("0.0.0.0"), Family.IPV6: ip_address("::")}
_FOLLOW = "health-check node ports"


class HealthPorts:
    """Keeps a listener for each service that has a health-check node port."""

    def __init__(self, sync: Sync, health: Health, due: Callable[[], None]) -> None:
        self._sync, self._health, self._due = sync, health, due
        self._crowd = Crowd(MOST_CONNECTIONS)
        self._listeners: dict[NamespacedName, dict[Place, Listener]] = {}
        self._undone: dict[Listener, None] = {}
        """Those without a server: most of them cannot listen. The first comes first."""
        self._touched: set[NamespacedName] = set()
        self._all = True
        """Whether every service has to be looked at: before the first, and when addresses move."""
        self._followed = FollowedAddresses(self._take, (_FOLLOW,))
        self._following: asyncio.Task[None] | None = None
        self._place: object = None
        """Of the network, what `addresses` depends on."""
        self._own: Sequence[Address] | None = None
        """This node's addresses, where node ports answer on a range of them; None: not known."""

    def note(self, after: Snapshot, names: Iterable[NamespacedName]) -> None:
        """Note services that have changed."""
        if self._all:
            return
        concerned = [
            name
            for name in names
            if name in self._listeners or health_port(after.services.get(name)) is not None
        ]
        if concerned:
            self._touched.update(concerned)
            self._due()

    def move(self, network: NodeNetwork) -> None:
        """Note the node-wide facts: where node ports answer may have changed."""
        place = (network.node_port_ranges, network.own_addresses)
        if place != self._place:
            self._place = place
            self._look_at_all()

    def _look_at_all(self) -> None:
        self._all = True
        self._due()

    def _take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, OwnAddresses):
                self._own = event.addresses
                self._look_at_all()

    def listeners(self) -> Iterator[Listener]:
        """Yield all listeners."""
        for by_place in self._listeners.values():
            yield from by_place.values()

    def trouble(self) -> Iterator[str]:
        """Yield a sentence for each service whose port is not listened on, within bounds."""
        said = sorted(one.trouble() for one in self._undone if one.failure)
        yield from said[:MOST_TOLD]
        if len(said) > MOST_TOLD:
            yield f"… and {len(said) - MOST_TOLD} more health-check node ports"

    def failures(self) -> Mapping[NamespacedName, tuple[int, str]]:
        """Return the port of each service that is not listened on everywhere, and why."""
        return {
            name: (one.place.port, one.failure)
            for name, by_place in self._listeners.items()
            for one in by_place.values()
            if one.failure
        }

    async def keep(self) -> None:
        """Listen where services want it now. First is left what none wants, so that ports move."""
        names: Iterable[NamespacedName] = self._touched
        if self._all:
            services = self._sync.snapshot.services
            having = {name for name, one in services.items() if health_port(one) is not None}
            names = having | self._listeners.keys()
        self._touched, self._all = set(), False
        places = self._places(self._sync.table.network) if names else {}
        wanted = {name: self._wanted(name, places) for name in sorted(names)}
        for name, at in wanted.items():
            for place in set(self._listeners.get(name, {})) - set(at):
                gone = self._listeners[name].pop(place)
                gone.close()
                self._undone.pop(gone, None)
        for name, at in wanted.items():
            self._open(name, at)
        for one in list(self._undone):
            if one.open():
                await one.serve()
                self._undone.pop(one, None)

    @property
    def count(self) -> int:
        """How many services have one."""
        return len(self._listeners)

    @property
    def undone(self) -> bool:
        """Whether something is to be tried again."""
        return bool(self._undone)

    def _open(self, name: NamespacedName, places: Mapping[Place, Family]) -> None:
        listeners = self._listeners.setdefault(name, {})
        for place, family in places.items():
            if place not in listeners:
                what = f"health-check node port of {name}"
                listeners[place] = Listener(what, place, self._respond(name, family), self._crowd)
                self._undone[listeners[place]] = None
        if not listeners:
            del self._listeners[name]

    def _wanted(
        self, name: NamespacedName, addresses: Mapping[Family, Sequence[Address]]
    ) -> dict[Place, Family]:
        service = self._sync.snapshot.services.get(name)
        port = health_port(service)
        if service is None or port is None:
            return {}
        families = {family_of(one) for one in service.cluster_ips}
        return {
            Place(address, port): family
            for family in sorted(families)
            for address in addresses[family]
        }

    def _places(self, network: NodeNetwork) -> dict[Family, Sequence[Address]]:
        """Return the addresses that answer node ports."""
        ranges = network.node_port_ranges
        if any(0 < one.prefixlen < one.max_prefixlen for one in ranges):
            self._follow()
        return addresses(network, network.own_addresses or self._own or ())

    def _follow(self) -> None:
        if self._following is None:
            self._following = asyncio.ensure_future(self._followed.known(_FOLLOW))

    def _respond(self, name: NamespacedName, family: Family) -> Respond:
        async def respond(method: str, path: str) -> Answer:
            service = self._sync.snapshot.services.get(name)
            if service is None:
                return Answer()  # it has just gone, and its listener is about to
            slices = self._sync.snapshot.slices.get(name, ())
            count = local_endpoints(slices, self._sync.settings.node_name, family)
            return document(name, count, healthy=self._health.healthy)

        return respond

    async def stop(self) -> None:
        """Listen no more."""
        for one in self.listeners():
            one.close()
        self._crowd.cut_all()
        await self._followed.stop()
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)


def addresses(network: NodeNetwork, own: Iterable[Address]) -> dict[Family, Sequence[Address]]:
    """Return where health-check node ports listen: where node ports answer.

    `own` are this node's addresses; only those inside ranges need to be known.
    """
    told: dict[Family, Sequence[Address]] = {}
    for family in Family:
        ranges = [one for one in network.node_port_ranges if family_of(one) is family]
        if any(one.prefixlen == 0 for one in ranges):
            told[family] = (_ANY[family],)
            continue
        single = {one[0] for one in ranges if one.prefixlen == one.max_prefixlen}
        inside = {
            address
            for address in own
            if not address.is_link_local and any(address in one for one in ranges)
        }
        told[family] = sorted(single | inside, key=int)
    return told


def local_endpoints(slices: Iterable[EndpointSlice], node_name: str, family: Family) -> int:
    """Return how many addresses of ready endpoints of this node there are."""
    return len(
        {
            endpoint.address
            for one in slices
            if one.family is family and one.ports and not one.headless
            for endpoint in one.endpoints
            if endpoint.ready and endpoint.node == node_name
        }
    )


def document(name: NamespacedName, count: int, *, healthy: bool) -> Answer:
    """Return what a load balancer is told: byte by byte kube-proxy's answer."""
    body = f"""{{
\t"service": {{
\t\t"namespace": {json.dumps(name.namespace)},
\t\t"name": {json.dumps(name.name)}
\t}},
\t"localEndpoints": {count},
\t"serviceProxyHealthy": {json.dumps(healthy)}
}}"""
    return Answer(
        body.encode(),
        JSON,
        200 if count and healthy else 503,
        {"X-Load-Balancing-Endpoint-Weight": str(count)},
    )

"""Small clusters for property tests: few names and addresses, so that things meet often.

Lives here: strategies for objects, settings and sequences of events.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from hypothesis import strategies as st
from msgspec.structs import replace

from vipd.proxy.events import Applied, Deleted, Event, Kind, OwnAddresses, kind_of, name_of
from vipd.proxy.model import (
    Algorithm,
    EndpointSlice,
    KubernetesObject,
    Node,
    Service,
    ServiceCIDR,
    ServicePort,
    ServiceType,
    SliceEndpoint,
    SlicePort,
    TrafficPolicy,
)
from vipd.proxy.names import (
    Address,
    Family,
    NamespacedName,
    Network,
    Protocol,
    parse_address,
    parse_network,
)
from vipd.proxy.settings import DetectLocal, NodeSettings

HERE = "node-a"
NODES = (HERE, "node-b", "node-c")
ZONES = ("zone-1", "zone-2")


def _addresses(*texts: str) -> tuple[Address, ...]:
    return tuple(map(parse_address, texts))


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(map(parse_network, texts))


CLUSTER_IPS = {
    Family.IPV4: _addresses("10.96.0.1", "10.96.0.2", "10.96.0.3"),
    Family.IPV6: _addresses("fd00:96::1", "fd00:96::2", "fd00:96::3"),
}
OUTER_IPS = {
    Family.IPV4: _addresses("198.51.100.1", "198.51.100.2"),
    Family.IPV6: _addresses("2001:db8:5::1", "2001:db8:5::2"),
}
UNALLOCATED = {
    Family.IPV4: parse_address("10.96.0.77"),
    Family.IPV6: parse_address("fd00:96::77"),
}
NODE_IPS = {
    Family.IPV4: _addresses("192.168.0.10", "192.168.0.11"),
    Family.IPV6: _addresses("fd00:192::10", "fd00:192::11"),
}
"""Addresses that node-a really has: the primary one and another."""
OWN_ADDRESSES = OwnAddresses((*NODE_IPS[Family.IPV4], *NODE_IPS[Family.IPV6]))
LOOPBACK = {Family.IPV4: parse_address("127.0.0.1"), Family.IPV6: parse_address("::1")}
ENDPOINTS = {
    Family.IPV4: _addresses(
        "10.244.1.2", "10.244.1.3", "10.244.2.2", "10.244.2.3", "192.168.0.10", "203.0.113.9"
    ),
    Family.IPV6: _addresses(
        "fd00:244:1::2", "fd00:244:1::3", "fd00:244:2::2", "fd00:192::10", "2001:db8:9::9"
    ),
}
LOCAL_PODS = {family: each[:2] for family, each in ENDPOINTS.items()}
OTHER_POD = {family: each[2] for family, each in ENDPOINTS.items()}
OUTSIDERS = {
    Family.IPV4: _addresses("203.0.113.200", "172.16.3.4"),
    Family.IPV6: _addresses("2001:db8:9::ff", "2001:db8:77::1"),
}
POD_CIDRS = _networks("10.244.0.0/16", "fd00:244::/32")
RANGES = _networks(
    "0.0.0.0/0", "10.244.0.0/16", "192.168.0.0/24", "203.0.113.128/25", "203.0.113.200/32",
    "::/0", "fd00::/8", "2001:db8:9::/48",
)  # fmt: skip
SERVICE_NAMES = [NamespacedName(space, name) for space in ("x", "y") for name in ("a", "b")]
SLICE_NAMES = [NamespacedName(space, name) for space in ("x", "y") for name in ("s", "t", "u", "v")]
PORT_NAMES = ("", "http", "dns")
DATES = [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
SERVICE_PORTS = (80, 443)
TARGET_PORTS = (8080, 9090)
NODE_PORTS = (30080, 30081)

protocols = st.sampled_from(Protocol)
flags = st.booleans()
rarely = st.sampled_from([False] * 15 + [True])


def _some(pool: tuple[Address, ...], most: int = 2) -> st.SearchStrategy[tuple[Address, ...]]:
    return st.lists(st.sampled_from(pool), max_size=most, unique=True).map(tuple)


@st.composite
def _ports(draw: st.DrawFn) -> tuple[ServicePort, ...]:
    made: dict[tuple[int, Protocol], ServicePort] = {}
    names: set[tuple[str, Protocol]] = set()
    for _ in range(draw(st.integers(1, 2))):
        port = ServicePort(
            name=draw(st.sampled_from(PORT_NAMES)),
            protocol=draw(protocols),
            port=draw(st.sampled_from(SERVICE_PORTS)),
            node_port=draw(st.sampled_from((0, *NODE_PORTS))),
        )
        if (port.name, port.protocol) not in names:
            names.add((port.name, port.protocol))
            made.setdefault((port.port, port.protocol), port)
    return tuple(made.values())


@st.composite
def services(draw: st.DrawFn) -> Service:
    """Return a service with everything at random, as the API would let it pass."""
    name = draw(st.sampled_from(SERVICE_NAMES))
    cluster_ips = tuple(
        draw(st.sampled_from(CLUSTER_IPS[family]))
        for family in draw(
            st.sampled_from([[*Family], [*Family], [*Family], *([one] for one in Family), []])
        )
    )
    # The last may be another service's cluster IP.
    outer = tuple(one for family in Family for one in (*OUTER_IPS[family], CLUSTER_IPS[family][2]))
    return Service(
        name=name,
        created=draw(st.sampled_from([None, *DATES])),
        type=draw(st.sampled_from([*ServiceType] + [ServiceType.NODE_PORT] * 6)),
        headless=draw(rarely),
        proxy_name="other" if draw(rarely) else None,
        cluster_ips=cluster_ips,
        external_ips=draw(_some(outer)),
        load_balancer_ips=draw(_some(outer)),
        ports=draw(_ports()),
        internal_policy=draw(st.sampled_from(TrafficPolicy)),
        external_policy=draw(st.sampled_from(TrafficPolicy)),
        affinity_seconds=draw(st.sampled_from((None, None, 10, 10800))),
        source_ranges=draw(st.lists(st.sampled_from(RANGES), max_size=2).map(tuple)),
        ranges_lost=draw(st.booleans()),
        algorithm=draw(st.sampled_from(Algorithm)),
        scheduler=draw(st.sampled_from(("", "", "", "rr", "wrr", "lc", "sh"))),
        drain_seconds=draw(st.sampled_from((None, None, 0, 60))),
        weights=draw(
            st.dictionaries(
                st.sampled_from(["pod-1", "pod-2", "10.244.1.2", "fd00:244:2::2"]),
                st.integers(1, 4),
                max_size=2,
            ).map(lambda made: tuple(made.items()))
        ),
    )


def _hints(pool: tuple[str, ...]) -> st.SearchStrategy[frozenset[str]]:
    return st.sampled_from([frozenset(), frozenset(), frozenset(pool[:1]), frozenset(pool)])


@st.composite
def _slice_endpoints(draw: st.DrawFn, family: Family) -> SliceEndpoint:
    address = draw(st.sampled_from(ENDPOINTS[family]))
    usual = {Family.IPV4: (HERE, HERE, "node-b", "node-b", HERE, None),
             Family.IPV6: (HERE, HERE, "node-b", HERE, None)}  # fmt: skip
    node = usual[family][ENDPOINTS[family].index(address)]
    ready = draw(st.sampled_from((True, True, True, True, False)))
    return SliceEndpoint(
        address=address,
        ready=ready,
        serving=ready or draw(flags),
        terminating=not ready and draw(flags),
        node=draw(st.sampled_from((node, node, node, None, "node-c"))),
        zone_hints=draw(_hints(ZONES)),
        node_hints=draw(_hints(NODES)),
        pod=draw(st.sampled_from((None, "pod-1", "pod-2"))),
    )


_USUAL_PORTS = tuple(
    SlicePort(name, protocol, 8080) for name in PORT_NAMES for protocol in Protocol
)
_PORTS = st.builds(SlicePort, st.sampled_from(PORT_NAMES), protocols, st.sampled_from(TARGET_PORTS))


@st.composite
def slices(
    draw: st.DrawFn,
    services: Sequence[NamespacedName] = SERVICE_NAMES,
    of: Sequence[Family] = tuple(Family),
) -> EndpointSlice:
    """Return a slice of one of the services, most often one that has all their ports."""
    service = draw(st.sampled_from(services))
    family = draw(st.sampled_from(of))
    usual = draw(st.sampled_from((True, True, True, False)))
    count = draw(st.sampled_from((3, 1, 2, 4, 0)))
    return EndpointSlice(
        name=NamespacedName(service.namespace, draw(st.sampled_from(("s", "t", "u", "v")))),
        service=service,
        family=family,
        endpoints=tuple(draw(_slice_endpoints(family)) for _ in range(count)),
        ports=_USUAL_PORTS if usual else tuple(draw(st.lists(_PORTS, max_size=3))),
        headless=draw(rarely),
    )


nodes = st.builds(
    Node,
    name=st.sampled_from(NODES),
    addresses=st.sampled_from(
        [(), NODE_IPS[Family.IPV4], (NODE_IPS[Family.IPV6][0], NODE_IPS[Family.IPV4][0])]
    ),
    pod_cidrs=st.sampled_from([(), _networks("10.244.1.0/24"), POD_CIDRS]),
    zone=st.sampled_from((None, *ZONES)),
)
service_cidrs = st.builds(
    ServiceCIDR,
    st.sampled_from(("one", "two")),
    st.sampled_from([_networks("10.96.0.0/24"), _networks("10.96.0.0/16", "fd00:96::/112")]),
)
objects: st.SearchStrategy[KubernetesObject] = st.one_of(
    services(), services(), slices(), slices(), slices(), nodes, service_cidrs
)
node_settings = st.builds(
    NodeSettings,
    node_name=st.just(HERE),
    node_ips=st.sampled_from([(), (), (NODE_IPS[Family.IPV4][0],)]),
    detect_local=st.sampled_from(DetectLocal),
    cluster_cidrs=st.sampled_from([POD_CIDRS, POD_CIDRS[:1], ()]),
    local_interface=st.just("cni"),
    masquerade_all=rarely,
    masquerade_bit=st.sampled_from((14, 3)),
    node_port_addresses=st.sampled_from(
        [None, (), _networks("192.168.0.0/24"), _networks("192.168.0.11/32", "fd00:192::11/128")]
    ),
    service_cidrs=st.sampled_from([(), _networks("10.96.0.0/16", "fd00:96::/112")]),
)


def _first_slice(one: EndpointSlice) -> EndpointSlice:
    """Return a slice of its service's own: others of these names do not take its place."""
    name = NamespacedName(one.name.namespace, f"{one.service.name}-{one.family}".lower())
    return replace(one, name=name, ports=_USUAL_PORTS)


@st.composite
def clusters(draw: st.DrawFn) -> list[Event]:
    """Return the events of a whole small cluster, each object once."""
    chosen = draw(st.lists(services(), min_size=1, max_size=4, unique_by=lambda one: one.name))
    names = [one.name for one in chosen]
    first = [
        _first_slice(draw(slices([name], [family])))
        for name in names
        for family in Family
        if not draw(rarely)
    ]
    made: list[KubernetesObject] = [
        *chosen,
        *first,
        *draw(st.lists(slices(names), max_size=3)),
        *draw(st.lists(nodes, min_size=1, max_size=3)),
        *draw(st.lists(service_cidrs, max_size=1)),
    ]
    by_name = {(kind_of(one), name_of(one)): one for one in made}
    return [OWN_ADDRESSES, *(Applied(one) for one in by_name.values())]


_deletions = st.one_of(
    st.builds(Deleted, st.just(Kind.SERVICE), st.sampled_from(SERVICE_NAMES)),
    st.builds(Deleted, st.just(Kind.ENDPOINT_SLICE), st.sampled_from(SLICE_NAMES)),
    st.builds(
        Deleted, st.just(Kind.NODE), st.sampled_from([NamespacedName("", one) for one in NODES])
    ),
    st.builds(
        Deleted,
        st.just(Kind.SERVICE_CIDR),
        st.sampled_from([NamespacedName("", one) for one in ("one", "two")]),
    ),
)
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Applied, objects), st.builds(Applied, objects), _deletions
)
_moves = st.builds(
    OwnAddresses, st.sampled_from([OWN_ADDRESSES.addresses, NODE_IPS[Family.IPV4], ()])
)
"""Addresses of this node that come and go; packets are only sent where they are OWN_ADDRESSES."""
batches = st.lists(st.lists(st.one_of(events, events, events, _moves), max_size=5), max_size=5)

"""From a snapshot to the table of virtual servers: the whole meaning of a Service on this node.

Lives here: which addresses a service answers on, with which endpoints and policy, and who wins
where two services claim one address. Pure: no I/O, no clock. Sources: KEP-2086 (internal traffic
policy), KEP-1669 (external policy and terminating endpoints), kube-proxy's documented behaviour.
"""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from ipaddress import collapse_addresses, ip_network

from immutables import Map
from msgspec import Struct, structs

from vipd.proxy.endpoints import Here, Usable, usable
from vipd.proxy.model import (
    EndpointSlice,
    Service,
    ServicePort,
    ServiceType,
    SliceEndpoint,
    TrafficPolicy,
)
from vipd.proxy.names import (
    Address,
    Family,
    NamespacedName,
    Network,
    Protocol,
    ServicePortName,
    family_of,
)
from vipd.proxy.settings import DetectLocal, NodeSettings
from vipd.proxy.snapshot import Snapshot, Touched
from vipd.proxy.virtualserver import (
    Before,
    Changes,
    Conflict,
    Key,
    Kind,
    Masquerade,
    NodeNetwork,
    PodSources,
    Refusal,
    Table,
    Use,
    VirtualServer,
)

HealthPorts = tuple[tuple[NamespacedName, int], ...]
"""Of services that have one, sorted."""

_NEVER = datetime.max.replace(tzinfo=UTC)
_EVERYWHERE = (ip_network("0.0.0.0/0"), ip_network("::/0"))


def resolve(snapshot: Snapshot, settings: NodeSettings) -> Table:
    """Return the table for the whole snapshot. Costs O(snapshot); see `update` for a change."""
    facts = network(snapshot, settings, health_ports((), snapshot, snapshot.services))
    empty = Table(Map(), Map(), Map(), facts)
    return _with_services(empty, snapshot, settings, snapshot.services.keys())[0]


def update(
    table: Table, snapshot: Snapshot, settings: NodeSettings, touched: Touched
) -> tuple[Table, Changes]:
    """Return the table after a fold touched `touched`, and what that changes for a backend.

    Only the touched services are computed again, unless this node's own facts changed.
    """
    names: Iterable[NamespacedName] = touched.services
    new_network = None
    facts = table.network
    ports = health_ports(facts.health_ports, snapshot, touched.services)
    if settings.node_name in touched.nodes or touched.service_cidrs or touched.own_addresses:
        facts = network(snapshot, settings, ports)
    elif ports is not facts.health_ports:
        facts = structs.replace(facts, health_ports=ports)
    if facts != table.network:
        new_network = facts
        table = Table(table.by_service, table.claims, table.contested, facts)
    if settings.node_name in touched.nodes:
        names = {*snapshot.services.keys(), *table.by_service.keys()}
    after, changed = _with_services(table, snapshot, settings, names)
    return after, Changes(changed, new_network)


def network(snapshot: Snapshot, settings: NodeSettings, ports: HealthPorts) -> NodeNetwork:
    """Return the node-wide part of the table."""
    cidrs = {cidr for one in snapshot.service_cidrs.values() for cidr in one.cidrs}
    ranges = settings.node_port_addresses
    own = node_addresses(snapshot, settings)
    primary = tuple(ip_network(address) for address in own if not address.is_loopback)
    if ranges is None:
        ranges = primary
        if not own:
            ranges = _EVERYWHERE  # nobody said which address is the primary one
    else:
        ranges = (*ranges, *primary) if settings.node_port_primary else ranges
        # kube-proxy's rule: a list without a range of a family leaves that family open (§9.4).
        given = {family_of(one) for one in ranges}
        ranges = (*ranges, *(one for one in _EVERYWHERE if family_of(one) not in given))
    return NodeNetwork(
        pod_sources=_pod_sources(snapshot, settings),
        node_port_ranges=collapse(ranges),
        service_cidrs=collapse([*cidrs, *settings.service_cidrs]),
        masquerade_mark=1 << settings.masquerade_bit,
        own_addresses=snapshot.own_addresses,
        primary_addresses=own,
        health_ports=ports,
    )


def health_port(service: Service | None) -> int | None:
    """Return a service's health-check node port, None where it has none that counts."""
    if service is None or not service.health_check_node_port:
        return None
    if service.type is not ServiceType.LOAD_BALANCER or service.headless:
        return None
    if service.external_policy is not TrafficPolicy.LOCAL or service.proxy_name is not None:
        return None
    return service.health_check_node_port


def health_ports(
    held: HealthPorts, snapshot: Snapshot, names: Iterable[NamespacedName]
) -> HealthPorts:
    """Return `held` after the named services have changed; `held` itself where nothing follows."""
    before = dict(held)
    after = dict(held)
    for name in names:
        port = health_port(snapshot.services.get(name))
        if port is not None:
            after[name] = port
        elif after:
            after.pop(name, None)
    return held if after == before else tuple(sorted(after.items()))


def node_addresses(snapshot: Snapshot, settings: NodeSettings) -> tuple[Address, ...]:
    """Return this node's primary addresses, at most one of each family.

    What the settings say of a family wins over the Node object (kube-proxy's `bindAddress`).
    """
    node = snapshot.nodes.get(settings.node_name)
    candidates = (*settings.node_ips, *(node.addresses if node else ()))
    first: dict[Family, Address] = {}
    for address in candidates:
        first.setdefault(family_of(address), address)
    return tuple(first.values())


def collapse(networks: Iterable[Network]) -> tuple[Network, ...]:
    """Return the networks without overlaps, IPv4 first, sorted."""
    known = list(networks)
    four = collapse_addresses([one for one in known if one.version == 4])
    six = collapse_addresses([one for one in known if one.version == 6])
    return (*four, *six)


class ThisNode(Struct, frozen=True):
    """This node, as far as the meaning of a service depends on it."""

    here: Here
    addresses: tuple[Address, ...]
    """Primary addresses, for the node exception of source ranges."""
    tells_pods: frozenset[Family]
    """Families for which the detect-local mode can tell pods from other sources."""
    masquerade_all: bool
    serves_external_ips: bool
    dns: frozenset[tuple[Address, int]]
    """Where vipd's DNS server answers."""


def this_node(snapshot: Snapshot, settings: NodeSettings) -> ThisNode:
    """Return this node's facts from its Node object and the settings."""
    node = snapshot.nodes.get(settings.node_name)
    sources = _pod_sources(snapshot, settings)
    told = set(Family) if sources.interface else {family_of(one) for one in sources.cidrs}
    return ThisNode(
        Here(settings.node_name, node.zone if node else None),
        node_addresses(snapshot, settings),
        frozenset(told),
        settings.masquerade_all,
        settings.serve_external_ips,
        settings.dns_listens,
    )


def left_to_dns(
    service: Service, listens: frozenset[tuple[Address, int]]
) -> Iterable[tuple[Kind, Key, ServicePortName]]:
    """Yield the places of a service at which vipd's DNS server answers in place of endpoints."""
    for family in Family:
        for port in service.ports:
            for kind, address in _places(service, port, family):
                if address is not None and is_dns(address, port.port, port.protocol, listens):
                    key = Key(family, address, port.protocol, port.port)
                    yield kind, key, ServicePortName(service.name, port.name, port.protocol)


def is_dns(
    address: Address, port: int, protocol: Protocol, listens: frozenset[tuple[Address, int]]
) -> bool:
    """Return whether vipd's DNS server answers there: it does so without being translated to."""
    return protocol in (Protocol.UDP, Protocol.TCP) and (address, port) in listens


def virtual_servers(
    service: Service, slices: tuple[EndpointSlice, ...], node: ThisNode
) -> tuple[VirtualServer, ...]:
    """Return what one service wants this node to answer, each key at most once.

    Headless, ExternalName and foreign-proxy services want nothing.
    """
    if service.headless or service.proxy_name is not None:
        return ()
    if service.type is ServiceType.EXTERNAL_NAME or not service.cluster_ips:
        return ()
    wanted: dict[Key, VirtualServer] = {}
    for family in sorted({family_of(address) for address in service.cluster_ips}):
        allowed = _allowed_sources(service, family, node.addresses)
        for port in service.ports:
            owner = ServicePortName(service.name, port.name, port.protocol)
            lists = usable(slices, owner, family, node.here, _weigher(service))
            for kind, address in _places(service, port, family):
                if address is not None and is_dns(address, port.port, port.protocol, node.dns):
                    continue
                if kind is Kind.EXTERNAL and not node.serves_external_ips:
                    continue
                key = Key(family, address, port.protocol, port.port if address else port.node_port)
                # The first kind wins, so that a load-balancer address keeps its source ranges.
                if key not in wanted:
                    wanted[key] = _virtual_server(service, key, owner, kind, lists, node, allowed)
    return tuple(wanted.values())


def _weigher(service: Service) -> Callable[[SliceEndpoint], int]:
    """Return the function from an endpoint to its weight: by address, else by pod name, else 1."""
    weights = dict(service.weights)
    if not weights:
        return lambda told: 1
    return lambda told: weights.get(str(told.address)) or weights.get(told.pod or "", 1)


def _virtual_server(
    service: Service,
    key: Key,
    owner: ServicePortName,
    kind: Kind,
    lists: Usable,
    node: ThisNode,
    allowed: tuple[Network, ...] | None,
) -> VirtualServer:
    if kind is Kind.CLUSTER:
        use = Use.LOCAL if service.internal_policy is TrafficPolicy.LOCAL else Use.CLUSTER
        if node.masquerade_all:
            masquerade = Masquerade.ALWAYS
        elif key.family in node.tells_pods:
            masquerade = Masquerade.OFF_CLUSTER
        else:
            masquerade = Masquerade.NEVER
    elif service.external_policy is TrafficPolicy.LOCAL:
        use, masquerade = Use.LOCAL_FROM_OUTSIDE, Masquerade.NEVER
    else:
        use, masquerade = Use.CLUSTER, Masquerade.ALWAYS
    uses_local = use is not Use.CLUSTER
    only_elsewhere = uses_local and not lists.local and lists.anywhere
    return VirtualServer(
        key=key,
        owner=owner,
        kind=kind,
        cluster=() if use is Use.LOCAL else lists.cluster,
        local=lists.local if uses_local else (),
        use=use,
        when_empty=Refusal.DROP if only_elsewhere else Refusal.REJECT,
        affinity_seconds=service.affinity_seconds,
        allowed_sources=allowed if kind is Kind.LOAD_BALANCER else None,
        masquerade=masquerade,
        algorithm=service.algorithm,
        scheduler=service.scheduler,
        drain_seconds=service.drain_seconds,
        proxy_protocol=service.proxy_protocol and key.protocol is Protocol.TCP,
        keeps_failing=service.keeps_failing,
    )


def _places(
    service: Service, port: ServicePort, family: Family
) -> Iterable[tuple[Kind, Address | None]]:
    """Yield where a port is answered: kind and address (None for the node port)."""
    for kind, addresses in (
        (Kind.CLUSTER, service.cluster_ips),
        (Kind.LOAD_BALANCER, service.load_balancer_ips),
        (Kind.EXTERNAL, service.external_ips),
    ):
        for address in addresses:
            if family_of(address) is family:
                yield kind, address
    if port.node_port:
        yield Kind.NODE_PORT, None


def _allowed_sources(
    service: Service, family: Family, own: tuple[Address, ...]
) -> tuple[Network, ...] | None:
    """Return the collapsed source ranges of a family, or None where everyone may connect.

    Ranges of the other family alone do not restrict this one, unless one was left out as wrong: it
    may have been this family's, and nobody is let in who should not be. Where a range holds the
    node's own address, the load-balancer addresses are allowed too: the node may use them as its
    source.
    """
    ranges = [one for one in service.source_ranges if family_of(one) is family]
    if not ranges:
        return () if service.ranges_lost else None
    if any(address in one for one in ranges for address in own if family_of(address) is family):
        vips = [ip for ip in service.load_balancer_ips if family_of(ip) is family]
        ranges += [ip_network(vip) for vip in vips]
    collapsed = collapse(ranges)
    return None if any(one.prefixlen == 0 for one in collapsed) else collapsed


def _pod_sources(snapshot: Snapshot, settings: NodeSettings) -> PodSources:
    match settings.detect_local:
        case DetectLocal.CLUSTER_CIDR:
            return PodSources(cidrs=collapse(settings.cluster_cidrs))
        case DetectLocal.NODE_CIDR:
            node = snapshot.nodes.get(settings.node_name)
            return PodSources(cidrs=collapse(node.pod_cidrs if node else ()))
        case DetectLocal.BRIDGE_INTERFACE:
            return PodSources(interface=settings.local_interface)
        case DetectLocal.INTERFACE_NAME_PREFIX:
            return PodSources(interface=f"{settings.local_interface}*")


def _with_services(
    table: Table, snapshot: Snapshot, settings: NodeSettings, names: Iterable[NamespacedName]
) -> tuple[Table, dict[Key, VirtualServer | None]]:
    """Return the table with `names` computed again, and the keys whose winner changed."""
    node = this_node(snapshot, settings)
    by_service = table.by_service.mutate()
    claims = table.claims.mutate()
    contested = table.contested.mutate()
    changed: dict[Key, VirtualServer | None] = {}

    def precedence(claim: VirtualServer) -> tuple[datetime, NamespacedName, str]:
        """Order claims: the oldest service first (no date is youngest), then by name."""
        service = snapshot.services.get(claim.owner.service)
        created = service.created if service and service.created else _NEVER
        return (created, claim.owner.service, claim.owner.port)

    def why(winner: VirtualServer, loser: VirtualServer) -> Before:
        first, second = (precedence(one)[0] for one in (winner, loser))
        if second == _NEVER:
            return Before.NAME_ALONE if first == _NEVER else Before.DATED
        return Before.NAME if first == second else Before.AGE

    for name in names:
        service = snapshot.services.get(name)
        old = by_service.get(name, ())
        new: tuple[VirtualServer, ...] = ()
        if service is not None:
            new = virtual_servers(service, snapshot.slices.get(name, ()), node)
        if old == new and not contested:
            continue
        if new:
            by_service[name] = new
        else:
            by_service.pop(name, None)
        wanted = {one.key: one for one in new}
        for key in {*wanted, *(one.key for one in old)}:
            before = claims.get(key, ())
            others = [one for one in before if one.owner.service != name]
            after = [*others, wanted[key]] if key in wanted else others
            if len(after) > 1:
                after.sort(key=precedence)
                losers = tuple(one.owner for one in after[1:])
                contested[key] = Conflict(key, after[0].owner, losers, why(*after[:2]))
            else:
                contested.pop(key, None)
            if after:
                claims[key] = tuple(after)
            else:
                claims.pop(key, None)
            winner = after[0] if after else None
            if winner != (before[0] if before else None):
                changed[key] = winner
    return (
        Table(by_service.finish(), claims.finish(), contested.finish(), table.network),
        changed,
    )

"""How the table is told to people and programs: the records behind `vipd services --json`.

Lives here: their JSON shape, made from virtual servers. Pure. Must not: format for a terminal
(cli/), nor read counters itself.
"""

from collections.abc import Iterable, Iterator, Mapping
from heapq import nsmallest
from types import MappingProxyType

from msgspec import Struct

from vipd.backends.usage import ServerUsage
from vipd.proxy import resolve
from vipd.proxy.counted import CountersView, counters
from vipd.proxy.events import OwnAddresses
from vipd.proxy.names import Address, family_of, parse_address, parse_network
from vipd.proxy.settings import DataplaneSettings, DetectLocal, NodeSettings
from vipd.proxy.snapshot import Snapshot
from vipd.proxy.virtualserver import Endpoint, Key, Table, Use, VirtualServer

_NOTHING: Mapping[Key, ServerUsage] = MappingProxyType({})
_NONE: Mapping[Key, str] = MappingProxyType({})


class EndpointView(Struct, frozen=True, omit_defaults=True):
    """An endpoint of a virtual server."""

    address: str
    """``address:port``, IPv6 in brackets."""
    weight: int
    local: bool
    terminating: bool = False
    pod: str | None = None
    node: str | None = None


class VirtualServerView(Struct, frozen=True, omit_defaults=True):
    """A virtual server. `endpoints` are those for policy Cluster, `local_endpoints` for Local."""

    service: str
    """``namespace/name``, with ``:port`` where the port has a name."""
    kind: str
    address: str
    """``address:port``, or ``*:port`` for a node port (``[*]:port`` in IPv6)."""
    protocol: str
    algorithm: str
    policy: str
    endpoints: list[EndpointView] = []
    local_endpoints: list[EndpointView] = []
    refusal: str | None = None
    """What a new connection meets, where the list to use is empty: reject or drop."""
    affinity_seconds: int | None = None
    allowed_sources: list[str] | None = None
    masquerade: str = "never"
    proxy_protocol: bool = False
    """Whether endpoints are told the client's address first, where the mode can."""
    keeps_failing: bool = False
    """Whether endpoints that fail are never set aside, where the mode would."""
    counters: CountersView | None = None
    """None where nobody asked for them, or the mode has none."""
    rejected: str | None = None
    """Why the dataplane does not serve it, or not as it should."""
    by_dns: bool = False
    """Whether vipd's DNS server answers there, and no endpoint does."""


def services(
    virtual_servers: Iterable[VirtualServer],
    usage: Mapping[Key, ServerUsage] = _NOTHING,
    rejected: Mapping[Key, str] = _NONE,
) -> list[VirtualServerView]:
    """Return the views of virtual servers, sorted by service, then by address."""
    ordered = sorted(virtual_servers, key=lambda one: (one.owner, one.key.sort_key()))
    return [_view(one, usage.get(one.key), rejected.get(one.key)) for one in ordered]


def first(table: Table, most: int) -> tuple[list[VirtualServer], int]:
    """Return the first so many virtual servers by service and address, and how many there are."""
    servers = table.virtual_servers()
    return nsmallest(most, servers, key=lambda one: (one.owner, one.key.sort_key())), len(servers)


def rejected(table: Table, refused: Mapping[Key, Exception]) -> Iterator[str]:
    """Yield a sentence on each virtual server that a dataplane refused, with whose it is."""
    for key, error in refused.items():
        claims = table.claims.get(key)
        yield f"{claims[0].owner} at {key}: {error}" if claims else f"{key}: {error}"


def left_to_dns(snapshot: Snapshot, settings: NodeSettings) -> list[VirtualServerView]:
    """Return what services would have at the addresses of vipd's DNS server, which answers there.

    Costs O(services) where it listens anywhere.
    """
    if not settings.dns_listens:
        return []
    return [
        VirtualServerView(
            service=str(owner),
            kind=kind.value,
            address=place(key),
            protocol=key.protocol.value,
            algorithm=service.algorithm.value,
            policy=Use.CLUSTER.value,
            by_dns=True,
        )
        for _, service in sorted(snapshot.services.items())
        for kind, key, owner in resolve.left_to_dns(service, settings.dns_listens)
    ]


def _view(
    server: VirtualServer, usage: ServerUsage | None, rejected: str | None
) -> VirtualServerView:
    reachable = server.cluster if server.use is Use.CLUSTER else server.local
    sources = server.allowed_sources
    return VirtualServerView(
        service=str(server.owner),
        kind=server.kind.value,
        address=place(server.key),
        protocol=server.key.protocol.value,
        algorithm=server.algorithm.value,
        policy=server.use.value,
        endpoints=[_endpoint(one) for one in server.cluster],
        local_endpoints=[_endpoint(one) for one in server.local],
        refusal=None if reachable else server.when_empty.value,
        affinity_seconds=server.affinity_seconds,
        allowed_sources=None if sources is None else [str(one) for one in sources],
        masquerade=server.masquerade.value,
        proxy_protocol=server.proxy_protocol,
        keeps_failing=server.keeps_failing,
        counters=None if usage is None else counters(usage),
        rejected=rejected,
    )


def _endpoint(one: Endpoint) -> EndpointView:
    return EndpointView(str(one), one.weight, one.local, one.terminating, one.pod, one.node)


def place(key: Key) -> str:
    """Return address and port of a key as a person writes them."""
    if key.address is None:
        return f"{'*' if key.family == 4 else '[*]'}:{key.port}"
    host = f"[{key.address}]" if key.family == 6 else str(key.address)
    return f"{host}:{key.port}"


class SettingsView(Struct, frozen=True):
    """The settings that `vipd plan` works with, so that it means what the daemon means.

    Texts as the configuration file spells them; `node_port_addresses` is None for primary.
    """

    mode: str
    node_name: str
    node_ips: list[str]
    detect_local: DetectLocal
    cluster_cidrs: list[str]
    local_interface: str
    masquerade_all: bool
    masquerade_bit: int
    node_port_addresses: list[str] | None
    node_port_primary: bool
    serve_external_ips: bool
    service_cidrs: list[str]
    dns_listens: list[tuple[str, int]]
    own_addresses: list[str]
    """Addresses of the daemon's interfaces, where its mode has to know them."""
    dataplane: DataplaneSettings

    def facts(self) -> OwnAddresses:
        """Return what the daemon knows of its node, as the event that tells it."""
        return OwnAddresses(tuple(map(parse_address, self.own_addresses)))

    def node(self) -> NodeSettings:
        """Return the settings of the node themselves."""
        ranges = self.node_port_addresses
        return NodeSettings(
            node_name=self.node_name,
            node_ips=tuple(map(parse_address, self.node_ips)),
            detect_local=self.detect_local,
            cluster_cidrs=tuple(map(parse_network, self.cluster_cidrs)),
            local_interface=self.local_interface,
            masquerade_all=self.masquerade_all,
            masquerade_bit=self.masquerade_bit,
            node_port_addresses=None if ranges is None else tuple(map(parse_network, ranges)),
            node_port_primary=self.node_port_primary,
            serve_external_ips=self.serve_external_ips,
            service_cidrs=tuple(map(parse_network, self.service_cidrs)),
            dns_listens=frozenset((parse_address(one), port) for one, port in self.dns_listens),
        )


def settings(
    mode: str, node: NodeSettings, own_addresses: Iterable[Address], dataplane: DataplaneSettings
) -> SettingsView:
    """Return the view of the settings of a node and its dataplane."""
    ranges = node.node_port_addresses
    return SettingsView(
        mode=mode,
        node_name=node.node_name,
        node_ips=list(map(str, node.node_ips)),
        detect_local=node.detect_local,
        cluster_cidrs=list(map(str, node.cluster_cidrs)),
        local_interface=node.local_interface,
        masquerade_all=node.masquerade_all,
        masquerade_bit=node.masquerade_bit,
        node_port_addresses=None if ranges is None else list(map(str, ranges)),
        node_port_primary=node.node_port_primary,
        serve_external_ips=node.serve_external_ips,
        service_cidrs=list(map(str, node.service_cidrs)),
        dns_listens=sorted((str(one), port) for one, port in node.dns_listens),
        own_addresses=list(map(str, own_addresses)),
        dataplane=dataplane,
    )


def counts(table: Table) -> tuple[int, int]:
    """Return the number of virtual servers, and of endpoints, each once for each it serves."""
    servers = table.virtual_servers()
    return len(servers), sum(len({*one.cluster, *one.local}) for one in servers)


def notes(snapshot: Snapshot, table: Table, settings: NodeSettings) -> tuple[str, ...]:
    """Return what is legal but seldom meant: settings that the objects do not bear out."""
    said = []
    if snapshot.nodes and settings.node_name not in snapshot.nodes:
        others = ", ".join(sorted(snapshot.nodes)[:5])
        said.append(
            f"no Node object is called {settings.node_name} (there are {others}): "
            "no endpoint is local, and node ports answer on every own address"
        )
    node = snapshot.nodes.get(settings.node_name)
    if node is not None and node.leaving:
        said.append(f"Node {settings.node_name} is leaving ({node.leaving}): /healthz answers 503")
    said += [
        f"nodePortAddresses: {one} is loopback, where node ports never answer"
        for one in settings.node_port_addresses or ()
        if one.is_loopback
    ]
    sources = table.network.pod_sources
    told = {family_of(cidr) for cidr in sources.cidrs}
    used = () if sources.interface else sorted({key.family for key in table.claims})
    where = "--cluster-cidr"
    if settings.detect_local is DetectLocal.NODE_CIDR:
        where = f"detectLocalMode NodeCIDR, and Node {settings.node_name} has no podCIDR of it"
    said += [
        f"no pod network is known for {family} ({where}): sources outside the cluster are "
        "not masqueraded"
        for family in used
        if family not in told
    ]
    return tuple(said)


def passed_over(kinds: Mapping[str, int]) -> tuple[str, ...]:
    """Return kinds of objects that vipd has no use for, as ``Deployment ×3``."""
    return tuple(f"{kind} ×{count}" for kind, count in sorted(kinds.items()))

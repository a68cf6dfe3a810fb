"""The virtual server: the one table that dataplanes, `explain`, the status page and metrics read.

Lives here: the types of the resolved table and what each field means for a packet. Must not: know
Kubernetes objects or any dataplane. If a backend needs to know something that is not in here, this
table is wrong.
"""

from collections.abc import Mapping
from enum import StrEnum

from immutables import Map
from msgspec import Struct

from vipd.proxy.model import Algorithm
from vipd.proxy.names import Address, Family, NamespacedName, Network, Protocol, ServicePortName


class Key(Struct, frozen=True):
    """What this node answers: an address, or None for a node port, with protocol and port."""

    family: Family
    address: Address | None
    protocol: Protocol
    port: int

    def __str__(self) -> str:
        if self.address is None:
            return f"node port {self.port}/{self.protocol} ({self.family})"
        host = f"[{self.address}]" if self.family is Family.IPV6 else str(self.address)
        return f"{host}:{self.port}/{self.protocol}"

    def sort_key(self) -> tuple[int, int, str, int]:
        """Return what orders keys: family, address (node ports last), protocol, port."""
        number = (1 << 128) if self.address is None else int(self.address)
        return (self.family, number, self.protocol.value, self.port)


class Kind(StrEnum):
    """Where a virtual server's address comes from."""

    CLUSTER = "cluster"
    LOAD_BALANCER = "load-balancer"
    EXTERNAL = "external"
    NODE_PORT = "node-port"


class Use(StrEnum):
    """Which of the two endpoint lists a virtual server uses, and for which sources."""

    CLUSTER = "cluster"
    """The cluster list, for everyone."""
    LOCAL = "local"
    """The local list, for everyone (internal traffic policy Local)."""
    LOCAL_FROM_OUTSIDE = "local-from-outside"
    """External traffic policy Local with its short-circuit: pods of this node use the cluster
    list unmasqueraded, the node itself uses it masqueraded, everyone else uses the local list and
    keeps the source address (kube-proxy's rule)."""


class Refusal(StrEnum):
    """What a new connection meets where the list to use is empty."""

    REJECT = "reject"
    """Refused at once (reset, or ICMP port unreachable): there is no endpoint anywhere."""
    DROP = "drop"
    """Silence: there are endpoints, but none on this node (policy Local)."""


class Masquerade(StrEnum):
    """Whose connections leave with this node's address as source (hairpins always do)."""

    NEVER = "never"
    OFF_CLUSTER = "off-cluster"
    """Sources that are not pods, as the node's detect-local mode tells them."""
    ALWAYS = "always"


class Endpoint(Struct, frozen=True):
    """An address and port that answers for a service; `weight` is the number of slots it holds."""

    address: Address
    port: int
    weight: int = 1
    local: bool = False
    """Runs on this node."""
    terminating: bool = False
    """Serves only because no ready endpoint is left."""
    pod: str | None = None
    node: str | None = None

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}"


class VirtualServer(Struct, frozen=True, kw_only=True):
    """One address (or node port), protocol and port that this node answers, and how."""

    key: Key
    owner: ServicePortName
    kind: Kind
    cluster: tuple[Endpoint, ...]
    """Endpoints under policy Cluster, sorted by address and port."""
    local: tuple[Endpoint, ...]
    """Endpoints under policy Local; empty where no policy of the service is Local."""
    use: Use = Use.CLUSTER
    when_empty: Refusal = Refusal.REJECT
    affinity_seconds: int | None = None
    """How long a client stays with its endpoint after its last new connection; None: not at all."""
    allowed_sources: tuple[Network, ...] | None = None
    """Who may connect at all, collapsed and sorted; None is everyone."""
    masquerade: Masquerade = Masquerade.NEVER
    algorithm: Algorithm = Algorithm.RANDOM
    scheduler: str = ""
    """IPVS scheduler by annotation; empty: as the algorithm and the node's settings say."""
    drain_seconds: int | None = None
    """How long flows of an endpoint that left may go on; None: as the node's settings say."""
    proxy_protocol: bool = False
    """Whether each TCP connection to an endpoint begins with the client's address (PROXY protocol
    version 2), where a process connects to it: a kernel cannot."""
    keeps_failing: bool = False
    """Whether endpoints that refuse or time out get connections like others, where a process
    connects to them: a kernel does not know who does."""


class PodSources(Struct, frozen=True):
    """How a packet of one of the cluster's pods is recognised: by source range or by interface.

    Both empty: it cannot be, and nobody is masqueraded for being off-cluster.
    `interface` is a name, or a prefix that ends in ``*``.
    """

    cidrs: tuple[Network, ...] = ()
    interface: str = ""


class NodeNetwork(Struct, frozen=True, kw_only=True):
    """The node-wide part of the table; a change of it touches every virtual server."""

    pod_sources: PodSources = PodSources()
    node_port_ranges: tuple[Network, ...] = ()
    """Own addresses inside these ranges answer node ports; loopback never does."""
    service_cidrs: tuple[Network, ...] = ()
    """Cluster IPs inside these ranges that no service has are dropped."""
    own_addresses: tuple[Address, ...] = ()
    """Addresses of this node's interfaces, sorted, without loopback's; empty: not known."""
    primary_addresses: tuple[Address, ...] = ()
    """The node's own addresses by its Node object or settings, at most one of each family."""
    masquerade_mark: int = 0x4000
    health_ports: tuple[tuple[NamespacedName, int], ...] = ()
    """Health-check node ports (TCP), sorted by service. The daemon itself answers there, and a
    firewall of the host may have to let that pass."""


class Before(StrEnum):
    """Why one service goes before another that claims the same key."""

    AGE = "is older"
    NAME = "is of the same age and first by name"
    NAME_ALONE = "is first by name (neither says when it was created)"
    DATED = "alone says when it was created"


class Conflict(Struct, frozen=True):
    """Two services claim one key: `winner` has it, `losers` do not, by the stated rule."""

    key: Key
    winner: ServicePortName
    losers: tuple[ServicePortName, ...]
    why: Before = Before.AGE
    """Why the winner goes before the first of the losers."""

    def __str__(self) -> str:
        losers = ", ".join(str(name) for name in self.losers)
        return (
            f"{self.key} is claimed by {self.winner}, which {self.why} and has it, and by {losers}"
        )


class Table(Struct, frozen=True):
    """The resolved table. Immutable: an update shares everything that did not change.

    `claims` holds for each key everyone who wants it, the winner first; `by_service` holds for each
    service everything it wants, including what it lost.
    """

    by_service: Map[NamespacedName, tuple[VirtualServer, ...]]
    claims: Map[Key, tuple[VirtualServer, ...]]
    contested: Map[Key, Conflict]
    network: NodeNetwork

    def virtual_servers(self) -> list[VirtualServer]:
        """Return every virtual server that a backend has to serve, in no particular order."""
        return [claim[0] for claim in self.claims.values()]


class Changes(Struct, frozen=True):
    """What one update of the table means for a backend.

    `virtual_servers` maps each key that changed to what it is now, or to None when it is gone.
    `network` is the node-wide part where that changed, else None.
    """

    virtual_servers: Mapping[Key, VirtualServer | None]
    network: NodeNetwork | None = None

    def __bool__(self) -> bool:
        return bool(self.virtual_servers) or self.network is not None

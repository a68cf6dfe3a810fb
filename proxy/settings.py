"""What the operator decides about this node, as far as the resolved table depends on it.

Lives here: typed settings with their defaults. Must not: read files or flags (config does).
"""

from enum import StrEnum

from msgspec import Struct

from vipd.proxy.names import Address, Network


class DetectLocal(StrEnum):
    """How the node tells its own pods from other sources (kube-proxy's ``detectLocalMode``)."""

    CLUSTER_CIDR = "ClusterCIDR"
    NODE_CIDR = "NodeCIDR"
    BRIDGE_INTERFACE = "BridgeInterface"
    INTERFACE_NAME_PREFIX = "InterfaceNamePrefix"


class IpvsSettings(Struct, frozen=True, kw_only=True):
    """What the IPVS dataplane is told; the fields of kube-proxy's ``ipvs`` section."""

    scheduler: str = "rr"
    """Scheduler of virtual servers whose Service says nothing else."""
    tcp_timeout: int = 0
    """Seconds that an idle TCP connection is kept; 0 leaves what the kernel has."""
    tcp_fin_timeout: int = 0
    """Seconds that a TCP connection is kept after a FIN; 0 leaves what the kernel has."""
    udp_timeout: int = 0
    """Seconds that an idle UDP flow is kept; 0 leaves what the kernel has."""
    strict_arp: bool = False
    """Answer ARP only for addresses of the interface asked (arp_ignore=1, arp_announce=2)."""


class UserspaceSettings(Struct, frozen=True, kw_only=True):
    """What the userspace dataplane is told."""

    workers: int = 0
    """Worker processes; 0: one for each processor that this process may use."""
    transparent: bool = False
    """Whether endpoints on this node see their clients' addresses, as in the other modes. Off: it
    takes CAP_NET_RAW in the workers, a policy rule, and a rule that every arriving packet meets."""
    transparent_bit: int = 12
    """Bit of the packet mark (0-31) that answers to transparent connections get. 12 is none of
    those that kube-proxy, Calico, Cilium, Tailscale or the portmap plugin take by default."""

    @property
    def mark(self) -> int:
        """The packet mark of the transparent mode, 0 where it is off."""
        return 1 << self.transparent_bit if self.transparent else 0


class DataplaneSettings(Struct, frozen=True, kw_only=True):
    """What the operator decides about dataplanes, beside what the resolved table says."""

    ipvs: IpvsSettings = IpvsSettings()
    userspace: UserspaceSettings = UserspaceSettings()
    drain_seconds: int = 900
    """How long flows may go on to an endpoint that is gone or terminating, where its Service says
    nothing else, and what a dataplane that was left needs for its old flows."""


class ConntrackSettings(Struct, frozen=True, kw_only=True):
    """What connection tracking is set to at a start; kube-proxy's ``conntrack`` section.

    0 leaves what the kernel has.
    """

    max_per_core: int = 32768
    """Most entries of the table, for each processor."""
    min: int = 131072
    """Most entries of the table at least, however few processors there are."""
    tcp_established_seconds: int = 86400
    """How long an idle TCP connection is kept."""
    tcp_close_wait_seconds: int = 3600
    """How long a TCP connection is kept that one side has closed."""
    tcp_be_liberal: bool = False
    """Take packets outside of the TCP window for valid."""
    udp_seconds: int = 0
    """How long an UDP flow without an answer is kept."""
    udp_stream_seconds: int = 0
    """How long an idle UDP flow with answers is kept."""


class HttpSettings(Struct, frozen=True, kw_only=True):
    """Where the daemon answers over HTTP; addresses and ports as kube-proxy's defaults."""

    healthz: tuple[Address, int] | None = None
    """Where /healthz and /livez answer; None: nowhere."""
    metrics: tuple[Address, int] | None = None
    """Where /metrics, /proxyMode, /configz, /statusz and /flagz answer; None: nowhere."""
    must_bind: bool = False
    """End where one of them cannot be listened on, instead of trying again."""
    counts_endpoints: bool = True
    """Whether /metrics has new connections for each service and endpoint."""


class NodeSettings(Struct, frozen=True, kw_only=True):
    """Settings of one node; everything that `resolve` needs beside the snapshot."""

    node_name: str
    """Name of this node; decides which endpoints are local. Default: the lower-cased host name."""
    node_ips: tuple[Address, ...] = ()
    """This node's addresses. Of a family that has none here: those of its Node object."""
    detect_local: DetectLocal = DetectLocal.CLUSTER_CIDR
    """Which sources count as pods; the others are masqueraded when they use a cluster IP."""
    cluster_cidrs: tuple[Network, ...] = ()
    """Pod networks for ClusterCIDR, at most one of each family. Empty: nobody can be told apart."""
    local_interface: str = ""
    """Bridge name for BridgeInterface, or name prefix for InterfaceNamePrefix."""
    masquerade_all: bool = False
    """Masquerade every connection to a cluster IP, whatever its source."""
    masquerade_bit: int = 14
    """Bit of the packet mark (0-31) that asks for masquerade until postrouting; kube-proxy's 14."""
    node_port_addresses: tuple[Network, ...] | None = None
    """Ranges of own addresses that answer node ports. None (the default): the node's primary
    addresses only, as kube-proxy's nftables mode does; every own address where neither a Node
    object nor `node_ips` says which they are. All: 0.0.0.0/0 and ::/0."""
    node_port_primary: bool = False
    """Whether the primary addresses answer them beside `node_port_addresses`."""
    serve_external_ips: bool = True
    """Whether `spec.externalIPs` of Services are served (CVE-2020-8554, KEP-5707)."""
    service_cidrs: tuple[Network, ...] = ()
    """Ranges of cluster IPs, added to those of ServiceCIDR objects: unallocated addresses in them
    are dropped. Empty: nothing is dropped."""
    dns_listens: frozenset[tuple[Address, int]] = frozenset()
    """Where vipd's DNS server answers on this node, over TCP and UDP: no virtual server does."""

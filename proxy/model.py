"""Kubernetes objects, as far as a service load balancer cares: small, frozen, already checked.

Lives here: one type for each kind, with parsed addresses and defaults filled in. What is not in
these types has no influence on the node. Must not: know how objects are encoded (decode.py), where
they come from (sources/) or what follows from them (resolve.py).
Source: core/v1 and discovery.k8s.io/v1 of the Kubernetes API, v1.37.
"""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType

from msgspec import Struct

from vipd.proxy.names import Address, Family, NamespacedName, Network, Protocol


class ServiceType(StrEnum):
    """``spec.type`` of a Service."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"
    EXTERNAL_NAME = "ExternalName"


class TrafficPolicy(StrEnum):
    """``spec.internalTrafficPolicy`` and ``spec.externalTrafficPolicy``."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


class TrafficDistribution(StrEnum):
    """``spec.trafficDistribution``, as far as anything follows from it (KEP-3015)."""

    ANYWHERE = ""
    SAME_ZONE = "PreferSameZone"
    """Also PreferClose, its older name."""
    SAME_NODE = "PreferSameNode"


class Algorithm(StrEnum):
    """How an endpoint is chosen for a new connection; values of annotation ``vipd/algorithm``."""

    RANDOM = "random"
    ROUND_ROBIN = "round-robin"
    SOURCE_HASH = "source-hash"
    MAGLEV = "maglev"
    LEAST_CONNECTIONS = "least-connections"
    """The endpoint that has fewest connections for its weight, as far as this node knows."""


SCHEDULERS: Mapping[str, str] = MappingProxyType(
    {
        "rr": "round robin",
        "wrr": "weighted round robin",
        "lc": "least connections",
        "wlc": "weighted least connections",
        "lblc": "locality-based least connections",
        "lblcr": "locality-based least connections with replication",
        "sh": "source hash",
        "mh": "Maglev hash",
        "dh": "destination hash",
        "sed": "shortest expected delay",
        "nq": "never queue",
        "fo": "weighted fail-over",
        "ovf": "weighted overflow",
    }
)
"""Schedulers of IPVS by the kernel's names, and what they mean; the names are the values of
annotation ``vipd/ipvs-scheduler``. Source: net/netfilter/ipvs/ip_vs_*.c, Linux 6.1."""


class ServicePort(Struct, frozen=True, kw_only=True):
    """A port of a Service. `node_port` is 0 where there is none."""

    name: str
    protocol: Protocol
    port: int
    node_port: int = 0
    target_port: int | str = 0


class Flaw(Struct, frozen=True):
    """An entry of an object that is wrong and was left out; the rest of the object holds.

    `field` is its path, such as ``spec.externalIPs[1]``, `why` the rest of the sentence.
    """

    field: str
    why: str


class Service(Struct, frozen=True, kw_only=True):
    """A Service. Tuples keep the order of the API object; both families stand together."""

    name: NamespacedName
    created: datetime | None = None
    type: ServiceType = ServiceType.CLUSTER_IP
    headless: bool = False
    """``clusterIP: None`` or the label service.kubernetes.io/headless."""
    proxy_name: str | None = None
    """Label service.kubernetes.io/service-proxy-name: some other proxy serves it (any value)."""
    cluster_ips: tuple[Address, ...] = ()
    families: tuple[Family, ...] = ()
    """``spec.ipFamilies``; empty where it is not said, as in most manifests."""
    external_ips: tuple[Address, ...] = ()
    load_balancer_ips: tuple[Address, ...] = ()
    """``status.loadBalancer.ingress[].ip`` whose ipMode is VIP or absent."""
    ports: tuple[ServicePort, ...] = ()
    internal_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    external_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    affinity_seconds: int | None = None
    """Time-out of ClientIP affinity in seconds, or None without affinity."""
    source_ranges: tuple[Network, ...] = ()
    ranges_lost: bool = False
    """A source range was left out: a family that has no other one lets nobody in."""
    health_check_node_port: int = 0
    publish_not_ready: bool = False
    distribution: TrafficDistribution = TrafficDistribution.ANYWHERE
    """For who makes EndpointSlices; whoever uses them looks at their hints alone."""
    selector: tuple[tuple[str, str], ...] = ()
    external_name: str = ""
    algorithm: Algorithm = Algorithm.RANDOM
    weights: tuple[tuple[str, int], ...] = ()
    """Annotation ``vipd/weights``: (endpoint address or pod name, weight); others weigh 1."""
    scheduler: str = ""
    """Annotation ``vipd/ipvs-scheduler``; one of SCHEDULERS, or empty."""
    drain_seconds: int | None = None
    """Annotation ``vipd/drain-seconds``: how long flows may go on to an endpoint that left."""
    proxy_protocol: bool = False
    """Annotation ``vipd/proxy-protocol``: endpoints are told the client's address, by version 2."""
    keeps_failing: bool = False
    """Annotation ``vipd/keep-failing-endpoints``: those that fail get connections like others."""
    flaws: tuple[Flaw, ...] = ()


class SliceEndpoint(Struct, frozen=True, kw_only=True):
    """An endpoint of a slice: address, conditions and where it runs; the port is the slice's.

    Absent conditions are filled in: ready and serving default to true, terminating to false.
    """

    address: Address
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node: str | None = None
    zone: str | None = None
    zone_hints: frozenset[str] = frozenset()
    node_hints: frozenset[str] = frozenset()
    hostname: str | None = None
    pod: str | None = None
    """Name of the pod in targetRef, if it is one."""


class SlicePort(Struct, frozen=True):
    """A port of a slice. The empty name is a name; ports without a number are not kept."""

    name: str
    protocol: Protocol
    port: int


class EndpointSlice(Struct, frozen=True, kw_only=True):
    """An EndpointSlice of one service and one family (FQDN slices are not kept)."""

    name: NamespacedName
    service: NamespacedName
    family: Family
    endpoints: tuple[SliceEndpoint, ...] = ()
    ports: tuple[SlicePort, ...] = ()
    headless: bool = False
    """Label service.kubernetes.io/headless, copied from the service: no virtual server uses it."""
    triggered: datetime | None = None
    """Annotation endpoints.kubernetes.io/last-change-trigger-time."""
    flaws: tuple[Flaw, ...] = ()


class ContainerPort(Struct, frozen=True):
    """A named port of a container or of a restartable init container."""

    name: str
    protocol: Protocol
    port: int


class Pod(Struct, frozen=True, kw_only=True):
    """A Pod, as far as the endpoints of its services depend on it."""

    name: NamespacedName
    labels: tuple[tuple[str, str], ...] = ()
    ips: tuple[Address, ...] = ()
    node: str | None = None
    ready: bool = False
    terminating: bool = False
    finished: bool = False
    """Phase Succeeded or Failed: never an endpoint."""
    ports: tuple[ContainerPort, ...] = ()
    hostname: str = ""
    subdomain: str = ""
    service_links: bool = True
    """``spec.enableServiceLinks``: its containers get variables of its namespace's services."""


class Node(Struct, frozen=True, kw_only=True):
    """A Node: its own addresses (InternalIP before ExternalIP), pod CIDRs and zone."""

    name: str
    addresses: tuple[Address, ...] = ()
    pod_cidrs: tuple[Network, ...] = ()
    zone: str | None = None
    leaving: str = ""
    """Why load balancers outside should send it nothing new: it is being deleted, or will be by the
    cluster autoscaler. Empty: it stays. No virtual server depends on it."""


class Namespace(Struct, frozen=True):
    """A Namespace: it exists."""

    name: str


class ServiceCIDR(Struct, frozen=True):
    """A ServiceCIDR (networking.k8s.io/v1): a range that cluster IPs are allocated from."""

    name: str
    cidrs: tuple[Network, ...]


KubernetesObject = Service | EndpointSlice | Pod | Node | Namespace | ServiceCIDR

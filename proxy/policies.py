"""What the policies of a virtual server say of one packet, each with its reason (`vipd explain`).

Lives here: which endpoints its source may use, whether they see the source, who is let in at all,
and the lines that name the policies. Pure. Must not: know a dataplane, or shares (explain.py).
"""

from collections.abc import Iterator

from msgspec import Struct

from vipd.backends.protocol import Packet
from vipd.proxy.model import Algorithm
from vipd.proxy.question import inside
from vipd.proxy.virtualserver import Endpoint, Kind, Masquerade, NodeNetwork, Use, VirtualServer


class Choice(Struct, frozen=True):
    """What the policies say for one packet."""

    endpoints: tuple[Endpoint, ...]
    local_only: bool
    masquerade: bool
    because: str


def choice_of(server: VirtualServer, packet: Packet, network: NodeNetwork) -> Choice:
    """Return the list of endpoints that this packet's source may use, and what they see of it."""
    pod = _is_pod(packet, network)
    if server.use is Use.CLUSTER:
        return Choice(server.cluster, False, *_masquerade(server, pod, network))
    if server.use is Use.LOCAL:
        return Choice(server.local, True, *_masquerade(server, pod, network))
    if pod:
        return Choice(
            server.cluster, False, False,
            "no: policy Local keeps the source, and a pod is known to every node",
        )  # fmt: skip
    if packet.from_node:
        return Choice(
            server.cluster, False, True,
            "yes: the node itself may reach every endpoint under policy Local, as the node",
        )  # fmt: skip
    return Choice(server.local, True, False, "no: policy Local keeps the source address")


def denied(server: VirtualServer, packet: Packet) -> str:
    """Return why the source may not connect at all, or an empty text."""
    allowed = server.allowed_sources
    if allowed is None or inside(packet.source, allowed):
        return ""
    ranges = ", ".join(map(str, allowed)) or "none"
    return f"{packet.source} is not in loadBalancerSourceRanges ({ranges})"


_HOW = {
    Algorithm.RANDOM: "random: each new connection is given a slot by chance",
    Algorithm.ROUND_ROBIN: "round-robin: each new connection is given the next slot in turn",
    Algorithm.SOURCE_HASH: "source-hash: a source address always gets the same slot; the shares "
    "are those of all sources together",
    Algorithm.MAGLEV: "maglev: source address and port decide; the shares are those of the table",
    Algorithm.LEAST_CONNECTIONS: "least-connections: the endpoint with fewest connections for its "
    "weight; the shares are those of connections that last equally long",
}


def policies(server: VirtualServer, packet: Packet, network: NodeNetwork) -> Iterator[str]:
    """Yield what was decided by which policy."""
    match server.use:
        case Use.CLUSTER:
            which = "internal" if server.kind is Kind.CLUSTER else "external"
            yield f"{which} traffic policy Cluster: endpoints of every node"
        case Use.LOCAL:
            yield "internal traffic policy Local: endpoints of this node only"
        case _ if _is_pod(packet, network):
            yield "external traffic policy Local, but a pod may use endpoints of every node"
        case _ if packet.from_node:
            yield "external traffic policy Local, but the node itself may use every endpoint"
        case _:
            yield "external traffic policy Local: endpoints of this node only"
    if server.allowed_sources is not None and not denied(server, packet):
        ranges = ", ".join(map(str, server.allowed_sources))
        yield f"source allowed: {packet.source} is in loadBalancerSourceRanges ({ranges})"
    yield _HOW[server.algorithm]
    if server.scheduler:
        yield f"scheduler {server.scheduler}, in mode ipvs"
    if server.proxy_protocol:
        yield "endpoints are told the client's address by PROXY protocol v2, in mode userspace"
    if server.keeps_failing:
        yield "endpoints that fail get connections like others, in mode userspace too"
    if server.affinity_seconds is not None:
        yield (
            f"ClientIP affinity, {server.affinity_seconds} s: a remembered client goes where it "
            "was; the shares are those of a new one"
        )
    if any(one.terminating for one in (*server.cluster, *server.local)):
        yield "no endpoint is ready: terminating ones that still serve are used"


def _masquerade(server: VirtualServer, pod: bool, network: NodeNetwork) -> tuple[bool, str]:
    match server.masquerade:
        case Masquerade.ALWAYS if server.kind is Kind.CLUSTER:
            return True, "yes: masquerade-all is set"
        case Masquerade.ALWAYS:
            return True, (
                "yes: external traffic under policy Cluster, whose answers have to come back "
                "through this node"
            )
        case Masquerade.OFF_CLUSTER if pod:
            return False, f"no: the source is a pod ({_told_by(network)})"
        case Masquerade.OFF_CLUSTER:
            return True, f"yes: the source is not a pod ({_told_by(network)})"
        case _ if server.kind is Kind.CLUSTER:
            return False, "no: pods cannot be told from others (--cluster-cidr is not set)"
        case _:
            return False, "no: policy Local keeps the source address"


def _is_pod(packet: Packet, network: NodeNetwork) -> bool:
    """Return whether the node takes the source for one of the cluster's pods."""
    wanted = network.pod_sources.interface
    if wanted.endswith("*"):
        return packet.interface.startswith(wanted[:-1])
    if wanted:
        return packet.interface == wanted
    return inside(packet.source, network.pod_sources.cidrs)


def _told_by(network: NodeNetwork) -> str:
    sources = network.pod_sources
    if sources.interface:
        return f"interface {sources.interface}"
    return f"pod network {', '.join(map(str, sources.cidrs))}"

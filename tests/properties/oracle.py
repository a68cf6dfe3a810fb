"""The oracle: what becomes of a packet by the table of virtual servers, and nothing else.

`shares` reads the table and the reference (kube-proxy.md 2.2 and 2.3), and knows no dataplane.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from tests.properties.statements import Packet

from vipd.proxy import virtualserver as table_of
from vipd.proxy.names import Address, Network, Protocol
from vipd.proxy.virtualserver import Endpoint, Key, Kind, Masquerade, Use, VirtualServer


class Outcome(NamedTuple):
    """What becomes of a packet: dnat (to `target`), pass, reject or drop."""

    verdict: str
    target: str = ""
    masqueraded: bool = False


Shares = dict[Outcome, Fraction]
"""Everything that can become of a packet, with probabilities that add up to 1."""


def promised(table: table_of.Table, packet: Packet, own: frozenset[Address]) -> frozenset[Outcome]:
    """Return what may become of the packet by the table of virtual servers and the reference."""
    return frozenset(shares(table, packet, own))


def shares(table: table_of.Table, packet: Packet, own: frozenset[Address]) -> Shares:
    """Return what becomes of the packet, endpoints by their weights."""
    foreign = packet.destination not in own
    to_cluster_ip = foreign and packet.destination in {
        one.key.address for one in table.virtual_servers() if one.kind is Kind.CLUSTER
    }
    if packet.protocol == "tcp" and not packet.syn:  # of a connection that nobody knows any more
        return {Outcome("reject" if to_cluster_ip else "pass"): Fraction(1)}
    server = addressed(table, packet, own)
    if server is not None:
        return _served(server, packet, table, own)
    if foreign:
        if to_cluster_ip:
            return {Outcome("reject"): Fraction(1)}
        if _inside(packet.destination, table.network.service_cidrs):
            return {Outcome("drop"): Fraction(1)}
    return {Outcome("pass"): Fraction(1)}


def addressed(
    table: table_of.Table, packet: Packet, own: frozenset[Address]
) -> VirtualServer | None:
    """Return the virtual server that the packet is for."""
    if packet.protocol not in ("tcp", "udp", "sctp"):
        return None
    protocol = Protocol(packet.protocol.upper())
    claims = table.claims.get(Key(packet.family, packet.destination, protocol, packet.port))
    if claims:
        return claims[0]
    here = packet.destination in own and not packet.destination.is_loopback
    if not here or not _inside(packet.destination, table.network.node_port_ranges):
        return None
    claims = table.claims.get(Key(packet.family, None, protocol, packet.port))
    return claims[0] if claims else None


def _served(
    server: VirtualServer,
    packet: Packet,
    table: table_of.Table,
    own: frozenset[Address],
) -> Shares:
    allowed = server.allowed_sources
    if allowed is not None and not _inside(packet.source, allowed):
        return {Outcome("drop"): Fraction(1)}
    pod, node = _is_pod(packet, table.network), packet.source in own
    masquerade = server.masquerade is Masquerade.ALWAYS or (
        server.masquerade is Masquerade.OFF_CLUSTER and not pod
    )
    endpoints = server.local
    match server.use:
        case Use.CLUSTER:
            endpoints = server.cluster
        case Use.LOCAL_FROM_OUTSIDE if pod:
            endpoints = server.cluster
        case Use.LOCAL_FROM_OUTSIDE if node:
            endpoints, masquerade = server.cluster, True
    if not endpoints:
        return {Outcome(server.when_empty.value): Fraction(1)}
    total = sum(one.weight for one in endpoints)
    return {
        _reached(one, masquerade or _is_hairpin(one, packet, table), own): Fraction(
            one.weight, total
        )
        for one in endpoints
    }


def _is_hairpin(endpoint: Endpoint, packet: Packet, table: table_of.Table) -> bool:
    """Return whether an endpoint reaches itself, and some service knows that it runs here."""
    return endpoint.address == packet.source and any(
        one.local and (one.address, one.port) == (endpoint.address, endpoint.port)
        for server in table.virtual_servers()
        if server.key.protocol.lower() == packet.protocol
        for one in (*server.cluster, *server.local)
    )


def _reached(endpoint: Endpoint, masquerade: bool, own: frozenset[Address]) -> Outcome:
    masquerade = masquerade and endpoint.address not in own
    return Outcome("dnat", f"{endpoint.address} . {endpoint.port}", masquerade)


def _is_pod(packet: Packet, network: table_of.NodeNetwork) -> bool:
    wanted = network.pod_sources.interface
    if wanted.endswith("*"):
        return packet.interface.startswith(wanted[:-1])
    if wanted:
        return packet.interface == wanted
    return _inside(packet.source, network.pod_sources.cidrs)


def _inside(address: Address, networks: Sequence[Network]) -> bool:
    return any(one.version == address.version and address in one for one in networks)

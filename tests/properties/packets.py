"""What a packet meets: the model of the kernel's hooks, and the oracle that says what is right.

`outcomes` runs the rules of the modelled kernel. `promised` reads the table of virtual servers and
the reference (kube-proxy.md 2.2 and 2.3), and knows nothing of the compiler.
"""

from collections.abc import Sequence
from copy import deepcopy
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from tests.properties.kernel import Kernel, Table
from tests.properties.statements import Flight, Packet, parse

from vipd.backends.nftables.objects import TABLE
from vipd.proxy import virtualserver as table_of
from vipd.proxy.names import Address, Network, Protocol
from vipd.proxy.virtualserver import Endpoint, Key, Kind, Masquerade, Use, VirtualServer

Memory = dict[str, dict[str, str]]
"""Clients remembered, by map and source."""


class Outcome(NamedTuple):
    """What becomes of a packet: dnat (to `target`), pass, reject or drop."""

    verdict: str
    target: str = ""
    masqueraded: bool = False


class _Held:
    def __init__(self, table: Table, memory: Memory) -> None:
        self._table = table
        self.memory = memory

    def _of(self, container: str) -> dict[str, str]:
        held = self._table.containers[container]
        return self.memory.setdefault(container, {}) if "dynamic" in held.spec else held.elements

    def get(self, container: str, key: str) -> str | None:
        return self._of(container).get(key)

    def interval(self, container: str, key: str) -> bool:
        head, _, last = key.rpartition(" . ")
        for other in self._of(container):
            other_head, _, other_last = other.rpartition(" . ")
            if other_head == head and ip_address(last) in ip_network(other_last):
                return True
        return False

    def update(self, container: str, key: str, value: str | None) -> None:
        held = self._of(container)
        if value is None:
            held.pop(key, None)
        else:
            held[key] = value


def outcomes(
    kernel: Kernel, packet: Packet, own: frozenset[Address], memory: Memory | None = None
) -> dict[Outcome, Memory]:
    """Return everything that can become of the packet, each with what is remembered then."""
    found: dict[Outcome, Memory] = {}
    choices: list[int] = []
    table = kernel.tables[packet.family, TABLE]
    while True:
        held = _Held(table, deepcopy(memory or {}))
        flight = Flight(packet, own, held, choices)
        verdict = _travel(table, flight)
        found.setdefault(_outcome(verdict, flight), held.memory)
        widths = flight.widths
        choices = choices[: len(widths)]
        while choices and choices[-1] + 1 == widths[len(choices) - 1]:
            choices.pop()
        if not choices:
            return found
        choices[-1] += 1


def _outcome(verdict: str, flight: Flight) -> Outcome:
    if verdict != "accept":
        return Outcome(verdict)
    if not flight.translated:
        return Outcome("pass", masqueraded=flight.masqueraded)
    # What ends on this node shows its source to nobody else: 0. of the reference.
    masqueraded = flight.masqueraded and flight.destination not in flight.own
    return Outcome("dnat", f"{flight.destination} . {flight.port}", masqueraded)


def _travel(table: Table, flight: Flight) -> str:
    """Return the verdict after all hooks on the packet's way; it is routed after translation."""
    verdict = _hook(table, flight, "prerouting" if flight.packet.interface else "output")
    if verdict != "accept":
        return verdict
    arrives = flight.destination in flight.own
    if flight.packet.interface:
        rest = ["input"] if arrives else ["forward", "postrouting"]
    else:  # what the node sends to itself goes out and comes in again
        rest = ["postrouting", "input"] if arrives else ["postrouting"]
    for hook in rest:
        verdict = _hook(table, flight, hook)
        if verdict != "accept":
            return verdict
    return "accept"


def _hook(table: Table, flight: Flight, hook: str) -> str:
    """Run the base chains of a hook by priority; what none refuses is accepted."""
    there = []
    for name, chain in table.chains.items():
        words = chain.hook.split(" ")
        if len(words) == 6 and words[3] == hook:
            there.append((int(words[5]), name))
    for _, name in sorted(there):
        verdict = _chain(table, flight, name)
        if verdict in ("drop", "reject"):
            return verdict
    return "accept"


def _chain(table: Table, flight: Flight, name: str) -> str | None:
    """Return accept, drop or reject, or None at the chain's end."""
    for text, _ in table.chains[name].rules:
        verdict = _rule(text, flight)
        if verdict is None:
            continue
        word, _, target = verdict.partition(" ")
        if word == "return":
            return None
        if word == "goto":
            return _chain(table, flight, target)
        if word == "jump":
            after = _chain(table, flight, target)
            if after is not None:
                return after
            continue
        return verdict
    return None


def _rule(text: str, flight: Flight) -> str | None:
    for statement in parse(text):
        result = statement(flight)
        if result is False:
            return None
        if isinstance(result, str):
            return result
    return None


def promised(table: table_of.Table, packet: Packet, own: frozenset[Address]) -> frozenset[Outcome]:
    """Return what may become of the packet by the table of virtual servers and the reference."""
    if packet.protocol == "tcp" and not packet.syn:
        return frozenset({Outcome("pass")})
    server = _addressed(table, packet, own)
    if server is not None:
        return _served(server, packet, table, own)
    if packet.destination not in own:
        cluster_ips = {
            one.key.address for one in table.virtual_servers() if one.kind is Kind.CLUSTER
        }
        if packet.destination in cluster_ips:
            return frozenset({Outcome("reject")})
        if _inside(packet.destination, table.network.service_cidrs):
            return frozenset({Outcome("drop")})
    return frozenset({Outcome("pass")})


def _addressed(
    table: table_of.Table, packet: Packet, own: frozenset[Address]
) -> VirtualServer | None:
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
) -> frozenset[Outcome]:
    allowed = server.allowed_sources
    if allowed is not None and not _inside(packet.source, allowed):
        return frozenset({Outcome("drop")})
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
        return frozenset({Outcome(server.when_empty.value)})
    return frozenset(
        _reached(one, masquerade or _is_hairpin(one, packet, table), own) for one in endpoints
    )


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

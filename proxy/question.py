"""What `vipd explain` is asked: from a person's words to the first packet of a connection.

Lives here: how a source and a destination may be written, and whom the names mean. Pure. Must not:
say what becomes of the packet (explain.py).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from vipd.backends.protocol import Packet
from vipd.proxy.errors import ConfigError, ControlError, QuestionError
from vipd.proxy.model import EndpointSlice, Service, SliceEndpoint
from vipd.proxy.names import (
    Address,
    NamespacedName,
    Network,
    Protocol,
    family_of,
    parse_address,
)
from vipd.proxy.resolve import node_addresses
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import Snapshot
from vipd.proxy.virtualserver import Key, Table

NODE = "node"
"""The word for the node itself, as source and as destination."""
MOST_NAMES = 5
_SOURCE = "an address, a pod as NAMESPACE/NAME, a node's name, or 'node' for this node itself"
_DESTINATION = (
    "ADDRESS:PORT, [IPV6]:PORT, SERVICE:PORT as NAMESPACE/NAME or NAME.NAMESPACE, or node:PORT, "
    "each with /TCP, /UDP or /SCTP behind it if you like"
)


class Question(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The words of `vipd explain`, as they travel over the control socket."""

    source: str
    destination: str
    interface: str = ""
    mode: str = ""
    """Empty: the daemon's."""
    live: bool = False


def question(text: str) -> Question:
    """Return the question in a JSON text; raise ControlError."""
    try:
        return msgspec.json.decode(text, type=Question)
    except msgspec.DecodeError as error:
        raise ControlError(f"request not understood: {error}") from error


class Asked(NamedTuple):
    """The packet that a question means, who sends it, and what had to be assumed."""

    packet: Packet
    sender: str
    notes: tuple[str, ...]


class Destination(NamedTuple):
    """A destination in its parts; `protocol` is None where none is written."""

    host: str
    port: str
    protocol: Protocol | None


def asked(wanted: Question, snapshot: Snapshot, table: Table, settings: NodeSettings) -> Asked:
    """Return the packet that is meant.

    Raise ConfigError for words that mean nothing, QuestionError for names that nobody has.
    """
    destination = parse_destination(wanted.destination)
    own = own_addresses(snapshot, settings)
    sources = _sources(wanted.source, snapshot, settings)
    service = _service(destination.host, snapshot)
    places = service.cluster_ips if service else _addresses(destination.host, snapshot, settings)
    pairs = [(a, b) for b in places for a in sources if a.version == b.version]
    if not pairs:
        raise QuestionError(f"{wanted.source} has no address of the family of {wanted.destination}")
    source, address = pairs[0]
    port, protocol = _port(destination, service, address, table)
    notes: list[str] = []
    to_node = address in own or address.is_loopback
    if not to_node and _may_be_own(address, port, protocol, snapshot, table):
        to_node = True
        notes.append(f"{address} is taken for an address of this node: no Node object has it")
    from_node = source in own or source.is_loopback
    packet = Packet(
        source=source,
        destination=address,
        protocol=protocol,
        port=port,
        from_node=from_node,
        to_node=to_node,
        interface="" if from_node else wanted.interface,
    )
    pods_come_by = table.network.pod_sources.interface
    if pods_come_by and not packet.interface and _runs_here(source, snapshot, settings):
        packet = replace(packet, interface=pods_come_by.rstrip("*"))
        notes.append(
            f"taken to come in through {pods_come_by}, as pods of this node do (--interface)"
        )
    return Asked(packet, _sender(packet, snapshot, table, settings), tuple(notes))


def own_addresses(snapshot: Snapshot, settings: NodeSettings) -> frozenset[Address]:
    """Return the addresses that this node is known to have, without loopback."""
    node = snapshot.nodes.get(settings.node_name)
    return frozenset((*settings.node_ips, *(node.addresses if node else ())))


def parse_destination(text: str) -> Destination:
    """Return the parts of ``HOST:PORT[/PROTOCOL]``; raise ConfigError."""
    host, colon, rest = text.rpartition(":")
    port, slash, word = rest.partition("/")
    try:
        protocol = Protocol(word.upper()) if slash else None
    except ValueError as error:
        allowed = ", ".join(Protocol)
        raise ConfigError("DST", f"{word!r} is no protocol; there are {allowed}") from error
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if _address(host) is None:
            raise ConfigError("DST", f"{host!r} is no IPv6 address; write {_DESTINATION}")
    elif not colon or not host or not port or {*host} & {*":[]"}:
        raise ConfigError("DST", f"{text!r} is not understood; write {_DESTINATION}")
    if port.isdecimal() and not 1 <= int(port) <= 65535:
        raise ConfigError("DST", f"port {port} is not within 1-65535")
    return Destination(host, port, protocol)


def parse_source(text: str) -> None:
    """Raise ConfigError where a source can be no address and no name."""
    if not text or text.count("/") > 1 or (":" in text and _address(text) is None):
        raise ConfigError("SRC", f"{text!r} is not understood; write {_SOURCE}")


def _address(text: str) -> Address | None:
    try:
        return parse_address(text)
    except ValueError:
        return None


def _sources(text: str, snapshot: Snapshot, settings: NodeSettings) -> Sequence[Address]:
    parse_source(text)
    address = _address(text)
    if address is not None:
        return (address,)
    if text == NODE:
        return _this_node("SRC", snapshot, settings)
    if text in snapshot.nodes:
        return snapshot.nodes[text].addresses
    found: dict[NamespacedName, dict[Address, None]] = {}
    for name, told in pods(snapshot):
        if text in (str(name), name.name):
            found.setdefault(name, {})[told.address] = None
    if not found:
        raise QuestionError(
            f"SRC: no endpoint is a pod called {text}, and no node is; write {_SOURCE}"
        )
    if len(found) > 1:
        raise QuestionError(f"SRC: {text} may be {_listed(found)}")
    return tuple(next(iter(found.values())))


def _addresses(host: str, snapshot: Snapshot, settings: NodeSettings) -> Sequence[Address]:
    if host == NODE:
        return _this_node("DST", snapshot, settings)
    address = _address(host)
    if address is None:
        raise QuestionError(f"DST: no service is called {host}; write {_DESTINATION}")
    return (address,)


def _this_node(what: str, snapshot: Snapshot, settings: NodeSettings) -> Sequence[Address]:
    addresses = node_addresses(snapshot, settings)
    if not addresses:
        raise QuestionError(
            f"{what}: the addresses of this node are not known: no Node object is called "
            f"{settings.node_name} (--node-name, --node-ip)"
        )
    return sorted(addresses, key=lambda one: one.version)


def _service(host: str, snapshot: Snapshot) -> Service | None:
    """Return the service of that name, None for an address; raise QuestionError."""
    if host == NODE or _address(host) is not None:
        return None
    if "/" in host:
        namespace, _, name = host.partition("/")
        found = [NamespacedName(namespace, name)]
    elif "." in host:
        name, namespace = host.split(".")[:2]
        found = [NamespacedName(namespace, name)]
    else:
        found = sorted(one for one in snapshot.services if one.name == host)
    if len(found) > 1:
        raise QuestionError(f"DST: {host} may be {_listed(found)}")
    service = snapshot.services.get(found[0]) if found else None
    if service is not None and not service.cluster_ips:
        raise QuestionError(
            f"DST: {service.name} has no cluster IP"
            f"{' (it is headless)' if service.headless else ''}: no dataplane serves it"
        )
    if service is None:
        raise QuestionError(f"DST: no service is called {host}; write {_DESTINATION}")
    return service


def _port(
    destination: Destination, service: Service | None, address: Address, table: Table
) -> tuple[int, Protocol]:
    """Return port and protocol; where none is written, the one that is answered, else TCP."""
    wanted = [destination.protocol] if destination.protocol else list(Protocol)
    if destination.port.isdecimal():
        port = int(destination.port)
        family = family_of(address)
        for protocol in wanted:
            keys = (Key(family, address, protocol, port), Key(family, None, protocol, port))
            if any(key in table.claims for key in keys):
                return port, protocol
        return port, wanted[0]
    if service is None:
        raise ConfigError("DST", f"port {destination.port!r} is no number")
    for one in service.ports:
        if one.name == destination.port and one.protocol in wanted:
            return one.port, one.protocol
    there = ", ".join(f"{one.name or one.port}/{one.protocol}" for one in service.ports)
    raise QuestionError(
        f"DST: {service.name} has no port {destination.port}; it has {there or 'none'}"
    )


def _may_be_own(
    address: Address, port: int, protocol: Protocol, snapshot: Snapshot, table: Table
) -> bool:
    """Return whether only a node port can be meant, and nothing says whose address it is."""
    family = family_of(address)
    if Key(family, address, protocol, port) in table.claims:
        return False
    if Key(family, None, protocol, port) not in table.claims:
        return False
    if any(address in node.addresses for node in snapshot.nodes.values()):
        return False
    return inside(address, table.network.node_port_ranges) and not inside(
        address, (*table.network.service_cidrs, *table.network.pod_sources.cidrs)
    )


def inside(address: Address, networks: Iterable[Network]) -> bool:
    """Return whether one of the networks holds the address."""
    return any(one.version == address.version and address in one for one in networks)


def pods(snapshot: Snapshot) -> Iterable[tuple[NamespacedName, SliceEndpoint]]:
    """Yield every pod that is an endpoint of some service, as often as it is one."""
    slices: Iterable[tuple[EndpointSlice, ...]] = snapshot.slices.values()
    for group in slices:
        for one in group:
            for told in one.endpoints:
                if told.pod:
                    yield NamespacedName(one.name.namespace, told.pod), told


def _runs_here(address: Address, snapshot: Snapshot, settings: NodeSettings) -> bool:
    return any(
        told.address == address and told.node == settings.node_name for _, told in pods(snapshot)
    )


def _sender(packet: Packet, snapshot: Snapshot, table: Table, settings: NodeSettings) -> str:
    """Return who the source is, as far as anybody knows."""
    if packet.from_node:
        return "this node itself"
    for name, told in pods(snapshot):
        if told.address == packet.source:
            here = told.node == settings.node_name
            return f"pod {name} on {'this node' if here else told.node or 'an unknown node'}"
    for node in snapshot.nodes.values():
        if packet.source in node.addresses:
            return f"node {node.name}"
    if inside(packet.source, table.network.pod_sources.cidrs):
        return "an address of the pod network"
    if table.network.pod_sources.cidrs:
        return "an address outside the pod network"
    return "an address that no object names"


def _listed(names: Iterable[object]) -> str:
    known = sorted(map(str, names))
    return ", ".join(known[:MOST_NAMES]) + (", …" if len(known) > MOST_NAMES else "")

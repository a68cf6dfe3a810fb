"""Netlink messages of IPVS and of local routes, as bytes; and what the kernel answers, as values.

Lives here: packing and parsing, pure. Must not: hold a socket (netlink.py).

pyroute2's classes know all of this, and the tests hold every message against what they encode; but
they need 0.2 ms for one (measured), which is 12 s of the 60,000 that 10,000 services × 5 endpoints
are. Attribute numbers: include/uapi/linux/ip_vs.h and rtnetlink.h, Linux 6.1.
"""

import socket
import struct
from collections.abc import Iterator
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from vipd.backends.ipvs.objects import (
    ADD,
    ROUTE_PROTOCOL,
    SET,
    Destination,
    Manner,
    Operation,
    Route,
    Service,
    Verb,
)
from vipd.backends.ipvs.schedulers import Scheduler
from vipd.proxy.names import Address, Family, Protocol

HEADER = struct.Struct("=IHHII")
REQUEST, ACK, EXCLUSIVE, CREATE, REPLACE, DUMP = 0x1, 0x4, 0x200, 0x400, 0x100, 0x300
ERROR, DONE, MULTI = 2, 3, 0x2
_GENERIC = struct.Struct("=BBH")
_VERSION = 1
_NEW_SERVICE, _SET_SERVICE, _DEL_SERVICE, _GET_SERVICE = 1, 2, 3, 4
_NEW_DEST, _SET_DEST, _DEL_DEST, _GET_DEST = 5, 6, 7, 8
_SET_CONFIG = 12
_SERVICE_COMMANDS = {"a": _NEW_SERVICE, "e": _SET_SERVICE, "d": _DEL_SERVICE}
_DEST_COMMANDS = {"a": _NEW_DEST, "e": _SET_DEST, "d": _DEL_DEST}
_NUMBER = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}
_PROTOCOL_OF_NUMBER = {number: one for one, number in _NUMBER.items()}
_AF = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_PERSISTENT = 0x1
_SCHEDULER_FLAGS = 0x08 | 0x10 | 0x20
_TABLE_LOCAL, _SCOPE_HOST, _TYPE_LOCAL = 255, 254, 2
_NEW_ROUTE, _DEL_ROUTE, _GET_ROUTE = 24, 25, 26
_LOOPBACK = 1
"""Index of lo in every network namespace."""


class Counted(NamedTuple):
    """A real server as the kernel tells of it."""

    address: Address
    port: int
    weight: int
    connections: int
    """Active and inactive."""


class Usage(NamedTuple):
    """What the kernel counts of a real server."""

    address: Address
    port: int
    weight: int
    total: int
    """Connections since it was added; the kernel adds them up every 2 s."""
    active: int
    inactive: int


class SeenRoute(NamedTuple):
    """A route of the table local, as the kernel tells of it."""

    address: Address
    protocol: int
    source: str
    type: int


def numbered(number: int, message: bytes) -> bytes:
    """Return the message with its sequence number."""
    return message[:8] + number.to_bytes(4, "little") + message[12:]


def ipvs(family_id: int, operation: Operation) -> bytes:
    """Return the message for an operation on a service or destination."""
    verb, thing, value = operation
    if isinstance(thing, Service) and isinstance(value, Manner):
        return _generic(family_id, _SERVICE_COMMANDS[verb.letter], _service(thing, value, verb))
    if isinstance(thing, Destination) and isinstance(value, int):
        body = _named(thing.service) + _destination(thing, value, verb)
        return _generic(family_id, _DEST_COMMANDS[verb.letter], body)
    raise ValueError(operation)


def get_destinations(family_id: int, service: Service) -> bytes:
    """Return the message that asks for the destinations of one service."""
    return _generic(family_id, _GET_DEST, _named(service), REQUEST | DUMP)


def get_services(family_id: int) -> bytes:
    """Return the message that asks for all services."""
    return _generic(family_id, _GET_SERVICE, b"", REQUEST | DUMP)


def seen_service(message: bytes) -> tuple[Service, Manner] | None:
    """Return a service of the answer to `get_services`, or None for one by mark."""
    outer = dict(attributes(message, HEADER.size + _GENERIC.size))
    told = dict(attributes(outer[1], 0))
    if 5 in told:
        return None
    six = int.from_bytes(told[1], "little") == socket.AF_INET6
    protocol = _PROTOCOL_OF_NUMBER.get(int.from_bytes(told[2], "little"))
    if protocol is None:
        return None
    service = Service(
        Family.IPV6 if six else Family.IPV4,
        protocol,
        _address(told[3][: 16 if six else 4]),
        int.from_bytes(told[4], "big"),
    )
    flags = int.from_bytes(told[7][:4], "little")
    scheduler = Scheduler(told[6].rstrip(b"\0").decode(), flags & _SCHEDULER_FLAGS)
    persistence = int.from_bytes(told[8], "little") if flags & _PERSISTENT else 0
    return service, Manner(scheduler, persistence)


def set_timeouts(family_id: int, tcp: int, tcp_fin: int, udp: int) -> bytes:
    """Return the message that sets the three timeouts; 0 leaves one as it is."""
    body = b"".join(_u32(kind, value) for kind, value in ((4, tcp), (5, tcp_fin), (6, udp)))
    return _generic(family_id, _SET_CONFIG, body)


def get_family(name: str) -> bytes:
    """Return the message that asks for the number of a generic netlink family (nlctrl)."""
    return _generic(16, 3, _attribute(2, name.encode() + b"\0"), REQUEST | ACK)


def family_id(message: bytes) -> int:
    """Return the number that nlctrl answered."""
    for kind, value in attributes(message, HEADER.size + _GENERIC.size):
        if kind == 1:
            return int.from_bytes(value[:2], "little")
    raise ValueError("no family")


def route(operation: Operation) -> bytes:
    """Return the message that adds, replaces or deletes a local route of ours."""
    verb, thing, value = operation
    if not isinstance(thing, Route):
        raise TypeError(operation)
    six = thing.family is Family.IPV6
    body = struct.pack(
        "=BBBBBBBBI",
        _AF[thing.family],
        128 if six else 32,
        0,
        0,
        _TABLE_LOCAL,
        ROUTE_PROTOCOL,
        0 if six else _SCOPE_HOST,
        _TYPE_LOCAL,
        0,
    )
    body += _attribute(1, thing.address.packed) + _u32(4, _LOOPBACK)
    if value and verb in (ADD, SET):
        body += _attribute(7, _packed(str(value)))
    flags = REQUEST | ACK
    if verb is ADD:
        flags |= CREATE | EXCLUSIVE
    elif verb is SET:
        flags |= CREATE | REPLACE
    kind = _NEW_ROUTE if verb in (ADD, SET) else _DEL_ROUTE
    return HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body


def get_routes(family: Family) -> bytes:
    """Return the message that lists the table local (strict checking picks the table)."""
    body = struct.pack("=BBBBBBBBI", _AF[family], 0, 0, 0, _TABLE_LOCAL, 0, 0, 0, 0)
    return HEADER.pack(HEADER.size + len(body), _GET_ROUTE, REQUEST | DUMP, 0, 0) + body


def seen_route(message: bytes) -> SeenRoute | None:
    """Return a route of the listing, or None for one to more than an address."""
    length, table, protocol, kind = struct.unpack_from("=xBxxBBxB", message, HEADER.size)
    found = dict(attributes(message, HEADER.size + 12))
    if table != _TABLE_LOCAL or 1 not in found or length != len(found[1]) * 8:
        return None
    source = str(_address(found[7])) if 7 in found else ""
    return SeenRoute(_address(found[1]), protocol, source, kind)


def seen_destination(message: bytes) -> Counted:
    """Return a destination of the answer to `get_destinations`."""
    outer = dict(attributes(message, HEADER.size + _GENERIC.size))
    told = dict(attributes(outer[2], 0))
    number = {kind: int.from_bytes(told[kind], "little") for kind in (4, 7, 8, 11)}
    size = 16 if number[11] == socket.AF_INET6 else 4
    return Counted(
        _address(told[1][:size]),
        int.from_bytes(told[2], "big"),
        number[4],
        number[7] + number[8],
    )


def get_service(family_id: int, service: Service) -> bytes:
    """Return the message that asks for one service."""
    return _generic(family_id, _GET_SERVICE, _named(service))


def total(message: bytes) -> int:
    """Return the connections of the service of the answer to `get_service`, since it was added."""
    outer = dict(attributes(message, HEADER.size + _GENERIC.size))
    return _total(dict(attributes(outer[1], 0)))


def usage(message: bytes) -> Usage:
    """Return what is counted of a destination of the answer to `get_destinations`."""
    seen = seen_destination(message)
    outer = dict(attributes(message, HEADER.size + _GENERIC.size))
    told = dict(attributes(outer[2], 0))
    active, inactive = (int.from_bytes(told[kind], "little") for kind in (7, 8))
    return Usage(seen.address, seen.port, seen.weight, _total(told), active, inactive)


def _total(told: dict[int, bytes]) -> int:
    """Return IPVS_STATS_ATTR_CONNS of IPVS_SVC_ATTR_STATS or IPVS_DEST_ATTR_STATS: both are 10."""
    return int.from_bytes(dict(attributes(told[10], 0))[1], "little")


def attributes(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of netlink attributes from an offset on."""
    while start + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, start)
        if length < 4:
            return
        yield kind & 0x3FFF, data[start + 4 : start + length]
        start += (length + 3) & ~3


def split(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield type, flags, sequence number and all bytes of each message of a datagram."""
    start = 0
    while start + HEADER.size <= len(data):
        length, kind, flags, number, _ = HEADER.unpack_from(data, start)
        if length < HEADER.size:
            return
        yield kind, flags, number, data[start : start + length]
        start += (length + 3) & ~3


def error_of(message: bytes) -> int:
    """Return the errno of an NLMSG_ERROR; 0 for success."""
    return -int(struct.unpack_from("=i", message, HEADER.size)[0])


def _generic(family: int, command: int, body: bytes, flags: int = REQUEST | ACK) -> bytes:
    head = HEADER.pack(HEADER.size + _GENERIC.size + len(body), family, flags, 0, 0)
    return head + _GENERIC.pack(command, _VERSION, 0) + body


@lru_cache(maxsize=64)
def _named(service: Service) -> bytes:
    return _attribute(1, _identity(service))


def _identity(service: Service) -> bytes:
    return (
        _u16(1, _AF[service.family])
        + _u16(2, _NUMBER[service.protocol])
        + _attribute(3, service.address.packed)
        + _attribute(4, service.port.to_bytes(2, "big"))
    )


def _service(service: Service, manner: Manner, verb: Verb) -> bytes:
    if verb not in (ADD, SET):
        return _attribute(1, _identity(service))
    return _attribute(1, _identity(service) + _manner(manner, service.family))


@lru_cache(maxsize=256)
def _manner(manner: Manner, family: Family) -> bytes:
    flags = manner.scheduler.flags | (_PERSISTENT if manner.persistence else 0)
    return (
        _attribute(6, manner.scheduler.name.encode() + b"\0")
        + _attribute(7, struct.pack("=II", flags, 0xFFFFFFFF))
        + _u32(8, manner.persistence)
        + _u32(9, 128 if family is Family.IPV6 else 0xFFFFFFFF)  # persistence is for one address
    )


def _destination(one: Destination, weight: int, verb: Verb) -> bytes:
    body = _attribute(1, one.address.packed) + _attribute(2, one.port.to_bytes(2, "big"))
    if verb in (ADD, SET):
        body += _weighted(weight)
    return _attribute(2, body + _u16(11, _AF[one.service.family]))


@lru_cache(maxsize=256)
def _weighted(weight: int) -> bytes:
    return _u32(3, 0) + _u32(4, weight) + _u32(5, 0) + _u32(6, 0)  # masquerading; no thresholds


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def _u16(kind: int, value: int) -> bytes:
    return struct.pack("=HHHxx", 6, kind, value)


def _u32(kind: int, value: int) -> bytes:
    return struct.pack("=HHI", 8, kind, value)


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def _address(packed: bytes) -> Address:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)

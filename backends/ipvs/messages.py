"""Netlink messages of IPVS, as bytes; and what the kernel answers, as values.

Lives here: packing and parsing, pure. Must not: hold a socket (backends/netlink.py).

pyroute2's classes know all of this, and the tests hold every message against what they encode; but
they need 0.2 ms for one (measured), which is 12 s of the 60,000 that 10,000 services × 5 endpoints
are. Attribute numbers: include/uapi/linux/ip_vs.h, Linux 6.1.
"""

import socket
import struct
from functools import lru_cache
from typing import NamedTuple

from vipd.backends.ipvs.objects import (
    ADD,
    SET,
    Destination,
    Manner,
    Operation,
    Service,
    Verb,
)
from vipd.backends.ipvs.schedulers import Scheduler
from vipd.backends.netlink import (
    ACK,
    ADDRESS_FAMILY,
    DUMP,
    HEADER,
    REQUEST,
    address,
    attribute,
    attributes,
    u16,
    u32,
)
from vipd.proxy.names import Address, Family, Protocol

_GENERIC = struct.Struct("=BBH")
_VERSION = 1
_NEW_SERVICE, _SET_SERVICE, _DEL_SERVICE, _GET_SERVICE = 1, 2, 3, 4
_NEW_DEST, _SET_DEST, _DEL_DEST, _GET_DEST = 5, 6, 7, 8
_SET_CONFIG = 12
_SERVICE_COMMANDS = {"a": _NEW_SERVICE, "e": _SET_SERVICE, "d": _DEL_SERVICE}
_DEST_COMMANDS = {"a": _NEW_DEST, "e": _SET_DEST, "d": _DEL_DEST}
_NUMBER = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}
_PROTOCOL_OF_NUMBER = {number: one for one, number in _NUMBER.items()}
_PERSISTENT = 0x1
_SCHEDULER_FLAGS = 0x08 | 0x10 | 0x20


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
        address(told[3][: 16 if six else 4]),
        int.from_bytes(told[4], "big"),
    )
    flags = int.from_bytes(told[7][:4], "little")
    scheduler = Scheduler(told[6].rstrip(b"\0").decode(), flags & _SCHEDULER_FLAGS)
    persistence = int.from_bytes(told[8], "little") if flags & _PERSISTENT else 0
    return service, Manner(scheduler, persistence)


def set_timeouts(family_id: int, tcp: int, tcp_fin: int, udp: int) -> bytes:
    """Return the message that sets the three timeouts; 0 leaves one as it is."""
    body = b"".join(u32(kind, value) for kind, value in ((4, tcp), (5, tcp_fin), (6, udp)))
    return _generic(family_id, _SET_CONFIG, body)


def get_family(name: str) -> bytes:
    """Return the message that asks for the number of a generic netlink family (nlctrl)."""
    return _generic(16, 3, attribute(2, name.encode() + b"\0"), REQUEST | ACK)


def family_id(message: bytes) -> int:
    """Return the number that nlctrl answered."""
    for kind, value in attributes(message, HEADER.size + _GENERIC.size):
        if kind == 1:
            return int.from_bytes(value[:2], "little")
    raise ValueError("no family")


def seen_destination(message: bytes) -> Counted:
    """Return a destination of the answer to `get_destinations`."""
    outer = dict(attributes(message, HEADER.size + _GENERIC.size))
    told = dict(attributes(outer[2], 0))
    number = {kind: int.from_bytes(told[kind], "little") for kind in (4, 7, 8, 11)}
    size = 16 if number[11] == socket.AF_INET6 else 4
    return Counted(
        address(told[1][:size]),
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


def _generic(family: int, command: int, body: bytes, flags: int = REQUEST | ACK) -> bytes:
    head = HEADER.pack(HEADER.size + _GENERIC.size + len(body), family, flags, 0, 0)
    return head + _GENERIC.pack(command, _VERSION, 0) + body


@lru_cache(maxsize=64)
def _named(service: Service) -> bytes:
    return attribute(1, _identity(service))


def _identity(service: Service) -> bytes:
    return (
        u16(1, ADDRESS_FAMILY[service.family])
        + u16(2, _NUMBER[service.protocol])
        + attribute(3, service.address.packed)
        + attribute(4, service.port.to_bytes(2, "big"))
    )


def _service(service: Service, manner: Manner, verb: Verb) -> bytes:
    if verb not in (ADD, SET):
        return attribute(1, _identity(service))
    return attribute(1, _identity(service) + _manner(manner, service.family))


@lru_cache(maxsize=256)
def _manner(manner: Manner, family: Family) -> bytes:
    flags = manner.scheduler.flags | (_PERSISTENT if manner.persistence else 0)
    return (
        attribute(6, manner.scheduler.name.encode() + b"\0")
        + attribute(7, struct.pack("=II", flags, 0xFFFFFFFF))
        + u32(8, manner.persistence)
        + u32(9, 128 if family is Family.IPV6 else 0xFFFFFFFF)  # persistence is for one address
    )


def _destination(one: Destination, weight: int, verb: Verb) -> bytes:
    body = attribute(1, one.address.packed) + attribute(2, one.port.to_bytes(2, "big"))
    if verb in (ADD, SET):
        body += _weighted(weight)
    return attribute(2, body + u16(11, ADDRESS_FAMILY[one.service.family]))


@lru_cache(maxsize=256)
def _weighted(weight: int) -> bytes:
    return u32(3, 0) + u32(4, weight) + u32(5, 0) + u32(6, 0)  # masquerading; no thresholds

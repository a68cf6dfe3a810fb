"""Connection tracking: which flows there are, forgetting those that are stuck, ending others.

Lives here: the one file that speaks to nf_conntrack_netlink, for the daemon and the dataplanes that
translate addresses. Must not: decide which flows are to go, or when (proxy/departures.py does).

The dump is read in a form of our own: a busy node has 100,000 entries, of which each costs pyroute2
0.9.7 89 µs, and this 5 µs, 2 of them in the kernel. It is read as it comes, 32 kB at a time, in a
thread; entries to be deleted are deleted meanwhile, so that nothing grows with the table. What the
kernel can filter it filters: marks (every kernel), tuples (5.8), states (5.15); kernels before
ignore the wish, so both are checked here again. Source of attributes and their order:
nfnetlink_conntrack.h, and ctnetlink_dump_tuples() in nf_conntrack_netlink.c, Linux 6.18.
"""

import asyncio
import errno
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from typing import ParamSpec, TypeVar

from msgspec import Struct

from vipd.backends.netlink import ADDRESS_FAMILY
from vipd.backends.protocol import Departed, Flows
from vipd.proxy.errors import Busy, DataplaneError, UnknownResult, Unsupported
from vipd.proxy.names import Address, Family, Protocol
from vipd.proxy.virtualserver import Key

REMEDY = "`modprobe nf_conntrack_netlink` (Debian's package linux-image-amd64)"
AT_ONCE = 200
"""Deletions in one send; their answers have to fit into the socket's buffer."""

_NETFILTER = 12
_SUBSYSTEM = 1
_NEW, _GET, _DELETE = 0, 1, 2
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_ERROR, _DONE = 2, 3
_NESTED, _TYPE_MASK = 0x8000, 0x3FFF
_TUPLE_ORIG, _STATUS, _PROTOINFO, _TIMEOUT, _MARK, _ID, _ZONE = 1, 3, 4, 7, 8, 12, 18
_MARK_MASK, _FILTER, _STATUS_MASK = 21, 25, 26
_FILTER_DESTINATION, _FILTER_PROTOCOL, _FILTER_PORT = 1 << 1, 1 << 3, 1 << 5
_SEEN_REPLY = 1 << 1
_TIME_WAIT, _CLOSE = 7, 8
_FAMILIES: Mapping[int, Family] = {number: family for family, number in ADDRESS_FAMILY.items()}
_NUMBERS = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}
_PROTOCOLS = {number: protocol for protocol, number in _NUMBERS.items()}

_HEAD = struct.Struct("=IH10xB3x")
"""Length and type of a message, family of the entry."""
_ATTRIBUTE = struct.Struct("=HH")
_FIRST = 20
"""Where the attributes of a message begin: with the tuple of the original direction."""
# Both tuples: header, addresses' header, source, destination, ports' header, protocol, ports.
_TUPLE: Mapping[int, struct.Struct] = {
    socket.AF_INET: struct.Struct("=H2x4x4x4s4x4s4x4xB3x4x2s2x4x2s2x"),
    socket.AF_INET6: struct.Struct("=H2x4x4x16s4x16s4x4xB3x4x2s2x4x2s2x"),
}

P = ParamSpec("P")
T = TypeVar("T")
Place = tuple[int, bytes, int, bytes]
"""An address family, address, protocol number and port, as the kernel has them."""


class Flow(Struct, frozen=True):
    """A flow as a person is told of it; `state` is that of TCP (enum tcp_conntrack)."""

    client_port: int
    answering: str
    replied: bool
    state: int | None
    seconds: int
    mark: int


class Entry(Struct):
    """An entry of the table, as far as it matters here.

    `data` holds the message it came in, from `start` to `end`; it is overwritten by the next one.
    """

    destination: Place
    """Where the client sends to."""
    answering: Place
    """Where the answers come from: the endpoint."""
    status: int
    data: bytearray
    start: int
    end: int


async def flows(mark: int, mask: int) -> Flows:
    """Return the live flows of a generation, by original destination, printed as a key is.

    A TCP connection that has ended (TIME_WAIT, CLOSE) is not live.
    """
    return await _in_thread(_flows, mark, mask)


async def entries(source: Address, key: Key) -> Sequence[Flow]:
    """Return the flows from a source to what was a virtual server's address when they began."""
    return await _in_thread(_entries, source, _place(key))


async def forget_unreplied(keys: Collection[Key], own_addresses: Collection[Address] = ()) -> int:
    """Delete entries without an answer that are not translated, of these virtual servers.

    To be asked once they are programmed: NAT looks only at the first packet of an entry, so a
    client that sent to an address before it was served would wait until its entry expires, and one
    that keeps sending for ever. Translated entries stay: their answer may be under way.
    `own_addresses` are those that node ports are answered on. Returns the number.
    """
    places = {_place(key) for key in keys if key.address is not None}
    ports = {_place(key) for key in keys if key.address is None}
    own = [(ADDRESS_FAMILY[_family(one)], one.packed) for one in own_addresses]
    places |= {
        (family, packed, number, port)
        for family, packed in own
        for wanted, _, number, port in ports
        if family == wanted
    }
    if not places:
        return 0
    return await _in_thread(_forget_unreplied, places)


async def cut(departed: Sequence[Departed]) -> int:
    """Delete the live flows from a virtual server to an endpoint, for each pair; return the number.

    A node port is met at every address: that the flow is translated to the endpoint is enough.
    """
    pairs = {
        (_place(one.key), _place_of(one.address, one.key.protocol, one.port)) for one in departed
    }
    return await _in_thread(_cut, pairs) if pairs else 0


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except OSError as error:
        raise _error(error) from error


def _flows(mark: int, mask: int) -> Flows:
    wanted = _attribute(_MARK, struct.pack(">I", mark))
    wanted += _attribute(_MARK_MASK, struct.pack(">I", mask))
    found: Counter[Place] = Counter()
    for entry in _dump(socket.AF_UNSPEC, wanted):
        if _alive(entry):
            found[entry.destination] += 1
    return Flows({_printed(place): count for place, count in found.items()})


def _entries(source: Address, place: Place) -> Sequence[Flow]:
    found = []
    for one in _dump(place[0], _shared([place])):
        _, client, _, _, port, _ = _TUPLE[place[0]].unpack_from(one.data, one.start + _FIRST)
        if one.destination != place or client != source.packed:
            continue
        at = {kind: at for kind, at, _ in _attributes(one.data, one.start + _FIRST, one.end)}
        numbers = {kind: _number(one.data[at[kind] + 4 : at[kind] + 8]) for kind in at}
        state = one.data[at[_PROTOINFO] + 12] if _PROTOINFO in at and place[2] == 6 else None
        replied = bool(one.status & _SEEN_REPLY)
        left, mark = numbers.get(_TIMEOUT, 0), numbers.get(_MARK, 0)
        found.append(Flow(_number(port), _printed(one.answering), replied, state, left, mark))
    return found


def _forget_unreplied(places: Collection[Place]) -> int:
    wanted = _attribute(_STATUS, struct.pack(">I", 0))
    wanted += _attribute(_STATUS_MASK, struct.pack(">I", _SEEN_REPLY))

    def stuck(entry: Entry) -> bool:
        return (
            not entry.status & _SEEN_REPLY
            and entry.destination in places
            and entry.answering == entry.destination
        )

    return _delete(_families(places), wanted, stuck)


def _cut(pairs: Collection[tuple[Place, Place]]) -> int:
    places = {place for place, _ in pairs}

    def departed(entry: Entry) -> bool:
        family, _, number, port = entry.destination
        places = (entry.destination, (family, b"", number, port))
        return any((one, entry.answering) in pairs for one in places) and _alive(entry)

    return _delete(_families(places), _shared(places), departed)


def _families(places: Iterable[Place]) -> set[int]:
    return {family for family, *_ in places}


def _shared(places: Collection[Place]) -> bytes:
    """Return the filter for what the destinations have in common; empty where that is nothing."""
    families, addresses, numbers, ports = (set(part) for part in zip(*places, strict=True))
    if len(families) > 1:
        return b""
    flags, told = 0, b""
    address = addresses.pop() if len(addresses) == 1 else b""
    # Told one of IPv6, the kernel yields all others (6.18; ctnetlink_filter_match_tuple).
    if len(address) == 4:
        flags |= _FILTER_DESTINATION
        told += _nested(1, _attribute(2, address))
    if len(numbers) == len(ports) == 1:
        flags |= _FILTER_PROTOCOL | _FILTER_PORT
        number = _attribute(1, bytes([numbers.pop()]))
        told += _nested(2, number + _attribute(3, ports.pop()))
    if not flags:
        return b""
    return _nested(_TUPLE_ORIG, told) + _nested(_FILTER, _attribute(1, struct.pack("=I", flags)))


def _delete(families: Iterable[int], wanted: bytes, condemned: Callable[[Entry], bool]) -> int:
    """Delete the entries that are condemned; return how many there were."""
    deleted = 0
    with _netlink() as connection:
        for family in families:
            waiting: list[bytes] = []
            for entry in _dump(family, wanted):
                if condemned(entry):
                    waiting.append(_deletion(entry))
                if len(waiting) == AT_ONCE:
                    deleted += _send(connection, waiting)
                    waiting = []
            deleted += _send(connection, waiting)
    return deleted


def _deletion(entry: Entry) -> bytes:
    """Return the message that deletes this entry, and not one that took its place meanwhile."""
    told = b"".join(
        bytes(entry.data[at : at + length])
        for kind, at, length in _attributes(entry.data, entry.start + _FIRST, entry.end)
        if kind in (_TUPLE_ORIG, _ID, _ZONE)
    )
    return _message(_DELETE, _REQUEST | _ACK, entry.destination[0], told)


def _send(connection: socket.socket, messages: Sequence[bytes]) -> int:
    """Send deletions and return how many were done; an entry that is gone already is none."""
    if not messages:
        return 0
    connection.send(b"".join(messages))
    done = answered = 0
    data = bytearray(1 << 17)
    for kind, start, _, _ in _received(connection, data):
        if kind == _ERROR:
            code = _code(data, start)
            if code not in (0, errno.ENOENT):
                raise OSError(code, os.strerror(code))
            done += not code
            answered += 1
        if answered == len(messages):
            break
    return done


def _dump(family: int, wanted: bytes) -> Iterator[Entry]:
    """Yield the TCP, UDP and SCTP entries; each is good until the next one is asked for."""
    data = bytearray(1 << 16)
    with _netlink() as connection:
        connection.send(_message(_GET, _REQUEST | _DUMP, family, wanted))
        for kind, start, end, of in _received(connection, data):
            if kind == _DONE:
                return
            if kind == _ERROR:
                code = _code(data, start)
                raise OSError(code, os.strerror(code))
            entry = _entry(data, start, end, of)
            if entry is not None:
                yield entry


def _received(connection: socket.socket, data: bytearray) -> Iterator[tuple[int, int, int, int]]:
    """Yield type, start, end and address family of each message that arrives in `data`."""
    while True:
        received = connection.recv_into(data)
        at = 0
        while at < received:
            length, kind, family = _HEAD.unpack_from(data, at)
            yield kind, at, at + length, family
            at += length + 3 & ~3


def _code(data: bytearray, start: int) -> int:
    """Return the error number of an error message; 0 says that it was done."""
    return -int(struct.unpack_from("=i", data, start + 16)[0])


def _entry(data: bytearray, start: int, end: int, family: int) -> Entry | None:
    layout = _TUPLE.get(family)
    if layout is None or end - start < _FIRST + 2 * layout.size:
        return None
    at = start + _FIRST
    length, _, destination, number, _, port = layout.unpack_from(data, at)
    if number not in _PROTOCOLS:
        return None
    # A tuple may end with its zone, so only its own length tells where the next begins.
    at += length
    length, source, _, _, source_port, _ = layout.unpack_from(data, at)
    at += length
    status = 0
    while at < end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if kind == _STATUS:
            status = struct.unpack_from(">I", data, at + 4)[0]
            break
        at += length + 3 & ~3
    return Entry(
        (family, destination, number, port),
        (family, source, number, source_port),
        status,
        data,
        start,
        end,
    )


def _alive(entry: Entry) -> bool:
    if entry.destination[2] != 6:
        return True
    for kind, at, _ in _attributes(entry.data, entry.start + _FIRST, entry.end):
        if kind == _PROTOINFO:
            # Nested twice: PROTOINFO, PROTOINFO_TCP, then the state, which comes first.
            return entry.data[at + 12] not in (_TIME_WAIT, _CLOSE)
    return True


def _attributes(data: bytearray, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield type, place and padded length of each attribute."""
    while at < end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        length = length + 3 & ~3
        yield kind & _TYPE_MASK, at, length
        at += length


def _place(key: Key) -> Place:
    """Return a key as the kernel has it; the address of a node port is empty."""
    packed = b"" if key.address is None else key.address.packed
    number = _NUMBERS[key.protocol]
    return (ADDRESS_FAMILY[key.family], packed, number, struct.pack(">H", key.port))


def _place_of(address: Address, protocol: Protocol, port: int) -> Place:
    return _place(Key(_family(address), address, protocol, port))


def _family(address: Address) -> Family:
    return Family.IPV4 if address.version == 4 else Family.IPV6


def _printed(place: Place) -> str:
    family, address, number, port = place
    return str(Key(_FAMILIES[family], ip_address(address), _PROTOCOLS[number], _number(port)))


def _number(data: bytes | bytearray) -> int:
    return int.from_bytes(data, "big")


def _netlink() -> socket.socket:
    connection = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER)
    connection.bind((0, 0))
    return connection


def _message(command: int, flags: int, family: int, attributes: bytes) -> bytes:
    length = _FIRST + len(attributes)
    head = struct.pack("=IHHII", length, _SUBSYSTEM << 8 | command, flags, 1, 0)
    return head + struct.pack("=BBH", family, 0, 0) + attributes


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _nested(kind: int, data: bytes) -> bytes:
    return _attribute(kind | _NESTED, data)


def _error(error: OSError) -> DataplaneError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return Unsupported("CAP_NET_ADMIN", "run as root, or inside `unshare -Urnm`")
    if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT):
        # nfnetlink says EINVAL where it does not know the subsystem and cannot load its module.
        return Unsupported("nf_conntrack_netlink", REMEDY)
    if error.errno in (errno.ENOBUFS, errno.ENOMEM, errno.EBUSY, errno.EAGAIN, errno.EINTR):
        return Busy(f"connection tracking: {error.strerror}")
    return UnknownResult(f"connection tracking: {error.strerror}")

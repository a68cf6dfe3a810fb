"""What nf_conntrack_netlink is asked and answers: the dump, its filters, deletions.

Lives here: the form of the messages and the socket they go through. Must not: know virtual servers,
or which entries matter (conntrack.py).

The dump is read in a form of our own: a busy node has 100,000 entries, of which each costs pyroute2
0.9.7 89 µs, and this 5 µs, 2 of them in the kernel. It is read as it comes, 32 kB at a time;
entries to be deleted are deleted meanwhile, so that nothing grows with the table. Each read lets
other threads run, so the event loop waits for some 100 entries at most. What the kernel can filter
it filters: marks (every kernel), tuples (5.8), states (5.15); kernels before ignore the wish, so
whoever asks checks again. Source of attributes and their order: nfnetlink_conntrack.h, and
ctnetlink_dump_tuples() in nf_conntrack_netlink.c, Linux 6.18.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from msgspec import Struct

from vipd.backends.netlink import ADDRESS_FAMILY
from vipd.proxy.names import Family, Protocol

AT_ONCE = 200
"""Deletions in one send; their answers have to fit into the socket's buffer."""
FAMILIES: Mapping[int, Family] = {number: family for family, number in ADDRESS_FAMILY.items()}
NUMBERS = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}
PROTOCOLS = {number: protocol for protocol, number in NUMBERS.items()}
PROTOINFO, TIMEOUT, MARK = 4, 7, 8
SEEN_REPLY = 1 << 1
SYN_SENT, TIME_WAIT, CLOSE = 1, 7, 8
"""States of TCP (enum tcp_conntrack)."""
FIRST = 20
"""Where the attributes of a message begin: with the tuple of the original direction."""

_NETFILTER = 12
_SUBSYSTEM = 1
_GET, _DELETE = 1, 2
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_ERROR, _DONE = 2, 3
_NESTED, _TYPE_MASK = 0x8000, 0x3FFF
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _ID, _ZONE = 1, 2, 3, 12, 18
_MARK_MASK, _FILTER, _STATUS_MASK = 21, 25, 26
_IDENTITY = (_TUPLE_ORIG, _ID, _ZONE)
_LAST = 2
"""Sequence number of the last message of a batch."""
_SOURCE, _DESTINATION = 1, 2
"""An address of a tuple (enum ctattr_ip), and one more for a port (enum ctattr_l4proto)."""
_PROTOCOL = 1

_HEAD = struct.Struct("=IH10xB3x")
"""Length and type of a message, family of the entry."""
_SEQUENCE = struct.Struct("=8xI")
_START = struct.Struct("=IHHIIBBH")
"""struct nlmsghdr, then struct nfgenmsg."""
_ATTRIBUTE = struct.Struct("=HH")
# Both tuples: header, addresses' header, source, destination, ports' header, protocol, ports.
TUPLE: Mapping[int, struct.Struct] = {
    socket.AF_INET: struct.Struct("=H2x4x4x4s4x4s4x4xB3x4x2s2x4x2s2x"),
    socket.AF_INET6: struct.Struct("=H2x4x4x16s4x16s4x4xB3x4x2s2x4x2s2x"),
}

Place = tuple[int, bytes, int, bytes]
"""An address family, address, protocol number and port, as the kernel has them."""


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

    @property
    def state(self) -> int | None:
        """The state of a TCP connection; None for other protocols."""
        if self.destination[2] != NUMBERS[Protocol.TCP]:
            return None
        for kind, at, _ in attributes(self.data, self.start + FIRST, self.end):
            if kind == PROTOINFO:
                # Nested twice: PROTOINFO, PROTOINFO_TCP, then the state, which comes first.
                return self.data[at + 12]
        return None


def marked(mark: int, mask: int) -> bytes:
    """Return the filter for entries with this mark."""
    return _attribute(MARK, struct.pack(">I", mark)) + _attribute(
        _MARK_MASK, struct.pack(">I", mask)
    )


def unanswered() -> bytes:
    """Return the filter for entries that have seen no answer."""
    return _answered(0)


def answered() -> bytes:
    """Return the filter for entries that have seen an answer."""
    return _answered(SEEN_REPLY)


def _answered(status: int) -> bytes:
    wanted = _attribute(_STATUS, struct.pack(">I", status))
    return wanted + _attribute(_STATUS_MASK, struct.pack(">I", SEEN_REPLY))


def shared(destinations: Collection[Place], answering: Collection[Place] = ()) -> bytes:
    """Return the filter for what all of these have in common; empty where that is nothing.

    `destinations` are where clients send to, `answering` where answers come from, if that is known.
    """
    if len({family for family, *_ in (*destinations, *answering)}) != 1:
        return b""
    told = flags = b""
    sides = (
        (_TUPLE_ORIG, destinations, _DESTINATION),
        (_TUPLE_REPLY, answering, _SOURCE),
    )
    for number, (kind, places, side) in enumerate(sides, start=1):
        parts, flag = _common(places, side) if places else (b"", 0)
        if flag:
            told += _nested(kind, parts)
            flags += _attribute(number, struct.pack("=I", flag))
    return told + _nested(_FILTER, flags) if flags else b""


def _common(places: Collection[Place], side: int) -> tuple[bytes, int]:
    """Return what the places have in common, as one side of a tuple, and which of it is told."""
    _, addresses, numbers, ports = (set(part) for part in zip(*places, strict=True))
    told, flags = b"", 0
    address = addresses.pop() if len(addresses) == 1 else b""
    # Told one of IPv6, the kernel yields all others (6.18; ctnetlink_filter_match_tuple).
    if len(address) == 4:
        flags |= 1 << side - 1
        told += _nested(1, _attribute(side, address))
    if len(numbers) == 1:
        flags |= 1 << 3
        protocol = _attribute(_PROTOCOL, bytes([numbers.pop()]))
        if len(ports) == 1:
            flags |= 1 << 3 + side
            protocol += _attribute(_PROTOCOL + side, ports.pop())
        told += _nested(2, protocol)
    return told, flags


def delete(family: int, wanted: bytes, condemned: Callable[[Entry], bool]) -> int:
    """Delete the entries that are condemned; return how many there were."""
    deleted = 0
    waiting: list[bytes] = []
    with _netlink() as connection:
        for entry in dump(family, wanted):
            if condemned(entry):
                waiting.append(_identity(entry))
            if len(waiting) == AT_ONCE:
                deleted += _send_deletions(connection, family, waiting)
                waiting = []
        return deleted + _send_deletions(connection, family, waiting)


def _identity(entry: Entry) -> bytes:
    """Return what names this entry, and not one that took its place meanwhile."""
    data, at, end = entry.data, entry.start + FIRST, entry.end
    told = b""
    while at < end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        length = length + 3 & ~3
        if kind & _TYPE_MASK in _IDENTITY:
            told += data[at : at + length]
        at += length
    return told


def _send_deletions(connection: socket.socket, family: int, entries: Sequence[bytes]) -> int:
    """Return how many were done; an entry that is gone already is none.

    Only errors are answered, and the last one: the kernel takes one after the other.
    """
    if not entries:
        return 0
    batch = [_message(_DELETE, _REQUEST, family, one) for one in entries[:-1]]
    last = _message(_DELETE, _REQUEST | _ACK, family, entries[-1], _LAST)
    connection.send(b"".join((*batch, last)))
    done = len(entries)
    data = bytearray(1 << 17)
    for kind, start, _, _ in _received(connection, data):
        if kind == _ERROR:
            code = _code(data, start)
            if code not in (0, errno.ENOENT):
                raise OSError(code, os.strerror(code))
            done -= bool(code)
            if _SEQUENCE.unpack_from(data, start)[0] == _LAST:
                break
    return done


def dump(family: int, wanted: bytes) -> Iterator[Entry]:
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
    layout = TUPLE.get(family)
    if layout is None or end - start < FIRST + 2 * layout.size:
        return None
    at = start + FIRST
    length, _, destination, number, _, port = layout.unpack_from(data, at)
    if number not in PROTOCOLS:
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


def attributes(data: bytearray, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield type, place and padded length of each attribute."""
    while at < end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        length = length + 3 & ~3
        yield kind & _TYPE_MASK, at, length
        at += length


def _netlink() -> socket.socket:
    connection = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER)
    connection.bind((0, 0))
    return connection


def _message(command: int, flags: int, family: int, told: bytes, number: int = 1) -> bytes:
    kind = _SUBSYSTEM << 8 | command
    return _START.pack(FIRST + len(told), kind, flags, number, 0, family, 0, 0) + told


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _nested(kind: int, data: bytes) -> bytes:
    return _attribute(kind | _NESTED, data)

"""Resource records: the numbers, sets of them, and their data as bytes.

Lives here: what is the same for every zone. Pure. Must not: know the cluster, or messages.
Source: IANA's DNS parameters; RFC 1035, 2782, 3596, 8914.
"""

from enum import IntEnum
from typing import NamedTuple

CLASS_IN, CLASS_CHAOS = 1, 3


class Type(IntEnum):
    """Types that are treated in a way of their own."""

    A = 1
    NS = 2
    CNAME = 5
    SOA = 6
    PTR = 12
    HINFO = 13
    MX = 15
    TXT = 16
    AAAA = 28
    SRV = 33
    OPT = 41
    SVCB = 64
    HTTPS = 65
    TSIG = 250
    IXFR = 251
    AXFR = 252
    ANY = 255


class Rcode(IntEnum):
    """How a question ended."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    NOTAUTH = 9
    BADVERS = 16


class Why(IntEnum):
    """Extended errors (RFC 8914) that are told."""

    NOT_READY = 14
    PROHIBITED = 18
    NOT_AUTHORITATIVE = 20
    NOT_SUPPORTED = 21


class RRset(NamedTuple):
    """Records of one name and type. `ttl` is in seconds, `data` without names compressed."""

    type: int
    ttl: int
    data: tuple[bytes, ...]


class Owned(NamedTuple):
    """An RRset and its owner, a wire name."""

    owner: bytes
    rrset: RRset


class Node(NamedTuple):
    """What stands at a name for one type; no RRset means that there is none (NODATA).

    A CNAME may stand there for any type. `additional` are addresses of names in the RRset.
    """

    rrset: RRset | None = None
    additional: tuple[Owned, ...] = ()


EMPTY = Node()


def address_sets(packed: tuple[bytes, ...], ttl: int) -> list[RRset]:
    """Return the A and AAAA RRsets of addresses, those that are not empty."""
    found: list[RRset] = []
    for kind in (Type.A, Type.AAAA):
        data = of_type(packed, kind)
        if data:
            found.append(RRset(kind, ttl, data))
    return found


def of_type(packed: tuple[bytes, ...], kind: int) -> tuple[bytes, ...]:
    """Return the addresses that are data of this type of record."""
    length = 4 if kind == Type.A else 16 if kind == Type.AAAA else 0
    return tuple([each for each in packed if len(each) == length])


def srv(weight: int, port: int, target: bytes) -> bytes:
    """Return data of an SRV record of priority 0."""
    return b"\0\0" + weight.to_bytes(2) + port.to_bytes(2) + target


def soa(server: bytes, contact: bytes, serial: int, negative_ttl: int) -> bytes:
    """Return data of a SOA record; refresh, retry and expire are those that CoreDNS tells."""
    numbers = (serial, 7200, 1800, 86400, negative_ttl)
    return server + contact + b"".join([number.to_bytes(4) for number in numbers])


def character_string(text: str) -> bytes:
    """Return a text behind its length (RFC 1035 3.3), cut at 255 bytes."""
    data = text.encode()[:255]
    return b"%c%b" % (len(data), data)

"""Messages as bytes, as far as the forwarder writes and reads them itself.

Lives here: numbers of the protocol, questions, replies without records, and where TTLs stand in a
message that this program has made. Pure.
Must not: read what came from somewhere else (reading.py, with dnspython), or know how names are
spelled (dns/names.py).
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

A, NS, CNAME, SOA, PTR, HINFO, AAAA = 1, 2, 5, 6, 12, 13, 28
DNAME, OPT, RRSIG, NSEC, NSEC3, SVCB, HTTPS = 39, 41, 46, 47, 50, 64, 65
ANY = 255
IN = 1
DENIES = frozenset({SOA, RRSIG, NSEC, NSEC3})
"""What may stand in the authority section of a denial."""

NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED, YXDOMAIN = range(7)
BADVERS, BADCOOKIE = 16, 23

QR, AA, TC, RD, RA, AD, CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010

OPTION_COOKIE, OPTION_EXTENDED_ERROR = 10, 15
EDE_OTHER, EDE_STALE, EDE_BLOCKED = 0, 3, 15
EDE_NOT_AUTHORITATIVE, EDE_UNREACHABLE, EDE_NETWORK = 20, 22, 23
"""RFC 8914, section 4."""

HEADER = struct.Struct(">HHHHHH")
"""Id, flags, and the number of questions, answers, authorities and additional records."""
_TYPE_CLASS = struct.Struct(">HH")
_RECORD = struct.Struct(">HHIH")
_POINTER = 0xC0
_TTL_AT = 4
_LOWER = range(ord("a"), ord("z") + 1)

RandomBits = Callable[[int], int]
"""Returns a number of so many random bits, as `secrets.randbits` does."""


def suffixes(name: bytes) -> Iterator[bytes]:
    """Yield the name, its parent, and so on; the root is the last."""
    while name != b"\0":
        yield name
        name = name[name[0] + 1 :]
    yield name


def spelled_at_random(name: bytes, bits: RandomBits) -> bytes:
    """Return the lower-case name with letters in upper case by lot (draft-vixie-dnsext-dns0x20)."""
    lot = bits(len(name))
    return bytes(
        [c ^ 0x20 if c in _LOWER and lot >> at & 1 else c for at, c in enumerate(name)]
    )  # a length is at most 63, below any letter


def question(name: bytes, qtype: int) -> bytes:
    """Return the question section for class IN."""
    return name + _TYPE_CLASS.pack(qtype, IN)


def reply(
    name: bytes,
    qtype: int,
    rcode: int = NOERROR,
    *,
    flags: int = 0,
    answers: tuple[bytes, ...] = (),
    authority: tuple[bytes, ...] = (),
) -> bytes:
    """Return a reply made of ready records (as `record` makes them); `flags` are added."""
    return b"".join(
        (
            HEADER.pack(0, QR | RD | RA | flags | rcode, 1, len(answers), len(authority), 0),
            question(name, qtype),
            *answers,
            *authority,
        )
    )


def rcode(message: bytes) -> int:
    """Return how a message of our own says that the question ended."""
    return message[3] & 0x0F


def record(rtype: int, ttl: int, rdata: bytes, owner: bytes = b"\xc0\x0c") -> bytes:
    """Return a record; its owner is the name of the question, where no other is given."""
    return owner + _RECORD.pack(rtype, IN, ttl, len(rdata)) + rdata


class Found(NamedTuple):
    """A record in a message."""

    in_answer: bool
    at: int
    """Where it begins."""
    fixed_at: int
    """Where its type stands, behind the owner."""
    type: int
    end: int


def records(message: bytes) -> Iterator[Found]:
    """Yield the records of a well-formed message, one that this program has made."""
    _, _, questions, answers, *others = HEADER.unpack_from(message)
    at = HEADER.size
    for _ in range(questions):
        at = _after_name(message, at) + _TYPE_CLASS.size
    for number in range(answers + sum(others)):
        fixed = at + 2 if message[at] >= _POINTER else _after_name(message, at)
        rtype, _, _, size = _RECORD.unpack_from(message, fixed)
        end = fixed + _RECORD.size + size
        yield Found(number < answers, at, fixed, rtype, end)
        at = end


def aliases(message: bytes) -> int:
    """Return how many CNAMEs are in the answer of a message of our own."""
    return sum(one.type == CNAME for one in records(message) if one.in_answer)


def ttl_offsets(found: Iterable[Found]) -> bytes:
    """Return where the TTLs of records stand, two bytes for each. There must be no OPT record."""
    offsets = [one.fixed_at + _TTL_AT for one in found]
    return struct.pack(f">{len(offsets)}H", *offsets)


def _after_name(message: bytes, at: int) -> int:
    while (size := message[at]) and size < _POINTER:
        at += size + 1
    return at + 1 if size == 0 else at + 2


class Run(NamedTuple):
    """Address records of one name, one behind the other and equally long."""

    start: int
    size: int
    """Bytes of each."""
    length: int


def address_run(found: Iterable[Found]) -> Run | None:
    """Return the addresses in the answer; None where there are no two, or others between them."""
    them = [one for one in found if one.in_answer and one.type in (A, AAAA)]
    if len(them) < 2:
        return None
    start, size = them[0].at, them[0].end - them[0].at
    places = range(start, start + size * len(them), size)
    if any(one.at != at or one.end != at + size for one, at in zip(them, places, strict=True)):
        return None
    return Run(start, size, len(them))


def turned(message: bytes, run: Run, turn: int) -> bytes:
    """Return the message with another of its addresses first, and the others behind it in turn."""
    start, size, length = run
    middle, end = start + size * (turn % length), start + size * length
    return b"".join((message[:start], message[middle:end], message[start:middle], message[end:]))


def aged(message: bytes, offsets: bytes, seconds: int) -> bytes:
    """Return the message with all TTLs lowered by so many seconds, to 0 at least."""
    patched = bytearray(message)
    for at in struct.unpack(f">{len(offsets) // 2}H", offsets):
        ttl = int.from_bytes(patched[at : at + 4], "big") - seconds
        patched[at : at + 4] = max(0, ttl).to_bytes(4, "big")
    return bytes(patched)


def with_ttl(message: bytes, offsets: bytes, ttl: int) -> bytes:
    """Return the message with all TTLs set."""
    patched, raw = bytearray(message), ttl.to_bytes(4, "big")
    for at in struct.unpack(f">{len(offsets) // 2}H", offsets):
        patched[at : at + 4] = raw
    return bytes(patched)

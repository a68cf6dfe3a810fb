"""Questions as bytes: read with bounds, refused in the way that each kind of garbage deserves.

Lives here: what a well-formed question is, and the replies to those that are not. Pure.
Must not: know names of the cluster, or records.
Source: RFC 1035 4.1, 6891, 8945, 9267, 9619; reference dns.md 5.3.
"""

from typing import NamedTuple

from vipd.dns.names import LONGEST_LABEL, LONGEST_NAME
from vipd.dns.records import Rcode, Type

HEADER = 12
RESPONSE, AUTHORITATIVE, TRUNCATED = 0x8000, 0x0400, 0x0200
RECURSION_DESIRED, RECURSION_AVAILABLE, CHECKING_DISABLED = 0x0100, 0x0080, 0x0010
AUTHENTIC = 0x0020
_OPCODE = 0x7800
_DNSSEC_OK = 0x8000
_MOST_COUNTS = (1, 1, 1, 2)
"""Questions, and records of the sections: an IXFR brings a SOA, OPT and TSIG may stand together."""


class Malformed(Exception):
    """What came is no question. `reply` is what to say, None for nothing."""

    def __init__(self, reply: bytes | None) -> None:
        super().__init__(reply)
        self.reply = reply


class Edns(NamedTuple):
    """What an OPT record says."""

    size: int
    """UDP payload size that the client takes, at least 512."""
    version: int
    dnssec_ok: bool
    options: tuple[tuple[int, bytes], ...] = ()


class Query(NamedTuple):
    """A well-formed question."""

    id: bytes
    """Two bytes."""
    flags: int
    """The 16 bits after the id."""
    name: bytes
    """Wire form, spelled as asked."""
    key: bytes
    """The same in lower case."""
    type: int
    class_: int
    edns: Edns | None = None

    @property
    def question(self) -> bytes:
        """The question section, as asked."""
        return self.name + self.type.to_bytes(2) + self.class_.to_bytes(2)

    @property
    def recursion_desired(self) -> bool:
        """RD."""
        return bool(self.flags & RECURSION_DESIRED)

    @property
    def checking_disabled(self) -> bool:
        """CD."""
        return bool(self.flags & CHECKING_DISABLED)

    @property
    def dnssec_ok(self) -> bool:
        """DO, and False without OPT."""
        return self.edns is not None and self.edns.dnssec_ok


def parse(data: bytes) -> Query:
    """Return the question in a message; raise Malformed. What follows the message is ignored."""
    if len(data) < HEADER or data[2] & 0x80:
        raise Malformed(None)
    flags = int.from_bytes(data[2:4])
    if flags & _OPCODE:
        raise Malformed(header_only(data, Rcode.NOTIMP))
    try:
        return _read(data, flags)
    except (IndexError, ValueError):
        raise Malformed(header_only(data, Rcode.FORMERR)) from None


def asked_again(data: bytes, end: int, before: Query) -> Query:
    """Return the question in a message that is as an earlier one, but for id and question.

    Raise Malformed.
    """
    try:
        if question_end(data) != end - 4 or end > len(data):
            return parse(data)
    except (IndexError, ValueError):
        raise Malformed(header_only(data, Rcode.FORMERR)) from None
    name = data[HEADER : end - 4]
    kind, class_ = int.from_bytes(data[end - 4 : end - 2]), int.from_bytes(data[end - 2 : end])
    return Query(data[:2], before.flags, name, name.lower(), kind, class_, before.edns)


def header_only(data: bytes, rcode: Rcode) -> bytes:
    """Return a reply without any section to a message that has a header."""
    kept = int.from_bytes(data[2:4]) & (_OPCODE | RECURSION_DESIRED)
    return data[:2] + (RESPONSE | kept | rcode).to_bytes(2) + bytes(8)


def question_end(data: bytes) -> int:
    """Return where the name of the question ends; raise IndexError or ValueError.

    It has no pointers: nothing that one could point to stands before it.
    """
    at = HEADER
    while length := data[at]:
        at += length + 1
        if length > LONGEST_LABEL or at + 1 - HEADER > LONGEST_NAME:
            raise ValueError("label or name too long, or a pointer")
    return at + 1


def _read(data: bytes, flags: int) -> Query:
    counts = [int.from_bytes(data[at : at + 2]) for at in (4, 6, 8, 10)]
    if counts[0] != 1 or any(n > most for n, most in zip(counts, _MOST_COUNTS, strict=True)):
        raise ValueError("counts")
    end = question_end(data)
    at = end + 4
    if at > len(data):
        raise ValueError("cut off")
    name = data[HEADER:end]
    edns: Edns | None = None
    for index in range(sum(counts[1:])):
        owner_end, after = record_ends(data, at)
        kind = int.from_bytes(data[owner_end : owner_end + 2])
        if kind == Type.OPT:
            if edns is not None or owner_end != at + 1 or index < counts[1] + counts[2]:
                raise ValueError("OPT")
            edns = _edns(data[owner_end:after])
        if kind == Type.TSIG:
            raise ValueError("signed, and there are no keys")
        at = after
    type_, class_ = int.from_bytes(data[end : end + 2]), int.from_bytes(data[end + 2 : end + 4])
    return Query(data[:2], flags, name, name.lower(), type_, class_, edns)


def record_ends(data: bytes, at: int) -> tuple[int, int]:
    """Return where a record's owner ends, and where the record does; raise as `question_end`."""
    owner_end = _skip_name(data, at)
    begin = owner_end + 10
    after = begin + int.from_bytes(data[begin - 2 : begin])
    if after > len(data):
        raise ValueError("cut off")
    return owner_end, after


def _skip_name(data: bytes, at: int) -> int:
    """Return where the owner of a record ends. Where a pointer leads to does not matter."""
    while length := data[at]:
        if length >= 0xC0:
            return at + 2
        if length > LONGEST_LABEL:
            raise ValueError("label type")
        at += length + 1
    return at + 1


def _edns(record: bytes) -> Edns:
    """Return what an OPT record says; `record` begins with its type."""
    options: list[tuple[int, bytes]] = []
    at = 10
    while at < len(record):
        code, length = (int.from_bytes(record[i : i + 2]) for i in (at, at + 2))
        at += 4 + length
        if at > len(record):
            raise ValueError("option cut off")
        options.append((code, record[at - length : at]))
    size = max(512, int.from_bytes(record[2:4]))
    dnssec_ok = bool(int.from_bytes(record[6:8]) & _DNSSEC_OK)
    return Edns(size, record[5], dnssec_ok, tuple(options))

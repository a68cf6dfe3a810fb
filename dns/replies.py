"""What follows the question in a reply, ready to be sent, and what of it fits a message.

Lives here: records as bytes with names compressed, rotation, truncation (RFC 2181 9). Pure.
Must not: know headers and OPT (answer.py), or the cluster.
The bytes hold for every reply to a question of this name: names point into the question, which
keeps the spelling that was asked.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from msgspec import Struct

from vipd.dns.apex import Apex
from vipd.dns.names import starts
from vipd.dns.records import Owned, RRset, Type

QUESTION = 12
"""Where the name of the question begins in a message."""
SMALLEST = 512
"""Bytes that every client takes (RFC 1035 4.2.1)."""
OPT_LENGTH = 11
"""Of an OPT record without options."""

FARTHEST = 0x3FFF
"""Place in a message that a pointer can point to."""

_IN = b"\x00\x01"


class Cut(NamedTuple):
    """What of the sections fits."""

    answers: int
    authority: int
    additional: int
    sections: bytes
    truncated: bool = False


class Fixed(Struct, frozen=True, gc=False):
    """Sections that fit every message, even with an OPT record of OPT_LENGTH behind them.

    `counts` are of answers, authority and additional records.
    """

    counts: bytes
    counts_with_opt: bytes
    sections: bytes

    def cut(self, room: int) -> Cut:
        """Return what fits into so many bytes."""
        if len(self.sections) > room:
            return Cut(0, 0, 0, b"", truncated=True)
        answers, authority, additional = (int.from_bytes(self.counts[i : i + 2]) for i in (0, 2, 4))
        return Cut(answers, authority, additional, self.sections)


class Nothing:
    """No answer, but the SOA of a zone as it is at the moment; `pointer` points to its name."""

    __slots__ = ("apex", "pointer")
    counts = b"\x00\x00\x00\x01\x00\x00"
    counts_with_opt = b"\x00\x00\x00\x01\x00\x01"

    def __init__(self, apex: Apex, offset: int) -> None:
        self.apex, self.pointer = apex, pointer(offset)

    def cut(self, room: int) -> Cut:
        """Return what fits into so many bytes."""
        sections = self.pointer.join(self.apex.negative)
        return Cut(0, 1, 0, sections) if len(sections) <= room else Cut(0, 0, 0, b"", True)


class Rotating:
    """Records of one length, of which each reply begins with the next."""

    __slots__ = ("_count", "_size", "_turn", "_twice", "_width", "size")

    def __init__(self, records: list[bytes]) -> None:
        self._count, self._width = len(records), len(records[0])
        block = b"".join(records)
        self._size, self._twice, self._turn = len(block), block + block, 0
        self.size = 2 * len(block)
        """Bytes of memory."""

    def cut(self, room: int) -> Cut:
        """Return as many records as fit into so many bytes."""
        turn = self._turn
        self._turn = turn + self._width if turn + self._width < self._size else 0
        if self._size <= room:
            return Cut(self._count, 0, 0, self._twice[turn : turn + self._size])
        number = room // self._width
        return Cut(number, 0, 0, self._twice[turn : turn + number * self._width], True)


class Long:
    """Answers that may fit or not, and additional records that stand only if all of them fit.

    `first` answers (a chain of CNAMEs) stand in every reply; a cut takes of the others, each time
    from another place. `authority` are SOA records and what proves them, or nothing.
    """

    __slots__ = ("_additional", "_answers", "_authority", "_first", "_turn", "_whole", "size")

    def __init__(
        self,
        first: Sequence[bytes],
        answers: Sequence[bytes],
        additional: Sequence[bytes] = (),
        authority: Sequence[bytes] = (),
        turn: int = 0,
    ) -> None:
        self._first = len(first), b"".join(first)
        self._answers = tuple(answers)
        self._authority = len(authority), b"".join(authority)
        self._additional = len(additional), b"".join(additional)
        self._turn = turn
        self._whole = len(self._first[1]) + sum(map(len, answers)) + len(self._authority[1])
        self.size = self._whole + len(self._additional[1]) + 48 * len(answers)
        """Bytes of memory, about."""

    def cut(self, room: int) -> Cut:
        """Return what fits into so many bytes."""
        count, first = self._first
        answers, (authorities, authority) = self._answers, self._authority
        if self._whole <= room:
            more = self._additional
            number, additional = more if self._whole + len(more[1]) <= room else (0, b"")
            sections = b"".join((first, *answers, authority, additional))
            return Cut(count + len(answers), authorities, number, sections)
        if len(first) > room:
            return Cut(0, 0, 0, b"", truncated=True)
        left, parts = room - len(first), [first]
        if answers:
            start = self._turn = (self._turn + 1) % len(answers)
            for one in answers[start:] + answers[:start]:
                left -= len(one)
                if left < 0:
                    break
                parts.append(one)
        return Cut(count + len(parts) - 1, 0, 0, b"".join(parts), truncated=True)


Ready = Fixed | Nothing | Rotating | Long


class Writer:
    """Writes records behind a question, with names compressed."""

    def __init__(self, key: bytes) -> None:
        self._names = {key[at:]: pointer(at) for at in starts(key)}
        self._at = QUESTION + len(key) + 4

    def alias(self, owner: bytes, ttl: int, target: bytes) -> bytes:
        """Return a CNAME record; the first is the first answer, each of the others comes next.

        Names that are written after it may point to its target.
        """
        record = self.records(Owned(owner, RRset(Type.CNAME, ttl, (target,))))[0]
        self._at += len(record)
        place = self._at - len(target)
        for at in starts(target):
            if target[at:] in self._names or place + at > FARTHEST:
                break
            self._names[target[at:]] = pointer(place + at - QUESTION)
        return record

    def records(self, owned: Owned) -> list[bytes]:
        """Return records whose place is not known."""
        rrset = owned.rrset
        head = self.name(owned.owner) + rrset.type.to_bytes(2) + _IN + rrset.ttl.to_bytes(4)
        return [b"%b%b%b" % (head, len(one).to_bytes(2), one) for one in rrset.data]

    def name(self, name: bytes) -> bytes:
        """Return a name as it may stand at any place behind those that were placed."""
        known = self._names
        for at in starts(name):
            found = known.get(name[at:])
            if found is not None:
                return name[:at] + found
        return name


def pointer(offset: int) -> bytes:
    """Return the compressed form of the name that begins so far behind the question's start."""
    return (0xC000 | QUESTION + offset).to_bytes(2)


def fixed(answers: int, authority: int, additional: int, sections: bytes) -> Fixed:
    """Return sections that are known to be small."""
    head = answers.to_bytes(2) + authority.to_bytes(2)
    return Fixed(head + additional.to_bytes(2), head + (additional + 1).to_bytes(2), sections)


def ready(key: bytes, rrset: RRset, additional: Iterable[Owned]) -> Ready:
    """Return the reply's sections for an RRset that stands at the name asked for."""
    writer = Writer(key)
    answers = writer.records(Owned(key, rrset))
    more = [one for owned in additional for one in writer.records(owned)]
    if len(answers) > 1 and not more and len(set(map(len, answers))) == 1:
        return Rotating(answers)
    size = sum(map(len, answers)) + sum(map(len, more))
    if QUESTION + len(key) + 4 + size + OPT_LENGTH <= SMALLEST:
        return fixed(len(answers), 0, len(more), b"".join((*answers, *more)))
    return Long((), answers, more)

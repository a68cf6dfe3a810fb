"""What somebody else answered becomes our reply.

Lives here: their sections behind our question and the CNAMEs that led to them, cut to what fits.
Pure. Must not: ask anybody, or write headers (answer.py).
Without CNAMEs before them the sections stay as they are, byte by byte; otherwise they are read
with dnspython, as names in them are compressed.
"""

from collections.abc import Iterable
from functools import lru_cache

from dns.exception import DNSException
from dns.message import from_wire
from dns.rrset import RRset as TheirRRset

from vipd.dns.message import HEADER, record_ends
from vipd.dns.records import CLASS_IN, Owned, RRset
from vipd.dns.replies import Cut, Long, Writer


def sections(message: bytes, question: bytes, room: int) -> Cut | None:
    """Return of a message that was got as much as fits into `room` bytes.

    None if it is no reply to this question (name in lower case, type, class), or no message at all.
    """
    start = HEADER + len(question)
    if message[HEADER:start] != question:
        return None
    answers, authority, additional = (int.from_bytes(message[i : i + 2]) for i in (6, 8, 10))
    if len(message) - start <= room:
        return Cut(answers, authority, additional, message[start:])
    try:
        end, fitting = _fitting(message, start, answers, start + room)
        if fitting < answers:
            return Cut(fitting, 0, 0, message[start:end], truncated=True)
        full, records = _fitting(message, end, authority, start + room)
    except (IndexError, ValueError):
        return None
    if records == authority:
        return Cut(answers, authority, 0, message[start:full])
    # What stands beside an answer may be left out, not what shows that there is none.
    return Cut(answers, 0, 0, message[start:end], truncated=not answers)


@lru_cache(maxsize=64)
def behind(
    message: bytes, question: bytes, key: bytes, before: tuple[tuple[bytes, bytes], ...], ttl: int
) -> Long | None:
    """Return what was got behind the CNAMEs (owner, target) that led from `key` to it.

    None as in `sections`. The last ones are remembered: reading a message takes a hundred times as
    long as the rest, and what forwarding has in its cache is the same until its TTLs are a second
    older.
    """
    if message[HEADER : HEADER + len(question)] != question:
        return None
    try:
        theirs = from_wire(message)
        writer = Writer(key)
        first = [writer.alias(owner, ttl, target) for owner, target in before]
        answers = _records(theirs.answer, writer)
        return Long(first, answers, authority=() if answers else _records(theirs.authority, writer))
    except (DNSException, ValueError):
        return None


def _fitting(message: bytes, at: int, count: int, limit: int) -> tuple[int, int]:
    """Return where the last record ends that does so before the limit, and how many these are."""
    for number in range(count):
        after = record_ends(message, at)[1]
        if after > limit:
            return at, number
        at = after
    return at, count


def _records(sets: Iterable[TheirRRset], writer: Writer) -> list[bytes]:
    found: list[bytes] = []
    for one in sets:
        if one.rdclass == CLASS_IN:
            data = tuple([record.to_generic().data for record in one])
            owner = one.name.to_wire()
            if owner is not None:
                found += writer.records(Owned(owner, RRset(one.rdtype, one.ttl, data)))
    return found

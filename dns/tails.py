"""What somebody else answered becomes our reply.

Lives here: their sections behind our question and the CNAMEs that led to them, cut to what fits.
Pure. Must not: ask anybody, or write headers (answer.py).
Without CNAMEs before them the sections stay as they are, byte by byte; otherwise each record is
moved behind these (moving.py). This is for each reply, in the event loop: 4,000 records must not
take longer than a few of them.
"""

from collections.abc import Sequence

from vipd.dns.forward.wire import DENIES
from vipd.dns.message import HEADER, question_end, record_ends
from vipd.dns.moving import Moving
from vipd.dns.replies import Cut, Writer


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


def joined(
    messages: Sequence[bytes],
    question: bytes,
    key: bytes,
    before: Sequence[tuple[bytes, bytes]],
    ttl: int,
    room: int,
) -> Cut | None:
    """Return of messages that lead from one to the next, by CNAMEs, what fits into `room` bytes.

    All answers in their order, and how the last one ends (RFC 6604). `before` are CNAMEs
    (owner, target) that led from `key` to the first. None as in `sections`. It takes time for what
    fits, and none for what does not.
    """
    if messages[0][HEADER : HEADER + len(question)] != question:
        return None
    writer = Writer(key)
    first = b"".join([writer.alias(owner, ttl, target) for owner, target in before])
    if len(first) > room:
        return Cut(0, 0, 0, b"", truncated=True)
    moving = Moving(key, first, room)
    if before:
        moving.target = HEADER + len(key) + 4 + len(first) - len(before[-1][1])
    try:
        return _moved(messages, moving, len(before))
    except (IndexError, ValueError):
        return None


def _moved(messages: Sequence[bytes], moving: Moving, count: int) -> Cut:
    """Return how the messages go on behind so many records."""
    answers = at = 0
    for message in messages:
        at = moving.turn_to(message, message[HEADER : question_end(message)])
        answers = int.from_bytes(message[6:8])
        end, taken = _taken(moving, at, answers)
        count += taken
        if taken < answers:
            return Cut(count, 0, 0, moving.sections, truncated=True)
        at = end
    whole, last = moving.sections, messages[-1]
    authority = int.from_bytes(last[8:10])
    denies = 0
    for _ in range(authority):
        owner_end, end = record_ends(last, at)
        if int.from_bytes(last[owner_end : owner_end + 2]) in DENIES:
            if not moving.take(at, 1)[0]:
                # As in `sections`: it may be left out beside an answer.
                return Cut(count, 0, 0, whole, truncated=not answers)
            denies += 1
        at = end
    return Cut(count, denies, 0, moving.sections)


def _taken(moving: Moving, at: int, count: int) -> tuple[int, int]:
    """Move up to `count` records from there on; return where they end, and how many there were."""
    left = count
    while left:
        number, at = moving.take(at, left)
        if not number:
            break
        left -= number
    return at, count - left


def _fitting(message: bytes, at: int, count: int, limit: int) -> tuple[int, int]:
    """Return where the last record ends that does so before the limit, and how many these are."""
    for number in range(count):
        after = record_ends(message, at)[1]
        if after > limit:
            return at, number
        at = after
    return at, count

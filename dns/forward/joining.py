"""Replies along CNAMEs that different servers know, made one.

Lives here: that message. Pure. Must not: ask for what is missing (forwarder.py).
The replies are ours: read and written anew before (excerpt.py), or made here.
"""

from collections.abc import Sequence

import dns.message

from vipd.dns.forward import wire
from vipd.dns.forward.excerpt import rendered
from vipd.dns.forward.question import Question


def joined(question: Question, messages: Sequence[bytes]) -> bytes:
    """Return one reply: all answers in their order, and how the last one ends (RFC 6604).

    Raise ValueError where it would be too long.
    """
    parts = [dns.message.from_wire(one) for one in messages]
    last = parts[-1]
    flags = int(last.rcode()) | (wire.CD if question.checking_disabled else 0)
    if all(one.flags & wire.AD for one in parts):
        flags |= wire.AD
    answer = [rrset for one in parts for rrset in one.answer]
    authority = [one for one in last.authority if one.rdtype in wire.DENIES]
    return rendered(question, flags, answer, authority)

"""What came back from an upstream: whether it is the reply to a query, and what it says.

Lives here: the checks of RFC 5452 and the reading of a whole message, by dnspython. Pure.
Must not: decide what follows from it (course.py), or what of it is handed on (excerpt.py).

Nothing that comes in makes it raise. What is not the reply is `Unwanted`: the right one may follow,
so it must not end the wait for it.
"""

from enum import Enum

import dns.message
from dns.edns import CookieOption, EDEOption

from vipd.dns.forward import wire
from vipd.dns.forward.excerpt import Rules, excerpt
from vipd.dns.forward.query import Query
from vipd.dns.forward.question import Question, Reply

_OPCODE = 0x7800
_RCODE = 0x000F
_WITHOUT_QUESTION = frozenset({wire.FORMERR, wire.SERVFAIL, wire.NOTIMP, wire.REFUSED})
"""Errors that some servers send as a header alone: who did not understand the question."""


class Unwanted(Enum):
    """Why something is not the reply."""

    ID = "id"
    QUESTION = "question"
    SPELLING = "spelling"
    """The name is the right one in other capitals."""
    COOKIE = "cookie"
    MALFORMED = "malformed"
    """It has the right id and question, and does not follow the protocol."""
    NO_REPLY = "noReply"
    """Not even a header, or a query."""
    LARGE = "large"


def read(data: bytes, query: Query, question: Question, rules: Rules) -> Reply | Unwanted:
    """Return what a message says, or why it is not the reply to this query."""
    problem = mismatch(data, query)
    if problem is not None:
        return problem
    if len(data) > rules.message_bytes:
        return Unwanted.LARGE
    flags = int.from_bytes(data[2:4], "big")
    if flags & wire.TC:
        return Reply(flags & _RCODE, is_truncated=True)
    try:
        message = dns.message.from_wire(data, ignore_trailing=True)
        reply = excerpt(message, question, rules)
        cookie = _server_cookie(message, query)
    # Whatever dnspython raises, its own errors or not: it is the sender's doing, and nothing that a
    # message says may end a question.
    except Exception:
        return Unwanted.MALFORMED
    if query.needs_cookie and cookie is None and reply.rcode not in _WITHOUT_QUESTION:
        return Unwanted.COOKIE
    error = reply.extended_error
    return reply._replace(
        server_cookie=cookie or b"",
        extended_error=_extended_error(message) if error is None else error,
    )


def mismatch(data: bytes, query: Query) -> Unwanted | None:
    """Return why a message is not the reply, as far as its beginning tells; None: it may be."""
    if len(data) < wire.HEADER.size:
        return Unwanted.NO_REPLY
    number, flags, questions, *_ = wire.HEADER.unpack_from(data)
    if number != query.id:
        return Unwanted.ID
    if not flags & wire.QR or flags & _OPCODE:
        return Unwanted.NO_REPLY
    if questions == 0 and flags & _RCODE in _WITHOUT_QUESTION:
        return None
    # The first name of a message has nothing before it to point at: its bytes are what was sent.
    section = data[wire.HEADER.size : wire.HEADER.size + len(query.question)]
    if questions != 1 or section.lower() != query.question.lower():
        return Unwanted.QUESTION
    if query.exact and section != query.question:
        return Unwanted.SPELLING
    return None


def _server_cookie(message: dns.message.Message, query: Query) -> bytes | None:
    """Return the server's part of the cookie; None without a cookie that is the answer to ours."""
    for option in message.options:
        if isinstance(option, CookieOption):
            ours = bool(query.client_cookie) and option.client == query.client_cookie
            return option.server if ours else None
    return None


def _extended_error(message: dns.message.Message) -> int | None:
    for option in message.options:
        if isinstance(option, EDEOption):
            return int(option.code)
    return None

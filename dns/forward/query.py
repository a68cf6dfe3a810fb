"""What is sent to an upstream, and what a reply has to have in common with it.

Lives here: queries as bytes. Pure. Must not: send, or read replies (reading.py).
Sources: RFC 1035, RFC 6891 (OPT), RFC 7873 (cookies), RFC 5452 (what a reply has to match).
"""

import struct
from typing import NamedTuple

from vipd.dns.forward import wire
from vipd.dns.forward.question import Question
from vipd.dns.forward.standing import Standing

UDP_BYTES = 1232
"""What is said to fit into a datagram: nothing of that size is fragmented (DNS flag day 2020)."""
_OPTION = struct.Struct(">HH")
_OPT_RECORD = struct.Struct(">BHHIH")
_DNSSEC_OK = 0x8000
ID_BITS = 16


class Query(NamedTuple):
    """A query, and what is remembered of it."""

    id: int
    question: bytes
    """The question section as it was sent."""
    exact: bool
    """Whether the name has to come back letter by letter."""
    has_edns: bool
    client_cookie: bytes
    """Empty where none was sent."""
    needs_cookie: bool
    """Whether a reply without this cookie is not the upstream's."""
    message: bytes


def make_query(
    question: Question,
    standing: Standing,
    bits: wire.RandomBits,
    now: float,
    *,
    tcp: bool = False,
    edns: bool = True,
    trust_ad: bool = False,
) -> Query:
    """Return a query with an id of its own; `edns` False leaves the OPT record out.

    Over TCP nobody else can answer, so neither spelling nor cookie has to come back.
    """
    settings = standing.settings
    exact = settings.randomize_case and not tcp and standing.gives_back_spelling(now)
    name = wire.spelled_at_random(question.name, bits) if exact else question.name
    section = wire.question(name, question.type)
    edns = edns and standing.knows_edns(now)
    cookie = standing.client_cookie if edns and settings.cookies else b""
    options = b""
    if cookie:
        whole = cookie + standing.server_cookie
        options = _OPTION.pack(wire.OPTION_COOKIE, len(whole)) + whole
    opt = b""
    if edns:
        ttl = _DNSSEC_OK if question.dnssec else 0
        opt = _OPT_RECORD.pack(0, wire.OPT, UDP_BYTES, ttl, len(options)) + options
    flags = wire.RD
    if question.checking_disabled:
        flags |= wire.CD
    if trust_ad:
        flags |= wire.AD  # RFC 6840, 5.7: wants to hear of it, without signatures
    number = bits(ID_BITS)
    header = wire.HEADER.pack(number, flags, 1, 0, 0, 1 if edns else 0)
    return Query(
        number,
        section,
        exact,
        edns,
        cookie,
        bool(cookie and standing.server_cookie) and not tcp,
        header + section + opt,
    )

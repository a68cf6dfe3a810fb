"""A question's bytes become a reply's bytes.

Lives here: headers and sizes, and the look-up of prebuilt replies that nearly every question ends
with. Pure. Must not: wait for anybody (what others have to be asked for is a Forward), or know
what stands at a name (decision.py).
Source: RFC 1035 4.1.1, 3225, 6891.
"""

from collections.abc import Callable
from typing import NamedTuple

from vipd.dns.decision import AnswerSettings as AnswerSettings
from vipd.dns.decision import Decisions, Said
from vipd.dns.decision import Forward as Forward
from vipd.dns.forward.got import Got
from vipd.dns.message import (
    AUTHENTIC,
    AUTHORITATIVE,
    CHECKING_DISABLED,
    HEADER,
    RECURSION_AVAILABLE,
    RECURSION_DESIRED,
    RESPONSE,
    TRUNCATED,
    Malformed,
    Query,
    asked_again,
    parse,
)
from vipd.dns.opt import OptSettings, opt_record, plain_opt
from vipd.dns.records import Rcode, Why
from vipd.dns.replies import OPT_LENGTH, SMALLEST, Cut, Fixed, Nothing
from vipd.dns.tails import joined, sections
from vipd.dns.zone import Zone

Outcome = bytes | Forward | None
"""A reply; or somebody else has to be asked; or None: say nothing."""

_TCP_SIZE = 65535
_MOST_MANNERS = 1024
"""Of each transport; then all are met anew. Clients ask in about ten."""
_ONE = b"\x00\x01"


class _Manner(NamedTuple):
    """How to reply to queries that differ in nothing but id and name."""

    query: Query
    """The first of them."""
    head: bytes
    """Flags of a good reply, and the count of questions."""
    truncated_head: bytes
    denial_head: bytes
    opt: bytes
    limit: int
    """Bytes of the longest reply."""


class Answers:
    """Answers questions from a zone. Nothing that comes in makes it raise."""

    def __init__(self, zone: Zone, settings: AnswerSettings | None = None) -> None:
        self.zone = zone
        self.settings = settings = settings or AnswerSettings()
        self._decisions = Decisions(zone, settings)
        idle = min(int(settings.tcp_idle_seconds * 10), 0xFFFF)
        identity = settings.identity.encode()
        self._opt = OptSettings(size=settings.udp_size, identity=identity, idle=idle)
        zone.prebuilt.most = settings.prebuilt_bytes
        self.bad_versions = 0
        """Replies BADVERS, whose rcode does not fit the header: there it is NOERROR."""
        self._available = RECURSION_AVAILABLE if settings.forwards else 0
        self._manners: dict[bool, dict[bytes, _Manner]] = {True: {}, False: {}}
        """By whether it is UDP, and all bytes of a query but its id and question."""
        self.udp: Callable[[bytes], Outcome] = self._transport(udp=True)
        """Answers a datagram."""
        self.tcp: Callable[[bytes], Outcome] = self._transport(udp=False)
        """Answers a message without its two length bytes; None: close the connection."""

    def finish(self, forward: Forward, got: Got, *, udp: bool) -> bytes:
        """Return the reply to a question that was forwarded."""
        query = forward.query
        question = forward.name + forward.type.to_bytes(2) + _ONE
        theirs = int.from_bytes(got.message[2:4])
        flags = theirs & (0x000F | (TRUNCATED if udp else 0))
        if query.dnssec_ok or query.flags & AUTHENTIC:
            flags |= theirs & AUTHENTIC
        for one in got.before:
            flags &= ~AUTHENTIC | int.from_bytes(one[2:4])
        opt, room = self._opt_and_room(query, udp, 0, got.extended_error)
        if forward.before or got.before:
            ttl, messages = self.zone.settings.ttl, (*got.before, got.message)
            cut = joined(messages, question, query.key, forward.before, ttl, room)
            flags |= AUTHORITATIVE if forward.before else 0
        else:
            cut = sections(got.message, question, room)
        if cut is None:
            return self.fail(forward, udp=udp)
        return self._message(query, flags, cut, opt, udp)

    def refuse(self, data: bytes) -> bytes | None:
        """Return REFUSED to one who may not ask, None to what is no query."""
        try:
            query = parse(data)
            if query.edns is not None:  # strangers are told nothing that they ask for beside
                query = query._replace(edns=query.edns._replace(options=()))
            return self._said(query, Said(Rcode.REFUSED, why=Why.PROHIBITED), udp=True)
        except Malformed as bad:
            return bad.reply

    def fail(self, forward: Forward, why: int | None = None, *, udp: bool = True) -> bytes:
        """Return SERVFAIL to a question that others have no answer for, or are not asked."""
        query = forward.query
        opt, _ = self._opt_and_room(query, udp, 0, why)
        return self._message(query, Rcode.SERVFAIL, Cut(0, 0, 0, b""), opt, udp)

    def _transport(self, *, udp: bool) -> Callable[[bytes], Outcome]:
        """Return what answers on UDP or on TCP."""
        ready_of = self.zone.prebuilt.replies.get
        manner_of = self._manners[udp].get
        join = b"".join

        def answer(data: bytes) -> Outcome:
            end = data.find(0, HEADER) + 5
            # The length of a label is below any letter's code: only letters change. Type and class
            # change too (65 is 97), but none of the types that become equal is in the zone.
            question = data[HEADER:end].lower()
            reply = ready_of(question)
            manner = manner_of(data[2:HEADER] + data[end:])
            if reply is None or manner is None:
                return self._slowly(data, end, manner, udp)
            _, head, truncated_head, _, opt, limit = manner
            if type(reply) is Fixed:
                counts = reply.counts_with_opt if opt else reply.counts
                return join((data[:2], head, counts, data[HEADER:end], reply.sections, opt))
            if type(reply) is Nothing:
                counts = reply.counts_with_opt if opt else reply.counts
                soa = reply.pointer.join(reply.apex.negative)
                return join((data[:2], head, counts, data[HEADER:end], soa, opt))
            cut = reply.cut(limit - end - len(opt))
            if cut.truncated and udp:
                head = truncated_head
            return join((data[:2], head, _counts(cut, opt), data[HEADER:end], cut.sections, opt))

        return answer

    def _slowly(self, data: bytes, end: int, manner: _Manner | None, udp: bool) -> Outcome:
        """Answer what has no prebuilt reply, or is asked in a manner that was not met before."""
        if manner is not None:
            nothing = self._decisions.unknown(data[HEADER:end].lower())
            if nothing is not None:
                return self._denial(data, end, nothing, manner)
        try:
            query = asked_again(data, end, manner.query) if manner else parse(data)
        except Malformed as bad:
            return bad.reply
        if manner is None and _is_plain(query, len(data) - end):
            manners = self._manners[udp]
            if len(manners) >= _MOST_MANNERS:
                manners.clear()  # whoever asks in every way there is must not make all others slow
            manners[data[2:HEADER] + data[end:]] = manner = self._manner(query, udp)
        said = self._decisions.decide(query)
        if isinstance(said, Forward):
            return said
        if said.sources:
            self.zone.prebuilt.keep(query.question.lower(), said.reply, said.sources)
        return self._said(query, said, udp=udp)

    def _denial(self, data: bytes, end: int, reply: Nothing, manner: _Manner) -> bytes:
        """Return NXDOMAIN: with search lists this is what most replies are."""
        counts = reply.counts_with_opt if manner.opt else reply.counts
        soa = reply.pointer.join(reply.apex.negative)
        parts = (data[:2], manner.denial_head, counts, data[HEADER:end], soa, manner.opt)
        return b"".join(parts)

    def _manner(self, query: Query, udp: bool) -> _Manner:
        flags = self._flags(query) | AUTHORITATIVE
        opt = opt_record(query, self._opt, udp=udp, rcode=0, why=None)
        every = (flags, flags | TRUNCATED, flags | Rcode.NXDOMAIN)
        heads = [each.to_bytes(2) + _ONE for each in every]
        return _Manner(query, heads[0], heads[1], heads[2], opt, self._limit(query, udp))

    def _said(self, query: Query, said: Said, *, udp: bool) -> bytes:
        if said.rcode == Rcode.BADVERS:
            self.bad_versions += 1
        opt, room = self._opt_and_room(query, udp, said.rcode, said.why)
        flags = said.rcode & 0x000F | (AUTHORITATIVE if said.authoritative else 0)
        return self._message(query, flags, said.reply.cut(room), opt, udp)

    def _message(self, query: Query, flags: int, cut: Cut, opt: bytes, udp: bool) -> bytes:
        flags |= self._flags(query)
        if cut.truncated and udp:
            flags |= TRUNCATED
        head = flags.to_bytes(2) + _ONE
        return b"".join((query.id, head, _counts(cut, opt), query.question, cut.sections, opt))

    def _opt_and_room(
        self, query: Query, udp: bool, rcode: int, why: int | None
    ) -> tuple[bytes, int]:
        """Return the OPT record of a reply, and how many bytes are left for its sections."""
        opt = opt_record(query, self._opt, udp=udp, rcode=rcode, why=why)
        room = self._limit(query, udp) - HEADER - len(query.question)
        if len(opt) > room:  # a long name, and a long name of the server
            opt = plain_opt(self._opt.size, rcode, dnssec_ok=query.dnssec_ok)
        return opt, room - len(opt)

    def _flags(self, query: Query) -> int:
        kept = query.flags & (RECURSION_DESIRED | CHECKING_DISABLED)
        return RESPONSE | self._available | kept

    def _limit(self, query: Query, udp: bool) -> int:
        if not udp:
            return _TCP_SIZE
        return SMALLEST if query.edns is None else min(query.edns.size, self.settings.udp_size)


def _is_plain(query: Query, tail: int) -> bool:
    """Return whether nothing but an OPT record without options stands behind the question."""
    edns = query.edns
    if edns is None:
        return tail == 0
    return tail == OPT_LENGTH and not edns.version


def _counts(cut: Cut, opt: bytes) -> bytes:
    numbers = cut.answers, cut.authority, cut.additional + (1 if opt else 0)
    return b"".join([number.to_bytes(2) for number in numbers])

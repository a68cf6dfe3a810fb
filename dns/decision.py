"""What is said to a well-formed question.

Lives here: which questions are answered from the zone, refused or passed on; chains of CNAMEs.
Pure. Must not: know headers and sizes (answer.py).
Source: RFC 1034 4.3.2, 2308, 6604 (CNAME), 8482 (ANY); reference dns.md 1.3, 5.3.
"""

from typing import NamedTuple

from msgspec import Struct

from vipd.dns.apex import Apex
from vipd.dns.chaos import of_chaos
from vipd.dns.lookup import Ending, Found
from vipd.dns.message import Query
from vipd.dns.prebuilt import Source
from vipd.dns.records import CLASS_CHAOS, CLASS_IN, Node, Owned, Rcode, RRset, Type, Why
from vipd.dns.replies import Long, Nothing, Ready, Writer, fixed, ready
from vipd.dns.zone import Zone

MOST_CNAMES = 10
NO_RECORDS = fixed(0, 0, 0, b"")
_MINIMAL = RRset(Type.HINFO, 3600, (b"\x07RFC8482\x00",))
_NO_DATA_TYPES = frozenset((0, Type.OPT, *range(128, 255)))
"""Types that no record has (RFC 6895 3.1); ANY is not among them."""
_KEPT_WITHOUT_RECORDS = frozenset((Type.A, Type.AAAA, Type.SRV, Type.HTTPS, Type.SVCB, Type.TXT))
"""Types that clients ask for; replies to others are not kept where there is no such record."""
_USUAL = frozenset(
    (one.to_bytes(2) + CLASS_IN.to_bytes(2)).lower() for one in _KEPT_WITHOUT_RECORDS
)
"""As behind a name in lower case: 65 is 97 there, a type that nothing has either."""


class AnswerSettings(Struct, frozen=True, kw_only=True):
    """How is answered."""

    udp_size: int = 1232
    """Bytes, 512 to 4096: no longer datagram is sent, whatever the client would take."""
    forwards: bool = True
    """Whether others are asked for their names; otherwise these are refused."""
    identity: str = ""
    """NSID, and CH TXT id.server and hostname.bind; empty: not told."""
    version: str = ""
    """CH TXT version.server and version.bind; empty: not told."""
    tcp_idle_seconds: float = 10.0
    """Told to TCP clients that ask (RFC 7828); at most 6553."""
    prebuilt_bytes: int = 48 << 20
    """Most memory for replies that are kept ready, about; 10,000 services take 11 MiB."""


class Forward(NamedTuple):
    """Somebody else has to be asked; `Answers.finish` makes a reply of what they say.

    Ask for `name` (lower case, wire form) and `type`, with `query.dnssec_ok` and
    `query.checking_disabled`.
    """

    query: Query
    name: bytes
    type: int
    before: tuple[tuple[bytes, bytes], ...] = ()
    """CNAME records found so far: owner and target."""


class Said(NamedTuple):
    """A reply. `sources` are those that it depends on; without any it must not be kept."""

    rcode: Rcode
    reply: Ready = NO_RECORDS
    authoritative: bool = False
    why: Why | None = None
    sources: tuple[Source, ...] = ()


class Decisions:
    """Says what is so, from a zone."""

    def __init__(self, zone: Zone, settings: AnswerSettings) -> None:
        self._zone, self._settings = zone, settings
        self._nothing: dict[tuple[Apex, int], Nothing] = {}
        self._turn = 0

    def decide(self, query: Query) -> Said | Forward:
        """Return what to say, or who else has to be asked."""
        kind, edns = query.type, query.edns
        if (
            kind in _NO_DATA_TYPES
            or query.class_ != CLASS_IN
            or (edns is not None and edns.version)
        ):
            return self._odd(query)
        found = self._zone.find(query.key, kind)
        match found.ending:
            case Ending.NO_NAME:
                return Said(Rcode.NXDOMAIN, self._negative(found), authoritative=True)
            case Ending.NODE:
                return self._of_node(query, found)
            case Ending.NOT_READY:
                return Said(Rcode.SERVFAIL, why=Why.NOT_READY)
            case Ending.NOT_OURS:
                if self._settings.forwards and query.recursion_desired:
                    return Forward(query, query.key, kind)
                return Said(Rcode.REFUSED, why=Why.NOT_AUTHORITATIVE)

    def unknown(self, question: bytes) -> Nothing | None:
        """Return what NXDOMAIN comes with, where a question is certainly about no name.

        In lower case, with type and class; it may be malformed. None: `decide` says.
        """
        if question[-4:] not in _USUAL:
            return None
        found = self._zone.lacks(question[:-4])
        return None if found is None else self._nothing_of(*found)

    def _odd(self, query: Query) -> Said:
        """Return what to say to a question that is about no data of class IN."""
        if query.edns is not None and query.edns.version:
            return Said(Rcode.BADVERS)
        if query.class_ != CLASS_IN:
            return self._of_class(query)
        if query.type in (0, Type.OPT):
            return Said(Rcode.FORMERR)
        return Said(Rcode.REFUSED if query.type in (Type.AXFR, Type.IXFR) else Rcode.NOTIMP)

    def _of_class(self, query: Query) -> Said:
        if query.class_ == CLASS_CHAOS:
            settings = self._settings
            reply = of_chaos(query.key, query.type, settings.version, settings.identity)
            if reply is not None:
                return Said(Rcode.NOERROR, reply, authoritative=True)
        return Said(Rcode.REFUSED)

    def _of_node(self, query: Query, found: Found) -> Said | Forward:
        rrset, kind = found.node.rrset, query.type
        if rrset is None and kind == Type.ANY:
            rrset = _MINIMAL
        if rrset is None:
            sources = found.services if kind in _KEPT_WITHOUT_RECORDS else ()
            return Said(Rcode.NOERROR, self._negative(found), authoritative=True, sources=sources)
        if rrset.type == Type.CNAME and kind not in (Type.CNAME, Type.ANY):
            return self._chain(query, rrset)
        reply = ready(query.key, rrset, found.node.additional)
        sources = () if kind == Type.ANY else found.services
        return Said(Rcode.NOERROR, reply, authoritative=True, sources=sources)

    def _chain(self, query: Query, alias: RRset) -> Said | Forward:
        """Follow CNAMEs as far as the zone knows, which is ready if it knew the first.

        A loop is the fault of those who wrote it.
        """
        writer, owner, target = Writer(query.key), query.key, alias.data[0]
        first: list[bytes] = []
        before: list[tuple[bytes, bytes]] = []
        while len(before) < MOST_CNAMES:
            first.append(writer.alias(owner, alias.ttl, target))
            before.append((owner, target))
            found = self._zone.find(target, query.type)
            node = found.node
            if found.ending is Ending.NOT_OURS:
                if self._settings.forwards and query.recursion_desired:
                    return Forward(query, target, query.type, tuple(before))
                return Said(Rcode.NOERROR, Long(first, ()), authoritative=True)
            if node.rrset is None:
                rcode = Rcode.NOERROR if found.ending is Ending.NODE else Rcode.NXDOMAIN
                return Said(rcode, _denied(first, writer, target, found), authoritative=True)
            if node.rrset.type != Type.CNAME:
                return Said(Rcode.NOERROR, self._end(first, writer, target, node), True)
            owner, target = target, node.rrset.data[0]
        return Said(Rcode.SERVFAIL)

    def _end(self, first: list[bytes], writer: Writer, target: bytes, node: Node) -> Long:
        assert node.rrset is not None
        self._turn += 1
        answers = writer.records(Owned(target, node.rrset))
        turn = self._turn % len(answers)
        more = [one for owned in node.additional for one in writer.records(owned)]
        return Long(first, answers[turn:] + answers[:turn], more)

    def _negative(self, found: Found) -> Nothing:
        """Return the SOA of the zone; the same object for all names of one length."""
        assert found.apex is not None
        return self._nothing_of(found.apex, found.offset)

    def _nothing_of(self, apex: Apex, offset: int) -> Nothing:
        key = apex, offset
        if key not in self._nothing:
            self._nothing[key] = Nothing(apex, offset)
        return self._nothing[key]


def _denied(first: list[bytes], writer: Writer, target: bytes, found: Found) -> Long:
    assert found.apex is not None
    name = writer.name(target[found.offset :])
    return Long(first, (), authority=(name.join(found.apex.negative),))

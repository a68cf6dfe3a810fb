"""What of an upstream's reply is handed on: the records that answer the question, and no others.

Lives here: which records those are, how long they may be kept, and the new message made of them.
Pure. Must not: know how a message came (reading.py), or keep it (cache.py).

A reply is written anew: no byte of the upstream's own message reaches a client, nor does a record
that was not asked for. Of a denial the SOA record stays, with signatures where they are wanted.
"""

from collections.abc import Callable, Iterable
from io import BytesIO
from ipaddress import ip_address
from typing import NamedTuple

import dns.message
import dns.name
import dns.rdatatype
import dns.rrset
from dns.rdatatype import RdataType

from vipd.dns.forward import wire
from vipd.dns.forward.question import Question, Reply, failure
from vipd.dns.forward.settings import ForwardSettings

LONGEST = 65_535
_FINAL = frozenset({wire.NOERROR, wire.NXDOMAIN, wire.YXDOMAIN})
_PROOFS = frozenset({RdataType.NSEC, RdataType.NSEC3, RdataType.RRSIG})

RRset = dns.rrset.RRset


class Rules(NamedTuple):
    """What the operator decides about replies. Times are in seconds."""

    settings: ForwardSettings
    is_ours: Callable[[bytes], bool]
    """Whether nobody else may say anything of a name (wire form, lower case)."""
    trust_ad: bool = False
    refuse_private: bool = False

    @property
    def message_bytes(self) -> int:
        """Bytes of the longest reply."""
        return self.settings.message_bytes


class _Chain(NamedTuple):
    """The answer section, from the name that was asked along its CNAMEs."""

    rrsets: list[RRset]
    end: dns.name.Name
    """The name that the last CNAME leads to."""
    is_answered: bool
    """Whether there are records of the type at the end."""
    is_ours: bool
    """Whether it ends at a name of which upstreams have nothing to say."""


def excerpt(message: dns.message.Message, question: Question, rules: Rules) -> Reply:
    """Return what the reply says of the question. A message that dnspython could read is enough."""
    rcode = int(message.rcode())
    if rcode not in _FINAL:
        return Reply(rcode)
    chain = _follow(message.answer, question, rules)
    if chain is None:
        return failure(question, wire.EDE_OTHER)
    if rcode == wire.NOERROR and not message.answer and _is_referral(message):
        return Reply(rcode, is_lame=True)
    flags = rcode | (wire.CD if question.checking_disabled else 0)
    if rules.trust_ad and message.flags & wire.AD:
        flags |= wire.AD
    if chain.is_answered or chain.is_ours:
        return _positive(message, question, rules, chain, flags)
    return _denial(message, question, rules, chain, flags)


def _positive(
    message: dns.message.Message, question: Question, rules: Rules, chain: _Chain, flags: int
) -> Reply:
    answer, refused = chain.rrsets, False
    if rules.refuse_private:
        answer = [one for one in map(_public, chain.rrsets) if one is not None]
        refused = len(answer) < len(chain.rrsets)
    proofs = _proofs(message, rules) if question.dnssec else []
    most = rules.settings.cache.most_denial_ttl if refused else rules.settings.cache.most_ttl
    ttl = _clamp([*answer, *proofs], rules.settings.cache.least_ttl, most)
    return Reply(
        flags & 0xF,
        rendered(question, flags, answer, proofs),
        ttl if answer or not refused else most,
        is_denial=refused,
        target=_wire(chain.end) if chain.is_ours else None,
        extended_error=wire.EDE_BLOCKED if refused else None,
    )


def _denial(
    message: dns.message.Message, question: Question, rules: Rules, chain: _Chain, flags: int
) -> Reply:
    """RFC 2308: how long it counts stands in the SOA record; without one it is not kept."""
    caps = rules.settings.cache
    soa = [one for one in message.authority if _denies(one, chain.end)]
    if not soa:
        dangles = bool(chain.rrsets) and flags & 0xF == wire.NOERROR
        ttl = _clamp(chain.rrsets, caps.least_ttl, caps.most_ttl)
        return Reply(
            flags & 0xF,
            rendered(question, flags, chain.rrsets, []),
            ttl if dangles else 0,
            is_denial=not dangles,
            target=_wire(chain.end) if dangles else None,
        )
    minimum = min(int(soa[0][0].minimum), soa[0].ttl)
    soa[0].ttl = minimum
    proofs = _proofs(message, rules) if question.dnssec else []
    everything = [*chain.rrsets, soa[0], *proofs]
    ttl = _clamp(everything, min(caps.least_ttl, caps.most_denial_ttl), caps.most_denial_ttl)
    return Reply(
        flags & 0xF,
        rendered(question, flags, chain.rrsets, [soa[0], *proofs]),
        ttl,
        is_denial=True,
    )


def _follow(answer: list[RRset], question: Question, rules: Rules) -> _Chain | None:
    """Return the records along the chain; None where it goes in circles, or on for too long."""
    by_name: dict[dns.name.Name, list[RRset]] = {}
    for one in answer:
        by_name.setdefault(one.name, []).append(one)
    name, _ = dns.name.from_wire(question.name, 0)
    kept: list[RRset] = []
    seen = set()
    while name not in seen:
        seen.add(name)
        if len(seen) > rules.settings.chain + 1:
            return None
        if len(seen) > 1 and rules.is_ours(_wire(name)):
            return _Chain(kept, name, is_answered=False, is_ours=True)
        there = by_name.get(name, [])
        found = [one for one in there if _answers(one, question.type)]
        if found:
            kept += [*found, *_signatures(there, question, question.type)]
            return _Chain(kept, name, is_answered=True, is_ours=False)
        cname = next((one for one in there if one.rdtype == RdataType.CNAME), None)
        if cname is None:
            return _Chain(kept, name, is_answered=False, is_ours=False)
        kept += [*_dname(by_name, name, question), cname]
        kept += _signatures(there, question, RdataType.CNAME)
        name = cname[0].target
    return None


def _answers(rrset: RRset, qtype: int) -> bool:
    return qtype in (rrset.rdtype, wire.ANY)


def _signatures(there: list[RRset], question: Question, covers: int) -> list[RRset]:
    if not question.dnssec or covers in (wire.ANY, RdataType.RRSIG):
        return []
    return [one for one in there if one.rdtype == RdataType.RRSIG and one.covers == covers]


def _dname(
    by_name: dict[dns.name.Name, list[RRset]], name: dns.name.Name, question: Question
) -> list[RRset]:
    """Return the DNAME that a CNAME was made of (RFC 6672), where there is one."""
    while name != dns.name.root:
        name = name.parent()
        there = by_name.get(name, [])
        found = [one for one in there if one.rdtype == RdataType.DNAME]
        if found:
            return [*found, *_signatures(there, question, RdataType.DNAME)]
    return []


def _denies(rrset: RRset, name: dns.name.Name) -> bool:
    return rrset.rdtype == RdataType.SOA and name.is_subdomain(rrset.name)


def _proofs(message: dns.message.Message, rules: Rules) -> list[RRset]:
    return [
        one
        for one in message.authority
        if one.rdtype in _PROOFS and not rules.is_ours(_wire(one.name))
    ]


def _is_referral(message: dns.message.Message) -> bool:
    kinds = {one.rdtype for one in message.authority}
    authoritative = bool(message.flags & wire.AA)
    return RdataType.NS in kinds and RdataType.SOA not in kinds and not authoritative


def _public(rrset: RRset) -> RRset | None:
    """Return the RRset without private addresses; None where nothing is left.

    Python counts loopback, link-local and IPv4 addresses in IPv6 ones (::ffff:0:0/96) among them.
    """
    if rrset.rdtype not in (RdataType.A, RdataType.AAAA):
        return rrset
    kept = [one for one in rrset if not ip_address(one.address).is_private]
    if len(kept) == len(rrset):
        return rrset
    return dns.rrset.from_rdata_list(rrset.name, rrset.ttl, kept) if kept else None


def _clamp(rrsets: Iterable[RRset], least: int, most: int) -> int:
    """Bring all TTLs between the bounds, and return the shortest; 0 of none."""
    shortest = None
    for one in rrsets:
        one.ttl = min(max(one.ttl, least), most)
        shortest = one.ttl if shortest is None else min(shortest, one.ttl)
    return shortest or 0


def rendered(question: Question, flags: int, answer: list[RRset], authority: list[RRset]) -> bytes:
    """Return the message; raise ValueError where it would be longer than a message can be."""
    name, _ = dns.name.from_wire(question.name, 0)
    file, compress = BytesIO(), dict[dns.name.Name, int]()
    file.write(bytes(wire.HEADER.size))
    name.to_wire(file, compress)
    file.write(wire.question(b"", question.type))
    counts = [
        sum(one.to_wire(file, compress, want_shuffle=False) for one in section)
        for section in (answer, authority)
    ]
    message = file.getvalue()
    if len(message) > LONGEST:
        raise ValueError(f"{len(message)} bytes do not make a message")
    header = wire.HEADER.pack(0, wire.QR | wire.RD | wire.RA | flags, 1, *counts, 0)
    return header + message[wire.HEADER.size :]


def _wire(name: dns.name.Name) -> bytes:
    found = name.canonicalize().to_wire()
    assert found is not None, "there is no file to write to"
    return found

"""What of an upstream's message is believed and handed on, whatever it looks like.

The last part reads messages of chance: a few, or as many as VIPD_EXPLORE says.
"""

import os
import struct
from random import Random

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vipd.dns import names
from vipd.dns.forward import wire
from vipd.dns.forward.excerpt import Rules
from vipd.dns.forward.query import Query, make_query
from vipd.dns.forward.question import Question, Reply
from vipd.dns.forward.reading import Unwanted, read
from vipd.dns.forward.settings import CacheSettings, ForwardSettings
from vipd.dns.forward.standing import Standing
from vipd.dns.forward.upstream import Upstream

NAME = "www.example.com."
SOA = "ns.example.com. admin.example.com. 1 3600 600 86400 60"
SIGNATURE = "A 8 3 300 20300101000000 20200101000000 1 example.com. AAAA"
CLUSTER = names.wire("cluster.local")
SETTINGS = ForwardSettings()
RULES = Rules(SETTINGS, lambda name: name.endswith(CLUSTER))


def sent(question: Question, **more: bool) -> Query:
    standing = Standing(Upstream("192.0.2.1"), SETTINGS, b"ourside!")
    return make_query(question, standing, Random(1).getrandbits, 0.0, **more)


def message_of(query: Query, *lines: str, **more: object) -> dns.message.Message:
    """A reply; lines as NAME TTL TYPE DATA, those behind an empty one in the authority section."""
    made = dns.message.make_response(dns.message.from_wire(query.message))
    made.request_payload = 65_535
    made.flags |= dns.flags.RA
    section = made.answer
    for line in lines:
        if not line:
            section = made.authority
            continue
        owner, ttl, kind, data = line.split(maxsplit=3)
        name = made.question[0].name if owner == "@" else dns.name.from_text(owner)
        one = dns.rrset.from_text(name, int(ttl), "IN", kind, data)
        same = [s for s in section if s.match(one.name, one.rdclass, one.rdtype, one.covers)]
        if same:
            same[0].update(one)  # type: ignore[no-untyped-call]
        else:
            section.append(one)
    made.set_rcode(dns.rcode.from_text(str(more.get("rcode", "NOERROR"))))
    return made


def taken(
    *lines: str, qtype: str = "A", dnssec: bool = False, rules: Rules = RULES, **more: object
) -> Reply:
    """What is made of a reply to a question for NAME."""
    number = dns.rdatatype.from_text(qtype)
    question = Question(names.wire(NAME), number, dnssec)
    query = sent(question)
    found = read(message_of(query, *lines, **more).to_wire(), query, question, rules)
    assert isinstance(found, Reply), found
    return found


def shown(message: bytes) -> list[str]:
    """Both sections: lines as they were given."""
    found = dns.message.from_wire(message)
    return [
        f"{one.name.to_text()} {one.ttl} {dns.rdatatype.to_text(one.rdtype)} {data.to_text()}"
        for section in (found.answer, found.authority)
        for one in section
        for data in one
    ]


# What is handed on


def test_only_what_answers() -> None:
    found = taken(
        "@ 300 A 192.0.2.1",
        "@ 200 AAAA 2001:db8::1",
        "other.example. 100 A 192.0.2.6",
        "",
        "example.com. 50 NS ns.example.com.",
    )
    assert shown(found.message) == [f"{NAME} 300 A 192.0.2.1"]
    assert (found.ttl, found.is_denial, found.target) == (300, False, None)


def test_a_chain_in_any_order_is_put_in_order() -> None:
    found = taken(
        "c.example.net. 30 A 192.0.2.1",
        "b.example.net. 40 CNAME c.example.net.",
        "@ 50 CNAME b.example.net.",
    )
    assert shown(found.message) == [
        f"{NAME} 50 CNAME b.example.net.",
        "b.example.net. 40 CNAME c.example.net.",
        "c.example.net. 30 A 192.0.2.1",
    ]
    assert found.ttl == 30


def test_a_cname_that_was_asked_for_is_not_followed() -> None:
    found = taken("@ 50 CNAME b.example.net.", "b.example.net. 40 A 192.0.2.1", qtype="CNAME")
    assert shown(found.message) == [f"{NAME} 50 CNAME b.example.net."]
    assert found.target is None


def test_any_is_everything_at_the_name() -> None:
    found = taken("@ 50 A 192.0.2.1", "@ 40 TXT x", "other. 1 A 192.0.2.2", qtype="ANY")
    assert shown(found.message) == [f"{NAME} 50 A 192.0.2.1", f'{NAME} 40 TXT "x"']


def test_a_dname_comes_with_its_cname() -> None:
    lines = (
        "example.com. 60 DNAME example.net.",
        "@ 60 CNAME www.example.net.",
        "www.example.net. 60 A 192.0.2.1",
    )
    assert len(shown(taken(*lines).message)) == 3


@pytest.mark.parametrize(("dnssec", "count"), [(True, 4), (False, 1)])
def test_signatures_and_proofs_where_they_are_wanted(dnssec: bool, count: int) -> None:
    found = taken(
        "@ 300 A 192.0.2.1",
        f"@ 300 RRSIG {SIGNATURE}",
        f"other. 300 RRSIG {SIGNATURE}",
        "",
        "a.example.com. 60 NSEC c.example.com. A",
        f"a.example.com. 60 RRSIG {SIGNATURE.replace('A', 'NSEC', 1)}",
        "example.com. 50 NS ns.example.com.",
        dnssec=dnssec,
    )
    assert len(shown(found.message)) == count
    assert found.ttl == (60 if dnssec else 300)


def test_a_chain_that_ends_nowhere_says_where() -> None:
    found = taken("@ 50 CNAME b.example.net.")
    assert (found.target, found.ttl) == (names.wire("b.example.net"), 50)
    assert not found.is_denial


def test_a_chain_that_ends_in_a_denial_is_one() -> None:
    soa = f"example.net. 30 SOA {SOA}"
    found = taken("@ 20 CNAME b.example.net.", "", soa, rcode="NXDOMAIN")
    assert (found.rcode, found.is_denial, found.ttl, found.target) == (3, True, 20, None)
    # A SOA record of the first name says nothing of the last.
    other = taken("@ 20 CNAME b.example.net.", "", f"example.com. 30 SOA {SOA}")
    assert other.target == names.wire("b.example.net")


def test_names_of_the_cluster_are_taken_from_nobody() -> None:
    found = taken(
        "@ 50 CNAME web.shop.svc.cluster.local.",
        "web.shop.svc.cluster.local. 50 CNAME x.example.",
        "x.example. 50 A 192.0.2.66",
    )
    assert shown(found.message) == [f"{NAME} 50 CNAME web.shop.svc.cluster.local."]
    assert found.target == names.wire("web.shop.svc.cluster.local")
    nsec = "a.cluster.local. 60 NSEC b.cluster.local. A"
    proven = taken("@ 50 A 192.0.2.1", "", nsec, "a.example. 60 NSEC b.example. A", dnssec=True)
    assert len(shown(proven.message)) == 2
    soa = f"cluster.local. 30 SOA {SOA}"
    denied = taken("@ 50 CNAME x.cluster.local.", "", soa, rcode="NXDOMAIN")
    assert denied.target == names.wire("x.cluster.local")
    assert len(shown(denied.message)) == 1


def test_addresses_stay_in_the_order_of_the_upstream() -> None:
    question = Question(names.wire(NAME), wire.A)
    query = sent(question, tcp=True)
    wanted = [bytes((10, 0, 0, n * 7 % 31)) for n in range(31)]
    made = wire.reply(question.name, wire.A, answers=tuple(wire.record(1, 9, a) for a in wanted))
    found = read(query.message[:2] + made[2:], query, question, RULES)
    assert isinstance(found, Reply)
    assert [found.message[one.end - 4 : one.end] for one in wire.records(found.message)] == wanted


# How long


@pytest.mark.parametrize(
    ("ttl", "kept"), [(0, 0), (1, 1), (3600, 3600), (86_400, 3600), (2**31 - 1, 3600)]
)
def test_ttls_are_bounded(ttl: int, kept: int) -> None:
    found = taken(f"@ {ttl} A 192.0.2.1")
    assert (found.ttl, shown(found.message)) == (kept, [f"{NAME} {kept} A 192.0.2.1"])


def test_a_least_ttl_as_configured() -> None:
    rules = RULES._replace(settings=ForwardSettings(cache=CacheSettings(least_ttl=5)))
    assert taken("@ 0 A 192.0.2.1", rules=rules).ttl == 5
    assert taken("", f"example.com. 2 SOA {SOA}", rcode="NXDOMAIN", rules=rules).ttl == 5


@pytest.mark.parametrize(("ttl", "minimum", "kept"), [(10, 60, 10), (20, 7, 7), (9000, 9000, 30)])
def test_a_denial_counts_for_the_least_of_both(ttl: int, minimum: int, kept: int) -> None:
    soa = f"example.com. {ttl} SOA {SOA.removesuffix('60')}{minimum}"
    for code in ("NXDOMAIN", "NOERROR"):
        found = taken("", soa, rcode=code)
        assert (found.ttl, found.is_denial) == (kept, True)
        assert shown(found.message)[0].startswith(f"example.com. {kept} SOA")


# What is not the reply


def changed(at: int, value: int) -> Reply | Unwanted:
    question = Question(names.wire(NAME), wire.A)
    query = sent(question)
    data = bytearray(message_of(query, "@ 300 A 192.0.2.1").to_wire())
    data[at] = value
    return read(bytes(data), query, question, RULES)


def test_what_does_not_match() -> None:
    assert isinstance(changed(5, 1), Reply)
    assert changed(0, 0) is Unwanted.ID
    assert changed(2, 0x01) is Unwanted.NO_REPLY
    assert changed(2, 0xA9) is Unwanted.NO_REPLY
    assert changed(5, 0) is Unwanted.QUESTION
    assert changed(5, 2) is Unwanted.QUESTION
    assert changed(12 + len(names.wire(NAME)) + 1, 28) is Unwanted.QUESTION
    assert changed(7, 2) is Unwanted.MALFORMED
    assert changed(7, 255) is Unwanted.MALFORMED


def test_spelling_counts_over_udp_and_not_over_tcp() -> None:
    question = Question(names.wire(NAME), wire.A)
    for query, expected in ((sent(question), Unwanted.SPELLING), (sent(question, tcp=True), Reply)):
        data = message_of(query, "@ 300 A 192.0.2.1").to_wire()
        other = data[:12] + data[12:25].swapcase() + data[25:]
        found = read(other, query, question, RULES)
        assert found is expected or type(found) is expected


def test_a_header_alone_is_an_error_and_nothing_else() -> None:
    question = Question(names.wire(NAME), wire.A)
    query = sent(question)
    start = query.message[:2]
    for code in (1, 2, 4, 5):
        found = read(start + struct.pack(">H", 0x8180 | code) + bytes(8), query, question, RULES)
        assert isinstance(found, Reply)
        assert (found.rcode, found.is_final) == (code, False)
    for code in (0, 3, 9):
        data = start + struct.pack(">H", 0x8180 | code) + bytes(8)
        assert read(data, query, question, RULES) is Unwanted.QUESTION


def test_what_is_longer_than_the_bound() -> None:
    question = Question(names.wire(NAME), wire.A)
    query = sent(question)
    data = message_of(query, *(f"@ 300 A 10.0.0.{n}" for n in range(60))).to_wire()
    assert isinstance(read(data, query, question, RULES), Reply)
    rules = RULES._replace(settings=ForwardSettings(message_bytes=len(data) - 1))
    assert read(data, query, question, rules) is Unwanted.LARGE


def test_a_query_is_what_dnspython_takes_it_for() -> None:
    question = Question(names.wire(NAME), wire.AAAA, dnssec=True, checking_disabled=True)
    query = sent(question, trust_ad=True)
    message = dns.message.from_wire(query.message)
    assert message.question[0].rdtype == dns.rdatatype.AAAA
    assert message.question[0].name == dns.name.from_text(NAME)
    assert message.flags == dns.flags.RD | dns.flags.CD | dns.flags.AD
    assert (message.payload, message.ednsflags, message.id) == (1232, dns.flags.DO, query.id)
    (cookie,) = message.options
    assert isinstance(cookie, dns.edns.CookieOption)
    assert (cookie.client, cookie.server) == (b"ourside!", b"")
    plain = dns.message.from_wire(sent(question, edns=False).message)
    assert plain.edns == -1


# Whatever comes

EXPLORE = int(os.environ.get("VIPD_EXPLORE", "0"))
EXAMPLES = EXPLORE or 200
_QUESTION = Question(names.wire(NAME), wire.A, dnssec=True)
_QUERY = sent(_QUESTION)
_SEEDS = [
    message_of(
        _QUERY, "@ 300 A 192.0.2.1", "@ 300 A 192.0.2.2", f"@ 9 RRSIG {SIGNATURE}"
    ).to_wire(),
    message_of(_QUERY, "@ 50 CNAME b.example.net.", "b.example.net. 40 A 192.0.2.1").to_wire(),
    message_of(_QUERY, "", f"example.com. 30 SOA {SOA}", rcode="NXDOMAIN").to_wire(),
    message_of(
        _QUERY, "@ 60 SVCB 1 . alpn=h2 ipv4hint=192.0.2.1", "@ 5 TXT x", "@ 5 MX 1 a."
    ).to_wire(),
]


def _survives(data: bytes) -> None:
    """Read it; what is taken has to be a message that others can read, of the same question."""
    for question in (_QUESTION, _QUESTION._replace(type=wire.ANY)):
        found = read(data, _QUERY, question, RULES)
        if isinstance(found, Reply) and found.message:
            message = dns.message.from_wire(found.message)
            assert message.question[0].name == dns.name.from_text(NAME)
            assert len(wire.ttl_offsets(wire.records(found.message))) % 2 == 0
            assert wire.aged(found.message, wire.ttl_offsets(wire.records(found.message)), 5)
            run = wire.address_run(wire.records(found.message))
            if run is not None:
                dns.message.from_wire(wire.turned(found.message, run, 1))
            assert 0 <= found.ttl <= SETTINGS.cache.most_ttl


@settings(max_examples=EXAMPLES, deadline=None, derandomize=not EXPLORE, database=None)
@given(st.binary(max_size=300))
def test_nothing_makes_it_raise(tail: bytes) -> None:
    _survives(tail)
    _survives(_SEEDS[0][: 12 + len(_QUERY.question)] + tail)


@settings(max_examples=2 * EXAMPLES, deadline=None, derandomize=not EXPLORE, database=None)
@given(
    st.sampled_from(_SEEDS),
    st.lists(st.tuples(st.integers(2, 400), st.integers(0, 255)), max_size=6),
    st.integers(0, 400),
)
def test_nor_does_a_good_message_with_bytes_changed(
    seed: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(seed)
    for at, value in changes:
        if at < len(data):
            data[at] = value
    _survives(bytes(data))
    _survives(bytes(data[: len(data) - length % len(data)]))


# Bytes of our own


def test_addresses_are_turned_and_nothing_else() -> None:
    found = taken(
        "@ 50 CNAME b.example.net.", *(f"b.example.net. 9 A 192.0.2.{n}" for n in range(3))
    )
    run = wire.address_run(wire.records(found.message))
    assert run is not None
    seen = [shown(wire.turned(found.message, run, turn)) for turn in range(4)]
    assert {tuple(sorted(one)) for one in seen} == {tuple(sorted(shown(found.message)))}
    assert len({one[1] for one in seen}) == 3
    assert seen[0] == seen[3]
    assert all(one[0] == f"{NAME} 50 CNAME b.example.net." for one in seen)
    assert wire.address_run(wire.records(taken("@ 9 A 192.0.2.1").message)) is None


def test_a_spelling_is_the_same_name() -> None:
    name = names.wire("a-1.Example." + "z" * 63)
    assert wire.spelled_at_random(name, lambda _: 0) == name
    upper = wire.spelled_at_random(name, lambda count: (1 << count) - 1)
    assert upper == b"\x03A-1\x07EXAMPLE\x3f" + b"Z" * 63 + b"\0"
    assert upper.lower() == name

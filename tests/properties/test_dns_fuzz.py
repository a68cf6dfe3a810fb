"""Nothing that comes in makes the DNS raise, or say what could not be read.

Messages of chance, and good ones with bytes changed: 20,000, or as many as VIPD_EXPLORE says
(`VIPD_EXPLORE=1000000 pytest tests/properties/test_dns_fuzz.py` is the nightly run).
"""

from random import Random

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
from hypothesis import example, given
from hypothesis import strategies as st
from tests.properties.dns_mutants import EXPLORE, mutated
from tests.unit.dns_zone_facts import alias, answering, own, peers, web

from vipd.dns.answer import Answers, AnswerSettings, Forward
from vipd.dns.forward.got import Got
from vipd.dns.message import Malformed, parse

MUTANTS = EXPLORE or 20_000
SETTINGS = AnswerSettings(identity="node-a", version="1")


def the_answers() -> Answers:
    """Return answers from a zone with something of everything."""
    return answering(
        web(), peers(40), peers(3, "few"), alias(own("web")), alias("example.com", "away"),
        alias(own("loop"), "loop"), settings=SETTINGS,
    )  # fmt: skip


def seeds() -> list[bytes]:
    """Return good queries of every kind."""
    found = []
    names = [
        own("web"),
        own("peers"),
        own("few"),
        own("alias"),
        own("away"),
        own("loop"),
        own("no"),
    ]
    names += ["cluster.local", "dns-version.cluster.local", "1.0.96.10.in-addr.arpa", "example.com"]
    for name in names:
        for kind in ("A", "AAAA", "SRV", "PTR", "TXT", "ANY", "SOA", "AXFR"):
            found.append(dns.message.make_query(name, kind).to_wire())
            query = dns.message.make_query(name, kind, use_edns=0, want_dnssec=True, payload=4096)
            found.append(query.to_wire())
            query.use_edns(
                0,
                options=[
                    dns.edns.GenericOption(dns.edns.OptionType.make(code), data)
                    for code, data in OPTIONS
                ],
            )
            found.append(query.to_wire())
    found.append(dns.message.make_query("version.bind", "TXT", "CH").to_wire())
    found.append(dns.message.make_query("example.com", "IXFR").to_wire())
    return found


OPTIONS = ((3, b""), (10, b"12345678"), (11, b""), (12, bytes(30)), (8, b"\0\1\0\0"))


def check(answers: Answers, data: bytes) -> None:
    """Ask over both, and look at what comes back."""
    for udp in (True, False):
        outcome = answers.udp(data) if udp else answers.tcp(data)
        if outcome is None:
            assert len(data) < 12 or data[2] & 0x80
            continue
        if isinstance(outcome, Forward):
            reply = answers.finish(outcome, Got(b""), udp=udp)
        else:
            reply = outcome
        limit = 65535
        if udp:
            limit = 1232 if int.from_bytes(data[10:12]) else 512
        assert len(reply) <= limit
        assert reply[:2] == data[:2]
        assert reply[2] & 0x80
        assert answers.udp(reply) is None, "a reply is never answered: two servers would go on"
        _read(data, reply)


def _read(data: bytes, reply: bytes) -> None:
    """Read a reply with another's eyes, and compare it with the question."""
    read = dns.message.from_wire(reply)
    if reply[4:6] == b"\0\0":
        assert len(reply) == 12
        assert read.rcode() in (dns.rcode.FORMERR, dns.rcode.NOTIMP)
        return
    question = read.question[0]
    theirs = dns.message.from_wire(data, question_only=True)
    assert theirs.question[0].name.to_wire() == question.name.to_wire(), "spelled as asked"
    assert theirs.question == read.question
    assert read.opcode() == 0
    assert read.flags & dns.flags.RD == theirs.flags & dns.flags.RD
    if read.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        assert not read.answer


def test_good_messages_with_bytes_changed() -> None:
    lots, answers, good = Random(6), the_answers(), seeds()
    for data in good:
        check(answers, data)
    pool = list(good)
    for index in range(MUTANTS):
        base = lots.choice(pool)
        data = mutated(lots, base, lots.choice(good))
        check(answers, data)
        if index % 16 == 0:  # changes of changed ones lead farther
            pool[lots.randrange(len(pool))] = data
            pool.append(lots.choice(good))
            del pool[:-2000]
    assert len(answers.zone.prebuilt.replies) < 100


@given(st.binary(max_size=80))
def test_messages_of_chance(data: bytes) -> None:
    check(ANSWERS, data)


HEADER = st.sampled_from((b"\0\1\1\0\0\1\0\0\0\0\0\0", b"\0\1\1\0\0\1\0\0\0\0\0\1"))
LABEL = st.one_of(st.binary(min_size=1, max_size=63), st.sampled_from((b"web", b"default", b"svc")))


@st.composite
def questions(draw: st.DrawFn) -> bytes:
    """Return a message with a well-formed question, whatever stands behind it."""
    labels = draw(st.lists(LABEL, max_size=6))
    name = b"".join([bytes((len(label),)) + label for label in labels])
    name += draw(st.sampled_from((b"\0", own_suffix(), b"\x04arpa\0")))
    kind = draw(st.sampled_from((1, 28, 33, 12, 255)) | st.integers(0, 0xFFFF)).to_bytes(2)
    return draw(HEADER) + name + kind + b"\0\1" + draw(st.just(b"") | st.binary(max_size=30))


def own_suffix() -> bytes:
    """Return the end of names of services."""
    return b"\x03svc\x07cluster\x05local\0"


@given(questions())
def test_questions_of_chance(data: bytes) -> None:
    check(ANSWERS, data)


@given(questions())
def test_a_question_is_read_as_others_read_it(data: bytes) -> None:
    try:
        query = parse(data)
    except Malformed:
        return
    theirs = dns.message.from_wire(data, question_only=True).question[0]
    assert query.name == theirs.name.to_wire()
    assert query.key == query.name.lower()
    assert (query.type, query.class_) == (theirs.rdtype, theirs.rdclass)


def plain(*labels: bytes, end: bytes | None = None) -> bytes:
    """Return a question for an A below svc.cluster.local, whatever the labels' lengths are."""
    name = b"".join([bytes((len(label),)) + label for label in labels]) + (end or own_suffix())
    return b"\0\1\1\0\0\1" + bytes(6) + name + b"\0\1\0\1"


@given(questions())
@example(plain(b"no", b"default"))
@example(plain(b"no", b"nowhere"))
@example(plain(b"www", b"example", b"com"))
@example(plain(b"a", b"_tcp", b"no", b"default"))
@example(plain(b"default"))
@example(plain(b"nowhere"))
@example(plain(b"a", b"web", b"default"))
@example(plain(b"no", b"web", b"default"))
@example(plain(b"x" * 64, b"default"))
@example(plain(b"x" * 63, b"y" * 63, b"z" * 63, b"x" * 43))
@example(plain(b"x" * 63, b"y" * 63, b"z" * 63, b"x" * 44))
@example(plain(b"a", b"no", b"default\x03svc", end=own_suffix()[4:]))
def test_an_unknown_name_is_denied_alike_each_time(data: bytes) -> None:
    """Unknown services have a short cut, which the first question of its kind does not take."""
    first, later = Answers(ANSWERS.zone, SETTINGS).udp(data), ANSWERS.udp(data)
    if isinstance(later, bytes) and later[3] & 15:
        assert first == later
    else:
        assert not isinstance(first, bytes) or first[3] & 15 == 0


def test_what_others_answered_with_bytes_changed() -> None:
    """Forwarding reads it first; yet if it lets something through, a reply comes of it."""
    lots, answers = Random(7), the_answers()
    for name, outside in ((own("away"), "example.com"), ("example.com", "example.com")):
        forward = answers.udp(dns.message.make_query(name, "A").to_wire())
        assert isinstance(forward, Forward)
        good = dns.message.make_response(dns.message.make_query(outside, "A", id=0), True)
        for index in range(40):
            good.answer.append(dns.rrset.from_text(f"{outside}.", 5, "IN", "A", f"192.0.2.{index}"))
        wire = good.to_wire()
        for _ in range(MUTANTS // 10):
            data = mutated(lots, wire, wire)
            for udp in (True, False):
                reply = answers.finish(forward, Got(data), udp=udp)
                assert len(reply) <= (512 if udp else 65535)
                assert reply[:2] == forward.query.id
                assert reply[2] & 0x80


ANSWERS = the_answers()
"""The same for all examples, so that they meet prebuilt replies, and manners that are known."""
for good in seeds():
    ANSWERS.udp(good)

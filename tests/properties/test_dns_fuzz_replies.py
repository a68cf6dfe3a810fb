"""Whatever an upstream sends, nothing raises, and what clients get of it is a message about the
question that was asked.

Replies with bytes changed behind the question: 4,000, or as many as VIPD_EXPLORE says
(`VIPD_EXPLORE=1000000 pytest tests/properties/test_dns_fuzz_replies.py` is the nightly run). Each
goes the whole way: read, kept in a cache, given fresh, older and stale, sent over UDP and TCP.
"""

from collections.abc import Iterator
from random import Random

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rrset
from dns.rdatatype import RdataType
from tests.properties.dns_mutants import EXPLORE, mutated
from tests.unit.dns_zone_facts import alias, answering, own, web

from vipd.dns import names
from vipd.dns.answer import Answers, Forward
from vipd.dns.forward import wire
from vipd.dns.forward.cache import Cache
from vipd.dns.forward.excerpt import Rules
from vipd.dns.forward.got import Got
from vipd.dns.forward.query import Query, make_query
from vipd.dns.forward.question import Question, Reply, key_of
from vipd.dns.forward.reading import read
from vipd.dns.forward.settings import CacheSettings, ForwardSettings
from vipd.dns.forward.standing import Standing
from vipd.dns.forward.upstream import Upstream

MUTANTS = EXPLORE or 4000
NAME = "www.example.com."
WIRE = names.wire(NAME)
CLUSTER = names.wire("cluster.local")
SETTINGS = ForwardSettings(cache=CacheSettings(most_bytes=1 << 18))
SOA = "ns.example.com. admin.example.com. 1 3600 600 86400 60"
SIGNATURE = "8 3 300 20300101000000 20200101000000 1 example.com. AAAA"
TYPES = (1, 28, 33, 65, 255)

REPLIES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("NOERROR", (f"{NAME} 300 A 192.0.2.1", f"{NAME} 300 A 192.0.2.2"), ()),
    ("NOERROR", (f"{NAME} 300 A 192.0.2.1", f"{NAME} 300 RRSIG A {SIGNATURE}"), ()),
    ("NOERROR", (f"{NAME} 9 AAAA 2001:db8::1", f"{NAME} 9 AAAA ::ffff:10.0.0.1"), ()),
    (
        "NOERROR",
        (f"{NAME} 50 CNAME b.example.net.", "b.example.net. 40 CNAME c.example.net.",
         "c.example.net. 5 A 192.0.2.1"),
        (),
    ),
    ("NOERROR", (f"{NAME} 50 CNAME web.default.svc.cluster.local.",), ()),
    ("NOERROR", ("example.com. 9 DNAME example.net.", f"{NAME} 9 CNAME www.example.net."), ()),
    ("NOERROR", (f"{NAME} 60 HTTPS 1 . alpn=h2 ipv4hint=192.0.2.1",), ()),
    ("NOERROR", (f"{NAME} 60 SRV 0 5 80 a.example.com.", f"{NAME} 60 TXT x y", f"{NAME} 9 MX 1 a."),
     ()),
    ("NXDOMAIN", (), (f"example.com. 30 SOA {SOA}", "a.example.com. 30 NSEC z.example.com. A")),
    ("NOERROR", (), (f"example.com. 30 SOA {SOA}",)),
    ("NOERROR", (), ("example.com. 30 NS ns.example.com.",)),
    ("SERVFAIL", (), ()),
    ("YXDOMAIN", ("example.com. 9 DNAME example.net.",), ()),
)  # fmt: skip


def asked(lots: Random) -> tuple[Question, Query]:
    """Return a question and how an upstream was asked it."""
    question = Question(WIRE, lots.choice(TYPES), lots.random() < 0.5, lots.random() < 0.1)
    standing = Standing(Upstream("192.0.2.1"), SETTINGS, b"ourside!")
    if lots.random() < 0.3:
        standing.server_cookie = b"theirside"
    edns = lots.random() < 0.8
    return question, make_query(question, standing, lots.getrandbits, 0.0, edns=edns)


def good_replies(query: Query) -> Iterator[bytes]:
    """Yield replies to a query that a name server could send."""
    for rcode, answer, authority in REPLIES:
        made = dns.message.make_response(dns.message.from_wire(query.message))
        made.request_payload = 65_535
        made.flags |= dns.flags.RA
        made.set_rcode(dns.rcode.from_text(rcode))
        for section, lines in ((made.answer, answer), (made.authority, authority)):
            for line in lines:
                owner, ttl, kind, data = line.split(maxsplit=3)
                section.append(dns.rrset.from_text(owner, int(ttl), "IN", kind, data))
        if query.has_edns:
            cookie = dns.edns.GenericOption(dns.edns.OptionType.make(10), b"ourside!theirside")
            made.use_edns(
                0, options=[cookie, dns.edns.EDEOption(dns.edns.EDECode.DNSSEC_BOGUS, "no")]
            )
        yield made.to_wire()


def test_replies_with_bytes_changed() -> None:
    lots = Random(8)
    cache = Cache(SETTINGS.cache)
    answers = answering(web(), alias("www.example.com", "away"))
    taken = 0
    for number in range(MUTANTS):
        if number % 200 == 0:
            question, query = asked(lots)
            good = list(good_replies(query))
            rules = Rules(
                SETTINGS,
                lambda name: name.endswith(CLUSTER),
                trust_ad=lots.random() < 0.5,
                refuse_private=lots.random() < 0.5,
            )
        end = 12 + len(query.question)
        base, other = lots.choice(good), lots.choice(good)
        if lots.random() < 0.9:  # otherwise most would be dropped for their id or question
            tail = mutated(lots, base[6:12] + base[end:], other[end:] or b"\0")
            data = base[:6] + tail[:6].ljust(6, b"\0") + base[12:end] + tail[6:]
        else:
            data = mutated(lots, base, other)
        found = read(data, query, question, rules)
        if isinstance(found, Reply):
            taken += bool(found.message)
            follow(question, found, cache, answers, now=float(number % 4000))
    assert taken > MUTANTS // 20, "most of what is changed must still be read"
    assert cache.held_bytes <= SETTINGS.cache.most_bytes


def follow(question: Question, reply: Reply, cache: Cache, answers: Answers, now: float) -> None:
    """Do with a reply what the forwarder and the server do with it."""
    if not reply.message:
        return
    check(question, reply.message)
    assert 0 <= reply.ttl <= SETTINGS.cache.most_ttl
    key = key_of(*question)
    cache.put(key, reply, now)
    entry = cache.fresh(key, now)
    gots = [Got(reply.message, reply.extended_error)]
    if entry is not None and entry.message is reply.message:
        gots += [entry.got(now), entry.got(now + 2), entry.stale(30)]
    for got in gots:
        check(question, got.message)
    send(question, gots[-1], answers)
    if reply.target is not None:
        rest = wire.reply(reply.target, question.type, answers=(wire.record(1, 5, bytes(4)),))
        send(question, Got(rest, None, (reply.message,)), answers)


def check(question: Question, message: bytes) -> None:
    """It is a reply to the question that others can read, with nothing said of the cluster."""
    read_again = dns.message.from_wire(message)
    assert read_again.question[0].name.to_wire() == question.name
    assert read_again.question[0].rdtype == question.type
    assert message[:2] == b"\0\0"
    assert not read_again.flags & dns.flags.AA
    for one in (*read_again.answer, *read_again.authority):
        assert not one.name.is_subdomain(dns.name.from_text("cluster.local."))


def send(question: Question, got: Got, answers: Answers) -> None:
    """Make replies to clients of it: to its own name, and behind a CNAME of ours."""
    for name in (NAME, own("away")):
        client = dns.message.make_query(name, RdataType.make(question.type))
        forward = answers.udp(client.to_wire())
        if not isinstance(forward, Forward):  # ANY at an ExternalName
            continue
        for udp in (True, False):
            reply = answers.finish(forward, got, udp=udp)
            assert len(reply) <= (512 if udp else 65535)
            assert reply[:2] == forward.query.id
            dns.message.from_wire(reply)

"""What others answered becomes the reply: header, spelling, CNAMEs before it, and its length."""

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from tests.unit.dns_zone_facts import addresses, alias, answering, own, read

from vipd.dns import names
from vipd.dns.answer import Answers, Forward
from vipd.dns.forward import wire as of
from vipd.dns.forward.got import Got

OUTSIDE = "www.example.com."


def forwarded(answers: Answers, asked: dns.message.Message) -> Forward:
    """Return what is to be asked of others."""
    found = answers.udp(asked.to_wire())
    assert isinstance(found, Forward)
    return found


def query(name: str = OUTSIDE, kind: str = "A", *, edns: bool = True) -> dns.message.Message:
    """Return a query for a name in capitals."""
    return dns.message.make_query(name.upper(), kind, use_edns=0 if edns else False, payload=1232)


def got(
    name: str = OUTSIDE,
    kind: str = "A",
    answer: tuple[str, ...] = (),
    authority: tuple[str, ...] = (),
    additional: tuple[str, ...] = (),
    rcode: dns.rcode.Rcode = dns.rcode.NOERROR,
    flags: int = 0,
) -> bytes:
    """Return a reply as forwarding gives it; records read ``name ttl IN type data``."""
    reply = dns.message.make_response(dns.message.make_query(name, kind, id=0), True)
    reply.flags |= flags
    reply.set_rcode(rcode)
    sections = (reply.answer, reply.authority, reply.additional)
    for section, lines in zip(sections, (answer, authority, additional), strict=True):
        for line in lines:
            owner, ttl, class_, kind, data = line.split(maxsplit=4)
            section.append(dns.rrset.from_text(owner, int(ttl), class_, kind, data))
    return reply.to_wire()


def finished(
    asked: dns.message.Message, message: bytes, *, why: int | None = None, udp: bool = True
) -> dns.message.Message:
    """Return the reply to a question that was forwarded."""
    answers = answering(alias("www.example.com"))
    raw = answers.finish(forwarded(answers, asked), Got(message, why), udp=udp)
    if udp:
        assert len(raw) <= (1232 if asked.edns == 0 else 512)
    reply = read(raw)
    assert reply.id == asked.id
    assert reply.question[0].name.to_wire() == asked.question[0].name.to_wire()
    assert (reply.edns == 0) is (asked.edns == 0)
    assert reply.flags & dns.flags.QR
    assert reply.flags & dns.flags.RA
    return reply


def test_the_reply_is_theirs_with_our_header() -> None:
    message = got(answer=(f"{OUTSIDE} 77 IN A 192.0.2.1",))
    for edns in (True, False):
        reply = finished(query(edns=edns), message)
        assert [str(one) for one in reply.answer] == ["WWW.EXAMPLE.COM. 77 IN A 192.0.2.1"]
        assert not reply.flags & dns.flags.AA, "it is not ours"
        assert reply.flags & dns.flags.RD
        assert reply.options == ()


SOA = "example.com. 60 IN SOA ns.example.com. admin.example.com. 1 2 3 4 60"


def test_denials_are_passed_on() -> None:
    message = got(rcode=dns.rcode.NXDOMAIN, authority=(SOA,))
    reply = finished(query(), message)
    assert reply.rcode() == dns.rcode.NXDOMAIN
    assert [one.to_text().lower() for one in reply.authority] == [SOA.lower()]


def test_why_nobody_answered_is_told_to_who_understands_it() -> None:
    message = got(rcode=dns.rcode.SERVFAIL)
    reply = finished(query(), message, why=22)
    assert reply.rcode() == dns.rcode.SERVFAIL
    assert [str(option) for option in reply.options] == ["EDE 22 (No Reachable Authority)"]
    assert finished(query(edns=False), message, why=22).rcode() == dns.rcode.SERVFAIL


@pytest.mark.parametrize("flag", ["AD", "DO", ""])
def test_authentic_data_is_told_to_who_asked(flag: str) -> None:
    asked = query()
    if flag == "AD":
        asked.flags |= dns.flags.AD
    elif flag == "DO":
        asked.want_dnssec()
    reply = finished(asked, got(flags=dns.flags.AD))
    assert bool(reply.flags & dns.flags.AD) is bool(flag)
    assert not finished(asked, got()).flags & dns.flags.AD


def test_checking_disabled_comes_back() -> None:
    asked = query()
    asked.flags |= dns.flags.CD
    assert finished(asked, got()).flags & dns.flags.CD


def test_long_answers_are_cut_between_records() -> None:
    records = tuple(f"{OUTSIDE} 5 IN A 192.0.2.{index}" for index in range(200))
    message = got(answer=records)
    for edns, number in ((True, 74), (False, 29)):
        reply = finished(query(edns=edns), message)
        assert reply.flags & dns.flags.TC
        assert addresses(reply) == [f"192.0.2.{index}" for index in range(number)]
    whole = finished(query(), message, udp=False)
    assert len(addresses(whole)) == 200
    assert not whole.flags & dns.flags.TC


def test_what_is_not_asked_for_is_left_out_first() -> None:
    text = "x" * 200
    answer = tuple(f'{OUTSIDE} 5 IN TXT "{index}{text}"' for index in range(2))
    nearby = tuple(f"example.com. 5 IN NS {index}{'n' * 60}.test." for index in range(3))
    message = got(
        kind="TXT", answer=answer, authority=nearby, additional=(f"{OUTSIDE} 5 IN A 1.2.3.4",)
    )
    reply = finished(query(kind="TXT", edns=False), message)
    assert len(addresses(reply)) == 2
    assert not reply.flags & dns.flags.TC
    assert not reply.authority
    assert not reply.additional
    whole = finished(query(kind="TXT"), message)
    assert len(whole.authority[0]) == 3
    assert len(whole.additional) == 1


def test_additional_records_are_left_out_before_authority() -> None:
    more = tuple(f'{OUTSIDE} 5 IN TXT "{index}{"x" * 200}"' for index in range(3))
    reply = finished(query(edns=False), got(authority=(SOA,), additional=more))
    assert [one.to_text().lower() for one in reply.authority] == [SOA.lower()]
    assert not reply.additional
    assert not reply.flags & dns.flags.TC


def test_a_denial_whose_proof_does_not_fit_is_truncated() -> None:
    proofs = tuple(f"{index}.example.com. 5 IN TXT {'x' * 200}" for index in range(4))
    reply = finished(query(edns=False), got(authority=(SOA, *proofs)))
    assert reply.flags & dns.flags.TC
    assert not reply.answer


def test_what_they_truncated_stays_so() -> None:
    assert finished(query(), got(flags=dns.flags.TC)).flags & dns.flags.TC
    assert not finished(query(), got(flags=dns.flags.TC), udp=False).flags & dns.flags.TC


def test_authority_beside_an_answer_behind_an_alias_is_left_out() -> None:
    message = got(answer=RECORDS, authority=("example.com. 5 IN NS ns.example.com.",))
    assert not finished(query(own("alias")), message).authority


RECORDS = (
    f"{OUTSIDE} 77 IN CNAME a.example.com.",
    "a.example.com. 78 IN A 192.0.2.1",
    "a.example.com. 78 IN A 192.0.2.2",
)


def test_an_alias_stands_before_what_it_leads_to() -> None:
    for udp in (True, False):
        reply = finished(query(own("alias")), got(answer=RECORDS), udp=udp)
        assert [one.to_text() for one in reply.answer] == [
            f"{own('alias').upper()} 5 IN CNAME {OUTSIDE}",
            RECORDS[0],
            "a.example.com. 78 IN A 192.0.2.1\na.example.com. 78 IN A 192.0.2.2",
        ]
        assert reply.flags & dns.flags.AA, "the alias is ours"


@pytest.mark.parametrize("rcode", [dns.rcode.NXDOMAIN, dns.rcode.NOERROR])
def test_an_alias_that_leads_to_nothing(rcode: dns.rcode.Rcode) -> None:
    """RFC 2308 and 6604: the alias, how its end ended, and the SOA of there."""
    reply = finished(query(own("alias")), got(rcode=rcode, authority=(SOA,)))
    assert reply.rcode() == rcode
    assert addresses(reply) == [OUTSIDE]
    assert [one.to_text().lower() for one in reply.authority] == [SOA.lower()]


def test_names_in_what_follows_an_alias_are_made_whole() -> None:
    """All that had pointers in their message has its names in ours."""
    lines = (
        f"{OUTSIDE} 5 IN MX 10 mail.example.com.",
        f"{OUTSIDE} 5 IN SRV 1 2 3 srv.example.com.",
        f"{OUTSIDE} 5 IN NAPTR 1 2 s a b naptr.example.com.",
    )
    for line in lines:
        kind = line.split()[3]
        reply = finished(query(own("alias"), kind), got(kind=kind, answer=(line,)))
        assert reply.answer[1].to_text() == dns.rrset.from_text(*_parts(line)).to_text()


def _parts(line: str) -> tuple[str, int, str, str, str]:
    owner, ttl, class_, kind, data = line.split(maxsplit=4)
    return owner, int(ttl), class_, kind, data


def test_long_answers_behind_an_alias_are_cut() -> None:
    records = tuple(f"{OUTSIDE} 5 IN A 192.0.2.{index}" for index in range(200))
    reply = finished(query(own("alias")), got(answer=records))
    assert reply.flags & dns.flags.TC
    assert addresses(reply)[0] == OUTSIDE
    assert 60 < len(addresses(reply)) < 75
    assert len(addresses(finished(query(own("alias")), got(answer=records), udp=False))) == 201


def test_how_long_a_reply_takes_does_not_depend_on_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """4,000 records behind an ExternalName, or behind a CNAME of others, are in one datagram's
    time: nobody reads them all, with dnspython or otherwise."""
    addresses_ = [of.record(1, 5, index.to_bytes(4)) for index in range(4000)]
    texts = [of.record(16, 5, bytes((index % 9,)) + b"x" * (index % 9)) for index in range(3500)]
    answers = answering(alias("www.example.com"))
    outside = names.wire("www.example.com")
    read_bytes = 0

    class Watched(bytes):
        def __getitem__(self, at):  # type: ignore[no-untyped-def]
            nonlocal read_bytes
            found = super().__getitem__(at)
            read_bytes += len(found) if isinstance(at, slice) else 1
            return found

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("dnspython reads in the event loop")

    for kind, records in ((1, addresses_), (16, texts)):
        message = Watched(of.reply(outside, kind, answers=tuple(records)))
        assert len(message) > 59_000
        chain = of.reply(names.wire("a.corp"), kind, answers=(of.record(of.CNAME, 5, outside),))
        for name, before in ((own("alias"), ()), ("a.corp.", (chain,))):
            asked = query(name, "A" if kind == 1 else "TXT").to_wire()
            forward = answers.udp(asked)
            assert isinstance(forward, Forward)
            read_bytes = 0
            with monkeypatch.context() as patch:
                patch.setattr("dns.message.from_wire", refused)
                patch.setattr("dns.message._WireReader", refused)
                reply = answers.finish(forward, Got(message, None, before), udp=True)
            assert 1000 < len(reply) <= 1232
            assert read(reply).flags & dns.flags.TC
            assert int.from_bytes(reply[6:8]) > 50
            assert read_bytes < 5000
            whole = answers.finish(forward, Got(message, None, before), udp=False)
            assert len(read(whole).answer[1]) == len({*records})


PROOF = "SOA 8 2 60 20300101000000 20200101000000 1 example.com. AAAA"


@pytest.mark.parametrize("owner", [own("alias"), "a.corp."])
@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("MX", ["@ 5 IN MX 1 m.www.example.com.", "@ 5 IN MX 2 n.m.www.example.com."]),
        ("NS", ["@ 5 IN NS ns.example.com.", "@ 5 IN NS ns2.ns.example.com."]),
        ("PTR", ["@ 5 IN PTR com."]),
        ("SOA", ["@ 5 IN SOA ns.a.example.com. admin.ns.a.example.com. 1 2 3 4 5"]),
        ("SRV", ["@ 5 IN SRV 1 2 3 srv.example.com."]),
        ("TXT", ["@ 5 IN TXT a", "@ 5 IN TXT bb"]),
        ("A", ["@ 5 IN CNAME b.example.net.", "b.example.net. 5 IN CNAME c.b.example.net."]),
        ("A", ["@ 5 IN CNAME b.net.", "b.net. 5 IN A 1.2.3.4", "b.net. 5 IN A 1.2.3.5"]),
        ("AAAA", ["@ 5 IN AAAA 2001:db8::1", "@ 5 IN AAAA 2001:db8::2"]),
    ],
)
def test_names_mean_the_same_behind_an_alias(owner: str, kind: str, lines: list[str]) -> None:
    """Names in data are compressed against all before them, and stay what they were."""
    records = tuple(line.replace("@", OUTSIDE) for line in lines)
    answers = answering(alias("www.example.com"))
    before: tuple[bytes, ...] = ()
    if owner != own("alias"):
        before = (got(owner, kind, (f"{owner} 5 IN CNAME {OUTSIDE}",)),)
    message = got(OUTSIDE, kind, records, (SOA, f"{SOA.split()[0]} 60 IN RRSIG {PROOF}"))
    forward = forwarded(answers, query(owner, kind))
    reply = read(answers.finish(forward, Got(message, None, before), udp=True))
    first, *others = (one.to_text() for section in reply.sections[1:] for one in section)
    assert first.lower() == f"{owner} 5 IN CNAME {OUTSIDE}".lower()
    them = read(message)
    assert others == [one.to_text() for one in (*them.answer, *them.authority)]
    assert bool(reply.flags & dns.flags.AA) is (owner == own("alias"))


def test_names_that_are_too_far_to_point_to_are_written_out() -> None:
    """What was just near enough in their message is not in ours (RFC 1035 4.1.4: 14 bits)."""
    lines = [
        f"{OUTSIDE} 5 IN MX 9 {before}{number:03}{'x' * 50}.www.example.com."
        for before, numbers in (("", range(300)), ("z.", range(200, 260)))
        for number in numbers
    ]
    message = got(OUTSIDE, "MX", tuple(lines))
    assert message.index(b"\x35200xxx") < 0x3F00 < 0x4000 < message.index(b"\x35259xxx")
    reply = finished(query(own("alias"), "MX"), message, udp=False)
    assert {*map(str, reply.answer[1])} == {*map(str, read(message).answer[0])}


def test_a_name_that_is_none_is_a_failure_and_takes_no_time() -> None:
    """Pointers in circles, to what comes, and names that never end."""
    forward = forwarded(answers := answering(alias("www.example.com")), query(own("alias")))
    whole = of.reply(forward.name, 1)
    begin = len(whole)
    for owner in (
        (0xC000 | begin).to_bytes(2),
        (0xC000 | begin + 2).to_bytes(2),
        b"\x3f" + b"x" * 63 + (0xC000 | begin).to_bytes(2),
        b"\x01x" * 200 + b"\0",
        b"\x41" + b"x" * 65 + b"\0",
        b"\xc0",
        b"",
    ):
        message = of.reply(
            forward.name, 1, answers=(of.record(1, 5, bytes(4), owner),) if owner else (owner,)
        )
        assert read(answers.finish(forward, Got(message), udp=True)).rcode() == dns.rcode.SERVFAIL


def test_a_joined_reply_ends_as_the_last_part_does() -> None:
    target = names.wire("b.example")
    first = of.reply(
        names.wire("a.example"), 1, answers=(of.record(of.CNAME, 9, target),), flags=of.AD
    )
    last = of.reply(target, 1, of.NXDOMAIN)
    answers, asked = answering(alias("www.example.com")), query("a.example.")
    asked.flags |= dns.flags.AD
    forward = forwarded(answers, asked)
    reply = read(answers.finish(forward, Got(last, None, (first,)), udp=True))
    assert reply.rcode() == dns.rcode.NXDOMAIN
    assert addresses(reply) == ["b.example."]
    assert not reply.flags & dns.flags.AD
    signed = bytearray(last)
    signed[3] |= of.AD
    assert read(answers.finish(forward, Got(bytes(signed), None, (first,)), udp=True)).flags & of.AD
    # Parts that are not about the same names make no reply.
    other = of.reply(names.wire("c.example"), 1)
    assert read(answers.finish(forward, Got(other, None, (first,)), udp=True)).rcode() == 2


@pytest.mark.parametrize("name", [OUTSIDE, own("alias")])
@pytest.mark.parametrize(
    "message",
    [
        b"",
        got()[:11],
        got()[:20],
        got("other.example.com."),
        got(kind="AAAA"),
        b"garbage" * 100,
    ],
    ids=["nothing", "half a header", "half a question", "another name", "another type", "garbage"],
)
def test_what_is_no_reply_to_the_question_is_a_failure(name: str, message: bytes) -> None:
    reply = finished(query(name), message)
    assert reply.rcode() == dns.rcode.SERVFAIL
    assert not reply.answer


def test_records_that_are_broken_are_a_failure() -> None:
    records = tuple(f"{OUTSIDE} 5 IN A 192.0.2.{index}" for index in range(100))
    message = bytearray(got(answer=records))
    length = message.index(bytes((0, 4, 192, 0, 2, 3)))
    message[length] = 0xFF
    for name in (OUTSIDE, own("alias")):
        assert finished(query(name, edns=False), bytes(message)).rcode() == dns.rcode.SERVFAIL

"""What others answered becomes the reply: header, spelling, CNAMEs before it, and its length."""

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from tests.unit.dns_zone_facts import addresses, alias, answering, own, read

from vipd.dns.answer import Answers, Forward
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

"""Headers, OPT records and what depends on them; the second question of a kind as the first."""

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rdataclass
import pytest
from tests.unit.dns_zone_facts import addresses, alias, answering, own, peers, read, web

from vipd.dns.answer import Answers, AnswerSettings, Forward
from vipd.dns.names import wire

ID = b"\xab\xcd"
NAME = wire(own("web"))
QUESTION = NAME + b"\0\x01\0\x01"
OPT = b"\0\0\x29\x10\0\0\0\0\0\0\0"


def ask(
    flags: int = 0x0100, question: bytes = QUESTION, opt: bytes = b"", ident: bytes = ID
) -> bytes:
    """Return a query."""
    counts = b"\0\x01\0\0\0\0" + (b"\0\x01" if opt else b"\0\0")
    return ident + flags.to_bytes(2) + counts + question + opt


def every_way(answers: Answers, query: bytes) -> bytes:
    """Return the reply that comes at the first time, the next and over TCP, addresses rotated."""
    found = [way(query) for way in (answers.udp, answers.udp, answers.tcp, answers.tcp)]
    replies = [each for each in found if isinstance(each, bytes)]
    assert len(replies) == 4
    assert len({(each[:12], bytes(sorted(each))) for each in replies}) == 1
    return replies[0]


@pytest.mark.parametrize("ident", [b"\0\0", b"\xff\xff", b"\x12\x34"])
def test_the_id_is_the_questions(ident: bytes) -> None:
    answers = answering(web())
    assert every_way(answers, ask(ident=ident))[:2] == ident


@pytest.mark.parametrize("opt", [b"", OPT])
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (0x0000, 0x8480),
        (0x0100, 0x8580),  # RD comes back
        (0x0110, 0x8590),  # CD too
        (0x0120, 0x8580),  # AD asks for it: there is none
        (0x0140, 0x8580),  # Z is cleared
        (0x0780, 0x8580),  # AA, TC and RA of a query mean nothing
        (0x010F, 0x8580),  # nor does an rcode
    ],
)
def test_flags(asked: int, told: int, opt: bytes) -> None:
    answers = answering(web())
    assert every_way(answers, ask(asked, opt=opt))[2:4] == told.to_bytes(2)
    assert every_way(answers, ask(asked, question=wire(own("no")) + b"\0\x01\0\x01", opt=opt))[
        2:4
    ] == (told | 3).to_bytes(2)


def test_recursion_is_available_only_where_others_are_asked() -> None:
    answers = answering(web(), settings=AnswerSettings(forwards=False))
    assert every_way(answers, ask())[2:4] == b"\x85\x00"
    refused = every_way(answers, ask(question=wire("example.com") + b"\0\x01\0\x01"))
    assert refused[2:4] == b"\x81\x05"


@pytest.mark.parametrize("opt", [b"", OPT])
@pytest.mark.parametrize("name", ["web", "no"])
def test_the_name_is_spelled_as_it_was_asked(name: str, opt: bytes) -> None:
    answers = answering(web())
    lower = wire(own(name))
    for spelled in (lower.upper(), lower.title(), lower):
        question = spelled + b"\0\x01\0\x01"
        reply = every_way(answers, ask(question=question, opt=opt))
        assert reply[12 : 12 + len(question)] == question


def test_type_65_and_type_97_have_one_key_and_no_record() -> None:
    answers = answering(web())
    for kind in (65, 97, 0x4141):
        question = NAME + kind.to_bytes(2) + b"\0\x01"
        reply = every_way(answers, ask(question=question))
        assert reply[12 : 12 + len(question)] == question
        assert reply[6:12] == b"\0\0\0\x01\0\0"


def test_opt_is_given_to_those_who_have_one() -> None:
    answers = answering(web())
    assert not read(every_way(answers, ask())).opt
    reply = every_way(answers, ask(opt=OPT))
    assert reply.endswith(b"\0\0\x29\x04\xd0\0\0\0\0\0\0")
    assert read(reply).payload == 1232


def test_the_dnssec_bit_comes_back_and_the_others_do_not() -> None:
    answers = answering(web())
    opt = b"\0\0\x29\x10\0\0\0\xff\xff\0\0"
    for name in ("web", "no"):
        reply = every_way(answers, ask(question=wire(own(name)) + b"\0\x01\0\x01", opt=opt))
        assert reply.endswith(b"\0\0\x29\x04\xd0\0\0\x80\0\0\0")


@pytest.mark.parametrize("version", [1, 255])
def test_other_versions_of_edns(version: int) -> None:
    opt = b"\0\0\x29\x10\0\0" + bytes((version,)) + b"\0\0\0\0"
    answers = answering(web())
    every_way(answers, ask(opt=OPT))
    reply = every_way(answers, ask(opt=opt))
    assert reply == ID + b"\x81\x80\0\x01\0\0\0\0\0\x01" + QUESTION + (
        b"\0\0\x29\x04\xd0\x01\0\0\0\0\0"
    )
    assert read(reply).rcode() == dns.rcode.BADVERS


def test_unknown_options_are_ignored() -> None:
    opt = b"\0\0\x29\x10\0\0\0\0\0\0\x10" + b"\0\x0a\0\x08cookie12" + b"\xfd\xe9\0\0"
    reply = every_way(answering(web()), ask(opt=opt))
    assert reply.endswith(b"\0\0\x29\x04\xd0\0\0\0\0\0\0")
    assert addresses(read(reply)) == ["10.96.0.1"]


def test_the_server_tells_its_name_to_those_who_ask() -> None:
    settings = AnswerSettings(identity="node-a")
    answers = answering(web(), settings=settings)
    asked = b"\0\0\x29\x10\0\0\0\0\0\0\x04\0\x03\0\0"
    assert every_way(answers, ask(opt=asked)).endswith(b"\0\x0a\0\x03\0\x06node-a")
    assert b"node-a" not in every_way(answers, ask(opt=OPT))
    assert every_way(answering(web()), ask(opt=asked)).endswith(b"\0\0\0\0\0\0")


def test_how_long_connections_may_be_idle_is_told_over_tcp_alone() -> None:
    answers = answering(web(), settings=AnswerSettings(tcp_idle_seconds=12.5))
    asked = ask(opt=b"\0\0\x29\x10\0\0\0\0\0\0\x04\0\x0b\0\0")
    tcp, udp = answers.tcp(asked), answers.udp(asked)
    assert isinstance(tcp, bytes)
    assert isinstance(udp, bytes)
    assert tcp.endswith(b"\0\x06\0\x0b\0\x02\0\x7d")
    assert udp.endswith(b"\0\0\0\0\0\0")
    longest = answering(settings=AnswerSettings(tcp_idle_seconds=86400)).tcp(asked)
    assert isinstance(longest, bytes)
    assert longest.endswith(b"\0\x02\xff\xff")


@pytest.mark.parametrize("class_", [0, 2, 3, 4, 254, 255, 0xFFFF])
def test_other_classes_are_refused(class_: int) -> None:
    question = NAME + b"\0\x01" + class_.to_bytes(2)
    reply = every_way(answering(web()), ask(question=question))
    assert reply == ID + b"\x81\x85\0\x01\0\0\0\0\0\0" + question


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("version.bind", 16, "vipd 1"),
        ("VERSION.Server", 255, "vipd 1"),
        ("id.server", 16, "node-a"),
        ("hostname.bind", 16, "node-a"),
    ],
)
def test_what_the_server_says_of_itself(name: str, kind: int, text: str) -> None:
    settings = AnswerSettings(identity="node-a", version="vipd 1")
    question = wire(name) + kind.to_bytes(2) + b"\0\x03"
    reply = read(every_way(answering(settings=settings), ask(question=question)))
    assert reply.rcode() == dns.rcode.NOERROR
    (found,) = reply.answer
    assert (found.rdclass, found.ttl, str(found[0])) == (dns.rdataclass.CH, 0, f'"{text}"')


def test_what_the_server_does_not_say_of_itself() -> None:
    silent = answering()
    told = answering(settings=AnswerSettings(identity="node-a", version="vipd 1"))
    for answers, name in ((silent, "version.bind"), (silent, "id.server"), (told, "authors.bind")):
        question = wire(name) + b"\0\x10\0\x03"
        assert read(every_way(answers, ask(question=question))).rcode() == dns.rcode.REFUSED
    reply = read(every_way(told, ask(question=wire("id.server") + b"\0\x01\0\x03")))
    assert (reply.rcode(), reply.answer) == (dns.rcode.NOERROR, [])


def test_names_of_others_are_forwarded_with_the_question() -> None:
    answers = answering(web())
    for _ in range(2):
        found = answers.udp(ask(question=wire("www.example.com") + b"\0\x10\0\x01", opt=OPT))
        assert isinstance(found, Forward)
        assert (found.name, found.type, found.before) == (wire("www.example.com"), 16, ())
        assert found.query.id == ID
        assert found.query.edns is not None


def test_without_recursion_desired_nobody_else_is_asked() -> None:
    answers = answering(alias("example.com"))
    refused = read(every_way(answers, ask(0, wire("www.example.com") + b"\0\x01\0\x01", OPT)))
    assert refused.rcode() == dns.rcode.REFUSED
    (why,) = refused.options
    assert isinstance(why, dns.edns.EDEOption)
    assert why.code == dns.edns.EDECode.NOT_AUTHORITATIVE
    half = read(every_way(answers, ask(0, wire(own("alias")) + b"\0\x01\0\x01")))
    assert addresses(half) == ["example.com."]


def test_who_may_not_ask_is_told_so() -> None:
    answers = answering(web())
    reply = answers.refuse(ask(opt=OPT))
    assert reply is not None
    assert len(reply) < len(ask(opt=OPT)) + 7
    parsed = read(reply)
    assert (parsed.rcode(), parsed.answer) == (dns.rcode.REFUSED, [])
    assert not parsed.flags & dns.flags.AA
    (why,) = parsed.options
    assert isinstance(why, dns.edns.EDEOption)
    assert why.code == dns.edns.EDECode.PROHIBITED
    assert answers.refuse(ask())[2:4] == b"\x81\x85"  # type: ignore[index]
    strange = answering(web(), settings=AnswerSettings(identity="node-7"))
    asked = dns.message.make_query("a.example", "A", options=[dns.edns.NSIDOption(b"")])
    assert b"node-7" not in (strange.refuse(asked.to_wire()) or b"node-7")
    assert answers.refuse(b"") is None
    assert answers.refuse(ask(0x8000)) is None
    assert answers.refuse(ask()[:20]) == ID + b"\x81\x01" + bytes(8)


def test_more_than_can_be_forwarded() -> None:
    answers = answering()
    found = answers.udp(ask(question=wire("www.example.com") + b"\0\x01\0\x01", opt=OPT))
    assert isinstance(found, Forward)
    reply = read(answers.fail(found, 23))
    assert reply.rcode() == dns.rcode.SERVFAIL
    (why,) = reply.options
    assert isinstance(why, dns.edns.EDEOption)
    assert why.code == dns.edns.EDECode.NETWORK_ERROR


@pytest.mark.parametrize("name", ["web", "no", "peers"])
def test_what_stands_behind_the_question_is_read_each_time(name: str) -> None:
    """A reply that is ready is given only to a query that is known to be well-formed."""
    answers = answering(web(), peers(3))
    question = wire(own(name)) + b"\0\x01\0\x01"
    for opt in (b"", OPT):
        every_way(answers, ask(question=question, opt=opt))
    good = ask(question=question, opt=OPT)
    for bad in (
        good[:-1],  # cut
        good[:10] + b"\0\x02" + good[12:],  # one record promised more
        good[:10] + b"\0\x02" + good[12:] + OPT,  # two OPT
        good[:6] + b"\0\x01\0\0\0\0" + good[12:],  # OPT as an answer
        good[:4] + b"\0\x02" + good[6:],  # two questions
    ):
        assert every_way(answers, bad)[2:4] == b"\x81\x01"
        assert every_way(answers, good)[2:4] in (b"\x85\x80", b"\x85\x83")
    assert answers.udp(ask(0x8100, question)) is None
    assert every_way(answers, ask(0x2900, question)) == ID + b"\xa9\x04" + bytes(8)


def test_a_nul_in_a_label_does_not_end_the_name() -> None:
    answers = answering(web())
    question = b"\x03a\0b" + NAME + b"\0\x01\0\x01"
    for opt in (b"", OPT, b""):
        reply = every_way(answers, ask(question=question, opt=opt))
        assert reply[12 : 12 + len(question)] == question
        assert reply[2:4] == b"\x85\x83"


def test_a_dot_in_a_label_separates_nothing() -> None:
    answers = answering(web())
    odd = b"\x0bweb.default\x03svc\x07cluster\x05local\0"
    assert every_way(answers, ask(question=odd + b"\0\x01\0\x01"))[2:4] == b"\x85\x83"


def test_as_many_manners_of_asking_as_there_are_do_not_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = answering(web())
    for size in range(3000):
        opt = b"\0\0\x29" + size.to_bytes(2) + bytes(6)
        reply = answers.udp(ask(opt=opt))
        assert reply == answers.udp(ask(opt=opt))
    assert len(answers._manners[True]) <= 1024
    assert not answers._manners[False]
    # Somebody who asks in every manner does not keep others from the short way.
    reply = answers.udp(ask())
    with monkeypatch.context() as patched:
        patched.setattr(answers, "_slowly", None)
        assert answers.udp(ask()) == reply

"""How long replies may be, what is left out of them, and in which order addresses stand."""

from collections import Counter
from ipaddress import ip_address
from itertools import pairwise

import dns.flags
import dns.message
import dns.rdatatype
import pytest
from tests.unit.dns_zone_facts import addresses, alias, answering, own, peers, read, web

from vipd.dns.answer import Answers, AnswerSettings
from vipd.dns.facts import EndpointFacts, Kind, ServiceFacts
from vipd.dns.names import wire

SRV_NAME = f"_raft._tcp.{own('peers')}"


def query(name: str, kind: str = "A", size: int | None = None) -> bytes:
    """Return a query, with EDNS if a size is given."""
    if size is None:
        return dns.message.make_query(name, kind).to_wire()
    return dns.message.make_query(name, kind, use_edns=0, payload=size).to_wire()


def udp(answers: Answers, asked: bytes) -> dns.message.Message:
    """Return the reply over UDP."""
    return read(answers.udp(asked))


@pytest.mark.parametrize(
    ("size", "limit"), [(None, 512), (0, 512), (511, 512), (513, 513), (1232, 1232), (4096, 1232)]
)
@pytest.mark.parametrize(("name", "kind"), [(own("peers"), "A"), (SRV_NAME, "SRV")])
def test_datagrams_are_as_long_as_the_client_and_the_server_take(
    name: str, kind: str, size: int | None, limit: int
) -> None:
    answers = answering(peers(2000))
    for _ in range(50):
        found = answers.udp(query(name, kind, size))
        assert isinstance(found, bytes)
        assert limit - 80 < len(found) <= limit, "and no shorter than they have to be"
        reply = read(found)
        assert reply.flags & dns.flags.TC
        assert reply.answer
        assert not reply.authority
        assert not reply.additional


def test_the_servers_own_limit_can_be_another() -> None:
    answers = answering(peers(2000), settings=AnswerSettings(udp_size=4096))
    found = answers.udp(query(own("peers"), size=4096))
    assert isinstance(found, bytes)
    assert 4080 < len(found) <= 4096
    assert read(found).payload == 4096


@pytest.mark.parametrize("size", [None, 600, 1232])
@pytest.mark.parametrize("kind", ["A", "SRV"])
def test_nothing_is_cut_that_fits_and_everything_is_that_does_not(
    kind: str, size: int | None
) -> None:
    """For each number of endpoints: TC exactly where the whole answer is longer than the limit."""
    limit = size or 512
    name = own("peers") if kind == "A" else SRV_NAME
    seen = set()
    for number in range(1, 90):
        answers = answering(peers(number))
        whole = answers.tcp(query(name, kind, size))
        assert isinstance(whole, bytes)
        for _ in range(3):
            found = answers.udp(query(name, kind, size))
            assert isinstance(found, bytes)
            assert len(found) <= limit
            reply, complete = read(found), read(whole)
            cut = bool(reply.flags & dns.flags.TC)
            assert cut is (len(addresses(reply)) < number)
            required = len(whole) - sum(16 + 14 + len(str(o.name)) for o in complete.additional)
            if len(whole) <= limit:
                assert not cut
                assert len(found) == len(whole)
            elif cut:
                assert not reply.additional
            else:
                assert required <= limit
                assert not reply.additional, "all of them or none"
            seen.add((cut, bool(reply.additional)))
    assert seen == ({(False, False), (True, False)} | ({(False, True)} if kind == "SRV" else set()))


def test_ten_thousand_addresses_over_tcp_are_a_part_that_changes() -> None:
    answers = answering(peers(10_000))
    firsts = set()
    for _ in range(20):
        found = answers.tcp(query(own("peers")))
        assert isinstance(found, bytes)
        assert 65_500 < len(found) <= 65_535
        reply = read(found)
        assert not reply.flags & dns.flags.TC, "there is nothing else to try"
        firsts.add(addresses(reply)[0])
    assert len(firsts) == 20


def test_two_thousand_service_records_over_tcp() -> None:
    answers = answering(peers(2000))
    found = answers.tcp(query(SRV_NAME, "SRV"))
    assert isinstance(found, bytes)
    assert 65_400 < len(found) <= 65_535
    assert not read(found).flags & dns.flags.TC


@pytest.mark.parametrize("number", [2, 3, 8, 27, 40])
def test_every_address_is_the_first_as_often_as_the_others(number: int) -> None:
    answers = answering(peers(number))
    asked = query(own("peers"), size=1232)
    every = {str(ip_address(0x0AF40000 + index)) for index in range(number)}
    firsts: Counter[str] = Counter()
    for _ in range(3 * number):
        found = addresses(udp(answers, asked))
        assert set(found) == every
        firsts[found[0]] += 1
    assert firsts == dict.fromkeys(every, 3)


def test_pairs_of_questions_do_not_upset_the_rotation() -> None:
    """A resolver asks for A and AAAA at once: two addresses must not come in one order always."""
    both = ServiceFacts(
        "default",
        "peers",
        Kind.HEADLESS,
        endpoints=(
            EndpointFacts((), (bytes((10, 244, 0, 1)), bytes((10, 244, 0, 2)))),
            EndpointFacts((), (bytes(15) + b"\1", bytes(15) + b"\2")),
        ),
    )
    answers = answering(both)
    firsts: Counter[str] = Counter()
    for _ in range(10):
        for kind in ("A", "AAAA"):
            firsts[addresses(udp(answers, query(own("peers"), kind)))[0]] += 1
    assert set(firsts.values()) == {5}
    assert len(firsts) == 4


def test_truncated_replies_hold_every_address_in_turn() -> None:
    """Some resolvers use what is in a truncated reply."""
    answers = answering(peers(100))
    firsts: Counter[str] = Counter()
    for _ in range(100):
        reply = udp(answers, query(own("peers")))
        assert reply.flags & dns.flags.TC
        firsts[addresses(reply)[0]] += 1
    assert len(firsts) == 100


def test_truncated_service_records_differ_too() -> None:
    answers = answering(peers(100))
    firsts = {addresses(udp(answers, query(SRV_NAME, "SRV")))[0] for _ in range(100)}
    assert len(firsts) == 100


def test_addresses_behind_an_alias_are_rotated_and_cut_like_others() -> None:
    answers = answering(alias(own("peers")), peers(100))
    firsts = set()
    for _ in range(100):
        found = answers.udp(query(own("alias")))
        assert isinstance(found, bytes)
        assert 490 < len(found) <= 512
        reply = read(found)
        assert reply.flags & dns.flags.TC
        assert addresses(reply)[0] == own("peers")
        firsts.add(addresses(reply)[1])
    assert len(firsts) == 100
    whole = read(answers.tcp(query(own("alias"))))
    assert len(addresses(whole)) == 101


def test_a_chain_that_does_not_fit() -> None:
    """Nine aliases with long names: no small message takes them."""
    names = [f"{index}-{'x' * 60}" for index in range(9)]
    chain = [alias(own(after), name) for name, after in pairwise(names)]
    answers = answering(*chain, alias(own("web"), names[-1]), web())
    reply = udp(answers, query(own(names[0])))
    assert reply.flags & dns.flags.TC
    assert not reply.answer
    whole = read(answers.tcp(query(own(names[0]))))
    assert addresses(whole)[-1] == "10.96.0.1"
    missing = answering(*chain)
    assert udp(missing, query(own(names[0]))).flags & dns.flags.TC
    reply = read(missing.tcp(query(own(names[0]))))
    assert reply.rcode() == 3
    assert len(reply.authority) == 1


def test_eleven_aliases_are_too_many() -> None:
    def chain(length: int) -> Answers:
        links = [alias(own(f"a{index + 1}"), f"a{index}") for index in range(length)]
        return answering(*links, web(name=f"a{length}"))

    assert addresses(udp(chain(10), query(own("a0"), size=1232)))[-1] == "10.96.0.1"
    assert udp(chain(11), query(own("a0"))).rcode() == 2


def test_the_longest_name_there_is() -> None:
    """A negative answer to it fits, whatever OPT record comes with it."""
    labels = b"".join([b"\x3f" + b"x" * 63] * 3) + b"\x1b" + b"x" * 27
    name = labels + wire("default.svc.cluster.local")
    assert len(name) == 247
    asked = (
        b"\0\1\1\0\0\1\0\0\0\0\0\1" + name + b"\0\x01\0\x01\0\0\x29\x02\0\0\0\0\0\0\x04\0\x03\0\0"
    )
    answers = answering(settings=AnswerSettings(identity="n" * 255))
    for _ in range(2):
        found = answers.udp(asked)
        assert isinstance(found, bytes)
        assert len(found) <= 512


@pytest.mark.parametrize(
    ("number", "name", "kind"), [(25, own("peers"), "A"), (4, SRV_NAME, "SRV")]
)
def test_options_that_leave_no_room_for_the_answer(number: int, name: str, kind: str) -> None:
    """A reply with a long NSID may be too long for 512 bytes: then it is cut, not too long."""
    answers = answering(peers(number), settings=AnswerSettings(identity="n" * 250))
    for _ in range(2):
        assert not read(answers.udp(query(name, kind))).flags & dns.flags.TC
    asked = query(name, kind)
    asked = asked[:10] + b"\0\x01" + asked[12:] + b"\0\0\x29\x02\0\0\0\0\0\0\x04\0\x03\0\0"
    for _ in range(2):
        found = answers.udp(asked)
        assert isinstance(found, bytes)
        assert len(found) <= 512
        assert read(found).flags & dns.flags.TC


def test_names_are_compressed() -> None:
    answers = answering(web(), peers(3))
    for name, kind, length in (
        (own("web"), "A", 16),
        (own("peers"), "A", 3 * 16),
        (own("web"), "AAAA", 2 + 10 + 9 + 13 + 20),
    ):
        asked = query(name, kind)
        found = answers.udp(asked)
        assert isinstance(found, bytes)
        assert len(found) == len(asked) + length


def test_targets_of_service_records_are_not() -> None:
    """RFC 2782: resolvers need not understand it there."""
    found = answering(peers(1)).udp(query(SRV_NAME, "SRV"))
    assert isinstance(found, bytes)
    assert wire(f"10-244-0-0.{own('peers')}") in found
    reply = read(found)
    assert [one.rdtype for one in reply.additional] == [dns.rdatatype.A]

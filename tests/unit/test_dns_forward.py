"""The forwarder with real sockets: good upstreams, and bad ones."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import dns.edns
import dns.flags
import pytest
from tests.unit import dns_forward_servers as servers
from tests.unit.dns_forward_servers import (
    Asked,
    Clock,
    Make,
    addresses,
    counted,
    forwarders,
    nobody,
    rcode,
    read,
    reply,
    says,
    serving,
    texts,
    truncated,
    wire,
)
from tests.waiting import until

from vipd.dns.forward import fetch, reading
from vipd.dns.forward.forwarder import Forwarder
from vipd.dns.forward.got import Got

NAME = "www.example.com."
A, AAAA, TXT = 1, 28, 16
SOON = 0.03
PATIENT = dict.fromkeys(
    ("first_timeout_seconds", "least_timeout_seconds", "most_timeout_seconds"), 10
)
"""No time-out has a part in it."""
SOA = "ns.example.com. admin.example.com. 1 3600 600 86400 60"


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    async with forwarders() as made:
        yield made


async def ask(forwarder: Forwarder, name: str = NAME, qtype: int = A, **more: Any) -> Got:
    return await servers.ask(forwarder, name, qtype, **more)


# A good upstream


async def test_a_reply_is_written_anew_with_what_was_asked_for(make: Make) -> None:
    script = says(
        "@ 300 A 192.0.2.1",
        "@ 300 A 192.0.2.2",
        "other.example. 300 A 192.0.2.66",
        authority=("example.com. 300 NS ns.example.com.",),
        flags=dns.flags.RA | dns.flags.AA | dns.flags.AD,
    )
    async with serving(script) as (server,):
        got = await ask(await make(server.text))
    message = read(got.message)
    assert got.message[:2] == b"\0\0"
    assert message.flags == dns.flags.QR | dns.flags.RD | dns.flags.RA
    assert message.question[0].name.to_text() == NAME
    assert sorted(texts(got.message)) == [f"{NAME} 300 A 192.0.2.{n}" for n in (1, 2)]
    assert message.authority == message.additional == []
    assert message.edns == -1
    assert got.extended_error is None


async def test_what_is_sent(make: Make) -> None:
    async with serving(says("@ 300 A 192.0.2.1")) as (server,):
        forwarder = await make(server.text)
        await ask(forwarder)
        await ask(forwarder, dnssec=True)
        await ask(forwarder, checking_disabled=True)
        plain, signed, unchecked = (one.message for one in server.asked)
    assert plain.flags == dns.flags.RD
    assert (plain.edns, plain.payload, plain.ednsflags) == (0, 1232, 0)
    assert signed.ednsflags == dns.flags.DO
    assert unchecked.flags == dns.flags.RD | dns.flags.CD
    assert len({one.id for one in (plain, signed, unchecked)}) > 1


async def test_each_query_has_an_id_a_port_and_a_spelling_of_its_own(make: Make) -> None:
    seen: set[tuple[int, str]] = set()
    async with serving(says("@ 300 A 192.0.2.1")) as (server,):
        forwarder = await make(server.text)
        for number in range(20):
            await ask(forwarder, f"a-long-name-{number}.with.many.letters.example.com")
        seen = {(one.message.id, one.name[-26:]) for one in server.asked}
        spellings = {one.name[-26:] for one in server.asked}
    assert len(seen) == 20
    assert len({number for number, _ in seen}) > 15
    assert len(spellings) > 15


async def test_a_reply_is_cached_by_name_type_and_bits(make: Make) -> None:
    async with serving(says("@ 300 A 192.0.2.1")) as (server,):
        forwarder = await make(server.text)
        for _ in range(3):
            await ask(forwarder)
        assert len(server.asked) == 1
        await ask(forwarder, "WWW.example.com".lower())
        await ask(forwarder, qtype=AAAA)
        await ask(forwarder, dnssec=True)
        await ask(forwarder, checking_disabled=True)
        assert len(server.asked) == 4
        assert forwarder.cached(wire(NAME), A) is not None
        assert forwarder.cached(wire("other.example"), A) is None
        assert counted(forwarder, "coredns_cache_hits_total", type="success") == 4
        assert counted(forwarder, "coredns_cache_misses_total") == 4
        assert counted(forwarder, "coredns_cache_entries", type="success") == 3
        assert counted(forwarder, "coredns_cache_entries", type="denial") == 0


async def test_ttls_run_down_and_the_entry_ends_with_the_first(make: Make) -> None:
    clock = Clock(still=True)
    script = says("@ 50 CNAME w.example.net.", "w.example.net. 20 A 192.0.2.1")
    async with serving(script) as (server,):
        forwarder = await make(server.text, own={"clock": clock})
        await ask(forwarder)
        clock.shift += 15
        got = forwarder.cached(wire(NAME), A)
        assert got is not None
        cname, address = (int(line.split()[1]) for line in texts(got.message))
        assert (cname, address) == (35, 5)
        clock.shift += 5
        assert forwarder.cached(wire(NAME), A) is None
        await ask(forwarder)
        assert len(server.asked) == 2


async def test_cached_addresses_come_in_turn(make: Make) -> None:
    async with serving(says(*(f"@ 300 A 192.0.2.{n}" for n in range(3)))) as (server,):
        forwarder = await make(server.text, own={"clock": Clock(still=True)})
        await ask(forwarder)
        first = [texts((await ask(forwarder)).message)[0] for _ in range(6)]
    assert sorted(first) == sorted(2 * [f"{NAME} 300 A 192.0.2.{n}" for n in range(3)])


async def test_equal_questions_under_way_are_one(make: Make) -> None:
    held: list[Asked] = []
    async with serving(lambda asked: held.append(asked)) as (server,):
        forwarder = await make(server.text, first_timeout_seconds=0.2)
        waiting = [asyncio.create_task(ask(forwarder)) for _ in range(50)]
        await server.was_asked()
        server.script = says("@ 300 A 192.0.2.1")
        found = await asyncio.gather(*waiting)
        assert len({one.message for one in found}) == 1
        # What was held is answered by the second attempt at the latest.
        assert len(server.asked) <= 2
        assert counted(forwarder, "vipd_dns_forward_coalesced_total") == 49


async def test_one_who_waits_and_goes_away_takes_nobody_with_him(make: Make) -> None:
    async with serving(lambda asked: None) as (server,):
        forwarder = await make(server.text)
        first = asyncio.create_task(ask(forwarder))
        second = asyncio.create_task(ask(forwarder))
        await server.was_asked()
        first.cancel()
        server.script = says("@ 300 A 192.0.2.1")
        assert addresses((await second).message) == {"192.0.2.1"}


# Denials and failures


async def test_a_denial_counts_as_long_as_its_soa_says(make: Make) -> None:
    clock = Clock(still=True)
    script = says(rcode="NXDOMAIN", authority=(f"example.com. 20 SOA {SOA}",))
    async with serving(script) as (server,):
        forwarder = await make(server.text, own={"clock": clock})
        got = await ask(forwarder)
        assert rcode(got.message) == "NXDOMAIN"
        assert [one.ttl for one in read(got.message).authority] == [20]
        clock.shift += 19
        assert forwarder.cached(wire(NAME), A) is not None
        clock.shift += 2
        assert forwarder.cached(wire(NAME), A) is None
        assert counted(forwarder, "coredns_cache_entries", type="denial") == 1


@pytest.mark.parametrize(
    "authority", [(), ("example.net. 20 SOA " + SOA,), ("example.com. 20 NS ns.example.com.",)]
)
async def test_a_denial_without_a_soa_of_its_zone_is_not_cached(
    make: Make, authority: tuple[str, ...]
) -> None:
    async with serving(says(rcode="NXDOMAIN", authority=authority)) as (server,):
        forwarder = await make(server.text)
        assert rcode((await ask(forwarder)).message) == "NXDOMAIN"
        assert forwarder.cached(wire(NAME), A) is None


async def test_servfail_is_asked_elsewhere_and_its_reason_told(make: Make) -> None:
    def bogus(asked: Asked) -> bytes:
        made = reply(asked, rcode="SERVFAIL")
        made.use_edns(0, options=[dns.edns.EDEOption(dns.edns.EDECode(6), "no signature")])
        return made.to_wire()

    async with serving(bogus, says("@ 300 A 192.0.2.1"), bogus) as (bad, good, bad_too):
        forwarder = await make(bad.text, good.text)
        assert addresses((await ask(forwarder)).message) == {"192.0.2.1"}
        forwarder = await make(bad.text, bad_too.text)
        got = await ask(forwarder)
        assert (rcode(got.message), got.extended_error) == ("SERVFAIL", 6)


async def test_failures_are_cached_for_a_second_then_for_longer(make: Make) -> None:
    clock = Clock(still=True)
    async with serving(says(rcode="SERVFAIL")) as (server,):
        forwarder = await make(server.text, own={"clock": clock}, question_seconds=0.5)
        for seconds in (1, 2, 4, 5, 5):
            assert rcode((await ask(forwarder)).message) == "SERVFAIL"
            before = len(server.asked)
            clock.shift += seconds - 0.5
            await ask(forwarder)
            assert len(server.asked) == before
            clock.shift += 0.6
        await ask(forwarder)
        assert len(server.asked) > before


# Upstreams that are slow, silent, gone


async def test_a_silent_upstream_is_passed_by(make: Make) -> None:
    async with serving(lambda asked: None, says("@ 300 A 192.0.2.1")) as (silent, good):
        forwarder = await make(silent.text, good.text, first_timeout_seconds=SOON)
        assert addresses((await ask(forwarder)).message) == {"192.0.2.1"}
        assert silent.questions() == good.questions()[:1]
        assert counted(forwarder, "vipd_dns_forward_hedged_total") >= 1


async def test_the_late_reply_of_the_first_is_taken_if_it_comes_first(make: Make) -> None:
    asked_twice = asyncio.Event()
    held: list[Asked] = []

    async with serving(lambda asked: held.append(asked), lambda asked: asked_twice.set()) as (
        slow,
        silent,
    ):
        forwarder = await make(slow.text, silent.text, first_timeout_seconds=SOON)
        waiting = asyncio.create_task(ask(forwarder))
        await asked_twice.wait()
        slow.script = silent.script
        assert not waiting.done()
        slow.send(reply(held[0], "@ 300 A 192.0.2.7").to_wire(), slow.sources[0])
        assert addresses((await waiting).message) == {"192.0.2.7"}


async def test_nobody_answers(make: Make) -> None:
    async with serving(lambda asked: None) as (silent,):
        forwarder = await make(silent.text, first_timeout_seconds=SOON, question_seconds=0.2)
        got = await ask(forwarder)
        assert (rcode(got.message), got.extended_error) == ("SERVFAIL", 22)
        assert len(silent.asked) > 1


async def test_nobody_is_there(make: Make) -> None:
    with nobody() as first, nobody() as second:
        got = await ask(await make(first, f"tcp://{second}"))
    assert (rcode(got.message), got.extended_error) == ("SERVFAIL", 23)


async def test_there_is_no_upstream(make: Make) -> None:
    got = await ask(await make())
    assert (rcode(got.message), got.extended_error) == ("SERVFAIL", 22)


async def test_one_that_is_not_there_is_passed_by_at_once_and_asked_last_then(make: Make) -> None:
    async with serving(says("@ 300 A 192.0.2.1")) as (good,):
        with nobody() as gone:
            # Nothing but the refusal may bring the second into play.
            forwarder = await make(gone, good.text, **PATIENT)
            for number in range(4):
                await ask(forwarder, f"{number}.example.com")
            assert counted(forwarder, "vipd_dns_forward_upstream_down", to=gone) == 1
            assert counted(forwarder, "coredns_proxy_healthcheck_failures_total", to=gone) == 1


async def test_one_that_was_down_is_tried_beside_another_and_is_back(make: Make) -> None:
    clock = Clock()
    async with serving(lambda asked: None, says("@ 300 A 192.0.2.1")) as (ill, good):
        forwarder = await make(
            ill.text, good.text, own={"clock": clock}, first_timeout_seconds=SOON
        )
        for number in range(3):
            await ask(forwarder, f"a{number}.example.com")
        assert counted(forwarder, "vipd_dns_forward_upstream_down", to=ill.text) == 1
        asked = len(ill.asked)
        ill.script = says("@ 300 A 192.0.2.2")
        clock.shift += 5
        await ask(forwarder, "b.example.com")
        await ill.was_asked(asked + 1)
        await until(lambda: not counted(forwarder, "vipd_dns_forward_upstream_down", to=ill.text))
        assert addresses((await ask(forwarder, "c.example.com")).message) == {"192.0.2.2"}


@pytest.mark.parametrize("said", ["REFUSED", "NOTIMP", "FORMERR"])
async def test_one_that_does_not_want_to_is_passed_by(make: Make, said: str) -> None:
    async with serving(says(rcode=said), says("@ 300 A 192.0.2.1")) as (unwilling, good):
        forwarder = await make(unwilling.text, good.text)
        assert addresses((await ask(forwarder)).message) == {"192.0.2.1"}
        alone = await make(unwilling.text)
        assert rcode((await ask(alone)).message) == "SERVFAIL"


async def test_one_that_only_names_others_is_passed_by(make: Make) -> None:
    lame = says(authority=("com. 300 NS a.gtld-servers.net.",), flags=0)
    async with serving(lame, says("@ 300 A 192.0.2.1")) as (first, good):
        forwarder = await make(first.text, good.text)
        assert addresses((await ask(forwarder)).message) == {"192.0.2.1"}


# Upstreams, or others in their name, that lie


def forged(asked: Asked, **change: Any) -> bytes:
    """A reply with another address, and what is changed of it."""
    made = reply(asked, "@ 300 A 198.51.100.66")
    for name, value in change.items():
        setattr(made, name, value)
    return made.to_wire()


async def test_a_wrong_id_is_not_the_reply_and_does_not_end_the_wait(make: Make) -> None:
    def script(asked: Asked) -> list[bytes]:
        wrong = forged(asked, id=asked.message.id ^ 1)
        return [wrong, wrong, reply(asked, "@ 300 A 192.0.2.1").to_wire()]

    async with serving(script) as (server,):
        forwarder = await make(server.text)
        assert addresses((await ask(forwarder)).message) == {"192.0.2.1"}
        assert counted(forwarder, "vipd_dns_forward_unwanted_total", reason="id") == 2


async def test_several_wrong_ids_take_the_question_to_tcp(make: Make) -> None:
    def script(asked: Asked) -> list[bytes]:
        if asked.tcp:
            return [reply(asked, "@ 300 A 192.0.2.1").to_wire()]
        return [forged(asked, id=(asked.message.id + n) & 0xFFFF) for n in range(1, 20)]

    async with serving(script) as (server,):
        forwarder = await make(server.text, **PATIENT)
        assert addresses((await ask(forwarder)).message) == {"192.0.2.1"}
        assert [one.tcp for one in server.asked] == [False, True]


@pytest.mark.parametrize("kind", ["name", "type", "class", "none", "two"])
async def test_another_question_is_not_the_reply(make: Make, kind: str) -> None:
    def script(asked: Asked) -> list[bytes]:
        data = bytearray(forged(asked))
        end = data.index(0, 12)
        if kind == "name":
            data[14] ^= 0x04
        elif kind == "type":
            data[end + 2] = 28
        elif kind == "class":
            data[end + 4] = 3
        elif kind == "none":
            data[5] = 0
        else:
            data[5] = 2
        return [bytes(data), reply(asked, "@ 300 A 192.0.2.1").to_wire()]

    async with serving(script) as (server,):
        forwarder = await make(server.text)
        assert addresses((await ask(forwarder)).message) == {"192.0.2.1"}
        assert counted(forwarder, "vipd_dns_forward_unwanted_total", reason="question") == 1


async def test_a_query_is_no_reply(make: Make) -> None:
    def script(asked: Asked) -> list[bytes]:
        return [asked.data, b"", b"short", reply(asked, "@ 300 A 192.0.2.1").to_wire()]

    async with serving(script) as (server,):
        forwarder = await make(server.text)
        assert addresses((await ask(forwarder)).message) == {"192.0.2.1"}


async def test_a_stranger_is_not_heard(make: Make) -> None:
    async with serving(lambda asked: None, says()) as (server, stranger):
        forwarder = await make(server.text, question_seconds=0.3)
        waiting = asyncio.create_task(ask(forwarder))
        await server.was_asked()
        stranger.send(forged(server.asked[0]), server.sources[0])
        assert rcode((await waiting).message) == "SERVFAIL"


def folds(asked: Asked) -> bytes:
    """A server that gives names back in lower case."""
    data = bytearray(reply(asked, "@ 300 A 192.0.2.1").to_wire())
    end = data.index(0, 12)
    data[12:end] = data[12:end].lower()
    return bytes(data)


async def test_another_spelling_is_believed_over_tcp_only(make: Make) -> None:
    async with serving(folds) as (server,):
        forwarder = await make(server.text)
        for number in range(4):
            name = f"many-letters-{number}.example.com"
            assert addresses((await ask(forwarder, name)).message) == {"192.0.2.1"}
        assert [one.tcp for one in server.asked] == 3 * [False, True] + [False]
        assert server.asked[-1].name.islower()
        assert counted(forwarder, "vipd_dns_forward_unwanted_total", reason="spelling") == 3


async def test_another_spelling_is_believed_where_there_is_no_tcp_and_no_capital(
    make: Make,
) -> None:
    async with serving(folds, tcp=False) as (server,):
        forwarder = await make(server.text, **PATIENT)
        for number in range(2):
            name = f"many-letters-{number}.example.com"
            assert addresses((await ask(forwarder, name)).message) == {"192.0.2.1"}
        assert [one.name.islower() for one in server.asked] == [False, True, True]


async def test_what_does_not_follow_the_protocol_is_asked_again_over_tcp(make: Make) -> None:
    def script(asked: Asked) -> bytes:
        whole = reply(asked, "@ 300 A 192.0.2.1").to_wire()
        return whole if asked.tcp else whole[:-3]

    async with serving(script) as (server,):
        forwarder = await make(server.text, **PATIENT)
        assert addresses((await ask(forwarder)).message) == {"192.0.2.1"}
        assert counted(forwarder, "coredns_cache_drops_total") == 1


async def test_a_truncated_reply_is_asked_for_over_tcp(make: Make) -> None:
    many = [f"@ 300 A 10.{n >> 8}.{n & 255}.1" for n in range(1000)]

    def script(asked: Asked) -> bytes:
        return reply(asked, *many).to_wire() if asked.tcp else truncated(asked)

    async with serving(script) as (server,):
        forwarder = await make(server.text, **PATIENT)
        assert len(addresses((await ask(forwarder)).message)) == 1000
        assert [one.tcp for one in server.asked] == [False, True]
        assert counted(forwarder, "vipd_dns_forward_truncated_total") == 1
        got = forwarder.cached(wire(NAME), A)
        assert got is not None
        assert len(addresses(got.message)) == 1000


async def test_a_truncated_reply_of_one_without_tcp_is_asked_elsewhere(make: Make) -> None:
    async with serving(truncated, says("@ 300 A 192.0.2.1"), tcp=False) as (first, second):
        forwarder = await make(first.text, second.text)
        assert addresses((await ask(forwarder)).message) == {"192.0.2.1"}
        alone = await make(first.text, question_seconds=0.5)
        assert rcode((await ask(alone)).message) == "SERVFAIL"


async def test_a_reply_beyond_the_bound_is_a_failure(make: Make) -> None:
    def script(asked: Asked) -> bytes:
        made = [f"@ 300 A 10.0.{n}.1" for n in range(100)]
        return reply(asked, *made).to_wire() if asked.tcp else truncated(asked)

    async with serving(script) as (server,):
        forwarder = await make(server.text, message_bytes=1000)
        assert rcode((await ask(forwarder)).message) == "SERVFAIL"


async def test_the_longest_reply_there_can_be(make: Make) -> None:
    def script(asked: Asked) -> bytes:
        whole = reply(asked, *(f"@ 300 TXT {'x' * 250}" + str(n) for n in range(240)))
        return whole.to_wire() if asked.tcp else truncated(asked)

    async with serving(script) as (server,):
        got = await ask(await make(server.text), qtype=TXT)
        assert len(texts(got.message)) == 240
        assert 60_000 < len(got.message) <= 65_535


async def test_long_replies_are_read_in_a_thread_and_short_ones_are_not(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[tuple[bool, bool]] = []

    def spied(data: bytes, *others: Any) -> Any:
        here = threading.current_thread() is threading.main_thread()
        readers.append((len(data) > fetch.READ_ASIDE_BYTES, here))
        return reading.read(data, *others)

    monkeypatch.setattr(fetch, "read", spied)
    async with serving(says(*(f"@ 300 A 10.0.{n >> 8}.{n & 255}" for n in range(400)))) as (
        server,
    ):
        forwarder = await make(server.text)
        await ask(forwarder)
        server.script = says("@ 300 A 192.0.2.1")
        await ask(forwarder, "short.example.com")
    assert readers == [(True, False), (False, True)]


async def test_huge_datagrams_are_read_too(make: Make) -> None:
    async with serving(says(*(f"@ 300 A 10.0.{n >> 8}.{n & 255}" for n in range(3000)))) as (one,):
        assert len(addresses((await ask(await make(one.text))).message)) == 3000


async def test_a_chain_in_a_circle_is_a_failure(make: Make) -> None:
    script = says("@ 60 CNAME b.example.com.", f"b.example.com. 60 CNAME {NAME}")
    async with serving(script) as (server,):
        assert rcode((await ask(await make(server.text))).message) == "SERVFAIL"


@pytest.mark.parametrize(("links", "said"), [(10, "NOERROR"), (11, "SERVFAIL")])
async def test_a_chain_is_followed_so_far_and_no_further(make: Make, links: int, said: str) -> None:
    chain = [f"c{n}.example.com. 60 CNAME c{n + 1}.example.com." for n in range(links)]
    async with serving(says(*chain, f"c{links}.example.com. 60 A 192.0.2.1")) as (server,):
        got = await ask(await make(server.text), "c0.example.com")
        assert rcode(got.message) == said
        assert len(texts(got.message)) == (links + 1 if said == "NOERROR" else 0)


async def test_what_a_chain_leads_to_is_asked_for(make: Make) -> None:
    known = {
        "a.example.com.": "@ 60 CNAME b.example.net.",
        "b.example.net.": "@ 40 CNAME c.example.org.",
        "c.example.org.": "@ 50 A 192.0.2.1",
    }
    async with serving(lambda asked: reply(asked, known[asked.name.lower()]).to_wire()) as (
        server,
    ):
        forwarder = await make(server.text, own={"clock": Clock(still=True)})
        for _ in range(2):
            assert texts((await ask(forwarder, "a.example.com")).message) == [
                "a.example.com. 60 CNAME b.example.net.",
                "b.example.net. 40 CNAME c.example.org.",
                "c.example.org. 50 A 192.0.2.1",
            ]
        assert len(server.asked) == 3


async def test_servers_that_lead_in_a_circle_are_a_failure(make: Make) -> None:
    other = {"a.example.com.": "b.example.com.", "b.example.com.": "a.example.com."}
    script = lambda asked: reply(asked, f"@ 60 CNAME {other[asked.name.lower()]}").to_wire()  # noqa: E731
    async with serving(script) as (server,):
        forwarder = await make(server.text)
        assert rcode((await ask(forwarder, "a.example.com")).message) == "SERVFAIL"


async def test_servers_that_lead_on_for_ever_are_a_failure(make: Make) -> None:
    def script(asked: Asked) -> bytes:
        number = int(asked.name.split(".")[0]) + 1
        return reply(asked, f"@ 60 CNAME {number}.example.com.").to_wire()

    async with serving(script) as (server,):
        forwarder = await make(server.text)
        assert rcode((await ask(forwarder, "0.example.com")).message) == "SERVFAIL"
        assert len(server.asked) <= 12


async def test_a_chain_that_ends_in_nothing_says_so(make: Make) -> None:
    def script(asked: Asked) -> bytes:
        if asked.name.lower() == NAME:
            return reply(asked, "@ 60 CNAME b.example.net.").to_wire()
        soa = f"example.net. 60 SOA {SOA}"
        return reply(asked, rcode="NXDOMAIN", authority=(soa,)).to_wire()

    async with serving(script) as (server,):
        got = await ask(await make(server.text))
        assert (rcode(got.message), len(texts(got.message))) == ("NXDOMAIN", 1)
        assert len(read(got.message).authority) == 1

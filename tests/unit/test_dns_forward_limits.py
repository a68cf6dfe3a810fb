"""The forwarder's bounds, its second thoughts about upstreams, and what it keeps to itself."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import dns.edns
import dns.flags
import pytest
from tests.unit.dns_forward_servers import (
    CLOSE,
    Asked,
    Clock,
    Make,
    Server,
    addresses,
    ask,
    counted,
    forwarders,
    nobody,
    rcode,
    read,
    reply,
    says,
    serving,
    texts,
    wire,
)
from tests.waiting import until

from vipd.dns.forward import upkeep
from vipd.dns.forward import wire as of
from vipd.dns.forward.forwarder import Own
from vipd.dns.forward.settings import CacheSettings, ForwardSettings

NAME = "www.example.com."
A = 1
SOON = 0.03
GOOD = says("@ 300 A 192.0.2.1")
CLUSTER = wire("cluster.local")


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    async with forwarders() as made:
        yield made


def silent(asked: Asked) -> None:
    return None


# Bounds


async def test_questions_beyond_the_bound_fail_at_once(make: Make) -> None:
    async with serving(silent) as (server,):
        forwarder = await make(server.text, questions=3)
        waiting = [asyncio.create_task(ask(forwarder, f"{n}.example.com")) for n in range(3)]
        await server.was_asked(3)
        assert rcode((await ask(forwarder, "one-more.example.com")).message) == "SERVFAIL"
        assert counted(forwarder, "coredns_forward_max_concurrent_rejects_total") == 1
        assert counted(forwarder, "vipd_dns_forward_questions") == 3
        server.script = GOOD
        await asyncio.gather(*waiting)
        # It said nothing of the name, so it is not remembered.
        assert rcode((await ask(forwarder, "one-more.example.com")).message) == "NOERROR"


async def test_those_who_wait_for_one_question_are_bounded(make: Make) -> None:
    async with serving(silent) as (server,):
        forwarder = await make(server.text, waiters=5)
        waiting = [asyncio.create_task(ask(forwarder, NAME)) for _ in range(5)]
        await server.was_asked()
        assert rcode((await ask(forwarder, NAME)).message) == "SERVFAIL"
        # Who goes away makes room.
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        waiting.append(asyncio.create_task(ask(forwarder, NAME)))
        server.script = GOOD
        found = await asyncio.gather(*waiting[1:])
        assert all(addresses(one.message) == {"192.0.2.1"} for one in found)


async def test_an_upstream_has_so_many_attempts_and_no_more(make: Make) -> None:
    async with serving(silent, GOOD) as (server, second):
        forwarder = await make(server.text, second.text, questions_of_upstream=4)
        waiting = [asyncio.create_task(ask(forwarder, f"{n}.example.com")) for n in range(8)]
        await second.was_asked(4)
        found = await asyncio.gather(*waiting)
        assert all(addresses(one.message) == {"192.0.2.1"} for one in found)
        assert len(server.asked) == 4
        server.asked.clear()
        await until(lambda: counted(forwarder, "vipd_dns_forward_upstream_in_flight") == 0)


async def test_where_every_upstream_has_enough_to_do_a_question_fails_at_once(make: Make) -> None:
    async with serving(silent) as (server,):
        forwarder = await make(server.text, questions_of_upstream=1)
        waiting = asyncio.create_task(ask(forwarder, "a.example.com"))
        await server.was_asked()
        assert rcode((await ask(forwarder, "b.example.com")).message) == "SERVFAIL"
        assert counted(forwarder, "coredns_forward_max_concurrent_rejects_total") == 1
        waiting.cancel()


async def test_a_client_has_a_part_of_what_may_be_under_way(make: Make) -> None:
    """Whether it still waits or not: what it began counts until it has ended."""
    settings = {"questions_of_upstream": 8, "failures_before_down": 1000}
    async with serving(silent) as (server,):
        forwarder = await make(server.text, **settings)
        waiting = [
            asyncio.create_task(ask(forwarder, f"{n}.example.com", client="192.0.2.1"))
            for n in range(20)
        ]
        await until(lambda: sum(one.done() for one in waiting) == 18)
        assert {rcode(one.result().message) for one in waiting if one.done()} == {"SERVFAIL"}
        assert counted(forwarder, "vipd_dns_forward_upstream_in_flight") == 2
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        got = await ask(forwarder, "more.example.com", client="192.0.2.1")
        assert rcode(got.message) == "SERVFAIL"
        assert counted(forwarder, "coredns_forward_max_concurrent_rejects_total") == 19
        # What is under way already takes no more room, and others have their part.
        shared = asyncio.create_task(ask(forwarder, "0.example.com", client="192.0.2.2"))
        other = asyncio.create_task(ask(forwarder, "x.example.com", client="192.0.2.2"))
        await until(lambda: counted(forwarder, "vipd_dns_forward_upstream_in_flight") == 3)
        server.script = GOOD
        for one in (shared, other):
            assert rcode((await one).message) == "NOERROR"
        await until(lambda: counted(forwarder, "vipd_dns_forward_upstream_in_flight") == 0)
        assert (
            rcode((await ask(forwarder, "y.example.com", client="192.0.2.1")).message) == "NOERROR"
        )


async def test_what_is_asked_for_before_its_time_is_over_has_a_part_too(make: Make) -> None:
    """Nobody waits for it, so no bound of those who wait holds it."""
    clock = Clock(still=True)
    async with serving(GOOD) as (server,):
        forwarder = await make(server.text, own={"clock": clock}, questions_of_upstream=8)
        for n in range(6):
            await ask(forwarder, f"{n}.example.com", client="192.0.2.1")
        server.script = silent
        clock.shift += 290
        for n in range(6):
            got = await ask(forwarder, f"{n}.example.com", client="192.0.2.1")
            assert addresses(got.message) == {"192.0.2.1"}
        assert counted(forwarder, "vipd_dns_forward_questions") == 2


async def test_no_descriptor_is_nobodys_fault(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(GOOD) as (server,):
        forwarder = await make(server.text)

        def no_socket(*_: Any) -> socket.socket:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr("vipd.dns.forward.udp.socket.socket", no_socket)
            for number in range(4):
                got = await ask(forwarder, f"{number}.example.com")
                assert rcode(got.message) == "SERVFAIL"
        assert counted(forwarder, "vipd_dns_forward_upstream_down") == 0
        assert rcode((await ask(forwarder, "0.example.com")).message) == "NOERROR"


async def test_what_is_under_way_at_the_end_fails(make: Make) -> None:
    async with serving(silent) as (server,):
        forwarder = await make(server.text)
        waiting = asyncio.create_task(ask(forwarder, NAME))
        await server.was_asked()
        await forwarder.close()
        assert rcode((await waiting).message) == "SERVFAIL"


async def test_a_flood_at_a_query_s_port_is_counted_and_survived(make: Make) -> None:
    def script(asked: Asked) -> list[bytes]:
        if asked.tcp:
            return [reply(asked, "@ 300 A 192.0.2.1").to_wire()]
        return [bytes(2) + asked.data[2:] + bytes(5000) for _ in range(300)]

    async with serving(script) as (server,):
        forwarder = await make(server.text)
        assert addresses((await ask(forwarder, NAME)).message) == {"192.0.2.1"}


# Upstreams that do not know everything


async def test_one_without_edns_is_asked_without(make: Make) -> None:
    def script(asked: Asked) -> bytes:
        if asked.message.edns < 0:
            return reply(asked, "@ 300 A 192.0.2.1").to_wire()
        return asked.data[:2] + b"\x81\x81" + bytes(8)  # FORMERR, a header alone

    async with serving(script) as (server,):
        forwarder = await make(server.text)
        for number in range(2):
            got = await ask(forwarder, f"{number}.example.com")
            assert addresses(got.message) == {"192.0.2.1"}
        assert [one.message.edns for one in server.asked] == [0, -1, -1]


def with_cookie(asked: Asked, server: bytes, *answer: str) -> bytes:
    made = reply(asked, *answer)
    (sent,) = [one for one in asked.message.options if isinstance(one, dns.edns.CookieOption)]
    made.use_edns(0, options=[dns.edns.CookieOption(sent.client, server)])
    return made.to_wire()


async def test_a_cookie_is_given_back_and_insisted_on(make: Make) -> None:
    cookies: list[bytes] = []

    def script(asked: Asked) -> list[bytes]:
        (sent,) = [one for one in asked.message.options if isinstance(one, dns.edns.CookieOption)]
        cookies.append(sent.server)
        if len(cookies) == 1 or asked.tcp:
            return [with_cookie(asked, b"server-1", "@ 300 A 192.0.2.1")]
        stranger = reply(asked, "@ 300 A 198.51.100.66").to_wire()
        return [stranger, with_cookie(asked, b"server-2", "@ 300 A 192.0.2.2")]

    async with serving(script) as (server,):
        forwarder = await make(server.text)
        assert addresses((await ask(forwarder, "a.example.com")).message) == {"192.0.2.1"}
        assert addresses((await ask(forwarder, "b.example.com")).message) <= {
            "192.0.2.1",
            "192.0.2.2",
        }
        assert cookies[:2] == [b"", b"server-1"]
        assert counted(forwarder, "vipd_dns_forward_unwanted_total", reason="cookie") == 1
        assert len({one.message.options[0].to_wire()[:8] for one in server.asked}) == 1


async def test_a_bad_cookie_is_asked_again_with_a_good_one(make: Make) -> None:
    def script(asked: Asked) -> bytes:
        (sent,) = [one for one in asked.message.options if isinstance(one, dns.edns.CookieOption)]
        if sent.server == b"the-new-one":
            return with_cookie(asked, b"the-new-one", "@ 300 A 192.0.2.1")
        made = reply(asked, rcode="BADCOOKIE")
        made.use_edns(0, options=[dns.edns.CookieOption(sent.client, b"the-new-one")])
        made.set_rcode(dns.rcode.BADCOOKIE)
        return made.to_wire()

    async with serving(script) as (server,):
        forwarder = await make(server.text)
        assert addresses((await ask(forwarder, NAME)).message) == {"192.0.2.1"}
        assert [one.tcp for one in server.asked] == [False, False]


async def test_one_that_gives_cookies_no_more_is_believed_over_tcp(make: Make) -> None:
    async with serving(lambda asked: with_cookie(asked, b"server-1", "@ 300 A 192.0.2.1")) as (s,):
        forwarder = await make(s.text)
        await ask(forwarder, "a.example.com")
        s.script = GOOD
        assert addresses((await ask(forwarder, "b.example.com")).message) == {"192.0.2.1"}
        assert addresses((await ask(forwarder, "c.example.com")).message) == {"192.0.2.1"}
        assert [one.tcp for one in s.asked] == [False, False, True, False]


async def test_ad_is_told_where_upstreams_are_trusted(make: Make) -> None:
    async with serving(says("@ 300 A 192.0.2.1", flags=dns.flags.RA | dns.flags.AD)) as (server,):
        trusting = await make(server.text, trust_ad=True)
        assert read((await ask(trusting, NAME)).message).flags & dns.flags.AD
        assert server.asked[0].message.flags & dns.flags.AD


# TCP


async def test_questions_share_a_connection_and_come_back_in_any_order(make: Make) -> None:
    held: list[Asked] = []

    def script(asked: Asked) -> list[bytes]:
        held.append(asked)
        if len(held) < 5:
            return []
        return [reply(one, f"@ 300 A 192.0.2.{one.name[0]}").to_wire() for one in reversed(held)]

    async with serving(script) as (server,):
        forwarder = await make(f"tcp://{server.text}", first_timeout_seconds=10)
        found = await asyncio.gather(*(ask(forwarder, f"{n}.example.com") for n in range(5)))
        assert [addresses(one.message) for one in found] == [{f"192.0.2.{n}"} for n in range(5)]
        assert server.connections == 1
        assert counted(forwarder, "coredns_proxy_conn_cache_misses_total", proto="tcp") == 1
        assert counted(forwarder, "coredns_proxy_conn_cache_hits_total", proto="tcp") == 4


async def test_a_connection_that_was_closed_meanwhile_costs_nobody_a_reply(make: Make) -> None:
    replied = 0

    def script(asked: Asked) -> list[bytes]:
        nonlocal replied
        replied += 1
        return CLOSE if replied == 2 else [reply(asked, "@ 300 A 192.0.2.1").to_wire()]

    async with serving(script) as (server,):
        forwarder = await make(f"tcp://{server.text}", first_timeout_seconds=10)
        for number in range(2):
            got = await ask(forwarder, f"{number}.example.com")
            assert addresses(got.message) == {"192.0.2.1"}
        assert server.connections == 2
        assert counted(forwarder, "vipd_dns_forward_upstream_down") == 0


async def test_one_that_closes_every_connection_is_passed_by(make: Make) -> None:
    async with serving(lambda asked: CLOSE, GOOD) as (closing, good):
        forwarder = await make(f"tcp://{closing.text}", good.text, first_timeout_seconds=10)
        assert addresses((await ask(forwarder, NAME)).message) == {"192.0.2.1"}
        assert closing.connections == 1


async def test_an_idle_connection_is_closed(make: Make) -> None:
    async with serving(GOOD) as (server,):
        forwarder = await make(f"tcp://{server.text}", tcp_idle_seconds=0.1)
        await ask(forwarder, "a.example.com")
        await until(lambda: not server.open_connections)
        await ask(forwarder, "b.example.com")
        assert server.connections == 2


async def test_equal_ids_never_share_a_connection(make: Make) -> None:
    held: list[Asked] = []

    async with serving(lambda asked: held.append(asked)) as (server,):
        forwarder = await make(f"tcp://{server.text}", own={"bits": lambda _: 5}, attempts=1)
        waiting = [asyncio.create_task(ask(forwarder, f"{n}.example.com")) for n in range(2)]
        await server.was_asked(2)
        assert len({one.message.id for one in held}) == 1
        assert server.connections == 2
        await forwarder.close()
        await asyncio.gather(*waiting)


async def test_frames_that_nobody_asked_for_are_no_replies(make: Make) -> None:
    def script(asked: Asked) -> list[bytes]:
        strange = [(asked.message.id + n & 0xFFFF).to_bytes(2, "big") + bytes(10) for n in (1, 2)]
        return [*strange, b"x", reply(asked, "@ 300 A 192.0.2.1").to_wire()]

    async with serving(script) as (server,):
        forwarder = await make(f"tcp://{server.text}")
        assert addresses((await ask(forwarder, NAME)).message) == {"192.0.2.1"}


async def test_a_wrong_reply_over_tcp_is_a_failure_of_its_sender(make: Make) -> None:
    def script(asked: Asked) -> bytes:
        return asked.data[:2] + b"\x81\x80" + asked.data[4:14] + b"x" + asked.data[15:]

    async with serving(script, GOOD) as (wrong, good):
        forwarder = await make(f"tcp://{wrong.text}", good.text, first_timeout_seconds=10)
        assert addresses((await ask(forwarder, NAME)).message) == {"192.0.2.1"}


async def test_connections_are_bounded(make: Make) -> None:
    async with serving(silent) as (server,):
        forwarder = await make(
            f"tcp://{server.text}", tcp_connections=2, question_seconds=0.5, attempts=1
        )
        asking = [ask(forwarder, f"{n}.example.com") for n in range(140)]
        found = await asyncio.gather(*asking)
        assert {rcode(one.message) for one in found} == {"SERVFAIL"}
        assert server.connections == 2
        assert len(server.asked) == 128


# Names of the cluster, and loops


def is_ours(name: bytes) -> bool:
    return name.endswith(CLUSTER)


async def test_a_name_of_the_cluster_is_never_forwarded(make: Make) -> None:
    async with serving(GOOD) as (server,):
        settings = {"stub_domains": {"cluster.local": (server.text,)}}
        forwarder = await make(server.text, own={"is_ours": is_ours}, **settings)
        got = await ask(forwarder, "web.default.svc.cluster.local")
        assert (rcode(got.message), got.extended_error) == ("REFUSED", 20)
        assert server.asked == []
        assert counted(forwarder, "vipd_dns_forward_guarded_total") == 1


async def test_nobody_else_says_anything_of_a_name_of_the_cluster(make: Make) -> None:
    script = says(
        "@ 60 CNAME web.shop.svc.cluster.local.", "web.shop.svc.cluster.local. 60 A 6.6.6.6"
    )

    def nothing(name: bytes, qtype: int) -> Own:
        return Own(of.reply(name, qtype))

    async with serving(script) as (server,):
        forwarder = await make(server.text, own={"is_ours": is_ours, "own_zone": nothing})
        assert texts((await ask(forwarder, NAME)).message) == [
            f"{NAME} 60 CNAME web.shop.svc.cluster.local."
        ]
        # Where the zone does not say, there is no saying that there is nothing.
        forwarder = await make(server.text, own={"is_ours": is_ours})
        assert rcode((await ask(forwarder, NAME)).message) == "SERVFAIL"


async def test_a_chain_may_end_in_the_cluster(make: Make) -> None:
    ours: list[tuple[bytes, int]] = []

    def own_zone(name: bytes, qtype: int) -> Own | None:
        ours.append((name, qtype))
        return Own(of.reply(name, qtype, answers=(of.record(A, 5, b"\x0a\0\0\1"),), flags=of.AA))

    async with serving(says("@ 60 CNAME web.shop.svc.cluster.local.")) as (server,):
        forwarder = await make(server.text, own={"is_ours": is_ours, "own_zone": own_zone})
        assert texts((await ask(forwarder, NAME)).message) == [
            f"{NAME} 60 CNAME web.shop.svc.cluster.local.",
            "web.shop.svc.cluster.local. 5 A 10.0.0.1",
        ]
        assert ours == [(wire("web.shop.svc.cluster.local"), A)]


@pytest.mark.parametrize("qtype", [0, 41, 128, 249, 250, 251, 252, 253, 254])
async def test_what_is_no_data_is_never_forwarded(make: Make, qtype: int) -> None:
    async with serving(GOOD) as (server,):
        got = await ask(await make(server.text), NAME, qtype)
        assert rcode(got.message) == "REFUSED"
        assert server.asked == []


async def test_an_upstream_that_asks_us_is_left_out_until_it_does_no_more(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "RECHECK_SECONDS", 0.01)
    told: list[str] = []
    async with serving(silent, GOOD) as (mirror, good):
        forwarder = await make(
            mirror.text,
            good.text,
            own={"note": lambda event, **facts: told.append(event)},
            loop_check=False,
        )

        def back(asked: Asked) -> None:
            name = asked.message.question[0]
            task = asyncio.ensure_future(ask(forwarder, name.name.to_text().lower(), name.rdtype))
            source = mirror.sources[-1]
            task.add_done_callback(
                lambda done: _relay(mirror, asked, done.result().message, source)
            )

        mirror.script = back
        settings = forwarder.settings
        await forwarder.reload(_with(settings, loop_check=True))
        await until(lambda: counted(forwarder, "vipd_dns_forward_upstream_looping") == 1)
        assert counted(forwarder, "vipd_dns_forward_upstream_looping", to=mirror.text) == 1
        assert "an upstream asks this server what it is asked; it is left out" in told
        before = len(mirror.questions())
        assert addresses((await ask(forwarder, NAME)).message) == {"192.0.2.1"}
        assert len(mirror.questions()) == before
        mirror.script = GOOD
        await until(lambda: counted(forwarder, "vipd_dns_forward_upstream_looping") == 0)
        assert counted(forwarder, "vipd_dns_forward_loops_total") == 1


async def test_a_loop_without_any_other_upstream_ends(make: Make) -> None:
    async with serving(silent) as (mirror,):
        forwarder = await make(mirror.text, question_seconds=0.5, first_timeout_seconds=SOON)

        def back(asked: Asked) -> None:
            name = asked.message.question[0]
            again.append(
                asyncio.ensure_future(ask(forwarder, name.name.to_text().lower(), name.rdtype))
            )

        again: list[asyncio.Future[Any]] = []
        mirror.script = back
        assert rcode((await ask(forwarder, NAME)).message) == "SERVFAIL"
        # The question joins itself: it is sent so often as if nobody had looped, and no more.
        assert len(mirror.asked) <= ForwardSettings().attempts


async def test_this_server_itself_is_no_upstream(make: Make) -> None:
    told: list[str] = []
    async with serving(GOOD, GOOD) as (itself, good):
        own = {"own": [itself.at], "note": lambda event, **facts: told.append(event)}
        forwarder = await make(itself.text, good.text, own=own)
        await ask(forwarder, NAME)
        assert itself.asked == []
        assert "an upstream is this server itself; it is left out" in told
        await forwarder.reload(forwarder.settings, own=[good.at])
        await ask(forwarder, "other.example.com")
        assert itself.questions() == ["other.example.com."]


def _relay(server: Server, asked: Asked, message: bytes, to: tuple[str, int]) -> None:
    section = asked.data[12 : asked.data.index(0, 12) + 5]
    server.send(asked.data[:2] + message[2:12] + section + message[12 + len(section) :], to)


def _with(settings: ForwardSettings, **more: Any) -> ForwardSettings:
    from msgspec import structs

    return structs.replace(settings, **more)


# Stale replies


@pytest.mark.parametrize("how", ["silent", "servfail", "refused", "gone"])
async def test_a_positive_reply_outlives_upstreams(make: Make, how: str) -> None:
    clock = Clock()
    async with serving(says("@ 20 A 192.0.2.1")) as (server,):
        with nobody() as gone:
            forwarder = await make(
                server.text, own={"clock": clock}, question_seconds=0.5, first_timeout_seconds=SOON
            )
            await ask(forwarder, NAME)
            clock.shift += 30
            server.script = {
                "silent": silent,
                "servfail": says(rcode="SERVFAIL"),
                "refused": says(rcode="REFUSED"),
                "gone": silent,
            }[how]
            if how == "gone":
                await forwarder.reload(_with(forwarder.settings, upstreams=(gone,)))
            got = await ask(forwarder, NAME)
            assert texts(got.message) == [f"{NAME} 30 A 192.0.2.1"]
            assert got.extended_error == 3
            assert counted(forwarder, "coredns_cache_served_stale_total") == 1


async def test_behind_a_failure_the_stale_reply_is_given_without_asking(make: Make) -> None:
    clock = Clock()
    async with serving(says("@ 20 A 192.0.2.1")) as (server,):
        forwarder = await make(server.text, own={"clock": clock})
        await ask(forwarder, NAME)
        server.script = says(rcode="SERVFAIL")
        clock.shift += 21
        for _ in range(3):
            assert addresses((await ask(forwarder, NAME)).message) == {"192.0.2.1"}
        assert len(server.asked) == 2
        clock.shift += 31
        server.script = says("@ 20 A 192.0.2.2")
        assert addresses((await ask(forwarder, NAME)).message) == {"192.0.2.2"}


async def test_a_stale_reply_ends_too(make: Make) -> None:
    clock = Clock()
    async with serving(says("@ 20 A 192.0.2.1")) as (server,):
        cache = CacheSettings(stale_seconds=100)
        forwarder = await make(server.text, own={"clock": clock}, cache=cache)
        await ask(forwarder, NAME)
        server.script = says(rcode="SERVFAIL")
        clock.shift += 121
        assert rcode((await ask(forwarder, NAME)).message) == "SERVFAIL"


async def test_a_denial_replaces_what_is_stale_and_is_never_stale_itself(make: Make) -> None:
    clock = Clock()
    soa = "example.com. 20 SOA ns.example.com. admin.example.com. 1 3600 600 86400 60"
    async with serving(says("@ 20 A 192.0.2.1")) as (server,):
        forwarder = await make(server.text, own={"clock": clock})
        await ask(forwarder, NAME)
        clock.shift += 21
        server.script = says(rcode="NXDOMAIN", authority=(soa,))
        assert rcode((await ask(forwarder, NAME)).message) == "NXDOMAIN"
        server.script = says(rcode="SERVFAIL")
        clock.shift += 21
        assert rcode((await ask(forwarder, NAME)).message) == "SERVFAIL"


async def test_who_had_a_stale_reply_has_the_fresh_one_next_time(make: Make) -> None:
    clock = Clock()
    held: list[tuple[Asked, tuple[str, int]]] = []
    async with serving(says("@ 20 A 192.0.2.1")) as (server,):
        cache = CacheSettings(stale_wait_seconds=0)
        forwarder = await make(server.text, own={"clock": clock}, cache=cache)
        await ask(forwarder, NAME)
        clock.shift += 21
        server.script = lambda asked: held.append((asked, server.sources[-1]))
        assert texts((await ask(forwarder, NAME)).message) == [f"{NAME} 30 A 192.0.2.1"]
        await server.was_asked(2)
        asked, source = held[0]
        server.send(reply(asked, "@ 20 A 192.0.2.2").to_wire(), source)
        await until(lambda: forwarder.cached(wire(NAME), A))
        assert addresses((await ask(forwarder, NAME)).message) == {"192.0.2.2"}


# What is asked for before its time is over


async def test_what_is_in_use_is_asked_for_again_before_its_time_is_over(make: Make) -> None:
    clock = Clock()
    async with serving(says("@ 100 A 192.0.2.1")) as (server,):
        forwarder = await make(server.text, own={"clock": clock})
        await ask(forwarder, NAME, dnssec=True)
        clock.shift += 80
        await ask(forwarder, NAME, dnssec=True)
        assert len(server.asked) == 1
        server.script = says("@ 100 A 192.0.2.2")
        clock.shift += 12
        for _ in range(3):  # nobody waits for it, and it is asked once
            assert addresses((await ask(forwarder, NAME, dnssec=True)).message) == {"192.0.2.1"}
        await server.was_asked(2)
        assert [one.name.lower() for one in server.asked] == [NAME, NAME]
        await until(lambda: counted(forwarder, "vipd_dns_forward_questions") == 0)
        assert addresses((await ask(forwarder, NAME, dnssec=True)).message) == {"192.0.2.2"}
        clock.shift += 50  # the old one's time is over
        assert addresses((await ask(forwarder, NAME, dnssec=True)).message) == {"192.0.2.2"}
        assert len(server.asked) == 2
        assert counted(forwarder, "coredns_cache_prefetch_total") == 1


@pytest.mark.parametrize("prefetch", [True, False])
async def test_denials_are_not_asked_for_early_nor_anything_where_it_is_off(
    make: Make, prefetch: bool
) -> None:
    clock = Clock()
    soa = "example.com. 20 SOA ns.example.com. admin.example.com. 1 3600 600 86400 60"
    script = says(rcode="NXDOMAIN", authority=(soa,)) if prefetch else says("@ 20 A 192.0.2.1")
    async with serving(script) as (server,):
        cache = CacheSettings(prefetch=prefetch)
        forwarder = await make(server.text, own={"clock": clock}, cache=cache)
        await ask(forwarder, NAME)
        clock.shift += 19
        await ask(forwarder, NAME)
        assert counted(forwarder, "vipd_dns_forward_questions") == 0
        assert counted(forwarder, "coredns_cache_prefetch_total") == 0


async def test_a_refresh_that_fails_leaves_what_is_known(make: Make) -> None:
    clock = Clock()
    async with serving(says("@ 100 A 192.0.2.1")) as (server,):
        forwarder = await make(server.text, own={"clock": clock})
        await ask(forwarder, NAME)
        server.script = says(rcode="SERVFAIL")
        clock.shift += 95
        await ask(forwarder, NAME)
        await until(lambda: counted(forwarder, "vipd_dns_forward_questions") == 0)
        got = await ask(forwarder, NAME)
        assert (addresses(got.message), got.extended_error) == ({"192.0.2.1"}, None)

"""Names of the cluster and of others that lead to each other: a server and its forwarder whole."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import dns.flags
import dns.message
import pytest
from tests.unit import dns_forward_servers as others
from tests.unit.dns_server import Datagrams, Served, question, rcode, served, zone
from tests.unit.dns_zone_facts import alias, own
from tests.waiting import until

from vipd.dns import names
from vipd.dns.facts import ServiceFacts
from vipd.dns.forward import wire as of
from vipd.dns.forward.forwarder import Forwarder
from vipd.dns.forward.settings import ForwardSettings
from vipd.dns.server.forwarding import Forwarding
from vipd.dns.settings import DnsSettings


@contextlib.asynccontextmanager
async def forwarding(
    upstream: others.Server,
    *services: ServiceFacts,
    most: DnsSettings | None = None,
    **more: object,
) -> AsyncIterator[tuple[Served, Datagrams]]:
    """A server of the cluster's zone that forwards to an upstream, and a client of it.

    As many may wait as `most` says.
    """
    there = zone()
    for one in services:
        there.put(one)
    made = served(there)
    if most is not None:
        made.serving.waiting.most = most.waiting
        made.serving.waiting.most_of_client = most.waiting_of_client
    forwards = Forwarding(made.serving)
    settings = {"upstreams": (upstream.text,), "loop_check": False, **more}
    await forwards.change(DnsSettings(forward=ForwardSettings(**settings)), [])  # type: ignore[arg-type]
    client = Datagrams(made.address)
    try:
        yield made, client
    finally:
        client.close()
        made.close()
        await forwards.close()


def chain(reply: bytes) -> list[str]:
    """Owner and data of each answer."""
    return [f"{rrset.name} {one}" for rrset in dns.message.from_wire(reply).answer for one in rrset]


@pytest.mark.parametrize("from_upstream", [True, False])
async def test_a_name_of_others_may_lead_through_the_cluster_to_others(
    *, from_upstream: bool
) -> None:
    """CNAME of `records`, or of an upstream → ExternalName → a name of others, with its records."""
    away = own("away")

    def script(asked: others.Asked) -> bytes:
        if asked.name.lower() == "db.corp.":
            return others.reply(asked, f"@ 60 CNAME {away}").to_wire()
        return others.reply(asked, "@ 60 A 192.0.2.7").to_wire()

    records = () if from_upstream else (f"db.corp. CNAME {away}",)
    async with (
        others.serving(script) as (upstream,),
        forwarding(upstream, alias("www.example.com", "away"), records=records) as (_, client),
    ):
        for _again in range(2):
            assert chain(await client.ask(question("db.corp."))) == [
                f"db.corp. {away}",
                f"{away} www.example.com.",
                "www.example.com. 192.0.2.7",
            ]


async def test_a_chain_through_the_cluster_has_an_end() -> None:
    """Circles, and more CNAMEs than are followed, fail: never is it said that there is nothing."""

    def script(asked: others.Asked) -> bytes:
        if asked.name.lower() == "circle.example.":
            return others.reply(asked, f"@ 60 CNAME {own('circle')}").to_wire()
        return others.reply(asked, "@ 60 A 192.0.2.7").to_wire()

    links = [alias(own(f"link{n + 1}").rstrip("."), f"link{n}") for n in range(4)]
    services = (alias("circle.example", "circle"), *links, alias("end.example", "link4"))
    for most, said in ((6, "NOERROR"), (5, "SERVFAIL")):
        async with (
            others.serving(script) as (upstream,),
            forwarding(
                upstream, *services, chain=most, records=(f"db.corp. CNAME {own('link0')}",)
            ) as (_, client),
        ):
            reply = await client.ask(question("db.corp."))
            assert rcode(reply) == said
            assert len(chain(reply)) == (7 if said == "NOERROR" else 0)
            for name in ("circle.example.", own("circle")):
                reply = await client.ask(question(name))
                assert rcode(reply) == "SERVFAIL"


@pytest.fixture
def read_by_dnspython(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the messages that this process reads with it in the event loop's thread."""
    import threading

    from dns.message import _WireReader

    sizes: list[int] = []
    begin, loop = _WireReader.read, threading.get_ident()

    def read(self: _WireReader) -> dns.message.Message:
        if threading.get_ident() == loop:
            sizes.append(len(self.parser.wire))
        return begin(self)  # type: ignore[no-any-return, no-untyped-call]

    monkeypatch.setattr(_WireReader, "read", read)
    return sizes


async def test_thousands_of_addresses_behind_an_external_name_hold_nobody_up(
    read_by_dnspython: list[int],
) -> None:
    """62 KB from an upstream are read once, aside; a question for them reads what fits a datagram,
    without dnspython."""
    many = [of.record(of.A, 60, bytes((10, 1, n >> 8, n & 255))) for n in range(3900)]
    long = of.reply(names.wire("big.example"), of.A, answers=tuple(many))

    def script(asked: others.Asked) -> bytes:
        return asked.data[:2] + long[2:] if asked.tcp else others.truncated(asked)

    services = (alias("big.example", "big"),)
    records = ("db.corp. CNAME big.example.", f"in.corp. CNAME {own('big')}")
    async with (
        others.serving(script) as (upstream,),
        forwarding(upstream, *services, records=records, randomize_case=False) as (_, client),
    ):
        await client.ask(question(own("big")))
        read_by_dnspython.clear()
        upstream.asked.clear()
        replies = [
            await client.ask(question(name))
            for _ in range(20)
            for name in (own("big"), "db.corp.", "in.corp.")
        ]
        assert read_by_dnspython == []
        assert upstream.questions() == []
    for reply in replies:
        message = dns.message.from_wire(reply)
        assert len(message.answer[-1]) > 20
        assert message.flags & dns.flags.TC
    assert len({chain(one)[-1] for one in replies}) > 20, "they take turns"


async def test_one_pod_does_not_take_forwarding_from_the_others() -> None:
    """It asks thousands of names that nobody answers, by the bounds that are the default."""
    settings = DnsSettings()
    all_wait = min(settings.waiting, settings.forward.waiters)
    assert 4 * settings.waiting_of_client <= all_wait

    def script(asked: others.Asked) -> bytes | None:
        if ".slow." in asked.name.lower():
            return None
        return others.reply(asked, "@ 60 A 192.0.2.7").to_wire()

    async with (
        others.serving(script) as (upstream,),
        forwarding(upstream, most=settings) as (made, client),
    ):
        pod, forwarder = Datagrams(made.address, "127.0.0.2"), made.serving.asks
        assert isinstance(forwarder, Forwarder)
        try:
            part = settings.forward.questions_of_client
            rejected = "coredns_forward_max_concurrent_rejects_total"
            under_way = "vipd_dns_forward_questions"
            for burst in range(1, 5):
                for n in range(500):
                    pod.socket.send(question(f"{n}-{burst}.slow.example."))
                    if n % 50 == 49:
                        await asyncio.sleep(0)
                # More than its part fail at once.
                await until(
                    lambda: others.counted(forwarder, rejected) + part >= 500 * burst  # noqa: B023
                )
                assert others.counted(forwarder, under_way) <= part
            for n in range(50):
                reply = await client.ask(question(f"{n}.good.example."))
                assert chain(reply) == [f"{n}.good.example. 192.0.2.7"]
        finally:
            pod.close()

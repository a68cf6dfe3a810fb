"""The server over UDP, on loopback: who gets an answer, which, and what stays bounded."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from tests.unit.dns_server import (
    ADDRESS,
    WEB,
    Datagrams,
    Served,
    addresses,
    is_truncated,
    question,
    rcode,
    served,
    zone,
)

from vipd.dns.answer import Answers
from vipd.proxy.names import NamespacedName


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Served]:
    made = served()
    yield made
    made.close()


@pytest_asyncio.fixture
async def client(server: Served) -> AsyncIterator[Datagrams]:
    made = Datagrams(server.address)
    yield made
    made.close()


async def test_a_question_is_answered(server: Served, client: Datagrams) -> None:
    assert addresses(await client.ask(question())) == [ADDRESS]
    assert server.serving.counters.types() == {"udp 1 A": 1}
    assert server.serving.counters.named_rcodes() == {"NOERROR": 1}


async def test_many_waiting_questions_are_all_answered(server: Served, client: Datagrams) -> None:
    for _ in range(150):
        client.socket.send(question())
    for _ in range(150):
        assert addresses(await client.receive()) == [ADDRESS]
    assert sum(server.serving.counters.durations) == 150


async def test_garbage_is_silence_and_does_no_harm(server: Served, client: Datagrams) -> None:
    for size in (0, 1, 11, 12, 100, 4096, 9000):
        client.socket.send(os.urandom(size))
    client.socket.send(question()[:2] + b"\x80" + question()[3:])  # a reply
    while True:  # some garbage is a header, and gets FORMERR or the like
        reply = await client.ask(question())
        if rcode(reply) == "NOERROR":
            break
    assert server.counted("inside_errors") == 0


async def test_an_error_inside_costs_one_question(
    server: Served, client: Datagrams, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = server.serving.answers.udp
    poison = question("poison.")

    def answer(data: bytes) -> object:
        if data == poison:
            raise RuntimeError("as a bug would")
        return right(data)

    monkeypatch.setattr(server.serving.answers, "udp", answer)
    client.socket.send(poison)
    assert addresses(await client.ask(question())) == [ADDRESS]
    assert server.counted("inside_errors") == 1


async def test_others_are_refused(server: Served) -> None:
    made = served(allow=["192.0.2.0/24"])
    client = Datagrams(made.address)
    try:
        reply = await client.ask(question())
        assert rcode(reply) == "REFUSED"
        assert addresses(reply) == []
    finally:
        client.close()
        made.close()


async def test_refusals_are_few() -> None:
    made = served(allow=["127.0.0.1/32"], refusals=3)
    stranger, friend = Datagrams(made.address, "127.0.1.1"), Datagrams(made.address)
    try:
        for _ in range(50):
            stranger.socket.send(question())
        assert addresses(await friend.ask(question())) == [ADDRESS]
        assert made.counted("sources_refused") == 50
        assert made.counted("refusals_unsaid") >= 46
    finally:
        stranger.close()
        friend.close()
        made.close()


async def test_what_is_not_ours_is_forwarded(server: Served, client: Datagrams) -> None:
    reply = await client.ask(question("Example.com."))
    assert addresses(reply) == ["192.0.2.1"]
    assert b"\x07Example\x03com" in reply
    assert server.upstream.asked == [b"\x07example\x03com\x00"]


async def test_one_that_waits_delays_nobody(server: Served, client: Datagrams) -> None:
    server.upstream.go[b"slow"] = asyncio.Event()
    client.socket.send(question("slow.example."))
    assert addresses(await client.ask(question())) == [ADDRESS]
    server.upstream.go[b"slow"].set()
    assert addresses(await client.receive()) == ["192.0.2.1"]


async def test_only_so_many_wait() -> None:
    made = served(waiting=3)
    client = Datagrams(made.address)
    made.upstream.go[b"slow"] = asyncio.Event()
    try:
        for _ in range(5):
            client.socket.send(question("slow.example."))
        assert [rcode(await client.receive()) for _ in range(2)] == ["SERVFAIL"] * 2
        assert made.serving.waiting.count == 3
        made.upstream.go[b"slow"].set()
        assert [rcode(await client.receive()) for _ in range(3)] == ["NOERROR"] * 3
        assert made.serving.waiting.count == 0
        assert made.counted("too_many_waiting") == 2
    finally:
        client.close()
        made.close()


async def test_without_upstreams_others_names_fail(server: Served, client: Datagrams) -> None:
    server.serving.asks = None
    assert rcode(await client.ask(question("example.com."))) == "SERVFAIL"


async def test_a_long_reply_is_cut(client: Datagrams, server: Served) -> None:
    server.serving.answers = Answers(zone(200))
    reply = await client.ask(question())
    assert is_truncated(reply)
    assert len(reply) <= 512


async def test_a_change_is_seen_at_once(server: Served, client: Datagrams) -> None:
    assert rcode(await client.ask(question())) == "NOERROR"
    server.serving.answers.zone.drop(NamespacedName("default", "web"))
    assert rcode(await client.ask(question())) == "NXDOMAIN"


async def test_stopped_it_reads_nothing_and_loses_nothing(
    server: Served, client: Datagrams
) -> None:
    server.udp.stop()
    client.socket.send(question(WEB))
    server.udp.start()
    assert addresses(await client.receive()) == [ADDRESS]


async def test_what_the_kernel_dropped_is_counted(server: Served, client: Datagrams) -> None:
    assert server.udp.drops() == 0
    server.udp.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    server.udp.stop()
    for _ in range(200):
        client.socket.send(question())
    assert server.udp.drops() > 100


async def test_nobody_at_port_0_does_no_harm(server: Served, client: Datagrams) -> None:
    server.udp._send(question(), ("127.0.0.1", 0))
    assert server.counted("udp_failed") == 1
    assert addresses(await client.ask(question())) == [ADDRESS]

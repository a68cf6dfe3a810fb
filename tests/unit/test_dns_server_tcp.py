"""The server over TCP, on loopback: framing, order, time-outs, and bounds of what clients hold."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest_asyncio
from tests.unit.dns_server import (
    ADDRESS,
    Served,
    Stream,
    addresses,
    frame,
    is_truncated,
    question,
    rcode,
    served,
    zone,
)
from tests.waiting import until

from vipd.dns.answer import Answers


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Served]:
    made = served()
    yield made
    made.close()


@pytest_asyncio.fixture
async def client(server: Served) -> AsyncIterator[Stream]:
    made = await Stream.to(server.tcp_address)
    yield made
    await made.close()


async def test_questions_one_after_the_other(server: Served, client: Stream) -> None:
    for _ in range(3):
        assert addresses(await client.ask(question())) == [ADDRESS]
    assert server.serving.counters.types() == {"tcp 1 A": 3}


async def test_pipelined_questions(client: Stream) -> None:
    asked = [question() for _ in range(300)]
    client.send(b"".join(map(frame, asked)))
    replies = [await client.receive() for _ in asked]
    assert [one[:2] for one in replies] == [one[:2] for one in asked]


async def test_a_question_in_pieces(client: Stream) -> None:
    whole = frame(question())
    for at in range(len(whole)):
        client.send(whole[at : at + 1])
        await client.writer.drain()
        await asyncio.sleep(0)
    assert addresses(await client.receive()) == [ADDRESS]


async def test_whole_long_replies(server: Served, client: Stream) -> None:
    server.serving.answers = Answers(zone(2000))
    reply = await client.ask(question())
    assert len(addresses(reply)) == 2000
    assert not is_truncated(reply)


async def test_out_of_order(server: Served, client: Stream) -> None:
    server.upstream.go[b"slow"] = asyncio.Event()
    client.send(frame(question("slow.example.")) + frame(question()))
    assert addresses(await client.receive()) == [ADDRESS]
    server.upstream.go[b"slow"].set()
    assert addresses(await client.receive()) == ["192.0.2.1"]


async def test_a_length_of_zero_ends_it(server: Served, client: Stream) -> None:
    client.send(b"\0\0" + frame(question()))
    assert await client.rest() == b""
    assert server.counted("tcp_broken") == 1


async def test_what_is_no_question_ends_it(server: Served, client: Stream) -> None:
    client.send(frame(b"short"))
    assert await client.rest() == b""
    assert len(server.connections) == 0


async def test_half_closed_it_is_still_answered(server: Served, client: Stream) -> None:
    server.upstream.go[b"slow"] = asyncio.Event()
    client.send(frame(question("slow.example.")) + frame(question()))
    client.writer.write_eof()
    assert addresses(await client.receive()) == [ADDRESS]
    server.upstream.go[b"slow"].set()
    assert addresses(await client.receive()) == ["192.0.2.1"]
    assert await client.rest() == b""


async def test_silence_ends_it(server: Served) -> None:
    server.serving.tcp_seconds = (0.05, 60.0, 60.0)
    client = await Stream.to(server.tcp_address)
    assert await client.rest() == b""
    assert server.counted("tcp_idle") == 1
    await client.close()


async def test_after_a_question_it_may_be_silent_for_longer(server: Served) -> None:
    server.serving.tcp_seconds = (60.0, 0.05, 60.0)
    client = await Stream.to(server.tcp_address)
    assert addresses(await client.ask(question())) == [ADDRESS]
    # The timer was set for the first question; it is the idle time that counts from now on.
    (one,) = server.connections._all
    one._due()
    assert await client.rest() == b""
    assert server.counted("tcp_idle") == 1
    await client.close()


async def test_pieces_do_not_keep_it_open(server: Served) -> None:
    server.serving.tcp_seconds = (0.2, 0.2, 60.0)
    client = await Stream.to(server.tcp_address)

    async def trickle() -> None:
        while True:
            client.send(b"\x01")
            await asyncio.sleep(0.01)

    trickling = asyncio.ensure_future(trickle())
    assert await client.rest() == b""
    trickling.cancel()
    assert server.counted("tcp_idle") == 1
    await client.close()


async def test_who_does_not_read_is_not_read_either(server: Served) -> None:
    server.serving.answers = Answers(zone(2000))
    server.serving.tcp_seconds = (60.0, 60.0, 0.2)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, server.tcp_address)
        many = frame(question()) * 1000  # 32 MB of replies
        sending = asyncio.ensure_future(loop.sock_sendall(client, many))
        async with asyncio.timeout(20):
            while not server.counted("tcp_slow"):
                assert all(one._out_bytes < 200_000 for one in server.connections._all)
                assert all(len(one._read) < 200_000 for one in server.connections._all)
                await asyncio.sleep(0.01)
        await asyncio.gather(sending, return_exceptions=True)
    assert len(server.connections) == 0


async def test_only_so_many_questions_of_a_connection_wait(server: Served, client: Stream) -> None:
    server.upstream.go[b"slow"] = asyncio.Event()
    asked = [question("slow.example.") for _ in range(90)]
    client.send(b"".join(map(frame, asked)))
    await until(lambda: server.serving.waiting.count >= 64)
    assert len(server.upstream.asked) == 64
    server.upstream.go[b"slow"].set()
    replies = {(await client.receive())[:2] for _ in asked}
    assert replies == {one[:2] for one in asked}


async def test_of_too_many_the_idlest_goes() -> None:
    server = served(most_of_client=2)
    first, second = [await Stream.to(server.tcp_address) for _ in range(2)]
    await second.ask(question())
    await first.ask(question())
    third = await Stream.to(server.tcp_address)
    assert await second.rest() == b""
    assert addresses(await first.ask(question())) == [ADDRESS]
    assert addresses(await third.ask(question())) == [ADDRESS]
    assert server.counted("tcp_evicted") == 1
    for one in (first, second, third):
        await one.close()
    server.close()


async def test_who_has_most_makes_room() -> None:
    server = served(most=3)
    greedy = [await Stream.to(server.tcp_address, "127.0.0.2") for _ in range(3)]
    for one in greedy:
        await one.ask(question())
    modest = await Stream.to(server.tcp_address, "127.0.0.3")
    assert addresses(await modest.ask(question())) == [ADDRESS]
    assert await greedy[0].rest() == b""
    assert addresses(await greedy[2].ask(question())) == [ADDRESS]
    for one in (*greedy, modest):
        await one.close()
    server.close()


async def test_others_are_told_once_that_they_may_not() -> None:
    server = served(allow=["192.0.2.0/24"])
    client = await Stream.to(server.tcp_address)
    client.send(frame(question()) * 2)
    assert rcode(await client.receive()) == "REFUSED"
    assert await client.rest() == b""
    assert server.counted("tcp_refused") == 1
    await client.close()
    server.close()


async def test_ending_it_answers_what_has_arrived(server: Served, client: Stream) -> None:
    assert addresses(await client.ask(question())) == [ADDRESS]
    server.upstream.go[b"slow"] = asyncio.Event()
    client.send(frame(question("slow.example.")))
    await until(lambda: server.upstream.asked)
    client.send(frame(question()))
    await client.writer.drain()
    server.tcp.stop()
    ending = asyncio.ensure_future(server.connections.finish())
    assert addresses(await client.receive()) == [ADDRESS]
    server.upstream.go[b"slow"].set()
    assert addresses(await client.receive()) == ["192.0.2.1"]
    assert await client.rest() == b""
    await ending


async def test_a_reset_in_the_middle(server: Served) -> None:
    server.upstream.go[b"slow"] = asyncio.Event()
    with socket.socket() as client:
        client.connect(server.tcp_address)
        client.send(frame(question("slow.example.")))
        await until(lambda: server.upstream.asked)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await until(lambda: not len(server.connections) and not server.serving.waiting.count)

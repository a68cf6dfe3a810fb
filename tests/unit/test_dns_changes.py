"""Endpoints that come and go while questions come in: what is acknowledged is what is answered."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import dns.message
from tests.unit.dns_server import Datagrams, Stream, addresses, question

from vipd.dns.facts import EndpointFacts, Kind, ServiceFacts
from vipd.dns.feed import Portion
from vipd.dns.server.listeners import pair
from vipd.dns.server.messages import Begin, Fed, Feed, Serve
from vipd.dns.server.process import Process
from vipd.dns.settings import DnsSettings, Listen
from vipd.proxy.names import parse_address

CHANGES = 300
PEERS = "peers.default.svc.cluster.local."
Ask = Callable[[bytes], Awaitable[bytes]]


def peers(there: set[str]) -> ServiceFacts:
    packed = tuple(sorted(parse_address(one).packed for one in there))
    return ServiceFacts("default", "peers", Kind.HEADLESS, endpoints=(EndpointFacts((), packed),))


async def test_no_answer_is_from_before_an_acknowledged_change() -> None:
    """Each answer is what was so at some moment between its question and itself."""
    chance = random.Random(3)
    every = [f"10.244.0.{last}" for last in range(1, 25)]
    udp, tcp = pair(Listen(parse_address("127.0.0.1"), 0), 1 << 20, fresh=True)
    address = udp.getsockname()
    settings = DnsSettings(forwards=False, reverse=("10.244.0.0/16",))
    process = await Process.start(0, None)
    process.watch(lambda _: None)
    await process.ask(Begin(settings, [("127.0.0.1", address[1])]), [udp, tcp])
    there = set(every[:5])
    history = [frozenset(there)]
    """What was told; the last may not be acknowledged yet."""
    acknowledged = 0
    await process.ask(Feed(Portion(put=(peers(there),)), synced=True))
    await process.ask(Serve())
    answered = asyncio.Semaphore(0)

    async def keep_asking(ask: Ask) -> None:
        while acknowledged < CHANGES:
            since = acknowledged
            said = frozenset(addresses(await ask(question(PEERS))))
            assert said in history[since:], (said, since, history[since:])
            answered.release()

    async def keep_asking_back(ask: Ask) -> None:
        while acknowledged < CHANGES:
            since, one = acknowledged, chance.choice(every)
            reply = await ask(question(parse_address(one).reverse_pointer, "PTR"))
            is_there = bool(dns.message.from_wire(reply).answer)
            assert is_there in [one in those for those in history[since:]], (one, since)
            answered.release()

    clients = [Datagrams(address) for _ in range(3)]
    stream = await Stream.to(address)
    async with asyncio.TaskGroup() as asking:
        for ask in (clients[0].ask, clients[1].ask, stream.ask):
            asking.create_task(keep_asking(ask))
        asking.create_task(keep_asking_back(clients[2].ask))
        for change in range(CHANGES):
            there ^= set(chance.sample(every, chance.choice((1, 1, 1, 2, 8))))
            there = there or {every[0]}
            history.append(frozenset(there))
            told, _ = await process.ask(Feed(Portion(put=(peers(there),))))
            assert isinstance(told, Fed)
            acknowledged += 1
            for _ in range(4 * (change % 2)):  # so that replies are kept ready when the next comes
                await answered.acquire()
    await stream.close()
    for client in clients:
        client.close()
    process.kill()
    await process.gone()
    udp.close()
    tcp.close()

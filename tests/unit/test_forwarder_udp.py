"""The UDP forwarder, with real sockets on loopback."""

import asyncio
import errno
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_network
from random import Random
from typing import Any

import pytest

from vipd.backends import log
from vipd.backends.userspace.forwarder import udp
from vipd.backends.userspace.forwarder.served import Served
from vipd.backends.userspace.forwarder.udp import UdpForwarder
from vipd.backends.userspace.forwarder.udp_sessions import UdpLimits
from vipd.backends.userspace.objects import Forwarding, Place, Surroundings
from vipd.proxy.model import Algorithm
from vipd.proxy.names import Family, Network, Protocol, parse_address
from vipd.proxy.virtualserver import Endpoint

LOOPBACK = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}
LARGEST_IPV4 = 65_507
WAIT_SECONDS = 20


class Client:
    """A UDP socket of a test: a client, or with `echo` an endpoint that names itself."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.bind((host, port))
        self.name = b""
        self.got: list[bytes] = []

    @property
    def at(self) -> tuple[str, int]:
        host, port = self.socket.getsockname()[:2]
        return str(host), int(port)

    @property
    def endpoint(self) -> Endpoint:
        host, port = self.at
        return Endpoint(parse_address(host), port)

    def send(self, data: bytes, place: Place) -> None:
        self.socket.sendto(data, (str(place.address), place.port))

    async def reply(self) -> bytes:
        """Return the next reply; its source must be what was sent to."""
        loop, there = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.socket, there.set)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await there.wait()
        finally:
            loop.remove_reader(self.socket)
        data, self.source = self.socket.recvfrom(1 << 17)
        return data

    async def ask(self, data: bytes, place: Place) -> bytes:
        """Send, and return the reply, after seeing where it came from."""
        self.send(data, place)
        reply = await self.reply()
        assert self.source[:2] == (str(place.address), place.port)
        return reply

    def echo(self, name: bytes = b"") -> None:
        """Answer from now on: `name`, then what was sent."""
        self.name = name
        asyncio.get_running_loop().add_reader(self.socket, self._answer)

    def _answer(self) -> None:
        data, source = self.socket.recvfrom(1 << 17)
        self.got.append(data)
        self.socket.sendto(self.name + data, source)

    def close(self) -> None:
        if self.socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self.socket)
            self.socket.close()


class Bed:
    """A forwarder, and the sockets of a test, all closed at its end."""

    def __init__(self) -> None:
        self.forwarder = UdpForwarder()
        self.served: dict[Place, Served] = {}
        self.closing = ExitStack()

    def limited(self, limits: UdpLimits) -> None:
        self.forwarder = UdpForwarder(limits)

    def client(self, host: str = "127.0.0.1", port: int = 0) -> Client:
        made = Client(host, port)
        self.closing.callback(made.close)
        return made

    def endpoint(self, name: bytes = b"", host: str = "127.0.0.1") -> Client:
        made = self.client(host)
        made.echo(name)
        return made

    def gone(self) -> Endpoint:
        """Return an endpoint that refuses: nobody else here has that address."""
        made = self.client("127.0.0.9")
        at = made.endpoint
        made.close()
        return at

    async def listen(
        self,
        *endpoints: Endpoint,
        family: Family = Family.IPV4,
        algorithm: Algorithm = Algorithm.ROUND_ROBIN,
        allowed_sources: tuple[Network, ...] | None = None,
        affinity_seconds: int | None = None,
        place: Place | None = None,
    ) -> Place:
        host = LOOPBACK[family]
        kind = socket.AF_INET6 if family is Family.IPV6 else socket.AF_INET
        bound = socket.socket(kind, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, place.port if place else 0))
        port = bound.getsockname()[1]
        place = Place(family, Protocol.UDP, parse_address(host), port)
        forwarding = Forwarding(
            owner="default/dns:dns",
            inside=endpoints,
            outside=endpoints,
            algorithm=algorithm,
            allowed_sources=allowed_sources,
            affinity_seconds=affinity_seconds,
        )
        self.served[place] = Served(place, forwarding, Surroundings(), Random(1).random)
        await self.forwarder.listen(place, bound, lambda: self.served[place])
        return place

    def change(
        self,
        place: Place,
        *endpoints: Endpoint,
        allowed_sources: tuple[Network, ...] | None = None,
    ) -> None:
        now = self.served[place].forwarding
        self.served[place].update(
            Forwarding(
                owner=now.owner,
                inside=endpoints,
                outside=endpoints,
                algorithm=now.algorithm,
                allowed_sources=allowed_sources,
            ),
            Surroundings(),
        )

    def connections(self, place: Place) -> int:
        return sum(one.connections for one in self.served[place].told().endpoints)

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while not what():  # noqa: ASYNC110 (there is no event for it)
                await asyncio.sleep(0.001)


@pytest.fixture
async def bed() -> AsyncIterator[Bed]:
    made = Bed()
    yield made
    await made.forwarder.close()
    made.closing.close()
    assert made.forwarder.sessions() == {}
    assert all(made.connections(place) == 0 for place in made.served)


@pytest.mark.parametrize("family", Family)
async def test_there_and_back(bed: Bed, family: Family) -> None:
    endpoint = bed.endpoint(b"I: ", LOOPBACK[family])
    place = await bed.listen(endpoint.endpoint, family=family)
    client = bed.client(LOOPBACK[family])
    assert await client.ask(b"one", place) == b"I: one"
    assert await client.ask(b"two", place) == b"I: two"
    counters = bed.forwarder.counters
    assert (counters.sessions, counters.forwarded, counters.replies) == (1, 2, 2)
    assert counters.by_name()["udp_sessions"] == 1
    assert bed.forwarder.sessions() == {place: 1}
    assert bed.connections(place) == 1


@pytest.mark.parametrize("size", [0, 1, 4097, LARGEST_IPV4])
async def test_datagrams_stay_whole(bed: Bed, size: int) -> None:
    endpoint = bed.endpoint()
    place = await bed.listen(endpoint.endpoint)
    client = bed.client()
    data = os.urandom(size)
    assert await client.ask(data, place) == data, "the first one waits for its session"
    assert await client.ask(data, place) == data


async def test_what_comes_at_once_arrives_in_order(bed: Bed) -> None:
    endpoint = bed.endpoint()
    place = await bed.listen(endpoint.endpoint)
    client = bed.client()
    sent = [b"%d" % number for number in range(20)]
    for one in sent:
        client.send(one, place)
    assert [await client.reply() for _ in sent] == sent
    assert endpoint.got == sent


async def test_each_port_of_a_client_is_a_session(bed: Bed) -> None:
    one, other = bed.endpoint(b"1"), bed.endpoint(b"2")
    place = await bed.listen(one.endpoint, other.endpoint)
    clients = [bed.client() for _ in range(4)]
    names = [await client.ask(b"", place) for client in clients]
    assert sorted(names) == [b"1", b"1", b"2", b"2"]
    assert [await client.ask(b"", place) for client in clients] == names
    assert bed.forwarder.sessions() == {place: 4}


async def test_an_endpoint_that_refuses_costs_the_client_one_datagram(bed: Bed) -> None:
    living = bed.endpoint(b"living")
    place = await bed.listen(bed.gone(), living.endpoint)
    clients = [bed.client(), bed.client()]
    for client in clients:
        client.send(b"", place)
    # One of the two was refused. It sends again, from the same port, and is served.
    await bed.until(lambda: bed.forwarder.counters.refused == 1)
    for client in clients:
        client.send(b"", place)
    for client in clients:
        assert await client.reply() == b"living"
    report = bed.served[place].told()
    assert sorted(one.failures for one in report.endpoints) == [0, 1]
    assert sum(one.set_aside_until is not None for one in report.endpoints) == 1


async def test_the_refusal_is_seen_even_if_the_client_never_sends_again(bed: Bed) -> None:
    place = await bed.listen(bed.gone())
    bed.client().send(b"", place)
    await bed.until(lambda: bed.served[place].told().endpoints[0].failures == 1)
    assert bed.connections(place) == 0


async def test_a_lone_endpoint_that_comes_back_is_found_again(bed: Bed) -> None:
    at = bed.gone()
    place = await bed.listen(at)
    client = bed.client()
    client.send(b"", place)
    await bed.until(lambda: bed.forwarder.counters.refused == 1)
    bed.client(str(at.address), at.port).echo(b"back")
    assert await client.ask(b"", place) == b"back"


async def test_a_client_with_affinity_leaves_an_endpoint_that_refuses(bed: Bed) -> None:
    living = bed.endpoint(b"living")
    place = await bed.listen(bed.gone(), living.endpoint, affinity_seconds=100)
    client = bed.client()
    client.send(b"", place)
    await bed.until(lambda: bool(bed.forwarder.counters.refused or bed.forwarder.counters.replies))
    assert await client.ask(b"", place) == b"living"


async def test_idle_sessions_end(bed: Bed) -> None:
    bed.limited(UdpLimits(idle_seconds=0.02))
    place = await bed.listen(bed.endpoint().endpoint)
    for _ in range(3):
        bed.client().send(b"", place)
    await bed.until(lambda: bed.forwarder.counters.idle == 3)
    assert bed.forwarder.sessions() == {}
    assert bed.connections(place) == 0
    bed.client().send(b"", place)
    await bed.until(lambda: bed.forwarder.counters.sessions == 4)
    bed.forwarder.stop(place)
    await bed.until(lambda: bed.forwarder.sessions() == {})
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind((str(place.address), place.port))


async def test_a_flood_evicts_itself_and_nobody_else(bed: Bed) -> None:
    bed.limited(UdpLimits(most=40, most_of_place=30, most_of_client=100))
    endpoint = bed.endpoint()
    place, other_place = await bed.listen(endpoint.endpoint), await bed.listen(endpoint.endpoint)
    quiet = [bed.client("127.0.0.2") for _ in range(5)]
    elsewhere = [bed.client("127.0.0.3") for _ in range(5)]
    for client in quiet:
        await client.ask(b"", place)
    for client in elsewhere:
        await client.ask(b"", other_place)
    for _ in range(100):
        await bed.client("127.0.0.4").ask(b"", place)
    counters = bed.forwarder.counters
    assert bed.forwarder.sessions() == {place: 30, other_place: 5}
    assert counters.evicted == 100 + 5 - 30
    for client, there in [*((one, place) for one in quiet), *((one, other_place) for one in quiet)]:
        await client.ask(b"", there)
    assert counters.sessions == 100 + 5 + 5 + 5, "only those at the other place are new"
    assert sum(bed.forwarder.sessions().values()) == 40


async def test_a_client_address_has_its_own_bound(bed: Bed) -> None:
    bed.limited(UdpLimits(most_of_client=3))
    endpoint = bed.endpoint()
    place = await bed.listen(endpoint.endpoint)
    clients = [bed.client("127.0.0.4") for _ in range(5)]
    for client in clients:
        await client.ask(b"", place)
    assert bed.forwarder.sessions() == {place: 3}
    await clients[-1].ask(b"", place)
    assert bed.forwarder.counters.sessions == 5


async def test_a_session_moves_when_its_endpoint_leaves(bed: Bed) -> None:
    old, new = bed.endpoint(b"old"), bed.endpoint(b"new")
    place = await bed.listen(old.endpoint)
    client = bed.client()
    assert await client.ask(b"", place) == b"old"
    bed.change(place, old.endpoint, new.endpoint)
    assert await client.ask(b"", place) == b"old", "it stays where it is while it can"
    bed.change(place, new.endpoint)
    assert await client.ask(b"", place) == b"new"
    assert (bed.forwarder.counters.moved, bed.forwarder.counters.sessions) == (1, 1)
    bed.change(place)
    client.send(b"", place)
    await bed.until(lambda: bed.forwarder.counters.unserved == 1)
    assert bed.connections(place) == 0
    bed.change(place, old.endpoint)
    assert await client.ask(b"", place) == b"old"


async def test_sources_that_are_not_allowed(bed: Bed) -> None:
    endpoint = bed.endpoint()
    place = await bed.listen(endpoint.endpoint, allowed_sources=(ip_network("127.0.0.2/32"),))
    good, bad = bed.client("127.0.0.2"), bed.client("127.0.0.3")
    bad.send(b"", place)
    assert await good.ask(b"x", place) == b"x"
    await bed.until(lambda: bed.forwarder.counters.denied == 1)
    bed.change(place, endpoint.endpoint, allowed_sources=(ip_network("127.0.0.3/32"),))
    good.send(b"", place)
    assert await bad.ask(b"y", place) == b"y"
    assert bed.forwarder.counters.denied == 2, "what it had ended too"
    assert bed.forwarder.sessions() == {place: 1}


async def test_cut_ends_the_sessions_of_one_endpoint(bed: Bed) -> None:
    one, other = bed.endpoint(b"1"), bed.endpoint(b"2")
    place = await bed.listen(one.endpoint, other.endpoint)
    for _ in range(4):
        await bed.client().ask(b"", place)
    assert bed.forwarder.cut(place, one.endpoint) == 2
    assert bed.forwarder.cut(place, one.endpoint) == 0
    assert bed.forwarder.sessions() == {place: 2}
    assert bed.connections(place) == 2


async def test_a_place_that_stops_keeps_its_sessions_and_takes_no_new_ones(bed: Bed) -> None:
    endpoint = bed.endpoint()
    place, empty = await bed.listen(endpoint.endpoint), await bed.listen(endpoint.endpoint)
    client = bed.client()
    await client.ask(b"", place)
    bed.forwarder.stop(place)
    bed.forwarder.stop(empty)
    assert bed.forwarder.sessions() == {place: 1}, "nothing holds the empty one"
    bed.client().send(b"", place)
    await bed.until(lambda: bed.forwarder.counters.unserved == 1)
    assert await client.ask(b"still", place) == b"still"
    assert bed.forwarder.cut(place, endpoint.endpoint) == 1
    assert bed.forwarder.sessions() == {}


async def test_a_place_that_comes_back_has_its_sessions_again(bed: Bed) -> None:
    endpoint = bed.endpoint()
    place = await bed.listen(endpoint.endpoint)
    client = bed.client()
    await client.ask(b"", place)
    bed.forwarder.stop(place)
    waiting = bed.client()
    waiting.send(b"waits in the socket before", place)
    assert await bed.listen(endpoint.endpoint, place=place) == place
    assert await waiting.reply() == b"waits in the socket before"
    assert await client.ask(b"x", place) == b"x"
    assert bed.forwarder.sessions() == {place: 2}
    assert bed.connections(place) == 2
    assert bed.served[place].told().so_far == 1, "one of them began before"
    assert bed.forwarder.counters.sessions == 2


async def test_nobody_listens_twice(bed: Bed) -> None:
    place = await bed.listen()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as second, pytest.raises(ValueError):  # noqa: PT011
        await bed.forwarder.listen(place, second, lambda: bed.served[place])


async def test_a_socket_is_handed_over_with_what_waits_in_it(bed: Bed) -> None:
    endpoint = bed.endpoint()
    endpoint_of = endpoint.endpoint
    place = await bed.listen(endpoint_of)
    client = bed.client()
    await client.ask(b"", place)
    asyncio.get_running_loop().remove_reader(endpoint.socket)
    client.send(b"late", place)
    await bed.until(lambda: bed.forwarder.counters.forwarded == 2)
    given = bed.forwarder.hand_over(place)
    assert given is not None
    assert bed.forwarder.hand_over(place) is None
    other = UdpForwarder()
    client.send(b"waiting", place)
    await other.listen(place, given, lambda: bed.served[place])
    try:
        endpoint.echo()
        assert {await client.reply(), await client.reply()} == {b"late", b"waiting"}
        assert other.counters.sessions == 1
    finally:
        await other.close()


async def test_a_socket_without_sessions_is_handed_over_whole(bed: Bed) -> None:
    place = await bed.listen()
    given = bed.forwarder.hand_over(place)
    assert given is not None
    with given:
        assert given.getsockname() == (str(place.address), place.port)
    assert bed.forwarder.sessions() == {}


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Take away what this process may still open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_without_descriptors_datagrams_are_dropped_and_nothing_dies(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs: list[str] = []
    monkeypatch.setattr(log, "write", logs.append)
    endpoint = bed.endpoint()
    place = await bed.listen(endpoint.endpoint)
    old, new, newer = bed.client(), bed.client(), bed.client()
    await old.ask(b"", place)
    with no_descriptors_left():
        new.send(b"", place)
        newer.send(b"", place)
        await bed.until(lambda: bed.forwarder.counters.exhausted == 2)
        assert not any(one.pending for one in bed.served[place]._loads.values())
        assert await old.ask(b"x", place) == b"x"
    (line,) = logs
    assert 'event="no session for UDP"' in line
    assert await new.ask(b"y", place) == b"y"
    assert bed.connections(place) == 2


async def test_an_unreachable_endpoint_is_passed_over_at_once(bed: Bed) -> None:
    living = bed.endpoint(b"living")
    unreachable = Endpoint(parse_address("::ffff:0:0"), 0)  # connect() fails at once
    place = await bed.listen(unreachable, living.endpoint)
    for _ in range(2):
        assert await bed.client().ask(b"", place) == b"living"
    assert bed.forwarder.counters.refused == 1


async def test_where_all_are_unreachable_the_tries_have_an_end(bed: Bed) -> None:
    nowhere = [Endpoint(parse_address("255.255.255.255"), port) for port in range(1, 9)]
    place = await bed.listen(*nowhere)
    client = bed.client()
    client.send(b"", place)
    await bed.until(lambda: bed.forwarder.counters.refused == udp.MOST_TRIES)
    client.send(b"", place)
    await bed.until(lambda: bed.forwarder.counters.refused == udp.MOST_TRIES + 1)
    assert bed.connections(place) == 0


def blocking(bound: socket.socket) -> socket.socket:
    """The same socket as one that came as a descriptor: to Python, it has no time-out."""
    return socket.socket(fileno=bound.detach())


async def test_a_socket_that_is_handed_over_blocks_nobody(bed: Bed) -> None:
    place = await bed.listen(bed.endpoint().endpoint)
    given = bed.forwarder.hand_over(place)
    assert given is not None
    there = blocking(given)
    await bed.forwarder.listen(place, there, lambda: bed.served[place])
    there.settimeout(None)  # whoever shares it can do that
    assert os.get_blocking(there.fileno())
    await bed.client().ask(b"", place)
    given = bed.forwarder.hand_over(place)
    assert given is there
    assert not os.get_blocking(given.fileno())
    given.close()


async def test_a_blocking_socket_is_read_and_answered_as_any_other(bed: Bed) -> None:
    place = await bed.listen(bed.endpoint().endpoint)
    os.set_blocking(bound_of(bed, place).fileno(), True)
    async with asyncio.timeout(WAIT_SECONDS):
        await bed.client().ask(b"x", place)


def bound_of(bed: Bed, place: Place) -> socket.socket:
    bound = bed.forwarder._places[place].bound
    assert bound is not None
    return bound


async def test_the_end_of_a_place_ends_its_sessions_whosever_they_are(bed: Bed) -> None:
    departing, staying = bed.endpoint(b"1"), bed.endpoint(b"2")
    place = await bed.listen(departing.endpoint, bed.gone())
    await bed.client().ask(b"", place)
    bed.client().send(b"", place)
    await bed.until(lambda: bed.forwarder.counters.refused == 1)  # a session without a link
    bed.change(place, staying.endpoint)
    assert bed.forwarder.sessions() == {place: 2}
    bed.forwarder.end(place)
    assert bed.forwarder.sessions() == {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind((str(place.address), place.port))


async def test_a_socket_that_cannot_be_read_leaves_nothing_behind(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = await bed.listen(bed.endpoint().endpoint)
    given = bed.forwarder.hand_over(place)
    assert given is not None
    loop = asyncio.get_running_loop()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "too many watches")

    with monkeypatch.context() as full:
        full.setattr(loop, "add_reader", refuse)
        with pytest.raises(OSError, match="watches"):
            await bed.forwarder.listen(place, given, lambda: bed.served[place])
    assert bed.forwarder.descriptors() == 0
    await bed.forwarder.listen(place, given, lambda: bed.served[place])
    assert await bed.client().ask(b"x", place) == b"x"


class ByInterface(Served):
    """A place that asks where clients came in, and notes what it is told."""

    asks_interface = True

    def __init__(self, *told: Any) -> None:
        super().__init__(*told)
        self.told_of: list[tuple[str, str]] = []

    def came_by(self, client: str, interface: str) -> None:
        self.told_of.append((client, interface))


async def test_a_session_that_moves_still_came_in_where_it_did(bed: Bed) -> None:
    old, new = bed.endpoint(b"old"), bed.endpoint(b"new")
    place = await bed.listen(old.endpoint)
    made = bed.served[place] = ByInterface(
        place, bed.served[place].forwarding, Surroundings(), Random(1).random
    )
    first, client = bed.client(), bed.client("127.0.0.2")
    await first.ask(b"", place)  # the socket tells of what comes after this
    assert await client.ask(b"", place) == b"old"
    made.told_of.clear()
    bed.change(place, new.endpoint)
    assert await client.ask(b"", place) == b"new"
    assert made.told_of == [("127.0.0.2", "lo")]

"""The TCP forwarder, with real sockets on loopback."""

import asyncio
import errno
import os
import random
import resource
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from hashlib import sha256
from typing import Any

import pytest
from msgspec import structs

from vipd.backends import log
from vipd.backends.userspace.forwarder import accepting, connecting, pump
from vipd.backends.userspace.forwarder.proxy_protocol import header
from vipd.backends.userspace.forwarder.streams import PIPE, Forwarded, Frontend, Stream
from vipd.backends.userspace.forwarder.tcp import TcpForwarder
from vipd.backends.userspace.forwarder.tcp_limits import TcpLimits
from vipd.backends.userspace.objects import Forwarding, Place
from vipd.proxy.names import Family, Protocol, parse_address
from vipd.proxy.virtualserver import Endpoint

WAIT_SECONDS = 20
HOSTS = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}
RESETS = struct.pack("ii", 1, 0)


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged, instead of on standard error."""
    written: list[str] = []
    monkeypatch.setattr(log, "write", written.append)
    return written


class Choice:
    """The state of a place: its endpoints one after the other, and what it was told."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = list(endpoints)
        self.forwarding = Forwarding(owner="a/b:c", inside=(), outside=())
        self.allowed = True
        self.open = 0
        self.pending: list[Endpoint] = []
        """Chosen, and not yet known what became of it."""
        self.all = 0
        self.failures: list[Endpoint] = []

    asks_interface = False

    def came_by(self, client: str, interface: str) -> None:
        raise AssertionError("not asked for")

    def allows(self, client: str) -> bool:
        return self.allowed

    def choose(
        self, client: str, client_port: int, now: float, tried: Sequence[Endpoint] = ()
    ) -> Endpoint | None:
        chosen = next((one for one in self.endpoints if one not in tried), None)
        if chosen is not None:
            self.pending.append(chosen)
        return chosen

    def shows(self, client: str, endpoint: Endpoint) -> bool:
        return True

    def began(self, client: str, endpoint: Endpoint, now: float) -> None:
        self.pending.remove(endpoint)
        self.open += 1
        self.all += 1

    def withdrawn(self, endpoint: Endpoint) -> None:
        self.pending.remove(endpoint)

    def takes_over(
        self, client: str, endpoint: Endpoint, now: float, *, pending: bool = False
    ) -> None:
        if pending:
            self.pending.append(endpoint)
        else:
            self.open += 1

    def ended(self, endpoint: Endpoint) -> None:
        self.open -= 1

    def failed(self, endpoint: Endpoint, now: float) -> None:
        self.pending.remove(endpoint)
        self.failures.append(endpoint)


class Peer:
    """One end of a connection, client or endpoint."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            await self.loop.sock_sendall(self.sock, data)

    async def receive(self, count: int) -> bytes:
        """Return `count` bytes, or fewer at the end of the data."""
        data = bytearray()
        async with asyncio.timeout(WAIT_SECONDS):
            while len(data) < count:
                part = await self.loop.sock_recv(self.sock, min(count - len(data), 1 << 16))
                if not part:
                    break
                data += part
        return bytes(data)

    async def rest(self) -> bytes:
        return await self.receive(1 << 40)

    async def is_reset(self) -> bool:
        try:
            await self.rest()
        except ConnectionResetError:
            return True
        return False

    def finish(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
        self.sock.close()

    def close(self) -> None:
        self.sock.close()


class World:
    """A forwarder with one place, in front of endpoints that listen or do not."""

    def __init__(self, family: Family, endpoints: int, limits: TcpLimits) -> None:
        self.loop = asyncio.get_running_loop()
        self.family = family
        self.sockets: list[socket.socket] = []
        self.servers = [self.listener() for _ in range(endpoints)]
        self.choice = Choice([self.endpoint(one) for one in self.servers])
        self.forwarder = TcpForwarder(self.loop, limits)
        listener = self.listener()
        host, self.port = listener.getsockname()[:2]
        self.place = Place(family, Protocol.TCP, parse_address(host), self.port)
        self.forwarder.listen(self.place, listener, lambda: self.choice)

    def listener(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if self.family == Family.IPV6 else socket.AF_INET)
        self.sockets.append(sock)
        sock.setblocking(False)
        sock.bind((HOSTS[self.family], 0))
        sock.listen(512)
        return sock

    def endpoint(self, server: socket.socket) -> Endpoint:
        host, port = server.getsockname()[:2]
        return Endpoint(parse_address(host), port)

    def connect(self) -> Peer:
        """Connect without giving the forwarder a turn: the kernel has done its part then."""
        sock = socket.create_connection((HOSTS[self.family], self.port), WAIT_SECONDS)
        self.sockets.append(sock)
        sock.setblocking(False)
        return Peer(sock)

    async def accept(self, server: int = 0) -> Peer:
        async with asyncio.timeout(WAIT_SECONDS):
            sock, _ = await self.loop.sock_accept(self.servers[server])
        self.sockets.append(sock)
        return Peer(sock)

    async def pair(self) -> tuple[Peer, Peer]:
        client = self.connect()
        return client, await self.accept()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():  # noqa: ASYNC110 (there is no event for it)
                await asyncio.sleep(0)

    async def all_over(self) -> None:
        await self.until(lambda: self.choice.open == 0 and not self.forwarder._pump.held)

    @property
    def counters(self) -> dict[str, int]:
        return self.forwarder.counters.by_name()


@asynccontextmanager
async def world(
    endpoints: int = 1, family: Family = Family.IPV4, limits: TcpLimits | None = None
) -> AsyncIterator[World]:
    made = World(family, endpoints, limits or TcpLimits())
    try:
        yield made
    finally:
        made.forwarder.close()
        for sock in made.sockets:
            sock.close()
    assert (made.choice.open, made.choice.pending) == (0, []), "each choice was given back"


@contextmanager
def few_descriptors(more: int) -> Iterator[None]:
    """Let this process open only `more` descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(one) for one in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(more):
            os.close(taken.pop())
        yield
    finally:
        for one in taken:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("family", list(Family))
def test_request_and_reply_are_forwarded(family: Family) -> None:
    async def run() -> None:
        async with world(family=family) as there:
            client, endpoint = await there.pair()
            for number in range(10):
                await client.send(b"request %d" % number)
                assert await endpoint.receive(9) == b"request %d" % number
                await endpoint.send(b"reply %d" % number)
                assert await client.receive(7) == b"reply %d" % number
            assert there.forwarder.connections() == {there.place: 1}
            client.close()
            assert await endpoint.rest() == b""
            endpoint.close()
            await there.all_over()
            assert there.counters["tcp_ended"] == there.counters["tcp_accepted"] == 1
            assert there.forwarder.connections() == {}

    asyncio.run(run())


def test_client_that_shuts_down_its_writing_side_reads_a_long_reply() -> None:
    async def run() -> None:
        async with world() as there:
            client, endpoint = await there.pair()
            await client.send(b"question")
            client.finish()
            assert await endpoint.rest() == b"question"
            reply = os.urandom(5_000_000)
            sending = asyncio.create_task(endpoint.send(reply))
            assert await client.receive(len(reply)) == reply
            await sending
            endpoint.close()
            assert await client.rest() == b""
            await there.all_over()
            assert there.counters["tcp_ended"] == 1

    asyncio.run(run())


def test_endpoint_that_speaks_first_and_ends_first_hears_the_client_out() -> None:
    async def run() -> None:
        async with world() as there:
            client, endpoint = await there.pair()
            await endpoint.send(b"hello")
            endpoint.finish()
            assert await client.rest() == b"hello"
            await client.send(b"and more")
            client.finish()
            assert await endpoint.rest() == b"and more"
            await there.all_over()

    asyncio.run(run())


def test_reset_of_the_client_resets_the_endpoint() -> None:
    async def run() -> None:
        async with world() as there:
            client, endpoint = await there.pair()
            await client.send(b"x")
            await endpoint.receive(1)
            client.reset()
            assert await endpoint.is_reset()
            await there.all_over()
            assert there.counters["tcp_reset"] == 1

    asyncio.run(run())


def test_endpoint_that_accepts_and_resets_resets_the_client() -> None:
    async def run() -> None:
        async with world() as there:
            client, endpoint = await there.pair()
            await there.until(lambda: there.choice.open == 1)
            endpoint.reset()
            assert await client.is_reset()
            await there.all_over()
            assert there.choice.failures == []

    asyncio.run(run())


@pytest.mark.parametrize("does", ["speaks", "ends", "resets"])
def test_endpoint_that_acts_before_it_is_known_to_be_connected(
    does: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with world() as there:
            connect = there.forwarder._connecting.connect
            endpoints: list[socket.socket] = []

            def connect_and_act(connection: Forwarded) -> None:
                connect(connection)
                sock, _ = there.servers[0].accept()
                there.sockets.append(sock)
                endpoints.append(sock)
                if does == "resets":
                    Peer(sock).reset()
                    return
                sock.send(b"hello")
                if does == "ends":
                    sock.shutdown(socket.SHUT_WR)

            monkeypatch.setattr(there.forwarder._connecting, "connect", connect_and_act)
            client = there.connect()
            if does == "resets":
                assert await client.is_reset()
                return
            assert await client.receive(5) == b"hello"
            if does == "ends":
                assert await client.rest() == b""
            client.finish()
            endpoints[0].setblocking(False)
            assert await Peer(endpoints[0]).rest() == b""

    asyncio.run(run())


def test_bytes_that_came_before_a_reset_arrive() -> None:
    async def run() -> None:
        async with world() as there:
            client, endpoint = await there.pair()
            await endpoint.send(b"too large")
            endpoint.reset()
            assert await client.receive(9) == b"too large"
            assert await client.is_reset()

    asyncio.run(run())


@pytest.mark.parametrize("upwards", [True, False])
@pytest.mark.parametrize("spliced", [True, False])
def test_slow_reader_stops_the_sender_and_gets_every_byte(upwards: bool, spliced: bool) -> None:
    async def run() -> None:
        limits = TcpLimits(most_pipes=8 if spliced else 0)
        async with world(limits=limits) as there:
            client, endpoint = await there.pair()
            sender, reader = (client, endpoint) if upwards else (endpoint, client)
            data = random.Random(1).randbytes(40_000_000)
            sending = asyncio.create_task(sender.send(data))
            digest, got, most = sha256(), 0, 0
            while got < len(data):
                for _ in range(20):  # of the loop, in which nothing is read
                    await asyncio.sleep(0)
                part = await reader.receive(min(1_000_003, len(data) - got))
                digest.update(part)
                got += len(part)
                most = max(most, there.forwarder._pump.held)
            await sending
            assert digest.digest() == sha256(data).digest()
            assert 0 < most <= (PIPE if spliced else pump.LARGE)
            assert (there.forwarder._pump.pipes > 0) == spliced
            sender.finish()
            assert await reader.rest() == b""
            reader.finish()
            await there.all_over()

    asyncio.run(run())


def test_what_is_held_is_let_go_when_a_connection_is_reset() -> None:
    async def run() -> None:
        async with world() as there:
            client, endpoint = await there.pair()
            sending = asyncio.create_task(client.send(bytes(30_000_000)))
            await there.until(lambda: there.forwarder._pump.held > 0)
            endpoint.reset()
            with pytest.raises(ConnectionError):
                await sending
            await there.all_over()
            assert there.forwarder._pump.held == 0
            assert there.forwarder._pump.pipes <= 1

    asyncio.run(run())


def test_when_much_is_held_streams_still_move() -> None:
    async def run() -> None:
        async with world(limits=TcpLimits(most_held=1)) as there:
            stuck, _ = await there.pair()
            sending = asyncio.create_task(stuck.send(bytes(30_000_000)))
            await there.until(lambda: there.forwarder._pump.held > 1)
            client, endpoint = await there.pair()
            data = os.urandom(1_000_000)
            other = asyncio.create_task(client.send(data))
            assert await endpoint.receive(len(data)) == data
            await other
            sending.cancel()

    asyncio.run(run())


def test_next_endpoint_is_tried_when_one_refuses() -> None:
    async def run() -> None:
        async with world(endpoints=3) as there:
            there.servers[0].close()
            there.servers[1].close()
            client = there.connect()
            await client.send(b"x")
            endpoint = await there.accept(2)
            assert await endpoint.receive(1) == b"x"
            assert there.choice.failures == there.choice.endpoints[:2]
            assert there.counters["tcp_connect_failed"] == 2
            assert there.choice.all == 1

    asyncio.run(run())


def full(there: World, server: int) -> None:
    """Fill the queue of a listener, so that nobody else is answered."""
    there.servers[server].listen(0)
    for _ in range(3):
        sock = socket.socket(socket.AF_INET)
        there.sockets.append(sock)
        sock.setblocking(False)
        sock.connect_ex(there.servers[server].getsockname())


def test_next_endpoint_is_tried_when_one_does_not_answer() -> None:
    async def run() -> None:
        limits = TcpLimits(connect_seconds=0.05)
        async with world(endpoints=2, limits=limits) as there:
            full(there, 0)
            client = there.connect()
            await client.send(b"x")
            endpoint = await there.accept(1)
            assert await endpoint.receive(1) == b"x"
            assert there.choice.failures == there.choice.endpoints[:1]

    asyncio.run(run())


def test_attempts_are_bounded_and_then_the_client_is_reset() -> None:
    async def run() -> None:
        limits = TcpLimits(attempts=2, connect_seconds=0.05)
        async with world(endpoints=3, limits=limits) as there:
            full(there, 0)
            there.servers[1].close()
            client = there.connect()
            assert await client.is_reset()
            assert there.choice.failures == there.choice.endpoints[:2]
            assert there.counters["tcp_refused"] == 1
            assert there.choice.all == 0

    asyncio.run(run())


@pytest.mark.parametrize("why", ["refused", "denied"])
def test_client_without_an_endpoint_or_not_allowed_is_reset(why: str) -> None:
    async def run() -> None:
        async with world(endpoints=0 if why == "refused" else 1) as there:
            there.choice.allowed = why != "denied"
            client = there.connect()
            assert await client.is_reset()
            assert there.counters[f"tcp_{why}"] == 1
            assert there.forwarder.connections() == {}

    asyncio.run(run())


@pytest.mark.parametrize("family", list(Family))
def test_endpoint_is_told_the_client_first(family: Family) -> None:
    async def run() -> None:
        async with world(family=family) as there:
            forwarding = there.choice.forwarding
            there.choice.forwarding = structs.replace(forwarding, proxy_protocol=True)
            client, endpoint = await there.pair()
            host, port = client.sock.getsockname()[:2]
            expected = header(parse_address(host), port, there.place.address, there.port)
            assert await endpoint.receive(len(expected)) == expected
            await client.send(b"x")
            assert await endpoint.receive(1) == b"x"

    asyncio.run(run())


def test_header_is_as_specified() -> None:
    four = header(parse_address("192.0.2.1"), 0x1234, parse_address("198.51.100.2"), 443)
    assert four == (
        b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x01\xc6\x33\x64\x02\x12\x34\x01\xbb"
    )
    six = header(parse_address("2001:db8::1"), 1, parse_address("2001:db8::2"), 65535)
    assert six[12:16] == b"\x21\x21\x00\x24"
    assert six[16:32] == bytes.fromhex("20010db8000000000000000000000001")
    assert six[-4:] == b"\x00\x01\xff\xff"
    assert len(six) == 52
    with pytest.raises(ValueError, match="family"):
        header(parse_address("192.0.2.1"), 1, parse_address("2001:db8::2"), 2)


def test_stop_takes_what_waits_and_connections_go_on() -> None:
    async def run() -> None:
        async with world() as there:
            client, endpoint = await there.pair()
            waiting = there.connect()
            there.forwarder.stop(there.place)
            await there.accept()
            with pytest.raises(ConnectionRefusedError):
                there.connect()
            await client.send(b"x")
            assert await endpoint.receive(1) == b"x"
            await there.until(lambda: there.forwarder.connections() == {there.place: 2})
            waiting.close()
            client.reset()
            endpoint.close()
            await there.until(lambda: there.forwarder.connections()[there.place] == 1)
            assert there.forwarder.hand_over(there.place) is None

    asyncio.run(run())


def test_place_is_forgotten_with_its_last_connection_and_can_be_served_again() -> None:
    async def run() -> None:
        async with world() as there:
            client, endpoint = await there.pair()
            listener = there.forwarder.hand_over(there.place)
            assert listener is not None
            assert listener.fileno() >= 0
            await there.until(lambda: there.choice.open == 1)
            client.reset()
            assert await endpoint.is_reset()
            await there.until(lambda: there.forwarder.connections() == {})
            there.forwarder.listen(there.place, listener, lambda: there.choice)
            with pytest.raises(ValueError, match="already"):
                there.forwarder.listen(there.place, listener, lambda: there.choice)
            client, endpoint = await there.pair()
            await client.send(b"x")
            assert await endpoint.receive(1) == b"x"

    asyncio.run(run())


def test_a_place_that_comes_back_counts_the_connections_that_it_has() -> None:
    """Also those that wait for an endpoint, or for a descriptor, which go by what is new."""

    async def run() -> None:
        async with world(endpoints=2, limits=TcpLimits(pause_seconds=0.01)) as there:
            client, endpoint = await there.pair()
            await there.until(lambda: there.choice.open == 1)
            full(there, 0)
            waiting = there.connect()
            await there.until(lambda: len(there.choice.pending) == 1)
            listener = there.forwarder.hand_over(there.place)
            assert listener is not None
            before, there.choice = there.choice, Choice(there.choice.endpoints)
            there.forwarder.listen(there.place, listener, lambda: there.choice)
            assert (before.open, before.pending) == (0, [])
            assert (there.choice.open, there.choice.pending) == (1, [before.endpoints[0]])
            assert there.choice.all == 0, "nothing began here"
            there.choice.endpoints.pop(0)
            await waiting.send(b"x")
            assert await (await there.accept(1)).receive(1) == b"x"
            client.reset()
            assert await endpoint.is_reset()
            await there.until(lambda: there.choice.open == 1)

    asyncio.run(run())


def test_a_listener_that_comes_back_to_the_same_state_counts_nothing_twice() -> None:
    async def run() -> None:
        async with world() as there:
            await there.pair()
            await there.until(lambda: there.choice.open == 1)
            listener = there.forwarder.hand_over(there.place)
            assert listener is not None
            there.forwarder.listen(there.place, listener, lambda: there.choice)
            assert there.choice.open == 1

    asyncio.run(run())


def test_cut_resets_the_connections_to_one_endpoint_at_both_ends() -> None:
    async def run() -> None:
        async with world(endpoints=2) as there:
            client, endpoint = await there.pair()
            there.choice.endpoints.reverse()
            other = there.connect()
            other_endpoint = await there.accept(1)
            await there.until(lambda: there.choice.open == 2)
            gone = structs.replace(there.choice.endpoints[1], weight=7)
            assert there.forwarder.cut(there.place, gone) == 1
            assert await client.is_reset()
            assert await endpoint.is_reset()
            await other.send(b"x")
            assert await other_endpoint.receive(1) == b"x"
            assert there.forwarder.cut(there.place, gone) == 0
            assert there.counters["tcp_cut"] == 1

    asyncio.run(run())


def test_close_resets_everything() -> None:
    async def run() -> None:
        async with world() as there:
            client, endpoint = await there.pair()
            await there.until(lambda: there.choice.open == 1)
            there.forwarder.close()
            assert await client.is_reset()
            assert await endpoint.is_reset()
            with pytest.raises(ConnectionRefusedError):
                there.connect()
            there.forwarder.close()

    asyncio.run(run())


def test_at_the_most_connections_clients_wait_their_turn() -> None:
    async def run() -> None:
        async with world(limits=TcpLimits(most=2, of_client=1, pause_seconds=1000)) as there:
            clients = [there.connect() for _ in range(5)]
            endpoints = [await there.accept() for _ in range(2)]
            await there.until(lambda: there.counters["tcp_accept_paused"] == 1)
            assert there.counters["tcp_accepted"] == 2
            for client in clients:
                client.close()
            for _ in range(3):
                endpoints.pop(0).close()
                endpoints.append(await there.accept())
            for endpoint in endpoints:
                endpoint.close()
            await there.all_over()
            assert there.counters["tcp_accepted"] == there.counters["tcp_ended"] == 5

    asyncio.run(run())


def test_both_ends_are_probed_within_minutes_of_silence() -> None:
    async def run() -> None:
        async with world() as there:
            await there.pair()
            ((one,),) = there.forwarder._established.values()
            for sock in (one.request.source, one.reply.source):
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                times = [
                    sock.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                ]
                assert times == [300, 30, 4]

    asyncio.run(run())


def test_the_end_of_a_shortage_is_told_as_its_beginning_was(logs: list[str]) -> None:
    async def run() -> None:
        limits = TcpLimits(most=1, of_client=1, pause_seconds=0.01, quiet_seconds=0.1)
        async with world(limits=limits) as there:
            first, _ = [there.connect() for _ in range(2)]
            endpoint = await there.accept()
            await there.until(lambda: there.counters["tcp_accept_paused"] >= 3)
            assert ["accept is paused" in line for line in logs] == [True]
            first.close()
            endpoint.close()
            await there.accept()
            await there.until(lambda: len(logs) == 2)
            assert "accept goes on again" in logs[1]

    asyncio.run(run())


@pytest.mark.parametrize("more", range(1, 6))
def test_descriptors_run_out_and_nobody_is_lost(more: int, logs: list[str]) -> None:
    async def run() -> None:
        async with world(limits=TcpLimits(pause_seconds=0.01)) as there:
            clients = [there.connect() for _ in range(8)]
            with few_descriptors(more):
                await there.until(lambda: there.counters["tcp_accept_paused"] >= 2)
            endpoints = [await there.accept() for _ in clients]
            (line,) = logs
            assert 'event="accept is paused" lack_of=EMFILE' in line
            assert " files=" in line
            assert there.forwarder.is_full
            for client, endpoint in zip(clients, endpoints, strict=True):
                client.close()
                assert await endpoint.rest() == b""
                endpoint.close()
            await there.all_over()
            assert there.counters["tcp_ended"] == 8
            assert there.counters["tcp_refused"] == 0

    asyncio.run(run())


def test_who_waits_too_long_for_a_descriptor_is_reset() -> None:
    async def run() -> None:
        limits = TcpLimits(pause_seconds=0.01, connect_seconds=0.05)
        async with world(limits=limits) as there:
            client = there.connect()
            with few_descriptors(1):
                assert await client.is_reset()
            assert there.counters["tcp_refused"] == 1
            client, endpoint = await there.pair()
            await client.send(b"x")
            assert await endpoint.receive(1) == b"x"

    asyncio.run(run())


def test_an_error_inside_ends_its_connection_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with world() as there:
            client, endpoint = await there.pair()
            other, other_endpoint = await there.pair()
            move = there.forwarder._pump.move

            def broken(stream: Stream) -> int:
                if stream.source.getpeername() == client.sock.getsockname():
                    raise KeyError("never")
                return move(stream)

            monkeypatch.setattr(there.forwarder._pump, "move", broken)
            await client.send(b"x")
            assert await endpoint.is_reset()
            await other.send(b"x")
            assert await other_endpoint.receive(1) == b"x"
            assert there.counters["tcp_failed_inside"] == 1

    asyncio.run(run())


def test_many_connections_at_once_are_whole_whatever_others_do() -> None:
    async def run() -> None:
        async with world() as there:
            lots = random.Random(7)

            async def serve(endpoint: Peer) -> None:
                try:
                    length = int.from_bytes(await endpoint.receive(4), "big")
                    data = await endpoint.receive(length)
                    if lots.random() < 0.2:
                        endpoint.reset()
                        return
                    await endpoint.send(sha256(data).digest() + data[::-1])
                except ConnectionError:
                    return
                endpoint.close()

            async def ask() -> bool:
                client = there.connect()
                data = lots.randbytes(lots.choice([0, 1, 100, 16384, 70_000, 1_000_000]))
                try:
                    await client.send(len(data).to_bytes(4, "big") + data)
                    if lots.random() < 0.2:
                        client.reset()
                        return False
                    client.finish()
                    reply = await client.rest()
                except ConnectionError:
                    return False
                assert reply == sha256(data).digest() + data[::-1]
                return True

            asking = asyncio.gather(*(ask() for _ in range(150)))
            async with asyncio.TaskGroup() as serving:
                for _ in range(150):
                    serving.create_task(serve(await there.accept()))
            whole = await asking
            assert 50 < sum(whole) < 150
            await there.all_over()
            over = there.counters["tcp_ended"] + there.counters["tcp_reset"]
            assert over == there.counters["tcp_accepted"] == 150
            assert there.forwarder._pump.pipes <= 1
            assert all(one is None for one in there.forwarder._events._streams)

    asyncio.run(run())


def test_a_listener_out_of_order_does_not_disturb_others(logs: list[str]) -> None:
    async def run() -> None:
        async with world() as there:
            listener = socket.socket()
            there.sockets.append(listener)
            listener.bind(("127.0.0.1", 0))
            listener.setblocking(False)
            port = listener.getsockname()[1]
            place = Place(Family.IPV4, Protocol.TCP, parse_address("127.0.0.1"), port)
            there.forwarder.listen(place, listener, lambda: there.choice)
            client, endpoint = await there.pair()
            await client.send(b"x")
            assert await endpoint.receive(1) == b"x"
            (line,) = logs
            assert 'event="a listener is out of order"' in line
            there.forwarder.stop(place)
            assert set(there.forwarder.connections()) == {there.place}

    asyncio.run(run())


def test_listeners_that_are_busy_do_not_starve_others() -> None:
    async def run() -> None:
        limits = TcpLimits(accepts_at_once=1)
        async with world(limits=limits) as there:
            listener = there.listener()
            host, port = listener.getsockname()[:2]
            place = Place(Family.IPV4, Protocol.TCP, parse_address(host), port)
            busy = [there.connect() for _ in range(30)]
            there.forwarder.listen(place, listener, lambda: there.choice)
            sock = socket.create_connection((host, port))
            there.sockets.append(sock)
            started: list[Frontend] = []
            start = there.forwarder._accepting._start

            def note(at: int, descriptor: int, client: tuple[str, int]) -> None:
                started.append(there.forwarder._by_listener[at])
                start(at, descriptor, client)

            there.forwarder._accepting._start = note
            await there.until(lambda: there.counters["tcp_accepted"] == len(busy) + 1)
            places = [one.place for one in started]
            assert place in places[:3]

    asyncio.run(run())


@pytest.mark.parametrize("who", ["client", "endpoint"])
@pytest.mark.parametrize("last", [b"", b"last words"], ids=["silently", "with-last-words"])
@pytest.mark.parametrize("ends", [False, True], ids=["resets", "ends-and-resets"])
def test_a_reset_that_a_write_meets_first_is_no_end(who: str, last: bytes, ends: bool) -> None:
    async def run() -> None:
        async with world() as there:
            client, endpoint = await there.pair()
            await there.until(lambda: there.choice.open == 1)
            breaking, other = (client, endpoint) if who == "client" else (endpoint, client)
            other.sock.send(b"unheard")  # its event comes first, and nobody has seen it yet
            breaking.sock.send(last)
            if ends:
                breaking.finish()
            breaking.reset()
            assert await other.receive(len(last)) == last
            if ends:
                assert await other.receive(1) == b"", "as with a direct connection"
            else:
                assert await other.is_reset()
            await there.all_over()
            assert there.counters["tcp_reset"] == 1
            assert all(one is None for one in there.forwarder._events._streams)

    asyncio.run(run())


class Unconnected(socket.SocketType):
    """Sockets that this node's kernel does not connect to the first endpoint, and why."""

    problem = 0
    port = 0

    def connect_ex(self, address: Any, /) -> int:
        return self.problem if address[1] == self.port else super().connect_ex(address)


@pytest.mark.parametrize(
    ("problem", "counter"),
    [
        (errno.EADDRNOTAVAIL, "tcp_no_local_port"),
        (errno.ENOBUFS, "tcp_not_connected"),
        (errno.EPERM, "tcp_not_connected"),
    ],
)
def test_what_is_no_fault_of_the_endpoint_is_not_held_against_it(
    problem: int, counter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with world(endpoints=2) as there:
            monkeypatch.setattr(Unconnected, "problem", problem)
            monkeypatch.setattr(Unconnected, "port", there.choice.endpoints[0].port)
            monkeypatch.setattr(socket, "SocketType", Unconnected)
            client = there.connect()
            await client.send(b"x")
            assert await (await there.accept(1)).receive(1) == b"x"
            del there.choice.endpoints[1]
            assert await there.connect().is_reset()
            assert there.choice.failures == []
            assert there.counters[counter] == 2
            assert there.counters["tcp_connect_failed"] == 0
            assert there.counters["tcp_refused"] == 1

    asyncio.run(run())


def test_who_is_being_connected_counts_as_a_connection() -> None:
    async def run() -> None:
        async with world() as there:
            full(there, 0)
            there.connect()
            await there.until(lambda: there.counters["tcp_accepted"] == 1)
            assert there.forwarder.connections() == {there.place: 1}

    asyncio.run(run())


def connection_of(there: World, sock: socket.socket, endpoint: Endpoint) -> Forwarded:
    frontend = Frontend(there.place, lambda: there.choice)
    made = Forwarded(frontend, sock, ("127.0.0.1", 1), 1)
    made.endpoint, made.reply.source = endpoint, sock
    return made


@pytest.mark.parametrize("family", list(Family))
def test_a_socket_that_met_itself_is_no_connection_whatever_its_port(family: Family) -> None:
    async def run() -> None:
        async with world(family=family) as there:
            sock = socket.socket(socket.AF_INET6 if family == Family.IPV6 else socket.AF_INET)
            there.sockets.append(sock)
            lots = random.Random(3)
            while not sock.getsockname()[1]:
                with suppress(OSError):
                    sock.bind((HOSTS[family], lots.randrange(20_000, 30_000)))
            sock.connect(sock.getsockname())
            itself = there.endpoint(sock)
            assert connecting._is_to_itself(connection_of(there, sock, itself))
            other = Endpoint(parse_address("192.0.2.1"), itself.port)
            assert not connecting._is_to_itself(connection_of(there, sock, other))

    asyncio.run(run())


def test_a_socket_that_was_reset_already_has_not_met_itself() -> None:
    async def run() -> None:
        async with world() as there:
            sock = socket.create_connection(there.servers[0].getsockname())
            there.sockets.append(sock)
            (await there.accept()).reset()
            endpoint = there.choice.endpoints[0]
            assert not connecting._is_to_itself(connection_of(there, sock, endpoint))

    asyncio.run(run())


def test_clients_that_go_on_coming_do_not_keep_a_listener_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        async with world() as there:
            start = there.forwarder._accepting._start

            def start_and_come(at: int, descriptor: int, client: tuple[str, int]) -> None:
                start(at, descriptor, client)
                there.connect()

            monkeypatch.setattr(accepting, "MOST_WAITING", 5)
            there.forwarder._accepting._start = start_and_come
            there.connect()
            there.forwarder.stop(there.place)
            assert there.counters["tcp_accepted"] == 5

    asyncio.run(run())


def test_a_client_has_its_share_and_leaves_the_rest_to_others(logs: list[str]) -> None:
    async def run() -> None:
        limits = TcpLimits(most=5, of_client=0.5)
        async with world(limits=limits) as there:
            first, endpoint = await there.pair()
            for _ in range(2):
                await there.pair()
            for _ in range(2):
                assert await there.connect().is_reset()
            other = socket.create_connection(
                ("127.0.0.1", there.port), source_address=("127.0.0.2", 0)
            )
            there.sockets.append(other)
            await there.accept()
            first.close()
            endpoint.close()
            await there.until(lambda: there.choice.open == 3)
            again, endpoint = await there.pair()
            await again.send(b"x")
            assert await endpoint.receive(1) == b"x"
            assert there.counters["tcp_over_share"] == 2
            (line,) = logs
            assert 'event="a client has too many connections" client=127.0.0.1' in line

    asyncio.run(run())


def test_a_listener_that_cannot_be_taken_leaves_nothing_behind() -> None:
    async def run() -> None:
        async with world() as there:
            mine = next(iter(there.forwarder._by_listener.values())).listener
            assert mine is not None
            other = there.listener()
            host, port = other.getsockname()[:2]
            place = Place(Family.IPV4, Protocol.TCP, parse_address(host), port)
            with pytest.raises(FileExistsError):
                there.forwarder.listen(place, mine, lambda: there.choice)
            assert there.forwarder.hand_over(place) is None
            there.forwarder.listen(place, other, lambda: there.choice)
            for at in (there.port, port):
                there.sockets.append(socket.create_connection((host, at)))
                await there.accept()

    asyncio.run(run())


@pytest.mark.parametrize(("ports", "asked"), [(range(0), 0), (range(1 << 16), 1)])
def test_only_where_the_port_may_be_a_source_port_a_socket_is_asked_whom_it_met(
    monkeypatch: pytest.MonkeyPatch, ports: range, asked: int
) -> None:
    async def run() -> None:
        met: list[Forwarded] = []
        monkeypatch.setattr(connecting, "_local_ports", lambda: ports)
        monkeypatch.setattr(connecting, "_is_to_itself", met.append)
        async with world() as there:
            client = there.connect()
            await client.send(b"x")
            assert await (await there.accept()).receive(1) == b"x"
            assert len(met) == asked

    asyncio.run(run())


def test_source_ports_are_those_of_the_kernel() -> None:
    ports = connecting._local_ports()
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert server.getsockname()[1] in ports
    assert 80 not in ports


class Ends:
    """A source that has this to read, and then an error."""

    def __init__(self, data: bytes, error: OSError) -> None:
        self._data = data
        self._error = error

    def recv(self, size: int, flags: int) -> bytes:
        data, self._data = self._data, b""
        if not data:
            raise self._error
        return data


@pytest.mark.parametrize("error", [BlockingIOError(), ConnectionResetError()])
def test_what_was_to_go_with_the_end_goes_without_one(error: OSError) -> None:
    """A reset may come after the end, and urgent data hides what is behind it."""

    async def run() -> None:
        async with world() as there:
            sink = socket.create_connection(there.servers[0].getsockname())
            there.sockets.append(sink)
            stream = connection_of(there, sink, there.choice.endpoints[0]).request
            stream.source = Ends(b"last", error)  # type: ignore[assignment]
            stream.sink, stream.hung = sink, True
            other = await there.accept()
            pump.Pump(TcpLimits()).move(stream, pump.LAST)
            sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
            sink.close()  # which loses what is not on its way
            assert await other.receive(4) == b"last"

    asyncio.run(run())

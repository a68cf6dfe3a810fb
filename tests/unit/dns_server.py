"""What the tests of the DNS server share: names, questions, and a server in this process."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

import dns.flags
import dns.message
import dns.rcode

from vipd.dns.answer import Answers
from vipd.dns.facts import ServiceFacts
from vipd.dns.forward.got import Got
from vipd.dns.server.access import Access, Refusals
from vipd.dns.server.counters import Counters
from vipd.dns.server.serving import Serving
from vipd.dns.server.tcp import Connections, TcpServer
from vipd.dns.server.udp import UdpServer
from vipd.dns.server.waiting import Waiting
from vipd.dns.zone import Zone
from vipd.proxy.names import parse_address, parse_network

WEB = "web.default.svc.cluster.local."
ADDRESS = "10.96.0.1"
Client = tuple[str, int]


def zone(addresses: int = 1) -> Zone:
    """A zone with one Service."""
    made = Zone()
    first = int(parse_address(ADDRESS))
    made.put(
        ServiceFacts(
            "default",
            "web",
            cluster_ips=tuple((first + n).to_bytes(4) for n in range(addresses)),
            ports=(("http", "tcp", 80),),
        )
    )
    made.synced = True
    return made


class Upstream:
    """Answers what is forwarded, when it is let go, with the name as it was asked."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.go: dict[bytes, asyncio.Event] = {}
        """Names that have to wait, by their first label."""

    def cached(
        self, name: bytes, qtype: int, *, dnssec: bool = False, checking_disabled: bool = False
    ) -> Got | None:
        """Nothing is known by heart."""
        return None

    async def ask(
        self,
        name: bytes,
        qtype: int,
        *,
        dnssec: bool = False,
        checking_disabled: bool = False,
        client: str | None = None,
    ) -> Got:
        self.asked.append(name)
        event = self.go.get(name[1 : 1 + name[0]])
        if event is not None:
            await event.wait()
        question = name + struct.pack("!HH", qtype, 1)
        record = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + bytes([192, 0, 2, 1])
        return Got(struct.pack("!6H", 0, 0x8180, 1, 1, 0, 0) + question + record)


class Served(NamedTuple):
    """A server in this process."""

    serving: Serving
    udp: UdpServer
    tcp: TcpServer
    connections: Connections
    upstream: Upstream

    @property
    def address(self) -> Client:
        """Where it answers over UDP."""
        host, port = self.udp.listener.getsockname()[:2]
        return host, port

    @property
    def tcp_address(self) -> Client:
        """Where it answers over TCP."""
        host, port = self.tcp.listener.getsockname()[:2]
        return host, port

    def counted(self, name: str) -> int:
        """Return a counter."""
        return self.serving.counters.by_name[name]

    def close(self) -> None:
        """End it."""
        self.udp.stop()
        self.tcp.stop()
        self.connections.close()
        self.udp.listener.close()
        self.tcp.listener.close()


def served(
    answers_from: Zone | None = None,
    *,
    allow: Sequence[str] = ("127.0.0.0/8",),
    refusals: int = 1000,
    most: int = 100,
    most_of_client: int = 100,
    waiting: int = 100,
) -> Served:
    """Start a server on loopback."""
    counters = Counters()
    now = asyncio.get_running_loop().time()
    serving = Serving(
        Answers(answers_from or zone()),
        Access(map(parse_network, allow)),
        Refusals(refusals, now),
        Waiting(waiting, waiting, counters),
        counters,
    )
    upstream = Upstream()
    serving.asks = upstream
    connections = Connections(most, most_of_client, serving)
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 0))
    streams = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    streams.bind(("127.0.0.1", 0))
    streams.listen(128)
    made = Served(
        serving,
        UdpServer(datagrams, serving),
        TcpServer(streams, serving, connections),
        connections,
        upstream,
    )
    made.udp.start()
    made.tcp.start()
    return made


def question(name: str = WEB, kind: str = "A") -> bytes:
    """A question as bytes."""
    return dns.message.make_query(name, kind).to_wire()


def frame(data: bytes) -> bytes:
    """A message as it is over TCP."""
    return len(data).to_bytes(2) + data


def addresses(reply: bytes) -> list[str]:
    """The addresses in a reply."""
    return sorted(
        str(one) for rrset in dns.message.from_wire(reply).answer for one in rrset.to_rdataset()
    )


def rcode(reply: bytes) -> str:
    """The rcode of a reply."""
    return dns.rcode.to_text(dns.message.from_wire(reply).rcode())


def is_truncated(reply: bytes) -> bool:
    """Whether there is more over TCP."""
    return bool(dns.message.from_wire(reply).flags & dns.flags.TC)


class Datagrams:
    """A client over UDP."""

    def __init__(self, server: Client, source: str = "127.0.0.1") -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind((source, 0))
        self.socket.connect(server)

    async def ask(self, data: bytes) -> bytes:
        """Send a question and return its reply."""
        self.socket.send(data)
        return await self.receive()

    async def receive(self) -> bytes:
        """Return the next reply."""
        async with asyncio.timeout(20):
            return await asyncio.get_running_loop().sock_recv(self.socket, 65535)

    def close(self) -> None:
        """Ask no more."""
        self.socket.close()


class Stream:
    """A client over TCP."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, server: Client, source: str = "127.0.0.1") -> "Stream":
        """Connect."""
        reader, writer = await asyncio.open_connection(*server, local_addr=(source, 0))
        return cls(reader, writer)

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)

    async def receive(self) -> bytes:
        """Return the next reply."""
        async with asyncio.timeout(20):
            length = int.from_bytes(await self.reader.readexactly(2))
            return await self.reader.readexactly(length)

    async def ask(self, data: bytes) -> bytes:
        """Send a question and return its reply."""
        self.send(frame(data))
        return await self.receive()

    async def rest(self) -> bytes:
        """Return what comes until the other side ends, in order or not."""
        async with asyncio.timeout(20):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def close(self) -> None:
        """End it."""
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

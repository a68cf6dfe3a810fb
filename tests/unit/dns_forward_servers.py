"""Name servers of tests, on loopback: they answer what a test says, hostile things included.

Lives here: those servers, short ways to write what they say, and a forwarder that asks them.
Must not: test anything.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

from vipd.dns import names
from vipd.dns.forward import wire as of
from vipd.dns.forward.forwarder import Forwarder
from vipd.dns.forward.got import Got
from vipd.dns.forward.settings import ForwardSettings, Policy
from vipd.dns.tails import joined

HOST = "127.0.0.1"
WAIT_SECONDS = 20.0


class Asked(NamedTuple):
    """A query that came."""

    data: bytes
    message: dns.message.Message
    tcp: bool

    @property
    def name(self) -> str:
        """As it was spelled."""
        return self.message.question[0].name.to_text()

    @property
    def type(self) -> str:
        return dns.rdatatype.to_text(self.message.question[0].rdtype)


Script = Callable[[Asked], "bytes | list[bytes] | None"]
"""Returns what is sent back; None is nothing."""
CLOSE = [b""]
"""Over TCP: the connection is closed."""


def reply(
    asked: Asked,
    *answer: str,
    authority: tuple[str, ...] = (),
    rcode: str = "NOERROR",
    flags: int = dns.flags.RA,
) -> dns.message.Message:
    """A reply with records, each written as NAME TTL TYPE DATA; @ is the name that was asked."""
    made = dns.message.make_response(asked.message)
    made.flags |= flags
    made.request_payload = 65_535  # as long as it takes, whatever the query allows
    made.set_rcode(dns.rcode.from_text(rcode))
    name = asked.message.question[0].name
    for section, texts in ((made.answer, answer), (made.authority, authority)):
        for text in texts:
            owner, ttl, kind, data = text.split(maxsplit=3)
            whole = name if owner == "@" else dns.name.from_text(owner)
            one = dns.rrset.from_text(whole, int(ttl), "IN", kind, data)
            there = next(
                (s for s in section if s.match(one.name, one.rdclass, one.rdtype, one.covers)), None
            )
            if there is None:
                section.append(one)
            else:
                there.update(one)  # type: ignore[no-untyped-call]
    return made


def says(*answer: str, **more: object) -> Script:
    """A script that always says the same."""
    return lambda asked: reply(asked, *answer, **more).to_wire()  # type: ignore[arg-type]


def truncated(asked: Asked) -> bytes:
    return reply(asked, flags=dns.flags.RA | dns.flags.TC).to_wire()


class Server:
    """A name server over UDP and TCP at one port. `asked` has all that came."""

    def __init__(self, script: Script, *, tcp: bool = True) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.sources: list[tuple[str, int]] = []
        """Where datagrams came from, in their order."""
        self.connections = 0
        self.open_connections = 0
        self._came = asyncio.Event()
        self._udp, self._tcp = _pair()
        self._listens = tcp
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def text(self) -> str:
        """As a setting."""
        host, port = self._udp.getsockname()
        return f"{host}:{port}"

    @property
    def at(self) -> tuple[str, int]:
        host, port = self._udp.getsockname()
        return str(host), int(port)

    def questions(self, *, tcp: bool | None = None) -> list[str]:
        """Names in lower case, without those that look for loops."""
        return [
            one.name.lower() for one in self.asked if one.type != "HINFO" and tcp in (None, one.tcp)
        ]

    async def was_asked(self, count: int = 1) -> None:
        """Wait until so many questions came."""
        async with asyncio.timeout(WAIT_SECONDS):
            while len(self.asked) < count:
                self._came.clear()
                await self._came.wait()

    def send(self, data: bytes, to: tuple[str, int]) -> None:
        self._udp.sendto(data, to)

    async def __aenter__(self) -> "Server":
        loop = asyncio.get_running_loop()
        loop.add_reader(self._udp, self._datagram)
        if self._listens:
            self._server = await asyncio.start_server(self._connection, sock=self._tcp)
        return self

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._udp)
        self._udp.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listens:
            self._server.close()
        self._tcp.close()

    def _answers(self, data: bytes, *, tcp: bool) -> list[bytes]:
        asked = Asked(data, dns.message.from_wire(data), tcp)
        self.asked.append(asked)
        self._came.set()
        found = self.script(asked)
        if found is None:
            return []
        return [found] if isinstance(found, bytes) else found

    def _datagram(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, source = self._udp.recvfrom(65_535)
                self.sources.append(source)
                for one in self._answers(data, tcp=False):
                    self._udp.sendto(one, source)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(2), "big")
                found = self._answers(await reader.readexactly(size), tcp=True)
                if found == CLOSE:
                    return
                for one in found:
                    writer.write(len(one).to_bytes(2, "big") + one)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self.open_connections -= 1
            writer.transport.abort()


def _pair() -> tuple[socket.socket, socket.socket]:
    """Sockets for UDP and TCP, bound to one port that the kernel chose."""
    while True:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        udp.bind((HOST, 0))
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            tcp.bind(udp.getsockname())
        except OSError:
            udp.close()
            tcp.close()
            continue
        return udp, tcp


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    """An address where nobody listens, kept for the test: both transports are refused."""
    udp, tcp = _pair()
    try:
        # A connected socket takes nothing from others, so the kernel refuses for it.
        udp.connect((HOST, 9))
        yield f"{HOST}:{udp.getsockname()[1]}"
    finally:
        udp.close()
        tcp.close()


@contextlib.asynccontextmanager
async def serving(*scripts: Script, tcp: bool = True) -> AsyncIterator[list[Server]]:
    """Servers with these scripts."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Server(one, tcp=tcp)) for one in scripts]


class Clock:
    """Time that runs, and jumps; or stands still in between, where seconds are compared.

    While it stands nothing is ever late.
    """

    def __init__(self, *, still: bool = False) -> None:
        self.shift = 0.0
        self._still = still

    def __call__(self) -> float:
        return (1000.0 if self._still else asyncio.get_running_loop().time()) + self.shift


def read(message: bytes) -> dns.message.Message:
    return dns.message.from_wire(message)


def texts(message: bytes) -> list[str]:
    """The records of the answer, each as NAME TTL TYPE DATA."""
    return [
        f"{rrset.name.to_text()} {rrset.ttl} {dns.rdatatype.to_text(rrset.rdtype)} {one.to_text()}"
        for rrset in read(message).answer
        for one in rrset
    ]


def addresses(message: bytes) -> set[str]:
    """The addresses in the answer."""
    return {line.split()[3] for line in texts(message) if line.split()[2] in ("A", "AAAA")}


def rcode(message: bytes) -> str:
    return dns.rcode.to_text(read(message).rcode())


def wire(text: str) -> bytes:
    return names.wire(text)


Make = Callable[..., Awaitable[Forwarder]]


@contextlib.asynccontextmanager
async def forwarders() -> AsyncIterator[Make]:
    """A maker of started forwarders. Upstreams are asked in order; more are settings.

    `own` are arguments of Forwarder. No socket may be left open at the end.
    """
    before = sockets()
    async with contextlib.AsyncExitStack() as stack:

        async def made(
            *upstreams: str, own: dict[str, Any] | None = None, **more: Any
        ) -> Forwarder:
            more = {"policy": Policy.IN_ORDER, "resolv_conf": "", "loop_check": False, **more}
            forwarder = Forwarder(ForwardSettings(upstreams=upstreams, **more), **(own or {}))
            stack.push_async_callback(forwarder.close)
            await forwarder.start()
            return forwarder

        yield made
    # A transport closes its socket in the loop's next round.
    await asyncio.sleep(0)
    assert sockets() <= before, "sockets were left open"


def sockets() -> int:
    """How many sockets this process has open."""
    found = 0
    for one in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{one}").startswith("socket:")
    return found


async def ask(forwarder: Forwarder, name: str, qtype: int = 1, **more: Any) -> Got:
    """Return the reply, made one as for a client over TCP."""
    async with asyncio.timeout(WAIT_SECONDS):
        got = await forwarder.ask(wire(name), qtype, **more)
    return Got(whole(got, wire(name), qtype), got.extended_error)


def whole(got: Got, name: bytes, qtype: int) -> bytes:
    """The reply with all that led to it."""
    if not got.before:
        return got.message
    question = of.question(name, qtype)
    cut = joined((*got.before, got.message), question, name, (), 0, 65_523 - len(question))
    assert cut is not None
    head = of.HEADER.pack(
        0, int.from_bytes(got.message[2:4]) & ~of.AA, 1, cut.answers, cut.authority, cut.additional
    )
    return head + question + cut.sections


def counted(forwarder: Forwarder, name: str, **labels: str) -> float:
    """The sum of all samples of that name with these labels."""
    return sum(
        one.value
        for one in forwarder.samples()
        if one.name == name and labels.items() <= dict(one.labels).items()
    )

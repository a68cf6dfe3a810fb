"""What the tests of HTTP share: a service of HTTP over a sync, and asking it over sockets."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from ipaddress import ip_address

from msgspec import Struct

from vipd.proxy.events import Event, Synced
from vipd.proxy.http.answer import Page
from vipd.proxy.http.health import Facts, Health, is_eligible
from vipd.proxy.http.service import HttpService
from vipd.proxy.names import Family
from vipd.proxy.settings import HttpSettings, NodeSettings
from vipd.proxy.sync import Sync

LOOPBACK = ip_address("127.0.0.1")
DEADLINE_SECONDS = 20.0
ANYWHERE = HttpSettings(healthz=(LOOPBACK, 0), metrics=(LOOPBACK, 0))


class Told(Struct):
    """An answer as it came."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


class World:
    """A service of HTTP, the sync that it looks at, and clocks that a test sets."""

    def __init__(
        self,
        settings: HttpSettings = ANYWHERE,
        node: NodeSettings | None = None,
        pages: Mapping[str, Page] | None = None,
        *,
        from_cluster: bool = False,
    ) -> None:
        self.waiting_since: float | None = None
        self.updated_at: float | None = None
        self.clock = 1000.0
        self.now = 1_700_000_000.25
        self.from_cluster = from_cluster
        self.sync = Sync(node or NodeSettings(node_name="n"), self._updated, self._folded)
        health = Health(self._facts, tuple(Family), lambda: self.clock, lambda: self.now)
        self.http = HttpService(settings, self.sync, health)
        self.http.show(lambda: pages or {})

    def _facts(self) -> Facts:
        eligible = is_eligible(
            self.sync.snapshot, "n", listed=self.sync.listed, from_cluster=self.from_cluster
        )
        return Facts(self.waiting_since, self.updated_at, eligible)

    def _updated(self, before: object, changes: object) -> None:
        self.http.update(changes)  # type: ignore[arg-type]

    def _folded(self, events: object, before: object, after: object, touched: object) -> None:
        self.http.note(after, touched)  # type: ignore[arg-type]

    def take(self, *events: Event) -> None:
        """Take events; the first time they are the whole list, and programmed at once."""
        first = not self.sync.listed
        self.sync.take([*events, *([Synced()] if first else [])])
        if first:
            self.http.synced()

    async def ask(self, path: str, method: str = "GET", server: str = "healthz") -> Told:
        address, port = self.http.places[server]
        return await ask(str(address), port, path, method)


@contextlib.asynccontextmanager
async def running(world: World) -> AsyncIterator[World]:
    """Run the service for as long as it is needed."""
    world.http.open()
    task = asyncio.ensure_future(world.http.run())
    try:
        yield world
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await world.http.stop()


async def ask(host: str, port: int, path: str, method: str = "GET") -> Told:
    """Ask once, and read to the end."""
    return await send(host, port, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


async def send(host: str, port: int, request: bytes) -> Told:
    """Send bytes and read the answer, until the server closes."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        incoming, outgoing = await asyncio.open_connection(host, port)
        try:
            outgoing.write(request)
            answer = await incoming.read()
        finally:
            outgoing.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return Told(int(first.split()[1]), {k.lower(): v for k, v in headers.items()}, body)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.bind((host, 0))
        return int(one.getsockname()[1])

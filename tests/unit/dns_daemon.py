"""What the tests of DNS workers share: a daemon as far as DNS is concerned."""

import asyncio
from pathlib import Path

from tests.unit.dns_server import Datagrams, addresses, question, rcode

from vipd.dns.server.service import DnsService
from vipd.dns.settings import DnsSettings
from vipd.proxy.events import Applied, Event
from vipd.proxy.model import Service
from vipd.proxy.names import NamespacedName, parse_address
from vipd.proxy.snapshot import Snapshot, fold

SETTINGS = DnsSettings(listen=("127.0.0.1:0",), http=(), forwards=False)
NAME = NamespacedName("default", "web")


def web(address: str) -> Applied:
    return Applied(Service(name=NAME, cluster_ips=(parse_address(address),)))


class Daemon:
    """What the daemon does for DNS."""

    def __init__(self, settings: DnsSettings, state: Path | None) -> None:
        self.service = DnsService(settings, state)
        self.snapshot = Snapshot()

    async def start(self, *events: Event) -> "Daemon":
        await self.service.start()
        if events:
            self.take(*events)
            await self.service.in_step()
        return self

    def take(self, *events: Event) -> None:
        before = self.snapshot
        self.snapshot, touched = fold(before, events)
        self.service.take(events, before, self.snapshot, touched)

    @property
    def address(self) -> tuple[str, int]:
        (listen,) = self.service.listens
        return str(listen.address), listen.port

    async def pid(self) -> int:
        (told,) = await self.service.told()
        return told.pid


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def has_ended(pid: int) -> bool:
    """Whether a process is gone, but for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def shown(client: Datagrams, address: str) -> None:
    """Return when that is the answer; no address: that there is no such name."""
    async with asyncio.timeout(20):
        while True:
            reply = await client.ask(question())
            if addresses(reply) == [address] or (not address and rcode(reply) == "NXDOMAIN"):
                return

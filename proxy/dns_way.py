"""The way of questions to the DNS server while the daemon runs: kept as it has to be, and moved.

Lives here: when the way is prepared again, and in which order an address is given back to the
dataplane. Must not: know what a way is made of (dns/server/way.py), or which sockets there are.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from ipaddress import ip_network

import structlog

from vipd.backends import removed_routes
from vipd.backends.local_routes import DNS_ROUTE_PROTOCOL
from vipd.backends.nftables import watching
from vipd.backends.nftables.notified import Ours
from vipd.backends.watching import Drift, Watch
from vipd.dns.server import way
from vipd.dns.server.service import DnsService
from vipd.dns.settings import Listen
from vipd.proxy.config import Config
from vipd.proxy.errors import DataplaneError, VipdError
from vipd.proxy.model import Service
from vipd.proxy.names import Network
from vipd.proxy.resolve import left_to_dns
from vipd.proxy.snapshot import Snapshot, Touched
from vipd.proxy.sync import Sync
from vipd.proxy.virtualserver import Key

LOOK_SECONDS = 10.0
"""Between two looks whether the way is still there, for what the kernel does not tell."""
LEAVE_SECONDS = 5.0
"""For which the route to an address that goes is left: replies that are under way need it, those of
upstreams for 4 s."""
PATIENCE_SECONDS = 5.0
"""For the dataplane to take an address over, and for workers to leave it; then it goes anyway."""
_OURS = Ours(frozenset({("inet", way.TABLE.split()[1])}))

log = structlog.get_logger()


class DnsWay:
    """Keeps the way to where the DNS service answers; one task runs it."""

    def __init__(self, dns: DnsService, sync: Sync) -> None:
        self._dns, self._sync = dns, sync
        self._due = asyncio.Event()
        self._turn = asyncio.Lock()
        self._prepared: tuple[Sequence[Listen], Sequence[Network]] | None = None
        """What it was prepared for; None: it has to be again."""
        self._routes_stay_until = 0.0
        """By the clock of the event loop."""
        self._awaited: set[Key] = set()
        """Virtual servers that are to take an address over, and are not committed yet."""
        self._taken_over = asyncio.Event()
        self._needed = asyncio.Event()
        """Set once there is a way to be kept."""

    def watches(self) -> Sequence[Watch]:
        """Return the watches over the table and the routes of the way."""
        return (
            lambda: self._told(watching.drifts(_OURS)),
            lambda: self._told(removed_routes.drifts(DNS_ROUTE_PROTOCOL)),
        )

    async def _told(self, drifts: AsyncIterator[Drift]) -> AsyncIterator[Drift]:
        await self._needed.wait()
        async for one in drifts:
            if self._dns.listens:
                yield one

    async def mend(self) -> int:
        """Prepare the way again where it is not as it has to be; return whether it had to be."""
        async with self._turn:
            if self._prepared is None:
                return 0  # it is about to be
            return int(await self._keep())

    def look(self) -> None:
        """Let it be looked at now."""
        self._due.set()

    def note(self, before: Snapshot, after: Snapshot, touched: Touched) -> None:
        """Look where a fold has changed which addresses are there for DNS."""
        addresses = {address for address, _ in self._sync.settings.dns_listens}
        if not addresses:
            return
        concerned = any(
            _has(snapshot.services.get(name), addresses)
            for name in touched.services
            for snapshot in (before, after)
        )
        if concerned or touched.service_cidrs:
            self._due.set()

    def committed(self, keys: Collection[Key]) -> None:
        """Note virtual servers that a dataplane has committed."""
        self._awaited.difference_update(keys)
        if not self._awaited:
            self._taken_over.set()

    async def run(self) -> None:
        """Keep the way for ever.

        Before the first list only the settings tell which addresses are cluster IPs.
        """
        await way.prepare(self._dns.listens, self._sync.settings.service_cidrs, whole=False)
        await self._dns.in_step()
        while True:
            self._due.clear()
            async with self._turn:
                await self._keep()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._due.wait()

    def _pause(self) -> float | None:
        """Return the seconds until the next look; None where nothing is to be kept."""
        if self._prepared is not None:
            return LOOK_SECONDS if self._dns.listens else None
        left = self._routes_stay_until - asyncio.get_running_loop().time()
        return min(max(left, 0.1), LOOK_SECONDS)

    async def change(
        self, changed: Config, answer: Callable[[], Awaitable[list[str]]]
    ) -> list[str]:
        """Answer elsewhere, by `answer`, without a question lost; return what that returns.

        An address more is answered on and its way is there before endpoints lose it: what is not
        tracked is not translated. For one that goes it is the other way round: endpoints have it,
        and questions come to them, before its sockets are closed. Its route goes later: replies
        that are under way need it. Raise what `answer` raises; nothing has changed then.
        """
        before, after = self._sync.settings.dns_listens, changed.node.dns_listens
        gone = {Listen(*one) for one in before - after}
        async with self._turn:
            if gone:
                await self._hand_over(gone)
            try:
                needed = await answer()
            except VipdError:
                self._sync.leave_to_dns(before)
                self._prepared = None
                self._due.set()
                raise
            if gone:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE_SECONDS):
                        await self._dns.in_step()
                now = asyncio.get_running_loop().time()
                self._routes_stay_until = now + LEAVE_SECONDS
            if before != after:
                self._prepared = None
                await self._keep()
            self._sync.leave_to_dns(after)
            self._due.set()
        return needed

    async def _hand_over(self, gone: Collection[Listen]) -> None:
        """Let the dataplane have what comes to addresses that go."""
        places = frozenset((one.address, one.port) for one in gone)
        self._taken_over.clear()
        self._sync.leave_to_dns(self._sync.settings.dns_listens - places)
        self._awaited = {
            key
            for service in self._sync.snapshot.services.values()
            for _, key, _ in left_to_dns(service, places)
            if key in self._sync.table.claims
        }
        if self._awaited:
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await self._taken_over.wait()
            except TimeoutError:
                log.warning("DNS addresses go before endpoints have them", keys=len(self._awaited))
        self._awaited.clear()
        await way.prepare(self._dns.listens, self._networks(), whole=False, going=gone)

    def _networks(self) -> tuple[Network, ...]:
        """Return where addresses are there for DNS only: ranges of cluster IPs, and single ones."""
        listens = frozenset((one.address, one.port) for one in self._dns.listens)
        found = {
            ip_network(str(key.address))
            for service in self._sync.snapshot.services.values()
            for _, key, _ in left_to_dns(service, listens)
        }
        return (*self._sync.table.network.service_cidrs, *sorted(found, key=str))

    async def _keep(self) -> bool:
        """Prepare the way unless all is there; return whether that had to be."""
        wanted = (tuple(self._dns.listens), self._networks())
        if wanted[0]:
            self._needed.set()
        if self._prepared == wanted and await self._is_there(*wanted):
            return False
        whole = asyncio.get_running_loop().time() >= self._routes_stay_until
        await way.prepare(*wanted, whole=whole)
        self._prepared = wanted if whole else None
        await self._dns.look_around()
        return True

    async def _is_there(self, listens: Sequence[Listen], networks: Collection[Network]) -> bool:
        """Return whether there is nothing to be prepared, as far as can be seen."""
        await self._dns.look_around()
        if any(way.belongs(one.address, networks) for one in self._dns.elsewhere):
            return False
        try:
            return await way.is_untracked(listens)
        except DataplaneError as error:
            log.warning("it cannot be seen whether DNS is tracked", why=str(error))
            return True


def _has(service: Service | None, addresses: Collection[object]) -> bool:
    """Return whether a Service answers on one of the addresses."""
    if service is None:
        return False
    every = (*service.cluster_ips, *service.external_ips, *service.load_balancer_ips)
    return any(one in addresses for one in every)

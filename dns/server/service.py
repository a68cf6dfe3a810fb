"""The DNS service of a daemon: one thing to start, to feed and to stop.

Lives here: what the daemon and `vipd dns serve` see of DNS. Must not: know how it is done
(workers.py), or decide about services.
"""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from msgspec import Struct, structs

from vipd.dns.feed import Kept
from vipd.dns.server import way
from vipd.dns.server.messages import Tell, Told, WireListen
from vipd.dns.server.takeover import find, quit_all
from vipd.dns.server.workers import Workers
from vipd.dns.settings import DnsSettings, Listen, zone_settings
from vipd.proxy.errors import Busy, DataplaneError, UnknownResult, VipdError
from vipd.proxy.events import Event
from vipd.proxy.names import Network, parse_address
from vipd.proxy.snapshot import Snapshot, Touched
from vipd.proxy.sources import addresses

if TYPE_CHECKING:
    from vipd.dns.tracing import Course

FOLDER = "dns"
"""Below the folder of the control socket: where the workers' control sockets are."""

log = structlog.get_logger()


class DnsStatus(Struct, frozen=True):
    """How DNS is."""

    listens: tuple[str, ...]
    restarts: int
    """How many workers ended and were started again, since the daemon's start."""
    workers: tuple[Told, ...]
    http: tuple[str, ...] = ()
    """Where metrics are told."""
    refused: str = ""
    """What is wrong with the configuration file as it is now; empty: nothing."""
    restart_needed: tuple[str, ...] = ()
    """Its fields that have changed, and count at the next start only."""
    wanted: int = 0
    """How many workers there should be; those that do not say how they are are not in `workers`."""
    elsewhere: tuple[str, ...] = ()
    """Those of `listens` whose address is not the node's: no question comes there."""


class DnsService:
    """Answers on the configured addresses, or makes an end of what another configuration left.

    `networks` are pod networks and ranges of cluster IPs: reverse names in them are answered where
    the settings do not say which, and `pods` of them may ask. Without a `state` folder the workers
    end with this process; otherwise they answer on until the next daemon has taken over.
    """

    def __init__(
        self,
        settings: DnsSettings,
        state: Path | None,
        pods: Sequence[Network] = (),
        networks: Sequence[Network] = (),
    ) -> None:
        self._told = settings
        self._pods, self._networks = tuple(map(str, pods)), tuple(map(str, networks))
        self._kept = Kept(pods=settings.pods == "verified")
        self._workers = Workers(
            self._whole(settings), self._kept, None if state is None else state / FOLDER
        )
        self._following: asyncio.Task[None] | None = None
        self._refused = ""
        self._restart_needed: list[str] = []
        self.elsewhere: tuple[Listen, ...] = ()
        """Where it should answer, but the address is not the node's: as it was seen last."""

    def _whole(self, settings: DnsSettings) -> DnsSettings:
        """Return settings with what the rest of the configuration says."""
        reverse = settings.reverse
        if reverse is None:
            reverse = (*self._pods, *self._networks)
        forward = settings.forward
        files = {
            field: str(Path(path).absolute())  # workers run in /
            for field in ("resolv_conf", "hosts_file")
            if (path := getattr(forward, field))
        }
        return structs.replace(
            settings,
            reverse=reverse,
            allow=(*settings.allow, *self._pods),
            forward=structs.replace(forward, **files),
        )

    @property
    def settings(self) -> DnsSettings:
        """What it answers by, with what the rest of the configuration says."""
        return self._workers.settings

    @property
    def listens(self) -> list[Listen]:
        """Where it answers."""
        return self._workers.listens

    @property
    def http(self) -> list[Listen]:
        """Where metrics are told."""
        return self._workers.http

    @property
    def wanted(self) -> int:
        """How many workers there should be."""
        return self.settings.workers if self.listens else 0

    @property
    def restarts(self) -> int:
        """How many workers ended and were started again."""
        return self._workers.supervised.restarts

    async def start(self) -> None:
        """Answer from now on. Raise ConfigError where an address is taken, Busy or UnknownResult
        where no worker starts.
        """
        await self._workers.start()
        self._started()

    def _started(self) -> None:
        if self.listens:
            log.info("DNS", listens=" ".join(map(str, self.listens)))
            if self._following is None:
                self._following = asyncio.ensure_future(self._follow_addresses())

    async def change(self, settings: DnsSettings) -> list[str]:
        """Answer by other settings from now on, without a question lost.

        Return the fields of the section that have changed and count at the next start only. Raise
        ConfigError where an address is taken: nothing has changed then.
        """
        needed = []
        if settings.pods == "verified" and self._kept.pods is None:
            needed.append("pods")  # pods were not remembered
            settings = structs.replace(settings, pods=self._workers.settings.pods)
        if self.listens and settings.listen and settings.workers != self._workers.settings.workers:
            needed.append("workers")
        before = self.listens
        whole = self._whole(settings)
        if zone_settings(whole) != zone_settings(self.settings):
            self._kept.stamp(self._kept.everything(), time.time())
        await self._workers.change(whole)
        self._told = settings
        if self.listens != before:
            self._started()
        return needed

    async def change_networks(self, pods: Sequence[Network], networks: Sequence[Network]) -> None:
        """Let other pod networks ask, and answer reverse names of others, from now on.

        Raise what `change` raises; nothing has changed then.
        """
        before = (self._pods, self._networks)
        asked = (tuple(map(str, pods)), tuple(map(str, networks)))
        if asked == before:
            return
        self._pods, self._networks = asked
        try:
            await self.change(self._told)
        except VipdError:
            self._pods, self._networks = before
            raise

    def reread(self, refused: str, restart_needed: Sequence[str]) -> None:
        """Note what became of the configuration file when it was read again."""
        if refused:
            self._workers.refused()
        self._refused, self._restart_needed = refused, list(restart_needed)

    def take(
        self, events: Sequence[Event], before: Snapshot, after: Snapshot, touched: Touched
    ) -> None:
        """Take events that were folded, and let the workers be told what follows from them."""
        changed = self._kept.take(events, before, after, touched)
        self._kept.stamp(changed, time.time())
        self._workers.note(changed)

    async def in_step(self) -> None:
        """Return when every worker was told everything that is known."""
        await self._workers.in_step()

    async def told(self) -> list[Told]:
        """Return what the workers say of themselves."""
        return await self._workers.told()

    async def status(self, _: str = "") -> DnsStatus:
        """Return how it is, for the control socket."""
        told = await self.told()
        return DnsStatus(
            tuple(map(str, self.listens)),
            self.restarts,
            tuple(told),
            tuple(map(str, self._workers.http)),
            self._refused,
            tuple(self._restart_needed),
            self.wanted,
            tuple(map(str, self.elsewhere)),
        )

    async def look_around(self) -> None:
        """See which addresses are the node's now; those that are not are logged once."""
        try:
            found = tuple(await asyncio.to_thread(way.elsewhere, self.listens))
        except DataplaneError as error:
            log.warning("addresses of DNS cannot be looked at", why=str(error))
            return
        for one in found:
            if one not in self.elsewhere:
                log.warning(
                    "DNS is not reachable at an address that is not the node's", at=str(one)
                )
        self.elsewhere = found

    async def trace(self, argument: str) -> "Course":
        """Return how a question comes to its answer, for the control socket."""
        # What names of others need is imported by the workers, and here by who asks.
        from vipd.dns.asked_name import Known
        from vipd.dns.server.traced import answered

        kept = self._kept
        known = Known(
            kept.snapshot,
            self.settings,
            frozenset(kept.namespaces),
            None if kept.pods is None else dict(kept.pods),
            kept.synced,
        )
        return await asyncio.to_thread(answered, argument, known, self.listens)

    async def _follow_addresses(self) -> None:
        """Let this node's own addresses ask, whatever becomes of them."""
        async for batch in addresses.events():
            for one in batch:
                self._workers.note(self._kept.take_own(one.addresses))

    async def stop(self) -> None:
        """Feed no more. With a state folder the workers answer on."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._workers.stop()


async def status_without_daemon(state: Path) -> DnsStatus | None:
    """Return how the workers are that answer without a daemon; None where there are none."""
    there = await find(state / FOLDER)
    told = []
    for one in there:
        try:
            answer, _ = await one.ask(Tell())
        except (Busy, UnknownResult):
            continue
        finally:
            one.forget()
        if isinstance(answer, Told):
            told.append(answer)
    if not told:
        return None
    return DnsStatus(
        _texts([listen for one in told for listen in one.listens]),
        0,
        tuple(sorted(told, key=lambda one: one.number)),
        _texts([listen for one in told for listen in one.http]),
        wanted=len(told),
    )


def _texts(listens: Sequence[WireListen]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(Listen(parse_address(one), port)) for one, port in listens))


async def leftovers(state: Path, *, remove: bool) -> list[str]:
    """Return what runs without a daemon, in words, and end it where that is asked for."""
    there = await find(state / FOLDER)
    said = [f"DNS worker (pid {one.pid})" for one in there]
    if remove:
        await quit_all(there)
    for one in there:
        one.forget()
    folder = state / FOLDER
    if remove and folder.is_dir():
        await asyncio.to_thread(_remove_empty, folder)
    return said


def _remove_empty(folder: Path) -> None:
    for path in folder.glob("*.sock"):
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()

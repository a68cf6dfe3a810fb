"""The DNS service of a daemon: one thing to start, to feed and to stop.

Lives here: what the daemon and `vipd dns serve` see of DNS. Must not: know how it is done
(workers.py), or decide about services.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import structlog
from msgspec import DecodeError, Struct, json, structs

from vipd.dns.asked_name import Known
from vipd.dns.feed import Kept
from vipd.dns.forward.configured import Files, configure
from vipd.dns.forward.upkeep import read_files
from vipd.dns.server.messages import Told
from vipd.dns.server.workers import Workers, find, quit_all
from vipd.dns.settings import DnsSettings, Listen
from vipd.dns.tracing import Asked, Course, course
from vipd.proxy.errors import ControlError
from vipd.proxy.events import Event
from vipd.proxy.names import Network
from vipd.proxy.snapshot import Snapshot, Touched
from vipd.proxy.sources import addresses

FOLDER = "dns"
"""Below the folder of the control socket: where the workers' control sockets are."""

log = structlog.get_logger()


class DnsStatus(Struct, frozen=True):
    """How DNS is."""

    listens: tuple[str, ...]
    restarts: int
    """How many workers ended and were started again, since the daemon's start."""
    workers: tuple[Told, ...]


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
        if settings.reverse is None:
            settings = structs.replace(settings, reverse=tuple(map(str, (*pods, *networks))))
        settings = structs.replace(settings, allow=(*settings.allow, *map(str, pods)))
        self.settings = settings
        self._kept = Kept(pods=settings.pods == "verified")
        self._following: asyncio.Task[None] | None = None
        self._workers = Workers(settings, self._kept, None if state is None else state / FOLDER)

    @property
    def listens(self) -> list[Listen]:
        """Where it answers."""
        return self._workers.listens

    @property
    def restarts(self) -> int:
        """How many workers ended and were started again."""
        return self._workers.ended

    async def start(self) -> None:
        """Answer from now on. Raise ConfigError where an address is taken, Busy or UnknownResult
        where no worker starts.
        """
        await self._workers.start()
        if self.listens:
            log.info("DNS", listens=" ".join(map(str, self.listens)))
            self._following = asyncio.ensure_future(self._follow_addresses())

    def take(
        self, events: Sequence[Event], before: Snapshot, after: Snapshot, touched: Touched
    ) -> None:
        """Take events that were folded, and let the workers be told what follows from them."""
        self._workers.note(self._kept.take(events, before, after, touched))

    async def in_step(self) -> None:
        """Return when every worker was told everything that is known."""
        await self._workers.in_step()

    async def told(self) -> list[Told]:
        """Return what the workers say of themselves."""
        return await self._workers.told()

    async def status(self, _: str = "") -> DnsStatus:
        """Return how it is, for the control socket."""
        told = await self.told()
        return DnsStatus(tuple(map(str, self.listens)), self.restarts, tuple(told))

    async def trace(self, argument: str) -> Course:
        """Return how a question comes to its answer, for the control socket."""
        kept = self._kept
        known = Known(
            kept.snapshot,
            self.settings,
            frozenset(kept.namespaces),
            None if kept.pods is None else dict(kept.pods),
            kept.synced,
        )
        try:
            asked = json.decode(argument, type=Asked)
            return await asyncio.to_thread(traced, asked, known, self.listens)
        except (DecodeError, ValueError) as error:
            raise ControlError(f"the question is not understood: {error}") from error

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


def traced(asked: Asked, known: Known, listens: Sequence[Listen] = ()) -> Course:
    """Read what files say of names of others, and trace."""
    forward = known.settings.forward
    own = [(str(one.address), one.port) for one in listens]
    made = configure(forward, read_files(forward, Files(), _unsaid), own, _unsaid)
    return course(asked, known._replace(configured=made))


def _unsaid(event: str, **facts: object) -> None:
    """Tell nobody: the worker has."""


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

"""The HTTP side of the daemon: its two servers and the health-check node ports.

Lives here: what listens when, and what is tried again. Must not: know what is answered.

Sockets of the two servers listen from the start. What answers on them begins after the first sync
where it would delay that: the import of aiohttp does, unless the source has imported it already.
Health-check node ports begin after it in any case, as nothing is served before.
"""

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping

from vipd.proxy.errors import ConfigError
from vipd.proxy.http.answer import Answer, Page, Respond, pages
from vipd.proxy.http.crowd import Crowd
from vipd.proxy.http.health import Health
from vipd.proxy.http.health_ports import HealthPorts
from vipd.proxy.http.listeners import Listener, Place
from vipd.proxy.names import Address, NamespacedName
from vipd.proxy.settings import HttpSettings
from vipd.proxy.snapshot import Snapshot, Touched
from vipd.proxy.sync import Sync
from vipd.proxy.virtualserver import Changes
from vipd.proxy.words import counted

HEALTHZ, METRICS = "healthz", "metrics"
RETRY_SECONDS = 5.0
"""Until it is tried again to listen, as kube-proxy does."""
LONGEST_QUIET_SECONDS = 3.0
"""How long the first sync may take before the servers begin beside it."""


class HttpService:
    """Answers over HTTP: `health` on one server, what `show` is given on the other."""

    def __init__(self, settings: HttpSettings, sync: Sync, health: Health) -> None:
        self.settings = settings
        self.health = health
        self._responds: dict[str, Respond] = {
            HEALTHZ: pages({"/healthz": health.healthz, "/livez": health.livez})
        }
        self._crowds = {HEALTHZ: Crowd(), METRICS: Crowd()}
        self._listeners: dict[str, Listener] = {}
        self._due = asyncio.Event()
        self._turn = asyncio.Lock()
        self._synced = asyncio.Event()
        self._ports = HealthPorts(sync, health, self._due.set)

    # What others say

    def show(self, make: Callable[[], Mapping[str, Page]]) -> None:
        """Take what makes the pages of the metrics server, by path, when the first is asked for.

        To be called once, before `open`.
        """
        made: list[Respond] = []

        async def respond(method: str, path: str) -> Answer:
            if not made:
                made.append(pages(make()))
            return await made[0](method, path)

        self._responds[METRICS] = respond

    def note(self, after: Snapshot, touched: Touched) -> None:
        """Note what a fold has touched."""
        self._ports.note(after, touched.services)

    def update(self, changes: Changes) -> None:
        """Note what has changed in the table."""
        if changes.network is not None:
            self._ports.move(changes.network)

    def synced(self) -> None:
        """Note that the first sync is done."""
        self._synced.set()
        self._due.set()

    async def change(self, settings: HttpSettings) -> None:
        """Listen as these settings say from now on; what cannot be listened on is tried again."""
        async with self._turn:
            self.settings = settings
            self._place()
            for one in self._listeners.values():
                one.open()
        self._due.set()

    # What it does

    def open(self) -> None:
        """Listen. Raise ConfigError where that fails and the settings forbid it."""
        self._place()
        for one in self._listeners.values():
            if not one.open() and self.settings.must_bind:
                raise ConfigError(f"{one.what} address {one.place}", one.failure)

    def _place(self) -> None:
        """Have a listener for each place of the settings, and no other."""
        for name, told in ((HEALTHZ, self.settings.healthz), (METRICS, self.settings.metrics)):
            place = None if told is None else Place(*told)
            old = self._listeners.get(name)
            if old is not None and old.place != place:
                self._listeners.pop(name).close()
            if place is not None and name not in self._listeners:
                respond, crowd = self._responds[name], self._crowds[name]
                self._listeners[name] = Listener(name, place, respond, crowd, both=True)

    async def run(self) -> None:
        """Answer for ever."""
        if "aiohttp" not in sys.modules:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LONGEST_QUIET_SECONDS):
                    await self._synced.wait()
        self._due.set()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS if self._is_undone() else None):
                    await self._due.wait()
            self._due.clear()
            async with self._turn:
                await self._keep()

    async def _keep(self) -> None:
        for one in self._listeners.values():
            if one.open():
                await one.serve()
        if self._synced.is_set():
            await self._ports.keep()

    def _is_undone(self) -> bool:
        return self._ports.undone or any(one.failure for one in self._listeners.values())

    async def stop(self) -> None:
        """Answer no more."""
        for one in self._listeners.values():
            one.close()
        for crowd in self._crowds.values():
            crowd.cut_all()
        await self._ports.stop()

    # How it is

    @property
    def places(self) -> Mapping[str, tuple[Address, int]]:
        """Where each server listens, by ``healthz`` and ``metrics``."""
        return {
            name: (one.place.address, one.port)
            for name, one in self._listeners.items()
            if not one.failure
        }

    def told(self) -> tuple[str, ...]:
        """Return where is listened, for people."""
        found = [f"{name} {Place(*at)}" for name, at in self.places.items()]
        ports = self._ports.count
        return (*found, *([counted(ports, "health-check node port")] if ports else []))

    def failed_ports(self) -> Mapping[NamespacedName, tuple[int, str]]:
        """Return the health-check node port of each service that has none, and why."""
        return self._ports.failures()

    def trouble(self) -> Iterator[str]:
        """Yield a sentence on each place where nothing listens that should."""
        for one in self._listeners.values():
            if one.failure:
                yield f"{one.trouble()} (tried again every {RETRY_SECONDS:g} s)"
        yield from self._ports.trouble()

"""One worker's place in the daemon: its sockets stay, processes come and go.

Lives here: one process started, told what there is to tell, and started again. Must not: know the
other workers (workers.py), or what a worker does with what it is told.
"""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from socket import socket
from typing import Protocol

import structlog

from vipd.dns.feed import Changed, Kept, Portion, Untold
from vipd.dns.server.listeners import Pair
from vipd.dns.server.messages import Begin, Feed, Serve, Supervised, WireListen
from vipd.dns.server.process import Process
from vipd.dns.settings import DnsSettings, Listen, zone_settings
from vipd.proxy.errors import Busy, UnknownResult

MOST_PAIRS = 100
"""Addresses in one message, two sockets each: the kernel takes 253 descriptors."""
LIVES_SECONDS = 5.0
"""A worker that lived longer is started again at once; otherwise the pause doubles."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0

log = structlog.get_logger()


class Team(Protocol):
    """The workers that this one is of."""

    settings: DnsSettings
    kept: Kept
    folder: Path | None
    supervised: Supervised

    @property
    def relieves(self) -> bool:
        """Whether workers of the daemon before still answer."""

    async def begun(self, seat: "Seat") -> None:
        """Note that a process of a seat has been told what it is."""

    def lost(self, seat: "Seat") -> None:
        """Note that a process has ended."""


class Seat:
    """A place, its process, and what that has not been told yet."""

    def __init__(self, number: int, team: Team) -> None:
        self.number = number
        self.sockets: list[tuple[Listen, Pair]] = []
        """Where it answers."""
        self.http: list[tuple[Listen, socket]] = []
        """Where it tells metrics."""
        self.process: Process | None = None
        self.in_step = asyncio.Event()
        """Set while the process was told everything."""
        self.task: asyncio.Task[None] | None = None
        self._team = team
        self._untold = Untold()
        self._wake = asyncio.Event()
        self._serves = False
        self._began = 0.0
        """When a start of the process began (time.monotonic)."""
        self._settings = team.settings
        """What the process was told, as the next three."""
        self._given: list[tuple[Listen, Pair]] = []
        self._given_http: list[tuple[Listen, socket]] = []
        self._supervised = Supervised()

    def note(self, changed: Changed) -> None:
        """Let the process be told what has changed."""
        self._untold.note(changed)
        self._wake.set()

    def look(self) -> None:
        """Let the process be told of settings, sockets or a state that may have changed."""
        if self._settings is not self._team.settings:
            self.in_step.clear()
        self._wake.set()

    def close(self) -> None:
        """Close the sockets here; the worker has its own."""
        every = [one for _, both in (*self.sockets, *self._given) for one in both]
        for one in (*every, *(one for _, one in (*self.http, *self._given_http))):
            one.close()
        self.sockets.clear()
        self.http.clear()

    async def begin(self) -> None:
        """Start the process. Raise Busy or UnknownResult."""
        self._began = time.monotonic()
        process = await Process.start(self.number, self._team.folder)
        process.watch(self._lost)
        self.process, self._serves = process, False
        self._untold = Untold()
        self._given, self._given_http = [], []
        await self._tell_settings(process, anew=True)
        await self._team.begun(self)
        await self.serve_if_due()

    async def _tell_settings(self, process: Process, *, anew: bool) -> None:
        """Tell a process what it is; it answers at all sockets, and closes those that have gone."""
        settings = self._team.settings
        pairs = [one for one in self.sockets if one not in self._given]
        http = [one for one in self.http if one not in self._given_http]
        gone = [one for one in self._given if one not in self.sockets]
        gone_http = [one for one in self._given_http if one not in self.http]
        first, rest = pairs[:MOST_PAIRS], pairs[MOST_PAIRS:]
        outlives = self._team.folder is not None
        request = Begin(
            settings,
            [_wire(one) for one, _ in first],
            outlives=outlives,
            anew=anew,
            leave=[_wire(one) for one, _ in gone],
            http=[_wire(one) for one, _ in http],
            leave_http=[_wire(one) for one, _ in gone_http],
        )
        given = _sockets(first) + [one for _, one in http]
        self._given, self._given_http = list(self.sockets), list(self.http)
        self._settings = settings
        if anew:
            self.in_step.clear()
            self.note(self._team.kept.everything())
        try:
            await process.ask(request, given)
            for at in range(0, len(rest), MOST_PAIRS):
                part = rest[at : at + MOST_PAIRS]
                where = [_wire(one) for one, _ in part]
                request = Begin(settings, where, outlives=outlives, anew=False)
                await process.ask(request, _sockets(part))
        finally:
            for one in (*_sockets(gone), *(one for _, one in gone_http)):
                one.close()

    async def serve_if_due(self) -> None:
        """Let it answer once it knows everything, and before that if nobody else does.

        Where everything is known here, questions wait for the moment until it was told.
        """
        nobody = not self._team.relieves and not self._team.kept.synced
        if self.process is not None and not self._serves and (self.in_step.is_set() or nobody):
            self._serves = True
            await self.process.ask(Serve())

    async def run(self) -> None:
        """Tell a worker everything, and start it again whenever it ends, for as long as it takes.

        Whatever goes wrong here: a worker that is not told changes would say wrong names, and look
        as well as the others. It is ended, and the next one is told everything.
        """
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                if self.process is None:
                    await self.begin()
                await self._feed()
            except (Busy, UnknownResult) as error:
                log.warning("DNS worker does not answer", number=self.number, why=str(error))
                await self._kill()
            except Exception:  # an error of this program, see above
                log.exception("DNS worker is not told of changes", number=self.number)
                await self._kill()
            if time.monotonic() - self._began > LIVES_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            else:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _kill(self) -> None:
        if (process := self.process) is not None:
            process.kill()
            await process.gone()

    async def _feed(self) -> None:
        """Tell one process what there is to tell, for as long as it lives."""
        process, kept = self.process, self._team.kept
        while process is not None and process is self.process:
            await self.serve_if_due()
            await self._wake.wait()
            self._wake.clear()
            while self._has_to_be_told():
                if self._settings is not self._team.settings or self._has_other_sockets():
                    before, now = self._settings, self._team.settings
                    anew = zone_settings(before) != zone_settings(now)
                    await self._tell_settings(process, anew=anew)
                portion = self._untold.portion(kept) if self._untold else Portion()
                synced = kept.synced and not self._untold
                self._supervised = self._team.supervised
                await process.ask(Feed(portion, synced, self._supervised, kept.serial))
                if synced and self._settings is self._team.settings:
                    self.in_step.set()

    def _has_to_be_told(self) -> bool:
        return (
            bool(self._untold)
            or (self._team.kept.synced and not self.in_step.is_set())
            or self._settings is not self._team.settings
            or self._supervised != self._team.supervised
            or self._has_other_sockets()
        )

    def _has_other_sockets(self) -> bool:
        return self._given != self.sockets or self._given_http != self.http

    def _lost(self, gone: Process) -> None:
        """Note that a process is gone. `run` starts it again."""
        if self.process is gone:
            log.error("a DNS worker has ended; it is started again", number=self.number)
            self.process = None
            self.in_step.clear()
            self._team.lost(self)
            self._wake.set()


def _sockets(pairs: Sequence[tuple[Listen, Pair]]) -> list[socket]:
    return [one for _, both in pairs for one in both]


def _wire(listen: Listen) -> WireListen:
    return str(listen.address), listen.port

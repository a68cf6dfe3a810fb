"""The DNS workers of a node: started, fed, started again, and exchanged without losing a question.

Lives here: the supervision. Must not: know what is told (feed.py) or what a worker does with it.

Sockets stay open here beside the worker's own: what arrives while a worker is started again waits
in the kernel. The workers of a daemon that is gone answer until those of the next one have been
told everything; these read the same sockets, so no question is refused or lost on the way.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Collection
from pathlib import Path

import structlog

from vipd.dns.feed import Changed, Kept, Untold
from vipd.dns.server.listeners import Pair, pair
from vipd.dns.server.messages import (
    Begin,
    Feed,
    HandedOver,
    HandOver,
    Retire,
    Serve,
    Tell,
    Told,
    WireListen,
)
from vipd.dns.server.process import Process
from vipd.dns.settings import DnsSettings, Listen, parse_listen
from vipd.proxy.errors import Busy, DataplaneError, UnknownResult
from vipd.proxy.names import parse_address

LIVES_SECONDS = 5.0
"""A worker that lived longer is started again at once; otherwise the pause doubles."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
TELL_SECONDS = 2.0
"""How long a worker may take to say how it is."""
QUIT_SECONDS = 5.0

log = structlog.get_logger()


class Seat:
    """One worker's place: its sockets stay, processes come and go."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.sockets: list[tuple[Listen, Pair]] = []
        self.process: Process | None = None
        self.untold = Untold()
        self.wake = asyncio.Event()
        self.in_step = asyncio.Event()
        """Set while the process was told everything."""
        self.serves = False
        self.began = 0.0
        """When the process was started (time.monotonic)."""
        self.task: asyncio.Task[None] | None = None

    def note(self, changed: Changed) -> None:
        """Let the process be told."""
        self.untold.note(changed)
        self.wake.set()

    def close(self) -> None:
        """Close the sockets here; the worker has its own."""
        for _, both in self.sockets:
            for one in both:
                one.close()
        self.sockets.clear()


class Workers:
    """The processes that answer for one daemon. In `folder` the next daemon finds them.

    Without a folder they end with whoever started them.
    """

    def __init__(self, settings: DnsSettings, kept: Kept, folder: Path | None) -> None:
        self._settings, self._kept, self._folder = settings, kept, folder
        self._seats: list[Seat] = []
        self._old: list[Process] = []
        """Workers of the daemon before."""
        self._leaving: list[Process] = []
        """Those of them that take no new questions."""
        self._relieving: asyncio.Task[None] | None = None
        self.ended = 0
        """How many processes had to be started again."""

    @property
    def listens(self) -> list[Listen]:
        """Where questions are answered; port 0 is what the kernel made of it."""
        return list(dict.fromkeys(listen for seat in self._seats for listen, _ in seat.sockets))

    async def start(self) -> None:
        """Bind and start. Raise ConfigError where an address is taken, Busy where nothing starts.

        Questions are answered from now on: by the workers of the daemon before until everything has
        been told, or with SERVFAIL for the cluster's names.
        """
        count = self._settings.workers if self._settings.listen else 0
        self._seats = [Seat(number) for number in range(count)]
        try:
            self._share_out(await self._inherited())
            await asyncio.gather(*(self._begin(seat) for seat in self._seats))
        except BaseException:
            await self.stop()
            raise
        for seat in self._seats:
            seat.task = asyncio.ensure_future(self._run(seat))
        if self._old:
            self._relieving = asyncio.ensure_future(self._relieve())

    def note(self, changed: Changed) -> None:
        """Tell the workers what has changed."""
        for seat in self._seats:
            seat.note(changed)

    async def in_step(self) -> None:
        """Return when every worker was told everything."""
        for seat in self._seats:
            await seat.in_step.wait()

    async def told(self) -> list[Told]:
        """Return what each worker says of itself; nothing of those that do not answer."""
        found = []
        for seat in self._seats:
            if seat.process is not None:
                try:
                    async with asyncio.timeout(TELL_SECONDS):
                        answer, _ = await seat.process.ask(Tell())
                except (DataplaneError, TimeoutError) as error:
                    log.info("DNS worker does not say how it is", why=repr(error))
                    continue
                if isinstance(answer, Told):
                    found.append(answer)
        return found

    async def stop(self) -> None:
        """Tell nothing more. Workers with a folder go on, the others end."""
        tasks = [seat.task for seat in self._seats if seat.task is not None]
        if self._relieving is not None:
            tasks.append(self._relieving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for seat in self._seats:
            process, seat.process = seat.process, None
            if process is not None:
                if self._folder is None:
                    await _end(process)
                process.forget()
            seat.close()
        for old in (*self._old, *self._leaving):
            old.forget()

    # Sockets

    async def _inherited(self) -> dict[Listen, list[Pair]]:
        """Return the sockets of the workers of the daemon before, each once."""
        found: dict[Listen, list[Pair]] = {}
        known: set[int] = set()
        for old in await find(self._folder):
            (self._leaving if old.met.retired else self._old).append(old)
            old.watch(self._left)
        for old in list(self._old):
            try:
                answer, given = await old.ask(HandOver())
            except (Busy, UnknownResult) as error:
                log.warning("a DNS worker does not give its sockets", why=str(error))
                continue
            if not isinstance(answer, HandedOver):
                continue
            for at, (address, port) in enumerate(answer.listens):
                both = given[2 * at], given[2 * at + 1]
                inode = os.fstat(both[0].fileno()).st_ino
                if inode in known:
                    for one in both:
                        one.close()
                    continue
                known.add(inode)
                found.setdefault(Listen(parse_address(address), port), []).append(both)
        return found

    def _share_out(self, inherited: dict[Listen, list[Pair]]) -> None:
        """Give each worker sockets of each address: inherited ones, all of them, or new ones."""
        for text in self._settings.listen if self._seats else ():
            listen = parse_listen(text)
            there = inherited.pop(listen, [])
            while len(there) < len(self._seats):
                both = pair(listen, self._settings.udp_buffer_bytes, fresh=not there)
                listen = Listen(listen.address, both[0].getsockname()[1])
                there.append(both)
            for at, both in enumerate(there):
                self._seats[at % len(self._seats)].sockets.append((listen, both))
        for pairs in inherited.values():
            for both in pairs:
                for one in both:
                    one.close()

    # One worker

    async def _begin(self, seat: Seat) -> None:
        """Start the process of a seat. Raise Busy or UnknownResult."""
        process = await Process.start(seat.number, self._folder)
        seat.process, seat.serves, seat.began = process, False, time.monotonic()
        process.watch(lambda gone: self._lost(seat, gone))
        listens: list[WireListen] = [(str(one.address), one.port) for one, _ in seat.sockets]
        given = [one for _, both in seat.sockets for one in both]
        await process.ask(Begin(self._settings, listens, self._folder is not None), given)
        seat.in_step.clear()
        seat.untold = Untold()
        seat.note(self._kept.everything())
        await self._serve_if_due(seat)

    async def _serve_if_due(self, seat: Seat) -> None:
        """Let it answer once it knows everything, and before that if nobody else does.

        Where everything is known here, questions wait for the moment until it was told.
        """
        nobody = not self._old and not self._kept.synced
        if seat.process is not None and not seat.serves and (seat.in_step.is_set() or nobody):
            seat.serves = True
            await seat.process.ask(Serve())

    async def _run(self, seat: Seat) -> None:
        """Tell a worker everything, and start it again whenever it ends."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                if seat.process is None:
                    await self._begin(seat)
                await self._feed(seat)
            except (Busy, UnknownResult) as error:
                log.warning("DNS worker does not answer", number=seat.number, why=str(error))
                if (process := seat.process) is not None:
                    process.kill()
                    await process.gone()
            if time.monotonic() - seat.began > LIVES_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            else:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _feed(self, seat: Seat) -> None:
        """Tell one process what there is to tell, for as long as it lives."""
        process = seat.process
        while process is not None and process is seat.process:
            await self._serve_if_due(seat)
            await seat.wake.wait()
            seat.wake.clear()
            while seat.untold or (self._kept.synced and not seat.in_step.is_set()):
                portion = seat.untold.portion(self._kept)
                synced = self._kept.synced and not seat.untold
                await process.ask(Feed(portion, synced))
                if synced:
                    seat.in_step.set()

    def _lost(self, seat: Seat, gone: Process) -> None:
        """Note that a process is gone. `_run` starts it again."""
        if seat.process is gone:
            log.error("a DNS worker has ended; it is started again", number=seat.number)
            self.ended += 1
            seat.process = None
            seat.in_step.clear()
            seat.wake.set()

    # The workers of the daemon before

    def _left(self, old: Process) -> None:
        """Note that one of them is gone; ours answer if they did not yet."""
        for there in (self._old, self._leaving):
            if old in there:
                there.remove(old)
        for seat in self._seats:
            seat.wake.set()

    async def _relieve(self) -> None:
        """Let them end, once ours can do what they do."""
        for seat in self._seats:
            await seat.in_step.wait()
            await self._serve_if_due(seat)
        for old in list(self._old):
            self._old.remove(old)
            self._leaving.append(old)
            with contextlib.suppress(Busy, UnknownResult):
                await old.ask(Retire())
            log.info("DNS worker is relieved", pid=old.pid, version=old.met.version)


async def find(folder: Path | None) -> list[Process]:
    """Return the processes whose control sockets are in a folder; files of others are removed."""
    found = []
    for path in _control_sockets(folder):
        try:
            found.append(await Process.find(path))
        except Busy as error:
            log.info("no DNS worker there", why=str(error))
    return found


def _control_sockets(folder: Path | None) -> list[Path]:
    return [] if folder is None else sorted(folder.glob("*.sock"))


async def quit_all(processes: Collection[Process]) -> None:
    """End processes that were found, at once."""
    for one in processes:
        one.watch(lambda _: None)
    await asyncio.gather(*(_end(one) for one in processes))


async def _end(process: Process) -> None:
    await process.quit()
    try:
        async with asyncio.timeout(QUIT_SECONDS):
            await process.gone()
    except TimeoutError:
        process.kill()
        await process.gone()

"""The DNS workers of a node: started, fed, started again, and exchanged without losing a question.

Lives here: the supervision of all of them. Must not: know where they answer (bound.py), what is
told (feed.py), how one is told (seat.py), or what a worker does with it.

Sockets stay open here beside the worker's own: what arrives while a worker is started again waits
in the kernel. The workers of a daemon that is gone answer until those of the next one have been
told everything; these read the same sockets, so no question is refused or lost on the way.
"""

import asyncio
import contextlib
import socket
from pathlib import Path

import structlog
from msgspec import structs

from vipd.dns.feed import Changed, Kept
from vipd.dns.server.bound import Bound
from vipd.dns.server.messages import Hear, Retire, Sibling, Supervised, Tell, Told
from vipd.dns.server.process import Process
from vipd.dns.server.seat import Seat
from vipd.dns.server.takeover import end, find, inherit
from vipd.dns.settings import DnsSettings, Listen
from vipd.proxy.errors import Busy, DataplaneError, UnknownResult, VipdError

TELL_SECONDS = 2.0
"""How long a worker may take to say how it is."""
HTTP_RETRY_SECONDS = 10.0
"""Until an address for metrics that is somebody else's is tried again."""

log = structlog.get_logger()


class Workers:
    """The processes that answer for one daemon. In `folder` the next daemon finds them.

    Without a folder they end with whoever started them.
    """

    def __init__(self, settings: DnsSettings, kept: Kept, folder: Path | None) -> None:
        self.settings, self.kept, self.folder = settings, kept, folder
        self.supervised = Supervised()
        self._seats: list[Seat] = []
        self._bound = Bound()
        self._old: list[Process] = []
        """Workers of the daemon before."""
        self._leaving: list[Process] = []
        """Those that take no new questions, of the daemon before or of settings before."""
        self._relieving: asyncio.Task[None] | None = None
        self._retrying: asyncio.Task[None] | None = None

    @property
    def listens(self) -> list[Listen]:
        """Where questions are answered."""
        return list(self._bound.at.values())

    @property
    def http(self) -> list[Listen]:
        """Where metrics are told."""
        return list(self._bound.http_at.values())

    @property
    def relieves(self) -> bool:
        """Whether workers of the daemon before still answer."""
        return bool(self._old)

    async def start(self) -> None:
        """Bind and start. Raise ConfigError where an address is taken, Busy where nothing starts.

        Questions are answered from now on: by the workers of the daemon before until everything has
        been told, or with SERVFAIL for the cluster's names.
        """
        count = self.settings.workers if self.settings.listen else 0
        self._seats = [Seat(number, self) for number in range(count)]
        try:
            ours = {one.pid for one in self._leaving}
            for old in await find(self.folder):
                if old.pid in ours:
                    old.forget()
                    continue
                (self._leaving if old.met.retired else self._old).append(old)
                old.watch(self._left)
            inherited = await inherit([*self._old, *self._leaving])
            try:
                self._bound.start(self.settings, self._seats, inherited)
            finally:
                inherited.close()
            await asyncio.gather(*(seat.begin() for seat in self._seats))
        except BaseException:
            await self._give_up()
            raise
        for seat in self._seats:
            seat.task = asyncio.ensure_future(seat.run())
        if self._old:
            self._relieving = asyncio.ensure_future(self._relieve())
        self._retry_http()

    async def change(self, settings: DnsSettings) -> None:
        """Answer by other settings from now on; the number of workers stays.

        Raise ConfigError where an address is taken: nothing has changed then.
        """
        if not self._seats:
            before, self.settings = self.settings, settings
            try:
                await self.start()
            except VipdError:
                self.settings = before
                raise
            return
        if not settings.listen:
            self.settings = settings
            await self._retire()
            return
        self._bound.change(self.settings, settings, self._seats)
        self.settings = structs.replace(settings, workers=self.settings.workers)
        self._retry_http()
        for seat in self._seats:
            seat.look()

    def note(self, changed: Changed) -> None:
        """Tell the workers what has changed."""
        for seat in self._seats:
            seat.note(changed)

    def refused(self) -> None:
        """Count a changed configuration that was wrong."""
        self.supervised = structs.replace(self.supervised, refused=self.supervised.refused + 1)
        for seat in self._seats:
            seat.look()

    async def in_step(self) -> None:
        """Return when every worker was told everything."""
        for seat in self._seats:
            await seat.in_step.wait()

    async def told(self) -> list[Told]:
        """Return what each worker says of itself.

        Nothing of those that do not answer, nor of those that nobody tells changes any more: these
        would be called well.
        """
        found = []
        for seat in self._seats:
            if seat.process is not None and (seat.task is None or not seat.task.done()):
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
        await self._end_tasks()
        await self._let_go()
        for old in (*self._old, *self._leaving):
            old.forget()

    async def _give_up(self) -> None:
        """Be as before a start that has failed; what is leaving goes on leaving."""
        await self._let_go()
        self._seats.clear()
        self._bound.clear()
        for old in self._old:
            old.forget()
        self._old.clear()

    async def _let_go(self) -> None:
        for seat in self._seats:
            process, seat.process = seat.process, None
            if process is not None:
                if self.folder is None:
                    await end(process)
                process.forget()
            seat.close()

    async def _retire(self) -> None:
        """Let all of them end, once what has arrived is answered."""
        await self._end_tasks()
        for seat in self._seats:
            process, seat.process = seat.process, None
            if process is not None:
                self._leaving.append(process)
                process.watch(self._left)
                with contextlib.suppress(Busy, UnknownResult):
                    await process.ask(Retire())
            seat.close()
        self._seats.clear()
        self._bound.clear()

    async def _end_tasks(self) -> None:
        tasks = [*(seat.task for seat in self._seats), self._relieving, self._retrying]
        there = [task for task in tasks if task is not None]
        for task in there:
            task.cancel()
        await asyncio.gather(*there, return_exceptions=True)
        self._relieving = self._retrying = None

    # Metrics

    def _retry_http(self) -> None:
        """Try again later where an address for metrics is somebody else's: answers come first."""
        if self._retrying is None and self._seats and self._bound.lacks_http(self.settings):
            self._retrying = asyncio.ensure_future(self._try_http())

    async def _try_http(self) -> None:
        while self._bound.lacks_http(self.settings):
            await asyncio.sleep(HTTP_RETRY_SECONDS)
            self._bound.share_http(self.settings, self._seats[0], {})
            self._seats[0].look()
        self._retrying = None

    # What seats tell

    async def begun(self, seat: Seat) -> None:
        """Let the first process ask the others how they are, which tells of all."""
        first = self._seats[0]
        for other in self._seats[1:] if seat is first else [seat]:
            if first.process is None or other.process is None or other is first:
                continue
            try:
                ours, theirs = socket.socketpair()
            except OSError as error:
                raise Busy(f"DNS workers cannot be introduced: {error.strerror}") from error
            # One that ends meanwhile is started again, and introduced then.
            with ours, theirs, contextlib.suppress(Busy, UnknownResult):
                await other.process.ask(Hear(), [theirs])
                await first.process.ask(Sibling(other.number), [ours])

    def lost(self, _: Seat) -> None:
        """Count it; everybody is told, so that it is seen in metrics."""
        self.supervised = structs.replace(self.supervised, restarts=self.supervised.restarts + 1)
        for seat in self._seats:
            seat.look()

    # The workers of the daemon before

    def _left(self, old: Process) -> None:
        """Note that one of them is gone; ours answer if they did not yet."""
        for there in (self._old, self._leaving):
            if old in there:
                there.remove(old)
        for seat in self._seats:
            seat.look()

    async def _relieve(self) -> None:
        """Let them end, once ours can do what they do."""
        for seat in self._seats:
            await seat.in_step.wait()
            await seat.serve_if_due()
        for old in list(self._old):
            self._old.remove(old)
            self._leaving.append(old)
            with contextlib.suppress(Busy, UnknownResult):
                await old.ask(Retire())
            log.info("DNS worker is relieved", pid=old.pid, version=old.met.version)

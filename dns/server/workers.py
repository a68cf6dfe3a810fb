"""The DNS workers of a node: started, fed, started again, and exchanged without losing a question.

Lives here: the supervision of all of them, and where they answer. Must not: know what is told
(feed.py), how one is told (seat.py), or what a worker does with it.

Sockets stay open here beside the worker's own: what arrives while a worker is started again waits
in the kernel. The workers of a daemon that is gone answer until those of the next one have been
told everything; these read the same sockets, so no question is refused or lost on the way.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import structlog
from msgspec import structs

from vipd.dns.feed import Changed, Kept
from vipd.dns.server.listeners import Pair, http_listener, make_room, pair
from vipd.dns.server.messages import Hear, Retire, Sibling, Supervised, Tell, Told
from vipd.dns.server.process import Process
from vipd.dns.server.seat import Seat
from vipd.dns.server.takeover import Inherited, end, find, inherit
from vipd.dns.settings import DnsSettings, Listen, parse_http, parse_listen
from vipd.proxy.errors import Busy, ConfigError, DataplaneError, UnknownResult

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
        self._at: dict[str, Listen] = {}
        """Where questions are answered, by the setting; port 0 is what the kernel made of it."""
        self._http_at: dict[str, Listen] = {}
        self._old: list[Process] = []
        """Workers of the daemon before."""
        self._leaving: list[Process] = []
        """Those of them that take no new questions."""
        self._relieving: asyncio.Task[None] | None = None
        self._retrying: asyncio.Task[None] | None = None

    @property
    def listens(self) -> list[Listen]:
        """Where questions are answered."""
        return list(self._at.values())

    @property
    def http(self) -> list[Listen]:
        """Where metrics are told."""
        return list(self._http_at.values())

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
            for old in await find(self.folder):
                (self._leaving if old.met.retired else self._old).append(old)
                old.watch(self._left)
            inherited = await inherit(list(self._old))
            try:
                self._share_out(inherited)
            finally:
                inherited.close()
            await asyncio.gather(*(seat.begin() for seat in self._seats))
        except BaseException:
            await self.stop()
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
            self.settings = settings
            await self.start()
            return
        if not settings.listen:
            self.settings = settings
            await self._retire()
            return
        stays = _staying(self._at, settings.listen, parse_listen)
        made = self._made(settings, [text for text in settings.listen if text not in stays])
        self._at = stays
        for seat in self._seats:
            seat.sockets = [one for one in seat.sockets if one[0] in stays.values()]
        for text, listen, pairs in made:
            self._give(text, listen, pairs)
        if settings.udp_buffer_bytes != self.settings.udp_buffer_bytes:
            for seat in self._seats:
                for _, (udp, _) in seat.sockets:
                    make_room(udp, settings.udp_buffer_bytes)
        self.settings = structs.replace(settings, workers=self.settings.workers)
        self._share_http({})
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
        await self._end_tasks()
        for seat in self._seats:
            process, seat.process = seat.process, None
            if process is not None:
                if self.folder is None:
                    await end(process)
                process.forget()
            seat.close()
        for old in (*self._old, *self._leaving):
            old.forget()

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
        self._at.clear()
        self._http_at.clear()

    async def _end_tasks(self) -> None:
        tasks = [*(seat.task for seat in self._seats), self._relieving, self._retrying]
        there = [task for task in tasks if task is not None]
        for task in there:
            task.cancel()
        await asyncio.gather(*there, return_exceptions=True)
        self._relieving = self._retrying = None

    # Sockets

    def _share_out(self, inherited: Inherited) -> None:
        """Give each worker sockets of each address: inherited ones, all of them, or new ones."""
        for text in self.settings.listen if self._seats else ():
            listen = parse_listen(text)
            if listen in self._at.values():
                continue
            there = inherited.pairs.pop(listen, [])
            self._give(text, *self._bound(listen, there, self.settings))
        if self._seats:
            self._share_http(inherited.http)

    def _made(
        self, settings: DnsSettings, texts: Sequence[str]
    ) -> list[tuple[str, Listen, list[Pair]]]:
        """Return new sockets for these addresses; raise ConfigError, and none is left."""
        made: dict[Listen, tuple[str, Listen, list[Pair]]] = {}
        try:
            for text in texts:
                listen = parse_listen(text)
                if listen not in made:
                    made[listen] = (text, *self._bound(listen, [], settings))
        except ConfigError:
            _close(both for _, _, pairs in made.values() for both in pairs)
            raise
        return list(made.values())

    def _bound(
        self, listen: Listen, there: list[Pair], settings: DnsSettings
    ) -> tuple[Listen, list[Pair]]:
        """Return sockets of an address, one pair for each worker at least. Raise ConfigError."""
        pairs = list(there)
        try:
            while len(pairs) < len(self._seats):
                both = pair(listen, settings.udp_buffer_bytes, fresh=not pairs)
                listen = Listen(listen.address, both[0].getsockname()[1])
                pairs.append(both)
        except ConfigError:
            _close(pairs)
            raise
        return listen, pairs

    def _give(self, text: str, listen: Listen, pairs: list[Pair]) -> None:
        self._at[text] = listen
        for at, both in enumerate(pairs):
            self._seats[at % len(self._seats)].sockets.append((listen, both))

    def _share_http(self, inherited: dict[Listen, list[socket.socket]]) -> None:
        """Let the first worker have the sockets for metrics, as far as they can be had."""
        first = self._seats[0]
        self._http_at = _staying(self._http_at, self.settings.http, parse_http)
        kept = [one for one in first.http if one[0] in self._http_at.values()]
        for text in self.settings.http:
            listen = parse_http(text)
            if text in self._http_at or listen in self._http_at.values():
                continue
            there = inherited.pop(listen, [])
            try:
                made = there.pop() if there else http_listener(listen)
            except ConfigError as error:
                log.warning("DNS metrics are not told there", why=error.why)
                continue
            listen = Listen(listen.address, made.getsockname()[1])
            self._http_at[text] = listen
            kept.append((listen, made))
        first.http = kept

    def _retry_http(self) -> None:
        """Try again later where an address for metrics is somebody else's: answers come first."""
        if self._retrying is None and self._seats and self._lacks_http():
            self._retrying = asyncio.ensure_future(self._try_http())

    def _lacks_http(self) -> bool:
        return len(self._http_at) < len({parse_http(one) for one in self.settings.http})

    async def _try_http(self) -> None:
        while self._lacks_http():
            await asyncio.sleep(HTTP_RETRY_SECONDS)
            self._share_http({})
            self._seats[0].look()
        self._retrying = None

    # What seats tell

    async def begun(self, seat: Seat) -> None:
        """Let the first process ask the others how they are, which tells of all."""
        first = self._seats[0]
        for other in self._seats[1:] if seat is first else [seat]:
            if first.process is None or other.process is None or other is first:
                continue
            ours, theirs = socket.socketpair()
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


def _staying(
    at: Mapping[str, Listen], wanted: Sequence[str], parse: Callable[[str], Listen]
) -> dict[str, Listen]:
    """Return where it goes on, by the setting, which may say the same in other words."""
    found: dict[str, Listen] = {}
    for text in wanted:
        listen = at.get(text, parse(text))
        if listen in at.values() and listen not in found.values():
            found[text] = listen
    return found


def _close(pairs: Iterable[Pair]) -> None:
    for one in (one for both in pairs for one in both):
        one.close()

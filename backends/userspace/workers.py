"""The workers of a node: how many, which of them listens where, and what becomes of one that ends.

Lives here: the supervision, and what is wanted of all. Must not: decide which worker listens where
(assignment.py), tell one worker what it is to do (telling.py), know virtual servers (compile.py) or
how bytes are forwarded (forwarder/).

Workers outlive the daemon: a new one finds them by their control sockets and takes over what they
serve. One of another version is replaced: its successor gets its listeners, open, so no connection
is refused, and it ends when its own connections have.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Collection, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path

import structlog
from msgspec import structs

from vipd.backends.privileges import allowed_descriptors
from vipd.backends.usage import Usage
from vipd.backends.userspace import asking, messages
from vipd.backends.userspace.assignment import changes, lacking, stops
from vipd.backends.userspace.forwarder.descriptors import WANTED
from vipd.backends.userspace.messages import Count, Pause, Quit, Retire, Told
from vipd.backends.userspace.objects import Forwarding, Place, Surroundings
from vipd.backends.userspace.telling import Telling
from vipd.backends.userspace.usage import places, usage
from vipd.backends.userspace.worker import Worker, end_silent
from vipd.proxy.errors import Busy, DataplaneError
from vipd.proxy.version import VERSION
from vipd.proxy.virtualserver import Endpoint, VirtualServer

LIVES_SECONDS = 5.0
"""A worker that lived longer is started again at once; otherwise the pause doubles."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
QUIT_SECONDS = 10.0
"""How long workers have to end when they are told to, before they are killed."""

LOOK_SECONDS = 5.0
"""Between two looks at whether workers still answer."""

log = structlog.get_logger()


class Workers:
    """The worker processes whose control sockets are in a folder.

    `transparent`: they may show clients' addresses to endpoints.
    """

    def __init__(self, count: int, folder: Path, *, transparent: bool = False) -> None:
        self.count = count
        self._transparent = transparent
        self._folder = folder
        self._active: dict[int, Worker] = {}
        self._retired: list[Worker] = []
        self._wanted: dict[Place, Forwarding] = {}
        self._telling = Telling()
        self._found = False
        self._watching: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        """Set while no worker is to be started, nor told what is wanted."""
        self._order = asyncio.Lock()
        """Held while workers are told: the last that they are told is the last that was wanted."""
        self._nobody = asyncio.Event()
        """Set as soon as the last process is gone."""
        self._started: dict[int, float] = {}
        self._pauses: dict[int, float] = {}
        self._returning: set[int] = set()
        """Numbers of workers that ended and are being started again."""
        self._short: set[Worker] = set()
        """Those that lack listeners, which they are given again."""
        self._restarts: set[asyncio.Task[None]] = set()
        """Of workers, and of attempts to give them listeners."""
        self._ended: Counter[int] = Counter()
        """How often each number was started again."""

    # Which workers there are

    async def find(self) -> None:
        """Take over the workers that are there. Done once."""
        if self._found:
            return
        self._found = True
        old: list[Worker] = []
        for path in sorted(self._folder.glob("*.sock")):
            try:
                worker = await Worker.find(path)
            except Busy as error:
                log.warning("a worker is not taken over", why=str(error))
                end_silent(path)
                continue
            if not worker.is_here:
                worker.forget()
                continue
            worker.watch(self._lost)
            if worker.retired:
                self._retired.append(worker)
            elif worker.number in self._active:
                old.append(worker)
            else:
                self._active[worker.number] = worker
        for worker in self._active.values():
            self._telling.surroundings = messages.surroundings_of(worker.told.surroundings)
            for one in worker.told.places:
                self._wanted[messages.place_of(one.place)] = messages.forwarding_of(one.forwarding)
        for worker in old:
            await self._retire(worker)

    async def complete(self) -> None:
        """Start the workers that are missing, and replace those of another version or number, or
        with other privileges, or that may open fewer files than new ones."""
        await self.find()
        self._over.clear()
        surplus = [one for one in self._active.values() if one.number >= self.count]
        for worker in list(self._active.values()):
            if worker not in surplus and not self._is_right(worker):
                await self._replace(worker)
        there = self._active.keys() | self._returning
        missing = [one for one in range(self.count) if one not in there]
        if missing:
            starts = (self._resume_or_start(number) for number in missing)
            for error in await asyncio.gather(*starts, return_exceptions=True):
                if error is not None:
                    raise error  # the next attempt finds those that did start
            for number in missing:
                await self._catch_up(number)
        if missing or surplus:
            await self._share_anew(surplus)
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _share_anew(self, surplus: Collection[Worker]) -> None:
        """Give every worker what is its own by their number now; then let the surplus go.

        Until a worker is told to stop it listens on, so no place is without a listener.
        """
        for worker in list(self._active.values()):
            if worker not in surplus:
                self._give_again(worker, await self._tell_all(worker, self._missing(worker)))
        for worker in surplus:
            if self._active.pop(worker.number, None) is not None:
                await self._retire(worker)

    @property
    def running(self) -> int:
        """How many workers there are, with those that only end what is open."""
        return len(self._active) + len(self._retired)

    # What they do

    async def serve(
        self, wanted: Mapping[Place, Forwarding], gone: Collection[Place]
    ) -> dict[Place, DataplaneError]:
        """Let the workers serve places like this, and others no more; return what cannot be done.

        A place that another program has is left alone. A listener that a worker has no descriptor
        for is not among what cannot be done: it is given again until it is taken.
        """
        async with self._order:
            return await self._serve(wanted, gone)

    async def _serve(
        self, wanted: Mapping[Place, Forwarding], gone: Collection[Place]
    ) -> dict[Place, DataplaneError]:
        self._wanted |= wanted
        for place in gone:
            self._wanted.pop(place, None)
        told = {
            worker: [
                *changes(worker.number, self.count, worker.places, wanted),
                *stops(worker.places, gone),
            ]
            for worker in self._active.values()
        }
        failed: dict[Place, DataplaneError] = {}
        answers = await asyncio.gather(*(self._telling.do(one, todo) for one, todo in told.items()))
        for worker, found in zip(told, answers, strict=True):
            short = {place: why for place, why in found.items() if isinstance(why, Busy)}
            self._give_again(worker, short)
            failed |= {place: why for place, why in found.items() if place not in short}
        if failed:
            for place in failed:
                self._wanted.pop(place, None)
            await asyncio.gather(
                *(self._telling.do(one, stops(one.places, failed)) for one in self._active.values())
            )
        return failed

    async def surround(self, surroundings: Surroundings) -> None:
        """Tell the workers what they have to know of the node."""
        await self._telling.surround(surroundings, self._active.values())

    async def cut(self, departed: Iterable[tuple[Place, Endpoint]]) -> int:
        """End what is open to endpoints; return how many connections and sessions."""
        return await self._telling.cut(departed, self._all())

    async def open(self, *, transparent: bool = False) -> Counter[Place]:
        """Return how many connections and sessions are open at each place, over all workers.

        `transparent`: over those only that may show clients' addresses to endpoints.
        """
        return await asking.opened(one for one in self._all() if one.transparent or not transparent)

    async def reports(self) -> list[Told]:
        """Return what each worker says of itself."""
        await self.find()
        return await asking.reports(self._all())

    async def usage(self, servers: Collection[VirtualServer], client: str = "") -> Usage:
        """Return what the workers have counted, at the places of these virtual servers (Counting).

        Those of another version may not know what is asked, and are left out.
        """
        await self.find()
        where = places(servers, self._wanted)
        there = [one for one in self._all() if one.version == VERSION]
        reported, silent = await asking.counted(there, where, client)
        missing = {one.number: len(self._missing(one)) for one in self._short}
        found = await asyncio.to_thread(usage, where, reported, self._ended.copy(), missing)
        return structs.replace(found, silent=silent, wanted=self.count)

    async def pause(self) -> None:
        """Let all workers accept nothing, and keep what is open until they are needed again."""
        await self.find()
        self._wanted.clear()
        await self._end_restarts()
        for worker in list(self._active.values()):
            worker.retired = True
            self._retired.append(worker)
            await worker.tell(Pause())
        self._active.clear()

    async def quit(self) -> int:
        """End all workers with everything that is open; return how many there were."""
        await self.find()
        self._wanted.clear()
        await self._end_restarts()
        there = list(self._all())
        for worker in there:
            await worker.tell(Quit())
        self._nobody.clear()
        try:
            async with asyncio.timeout(QUIT_SECONDS):
                while self.running:
                    await self._nobody.wait()
        except TimeoutError:
            for worker in self._all():
                worker.kill()
            while self.running:
                await self._nobody.wait()
        return len(there)

    # One worker

    def _all(self) -> Iterator[Worker]:
        yield from list(self._active.values())
        yield from list(self._retired)

    async def _start(self, number: int) -> None:
        worker = await Worker.start(number, self._folder, transparent=self._transparent)
        self._started[number] = time.monotonic()
        self._active[number] = worker
        worker.watch(self._lost)

    def _is_right(self, worker: Worker) -> bool:
        return not self._wrong(worker)

    def _wrong(self, worker: Worker) -> str:
        """Return why a worker is not one that would be started now, or an empty text.

        One that this daemon has started has the limits that it can have.
        """
        if worker.version != VERSION:
            return f"its version is {worker.version}"
        if worker.transparent != self._transparent:
            return f"transparent is {self._transparent} now"
        files = allowed_descriptors(WANTED) if worker.is_found else 0
        if worker.told.files < files:
            return f"it may open {worker.told.files} files, and a new one {files}"
        return ""

    async def _resume_or_start(self, number: int) -> None:
        for worker in list(self._retired):
            if worker.number == number and self._is_right(worker):
                with contextlib.suppress(Busy):
                    await worker.resume()
                    self._retired.remove(worker)
                    self._active[number] = worker
                    return
        await self._start(number)

    async def _retire(self, worker: Worker) -> None:
        worker.retired = True
        self._retired.append(worker)
        await worker.tell(Retire())

    async def _replace(self, old: Worker) -> None:
        """Start a successor and give it the listeners, open."""
        number = old.number
        log.info("worker is replaced", number=number, why=self._wrong(old), version=VERSION)
        await self._start(number)
        old.retired = True
        self._retired.append(old)
        try:
            await self._telling.hand_over(old, self._active[number], self._wanted)
        except DataplaneError as error:
            log.warning("listeners are not handed over", number=number, why=str(error))
        finally:
            await old.tell(Retire())
        await self._catch_up(number)

    def _lost(self, worker: Worker) -> None:
        """Note that a process is gone; start it again where it should be there."""
        if worker in self._retired:
            self._retired.remove(worker)
        was_active = self._active.get(worker.number) is worker
        if was_active:
            del self._active[worker.number]
        if not self.running:
            self._nobody.set()
        if self._over.is_set() or not was_active or worker.number >= self.count:
            return
        self._ended[worker.number] += 1
        log.error("a worker has ended; it is started again", number=worker.number, pid=worker.pid)
        self._returning.add(worker.number)
        self._spawn(self._restart(worker.number))

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _end_restarts(self) -> None:
        """Let no worker come back, and wait for those that just do."""
        self._over.set()
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        while self._restarts:
            await asyncio.wait(self._restarts)

    async def _pause(self, seconds: float) -> None:
        """Wait, but not for longer than workers are to come back."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()

    async def _watch(self) -> None:
        """Ask the workers for something every now and then: one that does not answer is killed."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            asked = (one.ask(Count()) for one in list(self._active.values()))
            await asyncio.gather(*asked, return_exceptions=True)

    async def _restart(self, number: int) -> None:
        lived = time.monotonic() - self._started.get(number, 0.0)
        pause = 0.0 if lived > LIVES_SECONDS else self._pauses.get(number, FIRST_PAUSE_SECONDS)
        self._pauses[number] = min(max(2 * pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        try:
            while True:
                await self._pause(pause)
                if self._over.is_set():
                    return
                try:
                    await self._start(number)
                    break
                except DataplaneError as error:
                    pause = min(max(2 * pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
                    log.warning("worker is not there yet", number=number, why=str(error))
        finally:
            self._returning.discard(number)
        with contextlib.suppress(DataplaneError):  # it is killed again, and comes back
            await self._catch_up(number)

    async def _catch_up(self, number: int) -> None:
        """Let a worker serve all that is wanted now; what it cannot have yet is tried again.

        The others serve it meanwhile.
        """
        worker = self._active.get(number)
        if worker is not None:
            self._give_again(worker, await self._tell_all(worker, self._wanted))

    def _give_again(self, worker: Worker, failed: Mapping[Place, DataplaneError]) -> None:
        """Give a worker the listeners that it could not have, soon; say so once."""
        if not failed or worker in self._short:
            return
        log.error(
            "a worker cannot listen everywhere; it is tried again",
            number=worker.number,
            places=len(failed),
            why=str(next(iter(failed.values()))),
        )
        self._short.add(worker)
        self._spawn(self._try_again(worker))

    async def _try_again(self, worker: Worker) -> None:
        pause = FIRST_PAUSE_SECONDS
        try:
            while missing := self._missing(worker):
                await self._pause(pause)
                if self._over.is_set() or self._active.get(worker.number) is not worker:
                    return
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                with contextlib.suppress(DataplaneError):  # a deaf one is killed, and comes back
                    await self._tell_all(worker, missing)
            log.info("a worker listens everywhere again", number=worker.number)
        finally:
            self._short.discard(worker)

    def _missing(self, worker: Worker) -> list[Place]:
        return lacking(worker.number, self.count, worker.places, self._wanted)

    async def _tell_all(
        self, worker: Worker, places: Collection[Place]
    ) -> dict[Place, DataplaneError]:
        async with self._order:  # what is wanted may change until it is our turn
            wanted = {one: self._wanted[one] for one in places if one in self._wanted}
            todo = list(changes(worker.number, self.count, worker.places, wanted))
            return await self._telling.do(worker, todo)

"""The workers of a node: how many, which of them listens where, and what becomes of one that ends.

Lives here: the supervision, and the exchanges with each worker. Must not: decide which worker
listens where (assignment.py), know virtual servers (compile.py) or how bytes are forwarded
(forwarder/).

Workers outlive the daemon: a new one finds them by their control sockets and takes over what they
serve. One of another version is replaced: its successor gets its listeners, open, so no connection
is refused, and it ends when its own connections have.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import Collection, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path

import structlog

from vipd.backends.usage import Usage
from vipd.backends.userspace import messages
from vipd.backends.userspace.assignment import Operation, batches, changes, stops
from vipd.backends.userspace.listeners import holders, listener
from vipd.backends.userspace.messages import (
    MOST_LISTENERS,
    Batch,
    Count,
    Counted,
    Cut,
    Done,
    HandedOver,
    HandOver,
    Listen,
    Pause,
    Quit,
    Retire,
    Stop,
    Tell,
    Told,
)
from vipd.backends.userspace.objects import Forwarding, Place, Surroundings
from vipd.backends.userspace.usage import places, usage
from vipd.backends.userspace.worker import Worker, end_silent
from vipd.proxy.errors import Busy, DataplaneError, Rejected
from vipd.proxy.version import VERSION
from vipd.proxy.virtualserver import Endpoint, VirtualServer

LIVES_SECONDS = 5.0
"""A worker that lived longer is started again at once; otherwise the pause doubles."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
QUIT_SECONDS = 10.0
"""How long workers have to end when they are told to, before they are killed."""

LOOK_SECONDS = 5.0
"""Between two looks at whether workers still answer."""
AT_ONCE = 2
"""Workers that are given listeners side by side: each takes MOST_LISTENERS descriptors here, and
the soft limit of a process is often 1,024."""

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
        self._surroundings = Surroundings()
        self._batches = 0
        self._found = False
        self._watching: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        """Set while no worker is to be started, nor told what is wanted."""
        self._order = asyncio.Lock()
        """Held while workers are told: the last that they are told is the last that was wanted."""
        self._making = asyncio.Semaphore(AT_ONCE)
        self._nobody = asyncio.Event()
        """Set as soon as the last process is gone."""
        self._started: dict[int, float] = {}
        self._pauses: dict[int, float] = {}
        self._returning: set[int] = set()
        """Numbers of workers that ended and are being started again."""
        self._restarts: set[asyncio.Task[None]] = set()
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
            self._surroundings = messages.surroundings_of(worker.told.surroundings)
            for one in worker.told.places:
                self._wanted[messages.place_of(one.place)] = messages.forwarding_of(one.forwarding)
        for worker in old:
            await self._retire(worker)

    async def complete(self) -> None:
        """Start the workers that are missing, and replace those of another version or number, or
        with other privileges."""
        await self.find()
        self._over.clear()
        for number, worker in list(self._active.items()):
            if number >= self.count:
                del self._active[number]
                await self._retire(worker)
            elif not self._is_right(worker):
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
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    @property
    def is_running(self) -> bool:
        """Whether there are workers, also those that only end what is open."""
        return bool(self._active or self._retired)

    # What they do

    async def serve(
        self, wanted: Mapping[Place, Forwarding], gone: Collection[Place]
    ) -> dict[Place, DataplaneError]:
        """Let the workers serve places like this, and others no more; return what cannot be done.

        A place that another program has is left alone.
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
        for found in await asyncio.gather(*(self._do(one, todo) for one, todo in told.items())):
            failed |= found
        if failed:
            for place in failed:
                self._wanted.pop(place, None)
            await asyncio.gather(
                *(self._do(one, stops(one.places, failed)) for one in self._active.values())
            )
        return failed

    async def surround(self, surroundings: Surroundings) -> None:
        """Tell the workers what they have to know of the node."""
        self._surroundings = surroundings
        asked = (one.ask(self._batch([])) for one in self._active.values())
        for error in await asyncio.gather(*asked, return_exceptions=True):
            # One that ended is told as it comes back.
            if isinstance(error, BaseException) and not isinstance(error, DataplaneError):
                raise error

    async def cut(self, departed: Iterable[tuple[Place, Endpoint]]) -> int:
        """End what is open to endpoints; return how many connections and sessions."""
        todo: list[Operation] = [
            Cut(messages.wire_place(place), messages.wire_endpoint(one)) for place, one in departed
        ]
        ended = 0
        for worker in self._all():
            with contextlib.suppress(DataplaneError):  # it ended, and what was open with it
                for part in batches(todo):
                    answer, _ = await worker.ask(self._batch(part))
                    ended += answer.cut if isinstance(answer, Done) else 0
        return ended

    async def open(self, *, transparent: bool = False) -> Counter[Place]:
        """Return how many connections and sessions are open at each place, over all workers.

        `transparent`: over those only that may show clients' addresses to endpoints.
        """
        found: Counter[Place] = Counter()
        for worker in self._all():
            if transparent and not worker.transparent:
                continue
            try:
                answer, _ = await worker.ask(Count())
            except DataplaneError:
                continue  # it ended, and what was open with it
            if isinstance(answer, Counted):
                found.update({messages.place_of(place): count for place, count in answer.open})
        return found

    async def reports(self) -> list[Told]:
        """Return what each worker says of itself."""
        await self.find()
        answers = [(await worker.ask(Tell()))[0] for worker in self._all()]
        return [one for one in answers if isinstance(one, Told)]

    async def usage(self, servers: Collection[VirtualServer], client: str = "") -> Usage:
        """Return what the workers have counted, at the places of these virtual servers (Counting).

        Those of another version may not know what is asked, and are left out.
        """
        await self.find()
        where = places(servers, self._wanted)
        there = [one for one in self._all() if one.version == VERSION]
        told = await asyncio.gather(*(one.report(where, client) for one in there))
        reported = [one for each in told for one in each]
        return await asyncio.to_thread(usage, where, reported, self._ended.copy())

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
                while self.is_running:
                    await self._nobody.wait()
        except TimeoutError:
            for worker in self._all():
                worker.kill()
            while self.is_running:
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
        return (worker.version, worker.transparent) == (VERSION, self._transparent)

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
        log.info("worker is replaced", number=number, version=old.version, by=VERSION)
        await self._start(number)
        old.retired = True
        self._retired.append(old)
        try:
            await self._hand_over(old, self._active[number])
        except DataplaneError as error:
            log.warning("listeners are not handed over", number=number, why=str(error))
        finally:
            await old.tell(Retire())
        await self._catch_up(number)

    async def _hand_over(self, old: Worker, new: Worker) -> None:
        places = [messages.wire_place(one) for one in old.places if one in self._wanted]
        for first in range(0, len(places), MOST_LISTENERS):
            answer, given = await old.ask(HandOver(places[first : first + MOST_LISTENERS]))
            if not isinstance(answer, HandedOver):
                continue
            # Where descriptors were lost on the way, `_catch_up` makes new ones.
            wires = answer.places[: len(given)]
            todo: list[Operation] = [
                Listen(one, messages.wire_forwarding(self._wanted[messages.place_of(one)]))
                for one in wires
            ]
            done, _ = await new.ask(self._batch(todo), given)
            failed = {place for place, _ in done.failed} if isinstance(done, Done) else set()
            new.places |= {messages.place_of(one) for one in wires if one not in failed}

    def _lost(self, worker: Worker) -> None:
        """Note that a process is gone; start it again where it should be there."""
        if worker in self._retired:
            self._retired.remove(worker)
        was_active = self._active.get(worker.number) is worker
        if was_active:
            del self._active[worker.number]
        if not self.is_running:
            self._nobody.set()
        if self._over.is_set() or not was_active:
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
        await self._catch_up(number)

    async def _catch_up(self, number: int) -> None:
        """Let a worker serve all that is wanted now; what it cannot have yet is tried again.

        The others serve it meanwhile.
        """
        worker = self._active.get(number)
        if worker is not None and (failed := await self._tell_all(worker, self._wanted)):
            log.error(
                "a worker cannot listen everywhere; it is tried again",
                number=number,
                places=len(failed),
                why=str(next(iter(failed.values()))),
            )
            self._spawn(self._try_again(worker))

    async def _try_again(self, worker: Worker) -> None:
        pause = FIRST_PAUSE_SECONDS
        failed = True
        while failed:
            await self._pause(pause)
            if self._over.is_set() or self._active.get(worker.number) is not worker:
                return
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            missing = self._wanted.keys() - worker.places
            failed = bool(await self._tell_all(worker, missing))

    async def _tell_all(
        self, worker: Worker, places: Collection[Place]
    ) -> dict[Place, DataplaneError]:
        async with self._order:  # what is wanted may change until it is our turn
            wanted = {one: self._wanted[one] for one in places if one in self._wanted}
            todo = list(changes(worker.number, self.count, worker.places, wanted))
            return await self._do(worker, todo)

    # What one worker is told

    def _batch(self, operations: list[Operation]) -> Batch:
        self._batches += 1
        around = messages.wire_surroundings(self._surroundings)
        return Batch(self._batches, operations, around)

    async def _do(
        self, worker: Worker, operations: Iterable[Operation]
    ) -> dict[Place, DataplaneError]:
        """Let a worker do operations in order; a worker that ends gets them when it is back."""
        failed: dict[Place, DataplaneError] = {}
        for part in batches(list(operations)):
            async with self._making:
                made, refused = await asyncio.to_thread(_listen, part)
                failed |= refused
                todo = [
                    one
                    for one in part
                    if not isinstance(one, Listen) or messages.place_of(one.place) not in refused
                ]
                try:
                    answer, _ = await worker.ask(self._batch(todo), made)
                except Busy:
                    return failed
            for one in todo:
                if isinstance(one, Listen):
                    worker.places.add(messages.place_of(one.place))
                elif isinstance(one, Stop):
                    worker.places.discard(messages.place_of(one.place))
            if isinstance(answer, Done):
                for place, why in answer.failed:
                    failed[messages.place_of(place)] = Rejected(f"listen {place}", why)
        return failed


def _listen(
    operations: Iterable[Operation],
) -> tuple[list[socket.socket], dict[Place, DataplaneError]]:
    """Return a listener for each operation that needs one, and the places that have none."""
    made: list[socket.socket] = []
    errors: dict[Place, str] = {}
    for one in operations:
        if not isinstance(one, Listen):
            continue
        place = messages.place_of(one.place)
        try:
            made.append(listener(place))
        except OSError as error:
            errors[place] = os.strerror(error.errno or 0)
    who = holders(errors) if errors else {}
    refused: dict[Place, DataplaneError] = {
        place: Rejected(f"listen {place}", f"{why}: {who[place]}" if place in who else why)
        for place, why in errors.items()
    }
    return made, refused

"""The workers of a node: how many, which of them listens where, and what becomes of one that ends.

Lives here: what is wanted of all, and that each has its part of it. Must not: decide which worker
listens where (assignment.py), tell one worker what it is to do (telling.py), start processes
(processes.py), know virtual servers (compile.py) or how bytes are forwarded (forwarder/).

Workers outlive the daemon: a new one finds them by their control sockets and takes over what they
serve. One of another version is replaced: its successor gets its listeners, open, so no connection
is refused, and it ends when its own connections have.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import structlog
from msgspec import structs

from vipd.backends.counts import Take
from vipd.backends.usage import Usage
from vipd.backends.userspace import asking
from vipd.backends.userspace.assignment import changes, lacking, stops
from vipd.backends.userspace.counters import counts
from vipd.backends.userspace.messages import Instruction, Pause, Quit, Retire, Told
from vipd.backends.userspace.objects import Forwarding, Place, Surroundings
from vipd.backends.userspace.processes import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    Processes,
)
from vipd.backends.userspace.telling import Telling
from vipd.backends.userspace.usage import places, usage
from vipd.backends.userspace.worker import Worker
from vipd.proxy.errors import Busy, DataplaneError
from vipd.proxy.version import VERSION
from vipd.proxy.virtualserver import Endpoint, VirtualServer

log = structlog.get_logger()


class Workers:
    """The worker processes whose control sockets are in a folder.

    `transparent`: they may show clients' addresses to endpoints.
    """

    def __init__(self, count: int, folder: Path, *, transparent: bool = False) -> None:
        self.count = count
        self._processes = Processes(count, folder, self._catch_up, transparent=transparent)
        self._wanted: dict[Place, Forwarding] = {}
        self._telling = Telling()
        self._finding: asyncio.Task[None] | None = None
        self._order = asyncio.Lock()
        """Held while workers are told: the last that they are told is the last that was wanted."""
        self._short: set[Worker] = set()
        """Those that lack listeners, which they are given again."""

    # Which workers there are

    async def find(self) -> None:
        """Take over the workers that are there, once.

        All who ask meanwhile wait for the same look, which goes on where they do not; one that
        failed is for the next who asks to repeat.
        """
        if self._finding is None:
            self._finding = asyncio.get_running_loop().create_task(self._find())
            self._finding.add_done_callback(self._looked)
        await asyncio.shield(self._finding)

    def _looked(self, finding: asyncio.Task[None]) -> None:
        if finding.cancelled() or finding.exception() is not None:
            self._finding = None

    async def _find(self) -> None:
        surplus = await self._processes.find()
        for worker in self._processes.active.values():
            self._telling.surroundings = worker.surroundings
            self._wanted |= worker.served
        for worker in surplus:
            await worker.tell(Retire())

    async def complete(self) -> None:
        """Start the workers that are missing, and replace those of another version or number, or
        with other privileges, or that may open fewer files than new ones."""
        await self.find()
        there = self._processes
        there.over.clear()
        surplus = [one for one in there.active.values() if one.number >= self.count]
        for worker in list(there.active.values()):
            if worker not in surplus and there.has(worker) and not there.is_right(worker):
                await self._replace(worker)
        missing = there.missing()
        if missing:
            starts = (there.resume_or_start(number) for number in missing)
            started = await asyncio.gather(*starts, return_exceptions=True)
            for one in started:
                if not isinstance(one, BaseException):
                    await self._catch_up(one)
            for one in started:
                if isinstance(one, BaseException):
                    raise one  # the next attempt finds those that did start
        if missing or surplus:
            await self._share_anew(surplus)
        there.watch()

    async def _share_anew(self, surplus: Collection[Worker]) -> None:
        """Give every worker what is its own by their number now; then let the surplus go.

        Until a worker is told to stop it listens on, so no place is without a listener.
        """
        for worker in list(self._processes.active.values()):
            if worker not in surplus:
                self._give_again(worker, await self._tell_all(worker, self._missing(worker)))
        for worker in surplus:
            await self._retire(worker)

    @property
    def running(self) -> int:
        """How many workers there are, with those that only end what is open."""
        return self._processes.running

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
        answers = await self._do(
            {
                worker: [
                    *changes(worker.number, self.count, worker.places, wanted),
                    *stops(worker.places, gone),
                ]
                for worker in self._processes.active.values()
            }
        )
        failed: dict[Place, DataplaneError] = {}
        for worker, found in answers.items():
            short = {place: why for place, why in found.items() if isinstance(why, Busy)}
            self._give_again(worker, short)
            failed |= {place: why for place, why in found.items() if place not in short}
        if failed:
            for place in failed:
                self._wanted.pop(place, None)
            there = self._processes.active.values()
            await self._do({one: stops(one.places, failed) for one in there})
        return failed

    async def _do(
        self, told: Mapping[Worker, Sequence[Instruction]]
    ) -> dict[Worker, dict[Place, DataplaneError]]:
        """Tell workers side by side; return, of each, what it could not do.

        Raise what kept one from it, but not before all are through: they would be told the next
        change in the midst of this one.
        """
        todo = (self._telling.do(worker, each) for worker, each in told.items())
        answers: dict[Worker, dict[Place, DataplaneError]] = {}
        for worker, one in zip(
            told, await asyncio.gather(*todo, return_exceptions=True), strict=True
        ):
            if isinstance(one, BaseException):
                raise one
            answers[worker] = one
        return answers

    async def surround(self, surroundings: Surroundings) -> None:
        """Tell the workers what they have to know of the node."""
        await self._telling.surround(surroundings, self._processes.active.values())

    async def cut(self, departed: Iterable[tuple[Place, Endpoint]]) -> int:
        """End what is open to endpoints; return how many connections and sessions."""
        return await self._telling.cut(departed, self._processes.all())

    async def open(self, *, transparent: bool = False) -> Counter[Place]:
        """Return how many connections and sessions are open at each place, over all workers.

        `transparent`: over those only that may show clients' addresses to endpoints.
        """
        return await asking.opened(
            one for one in self._processes.all() if one.transparent or not transparent
        )

    async def reports(self) -> list[Told]:
        """Return what each worker says of itself."""
        await self.find()
        return await asking.reports(self._processes.all())

    async def usage(self, servers: Collection[VirtualServer], client: str = "") -> Usage:
        """Return what the workers have counted, at the places of these virtual servers (Counting).

        Those of another version may not know what is asked, and are left out.
        """
        await self.find()
        where = places(servers, self._wanted)
        there = [one for one in self._processes.all() if one.version == VERSION]
        reported, silent = await asking.counted(there, where, client)
        missing = {one.number: len(self._missing(one)) for one in self._short}
        found = await asyncio.to_thread(
            usage, where, reported, self._processes.ended.copy(), missing
        )
        return structs.replace(found, silent=silent, wanted=self.count)

    async def tally(self, servers: Collection[VirtualServer], take: Take, seconds: float) -> None:
        """Read what each worker has counted (see Tallying)."""
        try:
            async with asyncio.timeout(seconds):
                await self.find()
                where = places(servers, self._wanted)
                there = [one for one in self._processes.all() if one.version == VERSION]
                reported, silent = await asking.counted(there, where, "")
        except TimeoutError as error:
            raise Busy(f"workers did not answer within {seconds:g} s") from error
        owners = {one.key: one.owner for one in servers}
        await asyncio.to_thread(take, counts(reported, where, owners))
        if silent:
            raise Busy(f"worker {silent[0].number} (pid {silent[0].pid}) does not answer")

    async def pause(self) -> None:
        """Let all workers accept nothing, and keep what is open until they are needed again."""
        await self.find()
        self._wanted.clear()
        await self._processes.end_restarts()
        for worker in list(self._processes.active.values()):
            if self._processes.retire(worker):
                await worker.tell(Pause())

    async def quit(self) -> int:
        """End all workers with everything that is open; return how many there were."""
        await self.find()
        self._wanted.clear()
        await self._processes.end_restarts()
        there = list(self._processes.all())
        for worker in there:
            await worker.tell(Quit())
        await self._processes.all_ended()
        return len(there)

    # One worker

    async def _retire(self, worker: Worker) -> None:
        if self._processes.retire(worker):
            await worker.tell(Retire())

    async def _replace(self, old: Worker) -> None:
        """Start a successor and give it the listeners, open."""
        number = old.number
        log.info("worker is replaced", number=number, why=self._processes.wrong(old), by=VERSION)
        new = await self._processes.start(number)
        try:
            await self._telling.hand_over(old, new, self._wanted)
        except DataplaneError as error:
            log.warning("listeners are not handed over", number=number, why=str(error))
        finally:
            await old.tell(Retire())
        await self._catch_up(new)

    async def _catch_up(self, worker: Worker) -> None:
        """Let a worker serve all that is wanted now; what it cannot have yet is tried again.

        The others serve it meanwhile.
        """
        if self._processes.has(worker):
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
        self._processes.spawn(self._try_again(worker))

    async def _try_again(self, worker: Worker) -> None:
        pause = FIRST_PAUSE_SECONDS
        try:
            while missing := self._missing(worker):
                await self._processes.pause(pause)
                if self._processes.over.is_set() or not self._processes.has(worker):
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

"""The worker processes of a node: found, started, watched, started again and ended.

Lives here: which process has which number. Must not: know what workers serve, or tell them
(workers.py, telling.py).

A number has one process that is active, or is waited for by one who starts one, or both while it is
replaced; no second one is started meanwhile. So none listens that nobody knows of.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from vipd.backends.privileges import allowed_descriptors
from vipd.backends.userspace.forwarder.descriptors import WANTED
from vipd.backends.userspace.messages import Count
from vipd.backends.userspace.worker import Worker, end_silent
from vipd.proxy.errors import Busy, DataplaneError
from vipd.proxy.version import VERSION

LIVES_SECONDS = 5.0
"""A worker that lived longer is started again at once; otherwise the pause doubles."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
QUIT_SECONDS = 10.0
"""How long workers have to end when they are told to, before they are killed."""
LOOK_SECONDS = 5.0
"""Between two looks at whether workers still answer."""

log = structlog.get_logger()


class Processes:
    """The processes whose control sockets are in a folder.

    `transparent`: they may show clients' addresses to endpoints. `returned` is called with one that
    was started again after its end, and may raise DataplaneError.
    """

    def __init__(
        self,
        count: int,
        folder: Path,
        returned: Callable[[Worker], Awaitable[None]],
        *,
        transparent: bool = False,
    ) -> None:
        self.active: dict[int, Worker] = {}
        """Those that take new connections, by number."""
        self.retired: list[Worker] = []
        """Those that only end what is open."""
        self.over = asyncio.Event()
        """Set while no worker is to be started, nor told what is wanted."""
        self.ended: Counter[int] = Counter()
        """How often the worker of each number has ended and was needed."""
        self._count = count
        self._folder = folder
        self._returned = returned
        self._transparent = transparent
        self._starting: set[int] = set()
        """Numbers for which somebody starts a process, also between two attempts."""
        self._started: dict[int, float] = {}
        self._pauses: dict[int, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._nobody = asyncio.Event()
        """Set as soon as the last process is gone."""

    @property
    def running(self) -> int:
        """How many there are, with those that only end what is open."""
        return len(self.active) + len(self.retired)

    def all(self) -> Iterator[Worker]:
        """Yield all that are there."""
        yield from list(self.active.values())
        yield from list(self.retired)

    def missing(self) -> list[int]:
        """Return the numbers that nobody has, and for which nobody starts a process."""
        there = self.active.keys() | self._starting
        return [one for one in range(self._count) if one not in there]

    def has(self, worker: Worker) -> bool:
        """Return whether a worker still has its number."""
        return self.active.get(worker.number) is worker

    def is_right(self, worker: Worker) -> bool:
        """Return whether it is like one that is started now."""
        return not self.wrong(worker)

    def wrong(self, worker: Worker) -> str:
        """Return why a worker is not one that would be started now, or an empty text.

        One that this daemon has started has the limits that it can have.
        """
        if worker.version != VERSION:
            return f"its version is {worker.version}"
        if worker.transparent != self._transparent:
            return f"transparent is {self._transparent} now"
        files = allowed_descriptors(WANTED) if worker.is_found else 0
        if worker.files < files:
            return f"it may open {worker.files} files, and a new one {files}"
        return ""

    async def find(self) -> list[Worker]:
        """Take over the processes that are there, all at once; return those beyond one a number,
        which are to be told to retire.

        One that is silent is ended. Nothing is taken over where this is cancelled, or raises.
        """
        known = {one.path for one in self.all()}
        paths = [one for one in sorted(self._folder.glob("*.sock")) if one not in known]
        asked = [asyncio.create_task(_found(path)) for path in paths]
        try:
            found = [one for one in await asyncio.gather(*asked) if one is not None]
        except BaseException:
            for left in await asyncio.gather(*asked, return_exceptions=True):
                if isinstance(left, Worker):
                    left.forget()
            raise
        surplus: list[Worker] = []
        for worker in found:
            worker.watch(self._lost)
            if worker.retired:
                self.retired.append(worker)
            elif worker.number in self.active:
                surplus.append(worker)
                self._set_aside(worker)
            else:
                self.active[worker.number] = worker
        return surplus

    async def start(self, number: int) -> Worker:
        """Start a process, and return it once it has the number.

        Who has the number keeps it until then, and is retired; the caller tells it so. Raise Busy,
        as well where somebody else starts one.
        """
        if number in self._starting:
            raise Busy(f"worker {number} is being started")
        with self._starts(number):
            return await self._start(number)

    async def resume_or_start(self, number: int) -> Worker:
        """Let one that was paused go on, or start one. Raise Busy."""
        if number in self._starting:
            raise Busy(f"worker {number} is being started")
        with self._starts(number):
            for worker in list(self.retired):
                if worker.number == number and self.is_right(worker):
                    with contextlib.suppress(DataplaneError):
                        await worker.resume()
                        if worker in self.retired:  # and not gone since it answered
                            self.retired.remove(worker)
                            self._have(worker)
                            return worker
            return await self._start(number)

    def retire(self, worker: Worker) -> bool:
        """Take its number from a worker, which is to be told so; return whether it had one."""
        if not self.has(worker):
            return False
        del self.active[worker.number]
        self._set_aside(worker)
        return True

    def spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        """Do something beside, that ends soon after `over` is set."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def pause(self, seconds: float) -> None:
        """Wait, but not for longer than workers are to come back."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.over.wait()

    def watch(self) -> None:
        """Look from now on whether the active ones answer."""
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def end_restarts(self) -> None:
        """Let no worker come back, and wait for those that just do."""
        self.over.set()
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def all_ended(self) -> None:
        """Wait until all that were told to end have ended; kill those that do not in time."""
        self._nobody.clear()
        try:
            async with asyncio.timeout(QUIT_SECONDS):
                while self.running:
                    await self._nobody.wait()
        except TimeoutError:
            for worker in self.all():
                worker.kill()
            while self.running:
                await self._nobody.wait()

    # One process

    @contextmanager
    def _starts(self, number: int) -> Iterator[None]:
        self._starting.add(number)
        try:
            yield
        finally:
            self._starting.discard(number)

    async def _start(self, number: int) -> Worker:
        worker = await Worker.start(number, self._folder, transparent=self._transparent)
        self._started[number] = time.monotonic()
        worker.watch(self._lost)
        self._have(worker)
        return worker

    def _have(self, worker: Worker) -> None:
        """Give a worker its number; who has it until now, and lives, is set aside."""
        before = self.active.get(worker.number)
        self.active[worker.number] = worker
        if before is not None:
            self._set_aside(before)

    def _set_aside(self, worker: Worker) -> None:
        worker.retired = True
        self.retired.append(worker)

    def _lost(self, worker: Worker) -> None:
        """Note that a process is gone; start it again where it should be there."""
        number = worker.number
        was_active = self.has(worker)
        if was_active:
            del self.active[number]
        elif worker in self.retired:
            self.retired.remove(worker)
        if not self.running:
            self._nobody.set()
        if self.over.is_set() or not was_active or number >= self._count:
            return
        self.ended[number] += 1
        log.error("a worker has ended; it is started again", number=number, pid=worker.pid)
        if number not in self._starting:  # else its successor is under way
            self._starting.add(number)
            self.spawn(self._restart(number))

    async def _watch(self) -> None:
        """Ask the workers for something every now and then: one that does not answer is killed."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            asked = (one.ask(Count()) for one in list(self.active.values()))
            await asyncio.gather(*asked, return_exceptions=True)

    async def _restart(self, number: int) -> None:
        with self._starts(number):
            worker = await self._tried_until_started(number)
        if worker is not None:
            with contextlib.suppress(DataplaneError):  # it is killed again, and comes back
                await self._returned(worker)

    async def _tried_until_started(self, number: int) -> Worker | None:
        """Start a process, however often it takes; None where none is to be started any more."""
        lived = time.monotonic() - self._started.get(number, 0.0)
        pause = 0.0 if lived > LIVES_SECONDS else self._pauses.get(number, FIRST_PAUSE_SECONDS)
        self._pauses[number] = min(max(2 * pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        while True:
            await self.pause(pause)
            if self.over.is_set():
                return None
            try:
                return await self._start(number)
            except DataplaneError as error:
                pause = min(max(2 * pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
                log.warning("worker is not there yet", number=number, why=str(error))


async def _found(path: Path) -> Worker | None:
    """Return the worker behind a control socket; None where it is silent or not for us."""
    try:
        worker = await Worker.find(path)
    except Busy as error:
        log.warning("a worker is not taken over", why=str(error))
        end_silent(path)
        return None
    if worker.is_here:
        return worker
    worker.forget()
    return None

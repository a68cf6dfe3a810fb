"""The sync: events in, commits out, for one dataplane.

Lives here: the loop around the pure functions, what it holds between two rounds, and what it does
when a commit fails. Must not: read files or sockets, or know any one dataplane.

Events that arrive while a commit runs are folded into the next one; there is no other delay.
Retry classes (errors.Retry): busy → the same changes again after a pause; unknown or out of step →
observe, then plan everything; rejected → reported, and left until it changes.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar

import structlog
from msgspec import Struct

from vipd.backends.protocol import Compiler, Driver, Plan
from vipd.proxy.errors import DataplaneError, ManifestError, Retry, Unsupported
from vipd.proxy.events import Event, Problem, Synced
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.status import LastSync
from vipd.proxy.virtualserver import Changes, Key, NodeNetwork, Table, VirtualServer

ProgramT = TypeVar("ProgramT")
PlanT = TypeVar("PlanT", bound=Plan)
ObservedT = TypeVar("ObservedT")

SHORTEST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 5.0

PORTION = 1_000
"""Virtual servers that are compiled and committed together at a cold start."""

log = structlog.get_logger()


class _Done(Struct, frozen=True):
    """What a sync did: the keys it was about, those the kernel refused, and kernel objects."""

    changed: set[Key]
    rejected: dict[Key, DataplaneError]
    objects: int


class Sync(Generic[ProgramT, PlanT, ObservedT]):
    """Keeps one dataplane in step with a source. One task runs it; others may read it."""

    def __init__(
        self,
        settings: NodeSettings,
        compiler: Compiler[ProgramT, PlanT, ObservedT],
        driver: Driver[PlanT, ObservedT],
        on_synced: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.compiler = compiler
        self.driver = driver
        self.snapshot = Snapshot()
        self.table: Table = resolve(self.snapshot, settings)
        self.program: ProgramT | None = None
        """What the kernel is known to have; None before the first commit and when in doubt."""
        self.problems: dict[str, ManifestError] = {}
        self.rejected: dict[Key, DataplaneError] = {}
        self.synced = False
        self.syncs = 0
        self.failed_syncs = 0
        self.last_sync: LastSync | None = None
        self.failure = ""
        self._on_synced = on_synced
        self._listed = False
        self._inbox: list[Event] = []
        self._arrived = asyncio.Event()
        self._pending: dict[Key, VirtualServer | None] = {}
        self._pending_network: NodeNetwork | None = None
        self._pause = SHORTEST_PAUSE_SECONDS
        self._ghosts: set[Key] = set()
        self._observation: asyncio.Task[ObservedT | None] | None = None

    async def run(self, source: AsyncIterator[list[Event]]) -> None:
        """Sync until the source ends and everything it said is committed or given up."""
        # Observing needs nothing of the source, so it goes on while the source is read.
        self._observation = asyncio.ensure_future(self.driver.observe())
        feeding = asyncio.ensure_future(self._feed(source))
        next_try: float | None = None
        try:
            while True:
                await self._wait(feeding, next_try)
                self._take()
                if self._listed and self._to_do():
                    next_try = await self._sync()
                if feeding.done() and not self._inbox and next_try is None:
                    break
            await feeding
        finally:
            feeding.cancel()
            if self._observation is not None:
                self._observation.cancel()

    async def _feed(self, source: AsyncIterator[list[Event]]) -> None:
        async for batch in source:
            self._inbox += batch
            self._arrived.set()

    async def _wait(self, feeding: "asyncio.Future[None]", next_try: float | None) -> None:
        """Wait for events or the end of the source; after a failure, for the time of the next try.

        Events do not end that pause, or a busy source would turn a busy kernel's pause to nothing.
        """
        if next_try is not None:
            await asyncio.sleep(max(0.0, next_try - time.monotonic()))
            return
        if self._inbox:
            return
        self._arrived.clear()
        arrival = asyncio.ensure_future(self._arrived.wait())
        waited: set[asyncio.Future[Any]] = {arrival}
        if not feeding.done():
            waited.add(feeding)
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            arrival.cancel()

    def _take(self) -> None:
        """Fold what has arrived, and add what it means to what is to be committed."""
        events, self._inbox = self._inbox, []
        for event in events:
            if isinstance(event, Problem):
                self._note(event)
            elif isinstance(event, Synced):
                self._listed = True
        self.snapshot, touched = fold(self.snapshot, events)
        if not self.synced and self.program is None:
            return  # the first sync resolves everything at once
        self.table, changes = update(self.table, self.snapshot, self.settings, touched)
        self._pending.update(changes.virtual_servers)
        if not self._ghosts.isdisjoint(changes.virtual_servers):
            self.program = None  # only the kernel knows what it has of these
        if changes.network is not None:
            self._pending_network = changes.network

    def _note(self, problem: Problem) -> None:
        if problem.error is None:
            if self.problems.pop(problem.key, None) is not None:
                log.info("problem solved", where=problem.key)
        else:
            if str(self.problems.get(problem.key)) != str(problem.error):
                log.warning("not read", problem=str(problem.error))
            self.problems[problem.key] = problem.error

    def _to_do(self) -> bool:
        return self.program is None or bool(self._pending) or self._pending_network is not None

    async def _sync(self) -> float | None:
        """Plan and commit; return the time of the next try, or None when there is none to come."""
        started = time.perf_counter()
        before = self.program
        try:
            if before is None:
                done = await self._commit_all()
            else:
                done = await self._commit_changes(before)
        except DataplaneError as error:
            if not self.synced and error.retry is not Retry.AFTER_BACKOFF:
                await self._give_up_where_hopeless(error)
            return self._failed(error)
        self._settled(done, full=before is None)
        self._report(done, started, full=before is None)
        return None

    async def _give_up_where_hopeless(self, error: DataplaneError) -> None:
        """Raise Unsupported where the first sync failed because this host lacks something.

        A missing kernel module reads like a missing object, so the error alone does not tell.
        """
        if isinstance(error, Unsupported) or not (await self.driver.probe()).supported:
            raise Unsupported("the dataplane does not work here", str(error)) from error

    async def _commit_changes(self, before: ProgramT) -> _Done:
        changes = Changes(dict(self._pending), self._pending_network)
        plan, after = self.compiler.plan_changes(before, changes)
        rejected = (await self.driver.commit(plan)).rejected
        self.program = self.compiler.without(before, after, rejected) if rejected else after
        return _Done(set(changes.virtual_servers), rejected, plan.size)

    async def _commit_all(self) -> _Done:
        """Observe the kernel and commit the difference to the whole table.

        At the start the table is resolved meanwhile. A kernel that has nothing of ours is filled in
        portions: one is committed while the next is compiled.
        """
        observation = self._observation or asyncio.ensure_future(self.driver.observe())
        self._observation = None
        if not self.synced:
            self.table = resolve(self.snapshot, self.settings)
        observed = await observation
        nothing = self.compiler.compile((), self.table.network)
        if observed is None:
            return await self._commit_from(nothing)
        wanted = self.compiler.compile(self.table.virtual_servers(), self.table.network)
        plan, after = self.compiler.plan(observed, wanted)
        rejected = (await self.driver.commit(plan)).rejected
        # What was observed of a rejected key is still there, and the program does not know of it.
        self._ghosts = set(rejected)
        self.program = self.compiler.without(nothing, after, rejected) if rejected else after
        return _Done(set(self.table.claims.keys()), rejected, plan.size)

    async def _commit_from(self, nothing: ProgramT) -> _Done:
        servers = self.table.virtual_servers()
        plan, program = self.compiler.plan(None, nothing)
        commits = [asyncio.ensure_future(self.driver.commit(plan))]
        objects = plan.size
        for first in range(0, len(servers), PORTION):
            await asyncio.sleep(0)  # what was planned starts before the next is compiled
            portion = {one.key: one for one in servers[first : first + PORTION]}
            plan, program = self.compiler.plan_changes(program, Changes(portion))
            commits.append(asyncio.ensure_future(self.driver.commit(plan)))
            objects += plan.size
        # All have to end before anything else is done with the kernel, even if one has failed.
        rejected: dict[Key, DataplaneError] = {}
        for outcome in await asyncio.gather(*commits, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
            rejected |= outcome.rejected
        self.program = self.compiler.without(nothing, program, rejected) if rejected else program
        return _Done({one.key for one in servers}, rejected, objects)

    def _settled(self, done: _Done, *, full: bool) -> None:
        rejected = done.rejected
        for key in done.changed:
            if key not in rejected and self.rejected.pop(key, None) is not None:
                log.info("accepted", virtual_server=str(key))
        for key, error in rejected.items():
            log.error("rejected", virtual_server=str(key), why=str(error))
        self.rejected |= rejected
        if full:
            known = self.table.claims
            self.rejected = {key: why for key, why in self.rejected.items() if key in known}
        self._pending.clear()
        self._pending_network = None
        self._pause = SHORTEST_PAUSE_SECONDS
        self.failure = ""

    def _failed(self, error: DataplaneError) -> float | None:
        self.failed_syncs += 1
        self.failure = f"{error} (tried again {error.retry.value})"
        log.error("sync failed", why=str(error), retry=error.retry.value)
        if error.retry is Retry.NEVER:
            self.failure = str(error)
            return None
        if error.retry is Retry.AFTER_OBSERVE:
            self.program = None
        wait, self._pause = self._pause, min(self._pause * 2, LONGEST_PAUSE_SECONDS)
        return time.monotonic() + wait

    def _report(self, done: _Done, started: float, *, full: bool) -> None:
        changed, objects = len(done.changed), done.objects
        milliseconds = round((time.perf_counter() - started) * 1000, 1)
        self.syncs += 1
        self.last_sync = LastSync(time.time(), milliseconds, changed, objects, full)
        log.info("sync", changed=changed, objects=objects, ms=milliseconds, full=full)
        if not self.synced:
            self.synced = True
            self._on_synced()

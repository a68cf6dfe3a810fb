"""A dataplane at work: one backend that is kept in step with the table.

Lives here: the loop from what has changed to a commit, and what it does when one fails. Must not:
read sources (sync.py), or know which backend it is, or whether another is at work beside it.

What changes while a commit runs goes into the next one; there is no other delay.
Retry classes (errors.Retry): busy → the same changes again after a pause; unknown or out of step →
observe, then plan everything; rejected → reported, and tried again seldom, or when it changes.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import structlog
from msgspec import Struct

from vipd.backends.registry import Backend
from vipd.backends.watching import Mending
from vipd.proxy.errors import DataplaneError, Retry, UnknownResult, Unsupported
from vipd.proxy.programming import Kinds, Programming, Stage
from vipd.proxy.status import LastSync
from vipd.proxy.virtualserver import Changes, Key, NodeNetwork, Table, VirtualServer

SHORTEST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 5.0
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 30.0, 300.0
"""Before what was rejected is tried again; the pause doubles."""

log = structlog.get_logger()


class _Done(Struct, frozen=True):
    """What a sync did: the keys it was about, those the kernel refused, and kernel objects."""

    changed: Collection[Key]
    rejected: dict[Key, DataplaneError]
    objects: int
    withdrawn: Mapping[Key, DataplaneError] = {}


class Dataplane:
    """Keeps one backend in step with a table. One task runs it; others may read it."""

    def __init__(
        self,
        backend: Backend,
        on_synced: Callable[[], None] = lambda: None,
        on_commit: Callable[[Collection[Key]], None] = lambda keys: None,
        programming: Programming | None = None,
    ) -> None:
        self.compiler = backend.compiler
        self.driver = backend.driver
        self.mode = backend.compiler.mode
        self.program: Any = None
        """What the kernel is known to have; None before the first commit and when in doubt."""
        self.rejected: dict[Key, DataplaneError] = {}
        self.synced = False
        self.in_step = asyncio.Event()
        """Set once everything that was shown has been committed for the first time."""
        self.syncs = 0
        self.failed_syncs = 0
        self.last_sync: LastSync | None = None
        self.failure = ""
        self._on_synced = on_synced
        self._on_commit = on_commit
        self._programming = programming or Programming()
        self._table: Table | None = None
        self._taken = False
        """Whether a whole table was taken, so that only changes of it matter from now on."""
        self._doubt = False
        self._unsure = False
        """Whether the kernel may have something else than the program, which is right."""
        self._pending: dict[Key, VirtualServer | None] = {}
        self._pending_network: NodeNetwork | None = None
        self._arrived = asyncio.Event()
        self._questions: list[asyncio.Future[str]] = []
        self._repairs: list[asyncio.Future[int]] = []
        self.given_up = asyncio.Event()
        """Set while the last commit was refused as a whole, and nothing changes that."""
        self._ending = False
        self._asked_since: float | None = None
        self._committed_since: float | None = None
        self._pause = SHORTEST_PAUSE_SECONDS
        self._retry_pause = FIRST_RETRY_SECONDS
        self._ghosts: set[Key] = set()
        self._observation: asyncio.Task[Any] | None = None

    def observe_ahead(self) -> None:
        """Begin to observe; it needs nothing of the table, so it goes on while that is made."""
        self._observation = asyncio.ensure_future(self.driver.observe())

    def show(self, table: Table, changes: Changes | None = None) -> None:
        """Say that the table is now this, and what of it changed; None: it is the first one."""
        self._table = table
        if changes is not None and self._taken:
            self._pending.update(changes.virtual_servers)
            if not self._ghosts.isdisjoint(changes.virtual_servers):
                self._doubt = True  # only the kernel knows what it has of these
            if changes.network is not None:
                self._pending_network = changes.network
        if changes is None or changes:
            self._programming.queued(table.claims if changes is None else changes.virtual_servers)
            self._ask()

    @property
    def waiting_since(self) -> float | None:
        """When the oldest came of what is not committed yet, by time.monotonic(); None: nothing is.

        What the kernel alone refused is not waited for.
        """
        return self._asked_since if self._committed_since is None else self._committed_since

    def _ask(self) -> None:
        """Let something be committed."""
        if self._asked_since is None:
            self._asked_since = time.monotonic()
        self._arrived.set()

    def finish(self) -> None:
        """Let `run` return once everything is committed or given up."""
        self._ending = True
        self._arrived.set()

    async def run(self) -> None:
        """Commit what is shown, until told to finish. Raise Unsupported at a hopeless start."""
        next_try: float | None = None
        try:
            while True:
                await self._wait(next_try)
                if self._table is not None and self._to_do():
                    next_try = await self._sync(self._table)
                else:  # it went into the commit before
                    self._asked_since = None
                if next_try is None and self.program is not None:
                    await self._answer()
                if self._ending and next_try is None and not self._arrived.is_set():
                    return
        finally:
            if self._observation is not None:
                self._observation.cancel()
            waiting: list[asyncio.Future[Any]] = [*self._questions, *self._repairs]
            for one in waiting:
                if not one.done():
                    one.set_exception(UnknownResult(f"{self.mode} has stopped"))

    async def differences(self) -> str:
        """Observe, and return as text what the kernel has otherwise than was committed.

        Done by `run` between two commits, so that no commit falls into the observation.
        """
        question = asyncio.get_running_loop().create_future()
        self._questions.append(question)
        self._arrived.set()
        return str(await question)

    async def repair(self) -> int:
        """Put right whatever the kernel has otherwise than it should; return how many objects.

        Waits for as long as that is tried again and again.
        """
        done = asyncio.get_running_loop().create_future()
        self._repairs.append(done)
        if not isinstance(self.driver, Mending):
            self._doubt = True
        self._ask()
        return int(await done)

    async def _mend(self) -> None:
        """Put the kernel right by the program, where that is known; else observing has to do it."""
        driver, self._unsure = self.driver, False
        if self._doubt or self._ghosts or self.program is None or not isinstance(driver, Mending):
            self._doubt = True
            return
        repairs = list(self._repairs)
        try:
            objects = await driver.mend(self.program)
        except DataplaneError as error:
            log.info("not mended", mode=self.mode, why=str(error))
            self._doubt = True
            return
        self._repaired(repairs, objects)

    def _repaired(self, repairs: Collection[asyncio.Future[int]], objects: int) -> None:
        self._repairs = [one for one in self._repairs if one not in repairs]
        for repair in repairs:
            if not repair.done():
                repair.set_result(objects)

    async def _answer(self) -> None:
        while self._questions:
            said, failure = "", None
            try:
                plan, _ = self.compiler.plan(await self.driver.observe(), self.program)
                said = str(plan) if plan.due(self.rejected) else ""
            except DataplaneError as error:
                failure = error
            questions, self._questions = self._questions, []
            for question in questions:
                if question.done():
                    continue  # nobody waits for it any more
                if failure is not None:
                    question.set_exception(failure)
                else:
                    question.set_result(said)

    async def _wait(self, next_try: float | None) -> None:
        """Wait for a change; after a failure, for the time of the next try.

        Changes do not end that pause, or a busy source would turn a busy kernel's pause to nothing.
        """
        if next_try is not None:
            await asyncio.sleep(max(0.0, next_try - time.monotonic()))
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._retry_pause if self.rejected else None):
                    await self._arrived.wait()
            if not self._arrived.is_set():
                self._retry_pause = min(2 * self._retry_pause, LONGEST_RETRY_SECONDS)
                self.retry_rejected()
        self._arrived.clear()

    def retry_rejected(self) -> None:
        """Try again what was rejected: what stood in its way may be gone, such as a program."""
        if self._table is None:
            return
        claims = self._table.claims
        again = {key: claims[key][0] if claims.get(key) else None for key in self.rejected}
        self.show(self._table, Changes(again, None))

    def _to_do(self) -> bool:
        changed = bool(self._pending) or self._pending_network is not None
        wrong = self._doubt or self._unsure or bool(self._repairs)
        return changed or wrong or self.program is None

    async def _sync(self, table: Table) -> float | None:
        """Plan and commit; return the time of the next try, or None when there is none to come."""
        started = time.perf_counter()
        if self._repairs or self._unsure:
            await self._mend()
            if not self._to_do():
                self._asked_since = None
                return None
        full = self._doubt or self.program is None
        changes = Changes(self._pending, self._pending_network)
        self._pending, self._pending_network = {}, None
        self._committed_since, self._asked_since = self.waiting_since, None
        self._programming.begun()
        try:
            done = await (self._commit_all(table) if full else self._commit_changes(changes))
        except DataplaneError as error:
            concerned = table.claims if full else changes.virtual_servers
            self._programming.failed(Kinds(self.mode, full), concerned)
            self._put_back(changes)
            if not self.synced and error.retry is not Retry.AFTER_BACKOFF:
                await self._give_up_where_hopeless(error)
            return self._failed(error)
        self._committed_since = None
        self._settled(done, full=full)
        self._report(done, started, full=full)
        return None

    def _put_back(self, failed: Changes) -> None:
        """Add what was not committed to what is pending; what came since is newer."""
        self._pending = {**failed.virtual_servers, **self._pending}
        self._pending_network = self._pending_network or failed.network

    async def _give_up_where_hopeless(self, error: DataplaneError) -> None:
        """Raise Unsupported where the first sync failed because this host lacks something.

        A missing kernel module reads like a missing object, so the error alone does not tell.
        """
        if isinstance(error, Unsupported) or not (await self.driver.probe()).supported:
            raise Unsupported("the dataplane does not work here", str(error)) from error

    async def _commit_changes(self, changes: Changes) -> _Done:
        before = self.program
        with self._programming.stage(Stage.PLAN):
            plan, after = self.compiler.plan_changes(before, changes)
        with self._programming.stage(Stage.COMMIT):
            done = await self.driver.commit(plan)
        rejected = done.rejected
        self.program = self.compiler.without(before, after, rejected) if rejected else after
        return _Done(changes.virtual_servers.keys(), rejected, plan.size, done.withdrawn)

    async def _commit_all(self, table: Table) -> _Done:
        """Observe the kernel and commit the difference to the whole table."""
        repairs = list(self._repairs)
        self._doubt = False  # whoever doubts from here on wants another look
        try:
            done = await self._commit_difference(table)
        except DataplaneError:
            self._doubt = True
            raise
        self._repaired(repairs, done.objects)
        return done

    async def _commit_difference(self, table: Table) -> _Done:
        observation = self._observation or asyncio.ensure_future(self.driver.observe())
        self._observation = None
        with self._programming.stage(Stage.OBSERVE):
            observed = await observation
        table = self._table or table  # what was shown meanwhile
        # From here on only what changes is pending.
        self._taken, self._pending, self._pending_network = True, {}, None
        servers = table.virtual_servers()
        nothing = self.compiler.compile((), table.network)
        if observed is None and self.compiler.portion is not None:
            with self._programming.stage(Stage.COMMIT):
                return await self._commit_portions(nothing, servers, self.compiler.portion)
        with self._programming.stage(Stage.PLAN):
            wanted = self.compiler.compile(servers, table.network)
            plan, after = self.compiler.plan(observed, wanted)
        with self._programming.stage(Stage.COMMIT):
            rejected = (await self.driver.commit(plan)).rejected
        # What was observed of a rejected key is still there, and the program does not know of it.
        self._ghosts = set(rejected)
        self.program = self.compiler.without(nothing, after, rejected) if rejected else after
        return _Done([one.key for one in servers], rejected, plan.size)

    async def _commit_portions(
        self, nothing: Any, servers: list[VirtualServer], portion: int
    ) -> _Done:
        """Fill a kernel that has nothing of ours: one portion is committed, the next compiled."""
        plan, program = self.compiler.plan(None, nothing)
        commits = [asyncio.ensure_future(self.driver.commit(plan))]
        objects = plan.size
        try:
            for first in range(0, len(servers), portion):
                await asyncio.sleep(0)  # what was planned starts before the next is compiled
                part = {one.key: one for one in servers[first : first + portion]}
                plan, program = self.compiler.plan_changes(program, Changes(part))
                commits.append(asyncio.ensure_future(self.driver.commit(plan)))
                objects += plan.size
        finally:
            # All have to end before anything else is done with the kernel, even if one has failed.
            outcomes = await asyncio.gather(*commits, return_exceptions=True)
        rejected: dict[Key, DataplaneError] = {}
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            rejected |= outcome.rejected
        self._ghosts = set()
        self.program = self.compiler.without(nothing, program, rejected) if rejected else program
        return _Done([one.key for one in servers], rejected, objects)

    def _settled(self, done: _Done, *, full: bool) -> None:
        rejected = done.rejected
        # What the driver refused itself stands, whatever is withdrawn.
        withdrawn = [
            key for key, why in done.withdrawn.items() if str(self.rejected.get(key)) == str(why)
        ]
        for key in (*done.changed, *withdrawn):
            if key not in rejected and self.rejected.pop(key, None) is not None:
                log.info("accepted", mode=self.mode, virtual_server=str(key))
        for key, error in rejected.items():
            if str(self.rejected.get(key)) == str(error):
                continue  # tried again, in vain
            self._retry_pause = FIRST_RETRY_SECONDS
            log.error("rejected", mode=self.mode, virtual_server=str(key), why=str(error))
        self.rejected |= rejected
        if full:
            known = set(done.changed)
            self.rejected = {key: why for key, why in self.rejected.items() if key in known}
        self._pause = SHORTEST_PAUSE_SECONDS
        self.failure = ""
        self.given_up.clear()
        # Of a key that has changed again meanwhile, the newest is not in the kernel yet.
        told = [one for one in done.changed if one not in self._pending and one not in rejected]
        self._on_commit(told)

    def _failed(self, error: DataplaneError) -> float | None:
        self.failed_syncs += 1
        is_first = not self.failure
        self.failure = f"{error} (tried again {error.retry.value})"
        log.error("sync failed", mode=self.mode, why=str(error), retry=error.retry.value)
        if error.retry is Retry.NEVER:
            self.failure = str(error)
            self.given_up.set()
            return None
        if error.retry is Retry.AFTER_OBSERVE:
            if is_first and isinstance(self.driver, Mending):
                # What was committed before is still known; an observation where that is no help.
                self._unsure = True
            else:
                self.program = None
        wait, self._pause = self._pause, min(self._pause * 2, LONGEST_PAUSE_SECONDS)
        return time.monotonic() + wait

    def _report(self, done: _Done, started: float, *, full: bool) -> None:
        changed, objects = len(done.changed), done.objects
        seconds = time.perf_counter() - started
        milliseconds = round(seconds * 1000, 1)
        self.syncs += 1
        self._programming.synced(done.changed, seconds, objects, full=full)
        self.last_sync = LastSync(time.time(), milliseconds, changed, objects, full)
        log.info(
            "sync", mode=self.mode, changed=changed, objects=objects, ms=milliseconds, full=full
        )
        if not self.synced:
            self.in_step.set()
            self.synced = True
            self._on_synced()

"""The switch at work: does what switch.py decides, and tells it what came of it.

Lives here: which dataplanes are at work, their tasks, and the steps of a switch. Must not: decide
what follows from what (switch.py), watch drains (draining.py), or read sources.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any

import structlog

from vipd.backends.protocol import Departed
from vipd.backends.registry import MODES, WITH_SKELETON, Backend
from vipd.backends.skeleton import Skeleton
from vipd.proxy import record, switch
from vipd.proxy.dataplane import Dataplane
from vipd.proxy.draining import Draining, now
from vipd.proxy.errors import ControlError, DataplaneError, Unsupported
from vipd.proxy.programming import Programming
from vipd.proxy.repair import Repairs, guard
from vipd.proxy.status import DrainView, SwitchReport
from vipd.proxy.switch import Action, Drain, Event, Record
from vipd.proxy.sync import Sync
from vipd.proxy.trying import probed, require_known, tried
from vipd.proxy.virtualserver import Key

BRING_UP_SECONDS = 300.0
"""How long a new dataplane may take until everything is programmed, all tries together."""
VERIFY_SECONDS = 120.0
PATIENCE_SECONDS = 10.0
"""How long a dataplane that is left may go on with its last commit."""
PAUSE_SECONDS = 1.0
"""Before it is looked again for what another mode left."""

log = structlog.get_logger()


def reached(step: str) -> None:
    """Say that a step of a switch is reached. A crash between any two steps does no harm."""
    log.info("switch step", step=step)


class Switching:
    """Runs the dataplane that serves, and switches to another one.

    `start` is the record to begin with; it is kept up to date at `path`. `prepare` is awaited
    before a mode is brought up: what it needs to know has to be in the table.
    """

    def __init__(
        self,
        sync: Sync,
        start: Record,
        path: Path,
        make: Callable[[str], Backend],
        skeleton: Skeleton,
        drain_seconds: float,
        on_synced: Callable[[], None] = lambda: None,
        on_commit: Callable[[Collection[Key]], None] = lambda keys: None,
        prepare: Callable[[str], Awaitable[None]] | None = None,
        programming: Programming | None = None,
    ) -> None:
        self.state = start.state
        self.report: SwitchReport | None = None
        """The last switch that was asked for, under way or ended; None before the first."""
        self._sync = sync
        self._start_record = start
        self._path = path
        self._make = make
        self._skeleton = skeleton
        self.drain_seconds = drain_seconds
        """What a dataplane has that is left from now on."""
        self._on_synced = on_synced
        self._on_commit = on_commit
        self._prepare = prepare
        self._programming = programming
        self.switches: Counter[tuple[str, bool]] = Counter()
        """Switches that ended since the start: to which mode, and whether they succeeded."""
        self._backends: dict[str, Backend] = {}
        self.repairs = Repairs()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._guards: dict[str, asyncio.Task[None]] = {}
        self._switch: asyncio.Task[None] | None = None
        self._clearing: asyncio.Task[None] | None = None
        """Looks for what other modes left, once, at the start."""
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.draining = Draining(
            self.backend, self._tell, self._drain, self._spawn, lambda step: reached(step)
        )
        self.serving = Dataplane(
            self.backend(self.state.serving), self._started, on_commit, programming
        )
        self._target: Dataplane | None = None

    def backend(self, mode: str) -> Backend:
        """Return the backend of a mode, always the same one."""
        if mode not in self._backends:
            self._backends[mode] = self._make(mode)
        return self._backends[mode]

    @property
    def why(self) -> str:
        """Return why this mode serves, where it is not simply the configured one."""
        start = self._start_record
        if self.state.serving == start.configured:
            return ""
        if self.state.serving == start.chosen:
            return start.why
        return f"switched to by hand; configured is {start.configured}"

    async def run(self) -> None:
        """Run until the serving dataplane fails for good, or anything fails by a bug; raise it."""
        try:
            self.serving.observe_ahead()
            if self.state.serving not in WITH_SKELETON:
                await self._skeleton.ensure()
            if self._prepare is not None:
                await self._prepare(self.state.serving)
            self._start(self.serving)
            await self._broken
        finally:
            tasks = [*self._guards.values(), *self._running.values(), *self.draining.stop()]
            tasks += [one for one in (self._switch, self._clearing) if one is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def ask(self, mode: str, drain_seconds: float | None, *, force: bool) -> SwitchReport:
        """Begin a switch and return its report, which goes on changing. Raise ControlError.

        Where the mode serves already, or waits for a drain, `drain_seconds` is what is left to
        those that drain.
        """
        require_known(mode)
        if self.report is not None and self.report.ended is None:
            raise ControlError(f"a switch to {self.report.target} is under way")
        if not self.serving.synced:
            raise ControlError(f"mode {self.state.serving} is not in step yet: wait for its sync")
        seconds = self.drain_seconds if drain_seconds is None else drain_seconds
        waiting = self.state.then.mode if self.state.then is not None else None
        if drain_seconds is not None and mode in {self.state.serving, waiting}:
            self._tell(switch.Shortened(now() + drain_seconds))
        if mode == self.state.serving and waiting is None:
            at = time.time()  # nothing to do: the report of the last switch stays
            return SwitchReport(origin=mode, target=mode, started=at, ended=at)
        return self._begin(switch.Asked(mode, seconds, force))

    def _begin(self, asked: switch.Asked) -> SwitchReport:
        origin = self.state.serving
        self.report = SwitchReport(origin=origin, target=asked.mode, started=time.time())
        self._switch = self._spawn(self._go(asked))
        return self.report

    async def try_out(self, mode: str) -> list[str]:
        """Return what a switch to the mode would do, as sentences. Changes nothing."""
        require_known(mode)
        if self._prepare is not None:
            await self._prepare(mode)
        return await tried(self.backend(mode), self.backend(self.state.serving), self._sync.table)

    def drains(self) -> tuple[DrainView, ...]:
        """Return what drains now."""
        return tuple(map(self.draining.view, self.state.drains))

    def trouble(self) -> str:
        """Return what keeps the dataplane that is being brought up from being in step."""
        return "" if self._target is None else self._target.failure

    async def cut(self, departed: Sequence[Departed]) -> int:
        """End the flows of departed endpoints in every dataplane that may have some; count them."""
        from vipd.backends import conntrack

        modes = {self.state.serving, *(one.mode for one in self.state.drains)}
        modes |= {self._target.mode} if self._target is not None else set()
        flows = 0
        for mode in modes:
            try:
                flows += await self.backend(mode).driver.cut(departed)
            except DataplaneError as error:
                log.warning("departed endpoints stay", mode=mode, why=str(error))
        return flows + await conntrack.cut(departed)

    # What runs

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run a task whose failure ends the daemon: only a bug lets it fail."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(self._note_failure)
        return task

    def _note_failure(self, task: "asyncio.Task[None]") -> None:
        if task.cancelled() or self._broken.done():
            return
        error = task.exception()
        if error is not None:
            self._broken.set_exception(error)

    def _start(self, dataplane: Dataplane) -> None:
        self._sync.add(dataplane)
        self._guards[dataplane.mode] = self._spawn(
            guard(dataplane, self._skeleton, self.repairs).run()
        )
        task = asyncio.ensure_future(dataplane.run())
        self._running[dataplane.mode] = task
        task.add_done_callback(lambda ended: self._ended(dataplane, ended))

    def _ended(self, dataplane: Dataplane, task: "asyncio.Task[None]") -> None:
        if task.cancelled():
            return
        hopeless = isinstance(task.exception(), DataplaneError)
        if dataplane is self.serving or not hopeless:  # else _bring_up sees it
            self._note_failure(task)

    async def _stop(self, dataplane: Dataplane) -> None:
        """Let it end what it is committing, so that nothing of it comes after what follows."""
        self._sync.remove(dataplane)
        self._guards.pop(dataplane.mode).cancel()
        task = self._running.pop(dataplane.mode)
        dataplane.finish()
        await asyncio.wait({task}, timeout=PATIENCE_SECONDS)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _stop_target(self) -> None:
        target, self._target = self._target, None
        if target is not None:
            await self._stop(target)

    def _started(self) -> None:
        """The serving dataplane is complete: what other modes left may drain."""
        self._save()  # not before: a mode that cannot even start must not outlast the attempt
        self._on_synced()
        self._clearing = self._spawn(self._drain_leftovers())

    async def _drain_leftovers(self) -> None:
        recorded = {one.mode for one in self.state.drains}
        others = [mode for mode in MODES if mode != self.state.serving]
        modes = [mode for mode in others if await self._has_leftovers(mode, mode in recorded)]
        if modes:
            log.info("left by another mode", modes=modes)
        self.state, actions = switch.found(self.state, modes, self.drain_seconds, now())
        self._save()
        await self._perform(actions)
        self._go_on()

    def _go_on(self) -> None:
        """Begin the switch that had to wait, as soon as it may."""
        asked = switch.due(self.state)
        if asked is not None and (self.report is None or self.report.ended is not None):
            self._begin(asked)

    async def _has_leftovers(self, mode: str, recorded: bool) -> bool:
        """Return whether the kernel has something of a mode; asks until it is known.

        Where this host lacks the tools that would tell, the record does.
        """
        while True:
            try:
                return bool(await self.backend(mode).driver.leftovers())
            except Unsupported:
                return recorded
            except (DataplaneError, OSError) as error:
                log.warning("not known what a mode left", mode=mode, why=str(error))
                await asyncio.sleep(PAUSE_SECONDS)

    # The steps

    async def _go(self, event: Event) -> None:
        """Take an event and everything that follows from it."""
        if self._clearing is not None:
            await asyncio.wait({self._clearing})
        events = [event]
        while events:
            self.state, actions = switch.decide(self.state, events.pop())
            self._save()
            if self.report is not None and self.state.target not in (None, self.report.target):
                self.report.waits = str(self.state.target)
            if self.state.step is not None and self.report is not None:
                self.report.steps.append(self.state.step.value)
            events += await self._perform(actions)

    async def _perform(self, actions: Sequence[Action]) -> list[Event]:
        """Do the actions in order; return what the last of them lets happen next."""
        events: list[Event] = []
        for action in actions:
            reached(f"{type(action).__name__} {getattr(action, 'mode', '')}".strip())
            event = await self._do(action)
            if event is not None:
                events.append(event)
        return events

    async def _do(self, action: Action) -> Event | None:
        match action:
            case switch.Probe(mode):
                return await probed(self.backend(mode), self._sync.table)
            case switch.BringUp(mode):
                return await self._bring_up(mode)
            case switch.Verify():
                return await self._verify()
            case switch.Retire(mode):
                await self._retire(mode)
            case switch.Say(failure):
                self._say(failure)
        return None

    async def _bring_up(self, mode: str) -> Event:
        await self.draining.leave(mode)
        try:
            await self._skeleton.ensure()
            if self._prepare is not None:
                await self._prepare(mode)
        except DataplaneError as error:
            return switch.Broken(str(error))
        synced = asyncio.Event()
        target = Dataplane(self.backend(mode), synced.set, self._on_commit, self._programming)
        self._target = target
        self._start(target)
        task = self._running[mode]
        marks = [asyncio.ensure_future(one.wait()) for one in (synced, target.given_up)]
        await asyncio.wait(
            {task, *marks}, timeout=BRING_UP_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        for mark in marks:
            mark.cancel()
        if task.done():
            return switch.Broken(str(task.exception()))
        if not target.synced:
            why = target.failure or f"not in step after {BRING_UP_SECONDS:.0f} s"
            return switch.Broken(f"{mode} cannot be programmed: {why}")
        theirs = self.serving.rejected
        rejected = {f"{key}: {why}" for key, why in target.rejected.items() if key not in theirs}
        return switch.Committed(sorted(rejected))

    async def _verify(self) -> Event:
        if self._target is None:
            return switch.Broken("the new dataplane is gone")
        try:
            async with asyncio.timeout(VERIFY_SECONDS):
                differences = await self._target.differences()
        except TimeoutError:
            why = self._target.failure or f"not observed within {VERIFY_SECONDS:.0f} s"
            return switch.Broken(why)
        except DataplaneError as error:
            return switch.Broken(str(error))
        return switch.Verified(differences, now())

    async def _retire(self, mode: str) -> None:
        """Keep a mode in step no more, and let it drain."""
        if self._target is not None and self._target.mode == self.state.serving:
            old, self.serving, self._target = self.serving, self._target, None
            await self._stop(old)
        elif self._target is not None and self._target.mode == mode:
            await self._stop_target()
        self.draining.watch(mode)

    def _say(self, failure: str) -> None:
        if self.report is None:
            return
        self.report.failure = failure
        self.report.ended = time.time()
        self.switches[self.report.target, not failure] += 1
        if failure:
            log.error("switch failed", to=self.report.target, why=failure)
        elif self.state.then is not None:
            self.report.waits = self.state.serving
            log.info("wait for a drain", to=self.report.target, serves=self.report.waits)
        elif self.report.origin != self.report.target:
            log.info("switched", origin=self.report.origin, to=self.report.target)

    # What the watch over drains needs

    def _tell(self, event: Event) -> None:
        before = self.state
        self.state, _ = switch.decide(self.state, event)
        if self.state != before:
            self._save()
        self._go_on()

    def _drain(self, mode: str) -> Drain | None:
        return next((one for one in self.state.drains if one.mode == mode), None)

    def _save(self) -> None:
        start = self._start_record
        record.write(self._path, Record(start.configured, self.state, start.chosen, start.why))

"""The switch at work: does what switch.py decides, and tells it what came of it.

Lives here: which dataplanes are at work, their tasks, the record of the mode in use, and the watch
over flows that drain. Must not: decide what follows from what (switch.py), or read sources.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path

import msgspec
import structlog

from vipd.backends.protocol import Departed, Flows
from vipd.backends.registry import MODES, Backend
from vipd.backends.skeleton import Skeleton
from vipd.proxy import switch
from vipd.proxy.dataplane import Dataplane
from vipd.proxy.errors import ControlError, DataplaneError
from vipd.proxy.status import DrainView, SwitchReport
from vipd.proxy.switch import Action, Event, Record, State
from vipd.proxy.sync import Sync
from vipd.proxy.virtualserver import Key, VirtualServer

RECORD = "mode.json"
"""Name of the file beside the control socket that says which mode is in use."""
FIRST_COUNT_SECONDS = 0.2
LONGEST_COUNT_SECONDS = 5.0
"""Between two counts of the flows that drain; the pause doubles from the first to the longest."""

PATIENCE_SECONDS = 10.0
"""How long a dataplane that is left may go on with its last commit."""
REMOVALS = 3
"""How often a removal is tried; what it leaves is found at the next start."""
MOST_SERVERS_SHOWN = 20

log = structlog.get_logger()


def reached(step: str) -> None:
    """Say that a step of a switch is reached. A crash between any two steps does no harm."""
    log.debug("switch step", step=step)


class Switching:
    """Runs the dataplane that serves, switches to another one, and watches the old one drain."""

    def __init__(
        self,
        sync: Sync,
        state: State,
        configured: str,
        make: Callable[[str], Backend],
        skeleton: Skeleton,
        record: Path,
        drain_seconds: float,
        on_synced: Callable[[], None] = lambda: None,
        on_commit: Callable[[Collection[Key]], None] = lambda keys: None,
        prepare: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self.state = state
        self.report: SwitchReport | None = None
        """The last switch that was asked for, under way or ended; None before the first."""
        self.cut_flows = 0
        """Flows that drains had to end at their deadline, since the start."""
        self.drain_seconds = drain_seconds
        self._sync = sync
        self._configured = configured
        self._make = make
        self._skeleton = skeleton
        self._record = record
        self._on_synced = on_synced
        self._on_commit = on_commit
        self._prepare = prepare
        """Awaited before a mode is brought up: what it needs to know has to be in the table."""
        self._backends: dict[str, Backend] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._switch: asyncio.Task[None] | None = None
        self._clearing: asyncio.Task[None] | None = None
        """Looks for what other modes left, once, at the start."""
        self._flows: dict[str, Flows] = {}
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.serving = Dataplane(self.backend(state.serving), self._started, on_commit)
        self._target: Dataplane | None = None

    def backend(self, mode: str) -> Backend:
        """Return the backend of a mode, always the same one."""
        if mode not in self._backends:
            self._backends[mode] = self._make(mode)
        return self._backends[mode]

    async def run(self) -> None:
        """Run until the serving dataplane fails for good; raise what it failed with."""
        try:
            self._save()
            self.serving.observe_ahead()
            if self.state.serving != "nftables":  # its own plan holds the skeleton
                await self._skeleton.ensure()
            if self._prepare is not None:
                await self._prepare(self.state.serving)
            self._start(self.serving)
            await self._broken
        finally:
            tasks = [*self._running.values(), *self._watching.values()]
            tasks += [one for one in (self._switch, self._clearing) if one is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def ask(self, mode: str, drain_seconds: float | None, *, force: bool) -> SwitchReport:
        """Begin a switch and return its report, which goes on changing. Raise ControlError."""
        if mode not in MODES:
            raise ControlError(f"{mode!r} is no mode; there is: {', '.join(MODES)}")
        if self.report is not None and self.report.ended is None:
            raise ControlError(f"a switch to {self.report.target} is under way")
        if not self.serving.synced:
            raise ControlError(f"mode {self.state.serving} is not in step yet: wait for its sync")
        seconds = self.drain_seconds if drain_seconds is None else drain_seconds
        self.report = SwitchReport(origin=self.state.serving, target=mode, started=time.time())
        self._switch = asyncio.ensure_future(self._go(switch.Asked(mode, seconds, force)))
        return self.report

    async def try_out(self, mode: str) -> list[str]:
        """Return what a switch to the mode would do, as sentences. Changes nothing."""
        if mode not in MODES:
            raise ControlError(f"{mode!r} is no mode; there is: {', '.join(MODES)}")
        probed = await self._probe(mode)
        lines = [f"missing: {one}" for one in probed.missing]
        lines += [f"cannot serve: {one}" for one in probed.unserved]
        if mode == self.state.serving:
            return [*lines, f"{mode} serves already"]
        if probed.missing:
            return lines
        compiler = self.backend(mode).compiler
        table = self._sync.table
        observed = await self.backend(mode).driver.observe()
        wanted = compiler.compile(table.virtual_servers(), table.network)
        plan, _ = compiler.plan(observed, wanted)
        lines += [f"would do otherwise: {one.name}: {one.what}" for one in compiler.differences]
        lines.append(f"would program {plan.size} kernel objects of {mode} beside the old ones")
        try:
            old = await self.backend(self.state.serving).driver.flows()
            lines.append(f"would drain {old.total} flows of {self.state.serving}")
        except DataplaneError as error:
            lines.append(f"would drain {self.state.serving}; its flows cannot be counted: {error}")
        return lines

    def drains(self) -> tuple[DrainView, ...]:
        """Return what drains now."""
        views = []
        for one in self.state.drains:
            by_server = self._flows[one.mode].by_server if one.mode in self._flows else {}
            most = sorted(by_server.items(), key=lambda item: (-item[1], item[0]))
            where = dict(most[:MOST_SERVERS_SHOWN])
            views.append(DrainView(one.mode, one.deadline, one.flows, where))
        return tuple(views)

    async def cut(self, departed: Sequence[Departed]) -> int:
        """End the flows of departed endpoints in every dataplane that may have some; count them."""
        from vipd.backends import conntrack

        flows = await conntrack.cut(departed)
        for mode in (self.state.serving, *(one.mode for one in self.state.drains)):
            await self.backend(mode).driver.cut(departed)
        return flows

    # What runs

    def _start(self, dataplane: Dataplane) -> None:
        self._sync.add(dataplane)
        task = asyncio.ensure_future(dataplane.run())
        self._running[dataplane.mode] = task
        task.add_done_callback(lambda ended: self._ended(dataplane, ended))

    def _ended(self, dataplane: Dataplane, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._broken.done() or dataplane is not self.serving:
            return
        error = task.exception()
        self._broken.set_exception(error or RuntimeError(f"{dataplane.mode} ended"))

    async def _stop(self, dataplane: Dataplane) -> None:
        """Let it end what it is committing, so that nothing of it comes after what follows."""
        self._sync.remove(dataplane)
        task = self._running.pop(dataplane.mode)
        dataplane.finish()
        await asyncio.wait({task}, timeout=PATIENCE_SECONDS)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def _started(self) -> None:
        """The serving dataplane is complete: what other modes left may drain."""
        self._on_synced()
        self._clearing = asyncio.ensure_future(self._drain_leftovers())

    async def _drain_leftovers(self) -> None:
        modes = []
        for mode in MODES:
            if mode == self.state.serving:
                continue
            # A host that lacks the tools of a mode has nothing of it either.
            with contextlib.suppress(DataplaneError, OSError):
                if await self.backend(mode).driver.leftovers():
                    modes.append(mode)
        if modes:
            log.info("left by another mode", modes=modes)
        self.state, actions = switch.found(self.state, modes, self.drain_seconds, time.time())
        self._save()
        await self._perform(actions)

    # Actions

    async def _go(self, event: Event) -> None:
        """Take an event and everything that follows from it."""
        if self._clearing is not None:
            await asyncio.wait({self._clearing})
        events = [event]
        while events:
            self.state, actions = switch.decide(self.state, events.pop())
            self._save()
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
                return await self._probe(mode)
            case switch.BringUp(mode):
                return await self._bring_up(mode)
            case switch.Verify():
                return await self._verify()
            case switch.Retire(mode):
                await self._retire(mode)
            case switch.Remove(mode, cut):
                await self._remove(mode, cut)
            case switch.Say(failure):
                self._say(failure)
        return None

    async def _probe(self, mode: str) -> switch.Probed:
        backend = self.backend(mode)
        try:
            found = await backend.driver.probe()
        except DataplaneError as error:
            return switch.Probed(missing=(str(error),))
        missing = [
            f"no {one.name}: {one.remedy or one.detail}"
            for one in found.found
            if one.needed and not one.present
        ]
        lacking = ((one, backend.compiler.lacks(one, found)) for one in self._virtual_servers())
        unserved = [f"{one.owner} on {one.key}: {why}" for one, why in lacking if why]
        return switch.Probed(missing, sorted(unserved))

    async def _bring_up(self, mode: str) -> Event:
        if mode in self._watching:
            self._watching.pop(mode).cancel()
        synced = asyncio.Event()
        self._target = Dataplane(self.backend(mode), synced.set, self._on_commit)
        try:
            await self._skeleton.ensure()
            if self._prepare is not None:
                await self._prepare(mode)
        except DataplaneError as error:
            return switch.Broken(str(error))
        self._start(self._target)
        task = self._running[mode]
        waiting = asyncio.ensure_future(synced.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            return switch.Broken(str(task.exception()))
        rejected = {
            f"{key}: {why}"
            for key, why in self._target.rejected.items()
            if key not in self.serving.rejected
        }
        return switch.Committed(sorted(rejected))

    async def _verify(self) -> Event:
        assert self._target is not None
        try:
            differences = await self._target.differences()
        except DataplaneError as error:
            return switch.Broken(str(error))
        return switch.Verified(differences, time.time())

    async def _retire(self, mode: str) -> None:
        """Let a mode take nothing new, and begin to watch its flows."""
        if self._target is not None and self._target.mode == self.state.serving:
            old, self.serving, self._target = self.serving, self._target, None
            await self._stop(old)
        elif self._target is not None and self._target.mode == mode:
            await self._stop(self._target)
            self._target = None
        try:
            await self.backend(mode).driver.quiesce()
        except DataplaneError as error:
            # It goes on taking flows, which it serves as they were; it is removed at the end.
            log.warning("cannot quiesce", mode=mode, why=str(error))
        self._watching[mode] = asyncio.ensure_future(self._watch(mode))

    async def _watch(self, mode: str) -> None:
        """Count the flows of a draining mode until it is removed."""
        pause = FIRST_COUNT_SECONDS
        while any(one.mode == mode for one in self.state.drains):
            flows: int | None = None
            try:
                self._flows[mode] = await self.backend(mode).driver.flows()
                flows = self._flows[mode].total
            except DataplaneError as error:
                log.warning("flows cannot be counted", mode=mode, why=str(error))
            before = self.state
            self.state, actions = switch.decide(
                self.state, switch.Counted(mode, flows, time.time())
            )
            if self.state.drains != before.drains:
                self._save()
            if actions:
                del self._watching[mode]
                await self._perform(actions)
                return
            left = min((one.deadline for one in self.state.drains if one.mode == mode), default=0)
            await asyncio.sleep(max(0.0, min(pause, left - time.time())))
            pause = min(2 * pause, LONGEST_COUNT_SECONDS)

    async def _remove(self, mode: str, cut: int) -> None:
        if self._target is not None and self._target.mode == mode:
            await self._stop(self._target)
            self._target = None
        removed: Sequence[str] = ()
        for last in [False] * (REMOVALS - 1) + [True]:
            try:
                removed = await self.backend(mode).driver.teardown()
                break
            except DataplaneError as error:
                log.warning("cannot remove", mode=mode, why=str(error))
                if last:
                    return
                await asyncio.sleep(FIRST_COUNT_SECONDS)
        if cut and removed:
            self.cut_flows += cut
            log.warning("drain ended at its deadline", mode=mode, flows_cut=cut)
        else:
            # A NAT dataplane is away since it retired: what is left needs connection tracking only.
            log.info("drained", mode=mode, flows_left=cut)

    def _say(self, failure: str) -> None:
        assert self.report is not None
        self.report.failure = failure
        self.report.ended = time.time()
        if failure:
            log.error("switch failed", to=self.report.target, why=failure)
        else:
            log.info("switched", origin=self.report.origin, to=self.report.target)

    def _virtual_servers(self) -> Sequence[VirtualServer]:
        return self._sync.table.virtual_servers()

    # The record

    def _save(self) -> None:
        """Leave the state for the next daemon, at once and whole."""
        document = msgspec.json.encode(Record(self._configured, self.state))
        draft = self._record.with_name(f".{self._record.name}")
        try:
            draft.write_bytes(document)
            os.replace(draft, self._record)
        except OSError as error:
            log.warning("mode not recorded", path=str(self._record), why=error.strerror)


def read_record(path: Path) -> Record | None:
    """Return what the last daemon left, or None where there is nothing that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        log.warning("record of the mode not read", path=str(path), why=str(error))
        return None

"""Dataplanes that only carry old flows: watched until these have ended, then removed.

Lives here: the tasks that quiesce, count and remove, and what they saw. Must not: decide when a
drain is over (switch.py), or know which dataplane serves.
"""

import asyncio
import time
from collections.abc import Callable

import structlog

from vipd.backends.protocol import Flows
from vipd.backends.registry import END_FLOWS, Backend
from vipd.proxy.errors import DataplaneError
from vipd.proxy.status import DrainView
from vipd.proxy.switch import Counted, Drain, Event, Removed

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0
"""Between two looks at a dataplane that drains; the pause doubles from the first to the longest."""
MOST_SERVERS_SHOWN = 20

log = structlog.get_logger()


def now() -> float:
    """Return seconds since the boot, which no clock step changes and a restart keeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Draining:
    """Watches each draining dataplane in a task of its own.

    `tell` takes an event; `drain` returns what is decided about a mode, None where it does not
    drain; `spawn` runs a task whose failure ends the daemon; `reached` is told each step.
    """

    def __init__(
        self,
        backend: Callable[[str], Backend],
        tell: Callable[[Event], None],
        drain: Callable[[str], Drain | None],
        spawn: Callable[..., "asyncio.Task[None]"],
        reached: Callable[[str], None],
    ) -> None:
        self.flows_cut = 0
        """Flows that drains had to end at their deadline, since the start."""
        self.failures: dict[str, str] = {}
        """What keeps a mode from being left, by mode; tried again."""
        self._backend = backend
        self._tell = tell
        self._drain = drain
        self._spawn = spawn
        self._reached = reached
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._flows: dict[str, Flows] = {}

    def watch(self, mode: str) -> None:
        """Begin to let a mode drain; it is quiesced first."""
        self._flows.pop(mode, None)
        if mode not in self._tasks:
            self._tasks[mode] = self._spawn(self._watch(mode))

    async def leave(self, mode: str) -> None:
        """Stop watching a mode, which is to serve again; what is being done to it is done first."""
        task = self._tasks.get(mode)
        if task is None:
            return
        async with self._lock(mode):
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._tasks.pop(mode, None)
        self.failures.pop(mode, None)

    def stop(self) -> list["asyncio.Task[None]"]:
        """Cancel everything and return the tasks; the kernel keeps what drains."""
        for task in self._tasks.values():
            task.cancel()
        return list(self._tasks.values())

    def view(self, drain: Drain) -> DrainView:
        """Return what people are told of a drain."""
        counted = self._flows.get(drain.mode, Flows({})).by_server
        most = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
        deadline = time.time() + drain.deadline - now()
        return DrainView(
            drain.mode,
            time.time() if drain.removing else deadline,
            drain.flows,
            dict(most[:MOST_SERVERS_SHOWN]),
        )

    async def _watch(self, mode: str) -> None:
        quiesced = False
        pause = FIRST_PAUSE_SECONDS
        while (drain := self._drain(mode)) is not None:
            if not quiesced:
                async with self._lock(mode):
                    quiesced = await self._quiesce(mode)
            if not drain.removing:
                self._tell(Counted(mode, await self._count(mode), now()))
                drain = self._drain(mode)
            if drain is not None and drain.removing:
                async with self._lock(mode):
                    if await self._remove(drain):
                        self._tell(Removed(mode))
                        del self._tasks[mode]
                        return
            left = max(0.0, drain.deadline - now()) if drain is not None else 0.0
            await asyncio.sleep(pause if drain is None or drain.removing else min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        del self._tasks[mode]

    async def _quiesce(self, mode: str) -> bool:
        try:
            await self._backend(mode).driver.quiesce()
        except DataplaneError as error:
            self._failed(mode, f"{mode} still takes new flows: {error}")
            return False
        self.failures.pop(mode, None)
        return True

    async def _count(self, mode: str) -> int | None:
        try:
            flows = await self._backend(mode).driver.flows()
        except DataplaneError as error:
            log.warning("flows cannot be counted", mode=mode, why=str(error))
            return None
        self._flows[mode] = flows
        return flows.total

    async def _remove(self, drain: Drain) -> bool:
        mode = drain.mode
        self._reached(f"Remove {mode}")
        try:
            removed = await self._backend(mode).driver.teardown()
        except DataplaneError as error:
            self._failed(mode, f"{mode} cannot be removed: {error}")
            return False
        self.failures.pop(mode, None)
        self._flows.pop(mode, None)
        flows = "unknown" if drain.flows is None else drain.flows
        if removed and drain.flows and mode in END_FLOWS:
            self.flows_cut += drain.flows
            log.warning("drain ended at its deadline", mode=mode, flows_cut=flows)
        else:
            log.info("drained", mode=mode, flows_go_on=flows)
        return True

    def _failed(self, mode: str, why: str) -> None:
        if self.failures.get(mode) != why:
            log.error("drain failing", mode=mode, why=why)
        self.failures[mode] = why

    def _lock(self, mode: str) -> asyncio.Lock:
        return self._locks.setdefault(mode, asyncio.Lock())

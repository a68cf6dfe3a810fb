"""Repair: what others change of ours is put right again, but never in a fight.

Lives here: when a dataplane has to look at the kernel, and how long it waits where the same party
does it again and again. Must not: know what is in the kernel (backends), or how the difference is
committed (dataplane.py).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog
from msgspec import Struct

from vipd.backends.watching import Drift, Watching
from vipd.proxy.dataplane import Dataplane
from vipd.proxy.errors import DataplaneError
from vipd.proxy.status import RepairView

COMPARE_SECONDS = 900.0
"""Everything is compared this often, for what no notification tells."""
RETRY_SECONDS = 10.0
"""Before it is tried again to watch, where that failed."""
PATIENT_REPAIRS = 3
"""So many repairs of what one party did are done at once; then there is a pause before each."""
FORGIVEN_SECONDS = 300.0
"""After so long without another change, a party begins anew."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
"""Before a repair of what the same party did again; the pause doubles."""
MOST_TOLD = 8
MOST_PARTIES = 64

log = structlog.get_logger()


class Offender(Struct, frozen=True):
    """A party that changed what is ours: how often in a row, and when last by the clock."""

    times: int = 0
    last: float = 0.0


class Repairs:
    """What was repaired since the start, and who made it necessary.

    `clock` returns seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = 0
        self.last: Drift | None = None
        self.last_at = 0.0
        """Seconds since the epoch."""
        self.patience: dict[str, float] = {}
        """Parties that go on, and how many seconds are waited before the next repair."""
        self._offenders: dict[str, Offender] = {}
        self._clock = clock

    def view(self) -> RepairView | None:
        """Return what `vipd status` tells; None where there was nothing to repair."""
        if self.last is None:
            return None
        return RepairView(
            count=self.count,
            at=self.last_at,
            what=self.last.what,
            by=str(self.last),
            waiting=dict(self.patience),
        )

    def pause(self, party: str) -> float:
        """Note that a party did it, again perhaps; return for how long to wait with the repair."""
        now = self._clock()
        self._offenders = {
            name: one
            for name, one in self._offenders.items()
            if now - one.last < FORGIVEN_SECONDS + self.patience.get(name, 0.0)
        }
        self.patience = {k: v for k, v in self.patience.items() if k in self._offenders}
        if party not in self._offenders and len(self._offenders) >= MOST_PARTIES:
            return LONGEST_PAUSE_SECONDS
        times = self._offenders.get(party, Offender()).times + 1
        self._offenders[party] = Offender(times, now)
        if times <= PATIENT_REPAIRS:
            return 0.0
        doubled = FIRST_PAUSE_SECONDS * 2.0 ** min(times - PATIENT_REPAIRS - 1, 16)
        pause = min(doubled, LONGEST_PAUSE_SECONDS)
        self.patience[party] = pause
        return pause

    def done(self, drift: Drift, objects: int) -> None:
        """Note a repair of so many kernel objects."""
        self.count += 1
        self.last, self.last_at = drift, time.time()
        log.warning("repaired", by=str(drift), what="; ".join(drift.what), objects=objects)


class Repair:
    """Watches over a dataplane. `also` puts right what is no part of it, and is awaited before."""

    def __init__(
        self,
        dataplane: Dataplane,
        repairs: Repairs,
        also: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._dataplane = dataplane
        self._repairs = repairs
        self._also = also
        self._pending: Drift | None = None
        self._told = asyncio.Event()

    async def run(self) -> None:
        """Watch, compare now and then, and repair, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            tasks.create_task(self._compare())
            tasks.create_task(self._repair())

    async def _watch(self) -> None:
        driver = self._dataplane.driver
        if not isinstance(driver, Watching):
            return
        while True:
            try:
                async for drift in driver.drifts():
                    self._note(drift)
            except OSError as error:
                why = f"{error.strerror}: only comparing finds out"
                log.warning("changes by others are not told", mode=self._dataplane.mode, why=why)
            await asyncio.sleep(RETRY_SECONDS)

    async def _compare(self) -> None:
        """Compare everything now and then. What differs is repaired as if it had been told."""
        while True:
            await asyncio.sleep(COMPARE_SECONDS)
            try:
                differences = (await self._dataplane.differences()).splitlines()
            except DataplaneError as error:
                log.warning("not compared", mode=self._dataplane.mode, why=str(error))
                continue
            if differences:
                self._note(Drift(tuple(differences[:MOST_TOLD]), ""))

    def _note(self, drift: Drift) -> None:
        if self._pending is not None:
            what = dict.fromkeys((*self._pending.what, *drift.what))
            first = self._pending if self._pending.by else drift
            drift = Drift(tuple(what)[:MOST_TOLD], first.by, first.process)
        self._pending = drift
        self._told.set()

    async def _repair(self) -> None:
        await self._dataplane.in_step.wait()
        while True:
            await self._told.wait()
            assert self._pending is not None
            pause = self._repairs.pause(self._pending.by)
            if pause:
                log.warning("changed again and again", by=self._pending.by, wait=pause)
                await asyncio.sleep(pause)
            drift, self._pending = self._pending, None
            self._told.clear()
            try:
                if self._also is not None:
                    await self._also()
                objects = await self._dataplane.repair()
            except DataplaneError as error:  # the dataplane tries its own again
                log.warning("not repaired yet", why=str(error))
                self._note(drift)
                await asyncio.sleep(FIRST_PAUSE_SECONDS)
                continue
            if objects:
                self._repairs.done(drift, objects)

"""Repair: what others change of ours is put right again, but never in a fight.

Lives here: when something of ours is put right, and how long that waits where the same party
changes it again and again. Must not: know what is in the kernel (backends), or how it is put right
(dataplane.py, dns_way.py).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import structlog
from msgspec import Struct

from vipd.backends.registry import WITH_SKELETON
from vipd.backends.skeleton import Skeleton
from vipd.backends.watching import Drift, Mending, Watch, Watching
from vipd.proxy.dataplane import Dataplane
from vipd.proxy.errors import DataplaneError
from vipd.proxy.status import RepairView

OFTEN_SECONDS, SELDOM_SECONDS = 60.0, 900.0
"""Everything is compared, for what no notification tells: this often, or"""
COMPARE_REST = 1000.0
"""after so many times what it took, which is a thousandth of a processor."""
RETRY_SECONDS = 10.0
"""Before it is tried again to watch, where that failed."""
PATIENT_REPAIRS = 3
"""So many repairs of what one party did are done at once; then there is a pause before each."""
FORGIVEN_SECONDS = 300.0
"""After so long without another change, a party begins anew."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
"""Before a repair of what the same party did again; the pause doubles."""
PATIENT_LOOKS, REST = 5, 20.0
"""After so many looks in a row at which nothing was wrong, each waits for so many times what the
one before took: at most a twentieth of a processor goes to false alarms."""
MOST_TOLD = 8
MOST_PARTIES = 64

log = structlog.get_logger()


class Offender(Struct, frozen=True):
    """A party that changed what is ours: how often in a row, and when last by the clock."""

    times: int = 0
    last: float = 0.0


class Patience:
    """How long repairs wait for parties that change what is ours again and again.

    `clock` returns seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.waiting: dict[str, float] = {}
        """Parties that go on, and how many seconds are waited before the next repair."""
        self._offenders: dict[str, Offender] = {}
        self._clock = clock

    def pause(self, party: str) -> float:
        """Return for how long to wait before what a party did is put right."""
        self._forgive()
        if party not in self._offenders and len(self._offenders) >= MOST_PARTIES:
            return LONGEST_PAUSE_SECONDS
        return self.waiting.get(party, 0.0)

    def note(self, party: str) -> None:
        """Note that something a party did had to be put right."""
        self._forgive()
        if party not in self._offenders and len(self._offenders) >= MOST_PARTIES:
            return
        times = self._offenders.get(party, Offender()).times + 1
        self._offenders[party] = Offender(times, self._clock())
        if times >= PATIENT_REPAIRS:
            doubled = FIRST_PAUSE_SECONDS * 2.0 ** min(times - PATIENT_REPAIRS, 16)
            self.waiting[party] = min(doubled, LONGEST_PAUSE_SECONDS)

    def _forgive(self) -> None:
        now = self._clock()
        self._offenders = {
            name: one
            for name, one in self._offenders.items()
            if now - one.last < FORGIVEN_SECONDS + self.waiting.get(name, 0.0)
        }
        self.waiting = {k: v for k, v in self.waiting.items() if k in self._offenders}


class Repairs:
    """What was repaired since the start, and who made it necessary."""

    def __init__(self) -> None:
        self.count = 0
        self.last: Drift | None = None
        self.last_at = 0.0
        """Seconds since the epoch."""
        self.patience: dict[str, Patience] = {}
        """By what is repaired: a mode, or another name."""
        self.undone: dict[str, Drift] = {}
        """What is known to be wrong while its repair waits, by the same."""

    def view(self) -> RepairView | None:
        """Return what `vipd status` tells; None where there was nothing to repair."""
        if self.last is None:
            return None
        return RepairView(
            count=self.count,
            at=self.last_at,
            what=self.last.what,
            by=str(self.last),
            waiting=self.waiting(),
        )

    def waiting(self) -> dict[str, float]:
        """Return who goes on, and how many seconds are waited before the next repair."""
        longest: dict[str, float] = {}
        for one in list(self.patience.values()):
            for party, seconds in list(one.waiting.items()):
                longest[party] = max(seconds, longest.get(party, 0.0))
        return longest

    def trouble(self) -> Iterator[str]:
        """Yield what is known to be wrong, and not put right yet."""
        for name, drift in self.undone.items():
            what = "; ".join(drift.what)
            yield f"{name}: {what}, by {drift}; the repair waits, because this goes on"

    def done(self, name: str, drift: Drift, objects: int) -> None:
        """Note a repair of so many kernel objects."""
        self.count += 1
        self.last, self.last_at = drift, time.time()
        what = "; ".join(drift.what)
        log.warning("repaired", of=name, by=str(drift), what=what, objects=objects)


class Repair:
    """Watches over something of ours in the kernel, and has it put right.

    `name` says what it is, such as a mode. `mend` puts right whatever is wrong and returns how many
    objects that were; `compare` returns what differs, as lines. Nothing is put right before
    `ready`.
    """

    def __init__(
        self,
        name: str,
        repairs: Repairs,
        watches: Sequence[Watch],
        mend: Callable[[], Awaitable[int]],
        compare: Callable[[], Awaitable[Sequence[str]]] | None = None,
        ready: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._name = name
        self._repairs = repairs
        self._patience = repairs.patience.setdefault(name, Patience())
        self._watches = watches
        self._mend = mend
        self._compare = compare
        self._ready = ready
        self._pending: Drift | None = None
        self._told = asyncio.Event()

    async def run(self) -> None:
        """Watch, compare now and then, and put right, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for watch in self._watches:
                tasks.create_task(self._watch(watch))
            if self._compare is not None:
                tasks.create_task(self._look_at_everything(self._compare))
            tasks.create_task(self._repair_and_say())

    async def _repair_and_say(self) -> None:
        try:
            await self._repair()
        finally:
            self._repairs.undone.pop(self._name, None)

    async def _watch(self, watch: Watch) -> None:
        said = ""
        while True:
            try:
                async for drift in watch():
                    self._note(drift)
            except (OSError, DataplaneError) as error:
                why = f"{error}: only comparing finds out"
                if why != said:
                    log.warning("changes by others are not told", of=self._name, why=why)
                said = why
            else:
                return  # there is nothing to watch
            await asyncio.sleep(RETRY_SECONDS)

    async def _look_at_everything(self, compare: Callable[[], Awaitable[Sequence[str]]]) -> None:
        """Compare everything now and then. What differs is repaired as if it had been told."""
        took = 0.0
        while True:
            await asyncio.sleep(min(max(OFTEN_SECONDS, COMPARE_REST * took), SELDOM_SECONDS))
            started = time.monotonic()
            try:
                differences = await compare()
                took = time.monotonic() - started
            except DataplaneError as error:
                log.warning("not compared", of=self._name, why=str(error))
                continue
            if differences:
                self._note(Drift(tuple(differences[:MOST_TOLD])))

    def _note(self, drift: Drift) -> None:
        if self._pending is not None:
            what = dict.fromkeys((*self._pending.what, *drift.what))
            first = self._pending if self._pending.by else drift
            drift = Drift(tuple(what)[:MOST_TOLD], first.by, first.process)
        self._pending = drift
        self._told.set()

    async def _repair(self) -> None:
        if self._ready is not None:
            await self._ready()
        in_vain = 0
        while True:
            await self._told.wait()
            assert self._pending is not None
            pause = self._patience.pause(self._pending.by)
            if pause:
                log.warning(
                    "changed again and again", of=self._name, by=self._pending.by, wait=pause
                )
                self._repairs.undone[self._name] = self._pending
                await asyncio.sleep(pause)
            drift, self._pending = self._pending, None
            self._told.clear()
            started = time.monotonic()
            try:
                objects = await self._mend()
            except DataplaneError as error:
                log.warning("not repaired yet", of=self._name, why=str(error))
                self._note(drift)
                await asyncio.sleep(FIRST_PAUSE_SECONDS)
                continue
            self._repairs.undone.pop(self._name, None)
            in_vain = 0 if objects else in_vain + 1
            if objects:
                self._patience.note(drift.by)
                self._repairs.done(self._name, drift, objects)
            elif in_vain > PATIENT_LOOKS:
                took = time.monotonic() - started
                await asyncio.sleep(min(REST * took, LONGEST_PAUSE_SECONDS))


def guard(dataplane: Dataplane, skeleton: Skeleton, repairs: Repairs) -> Repair:
    """Return the repair of a dataplane, and of the skeleton that it needs."""

    async def mend() -> int:
        put_back = 0 if dataplane.mode in WITH_SKELETON else await skeleton.mend()
        return put_back + await dataplane.repair()

    async def compare() -> Sequence[str]:
        if isinstance(driver, Mending) and dataplane.program is not None:
            return await driver.differing(dataplane.program)
        return (await dataplane.differences()).splitlines()

    driver = dataplane.driver
    watches = driver.watches() if isinstance(driver, Watching) else ()
    return Repair(dataplane.mode, repairs, watches, mend, compare, dataplane.in_step.wait)

"""Which flows lead nowhere, and when they are looked for."""

import asyncio
from collections.abc import AsyncIterator, Collection
from pathlib import Path

import pytest
from tests.unit.one_service import ONE, TCP, TWO, UDP, applied
from tests.waiting import until

from vipd.proxy import stale as module
from vipd.proxy.errors import Busy, DataplaneError, UnknownResult, Unsupported
from vipd.proxy.events import Deleted, Event, Kind
from vipd.proxy.names import Family, NamespacedName
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.stale import Alive, Spot, StaleFlows, taken
from vipd.proxy.virtualserver import Changes, Key, Table

SETTINGS = NodeSettings(node_name="n")
Look = tuple[list[str], list[str] | None]
"""What was asked of connection tracking: virtual servers with those who live; who left."""


class World:
    """One service that changes, the time, and what connection tracking was asked."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "web.yaml"
        self.snapshot = Snapshot()
        self.table = resolve(self.snapshot, SETTINGS)
        self.time = 1000.0
        self.looks: list[Look] = []
        self.errors: list[DataplaneError] = []
        self.stale = StaleFlows(
            self._forget,
            lambda: (self.snapshot, self.table),
            lambda: self.time,
        )

    async def _forget(
        self, keys: Collection[Key], alive: Alive, left: Collection[Spot] | None
    ) -> int:
        if self.errors:
            raise self.errors.pop(0)
        told = [f"{key}: {' '.join(sorted(map(_printed, alive(key))))}" for key in keys]
        gone = None if left is None else sorted(map(_printed, left))
        self.looks.append((sorted(told), gone))
        return 3

    def tell(self, events: list[Event], *, committed: bool = True) -> tuple[Table, Changes]:
        before, unfolded = self.table, self.snapshot
        self.snapshot, touched = fold(unfolded, events)
        self.stale.folded(unfolded, self.snapshot, touched)
        self.table, changes = update(before, self.snapshot, SETTINGS, touched)
        if changes:
            self.stale.note(before, changes)
        if changes and committed:
            self.stale.committed(changes.virtual_servers.keys())
        return before, changes

    def endpoints(self, *endpoints: str, committed: bool = True) -> tuple[Table, Changes]:
        return self.tell(applied(self.file, *endpoints), committed=committed)

    async def later(self, seconds: float) -> list[Look]:
        """Let time pass, and return what was asked."""
        self.time += seconds
        self.looks.clear()
        await self.stale.look()
        return list(self.looks)

    async def begun(self, *endpoints: str) -> None:
        """Let a daemon have looked at everything."""
        self.endpoints(*endpoints)
        assert await self.later(0.0) != []


def _printed(spot: Spot) -> str:
    return f"{spot[0]}:{spot[1]}"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def looked(tcp: str, udp: str, left: list[str] | None) -> Look:
    return ([f"{UDP}: {udp}", f"{TCP}: {tcp}"], left)


LEFT = [f"{TWO}:5300", f"{TWO}:8080"]
WITHOUT_TWO = looked(f"{ONE}:8080", f"{ONE}:5300", LEFT)
GRACE = module.GRACE_SECONDS


async def test_the_first_commit_is_a_look_at_everything_by_who_lives(world: World) -> None:
    world.endpoints(ONE, f"{TWO} terminating")
    alive = looked(f"{ONE}:8080 {TWO}:8080", f"{ONE}:5300 {TWO}:5300", None)
    assert await world.later(0.0) == [alive]
    assert world.stale.deleted == {Family.IPV4: 3}
    assert sum(world.stale.took[Family.IPV4].counts) == 1
    assert await world.later(100.0) == []


async def test_an_endpoint_that_is_gone_is_looked_for_a_while_after_the_commit(
    world: World,
) -> None:
    await world.begun(ONE, TWO)
    world.endpoints(ONE, committed=False)
    assert await world.later(0.5 * GRACE) == []
    world.stale.committed([TCP, UDP])
    assert await world.later(0.9 * GRACE) == []
    assert await world.later(0.2 * GRACE) == [WITHOUT_TWO]
    assert await world.later(100.0) == []


async def test_what_is_not_committed_waits_and_keeps_nothing_else_waiting(world: World) -> None:
    await world.begun(ONE, TWO)
    world.endpoints(ONE, committed=False)
    world.stale.committed([TCP])  # the other one was rejected, say
    assert await world.later(GRACE) == [([f"{TCP}: {ONE}:8080"], LEFT)]
    assert await world.later(100.0) == []
    world.stale.committed([UDP])
    assert await world.later(0.0) == [([f"{UDP}: {ONE}:5300"], None)]


async def test_one_that_terminates_and_serves_lives_until_it_does_not(world: World) -> None:
    await world.begun(ONE, TWO)
    world.endpoints(ONE, f"{TWO} terminating")
    assert await world.later(100.0) == []
    assert not world.endpoints(ONE, f"{TWO} ending")[1]  # the table is the same as before
    assert await world.later(GRACE) == [WITHOUT_TWO]
    world.endpoints(ONE)
    assert await world.later(GRACE) == []


async def test_one_that_is_not_ready_but_serves_lives(world: World) -> None:
    await world.begun(ONE, TWO)
    world.endpoints(ONE, f"{TWO} unready")
    assert await world.later(GRACE) == []
    world.endpoints(ONE, f"{TWO} silent")
    assert await world.later(GRACE) == [WITHOUT_TWO]


async def test_where_nobody_serves_those_that_are_there_live(world: World) -> None:
    await world.begun(ONE, TWO)
    world.endpoints(f"{TWO} silent")
    (look,) = await world.later(GRACE)
    assert look[0] == looked(f"{TWO}:8080", f"{TWO}:5300", None)[0]


async def test_what_ends_while_an_earlier_change_is_not_committed_waits_for_it(
    world: World,
) -> None:
    await world.begun(ONE, TWO)
    world.endpoints(ONE, f"{TWO} terminating", committed=False)
    world.endpoints(ONE)
    assert await world.later(10 * GRACE) == []
    world.stale.committed([UDP, TCP])
    assert await world.later(0.0) == [looked(f"{ONE}:8080", f"{ONE}:5300", None)]


async def test_what_changes_before_the_first_commit_is_looked_at_with_its_own(
    world: World,
) -> None:
    world.endpoints(ONE, TWO, committed=False)
    world.endpoints(ONE, committed=False)
    world.stale.committed([TCP])  # the other one has changed meanwhile
    assert await world.later(0.0) == [([f"{TCP}: {ONE}:8080"], None)]
    world.stale.committed([UDP])
    assert await world.later(0.0) == [([f"{UDP}: {ONE}:5300"], None)]


async def test_a_change_of_the_target_port_leaves_the_old_one_behind(world: World) -> None:
    await world.begun(ONE)
    text = world.file.read_text().replace("5300", "5400")
    world.file.write_text(text)
    from vipd.proxy.events import Applied
    from vipd.proxy.sources.manifests import load

    world.tell([one for one in load([str(world.file)]) if isinstance(one, Applied)])
    assert await world.later(GRACE) == [looked(f"{ONE}:8080", f"{ONE}:5400", [f"{ONE}:5300"])]


async def test_an_address_that_gets_another_service_is_looked_at_wholly(world: World) -> None:
    await world.begun(ONE)
    world.tell([Deleted(Kind.SERVICE, NamespacedName("test", "web"))])
    assert await world.later(GRACE) == []  # its endpoints may live on
    assert taken(*world.endpoints(ONE)) == {TCP, UDP}
    assert await world.later(0.0) == [looked(f"{ONE}:8080", f"{ONE}:5300", None)]


async def test_what_gets_its_first_endpoint_is_looked_at_at_once(world: World) -> None:
    await world.begun()
    assert taken(*world.endpoints(ONE, committed=False)) == {TCP, UDP}
    assert await world.later(0.0) == []
    world.stale.committed([TCP])
    world.stale.committed([TCP])
    assert await world.later(0.0) == [([f"{TCP}: {ONE}:8080"], None)]
    assert taken(*world.endpoints(ONE, TWO)) == set()
    assert taken(*world.endpoints()) == set()


async def test_who_stopped_a_moment_ago_lives_for_a_look_at_everything(world: World) -> None:
    await world.begun()
    world.endpoints(ONE, TWO)
    world.endpoints(ONE)
    both = looked(f"{ONE}:8080 {TWO}:5300 {TWO}:8080", f"{ONE}:5300 {TWO}:5300 {TWO}:8080", None)
    assert await world.later(0.5 * GRACE) == [both]
    assert await world.later(0.5 * GRACE) == [WITHOUT_TWO]


@pytest.mark.parametrize("error", [Busy("no"), UnknownResult("no")])
async def test_where_it_fails_they_are_forgotten_later(world: World, error: DataplaneError) -> None:
    await world.begun(ONE, TWO)
    world.endpoints(ONE)
    world.errors = [error]
    assert await world.later(GRACE) == []
    world.endpoints(ONE, TWO)
    world.endpoints(TWO)
    (look,) = await world.later(GRACE)
    assert look == looked(f"{TWO}:8080", f"{TWO}:5300", [f"{ONE}:5300", f"{ONE}:8080", *LEFT])


async def test_what_this_host_cannot_do_is_not_tried_again(world: World) -> None:
    world.endpoints(ONE)
    world.errors = [Unsupported("connection tracking", "a kernel with it")]
    assert await world.later(0.0) == []
    assert await world.later(100.0) == []
    assert not world.stale.deleted


async def test_what_the_first_commit_rejected_is_looked_at_when_it_is_accepted(
    world: World,
) -> None:
    world.endpoints(ONE, committed=False)
    world.stale.committed([TCP])
    assert [len(keys) for keys, _ in await world.later(0.0)] == [1]
    world.stale.committed([UDP])
    ((keys, _),) = await world.later(0.0)
    assert [one.partition(": ")[0] for one in keys] == [str(UDP)]


@pytest.fixture
async def running(world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.0)
    task = asyncio.ensure_future(world.stale.run())
    yield world
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_task_wakes_for_what_is_due(running: World) -> None:
    running.endpoints(ONE, TWO)
    await until(lambda: len(running.looks) == 1)
    running.endpoints(ONE, committed=False)
    running.stale.committed([TCP, UDP])
    await until(lambda: WITHOUT_TWO in running.looks)
    assert not running.endpoints(ONE, f"{TWO} terminating")[1]
    running.endpoints(ONE)
    await until(lambda: running.looks.count(WITHOUT_TWO) == 2)


async def test_the_task_tries_again_while_the_kernel_is_busy(running: World) -> None:
    running.stale._pause = 0.0
    running.errors = [Busy("no"), Busy("no")]
    running.endpoints(ONE)
    await until(lambda: running.looks)

"""Endpoints that left, and when their flows are ended."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import structlog
from tests.unit.one_service import FOUR, ONE, TCP, THREE, TWO, UDP, applied
from tests.waiting import until

from vipd.backends.protocol import Departed
from vipd.proxy import departures as module
from vipd.proxy.departures import Departures, departures
from vipd.proxy.errors import Busy, DataplaneError, UnknownResult
from vipd.proxy.events import Deleted, Event, Kind
from vipd.proxy.names import NamespacedName
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.virtualserver import Changes, Table

SETTINGS = NodeSettings(node_name="n")


class World:
    """One service that changes, the time, and what was cut."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "web.yaml"
        self.snapshot = Snapshot()
        self.table = resolve(self.snapshot, SETTINGS)
        self.time = 1000.0
        self.cut: list[Departed] = []
        self.error: DataplaneError | None = None
        self.departures = Departures(
            60.0, self._cut, lambda: (self.snapshot, self.table), lambda: self.time
        )

    async def _cut(self, departed: Sequence[Departed]) -> int:
        if self.error is not None:
            raise self.error
        self.cut += departed
        return 3 * len(departed)

    def tell(self, events: list[Event], *, committed: bool = True) -> tuple[Table, Changes]:
        before = self.table
        self.snapshot, touched = fold(self.snapshot, events)
        self.table, changes = update(before, self.snapshot, SETTINGS, touched)
        self.departures.note(before, changes)
        if committed:
            self.departures.committed(changes.virtual_servers.keys())
        return before, changes

    def endpoints(
        self, *endpoints: str, annotations: str = "", committed: bool = True
    ) -> tuple[Table, Changes]:
        """Let the service have these; see `applied`."""
        events = applied(self.file, *endpoints, annotations=annotations)
        return self.tell(events, committed=committed)

    async def later(self, seconds: float) -> list[str]:
        """Let time pass, and return whose flows were ended."""
        self.time += seconds
        self.cut.clear()
        await self.departures.end_due()
        return sorted(f"{one.key} {one.address}:{one.port}" for one in self.cut)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


BOTH = [f"{UDP} {TWO}:5300", f"{TCP} {TWO}:8080"]


async def test_flows_of_an_endpoint_that_is_gone_end_at_the_deadline(world: World) -> None:
    world.endpoints(ONE, TWO)
    world.endpoints(ONE)
    assert world.departures.pending == 2
    assert await world.later(59.0) == []
    assert await world.later(1.0) == BOTH
    assert (world.departures.pending, world.departures.flows_cut) == (0, 6)
    assert await world.later(1000.0) == []


async def test_another_deadline_counts_for_those_that_leave_from_then_on(world: World) -> None:
    world.endpoints(ONE, TWO)
    world.endpoints(ONE)
    world.departures.drain_seconds = 7.0
    world.endpoints()
    assert f"{TCP} {ONE}:8080" in await world.later(7.0)
    assert await world.later(52.9) == []
    assert await world.later(0.1) == BOTH


async def test_nothing_ends_before_the_commit(world: World) -> None:
    annotation = 'vipd/drain-seconds: "0"'
    world.endpoints(ONE, TWO, annotations=annotation)
    world.endpoints(ONE, annotations=annotation, committed=False)
    assert await world.later(100.0) == []
    world.departures.committed([TCP])
    assert await world.later(0.0) == BOTH[1:]
    world.departures.committed([TCP, UDP])
    assert await world.later(0.0) == BOTH[:1]


async def test_a_terminating_endpoint_has_the_same_deadline(world: World) -> None:
    world.endpoints(ONE, TWO)
    world.endpoints(ONE, f"{TWO} terminating")
    assert await world.later(60.0) == BOTH


async def test_one_that_is_merely_unready_keeps_its_flows_while_it_lives(world: World) -> None:
    world.endpoints(ONE, TWO)
    world.endpoints(ONE, f"{TWO} unready")
    assert await world.later(60.0) == []
    assert await world.later(600.0) == []
    world.endpoints(ONE)
    assert await world.later(60.0) == BOTH


async def test_one_that_comes_back_keeps_its_flows(world: World) -> None:
    world.endpoints(ONE, TWO)
    world.endpoints(ONE)
    world.endpoints(ONE, TWO)
    assert await world.later(60.0) == []
    assert world.departures.pending == 0


async def test_one_that_leaves_again_has_the_whole_time_again(world: World) -> None:
    world.endpoints(ONE, TWO)
    world.endpoints(ONE, f"{TWO} terminating")
    assert await world.later(50.0) == []
    world.endpoints(ONE, TWO)
    world.endpoints(ONE, f"{TWO} terminating")
    assert await world.later(50.0) == []
    assert await world.later(10.0) == BOTH


async def test_the_last_one_stays_while_it_terminates(world: World) -> None:
    world.endpoints(ONE)
    world.endpoints(f"{ONE} terminating")
    assert world.departures.pending == 0


async def test_the_service_may_say_how_long(world: World) -> None:
    annotation = 'vipd/drain-seconds: "5"'
    world.endpoints(ONE, TWO, annotations=annotation)
    world.endpoints(ONE, f"{TWO} terminating", annotations=annotation)
    assert await world.later(4.0) == []
    assert await world.later(1.0) == BOTH


async def test_no_time_at_all_is_allowed(world: World) -> None:
    annotation = 'vipd/drain-seconds: "0"'
    world.endpoints(ONE, TWO, annotations=annotation)
    world.endpoints(ONE, f"{TWO} terminating", annotations=annotation)
    assert await world.later(0.0) == BOTH


async def test_a_deleted_service_cuts_nobody_off(world: World) -> None:
    world.endpoints(ONE, TWO)
    world.tell([Deleted(Kind.SERVICE, NamespacedName("test", "web"))])
    assert world.departures.pending == 0


async def test_what_cannot_be_cut_is_tried_again(world: World) -> None:
    world.endpoints(ONE, TWO)
    world.endpoints(ONE)
    world.error = UnknownResult("no")
    assert await world.later(60.0) == []
    assert (world.departures.pending, world.departures.flows_cut) == (2, 0)
    world.error = None
    assert await world.later(module.LONGEST_PAUSE_SECONDS) == []
    assert await world.later(module.LATE_LOOK_SECONDS) == BOTH
    assert world.departures.pending == 0


async def test_where_the_kernel_is_busy_the_next_cut_is_soon_and_then_later(world: World) -> None:
    world.endpoints(ONE, TWO)
    world.endpoints(ONE)
    world.error = Busy("no")
    assert await world.later(60.0) == []
    assert await world.later(module.FIRST_PAUSE_SECONDS) == []  # waits twice as long now
    world.error = None
    assert await world.later(module.FIRST_PAUSE_SECONDS) == []
    assert await world.later(1.5 * module.FIRST_PAUSE_SECONDS) == BOTH
    assert world.departures.pending == 0


async def test_the_pause_while_the_kernel_is_busy_is_bounded(world: World) -> None:
    world.endpoints(ONE, TWO)
    world.endpoints(ONE)
    world.error = Busy("no")
    await world.later(60.0)
    for _ in range(20):
        await world.later(module.LONGEST_PAUSE_SECONDS)
    world.error = None
    assert await world.later(module.LONGEST_PAUSE_SECONDS) == BOTH


async def test_what_is_remembered_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PENDING", 1)
    world.endpoints(ONE, TWO)
    world.endpoints(ONE)
    assert world.departures.pending == 1


async def test_too_many_are_told_once_until_there_is_room_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_PENDING", 1)

    def told() -> int:
        return sum(one["event"] == "too many departures" for one in logs)

    with structlog.testing.capture_logs() as logs:
        world.endpoints(ONE, TWO, THREE, FOUR)
        world.endpoints(ONE, TWO, THREE)
        world.endpoints(ONE, TWO)
        assert told() == 1
        await world.later(60.0)
        assert world.departures.pending == 0
        world.endpoints(ONE)
        assert told() == 2


async def test_the_queue_does_not_grow_with_endpoints_that_come_and_go(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_STALE", 10)
    for _ in range(50):
        world.endpoints(ONE, TWO)
        world.endpoints(ONE)
        world.time += 0.5
        assert len(world.departures._queue) <= 2 * world.departures.pending + 10
    assert await world.later(60.0) == BOTH
    assert world.departures.pending == 0


async def test_a_change_of_the_service_alone_is_no_departure(world: World) -> None:
    world.endpoints(ONE, TWO)
    before, changes = world.endpoints(ONE, TWO, annotations="vipd/algorithm: maglev")
    assert changes
    assert list(departures(before, changes, 60.0)) == []


@pytest.fixture
async def running(world: World) -> AsyncIterator[World]:
    task = asyncio.ensure_future(world.departures.run())
    yield world
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_task_wakes_for_what_is_due(running: World) -> None:
    annotation = 'vipd/drain-seconds: "0"'
    running.endpoints(ONE, TWO, annotations=annotation)
    await asyncio.sleep(0)
    running.endpoints(ONE, annotations=annotation)
    await until(lambda: len(running.cut) == 2)

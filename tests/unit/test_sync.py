"""The sync with the real nftables compiler and a driver that fails as it is told."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from vipd.backends.nftables.backend import NftablesCompiler
from vipd.backends.protocol import Capabilities, Committed, Departed, Flows
from vipd.backends.registry import Backend
from vipd.proxy import dataplane as module
from vipd.proxy.dataplane import Dataplane
from vipd.proxy.errors import (
    Busy,
    DataplaneError,
    ManifestError,
    OutOfStep,
    Rejected,
    UnknownResult,
    Unsupported,
)
from vipd.proxy.events import Applied, Deleted, Event, Kind, Problem, Synced
from vipd.proxy.names import Family, NamespacedName, Protocol, parse_address
from vipd.proxy.settings import NodeSettings
from vipd.proxy.sources.manifests import load
from vipd.proxy.sync import Sync
from vipd.proxy.virtualserver import Key

SERVICE = """
apiVersion: v1
kind: Service
metadata: {{name: s{n}, namespace: test}}
spec: {{clusterIP: 10.96.0.{n}, ports: [{{port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: s{n}, namespace: test, labels: {{kubernetes.io/service-name: s{n}}}}}
addressType: IPv4
ports: [{{name: "", port: {port}}}]
endpoints: [{{addresses: [10.244.1.21]}}]
"""
Queue = asyncio.Queue[list[Event] | None]


def key(number: int) -> Key:
    return Key(Family.IPV4, parse_address(f"10.96.0.{number}"), Protocol.TCP, 80)


class Driver:
    """Keeps what it was given; `failures` are raised one after the other, None being success."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.observations = 0
        self.failures: list[DataplaneError | None] = []
        self.rejected: dict[Key, DataplaneError] = {}
        self.withdrawn: dict[Key, DataplaneError] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.commits = 0

    async def probe(self) -> Capabilities:
        return Capabilities("nftables", ())

    async def observe(self) -> Any:
        self.observations += 1
        return None

    async def commit(self, plan: Any) -> Committed:
        self.commits += 1
        await self.gate.wait()
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        self.texts.append(str(plan))
        told = {unit.key for unit in plan.units}
        return Committed({k: e for k, e in self.rejected.items() if k in told}, self.withdrawn)

    async def quiesce(self) -> None:
        raise NotImplementedError

    async def flows(self) -> Flows:
        raise NotImplementedError

    async def cut(self, departed: Sequence[Departed]) -> int:
        raise NotImplementedError

    async def leftovers(self) -> list[str]:
        raise NotImplementedError

    async def teardown(self) -> list[str]:
        raise NotImplementedError


class Rig:
    """A sync that runs, its source and its driver."""

    def __init__(self, folder: Path, driver: Driver | None = None) -> None:
        self.folder = folder
        self.driver = driver or Driver()
        self.queue: Queue = asyncio.Queue()
        self.ready = 0
        self.dataplane = Dataplane(Backend(NftablesCompiler(), self.driver), self._on_synced)
        self.sync = Sync(NodeSettings(node_name="n"))
        self.sync.add(self.dataplane)
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        dataplane = asyncio.ensure_future(self.dataplane.run())
        source = asyncio.ensure_future(self.sync.run(self._source()))
        try:
            await asyncio.wait({dataplane, source}, return_when=asyncio.FIRST_COMPLETED)
            self.dataplane.finish()
            await dataplane
        finally:
            dataplane.cancel()
            source.cancel()

    def _on_synced(self) -> None:
        self.ready += 1

    async def _source(self) -> AsyncIterator[list[Event]]:
        while (batch := await self.queue.get()) is not None:
            yield batch

    def service(self, number: int, port: int = 8080) -> list[Event]:
        path = self.folder / "one.yaml"
        path.write_text(SERVICE.format(n=number, port=port))
        return [one for one in load([str(path)]) if isinstance(one, Applied)]

    def tell(self, *events: Event) -> None:
        self.queue.put_nowait(list(events))

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not holds():  # noqa: ASYNC110 - many kinds of state, none with an event
                await asyncio.sleep(0)

    async def start(self, *numbers: int) -> None:
        self.tell(*(event for n in numbers for event in self.service(n)), Synced())
        await self.until(lambda: self.dataplane.synced)
        self.driver.texts.clear()

    async def end(self) -> None:
        """Let the source end, which ends the sync once all is done."""
        self.queue.put_nowait(None)
        async with asyncio.timeout(20):
            await self.task


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(module, "SHORTEST_PAUSE_SECONDS", 0.0)
    made = Rig(tmp_path)
    made.dataplane._pause = 0.0
    yield made
    made.task.cancel()
    await asyncio.gather(made.task, return_exceptions=True)


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_nothing_is_committed_before_everything_was_listed(rig: Rig) -> None:
    rig.tell(*rig.service(1))
    rig.tell(*rig.service(2))
    await settle()
    assert (rig.driver.commits, rig.dataplane.synced, rig.ready) == (0, False, 0)
    rig.tell(Synced())
    await rig.until(lambda: rig.dataplane.synced)
    text = "".join(rig.driver.texts)
    assert "10.96.0.1 . tcp . 80" in text
    assert "10.96.0.2 . tcp . 80" in text
    assert (rig.dataplane.syncs, rig.ready) == (1, 1)
    assert rig.dataplane.last_sync is not None
    assert rig.dataplane.last_sync.full


async def test_an_empty_source_is_synced_too(rig: Rig) -> None:
    rig.tell(Synced())
    await rig.until(lambda: rig.dataplane.synced)
    assert "add table ip vipd-skeleton" in "".join(rig.driver.texts)


async def test_a_change_is_committed_alone(rig: Rig) -> None:
    await rig.start(1, 2)
    rig.tell(*rig.service(2, port=9090))
    await rig.until(lambda: rig.dataplane.syncs == 2)
    (text,) = rig.driver.texts
    assert "10.96.0.2" in text
    assert "10.96.0.1 " not in text
    assert rig.dataplane.last_sync is not None
    assert not rig.dataplane.last_sync.full
    assert rig.driver.observations == 1


async def test_what_changes_nothing_is_not_committed(rig: Rig) -> None:
    await rig.start(1)
    rig.tell(*rig.service(1))
    await rig.end()
    assert (rig.dataplane.syncs, rig.driver.texts) == (1, [])


async def test_events_during_a_commit_are_one_more_commit(rig: Rig) -> None:
    await rig.start(1)
    commits = rig.driver.commits
    rig.driver.gate.clear()
    rig.tell(*rig.service(2))
    await rig.until(lambda: rig.driver.commits == commits + 1)
    for number in range(3, 40):
        rig.tell(*rig.service(number))
    await settle()
    await rig.until(rig.queue.empty)
    rig.driver.gate.set()
    await rig.end()
    assert rig.driver.commits == commits + 2
    assert "10.96.0.39 . tcp . 80" in rig.driver.texts[-1]


async def test_what_comes_and_goes_during_a_commit_is_never_seen(rig: Rig) -> None:
    await rig.start(1)
    rig.driver.gate.clear()
    rig.tell(*rig.service(2))
    commits = rig.driver.commits
    await rig.until(lambda: rig.driver.commits == commits + 1)
    rig.tell(*rig.service(3))
    rig.tell(Deleted(Kind.SERVICE, NamespacedName("test", "s3")))
    await rig.until(rig.queue.empty)
    await settle()
    rig.driver.gate.set()
    await rig.end()
    assert "10.96.0.3 " not in "".join(rig.driver.texts)


async def test_busy_means_the_same_again(rig: Rig) -> None:
    await rig.start(1)
    rig.driver.failures = [Busy("busy"), Busy("busy")]
    rig.tell(*rig.service(2))
    await rig.until(lambda: rig.dataplane.syncs == 2)
    assert (rig.dataplane.failed_syncs, rig.dataplane.failure) == (2, "")
    assert rig.driver.observations == 1
    (text,) = rig.driver.texts
    assert "10.96.0.1 " not in text


async def test_a_failure_is_told_as_long_as_it_lasts(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.start(1)
    rig.driver.failures = [Busy("the lock is taken")]
    rig.tell(*rig.service(2))
    await rig.until(lambda: rig.dataplane.failure)
    assert "the lock is taken" in rig.dataplane.failure
    # Another change joins what is tried again, or follows it.
    rig.tell(*rig.service(3))
    await rig.until(lambda: "10.96.0.3 . tcp" in "".join(rig.driver.texts))
    assert rig.dataplane.failure == ""
    assert "10.96.0.2 . tcp" in "".join(rig.driver.texts)


@pytest.mark.parametrize("failure", [UnknownResult("killed"), OutOfStep("gone")], ids=repr)
async def test_doubt_means_observe_and_everything(rig: Rig, failure: DataplaneError) -> None:
    await rig.start(1)
    rig.driver.failures = [failure]
    rig.tell(*rig.service(2))
    await rig.until(lambda: rig.dataplane.syncs == 2)
    assert rig.driver.observations == 2
    text = "".join(rig.driver.texts)
    assert "10.96.0.1 . tcp . 80" in text
    assert "10.96.0.2 . tcp . 80" in text
    assert rig.dataplane.last_sync is not None
    assert rig.dataplane.last_sync.full


async def test_a_repair_looks_again_and_tells_how_much_was_wrong(rig: Rig) -> None:
    await rig.start(1, 2)
    objects = await rig.dataplane.repair()
    assert rig.driver.observations == 2
    assert objects == rig.dataplane.last_sync.objects > 0  # type: ignore[union-attr]
    assert len(rig.driver.texts) >= 1


class MendingDriver(Driver):
    """A driver that puts right what a program says; `mended` are the programs it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.mended: list[Any] = []
        self.refusal: DataplaneError | None = None

    async def mend(self, program: Any) -> int:
        self.mended.append(program)
        if self.refusal is not None:
            raise self.refusal
        return 7

    async def differing(self, program: Any) -> Sequence[str]:
        raise NotImplementedError


@pytest.fixture
async def mending(tmp_path: Path) -> AsyncIterator[tuple[Rig, MendingDriver]]:
    driver = MendingDriver()
    made = Rig(tmp_path, driver)
    yield made, driver
    made.task.cancel()
    await asyncio.gather(made.task, return_exceptions=True)


async def test_a_driver_that_mends_is_asked_with_what_was_committed(
    mending: tuple[Rig, MendingDriver],
) -> None:
    rig, driver = mending
    await rig.start(1, 2)
    assert await rig.dataplane.repair() == 7
    assert driver.mended == [rig.dataplane.program]
    assert (driver.observations, driver.texts) == (1, [])


async def test_what_cannot_be_mended_is_observed(mending: tuple[Rig, MendingDriver]) -> None:
    rig, driver = mending
    await rig.start(1)
    driver.refusal = OutOfStep("another declaration")
    assert await rig.dataplane.repair() > 0
    assert driver.observations == 2


async def test_a_commit_that_meets_damage_is_mended_and_done_again(
    mending: tuple[Rig, MendingDriver],
) -> None:
    rig, driver = mending
    await rig.start(1)
    before = rig.dataplane.program
    driver.failures = [OutOfStep("No such file or directory")]
    rig.tell(*rig.service(2))
    await rig.until(lambda: rig.dataplane.syncs == 2)
    assert (driver.mended, driver.observations) == ([before], 1)
    assert "10.96.0.2 . tcp . 80" in "".join(driver.texts)


async def test_where_mending_is_no_help_it_is_observed(mending: tuple[Rig, MendingDriver]) -> None:
    rig, driver = mending
    await rig.start(1)
    driver.failures = [OutOfStep("File exists"), OutOfStep("File exists")]
    rig.tell(*rig.service(2))
    await rig.until(lambda: rig.dataplane.syncs == 2)
    assert (len(driver.mended), driver.observations) == (1, 2)


async def test_damage_during_a_repair_is_another_repair(rig: Rig) -> None:
    await rig.start(1)
    rig.driver.gate.clear()
    first = asyncio.ensure_future(rig.dataplane.repair())
    await rig.until(lambda: rig.driver.commits > 2)
    second = asyncio.ensure_future(rig.dataplane.repair())
    await settle()
    observed = rig.driver.observations
    rig.driver.gate.set()
    await first
    await second
    assert rig.driver.observations == observed + 1


@pytest.mark.parametrize("failure", [Busy("the lock"), UnknownResult("killed")], ids=str)
async def test_a_repair_that_fails_is_tried_again(rig: Rig, failure: DataplaneError) -> None:
    await rig.start(1)
    rig.driver.failures = [failure]
    observed = rig.driver.observations
    async with asyncio.timeout(20):
        await rig.dataplane.repair()
    assert rig.driver.observations == observed + 2


async def test_a_repair_that_is_not_to_be_had_says_so(rig: Rig) -> None:
    await rig.start(1)
    rig.driver.gate.clear()
    repair = asyncio.ensure_future(rig.dataplane.repair())
    await settle()
    rig.task.cancel()
    with pytest.raises(UnknownResult):
        await repair


async def test_a_rejected_one_is_told_until_it_is_accepted(rig: Rig) -> None:
    await rig.start(1)
    rig.driver.rejected = {key(2): Rejected("add", "no")}
    rig.tell(*rig.service(2), *rig.service(3))
    await rig.until(lambda: rig.dataplane.syncs == 2)
    assert set(rig.dataplane.rejected) == {key(2)}
    # It is not tried again for others' sake …
    rig.tell(*rig.service(3, port=9090))
    await rig.until(lambda: rig.dataplane.syncs == 3)
    assert "10.96.0.2 " not in rig.driver.texts[-1]
    assert set(rig.dataplane.rejected) == {key(2)}
    # … but when it changes, and as one that is not there yet.
    rig.driver.rejected = {}
    rig.tell(*rig.service(2, port=9090))
    await rig.until(lambda: rig.dataplane.syncs == 4)
    assert rig.dataplane.rejected == {}
    assert "delete element" not in rig.driver.texts[-1]
    assert "10.96.0.2 . tcp . 80" in rig.driver.texts[-1]


async def test_what_is_said_of_one_is_withdrawn_as_another_changes(rig: Rig) -> None:
    await rig.start(1)
    rig.driver.rejected = {key(2): Rejected("", "dead"), key(3): Rejected("add", "taken")}
    rig.tell(*rig.service(2), *rig.service(3))
    await rig.until(lambda: rig.dataplane.syncs == 2)
    assert set(rig.dataplane.rejected) == {key(2), key(3)}
    # What the driver refused itself stands.
    rig.driver.withdrawn = {key(2): Rejected("", "dead"), key(3): Rejected("", "dead")}
    rig.tell(*rig.service(4))
    await rig.until(lambda: rig.dataplane.syncs == 3)
    assert set(rig.dataplane.rejected) == {key(3)}


async def test_a_rejected_one_is_tried_again_though_nothing_changes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(module, "LONGEST_RETRY_SECONDS", 0.02)
    await rig.start(1)
    rig.driver.rejected = {key(2): Rejected("add", "the port is taken")}
    rig.tell(*rig.service(2))
    await rig.until(lambda: rig.dataplane.syncs >= 4)
    assert set(rig.dataplane.rejected) == {key(2)}
    rig.driver.rejected = {}
    await rig.until(lambda: not rig.dataplane.rejected)
    assert "10.96.0.2 . tcp . 80" in rig.driver.texts[-1]


async def test_a_rejected_one_that_is_deleted_is_forgotten(rig: Rig) -> None:
    await rig.start(1)
    rig.driver.rejected = {key(2): Rejected("add", "no")}
    rig.tell(*rig.service(2))
    await rig.until(lambda: rig.dataplane.syncs == 2)
    rig.tell(Deleted(Kind.SERVICE, NamespacedName("test", "s2")))
    await rig.until(lambda: not rig.dataplane.rejected)
    assert "10.96.0.2 " not in "".join(rig.driver.texts[1:])


async def test_a_rejected_plan_waits_for_a_change(rig: Rig) -> None:
    await rig.start(1)
    rig.driver.failures = [Rejected("everything", "no")]
    rig.tell(*rig.service(2))
    await rig.until(lambda: rig.dataplane.failure)
    commits = rig.driver.commits
    await settle()
    assert rig.driver.commits == commits
    rig.tell(*rig.service(3))
    await rig.until(lambda: rig.dataplane.syncs == 2)
    assert rig.dataplane.failure == ""
    assert "10.96.0.2 . tcp" in rig.driver.texts[-1]


async def test_what_is_unsupported_at_the_start_ends_it(rig: Rig) -> None:
    rig.driver.failures = [Unsupported("nft", "install it")]
    rig.tell(Synced())
    with pytest.raises(Unsupported):
        await rig.task


@pytest.mark.parametrize("failure", [UnknownResult("killed"), OutOfStep("x"), Busy("x")], ids=repr)
async def test_a_failed_start_is_tried_again(rig: Rig, failure: DataplaneError) -> None:
    rig.driver.failures = [failure]
    rig.tell(*rig.service(1), Synced())
    await rig.until(lambda: rig.dataplane.synced)
    assert rig.driver.observations == 2
    assert "10.96.0.1 . tcp . 80" in "".join(rig.driver.texts)
    assert rig.ready == 1


async def test_changes_during_a_failed_start_are_in_the_next_try(rig: Rig) -> None:
    rig.driver.gate.clear()
    rig.driver.failures = [UnknownResult("killed")]
    rig.tell(*rig.service(1), Synced())
    await rig.until(lambda: rig.driver.commits)
    rig.tell(*rig.service(2))
    rig.tell(Deleted(Kind.SERVICE, NamespacedName("test", "s1")))
    await rig.until(rig.queue.empty)
    await settle()
    rig.driver.gate.set()
    await rig.end()
    assert rig.dataplane.synced
    assert {one.key for one in rig.sync.table.virtual_servers()} == {key(2)}
    plan, _ = rig.dataplane.compiler.plan(
        rig.dataplane.compiler.load(rig.dataplane.compiler.dump(rig.dataplane.program)),
        rig.dataplane.compiler.compile(rig.sync.table.virtual_servers(), rig.sync.table.network),
    )
    assert not plan, str(plan)


async def test_problems_are_kept_until_they_are_solved(rig: Rig) -> None:
    await rig.start(1)
    error = ManifestError("a.yaml", "Service x", "spec", "is wrong")
    rig.tell(Problem("a.yaml", error))
    await rig.until(lambda: rig.sync.problems)
    assert rig.sync.problems == {"a.yaml": error}
    rig.tell(Problem("a.yaml", None))
    await rig.until(lambda: not rig.sync.problems)
    assert rig.dataplane.syncs == 1


async def test_the_end_of_the_source_comes_after_the_last_commit(rig: Rig) -> None:
    await rig.start(1)
    rig.driver.failures = [Busy("x"), UnknownResult("y")]
    rig.tell(*rig.service(2))
    await rig.end()
    assert rig.dataplane.syncs == 2
    assert "10.96.0.2 . tcp . 80" in "".join(rig.driver.texts)


async def test_what_dns_answers_is_left_to_it_while_it_does(rig: Rig) -> None:
    await rig.start(1, 2)
    table = rig.sync.table
    rig.sync.leave_to_dns(frozenset({(parse_address("10.96.0.1"), 80)}))
    assert set(rig.sync.table.claims) == {key(2)}
    await rig.until(lambda: rig.driver.texts)
    rig.sync.leave_to_dns(frozenset())
    assert rig.sync.table == table

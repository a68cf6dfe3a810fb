"""The switch at work over dataplanes that only write down what is done with them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vipd.backends.nftables.backend import NftablesCompiler
from vipd.backends.nftables.tool import Nft
from vipd.backends.protocol import Capabilities, Capability, Committed, Departed, Flows
from vipd.backends.registry import MODES, Backend
from vipd.backends.skeleton import Skeleton
from vipd.proxy import draining, record
from vipd.proxy import switching as module
from vipd.proxy.errors import Busy, ControlError, DataplaneError, Rejected, Unsupported
from vipd.proxy.events import Event, Synced
from vipd.proxy.names import Family, Protocol, parse_address
from vipd.proxy.settings import NodeSettings
from vipd.proxy.sources.manifests import load
from vipd.proxy.switch import Record, State, Step, restarted
from vipd.proxy.switching import Switching
from vipd.proxy.sync import Sync
from vipd.proxy.virtualserver import Key, VirtualServer

MANIFEST = """
apiVersion: v1
kind: Service
metadata: {name: web, namespace: test}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web, namespace: test, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: "", port: 8080}]
endpoints: [{addresses: [10.244.1.21]}]
"""
KEY = Key(Family.IPV4, parse_address("10.96.0.1"), Protocol.TCP, 80)


class Compiler(NftablesCompiler):
    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.why_not = ""

    def lacks(self, server: VirtualServer, capabilities: Capabilities) -> str:
        return self.why_not


class Driver:
    """A dataplane that holds what was committed last."""

    def __init__(self, mode: str, done: list[str]) -> None:
        self.mode = mode
        self.done = done
        self.compiler = Compiler(mode)
        self.missing = ""
        self.failures: list[DataplaneError] = []
        self.rejected: dict[Key, DataplaneError] = {}
        self.observed: list[Any] = []
        """What `observe` returns in turn; at the end nothing is different."""
        self.left = 0
        self.there = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.teardown_gate = asyncio.Event()
        self.teardown_gate.set()
        self.quiesce_failures: list[DataplaneError] = []
        self.leftover_failures: list[DataplaneError] = []
        self.teardown_failures: list[DataplaneError] = []
        self.cut_failure: DataplaneError | None = None
        self.bug: Exception | None = None
        self.tearing = False

    async def probe(self) -> Capabilities:
        if self.bug is not None:
            raise self.bug
        missing = Capability("ip_vs", False, remedy=self.missing)
        return Capabilities(self.mode, (missing,) if self.missing else ())

    async def observe(self) -> Any:
        return self.observed.pop(0) if self.observed else None

    async def commit(self, plan: Any) -> Committed:
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.note("commit")
        self.there = True
        return Committed(self.rejected)

    async def quiesce(self) -> None:
        if self.quiesce_failures:
            raise self.quiesce_failures.pop(0)
        self.note("quiesce")

    async def flows(self) -> Flows:
        return Flows({"10.96.0.1:80/TCP": self.left} if self.left else {})

    async def cut(self, departed: Sequence[Departed]) -> int:
        self.note("cut")
        if self.cut_failure is not None:
            raise self.cut_failure
        return 0

    async def leftovers(self) -> Sequence[str]:
        if self.leftover_failures:
            raise self.leftover_failures.pop(0)
        return ["something"] if self.there else []

    async def teardown(self) -> Sequence[str]:
        self.tearing = True
        await self.teardown_gate.wait()
        if self.teardown_failures:
            raise self.teardown_failures.pop(0)
        self.note("teardown")
        was, self.there = self.there, False
        return ["something"] if was else []

    def note(self, what: str) -> None:
        line = f"{what} {self.mode}"
        if self.done[-1:] != [line]:  # a commit may be several
            self.done.append(line)


class Rig:
    """A switch with three dataplanes, over one service."""

    def __init__(self, directory: Path) -> None:
        self.done: list[str] = []
        self.drivers = {m: Driver(m, self.done) for m in MODES}
        self.record = directory / "mode.json"
        self.manifest = directory / "web.yaml"
        self.manifest.write_text(MANIFEST)
        self.task: asyncio.Task[None] | None = None
        self.skeleton = Skeleton(Nft("/bin/true"))

    def start(self, configured: str = "nftables") -> None:
        state = restarted(record.read(self.record), configured, configured)
        self.sync = Sync(NodeSettings(node_name="n"))
        self.switching = Switching(
            self.sync,
            Record(configured, state, configured),
            self.record,
            lambda mode: Backend(self.drivers[mode].compiler, self.drivers[mode]),
            self.skeleton,
            drain_seconds=300.0,
        )
        for mode in self.drivers:
            self.verified(mode)
        self.task = asyncio.ensure_future(self.switching.run())

    def verified(self, mode: str) -> None:
        """Let the dataplane be observed as it was committed."""
        dataplanes = self.sync._dataplanes
        driver = self.drivers[mode]

        async def observe() -> Any:
            if driver.observed:
                return driver.observed.pop(0)
            for one in dataplanes:
                if one.mode == mode and one.program is not None:
                    return one.compiler.load(one.compiler.dump(one.program))
            return None

        driver.observe = observe  # type: ignore[method-assign]

    async def synced(self) -> None:
        async def source() -> AsyncIterator[list[Event]]:
            yield [*load([str(self.manifest)]), Synced()]

        await self.sync.run(source())
        await self.until(lambda: self.switching.serving.synced)
        await self.quiet()
        self.done.clear()

    async def quiet(self) -> None:
        for task in (self.switching._clearing, self.switching._switch):
            if task is not None:
                await asyncio.wait({task}, timeout=20)
                assert task.done()

    async def switch(self, mode: str, drain: float | None = None, *, force: bool = False) -> str:
        """Switch, and return why it failed."""
        report = self.switching.ask(mode, drain, force=force)
        await self.quiet()
        assert report.ended is not None
        return report.failure

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not holds():  # noqa: ASYNC110 - many kinds of state, none with an event
                await asyncio.sleep(0.001)

    async def crash(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(draining, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(draining, "LONGEST_PAUSE_SECONDS", 0.002)
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.001)
    made = Rig(tmp_path)
    made.start()
    await made.synced()
    yield made
    await made.crash()


async def test_the_new_one_is_whole_before_the_old_one_is_left(rig: Rig) -> None:
    assert await rig.switch("iptables") == ""
    await rig.until(lambda: not rig.switching.state.drains)
    assert rig.done == ["commit iptables", "quiesce nftables", "teardown nftables"]
    assert rig.switching.serving.mode == "iptables"
    report = rig.switching.report
    assert report is not None
    assert report.steps == ["probe", "overlap", "verify"]


async def test_only_the_one_that_serves_is_shown_changes(rig: Rig) -> None:
    await rig.switch("iptables")
    assert [one.mode for one in rig.sync._dataplanes] == ["iptables"]


async def test_the_old_one_stays_until_its_flows_have_ended(rig: Rig) -> None:
    rig.drivers["nftables"].left = 2
    await rig.switch("ipvs")
    await rig.until(lambda: [one.flows for one in rig.switching.drains()] == [2])
    (drain,) = rig.switching.drains()
    assert (drain.mode, drain.where) == ("nftables", {"10.96.0.1:80/TCP": 2})
    assert "teardown nftables" not in rig.done
    rig.drivers["nftables"].left = 0
    await rig.until(lambda: "teardown nftables" in rig.done)
    assert rig.switching.draining.flows_cut == 0


async def test_what_is_left_at_the_deadline_is_cut_and_counted(rig: Rig) -> None:
    rig.drivers["nftables"].left = 3
    await rig.switch("ipvs", drain=0.0)
    await rig.until(lambda: "teardown nftables" in rig.done)
    rig.drivers["ipvs"].left = 2
    await rig.switch("iptables", drain=0.0)
    await rig.until(lambda: rig.switching.draining.flows_cut)
    # Connection tracking keeps those of the first.
    assert rig.switching.draining.flows_cut == 2


async def test_a_drain_ends_sooner_when_the_serving_mode_is_asked_for_with_less(rig: Rig) -> None:
    rig.drivers["nftables"].left = 2
    await rig.switch("ipvs")
    last = rig.switching.report
    assert await rig.switch("ipvs") == ""  # says nothing of a drain, and so ends none
    assert last is not None
    assert (rig.switching.report, last.origin) == (last, "nftables")
    assert [one.mode for one in rig.switching.state.drains] == ["nftables"]
    assert await rig.switch("ipvs", drain=0.0) == ""
    await rig.until(lambda: "teardown nftables" in rig.done)


async def test_what_the_host_lacks_is_named_and_nothing_changed(rig: Rig) -> None:
    rig.drivers["ipvs"].missing = "modprobe ip_vs"
    failure = await rig.switch("ipvs", force=True)
    assert failure == "mode ipvs does not work here: no ip_vs: modprobe ip_vs"
    assert rig.done == []


async def test_services_that_cannot_be_served_are_listed(rig: Rig) -> None:
    rig.drivers["ipvs"].compiler.why_not = "no SCTP"
    failure = await rig.switch("ipvs")
    assert "test/web on 10.96.0.1:80/TCP: no SCTP" in failure
    assert rig.done == []
    assert await rig.switch("ipvs", force=True) == ""


async def test_a_service_that_the_kernel_refuses_fails_the_switch(rig: Rig) -> None:
    rig.drivers["ipvs"].rejected = {KEY: Rejected("add", "no such scheduler")}
    failure = await rig.switch("ipvs")
    assert "10.96.0.1:80/TCP: add: no such scheduler" in failure
    await rig.until(lambda: not rig.switching.drains())
    assert rig.done == ["commit ipvs", "quiesce ipvs", "teardown ipvs"]
    assert rig.switching.serving.mode == "nftables"


async def test_a_dataplane_that_cannot_be_brought_up_fails_the_switch(rig: Rig) -> None:
    rig.drivers["ipvs"].failures = [Unsupported("ip_vs", "modprobe ip_vs")]
    assert "modprobe ip_vs" in await rig.switch("ipvs")
    await rig.until(lambda: not rig.switching.drains())
    assert rig.done[-1] == "teardown ipvs"
    assert not any("nftables" in line for line in rig.done)


async def test_what_is_observed_otherwise_fails_the_switch(rig: Rig) -> None:
    compiler = rig.drivers["ipvs"].compiler
    nothing = compiler.compile((), rig.sync.table.network)
    rig.drivers["ipvs"].observed = [None, compiler.load(compiler.dump(nothing))]
    failure = await rig.switch("ipvs")
    assert "10.96.0.1 . tcp . 80" in failure
    await rig.until(lambda: not rig.switching.drains())
    assert rig.done == ["commit ipvs", "quiesce ipvs", "teardown ipvs"]
    assert rig.switching.state == State(serving="nftables")


async def test_a_busy_kernel_is_waited_for(rig: Rig) -> None:
    rig.drivers["ipvs"].failures = [Busy("the lock is taken")]
    assert await rig.switch("ipvs") == ""


async def test_there_is_one_switch_at_a_time(rig: Rig) -> None:
    rig.drivers["ipvs"].gate.clear()
    rig.switching.ask("ipvs", None, force=False)
    with pytest.raises(ControlError, match="a switch to ipvs is under way"):
        rig.switching.ask("iptables", None, force=False)
    rig.drivers["ipvs"].gate.set()
    await rig.quiet()


async def test_an_unknown_mode_is_refused_with_those_there_are(rig: Rig) -> None:
    with pytest.raises(ControlError, match="nftables, iptables, ipvs"):
        rig.switching.ask("ebpf", None, force=False)
    with pytest.raises(ControlError, match="nftables, iptables, ipvs"):
        await rig.switching.try_out("ebpf")


async def test_the_way_back_during_a_drain_takes_up_the_old_one(rig: Rig) -> None:
    rig.drivers["nftables"].left = 1
    await rig.switch("ipvs")
    rig.done.clear()
    rig.drivers["ipvs"].left = 1
    await rig.switch("nftables")
    assert "teardown nftables" not in rig.done
    assert rig.done[0] == "commit nftables"
    await rig.until(lambda: [one.mode for one in rig.switching.drains()] == ["ipvs"])


async def test_a_third_mode_during_a_drain(rig: Rig) -> None:
    rig.drivers["nftables"].left = rig.drivers["ipvs"].left = 1
    await rig.switch("ipvs")
    await rig.switch("iptables")
    assert {one.mode for one in rig.switching.drains()} == {"nftables", "ipvs"}
    rig.drivers["nftables"].left = rig.drivers["ipvs"].left = 0
    await rig.until(lambda: not rig.switching.drains())
    assert {"teardown nftables", "teardown ipvs"} <= set(rig.done)


async def test_a_dry_run_tells_and_changes_nothing(rig: Rig) -> None:
    said = await rig.switching.try_out("ipvs")
    assert any("would program" in line for line in said)
    assert any("would drain 0 flows of nftables" in line for line in said)
    assert (rig.done, rig.switching.report) == ([], None)


async def test_a_restart_keeps_the_mode_and_the_drain(rig: Rig) -> None:
    rig.drivers["nftables"].left = 1
    await rig.switch("ipvs", drain=1000.0)
    (before,) = rig.switching.state.drains
    await rig.crash()
    rig.start()
    await rig.synced()
    await rig.until(rig.switching.drains)
    (drain,) = rig.switching.state.drains
    assert rig.switching.serving.mode == "ipvs"
    assert (drain.mode, drain.deadline) == ("nftables", before.deadline)


@pytest.mark.parametrize("step", list(Step))
async def test_a_crash_before_the_end_of_a_switch_is_undone(rig: Rig, step: Step) -> None:
    table = {
        Step.PROBE: State("nftables", "ipvs", Step.PROBE),
        Step.OVERLAP: State("nftables", "ipvs", Step.OVERLAP, 300.0),
        Step.VERIFY: State("nftables", "ipvs", Step.VERIFY, 300.0),
    }
    await rig.crash()
    rig.record.write_bytes(msgspec.json.encode(Record("nftables", table[step])))
    rig.drivers["ipvs"].there = step is not Step.PROBE
    rig.start()
    await rig.synced()
    await rig.until(lambda: not rig.drivers["ipvs"].there)
    await rig.until(lambda: not rig.switching.drains())
    assert rig.switching.serving.mode == "nftables"


async def test_another_configured_mode_is_a_switch_at_the_start(rig: Rig) -> None:
    await rig.crash()
    rig.drivers["nftables"].left = 1
    rig.start("iptables")
    await rig.synced()
    await rig.until(rig.switching.drains)
    assert rig.switching.serving.mode == "iptables"
    assert [one.mode for one in rig.switching.drains()] == ["nftables"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"configured": 1}', b"\xff"])
async def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "mode.json"
    path.write_bytes(text)
    assert record.read(path) is None


async def test_a_record_that_cannot_be_written_keeps_nobody_from_serving(rig: Rig) -> None:
    rig.record.unlink()
    rig.record.mkdir()
    assert await rig.switch("iptables") == ""


async def test_a_dataplane_that_dies_ends_the_daemon(rig: Rig, tmp_path: Path) -> None:
    await rig.crash()
    rig.drivers["nftables"].failures = [Unsupported("nft", "install it")]
    rig.start()

    async def source() -> AsyncIterator[list[Event]]:
        yield [Synced()]

    await rig.sync.run(source())
    assert rig.task is not None
    with pytest.raises(Unsupported, match="install it"):
        await rig.task


# What a review found


async def test_a_removal_under_way_is_waited_for_by_the_way_back(rig: Rig) -> None:
    old = rig.drivers["nftables"]
    old.teardown_gate.clear()
    await rig.switch("ipvs")
    await rig.until(lambda: old.tearing)
    report = rig.switching.ask("nftables", None, force=False)
    await settle()
    assert report.ended is None
    old.teardown_gate.set()
    await rig.quiet()
    assert report.failure == ""
    assert rig.switching.serving.mode == "nftables"
    assert old.there
    assert rig.done.index("teardown nftables") < rig.done.index("commit nftables")


async def test_a_skeleton_that_cannot_be_made_fails_the_switch_and_no_other(rig: Rig) -> None:
    class Failing(Skeleton):
        async def ensure(self) -> bool:
            raise Busy("no skeleton")

    rig.switching._skeleton = Failing(Nft("/bin/true"))
    assert "no skeleton" in await rig.switch("ipvs")
    rig.switching._skeleton = rig.skeleton
    assert await rig.switch("ipvs") == ""


async def test_a_kernel_that_refuses_everything_fails_the_switch(rig: Rig) -> None:
    rig.drivers["ipvs"].failures = [Rejected("*nat", "held by another program")] * 100
    assert "held by another program" in await rig.switch("ipvs")
    rig.drivers["ipvs"].failures = []
    assert await rig.switch("ipvs") == ""


async def test_a_kernel_that_stays_busy_fails_the_switch_in_the_end(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BRING_UP_SECONDS", 0.1)
    rig.drivers["ipvs"].failures = [Busy("the lock is taken")] * 100
    assert "the lock is taken" in await rig.switch("ipvs")


async def test_an_observation_that_never_comes_fails_the_switch(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "VERIFY_SECONDS", 0.05)
    observations = 0

    async def observe() -> Any:
        nonlocal observations
        observations += 1
        if observations > 1:
            await asyncio.Event().wait()

    rig.drivers["ipvs"].observe = observe  # type: ignore[method-assign]
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
    assert "not observed within" in await rig.switch("ipvs")
    assert rig.switching.serving.mode == "nftables"


async def test_a_bug_in_a_step_ends_the_daemon(rig: Rig) -> None:
    rig.drivers["ipvs"].bug = KeyError("x")
    rig.switching.ask("ipvs", None, force=False)
    assert rig.task is not None
    with pytest.raises(KeyError):
        await rig.task


async def test_leftovers_that_cannot_be_listed_are_asked_for_again(rig: Rig) -> None:
    await rig.crash()
    rig.drivers["ipvs"].there = True
    rig.drivers["ipvs"].leftover_failures = [Busy("x"), Busy("y")]
    rig.start()
    await rig.synced()
    await rig.until(lambda: not rig.drivers["ipvs"].there)


async def test_a_removal_that_fails_is_tried_again_and_told(rig: Rig) -> None:
    old = rig.drivers["nftables"]
    old.teardown_failures = [Busy(f"no {n}") for n in range(50)]
    await rig.switch("ipvs")
    await rig.until(lambda: "cannot be removed" in str(rig.switching.draining.failures))
    assert [one.mode for one in rig.switching.drains()] == ["nftables"]
    await rig.until(lambda: not rig.switching.drains())
    assert not old.there
    assert rig.switching.draining.failures == {}


async def test_a_mode_that_cannot_be_quiesced_is_asked_again(rig: Rig) -> None:
    old = rig.drivers["nftables"]
    old.left = 1
    old.quiesce_failures = [Busy("no")] * 3
    await rig.switch("ipvs")
    await rig.until(lambda: "quiesce nftables" in rig.done)
    assert rig.switching.draining.failures == {}


async def test_what_the_serving_mode_is_refused_too_is_no_reason(rig: Rig) -> None:
    rig.switching.serving.rejected[KEY] = Rejected("add", "no")
    rig.drivers["ipvs"].rejected = {KEY: Rejected("add", "no")}
    assert await rig.switch("ipvs") == ""


async def test_a_switch_waits_for_the_first_sync(rig: Rig) -> None:
    await rig.crash()
    rig.drivers["nftables"].gate.clear()
    rig.start()
    with pytest.raises(ControlError, match="not in step yet"):
        rig.switching.ask("ipvs", None, force=False)
    rig.drivers["nftables"].gate.set()


async def test_the_old_one_ends_its_commit_before_it_is_quiesced(rig: Rig) -> None:
    old = rig.drivers["nftables"]
    old.gate.clear()
    rig.manifest.write_text(MANIFEST.replace("10.96.0.1", "10.96.0.2"))
    rig.sync.take(load([str(rig.manifest)]))
    await settle()
    report = rig.switching.ask("ipvs", None, force=False)
    await rig.until(lambda: rig.switching.serving.mode == "ipvs")
    await settle()
    assert "quiesce nftables" not in rig.done
    old.gate.set()
    await rig.quiet()
    assert report.failure == ""
    await rig.until(lambda: "quiesce nftables" in rig.done)
    assert rig.done.index("commit nftables") < rig.done.index("quiesce nftables")


async def test_departed_endpoints_are_cut_in_every_mode_that_may_have_them(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut(departed: Sequence[Departed]) -> int:
        return 7

    monkeypatch.setattr("vipd.backends.conntrack.cut", cut)
    rig.drivers["nftables"].left = 1
    await rig.switch("ipvs")
    rig.drivers["ipvs"].cut_failure = Busy("no")
    assert await rig.switching.cut([Departed(KEY, parse_address("10.244.1.21"), 8080)]) == 7
    assert {"cut nftables", "cut ipvs"} <= set(rig.done)


async def test_why_a_mode_serves(rig: Rig) -> None:
    assert rig.switching.why == ""
    await rig.switch("ipvs")
    assert rig.switching.why == "switched to by hand; configured is nftables"


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


async def test_a_mode_that_clashes_is_switched_to_once_the_old_one_has_drained(rig: Rig) -> None:
    await rig.switch("ipvs")
    rig.drivers["ipvs"].left = 1
    assert await rig.switch("userspace") == ""
    assert rig.switching.report is not None
    assert rig.switching.report.waits == rig.switching.serving.mode == "nftables"
    assert "commit userspace" not in rig.done
    await rig.crash()
    rig.start()
    await rig.synced()
    rig.drivers["ipvs"].left = 0
    await rig.until(lambda: rig.switching.serving.mode == "userspace")
    assert not rig.drivers["ipvs"].there

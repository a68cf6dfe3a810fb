"""Switching the dataplane while traffic flows: nothing fails, nothing breaks, nothing is left.

The load is that of `vipd bench switch`: new TCP and UDP connections from a client pod, from outside
and from the node itself, kept and idle TCP connections, UDP flows of fixed source ports, IPv4 and
IPv6. In the emulated machine it is small: under more the machine itself loses packets.
"""

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.netns.cluster import TCP4, Cluster, until
from tests.netns.planes import (
    LEGACY,
    MULTI,
    NFT_VARIANT,
    PLANES,
    TOOL_NAMES,
    Others,
    mode_of,
    need,
    only,
    ours,
)

from vipd.bench import switch_cluster
from vipd.bench.lab import Lab, obstacle, running
from vipd.bench.load import Load
from vipd.bench.load_work import Kind, Report
from vipd.bench.machine import machine
from vipd.proxy.errors import ControlError

pytestmark = pytest.mark.netns

EMULATED = "emulated" in machine()
RATE = 15.0 if EMULATED else 300.0
"""New TCP connections a second, on three hosts together."""
MORE = 8 if EMULATED else 50
"""So many connections on each host before, between and after."""
KEPT = 2 if EMULATED else 6
PATIENCE_SECONDS = 15.0
"""What is answered at all is answered at once, but on a machine that has other things to do."""
DEADLINE_SECONDS = 240.0 if EMULATED else 40.0
DRAIN = "200s" if EMULATED else "30s"
"""Longer than a load lasts, shorter than what is waited for."""

NewCluster = Callable[..., Cluster]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab of this module's own: what a switch leaves behind would meet other tests."""
    reason = obstacle()
    if reason is not None:
        pytest.skip(f"no network namespaces here: {reason}")
    with running(f"vs{os.getpid()}") as built:
        yield built


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make one variant of iptables the one that the host uses."""

    def choose(plane: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for word in TOOL_NAMES:
            link = folder / word
            link.unlink(missing_ok=True)
            link.symlink_to(f"/usr/sbin/{MULTI[plane]}")
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return choose


@pytest.fixture
def started(
    new_cluster: NewCluster, tool: Callable[[str], None], tmp_path: Path
) -> Iterator[Callable[..., Cluster]]:
    """Start a daemon in a mode, over the loaded services; afterwards nothing of it may be left."""
    clusters: list[Cluster] = []

    def start(*planes: str) -> Cluster:
        need(*planes)
        for plane in planes:
            if plane in MULTI:
                tool(plane)
        cluster = new_cluster("--mode", mode_of(planes[0]))
        text = switch_cluster.services(cluster.lab.topology)
        (cluster.folder / "loaded.json").write_bytes(text)
        clusters.append(cluster)
        begin(cluster)
        return cluster

    yield start
    for cluster in clusters:
        cluster.stop()
        done = cluster.cli("cleanup", "--socket", cluster.socket)
        assert done.returncode == 0, done.stderr
        assert ours(cluster.lab) == []
        end_flows(cluster)


def begin(cluster: Cluster) -> None:
    """Start the daemon, which takes its time on an emulated processor."""
    cluster.daemon.start(timeout=DEADLINE_SECONDS)


def load(cluster: Cluster, patience_seconds: float = PATIENCE_SECONDS) -> Load:
    works = switch_cluster.works(
        cluster.lab.topology, RATE, kept=KEPT, patience_seconds=patience_seconds
    )
    return Load(cluster.lab, works)


def switch(cluster: Cluster, plane: str) -> None:
    """Switch as an operator does, and see that it was done."""
    done = ask_for(cluster, plane)
    said = f"{done.stdout}{done.stderr}"
    if done.returncode != 0 and EMULATED and "timed out" in said:
        # The command waits for half a minute of a processor that is ten times slower.
        until(lambda: has_ended(cluster), "the switch has ended", DEADLINE_SECONDS)
    else:
        assert done.returncode == 0, f"{said}\n{cluster.daemon.log_tail()}"
    assert cluster.status().mode == mode_of(plane)


def ask_for(cluster: Cluster, plane: str) -> subprocess.CompletedProcess[str]:
    return cluster.cli("mode", mode_of(plane), "--drain", DRAIN, "--socket", cluster.socket)


def has_ended(cluster: Cluster) -> bool:
    with contextlib.suppress(ControlError):
        switch = cluster.status().switch
        return switch is not None and switch.ended is not None
    return False


def end_flows(cluster: Cluster) -> None:
    """Let the node forget what is only remembered, so that no test waits for timeouts.

    IPVS and userspace cannot be told to: shorter timeouts would end the idle flows of a test.
    """
    cluster.lab.exec("node", ["conntrack", "-F"])


def drained(cluster: Cluster) -> None:
    """Wait until nothing drains any more. What a mode itself remembers of flows it has to drop."""
    end_flows(cluster)
    status = cluster.status()
    if {one.mode for one in status.drains} & {"ipvs", "userspace"}:
        done = cluster.cli("mode", status.mode, "--drain", "0s", "--socket", cluster.socket)
        assert done.returncode == 0, done.stderr
    until(lambda: not cluster.status().drains, "everything has drained", DEADLINE_SECONDS)


def unharmed(report: Report) -> None:
    """Every kind of traffic went on, and all of it well."""
    told = [f"{one.at:.2f} {one}" for one in report.failures]
    assert not told, "\n".join(told)
    assert not report.harmed
    assert set(report.counts) == set(Kind)
    assert all(count.answers > 0 for count in report.counts.values())


class TestTheLoadItself:
    @pytest.mark.parametrize("plane", PLANES)
    def test_it_goes_on_well_over_a_restart_and_a_crash(
        self, started: Callable[..., Cluster], plane: str
    ) -> None:
        cluster = started(plane)
        with load(cluster) as running_load:
            running_load.wait_for(MORE)
            for end in (cluster.stop, cluster.kill):
                end()
                running_load.wait_for(MORE)
                begin(cluster)
                running_load.wait_for(MORE)
            report = running_load.stop()
        unharmed(report)

    def test_it_tells_of_every_harm_where_the_rules_are_away_for_a_moment(
        self, started: Callable[..., Cluster]
    ) -> None:
        cluster = started("nftables")
        with load(cluster, PATIENCE_SECONDS / 5) as running_load:  # silence is awaited here
            running_load.wait_for(MORE)
            cluster.kill()
            cluster.nft("flush", "ruleset")
            running_load.wait_for(MORE // 2)
            begin(cluster)
            running_load.wait_for(MORE)
            report = running_load.stop()
        assert report.harmed
        for kind in (Kind.NEW_TCP, Kind.NEW_UDP, Kind.KEPT_TCP, Kind.KEPT_UDP):
            assert report.counts[kind].failed > 0, kind
        assert {one.host for one in report.failures} >= {"client-1", "outside", "node"}


PAIRS = [
    (origin, target)
    for origin, target in itertools.permutations(PLANES, 2)
    if mode_of(origin) != mode_of(target) and {origin, target} != {"ipvs", "userspace"}
]


@pytest.mark.parametrize(("origin", "target"), PAIRS)
class TestEachPair:
    def test_no_connection_fails_and_no_flow_breaks(
        self, started: Callable[..., Cluster], origin: str, target: str
    ) -> None:
        cluster = started(origin, target)
        with load(cluster) as running_load:
            running_load.wait_for(MORE)
            switch(cluster, target)
            running_load.wait_for(MORE)
            report = running_load.stop()
        unharmed(report)
        drained(cluster)
        only(cluster.lab, target, DEADLINE_SECONDS)
        if mode_of(origin) not in {"ipvs", "userspace"}:  # they remember flows that have ended
            assert cluster.status().flows_cut == 0


@pytest.mark.parametrize(("origin", "target"), [("ipvs", "userspace"), ("userspace", "ipvs")])
def test_another_mode_serves_while_one_on_the_address_drains_for_the_other(
    started: Callable[..., Cluster], origin: str, target: str
) -> None:
    cluster = started(origin, target)
    with load(cluster) as running_load:
        running_load.wait_for(MORE)
        ask_for(cluster, target)
        until(lambda: cluster.status().mode == "nftables", "nftables serves", DEADLINE_SECONDS)
        running_load.wait_for(MORE)
        assert [one.mode for one in cluster.status().drains] == [origin]
        report = running_load.stop()
    unharmed(report)
    end_flows(cluster)  # the next load has the same ports
    shorten = ("mode", target, "--drain", "0s", "--socket", cluster.socket)
    assert cluster.cli(*shorten).returncode == 0
    # IPVS, removed, drops the conntrack entries of its clients' ports, whosever they are by then
    # (ip_vs_conn_drop_conntrack() in net/netfilter/ipvs/ip_vs_nfct.c, 6.1).
    until(lambda: not cluster.status().drains, f"{origin} is removed", DEADLINE_SECONDS)
    with load(cluster) as running_load:
        until(lambda: cluster.status().mode == target, f"{target} serves", DEADLINE_SECONDS)
        running_load.wait_for(MORE)
        report = running_load.stop()
    unharmed(report)
    drained(cluster)
    only(cluster.lab, target, DEADLINE_SECONDS)


class TestAPair:
    """With each pair that differs in kind: NAT to NAT, and with IPVS on either side."""

    TARGETS = (("nftables", LEGACY), ("nftables", "ipvs"), ("nftables", "userspace"))
    """Where it is the target alone that matters."""
    KINDS = (*TARGETS, (LEGACY, "ipvs"), (LEGACY, "userspace"))

    @pytest.mark.parametrize(("one", "other"), KINDS)
    def test_there_and_back_and_there_again_under_one_load(
        self, started: Callable[..., Cluster], one: str, other: str
    ) -> None:
        cluster = started(one, other)
        with load(cluster) as running_load:
            for plane in (other, one, other, one):
                running_load.wait_for(MORE)
                switch(cluster, plane)  # what served before that drains still
                assert [drain.mode for drain in cluster.status().drains] != []
            running_load.wait_for(MORE)
            report = running_load.stop()
        unharmed(report)
        drained(cluster)
        only(cluster.lab, one, DEADLINE_SECONDS)

    @pytest.mark.parametrize(("one", "other"), TARGETS)
    def test_a_change_of_a_service_is_served_while_the_old_mode_drains(
        self, started: Callable[..., Cluster], one: str, other: str
    ) -> None:
        cluster = started(one, other)
        with load(cluster) as running_load:
            running_load.wait_for(MORE)
            switch(cluster, other)
            served = cluster.serve(TCP4, "web-1")
            assert served.outcome("client-1").startswith("web-1 saw ")
            served.endpoints("web-4")
            assert served.outcome("client-1").startswith("web-4 saw ")
            report = running_load.stop()
        unharmed(report)

    @pytest.mark.parametrize(("one", "other"), TARGETS)
    def test_the_mode_lasts_over_a_restart(
        self, started: Callable[..., Cluster], one: str, other: str
    ) -> None:
        cluster = started(one, other)
        with load(cluster) as running_load:
            running_load.wait_for(MORE)
            switch(cluster, other)
            cluster.stop()
            running_load.wait_for(MORE)
            begin(cluster)
            assert cluster.status().mode == mode_of(other)
            running_load.wait_for(MORE)
            report = running_load.stop()
        unharmed(report)
        drained(cluster)
        only(cluster.lab, other, DEADLINE_SECONDS)


KILLER = """
import os, signal, sys
from vipd.proxy import switching
from vipd.proxy.cli.main import main

def reached(step):
    if step == {step!r}:
        os.kill(os.getpid(), signal.SIGKILL)

assert callable(switching.reached)
switching.reached = reached
main()
"""
"""The daemon, killed as it comes to a step."""
KILLER_OF_TOOLS = """
import asyncio, os, signal, sys
from vipd.proxy import switching
from vipd.proxy.cli.main import main

overlaps = False
spawn = asyncio.create_subprocess_exec

def reached(step):
    global overlaps
    overlaps = step.startswith("BringUp")

async def spawned(*command, **how):
    process = await spawn(*command, **how)
    if overlaps:
        os.kill(os.getpid(), signal.SIGKILL)
    return process

assert callable(switching.reached)
switching.reached = reached
asyncio.create_subprocess_exec = spawned
main()
"""
"""The daemon, killed right after it has started a tool that is to bring up the other mode."""


class Crash:
    """Makes daemons that kill themselves, and others again."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._script = folder / "killer.py"
        self._patch = monkeypatch
        self._usual = (sys.executable, "-P", "-m", "vipd.proxy.cli")

    def at(self, text: str) -> None:
        self._script.write_text(text)
        command = (sys.executable, "-P", str(self._script))
        self._patch.setattr("vipd.bench.lab_daemon.CLI", command)

    def never(self) -> None:
        self._patch.setattr("vipd.bench.lab_daemon.CLI", self._usual)


@pytest.fixture
def crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Crash:
    return Crash(tmp_path, monkeypatch)


def is_dead(cluster: Cluster) -> bool:
    try:
        cluster.status()
    except ControlError as error:
        return "timed out" not in str(error)
    return False


STEPS = [
    ("Probe {target}", "{origin}"),
    ("BringUp {target}", "{origin}"),
    ("Verify {target}", "{origin}"),
    ("Retire {origin}", "{target}"),
    ("Say", "{target}"),
]
"""Where the daemon is killed, and which mode serves after the restart."""
WITH_BOTH = STEPS[2:4]
"""At the others there is only one of them in the kernel, or the new one serves already: what is
done then is the same for each pair."""
KILLED = [
    ("nftables", LEGACY),
    ("nftables", "ipvs"),
    ("ipvs", "nftables"),
    ("nftables", "userspace"),
    ("userspace", "nftables"),
]


class TestKilled:
    @pytest.mark.parametrize(
        ("origin", "target", "step", "serves"),
        [(*pair, *step) for pair in KILLED for step in (STEPS if pair == KILLED[0] else WITH_BOTH)],
    )
    def test_at_a_step_it_comes_to_one_mode_and_nothing_breaks(
        self,
        started: Callable[..., Cluster],
        crash: Crash,
        origin: str,
        target: str,
        step: str,
        serves: str,
    ) -> None:
        names = {"origin": mode_of(origin), "target": mode_of(target)}
        crash.at(KILLER.format(step=step.format(**names)))
        cluster = started(origin, target)
        report = _killed_and_restarted(cluster, crash, target)
        assert cluster.status().mode == serves.format(**names)
        unharmed(report)
        drained(cluster)
        only(cluster.lab, cluster.status().mode, DEADLINE_SECONDS)

    @pytest.mark.parametrize(("origin", "target"), KILLED)
    def test_while_a_tool_programs_the_new_mode(
        self, started: Callable[..., Cluster], crash: Crash, origin: str, target: str
    ) -> None:
        crash.at(KILLER_OF_TOOLS)
        cluster = started(origin, target)
        report = _killed_and_restarted(cluster, crash, target)
        assert cluster.status().mode == mode_of(origin)
        unharmed(report)
        drained(cluster)
        only(cluster.lab, origin, DEADLINE_SECONDS)

    @pytest.mark.parametrize(("origin", "target"), KILLED)
    def test_as_it_removes_what_has_drained(
        self, started: Callable[..., Cluster], crash: Crash, origin: str, target: str
    ) -> None:
        crash.at(KILLER.format(step=f"Remove {mode_of(origin)}"))
        cluster = started(origin, target)
        # Nothing is to drain, so the command may not live to see its end.
        ask_for(cluster, target)
        until(lambda: is_dead(cluster), "the daemon is dead", DEADLINE_SECONDS)
        cluster.stop()
        crash.never()
        begin(cluster)
        drained(cluster)
        only(cluster.lab, target, DEADLINE_SECONDS)


def _killed_and_restarted(cluster: Cluster, crash: Crash, target: str) -> Report:
    """Ask for a switch that kills the daemon, restart it, and return what became of a load."""
    with load(cluster) as running_load:
        running_load.wait_for(MORE)
        ask_for(cluster, target)
        until(lambda: is_dead(cluster), "the daemon is dead", DEADLINE_SECONDS)
        cluster.stop()
        crash.never()
        running_load.wait_for(MORE)
        begin(cluster)
        running_load.wait_for(MORE)
        return running_load.stop()


@pytest.fixture
def others(lab: Lab) -> Iterator[Others]:
    made = Others(lab)
    yield made
    made.remove()


class TestOthers:
    @pytest.mark.parametrize("variant", [LEGACY, NFT_VARIANT])
    @pytest.mark.parametrize("other", [LEGACY, NFT_VARIANT, "ipvs", "userspace"])
    def test_what_belongs_to_other_programs_survives_byte_for_byte(
        self, started: Callable[..., Cluster], others: Others, other: str, variant: str
    ) -> None:
        need("nftables", other, variant)
        others.program(variant)
        before = others.have()
        assert all(before.values())
        cluster = started("nftables", other)
        assert others.have() == before
        for plane in (other, "nftables", other):
            switch(cluster, plane)
            assert others.have() == before
            drained(cluster)
            assert others.have() == before
        cluster.stop()
        assert cluster.cli("cleanup", "--socket", cluster.socket).returncode == 0
        assert others.have() == before

"""The daemon over its life: restart, crash, meddling, refusals, cleanup, with real traffic."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.netns.cluster import (
    LOCAL,
    NFT,
    REFUSED,
    REMOTE,
    TABLES,
    TCP4,
    TCP6,
    UDP4,
    Cluster,
    Flavour,
    Served,
    held,
    until,
)

from vipd.bench.pod import TCP_PORT
from vipd.proxy.errors import ControlError

pytestmark = pytest.mark.netns

NewCluster = Callable[..., Cluster]


@pytest.fixture
def cluster(new_cluster: NewCluster) -> Cluster:
    """A daemon for one test, with something to serve."""
    built = new_cluster()
    built.start()
    return built


WRAPPER = """#!/bin/sh
# Stands before the real nft and spoils commits as files beside it say.
cd {folder}
[ "$1" = -f ] || exec {nft} "$@"
if [ -e hold ]; then cat gate; fi
if [ -e die-before ]; then rm die-before; kill -9 $$; fi
[ -e refuse ] || [ -e die-after ] || exec {nft} "$@"
text=$(cat)
if [ -e refuse ] && printf '%s' "$text" | grep -qFf refuse; then
    echo "Error: Could not process rule: Invalid argument" >&2
    exit 1
fi
printf '%s\\n' "$text" | {nft} "$@"
code=$?
if [ -e die-after ]; then rm die-after; kill -9 $$; fi
exit $code
"""


class Saboteur:
    """An nft that comes before the real one on the daemon's PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        script = folder / "nft"
        script.write_text(WRAPPER.format(folder=folder, nft=NFT))
        script.chmod(0o755)
        os.mkfifo(folder / "gate")

    def once(self, what: str) -> None:
        (self.folder / what).touch()

    def done(self, what: str) -> bool:
        return not (self.folder / what).exists()

    def refuse(self, *texts: object) -> None:
        (self.folder / "refuse").write_text("".join(f"{one} .\n" for one in texts))

    def stop_refusing(self) -> None:
        (self.folder / "refuse").unlink()

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Let commits wait from now on, and go on at the end of the block."""
        (self.folder / "hold").touch()
        try:
            yield
        finally:
            (self.folder / "hold").unlink()
            self.release()

    def release(self) -> None:
        with contextlib.suppress(OSError):  # nobody waits
            os.close(os.open(self.folder / "gate", os.O_WRONLY | os.O_NONBLOCK))


@pytest.fixture
def saboteur(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saboteur:
    made = Saboteur(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{made.folder}:{os.environ['PATH']}")
    return made


@pytest.fixture
def spoilt(saboteur: Saboteur, new_cluster: NewCluster) -> Cluster:
    built = new_cluster()
    built.start()
    return built


class TestRestart:
    def test_the_kernel_is_left_as_it_is_and_connections_go_on(self, cluster: Cluster) -> None:
        several = {"annotations": {"vipd/algorithm": "round-robin"}}
        first = cluster.serve(TCP4, "web-1", "web-4", type="NodePort", **several)
        cluster.serve(UDP4, "web-1", "web-2", sessionAffinity="ClientIP")
        cluster.serve(TCP6)
        cluster.serve(TCP6, LOCAL, type="LoadBalancer", annotations={"vipd/algorithm": "maglev"})
        other = cluster.serve(TCP4, LOCAL, internalTrafficPolicy="Local")
        with (
            held(cluster, "client-1", first.address) as inside,
            held(cluster, "outside", *first.on_node()) as outside,
        ):
            pods = (inside.who(), outside.who())
            before = cluster.rules()
            cluster.stop()
            assert (inside.who(), outside.who()) == pods
            assert other.outcome("client-1") == f"{LOCAL} saw client-1"
            cluster.start()
            cluster.settled()
            assert (inside.who(), outside.who()) == pods
        assert cluster.rules() == before
        last = cluster.status().last_sync
        assert last is not None
        assert (last.full, last.objects) == (True, 0)

    def test_what_changed_meanwhile_is_made_up_for(
        self, cluster: Cluster, flavour: Flavour
    ) -> None:
        gone, changed = cluster.serve(flavour, "web-1"), cluster.serve(flavour, "web-1")
        new = Served(cluster, flavour, {})
        cluster.stop()
        cluster.remove(gone.manifest(), gone.slice())
        changed._endpoints = [changed.endpoint("web-2")]
        new._endpoints = [new.endpoint("web-4")]
        cluster.apply(changed.slice(), new.manifest(), new.slice())
        assert changed.outcome("client-1") == "web-1 saw client-1"
        cluster.start()
        cluster.settled()
        assert not gone.outcome("client-1").startswith("web")
        assert changed.outcome("client-1") == "web-2 saw client-1"
        assert new.outcome("client-1") == "web-4 saw client-1"
        assert cluster.matches_the_kernel()

    def test_clients_are_remembered(self, cluster: Cluster, flavour: Flavour) -> None:
        webs = ("web-1", "web-2", "web-3", "web-4", "web-5", "web-6")
        served = cluster.serve(flavour, *webs, sessionAffinity="ClientIP")
        mine = {client: served.ask(client).pod for client in ("client-1", "client-2", "outside")}
        cluster.stop()
        cluster.start()
        for client, pod in mine.items():
            assert set(served.pods(client, 5)) == {pod}

    def test_with_other_settings(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, LOCAL)
        assert served.outcome("client-1") == f"{LOCAL} saw client-1"
        cluster.stop()
        cluster.daemon.arguments += ("--masquerade-all",)
        cluster.start()
        cluster.settled()
        assert served.outcome("client-1") == f"{LOCAL} saw node"
        assert cluster.matches_the_kernel()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_it_and_leaves_the_dataplane(
        self, cluster: Cluster, number: signal.Signals
    ) -> None:
        served = cluster.serve(TCP4, LOCAL)
        pid = cluster.status().pid
        os.kill(pid, number)
        process = cluster.daemon._process
        assert process is not None
        assert process.wait(20) == 0
        assert not cluster.daemon.socket.exists()
        assert cluster.tables() == set(TABLES)
        assert served.outcome("client-1") == f"{LOCAL} saw client-1"


def churn(cluster: Cluster, chance: random.Random, services: list[Served], steps: int) -> None:
    """Change things at random without waiting for anything."""
    for _ in range(steps):
        served = chance.choice(services)
        count = chance.randrange(4)
        pods = chance.sample(["web-1", "web-2", "web-3", "web-4", "web-5", "web-6"], count)
        served._endpoints = [served.endpoint(pod) for pod in pods]
        served._spec = chance.choice(
            [
                {},
                {"type": "NodePort"},
                {"sessionAffinity": "ClientIP"},
                {"annotations": {"vipd/algorithm": chance.choice(["round-robin", "maglev"])}},
                {"type": "NodePort", "externalTrafficPolicy": "Local"},
            ]
        )
        if chance.random() < 0.2:
            cluster.remove(served.manifest(), served.slice())
        else:
            cluster.apply(served.manifest(), served.slice())


class TestCrash:
    @pytest.mark.parametrize("seed", range(4))
    def test_killed_in_the_middle_of_churn(self, cluster: Cluster, seed: int) -> None:
        chance = random.Random(seed)
        services = [Served(cluster, flavour, {}) for flavour in (TCP4, UDP4, TCP6) for _ in "1234"]
        steady = cluster.serve(TCP4, LOCAL)
        with held(cluster, "client-1", steady.address) as connection:
            for _ in range(3):
                churn(cluster, chance, services, chance.randrange(5, 40))
                cluster.kill()
                churn(cluster, chance, services, 5)
                cluster.start()
                assert connection.who() == LOCAL
                cluster.settled()
                assert cluster.matches_the_kernel()
        assert steady.outcome("client-1") == f"{LOCAL} saw client-1"
        for served in services:
            if served._endpoints and cluster._path(served.manifest()).exists():
                assert served.ask("client-1").pod.startswith("web")

    def test_the_next_one_waits_for_the_last_transaction(
        self, saboteur: Saboteur, spoilt: Cluster
    ) -> None:
        first = spoilt.serve(TCP4, LOCAL)
        second = Served(spoilt, TCP4, {})
        second._endpoints = [second.endpoint("web-2")]
        with saboteur.holding():
            spoilt.apply(second.slice(), second.manifest())
            until(lambda: _gate_waiters(saboteur), "a commit waits")
            spoilt.kill()
            assert _holds_the_lock(_gate_waiters(saboteur)[0])
            restart = threading.Thread(target=spoilt.start)
            restart.start()
        restart.join()
        spoilt.settled()
        assert first.outcome("client-1") == f"{LOCAL} saw client-1"
        assert second.outcome("client-1") == "web-2 saw client-1"
        assert spoilt.matches_the_kernel()

    def test_everything_is_flushed_in_the_middle_of_a_commit(
        self, saboteur: Saboteur, spoilt: Cluster
    ) -> None:
        first = spoilt.serve(TCP4, LOCAL)
        second = Served(spoilt, TCP4, {})
        second._endpoints = [second.endpoint("web-2")]
        with saboteur.holding():
            spoilt.apply(second.slice(), second.manifest())
            until(lambda: _gate_waiters(saboteur), "a commit waits")
            spoilt.nft("flush", "ruleset")
        until(lambda: "repaired" in spoilt.daemon.log_tail(), "it is repaired")
        spoilt.settled()
        assert first.outcome("client-1") == f"{LOCAL} saw client-1"
        assert second.outcome("client-1") == "web-2 saw client-1"
        assert spoilt.matches_the_kernel()

    @pytest.mark.parametrize("moment", ["die-before", "die-after"])
    def test_nft_is_killed(self, saboteur: Saboteur, spoilt: Cluster, moment: str) -> None:
        first = spoilt.serve(TCP4, LOCAL)
        saboteur.once(moment)
        second = spoilt.serve(TCP4, "web-2")
        assert saboteur.done(moment)
        status = spoilt.status()
        assert (status.failed_syncs, status.failure) == (1, "")
        assert first.outcome("client-1") == f"{LOCAL} saw client-1"
        assert second.outcome("client-1") == "web-2 saw client-1"
        assert spoilt.matches_the_kernel()


def _gate_waiters(saboteur: Saboteur) -> list[str]:
    """Processes that read the gate."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes() == b"cat\0gate\0" and (
                path.with_name("cwd").resolve() == saboteur.folder
            ):
                found.append(path.parent.name)
    return found


def _holds_the_lock(pid: str) -> bool:
    named = Path(f"/proc/{pid}/net/unix").read_text().splitlines()
    inodes = {line.split()[6] for line in named if line.endswith(" @vipd")}
    held = {os.readlink(one) for one in Path(f"/proc/{pid}/fd").iterdir()}
    return any(f"socket:[{inode}]" in held for inode in inodes)


class TestMeddling:
    @pytest.mark.parametrize(
        "damage",
        [
            ("flush", "ruleset"),
            ("delete", "table", "ip6", "vipd"),
            ("delete", "table", "ip", "vipd-skeleton"),
            ("flush", "table", "ip", "vipd"),
            ("flush", "chain", "ip", "vipd", "dispatch"),
            ("flush", "map", "ip", "vipd", "services"),
        ],
        ids=" ".join,
    )
    def test_damage_is_repaired_and_told(self, cluster: Cluster, damage: tuple[str, ...]) -> None:
        served = {f: cluster.serve(f, LOCAL) for f in (TCP4, TCP6)}
        cluster.settled()
        whole = sorted(cluster.nft("list", "ruleset").splitlines())
        cluster.nft(*damage)
        until(lambda: "repaired" in cluster.daemon.log_tail(), "it is repaired")
        assert sorted(cluster.nft("list", "ruleset").splitlines()) == whole
        for flavour, one in served.items():
            assert one.outcome("client-1") == f"{LOCAL} saw client-1", flavour

    def test_foreign_tables_are_left_alone(self, cluster: Cluster) -> None:
        foreign = (
            "add table ip other\nadd set ip other s { type ipv4_addr; }\n"
            "add element ip other s { 1.2.3.4 }\n"
            "add chain ip other c { type nat hook prerouting priority -100; }\n"
            "add table inet filter\n"
            "add chain inet filter forward { type filter hook forward priority 0; }\n"
        )
        cluster.nft("-f", "-", input=foreign)

        def listed() -> list[str]:
            tables = (("ip", "other"), ("inet", "filter"))
            return [cluster.nft("-a", "list", "table", *one) for one in tables]

        before = listed()
        served = cluster.serve(TCP4, LOCAL)
        cluster.stop()
        cluster.start()
        assert served.outcome("client-1") == f"{LOCAL} saw client-1"
        cluster.stop()
        done = cluster.cli("cleanup", "--socket", cluster.socket)
        assert done.returncode == 0
        assert listed() == before
        assert cluster.tables() == {"ip other", "inet filter"}


class TestSkeleton:
    def test_there_after_the_first_commit_and_without_the_main_table(
        self, cluster: Cluster
    ) -> None:
        assert cluster.tables() == set(TABLES)
        served = cluster.serve(TCP4, REMOTE)
        with held(cluster, "client-1", served.address) as connection:
            assert connection.who() == REMOTE
            cluster.nft("delete", "table", "ip", "vipd")
            assert "ip vipd-skeleton" in cluster.tables()
            assert connection.who() == REMOTE  # translated without the table that did it
            served.endpoints(LOCAL)
            assert connection.who() == REMOTE
        assert served.outcome("client-1") == f"{LOCAL} saw client-1"


class TestGuard:
    @pytest.mark.parametrize("pods", [(LOCAL,), ()], ids=["endpoints", "no endpoints"])
    @pytest.mark.parametrize("flavour", [TCP4, TCP6], ids=str)
    @pytest.mark.parametrize("client", ["client-1", "node"])
    def test_a_connection_without_an_entry_keeps_its_way(
        self, cluster: Cluster, flavour: Flavour, pods: tuple[str, ...], client: str
    ) -> None:
        served = cluster.serve(flavour, *pods)
        far = served.outside_address
        lab = cluster.lab
        lab.serve("outside")
        with (
            cluster.having("outside", far),
            held(cluster, client, far, TCP_PORT) as direct,
        ):
            assert direct.who() == "outside"
            served.change(externalIPs=[str(far)], ports=[served.port(port=TCP_PORT)])
            assert direct.who() == "outside"
            family = "ipv6" if flavour is TCP6 else "ipv4"
            forget = ["conntrack", "-D", "-f", family, "-p", "tcp", "-d", str(far)]
            lab.exec("node", forget, check=True)
            assert direct.who() == "outside"
            new = f"{LOCAL} saw node" if pods else REFUSED
            assert served.outcome(client, far, TCP_PORT) == new


class TestHeldConnections:
    def test_they_survive_every_change_of_the_service(
        self, cluster: Cluster, flavour: Flavour
    ) -> None:
        served = cluster.serve(TCP6 if flavour.family == 6 else TCP4, "web-1", "web-4")
        other = cluster.serve(flavour, "web-1")
        with contextlib.ExitStack() as stack:
            connections = [
                stack.enter_context(held(cluster, client, served.address))
                for client in ("client-1", "node", "outside")
                for _ in range(3)
            ]
            pods = [one.who() for one in connections]
            for change in (
                lambda: served.endpoints("web-1", "web-2", "web-3", "web-4", "web-5"),
                lambda: served.endpoints("web-2"),
                lambda: other.endpoints(),
                lambda: other.remove(),
                lambda: served.change(sessionAffinity="ClientIP"),
                lambda: served.endpoints(),
                lambda: served.remove(),
            ):
                change()
                assert [one.who() for one in connections] == pods


class TestOnlyOne:
    def test_a_second_daemon_is_refused_with_the_pid_of_the_first(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        before = cluster.rules()
        done = cluster.cli(
            "run",
            "--manifests",
            str(cluster.folder),
            "--socket",
            str(tmp_path / "2"),
            timeout=60,
        )
        assert done.returncode == 1
        assert re.search(
            rf"\b{cluster.status().pid}\b.* serves this network namespace", done.stderr
        )
        assert cluster.rules() == before
        assert not (tmp_path / "2").exists()

    def test_another_network_namespace_may_have_another(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        (tmp_path / "two").mkdir()
        second = Cluster(cluster.lab, tmp_path / "two")
        topology = cluster.lab.topology
        process = cluster.lab.popen("node-2", list(second.daemon.command))
        try:
            until(lambda: _is_synced(second), "the second daemon is synced")
            assert topology.proxy_node == "node"
        finally:
            process.terminate()
            assert process.wait(20) == 0
        assert cluster.lab.exec("node-2", [NFT, "flush", "ruleset"]).returncode == 0

    def test_cleanup_is_refused_while_it_runs(self, cluster: Cluster) -> None:
        before = cluster.rules()
        done = cluster.cli("cleanup", "--socket", cluster.socket)
        assert done.returncode == 1
        assert str(cluster.status().pid) in done.stderr
        assert cluster.rules() == before


def _is_synced(cluster: Cluster) -> bool:
    try:
        return cluster.status().synced
    except ControlError:
        return False


class TestCleanup:
    def test_it_removes_every_trace_and_says_what(self, cluster: Cluster) -> None:
        cluster.serve(TCP4, LOCAL, sessionAffinity="ClientIP")
        cluster.kill()
        assert cluster.daemon.socket.exists()
        done = cluster.cli("cleanup", "--socket", cluster.socket)
        assert done.returncode == 0
        said = {line.removeprefix("removed ") for line in done.stdout.splitlines()}
        record = cluster.daemon.socket.with_name("mode.json")
        files = {f"file {record}", f"socket {cluster.socket}"}
        assert said == {*(f"table {one}" for one in TABLES), *files}
        assert cluster.tables() == set()
        assert not cluster.daemon.socket.exists()
        again = cluster.cli("cleanup", "--socket", cluster.socket)
        assert (again.returncode, again.stderr) == (0, "")
        assert again.stdout.startswith("nothing of vipd was here (looked in ")

    def test_json(self, cluster: Cluster) -> None:
        cluster.stop()
        done = cluster.cli("cleanup", "--json", "--socket", cluster.socket)
        record = cluster.daemon.socket.with_name("mode.json")
        removed = {*(f"table {one}" for one in TABLES), f"file {record}"}
        assert set(json.loads(done.stdout)["removed"]) == removed


class TestRejected:
    def test_others_are_served_and_it_is_reported(
        self, saboteur: Saboteur, spoilt: Cluster
    ) -> None:
        good = [Served(spoilt, TCP4, {}) for _ in range(6)]
        bad = Served(spoilt, TCP4, {})
        saboteur.refuse(bad.address)
        for one in (*good[:3], bad, *good[3:]):
            one._endpoints = [one.endpoint(LOCAL)]
            spoilt.apply(one.manifest(), one.slice())
        until(lambda: spoilt.status().rejected, "the bad one is reported")
        until(
            lambda: all(one.outcome("client-1") == f"{LOCAL} saw client-1" for one in good),
            "the good ones are served",
        )
        told = spoilt.cli("status", "--socket", spoilt.socket)
        assert told.returncode == 3
        assert f"rejected   test/{bad.name}:main at {bad.address}:80/TCP" in told.stdout
        assert "health     degraded" in told.stdout
        saboteur.stop_refusing()
        bad.endpoints("web-2")
        assert bad.outcome("client-1") == "web-2 saw client-1"
        assert spoilt.status().rejected == ()
        assert spoilt.cli("status", "--socket", spoilt.socket).returncode == 0
        assert spoilt.matches_the_kernel()

    def test_at_the_start(self, saboteur: Saboteur, new_cluster: NewCluster) -> None:
        cluster = new_cluster()
        good, bad = Served(cluster, TCP4, {}), Served(cluster, TCP4, {})
        saboteur.refuse(bad.address)
        for one in (good, bad):
            one._endpoints = [one.endpoint(LOCAL)]
            cluster.apply(one.manifest(), one.slice())
        cluster.start()
        assert good.outcome("client-1") == f"{LOCAL} saw client-1"
        (rejected,) = cluster.status().rejected
        assert str(bad.address) in rejected

    def test_a_live_one_keeps_its_last_good_form(self, saboteur: Saboteur, spoilt: Cluster) -> None:
        served = spoilt.serve(TCP4, "web-1")
        saboteur.refuse(spoilt.lab.node("web-2").ipv4)
        served._endpoints = [served.endpoint("web-2")]
        spoilt.apply(served.slice())
        until(lambda: spoilt.status().rejected, "it is reported")
        assert served.outcome("client-1") == "web-1 saw client-1"
        saboteur.stop_refusing()
        served.endpoints("web-4")
        assert served.outcome("client-1") == "web-4 saw client-1"
        assert spoilt.matches_the_kernel()


def test_changes_during_a_commit_are_folded_into_the_next(
    saboteur: Saboteur, spoilt: Cluster
) -> None:
    many = [Served(spoilt, TCP4, {}) for _ in range(60)]
    before = spoilt.status().syncs
    with saboteur.holding():
        for one in many:
            one._endpoints = [one.endpoint(LOCAL)]
            spoilt.apply(one.manifest(), one.slice())
        until(lambda: _gate_waiters(saboteur), "a commit waits")
    spoilt.settled()
    # One that waited, one with what came meanwhile, and some for files read late.
    assert 1 <= spoilt.status().syncs - before < 30
    assert {one.outcome("client-1") for one in many} == {f"{LOCAL} saw client-1"}


def test_a_source_that_is_broken_from_the_start(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    served = Served(cluster, TCP4, {})
    served._endpoints = [served.endpoint(LOCAL)]
    cluster.apply(served.manifest(), served.slice())
    (cluster.folder / "broken.json").write_text('{"kind": "Service"')
    cluster.start()
    assert served.outcome("client-1") == f"{LOCAL} saw client-1"
    (problem,) = cluster.status().problems
    assert "broken.json" in problem
    told = cluster.cli("status", "--socket", cluster.socket)
    assert (told.returncode, problem in told.stdout) == (3, True)
    (cluster.folder / "broken.json").unlink()
    until(lambda: not cluster.status().problems, "the problem is solved")
    assert cluster.cli("status", "--socket", cluster.socket).returncode == 0


def test_notify_tells_systemd(
    new_cluster: NewCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = new_cluster()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "20000")
        cluster.start()
        met = [listening.recv(100)]
        while met.count(b"WATCHDOG=1") < 3 or b"READY=1" not in met:
            met.append(listening.recv(100))
        more = b"EXTEND_TIMEOUT_USEC=60000000"
        assert set(met) == {b"WATCHDOG=1", b"READY=1", more}
        assert more not in met[met.index(b"READY=1") :]
        cluster.stop()
        while met[-1] != b"STOPPING=1":
            met.append(listening.recv(100))
    assert met.count(b"READY=1") == 1

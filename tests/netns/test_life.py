"""The daemon over an API server that comes late, goes away, lies, or has another history; packets
are real, and so is HTTP."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.netns.api import ApiCluster
from tests.netns.cluster import (
    LOCAL,
    REFUSED,
    REMOTE,
    SECOND_ADDRESS,
    TABLES,
    TCP4,
    TCP6,
    Cluster,
    Served,
    node,
    until,
)
from tests.netns.modes import Mode

from vipd.bench.lab import Lab
from vipd.proxy.errors import ControlError
from vipd.proxy.names import Family

pytestmark = [
    pytest.mark.netns,
    # Of the API server: a connection that was accepted as its loop ended is closed by nobody else.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NewCluster = Callable[..., ApiCluster]


@pytest.fixture
def new_cluster(lab: Lab, tmp_path: Path, mode: Mode) -> Iterator[NewCluster]:
    """Make a cluster with flags; neither its daemon nor its API server is started."""
    made: list[ApiCluster] = []

    def make(*flags: str) -> ApiCluster:
        made.append(ApiCluster(lab, tmp_path, *flags, mode=mode.mode))
        return made[-1]

    yield make
    for one in made:
        one.stop()
        one.api.stop()
        one.wipe()


@pytest.fixture
def cluster(new_cluster: NewCluster) -> ApiCluster:
    """Both run."""
    made = new_cluster()
    made.api.start()
    made.start()
    return made


def begin(cluster: ApiCluster) -> int:
    """Start the daemon where it cannot be synced yet; return its pid."""
    daemon = cluster.daemon
    with daemon.log.open("ab") as log:
        daemon._process = cluster.lab.popen("node", daemon.command, stdout=log, stderr=log)

    def answers() -> bool:
        with contextlib.suppress(ControlError):
            return bool(cluster.status())
        return False

    until(answers, "the daemon answers")
    return daemon._process.pid


@contextlib.contextmanager
def asking(cluster: Cluster, served: Served) -> Iterator[list[str]]:
    """Ask a service over new connections all the time; the list has what was met but an answer."""
    ended, wrong = threading.Event(), list[str]()
    count = 0

    def ask() -> None:
        nonlocal count
        while not ended.is_set():
            try:
                served.ask("client-1", timeout=5)
            except OSError as error:
                wrong.append(repr(error))
            count += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        until(lambda: count > 0, "somebody asks")
        yield wrong
        before = count
        until(lambda: count > before + 5, "somebody still asks")
    finally:
        ended.set()
        thread.join()


class TestOutage:
    def test_the_api_server_may_come_late(self, new_cluster: NewCluster) -> None:
        cluster = new_cluster()
        served = Served(cluster, TCP4, {})
        cluster.apply(served.manifest())
        begin(cluster)
        until(lambda: "nothing heard yet" in cluster.problems(), "it says that it waits")
        assert not cluster.status().synced
        assert cluster.cli("status", "--socket", cluster.socket).returncode == 3
        assert "nothing heard yet" in cluster.daemon.log_tail()
        assert cluster.tables() == set(), "nothing is known, so nothing is programmed"
        cluster.api.start()
        served.endpoints(LOCAL)
        assert served.outcome("client-1") == f"{LOCAL} saw client-1"
        until(lambda: not cluster.status().degraded, "it is healthy")

    def test_it_ends_at_once_while_the_server_is_away(self, new_cluster: NewCluster) -> None:
        cluster = new_cluster()
        begin(cluster)
        until(lambda: bool(cluster.problems()), "it waits")
        process = cluster.daemon._process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert cluster.tables() == set()

    def test_an_outage_changes_nothing_and_is_made_up_for(self, cluster: ApiCluster) -> None:
        served, gone = cluster.serve(TCP4, LOCAL), cluster.serve(TCP4, LOCAL)
        with asking(cluster, served) as wrong:
            before = cluster.rules()
            syncs = cluster.status().syncs
            cluster.api.stop()
            until(lambda: "nothing heard since 20" in cluster.problems(), "it says since when")
            assert "is kept" in cluster.problems()
            assert (cluster.rules(), cluster.status().syncs) == (before, syncs)
            assert cluster.status().degraded
            cluster.remove(gone.manifest(), gone.slice())
            new = Served(cluster, TCP4, {})
            new._endpoints = [new.endpoint(REMOTE)]
            cluster.apply(new.manifest(), new.slice())
            assert gone.outcome("client-1") == f"{LOCAL} saw client-1"
            cluster.api.start()
            cluster.settled()
        assert wrong == []
        assert new.outcome("client-1") == f"{REMOTE} saw client-1"
        assert not gone.outcome("client-1").startswith(LOCAL)
        until(lambda: not cluster.status().degraded, "it is healthy")

    @pytest.mark.parametrize("crash", [False, True], ids=["restart", "kill -9"])
    def test_a_restart_meanwhile_keeps_what_is_there(
        self, cluster: ApiCluster, crash: bool
    ) -> None:
        served, gone = cluster.serve(TCP4, LOCAL), cluster.serve(TCP6, LOCAL)
        with asking(cluster, served) as wrong:
            cluster.api.stop()
            before = cluster.rules()
            if crash:
                cluster.kill()
            else:
                cluster.stop()
            cluster.remove(gone.manifest(), gone.slice())
            begin(cluster)
            until(lambda: "nothing heard yet" in cluster.problems(), "it waits for the server")
            assert cluster.rules() == before
            assert gone.outcome("client-1") == f"{LOCAL} saw client-1"
            cluster.api.start()
            cluster.settled()
        assert wrong == []
        last = cluster.status().last_sync
        assert last is not None
        assert last.full
        assert last.virtual_servers <= 1, "only what was deleted"
        assert 0 < last.objects < 12
        assert cluster.matches_the_kernel()

    def test_a_server_of_another_history(self, cluster: ApiCluster) -> None:
        """As after a backup was put back: versions begin again lower, objects are others."""
        changed, gone = cluster.serve(TCP4, LOCAL), cluster.serve(TCP4, LOCAL)
        stays = cluster.serve(TCP4, LOCAL)
        with asking(cluster, stays) as wrong:
            cluster.api.stop()
            for collection in cluster.api.store.collections.values():
                collection.objects.clear()
                collection._history.clear()
                collection._forgotten = 0
            cluster.api.store.version = 10
            for path in (gone.manifest(), gone.slice()):
                Cluster.remove(cluster, path)
            changed._endpoints = [changed.endpoint(REMOTE)]
            Cluster.apply(cluster, changed.slice())
            cluster.apply(*(json.loads(one.read_text()) for one in cluster.folder.iterdir()))
            cluster.api.start()
            cluster.settled()
            assert changed.outcome("client-1") == f"{REMOTE} saw client-1"
            assert not gone.outcome("client-1").startswith(LOCAL)
        assert wrong == []
        until(lambda: not cluster.status().degraded, "it is healthy")


class TestNode:
    """Facts of this node that change while the daemon runs."""

    @pytest.mark.modes("nftables", "iptables-legacy", "ipvs", "userspace")
    def test_its_address_in_the_node_object(self, new_cluster: NewCluster) -> None:
        cluster = new_cluster()
        cluster.api.start()
        cluster.start()
        served = cluster.serve(TCP4, LOCAL, type="NodePort")
        first, second = served.on_node()[0], SECOND_ADDRESS[Family.IPV4]
        answers = f"{LOCAL} saw node"

        def met() -> tuple[str, str]:
            return tuple(  # type: ignore[return-value]
                served.outcome("outside", one, served.node_port) for one in (first, second)
            )

        with cluster.having("node", second, "eth0"):
            assert met() == (answers, REFUSED)
            changed = node("node", cluster.lab)
            changed["status"]["addresses"] = [{"type": "InternalIP", "address": str(second)}]
            cluster.apply(changed)
            cluster.settled()
            assert met() == (REFUSED, answers)
            cluster.apply(node("node", cluster.lab))
            cluster.settled()
            assert met() == (answers, REFUSED)

    @pytest.mark.modes("nftables", "ipvs", "userspace")
    def test_its_addresses_in_the_kernel(self, new_cluster: NewCluster) -> None:
        cluster = new_cluster("--nodeport-addresses", "0.0.0.0/0,::/0")
        cluster.api.start()
        cluster.start()
        served = cluster.serve(TCP4, LOCAL, type="NodePort")
        second = SECOND_ADDRESS[Family.IPV4]

        def met() -> str:
            return served.outcome("outside", second, served.node_port)

        for _ in range(2):  # one that comes back is a new one
            with cluster.having("node", second, "eth0"):
                until(lambda: met() == f"{LOCAL} saw node", "it answers on the new address")
            until(lambda: not met().startswith(LOCAL), "it does not answer on the old one")
        assert served.outcome("outside", *served.on_node()) == f"{LOCAL} saw node"

    def test_pod_networks_that_are_assigned_late_and_change(
        self, new_cluster: NewCluster, lab: Lab
    ) -> None:
        cluster = new_cluster()
        told = list(cluster.daemon.arguments)
        at = told.index("--cluster-cidr")
        config = cluster.folder.parent / "vipd.yaml"
        head = "apiVersion: vipd/v1alpha1\nkind: VipdConfiguration\n"
        config.write_text(f"{head}detectLocalMode: NodeCIDR\n")
        told[at : at + 2] = ["--config", str(config)]
        cluster.daemon.arguments = tuple(told)
        mine = node("node", lab)
        networks, mine["spec"]["podCIDRs"] = mine["spec"]["podCIDRs"], []

        def assigned(*cidrs: str) -> None:
            mine["spec"]["podCIDRs"] = list(cidrs)
            cluster.apply(mine)
            cluster.settled()

        cluster.apply(mine)
        cluster.api.start()
        cluster.start()
        served = cluster.serve(TCP4, LOCAL, type="NodePort", externalTrafficPolicy="Local")
        # Nobody is taken for a pod, and nobody for a stranger.
        for client in ("client-1", "outside"):
            assert served.outcome(client) == f"{LOCAL} saw {client}"
        assert any("NodeCIDR" in one for one in cluster.status().notes)
        assigned(*networks)
        assert served.outcome("client-1") == f"{LOCAL} saw client-1"
        assert served.outcome("outside") == f"{LOCAL} saw node"
        assert not any("NodeCIDR" in one for one in cluster.status().notes)
        served.endpoints(REMOTE)
        assert served.outcome("client-1", *served.on_node()) == f"{REMOTE} saw client-1"
        assigned("10.99.0.0/24")
        assert served.outcome("client-1") == f"{REMOTE} saw node"
        assert served.outcome("client-1", *served.on_node()) == "silence"
        cluster.remove(mine)
        served.endpoints(LOCAL)
        assert served.outcome("outside") == f"{LOCAL} saw outside"
        assert any(one.startswith("no Node is called node:") for one in cluster.status().trouble)


class TestEnd:
    def test_it_can_take_everything_with_it(self, new_cluster: NewCluster) -> None:
        cluster = new_cluster("--cleanup-at-exit")
        cluster.api.start()
        cluster.start()
        cluster.serve(TCP4, LOCAL)
        assert cluster.tables() == set(TABLES)
        cluster.kill()  # a crash is no end
        assert cluster.tables() == set(TABLES)
        cluster.start()
        process = cluster.daemon._process
        assert process is not None
        process.terminate()
        assert process.wait(20) == 0
        assert cluster.tables() == set()
        assert 'event="dataplane removed"' in cluster.daemon.log_tail()
        assert "table ip vipd" in cluster.daemon.log_tail()
        assert sorted(os.listdir(cluster.daemon.socket.parent)) == [
            "kubeconfig",
            "manifests",
            "vipd.log",
        ]

    def test_the_flag_that_kube_proxy_has(self, cluster: ApiCluster) -> None:
        cluster.serve(TCP4, LOCAL)
        words = ("run", "--cleanup", "--kubeconfig", "/nowhere", "--socket", cluster.socket)
        refused = cluster.cli(*words)
        assert refused.returncode == 1
        assert "stop it first" in refused.stderr
        cluster.stop()
        done = cluster.cli(*words)
        assert done.returncode == 0, done.stderr
        assert "removed" in done.stdout
        assert cluster.tables() == set()

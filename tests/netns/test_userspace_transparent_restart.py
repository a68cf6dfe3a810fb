"""The transparent mode comes and goes: restarts, other modes, the end; connections go on."""

import threading
from collections.abc import Callable

import pytest
from tests.netns.cluster import LOCAL, TCP4, TCP6, UDP6, Cluster, held, until
from tests.netns.transparent import (
    BIT,
    configuration,
    return_paths,
    seen,
    transparent_workers,
)

from vipd.proxy.names import Family

pytestmark = [pytest.mark.netns, pytest.mark.essential, pytest.mark.modes("userspace")]

NewCluster = Callable[..., Cluster]


def configure(cluster: Cluster, *, transparent: bool, bit: int = BIT) -> None:
    """Write the setting, for the next start."""
    path = configuration(cluster.folder.parent, transparent=transparent, bit=bit)
    if "--config" not in cluster.daemon.arguments:
        cluster.daemon.arguments = (*cluster.daemon.arguments, "--config", path)


@pytest.fixture
def cluster(new_cluster: NewCluster) -> Cluster:
    built = new_cluster()
    configure(built, transparent=True)
    built.start()
    return built


def peers(cluster: Cluster, pod: str) -> str:
    """The connections that a pod has, with the addresses of their other ends."""
    return cluster.lab.exec(pod, ["ss", "-tnH"]).stdout


def test_connections_outlive_restarts_that_change_the_setting(cluster: Cluster) -> None:
    served, other = cluster.serve(TCP4, LOCAL), cluster.serve(TCP6, LOCAL)
    whole = return_paths(cluster)
    assert len(whole) == 6
    # What is left of an earlier connection may have the port that the client gets now.
    cluster.lab.exec("node", ["conntrack", "-F"], check=True)
    client = cluster.lab.node("client-1").ipv4
    with held(cluster, "client-1", served.address) as old:
        assert old.who() == LOCAL
        assert f"{client}:{old.port}" in peers(cluster, LOCAL)  # the port as well
        cluster.kill()
        assert old.who() == LOCAL
        # What somebody has taken away meanwhile, or changed.
        cluster.lab.exec("node", ["ip", "-6", "rule", "del", "lookup", "119"], check=True)
        cluster.lab.exec("node", ["ip", "route", "flush", "table", "119"], check=True)
        cluster.nft("flush", "table", "ip", "vipd-transparent")
        cluster.start()
        assert return_paths(cluster) == whole
        assert old.who() == LOCAL
        cluster.stop()
        configure(cluster, transparent=False)
        cluster.start()
        assert old.who() == LOCAL
        assert seen(served, "client-1") == f"{LOCAL} saw node"
        until(lambda: not any("-6" in one for one in return_paths(cluster)), "IPv6 is not needed")
        assert [one for one in whole if "ip6" not in one and "-6" not in one] == [
            *return_paths(cluster)
        ]
        assert old.who() == LOCAL
    until(lambda: return_paths(cluster) == [], "the last connection has ended")
    until(lambda: transparent_workers(cluster) == [], "nobody has a privilege any more")
    with held(cluster, "client-1", served.address) as old:
        assert old.who() == LOCAL
        cluster.stop()
        configure(cluster, transparent=True, bit=BIT + 1)
        cluster.start()
        assert seen(served, "client-1") == f"{LOCAL} saw client-1"
        assert seen(other, "client-1") == f"{LOCAL} saw client-1"
        assert old.who() == LOCAL
    assert len(return_paths(cluster)) == 6
    assert cluster.cli("plan", str(cluster.folder), "--socket", cluster.socket).stdout == ""


def test_a_stream_goes_on_while_the_mode_changes_to_and_fro(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL)
    done = threading.Event()
    answers: list[str] = []
    with held(cluster, "client-1", served.address) as stream:

        def go_on() -> None:
            while not done.is_set():
                answers.append(stream.who())

        going = threading.Thread(target=go_on)
        going.start()
        try:
            for mode in ("nftables", "userspace"):
                told = cluster.cli("mode", mode, "--socket", cluster.socket)
                assert told.returncode == 0, told.stderr
                assert seen(served, "client-1") == f"{LOCAL} saw client-1"
                assert len(return_paths(cluster)) == 3
                answers.clear()
                until(lambda: len(answers) > 10, "the stream goes on")
        finally:
            done.set()
            going.join()
        assert set(answers) == {LOCAL}
        assert stream.who() == LOCAL


def test_a_worker_keeps_one_capability_and_cleaning_up_leaves_nothing(cluster: Cluster) -> None:
    served = cluster.serve(UDP6, LOCAL)
    assert seen(served, "client-1") == f"{LOCAL} saw client-1"
    assert {
        (told["CapPrm"], told["CapEff"], told["CapBnd"], told["Uid"].split()[1])
        for told in transparent_workers(cluster)
    } == {(f"{1 << 13:016x}", f"{1 << 13:016x}", "0" * 16, "65534")}
    cluster.stop()
    told_by = cluster.cli("cleanup", "--dry-run", "--socket", cluster.socket).stdout
    assert f"return path of transparent connections ({Family.IPV6})" in told_by
    assert cluster.cli("cleanup", "--socket", cluster.socket).returncode == 0
    assert return_paths(cluster) == []

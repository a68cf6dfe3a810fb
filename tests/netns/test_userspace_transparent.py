"""Userspace mode with `userspace.transparent`: endpoints on the node see who their clients are."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.netns.cluster import (
    DEADLINE_SECONDS,
    FLAVOURS,
    LOCAL,
    REMOTE,
    TCP4,
    TCP6,
    UDP4,
    UDP6,
    Cluster,
    Served,
    held,
    until,
)

from vipd.proxy.names import Address, Family, parse_address

pytestmark = [pytest.mark.netns, pytest.mark.essential, pytest.mark.modes("userspace")]

NewCluster = Callable[..., Cluster]
SILENT = "web-3"
ROUND_ROBIN = {"vipd/algorithm": "round-robin"}
BIT = 7


def configure(cluster: Cluster, *, transparent: bool, bit: int = BIT) -> None:
    """Write the setting, for the next start."""
    path = cluster.folder.parent / "vipd.yaml"
    path.write_text(
        "apiVersion: vipd/v1alpha1\nkind: VipdConfiguration\n"
        f"userspace: {{transparent: {str(transparent).lower()}, transparentBit: {bit}}}\n"
    )
    if "--config" not in cluster.daemon.arguments:
        cluster.daemon.arguments = (*cluster.daemon.arguments, "--config", str(path))


@pytest.fixture
def cluster(new_cluster: NewCluster) -> Cluster:
    built = new_cluster()
    configure(built, transparent=True)
    built.start()
    return built


def seen(served: Served, client: str, to: Address | None = None, port: int = 80) -> str:
    """Who answered a request, and whom that one saw."""
    answer = served.ask(client, to, port)
    return f"{answer.pod} saw {served.cluster.host_of(answer.source)}"


def return_paths(cluster: Cluster) -> list[str]:
    """What there is of return paths on the node."""
    found = [one for one in cluster.tables() if "vipd-transparent" in one]
    for family in ("-4", "-6"):
        for what in (["rule", "list"], ["route", "show", "table", "all"]):
            printed = cluster.lab.exec("node", ["ip", family, *what]).stdout.splitlines()
            found += [
                f"{family} {one.strip()}"
                for one in printed
                if "lookup 119" in one or "table 119" in one
            ]
    return sorted(found)


def transparent_workers(cluster: Cluster) -> list[dict[str, str]]:
    """What the kernel says of the worker processes that may show addresses."""
    here = os.stat(cluster.lab.path("node")).st_ino
    found = []
    for one in Path("/proc").glob("[0-9]*"):
        try:
            words = (one / "cmdline").read_bytes().split(b"\0")
            if words[-2:] != [b"transparent", b""] or os.stat(one / "ns/net").st_ino != here:
                continue
            lines = (one / "status").read_text().splitlines()
        except OSError:
            continue  # it has ended
        found.append(dict(line.split(":\t", 1) for line in lines if ":\t" in line))
    return found


def peers(cluster: Cluster, pod: str) -> str:
    """The connections that a pod has, with the addresses of their other ends."""
    return cluster.lab.exec(pod, ["ss", "-tnH"]).stdout


def test_an_endpoint_of_this_node_sees_its_client(cluster: Cluster) -> None:
    for flavour in FLAVOURS:
        served = cluster.serve(flavour, LOCAL, type="NodePort", externalTrafficPolicy="Local")
        assert seen(served, "client-1") == f"{LOCAL} saw client-1"
        # As in every mode: policy Local keeps it, and a cluster IP not from off-cluster.
        assert seen(served, "outside", *served.on_node()) == f"{LOCAL} saw outside"
        assert seen(served, "outside") == f"{LOCAL} saw node"
        assert seen(served, "node") == f"{LOCAL} saw node"
        assert seen(served, LOCAL) == f"{LOCAL} saw node"  # itself
        served.change(externalTrafficPolicy="Cluster")
        assert seen(served, "outside", *served.on_node()) == f"{LOCAL} saw node"
        assert seen(served, "client-1") == f"{LOCAL} saw client-1"
        # Its answers would not come by here.
        served.endpoints(REMOTE)
        assert seen(served, "client-1") == f"{REMOTE} saw node"


def test_behind_one_interface_answers_do_not_come_by_here(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL)
    neighbour = parse_address("10.244.1.77")  # as on a bridge, which has many pods
    route = ["ip", "route", "replace", f"{neighbour}/32", "dev", LOCAL]
    with cluster.having(LOCAL, neighbour, "eth0"):
        cluster.lab.exec("node", route, check=True)
        try:
            with cluster.lab.socket(LOCAL, socket.AF_INET) as asking:
                asking.settimeout(DEADLINE_SECONDS)
                asking.bind((str(neighbour), 0))
                asking.connect((str(served.address), 80))
                asking.sendall(b"who\n")
                pod, source = asking.recv(100).decode().split()[:2]
        finally:
            cluster.lab.exec("node", ["ip", "route", "del", f"{neighbour}/32"], check=True)
    assert pod == LOCAL
    assert cluster.host_of(parse_address(source.rpartition(":")[0])) == "node"


def test_errors_of_an_endpoint_arrive(cluster: Cluster) -> None:
    cluster.lab.silence(SILENT)
    try:
        for flavour in (UDP4, UDP6):
            served = cluster.serve(flavour, SILENT, LOCAL, annotations=ROUND_ROBIN)
            for _ in range(3):  # one of them begins with the silent one
                insist(served, "client-1")
    finally:
        cluster.lab.serve(SILENT)


def insist(served: Served, client: str) -> None:
    """Send from one port until an answer comes; a session that hears no error would never move."""
    family = socket.AF_INET if served.flavour.family is Family.IPV4 else socket.AF_INET6
    with served.cluster.lab.socket(client, family, socket.SOCK_DGRAM) as asking:
        asking.settimeout(0.2)
        asking.connect((str(served.address), 80))

        def answered() -> bool:
            try:
                asking.send(b"who")
                return asking.recv(100).startswith(LOCAL.encode())
            except TimeoutError:
                return False

        until(answered, "another endpoint answers")


def test_a_port_that_is_taken_here_is_another_one_there(cluster: Cluster) -> None:
    served = cluster.serve(UDP4, LOCAL)
    with cluster.lab.socket("node", socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("0.0.0.0", 0))
        answer = served.ask("client-1", source_port=taken.getsockname()[1])
    assert cluster.host_of(answer.source) == "client-1"


def test_connections_outlive_restarts_that_change_the_setting(cluster: Cluster) -> None:
    served, other = cluster.serve(TCP4, LOCAL), cluster.serve(TCP6, LOCAL)
    whole = return_paths(cluster)
    assert len(whole) == 6
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


def test_check_names_the_setting_that_keeps_answers_out(cluster: Cluster) -> None:
    assert "for userspace.transparent" not in cluster.cli("check").stdout
    served = cluster.serve(TCP4, LOCAL)
    assert seen(served, "client-1") == f"{LOCAL} saw client-1"
    setting = Path("/proc/sys/net/ipv4/conf/all/src_valid_mark")
    cluster.lab.run("node", lambda: setting.write_text("1"))
    try:
        told = cluster.cli("check").stdout
        assert "set net.ipv4.conf.*.src_valid_mark=0" in told
        assert "userspace: works here" in told  # as it is by default
        cluster.lab.exec("node", ["ip", "rule", "del", "lookup", "119"], check=True)
        cluster.stop()
        cluster.start()
        assert "net.ipv4.conf.all.src_valid_mark set" in cluster.daemon.log_tail(200)
    finally:
        cluster.lab.run("node", lambda: setting.write_text("0"))
    assert seen(served, "client-1") == f"{LOCAL} saw client-1"

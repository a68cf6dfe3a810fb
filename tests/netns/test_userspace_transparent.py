"""Userspace mode with `userspace.transparent`: endpoints on the node see who their clients are."""

import socket
from pathlib import Path

import pytest
from tests.netns.cluster import (
    DEADLINE_SECONDS,
    FLAVOURS,
    LOCAL,
    REMOTE,
    TCP4,
    UDP4,
    UDP6,
    Cluster,
    Manifest,
    Served,
    until,
)
from tests.netns.transparent import configuration, seen

from vipd.proxy.names import Family, parse_address

pytestmark = [pytest.mark.netns, pytest.mark.essential, pytest.mark.modes("userspace")]

OWN_PORT = 7000
SILENT = "web-3"
ROUND_ROBIN = {"vipd/algorithm": "round-robin"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return ("--config", configuration(tmp_path_factory.mktemp("configuration")))


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


class OwnServer(Served):
    """A service whose endpoint is the test's own."""

    def slice(self) -> Manifest:
        port = {"name": "main", "protocol": "TCP", "port": OWN_PORT}
        return {**super().slice(), "ports": [port]}


def test_an_answer_arrives_though_its_connection_was_forgotten(cluster: Cluster) -> None:
    served = OwnServer(cluster, TCP4, {"annotations": {"vipd/proxy-protocol": "v2"}})
    cluster.apply(served.manifest())
    served.endpoints(LOCAL)
    with (
        cluster.lab.socket(LOCAL, socket.AF_INET) as listener,
        cluster.lab.socket("client-1", socket.AF_INET) as client,
    ):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(cluster.lab.node(LOCAL).ipv4), OWN_PORT))
        listener.listen()
        for one in (listener, client):
            one.settimeout(DEADLINE_SECONDS)
        client.connect((str(served.address), 80))
        endpoint, source = listener.accept()
        with endpoint:
            assert source == client.getsockname()
            header = endpoint.recv(28, socket.MSG_WAITALL)  # which is sent all the same
            assert header.startswith(b"\r\n\r\n\0\r\nQUIT\n")
            cluster.lab.exec("node", ["conntrack", "-F"], check=True)
            endpoint.sendall(b"first")
            assert client.recv(100) == b"first"


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


def test_check_names_the_setting_that_keeps_answers_out(cluster: Cluster) -> None:
    assert "for userspace.transparent" not in cluster.cli("check").stdout
    setting = Path("/proc/sys/net/ipv4/conf/all/src_valid_mark")
    cluster.lab.run("node", lambda: setting.write_text("1"))
    try:
        told = cluster.cli("check").stdout
        assert "set net.ipv4.conf.*.src_valid_mark=0" in told
        assert "userspace: works here" in told  # as it is by default
        cluster.serve(TCP4, LOCAL)
        assert "net.ipv4.conf.all.src_valid_mark set" in cluster.daemon.log_tail(200)
    finally:
        cluster.lab.run("node", lambda: setting.write_text("0"))

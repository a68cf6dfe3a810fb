"""What upstream's end-to-end tests ask of connection tracking (test/e2e/network/conntrack.go).

A client that keeps its source port is one flow to the kernel, whoever else would answer by now.
The pods of the lab answer for as long as it stands: a client only leaves an endpoint that has left
the service because its entry is forgotten.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
from tests.netns.cluster import (
    DEADLINE_SECONDS,
    SILENCE_SECONDS,
    TCP4,
    UDP4,
    UDP6,
    Cluster,
    Flavour,
    Served,
    endpoint_slice,
    until,
)
from tests.netns.modes import MODES

from vipd.bench.pod import UDP_PORT
from vipd.proxy.kernel_settings import apply
from vipd.proxy.names import Address
from vipd.proxy.settings import ConntrackSettings

pytestmark = [pytest.mark.netns]

in_every_mode = pytest.mark.modes(*MODES)
where_the_kernel_translates = pytest.mark.modes("nftables", "iptables-legacy", "iptables-nft")


class Flow(NamedTuple):
    """A UDP client that never closes its socket."""

    socket: socket.socket

    def who(self) -> str:
        """The pod that answers now; empty where none does."""
        with contextlib.suppress(TimeoutError, ConnectionError):
            self.socket.send(b"who\n")
            return self.socket.recv(4096).decode().partition(" ")[0]
        return ""

    def until_answered_by(self, pod: str) -> None:
        until(lambda: self.who() == pod, f"{pod} answers")


Begin = Callable[..., Flow]


@pytest.fixture
def begin(cluster: Cluster) -> Iterator[Begin]:
    with contextlib.ExitStack() as stack:

        def made(client: str, to: Address, port: int = 80) -> Flow:
            family = socket.AF_INET if to.version == 4 else socket.AF_INET6
            opened = stack.enter_context(cluster.lab.socket(client, family, socket.SOCK_DGRAM))
            opened.settimeout(SILENCE_SECONDS)
            opened.connect((str(to), port))
            return Flow(opened)

        yield made


@in_every_mode
@pytest.mark.parametrize(
    ("flavour", "place", "client"),
    [
        pytest.param(UDP4, "cluster IP", "client-1", marks=pytest.mark.essential),
        pytest.param(UDP4, "node port", "outside", marks=pytest.mark.essential),
        (UDP4, "cluster IP", "node"),
        (UDP6, "node port", "client-1"),
    ],
    ids=str,
)
def test_a_flow_goes_on_to_the_pod_that_takes_over(
    cluster: Cluster, begin: Begin, flavour: Flavour, place: str, client: str
) -> None:
    served = cluster.serve(flavour, "web-1", type="NodePort")
    to = served.on_node() if place == "node port" else (served.address, 80)
    flow = begin(client, *to)
    flow.until_answered_by("web-1")
    served.endpoints("web-4", served.endpoint("web-1", ready=False, terminating=True))
    if cluster.mode in ("nftables", "iptables"):  # in the others, UDP moves at once
        assert flow.who() == "web-1"
    served.endpoints("web-4")
    flow.until_answered_by("web-4")


@where_the_kernel_translates
def test_a_flow_that_began_before_there_was_anybody_is_answered(
    cluster: Cluster, begin: Begin
) -> None:
    served = Served(cluster, UDP4, {})
    flow = begin("client-1", served.address)
    assert flow.who() == ""  # it has left the node, and has an entry that says so
    cluster.apply(served.manifest())
    served.endpoints(served.endpoint("web-1", ready=False, serving=False))
    assert flow.who() == ""
    served.endpoints("web-1")
    flow.until_answered_by("web-1")


@where_the_kernel_translates
def test_a_flow_follows_the_target_port_of_a_node_port(cluster: Cluster, begin: Begin) -> None:
    served = cluster.serve(UDP4, type="NodePort")
    pod = cluster.lab.node("web-1").ipv4
    with cluster.lab.socket("web-1", socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.settimeout(DEADLINE_SECONDS)
        other.bind((str(pod), UDP_PORT + 1))
        port = {"name": "main", "protocol": "UDP", "port": UDP_PORT + 1}
        endpoints = [served.endpoint("web-1")]
        cluster.apply(endpoint_slice(served.name, UDP4.family, endpoints, [port]))
        cluster.settled()
        flow = begin("outside", *served.on_node())
        flow.socket.send(b"who\n")
        assert other.recv(4096) == b"who\n"
        served.endpoints("web-1")
        flow.until_answered_by("web-1")


@where_the_kernel_translates
@pytest.mark.parametrize("client", ["client-1", "node"])
def test_a_packet_outside_of_the_window_resets_no_connection(cluster: Cluster, client: str) -> None:
    with _connection(cluster, client) as (asking, answering):
        for number in range(3):
            _send_outside_of_the_window(cluster, "web-4", answering)
            text = str(number).encode()
            answering.send(text)
            assert asking.recv(10) == text
            asking.send(text)
            assert answering.recv(10) == text


@contextlib.contextmanager
def _connection(cluster: Cluster, client: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Connect a client to a service; yield its socket and the one of the pod, on another node."""
    pod = cluster.lab.node("web-4").ipv4
    with cluster.lab.socket("web-4") as listener, cluster.lab.socket(client) as asking:
        listener.bind((str(pod), 0))
        listener.listen()
        served = cluster.serve(TCP4)
        port = {"name": "main", "protocol": "TCP", "port": listener.getsockname()[1]}
        endpoints = [served.endpoint("web-4")]
        cluster.apply(endpoint_slice(served.name, TCP4.family, endpoints, [port]))
        cluster.settled()
        asking.settimeout(DEADLINE_SECONDS)
        asking.connect((str(served.address), 80))
        answering, _ = listener.accept()
        with answering:
            answering.settimeout(DEADLINE_SECONDS)
            yield asking, answering


_REPAIR, _QUEUE, _SEQUENCE = 19, 20, 21  # TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ
_RECEIVED, _SENT, _OFF_WITHOUT_PROBE = 1, 2, -1


def _send_outside_of_the_window(cluster: Cluster, host: str, connected: socket.socket) -> None:
    """Send from far ahead of the window, with an acknowledgement that a reset would repeat."""
    tcp = socket.IPPROTO_TCP
    connected.setsockopt(tcp, _REPAIR, 1)
    connected.setsockopt(tcp, _QUEUE, _RECEIVED)
    received = connected.getsockopt(tcp, _SEQUENCE) & 0xFFFFFFFF
    connected.setsockopt(tcp, _QUEUE, _SENT)
    sent = connected.getsockopt(tcp, _SEQUENCE) & 0xFFFFFFFF
    connected.setsockopt(tcp, _REPAIR, _OFF_WITHOUT_PROBE)
    (source, source_port), (to, port) = connected.getsockname(), connected.getpeername()
    from scapy.layers.inet import IP, TCP

    number = (sent + (1 << 30)) & 0xFFFFFFFF
    segment = TCP(sport=source_port, dport=port, seq=number, ack=received, flags="A")
    packet = bytes(IP(src=source, dst=to) / segment / b"late")
    raw = cluster.lab.run(
        host, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    )
    with raw:
        raw.sendto(packet, (to, 0))


def test_the_time_that_a_half_closed_connection_is_kept(cluster: Cluster) -> None:
    names = ("tcp_timeout_close_wait", "tcp_timeout_established")
    before = {name: cluster.lab.run("node", partial(_sysctl, name)) for name in names}
    told = ConntrackSettings(max_per_core=0)
    assert cluster.lab.run("node", lambda: apply(told)) == ()
    try:
        with _connection(cluster, "client-1") as (asking, _):
            asking.shutdown(socket.SHUT_WR)
            port = asking.getsockname()[1]
            until(lambda: 3500 < _close_wait(cluster, port) <= 3600, "CLOSE_WAIT is an hour")
    finally:
        for name, value in before.items():
            cluster.lab.run("node", partial(_sysctl, name, value))


def _sysctl(name: str, value: str = "") -> str:
    path = f"/proc/sys/net/netfilter/nf_conntrack_{name}"
    with open(path, "r+" if value else "r") as setting:
        return str(setting.write(value)) if value else setting.read().strip()


def _close_wait(cluster: Cluster, port: int) -> int:
    """Seconds that the entry of a client's port is kept in this state; 0 without one."""
    table = cluster.lab.exec("node", ["cat", "/proc/net/nf_conntrack"], check=True).stdout
    for line in table.splitlines():
        words = line.split()
        if "CLOSE_WAIT" in words and f"sport={port}" in words:
            return int(words[4])
    return 0

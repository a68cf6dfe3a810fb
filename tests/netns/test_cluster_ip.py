"""Cluster IPs: what a new connection meets and which source the endpoint sees (§2.2, §2.3)."""

import contextlib
import socket
from collections.abc import Iterator

import pytest
from tests.netns.cluster import (
    FLAVOURS,
    LOCAL,
    REFUSED,
    REMOTE,
    SILENCE,
    SILENCE_SECONDS,
    TCP4,
    TCP6,
    Cluster,
    Flavour,
    Served,
    cluster_ip,
    every,
    service_cidr,
)
from tests.netns.modes import MODES

from vipd.bench.lab_ask import Way
from vipd.bench.pod import TCP_PORT, UDP_PORT
from vipd.proxy.names import Address

pytestmark = [pytest.mark.netns, pytest.mark.modes(*MODES)]

CLIENTS = ("client-1", "node", "outside")
SERVICE_CIDR = service_cidr("10.96.0.0/16", "fd00:10:96::/112")


@pytest.mark.essential
@pytest.mark.parametrize("pod", [LOCAL, REMOTE])
@pytest.mark.parametrize(
    ("client", "seen"),
    [
        ("client-1", "client-1"),
        ("node", "node"),
        ("outside", "node"),
        ("node-2", "node"),
    ],
)
def test_pods_keep_their_source_and_others_are_masqueraded(
    cluster: Cluster, flavour: Flavour, pod: str, client: str, seen: str
) -> None:
    served = cluster.serve(flavour, pod)
    if client == "node-2":  # it has no route to service addresses of its own
        _route_from_node_2(cluster, served)
    assert served.outcome(client) == f"{pod} saw {seen}"


def _route_from_node_2(cluster: Cluster, served: Served) -> None:
    family = "-6" if served.flavour.family == 6 else "-4"
    via = "fe80::1" if served.flavour.family == 6 else str(cluster.lab.node("node").ipv4)
    onlink = [] if served.flavour.family == 6 else ["onlink"]
    route = ["ip", family, "route", "replace", str(served.address), "via", via, "dev", "node"]
    cluster.lab.exec("node-2", [*route, *onlink], check=True)


@pytest.mark.parametrize("client", CLIENTS)
def test_every_ready_endpoint_is_used(cluster: Cluster, flavour: Flavour, client: str) -> None:
    pods = ("web-1", "web-2", "web-4")
    seen = client if client == "client-1" else "node"
    served = cluster.serve(flavour, *pods)
    assert {o for _ in range(3) for o in served.outcomes(client)} == every(pods, seen)


@pytest.mark.essential
@pytest.mark.parametrize("client", CLIENTS)
def test_without_endpoints_it_is_refused(cluster: Cluster, flavour: Flavour, client: str) -> None:
    served = cluster.serve(flavour)
    assert served.outcome(client) == REFUSED
    served.endpoints(LOCAL)
    assert served.outcome(client).startswith(LOCAL)
    served.endpoints()
    assert served.outcome(client) == REFUSED


@pytest.mark.essential
@pytest.mark.parametrize("client", CLIENTS)
def test_an_unknown_port_is_refused(cluster: Cluster, flavour: Flavour, client: str) -> None:
    served = cluster.serve(flavour, LOCAL)
    assert served.outcome(client, port=81) == REFUSED


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_the_other_protocol_is_an_unknown_port(cluster: Cluster, protocol: str) -> None:
    for flavour in (f for f in FLAVOURS if f.protocol != protocol):
        served = cluster.serve(flavour, LOCAL)
        way: Way = "tcp" if protocol == "TCP" else "udp"
        assert cluster.outcome("client-1", way, served.address, 80) == REFUSED
        assert served.outcome("client-1") == f"{LOCAL} saw client-1"


@pytest.mark.essential
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("flavour", [TCP4, TCP6], ids=str)
def test_a_ping_is_refused(cluster: Cluster, flavour: Flavour, client: str) -> None:
    served = cluster.serve(flavour, LOCAL)
    assert pinged(cluster, client, cluster.lab.node(LOCAL).address(flavour.family)) == "answered"
    met = "answered" if cluster.differs("pings-are-answered") else REFUSED
    assert pinged(cluster, client, served.address) == met


def pinged(cluster: Cluster, client: str, to: Address) -> str:
    """What an ICMP echo request meets."""
    four = to.version == 4
    family = socket.AF_INET if four else socket.AF_INET6
    protocol = socket.IPPROTO_ICMP if four else socket.IPPROTO_ICMPV6
    echo = b"\x08\x00\xf7\xff\x00\x00\x00\x00" if four else b"\x80\x00\x00\x00\x00\x00\x00\x00"
    made = cluster.lab.run(client, lambda: socket.socket(family, socket.SOCK_RAW, protocol))
    with made as asking:
        asking.settimeout(SILENCE_SECONDS)
        asking.connect((str(to), 0))
        with contextlib.suppress(PermissionError):  # the node is told at once, and again below
            asking.send(echo)
        try:
            asking.recv(200)
        except ConnectionRefusedError:
            return REFUSED
        except TimeoutError:
            return SILENCE
    return "answered"


class TestInternalPolicyLocal:
    @pytest.mark.essential
    @pytest.mark.parametrize(
        ("client", "seen"), [("client-1", "client-1"), ("node", "node"), ("outside", "node")]
    )
    def test_only_endpoints_of_this_node_are_used(
        self, cluster: Cluster, flavour: Flavour, client: str, seen: str
    ) -> None:
        served = cluster.serve(flavour, LOCAL, "web-2", REMOTE, internalTrafficPolicy="Local")
        assert served.outcomes(client) == every((LOCAL, "web-2"), seen)

    @pytest.mark.essential
    @pytest.mark.parametrize("client", CLIENTS)
    def test_endpoints_elsewhere_alone_mean_silence(
        self, cluster: Cluster, flavour: Flavour, client: str
    ) -> None:
        served = cluster.serve(flavour, REMOTE, internalTrafficPolicy="Local")
        assert served.outcome(client) == SILENCE
        served.endpoints(REMOTE, LOCAL)
        assert served.outcome(client).startswith(LOCAL)

    @pytest.mark.essential
    def test_no_endpoints_anywhere_is_refused(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, internalTrafficPolicy="Local")
        for client in CLIENTS:
            assert served.outcome(client) == REFUSED

    def test_it_is_switched_on_and_off(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, REMOTE)
        assert served.outcome("client-1") == f"{REMOTE} saw client-1"
        served.change(internalTrafficPolicy="Local")
        assert served.outcome("client-1") == SILENCE
        served.change(internalTrafficPolicy="Cluster")
        assert served.outcome("client-1") == f"{REMOTE} saw client-1"


class TestServiceCIDR:
    """Beyond the node somebody refuses what he gets: only a drop here makes silence of it."""

    @pytest.fixture
    def elsewhere(self, cluster: Cluster, flavour: Flavour) -> Iterator[Address]:
        with cluster.having("outside", cluster_ip(50000, flavour.family)) as address:
            yield address

    @pytest.mark.parametrize("client", ["client-1", "node"])
    def test_an_address_of_no_service_is_dropped(
        self, cluster: Cluster, flavour: Flavour, elsewhere: Address, client: str
    ) -> None:
        if cluster.differs("unallocated-addresses-pass"):
            pytest.skip(f"{cluster.mode} differs: unallocated-addresses-pass")
        assert cluster.outcome(client, flavour.way, elsewhere, 9) == REFUSED
        cluster.apply(SERVICE_CIDR)
        cluster.settled()
        assert cluster.outcome(client, flavour.way, elsewhere, 9) == SILENCE
        cluster.remove(SERVICE_CIDR)
        cluster.settled()
        assert cluster.outcome(client, flavour.way, elsewhere, 9) == REFUSED

    @pytest.mark.essential
    @pytest.mark.parametrize("client", CLIENTS)
    def test_services_inside_it_are_served(
        self, cluster: Cluster, flavour: Flavour, client: str
    ) -> None:
        cluster.apply(SERVICE_CIDR)
        served = cluster.serve(flavour, LOCAL)
        assert served.outcome(client).startswith(LOCAL)
        assert served.outcome(client, port=81) == REFUSED
        served.remove()
        if cluster.differs("unallocated-addresses-pass"):
            assert not served.outcome(client).startswith(LOCAL)
        else:
            assert served.outcome(client) == SILENCE


class TestHairpin:
    @pytest.mark.essential
    def test_a_pod_reaches_itself(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, LOCAL)
        assert served.outcome(LOCAL) == f"{LOCAL} saw node"

    @pytest.mark.essential
    def test_others_keep_their_source(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, LOCAL, "web-2")
        assert served.outcomes(LOCAL) == {f"{LOCAL} saw node", f"web-2 saw {LOCAL}"}

    def test_through_another_port_of_the_same_pod(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, LOCAL)
        for port in (TCP_PORT, UDP_PORT):
            # Not the service: a pod's connection to its own address never leaves it.
            way: Way = "tcp" if port == TCP_PORT else "udp"
            own = cluster.lab.node(LOCAL).address(flavour.family)
            assert cluster.outcome(LOCAL, way, own, port) == f"{LOCAL} saw {LOCAL}"
        assert served.outcome(LOCAL) == f"{LOCAL} saw node"


def test_an_endpoint_on_the_node_itself_sees_every_source(
    cluster: Cluster, flavour: Flavour
) -> None:
    cluster.lab.serve("node")
    served = cluster.serve(flavour, "node")
    for client in ("client-1", "node"):
        assert served.outcome(client) == f"node saw {client}"
    # Masquerade happens where packets leave; these arrive.
    assert served.outcome("outside") == "node saw outside"

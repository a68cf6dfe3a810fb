"""What the operator's settings change for packets: masquerade, who is a pod, node addresses."""

import re
from collections.abc import Callable

import pytest
from tests.netns.cluster import (
    LOCAL,
    REFUSED,
    REMOTE,
    SECOND_ADDRESS,
    TCP4,
    UDP6,
    Cluster,
    Flavour,
    every,
)
from tests.netns.modes import MODES

from vipd.proxy.names import Family, parse_address

pytestmark = [pytest.mark.netns, pytest.mark.modes(*MODES)]

NewCluster = Callable[..., Cluster]


@pytest.fixture(params=[TCP4, UDP6], ids=str)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    """Two of the four, since each test has a daemon of its own."""
    assert isinstance(request.param, Flavour)
    return request.param


def configured(cluster: Cluster, text: str) -> Cluster:
    """Add a configuration file; flags that would win over its fields are taken away."""
    path = cluster.folder.parent / "vipd.yaml"
    path.write_text(f"apiVersion: vipd/v1alpha1\nkind: VipdConfiguration\n{text}\n")
    flags = list(cluster.daemon.arguments)
    at = flags.index("--cluster-cidr")
    del flags[at : at + 2]
    cluster.daemon.arguments = (*flags, "--config", str(path))
    return cluster


@pytest.mark.parametrize("pod", [LOCAL, REMOTE])
def test_masquerade_all(new_cluster: NewCluster, flavour: Flavour, pod: str) -> None:
    cluster = new_cluster("--masquerade-all")
    cluster.start()
    served = cluster.serve(flavour, pod)
    for client in ("client-1", "node", "outside"):
        assert served.outcome(client) == f"{pod} saw node"


def test_masquerade_all_concerns_cluster_ips_only(
    new_cluster: NewCluster, flavour: Flavour
) -> None:
    cluster = new_cluster("--masquerade-all")
    cluster.start()
    served = cluster.serve(flavour, LOCAL, type="NodePort", externalTrafficPolicy="Local")
    assert served.outcome("outside", *served.on_node()) == f"{LOCAL} saw outside"
    assert served.outcome("client-1", *served.on_node()) == f"{LOCAL} saw client-1"


def test_nobody_is_masqueraded_where_pods_cannot_be_told(
    new_cluster: NewCluster, flavour: Flavour
) -> None:
    cluster = configured(new_cluster(), "")
    cluster.start()
    served = cluster.serve(flavour, LOCAL, type="NodePort")
    for client in ("client-1", "outside"):
        assert served.outcome(client) == f"{LOCAL} saw {client}"
    assert served.outcome("outside", *served.on_node()) == f"{LOCAL} saw node"
    assert served.outcome(LOCAL) == f"{LOCAL} saw node"  # the hairpin needs it in any case
    # And without a detector there is no short-circuit: a pod is like anyone outside.
    served.change(externalTrafficPolicy="Local").endpoints(LOCAL, REMOTE)
    assert served.outcomes("client-1", *served.on_node()) == {f"{LOCAL} saw client-1"}


@pytest.mark.parametrize(
    "text",
    [
        "detectLocalMode: NodeCIDR",
        "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: client-}",
        "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: client-1}",
        "clusterCIDRs: [10.244.0.0/16, 'fd00:10:244::/48']",
    ],
    ids=["NodeCIDR", "InterfaceNamePrefix", "BridgeInterface", "ClusterCIDR"],
)
def test_the_ways_to_tell_pods(new_cluster: NewCluster, flavour: Flavour, text: str) -> None:
    cluster = configured(new_cluster(), text)
    cluster.start()
    served = cluster.serve(flavour, LOCAL, REMOTE, type="NodePort", externalTrafficPolicy="Local")
    assert served.outcomes("client-1") == every((LOCAL, REMOTE), "client-1")
    assert served.outcomes("outside") == every((LOCAL, REMOTE), "node")
    # The short-circuit, which needs the same detector.
    pods = (LOCAL,) if cluster.differs("local-list-for-all") else (LOCAL, REMOTE)
    assert served.outcomes("client-1", *served.on_node()) == every(pods, "client-1")
    assert served.outcomes("outside", *served.on_node()) == {f"{LOCAL} saw outside"}


@pytest.mark.parametrize(
    ("ranges", "primary", "second"),
    [
        ("primary", True, False),
        ("0.0.0.0/0,::/0", True, True),
        ("203.0.113.0/24,2001:db8:113::/64", False, True),
        ("192.168.77.0/24,fd00:77::/64", True, False),
    ],
)
def test_node_port_addresses(
    new_cluster: NewCluster, flavour: Flavour, ranges: str, primary: bool, second: bool
) -> None:
    cluster = new_cluster("--nodeport-addresses", ranges)
    cluster.start()
    with cluster.having("node", SECOND_ADDRESS[flavour.family], "eth0") as address:
        served = cluster.serve(flavour, LOCAL, type="NodePort")
        for client in ("outside", "node"):
            for place, answers in ((served.on_node()[0], primary), (address, second)):
                expected = f"{LOCAL} saw node" if answers else REFUSED
                assert served.outcome(client, place, served.node_port) == expected
    loopback = parse_address("127.0.0.1" if flavour.family is Family.IPV4 else "::1")
    assert served.outcome("node", loopback, served.node_port) == REFUSED
    served.endpoints()
    assert served.outcome("outside", served.on_node()[0], served.node_port) == REFUSED


def test_a_list_of_one_family_leaves_the_other_open(
    new_cluster: NewCluster, flavour: Flavour
) -> None:
    other = "fd00:77::/64" if flavour.family is Family.IPV4 else "192.168.77.0/24"
    cluster = new_cluster("--nodeport-addresses", other)
    cluster.start()
    with cluster.having("node", SECOND_ADDRESS[flavour.family], "eth0") as second:
        served = cluster.serve(flavour, LOCAL, type="NodePort")
        assert served.outcome("outside", second, served.node_port) == f"{LOCAL} saw node"


def test_another_masquerade_bit(new_cluster: NewCluster, flavour: Flavour) -> None:
    cluster = configured(
        new_cluster(),
        "masqueradeBit: 3\nclusterCIDRs: [10.244.0.0/16, 'fd00:10:244::/48']",
    )
    cluster.start()
    served = cluster.serve(flavour, LOCAL)
    assert served.outcome("client-1") == f"{LOCAL} saw client-1"
    assert served.outcome("outside") == f"{LOCAL} saw node"
    command = ["nft", "list", "ruleset"] if cluster.mode == "nftables" else ["iptables-save"]
    written = cluster.lab.exec("node", command, check=True).stdout
    assert re.search(r"\b0x0*8\b", written)
    assert not re.search(r"\b0x0*4000\b", written)

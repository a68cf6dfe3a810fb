"""What the operator's settings change for packets: masquerade, who is a pod, node addresses."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.netns.cluster import (
    LOCAL,
    MANY,
    REFUSED,
    REMOTE,
    SECOND_ADDRESS,
    TCP4,
    UDP6,
    Cluster,
    Flavour,
    every,
    until,
)
from tests.netns.modes import MODES

from vipd.backends.registry import NEED_OWN_ADDRESSES
from vipd.proxy.control import read
from vipd.proxy.names import Address, Family, parse_address
from vipd.proxy.views import SettingsView

KUBEADM = Path(__file__).parents[1] / "cases/configuration/kubeadm.conf"

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


@contextmanager
def second_address(cluster: Cluster, family: Family) -> Iterator[Address]:
    """Let the node have another address, and the daemon know it where its mode has to."""

    def is_told(there: bool) -> bool:
        known = str(SECOND_ADDRESS[family]) in settings(cluster).own_addresses
        return known == there or cluster.mode not in NEED_OWN_ADDRESSES

    with cluster.having("node", SECOND_ADDRESS[family], "eth0") as address:
        until(lambda: is_told(True), "the daemon knows the address")
        yield address
    until(lambda: is_told(False), "the daemon knows that it is gone")


def settings(cluster: Cluster) -> SettingsView:
    return msgspec.json.decode(read(cluster.socket, "settings"), type=SettingsView)


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

    def met(client: str, saw: str, *where: Any) -> set[str]:
        if cluster.differs("source-is-the-node"):  # then there is no saying whom they should see
            return every(served.pods(client, MANY, *where), saw)
        return served.outcomes(client, *where)

    assert met("client-1", "client-1") == every((LOCAL, REMOTE), "client-1")
    assert met("outside", "node") == every((LOCAL, REMOTE), "node")
    # The short-circuit, which needs the same detector.
    pods = (LOCAL,) if cluster.differs("local-list-for-all") else (LOCAL, REMOTE)
    assert met("client-1", "client-1", *served.on_node()) == every(pods, "client-1")
    assert met("outside", "outside", *served.on_node()) == {f"{LOCAL} saw outside"}


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
    with second_address(cluster, flavour.family) as address:
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
    with second_address(cluster, flavour.family) as second:
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
    by_nft = cluster.mode in ("nftables", "userspace")
    command = ["nft", "list", "ruleset"] if by_nft else ["iptables-save"]
    written = cluster.lab.exec("node", command, check=True).stdout
    # Where every connection is the node's own, nothing has to be marked.
    is_marked = re.search(r"\b0x0*8\b", written) is not None
    assert is_marked != cluster.differs("source-is-the-node")
    assert not re.search(r"\b0x0*4000\b", written)


def test_kubeadms_file_and_what_changes_in_it_while_it_is_used(new_cluster: NewCluster) -> None:
    cluster = configured(new_cluster(), "")
    file = cluster.folder.parent / "vipd.yaml"
    kubeadm = KUBEADM.read_text()
    file.write_text(kubeadm)
    cluster.start()
    served = cluster.serve(TCP4, LOCAL, type="NodePort")
    served.change(externalIPs=[str(served.outside_address)])
    external = (served.outside_address, 80)
    assert served.outcome("client-1") == f"{LOCAL} saw client-1"
    assert served.outcome("outside", *external) == f"{LOCAL} saw node"
    pid = cluster.status().pid
    everybody = kubeadm.replace("masqueradeAll: false", "masqueradeAll: true")
    file.write_text(f"{everybody}featureGates: {{AllowServiceExternalIPs: false}}\n")
    until(lambda: served.outcome("client-1") == f"{LOCAL} saw node", "everybody is masqueraded")
    until(lambda: served.outcome("outside", *external) != f"{LOCAL} saw node", "it is not served")
    assert served.outcome("outside", *served.on_node()) == f"{LOCAL} saw node"
    file.write_text(everybody.replace("nodePortAddresses: null", "nodePortAddresses: [0]"))
    until(
        lambda: any("nodePortAddresses[0]" in one for one in cluster.status().notes),
        "it is refused",
    )
    assert served.outcome("outside", *served.on_node()) == f"{LOCAL} saw node"
    file.write_text(kubeadm.replace("nodePortAddresses: null", "nodePortAddresses: [10.0.0.0/8]"))
    until(lambda: served.outcome("outside", *served.on_node()) == REFUSED, "ranges count")
    own = "---\napiVersion: vipd/v1alpha1\nkind: VipdConfiguration\n"
    file.write_text(f"{kubeadm}{own}drainSeconds: 7\noomScoreAdj: 700\nmasqueradeBit: 3\n")
    named = 'at the next start only" fields=masqueradeBit\n'
    until(lambda: named in f"{cluster.daemon.log_tail(20)}\n", "the rest is named")
    assert "section=drainSeconds" in cluster.daemon.log_tail(20)
    assert cluster.status().notes[-1].endswith("at the next start only: masqueradeBit")
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "700\n"
    assert cluster.status().pid == pid

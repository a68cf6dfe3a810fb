"""What others change of ours is put right in every mode, and what is theirs stays theirs."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from tests.netns.cluster import LOCAL, TCP4, TCP6, Cluster, until
from tests.netns.modes import Mode

from vipd.bench.lab import Lab

pytestmark = pytest.mark.netns

NewCluster = Callable[..., Cluster]

FOREIGN = (
    "iptables -t nat -N DOCKER; iptables -t nat -I PREROUTING -j DOCKER; "
    "iptables -I FORWARD -s 192.0.2.7 -j DROP; iptables -I FORWARD -s 192.0.2.8 -j DROP; "
    "iptables -D FORWARD -s 192.0.2.8 -j DROP; "
    "ipset create others hash:ip; ipset add others 192.0.2.9"
)
FOREIGN_AWAY = (
    "iptables -t nat -D PREROUTING -j DOCKER",
    "iptables -t nat -X DOCKER",
    "iptables -D FORWARD -s 192.0.2.7 -j DROP",
    "ipset destroy others",
)
"""The next daemon would take the variant of iptables that holds the host's rules."""
DAMAGE = {
    "iptables-legacy": (
        "iptables -t nat -F PREROUTING",
        "iptables -t nat -F VIPD-DISPATCH; ip6tables -t nat -F VIPD-DISPATCH",
        "ipset flush VIPD-SERVED-4",
        "nft flush ruleset",
    ),
    "iptables-nft": (
        "iptables -t nat -F PREROUTING",
        "iptables -t nat -F VIPD-DISPATCH",
        "ipset flush VIPD-SERVED-4",
        "nft flush ruleset",
    ),
    "ipvs": (
        "ipvsadm -C",
        "iptables -t mangle -F INPUT; iptables -t nat -F",
        "ip route flush table local proto 118",
        "nft flush ruleset",
    ),
    "userspace": (
        "nft flush chain ip vipd-userspace arriving",
        "ip route flush table local proto 119",
        "nft flush ruleset",
    ),
}


def on_the_node(cluster: Cluster, command: str) -> None:
    done = cluster.lab.exec("node", ["sh", "-ec", command])
    assert done.returncode == 0, done.stderr


def _repaired(cluster: Cluster, times: int) -> bool:
    told = cluster.status().repairs
    return told is not None and told.count == times


def listed(cluster: Cluster) -> list[str]:
    """Tables of nftables, local routes, IPVS services and rules of ours, sorted."""
    there = sorted(one for one in cluster.tables() if " vipd" in one)
    lines = [
        line for one in there for line in cluster.nft("list", "table", *one.split()).splitlines()
    ]
    commands = ["ip route show table local proto 118", "ip route show table local proto 119"]
    if cluster.mode == "ipvs":
        commands += ["ipvsadm -Sn", "iptables-save | grep VIPD", "ip6tables-save | grep VIPD"]
    for one in commands:
        lines += cluster.lab.exec("node", ["sh", "-c", one]).stdout.splitlines()
    return sorted(line for line in lines if not line.startswith(":"))


@pytest.fixture
def foreign_away(lab: Lab, mode: Mode) -> Iterator[None]:
    """Leave nothing of what the test lets others have: the lab is the whole session's."""
    yield
    for command in FOREIGN_AWAY if mode.mode == "iptables" else ():
        lab.exec("node", command.split())  # a test that failed may not have come so far


@pytest.mark.modes(*DAMAGE)
@pytest.mark.essential
@pytest.mark.usefixtures("foreign_away")
def test_damage_is_repaired_and_what_others_have_is_left(
    new_cluster: NewCluster, mode: Mode
) -> None:
    cluster = new_cluster()
    cluster.start()
    served = {flavour: cluster.serve(flavour, LOCAL) for flavour in (TCP4, TCP6)}
    cluster.settled()
    if mode.mode == "iptables":
        on_the_node(cluster, FOREIGN)
    whole = listed(cluster)
    for number, damage in enumerate(DAMAGE[mode.name], 1):
        on_the_node(cluster, damage)
        until(partial(_repaired, cluster, number), f"repaired: {damage}")
        for flavour, one in served.items():
            assert one.ask("client-1").pod == LOCAL, (damage, flavour)
        if mode.mode == "iptables":
            assert cluster.matches_the_kernel(), damage
        assert listed(cluster) == whole, damage
    if mode.mode == "iptables":
        on_the_node(cluster, "ipset test others 192.0.2.9")

"""What kube-proxy leaves, on the real kernel: it goes wholly, and nothing else does."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.kube_proxy_rules import (
    FAMILIES,
    addresses,
    foreign,
    iptables_mode,
    ipvs_mode,
    ipvs_sets,
    nftables_mode,
)

from vipd.backends.kube_proxy import SETS, InTable, in_table, set_name
from vipd.proxy.names import Family

TOOLS = ("iptables-legacy", "iptables-nft", "ipset", "nft")
kernel = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(
        not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)} (Debian's packages)"
    ),
]
GLANCE = """
import asyncio, json
from vipd.backends import kube_proxy
print(json.dumps(asyncio.run(kube_proxy.at_a_glance())))
"""
PROGRAM = """
import asyncio, msgspec, sys
from vipd.backends import kube_proxy
print(msgspec.json.encode(asyncio.run(kube_proxy.remove(dry_run=sys.argv[1] == "dry"))).decode())
"""
VARIANTS = ("legacy", "nft")
COUNTERS = re.compile(r" \[\d+:\d+\]$")


class Node:
    """A network namespace, what stands in it, and vipd's cleaning in it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *command: str, text: str = "") -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, *command],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr, text)
        return done.stdout

    def restore(self, variant: str, family: Family, text: str) -> None:
        self.run(f"{FAMILIES[family]}tables-{variant}-restore", "--noflush", text=text)

    def remove(self, *, dry_run: bool = False, tools: str = "") -> tuple[list[str], list[str]]:
        """Return what is removed and what stays; `tools` is a directory to look in first."""
        path = f"PATH={tools}:{os.environ['PATH']}"
        way = "dry" if dry_run else "really"
        printed = self.run("env", path, sys.executable, "-c", PROGRAM, way)
        outcome = json.loads(printed)
        return outcome["removed"], outcome["failed"]

    def at_a_glance(self) -> list[str]:
        found: list[str] = json.loads(self.run(sys.executable, "-c", GLANCE))
        return found

    def state(self) -> dict[str, str]:
        """Return everything that there is, as the tools print it; counters of policies left out."""
        saves = [f"{word}tables-{one}-save" for word in FAMILIES.values() for one in VARIANTS]
        listings = [*([one] for one in saves), ["ipset", "save"], ["ip", "-d", "address"]]
        if shutil.which("ipvsadm") and has_ipvs():
            listings.append(["ipvsadm", "-Sn"])
        found = {" ".join(one): self.run(*one) for one in listings}
        found["nft"] = "\n".join(
            self.run("nft", "list", "table", *table.split(" ")[1:])
            for table in self.run("nft", "list", "tables").splitlines()
            if table.split(" ")[2] not in ("filter", "nat", "mangle")  # iptables-nft's
        )
        return {
            name: "\n".join(
                COUNTERS.sub("", line) for line in text.splitlines() if not line.startswith("#")
            )
            for name, text in found.items()
        }


@pytest.fixture
def node() -> Iterator[Node]:
    name = f"vipd-kp-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield Node(name)
    subprocess.run(["ip", "netns", "delete", name], check=True)


def has_ipvs() -> bool:
    return Path("/proc/net/ip_vs").exists()


def put_foreign(node: Node) -> None:
    for family in Family:
        for variant in VARIANTS:
            node.restore(variant, family, foreign(family))
        table = f"table {FAMILIES[family]} vipd {{\n chain KUBE-SERVICES {{\n}}\n}}\n"
        node.run("nft", "-f", "-", text=table)
    node.run(
        "ipset",
        "restore",
        text="create KUBE-ROUTER-SVIP hash:ip\nadd KUBE-ROUTER-SVIP 10.96.0.10\n"
        "create KUBE-6-LOAD-BALANCER-SOURCE-CI hash:ip\ncreate VIPD-CLUSTER-IP hash:ip\n",
    )


def check_all_goes(node: Node, before: dict[str, str]) -> list[str]:
    """Check that cleaning leads from the state now to the one before; return what it told."""
    now = node.state()
    assert now != before
    would, failed = node.remove(dry_run=True)
    assert would
    assert not failed
    assert node.state() == now
    assert node.remove() == (would, [])
    assert node.state() == before
    assert node.remove() == ([], [])
    return would


@pytest.mark.parametrize("variant", VARIANTS)
class TestOfIptables:
    pytestmark = kernel

    def test_iptables_mode_goes_and_the_rules_of_others_stay(
        self, node: Node, variant: str
    ) -> None:
        put_foreign(node)
        before = node.state()
        for family in Family:
            node.restore(variant, family, iptables_mode(family))
        seen = node.at_a_glance()
        assert {one.split(" ")[0] for one in seen} == {
            f"{word}tables-{variant}" for word in FAMILIES.values()
        }
        told = check_all_goes(node, before)
        assert set(seen) < set(told)
        assert node.at_a_glance() == [], "what others have is none of it"
        for word in FAMILIES.values():
            tool = f"{word}tables-{variant}"
            assert f"{tool} nat chain KUBE-MARK-MASQ" in told
            assert f"{tool} nat chains KUBE-SEP-… (1)" in told
            assert f"{tool} mangle chain KUBE-PROXY-CANARY" in told
            assert (
                f"{tool} nat rule PREROUTING -m comment --comment "
                '"kubernetes service portals" -j KUBE-SERVICES' in told
            )
        assert not any("FIREWALL" in one and "PROXY" not in one for one in told)

    def test_rules_and_sets_of_ipvs_mode_go(self, node: Node, variant: str) -> None:
        put_foreign(node)
        before = node.state()
        for family in Family:
            node.run("ipset", "restore", text=ipvs_sets(family))
            node.restore(variant, family, ipvs_mode(family))
        told = check_all_goes(node, before)
        assert "ipset KUBE-6-LOAD-BALANCER-SOURCE-CID" in told
        assert sum(one.startswith("ipset ") for one in told) == 2 * len(SETS)

    def test_marking_stays_while_another_program_uses_it(self, node: Node, variant: str) -> None:
        mark = "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n"
        chains = ":KUBE-MARK-MASQ - [0:0]\n:CNI-DN-1 - [0:0]\n"
        user = f"*nat\n{chains}{mark}-A CNI-DN-1 -j KUBE-MARK-MASQ\nCOMMIT\n"
        node.restore(variant, Family.IPV4, f"*mangle\nCOMMIT\n*filter\nCOMMIT\n{user}")
        put_foreign(node)
        before = node.state()
        node.restore(variant, Family.IPV4, iptables_mode(Family.IPV4))
        told = check_all_goes(node, before)
        assert f"iptables-{variant} nat chain KUBE-POSTROUTING" in told
        assert f"iptables-{variant} nat chain KUBE-MARK-MASQ" not in told

    def test_a_chain_that_others_lead_to_is_emptied_and_told(
        self, node: Node, variant: str
    ) -> None:
        mine = "*filter\n:MINE - [0:0]\n-A MINE -j KUBE-FORWARD\nCOMMIT\n"
        node.restore(variant, Family.IPV4, iptables_mode(Family.IPV4) + mine)
        removed, failed = node.remove()
        stays = [
            f"iptables-{variant} filter chain KUBE-FORWARD stays, empty: rules of MINE lead to it"
        ]
        assert failed == stays
        assert f"iptables-{variant} filter chain KUBE-SERVICES" in removed
        chains = node.run(f"iptables-{variant}", "-S").splitlines()[3:]
        assert chains == ["-N KUBE-FORWARD", "-N MINE", "-A MINE -j KUBE-FORWARD"]
        assert node.remove() == ([], stays)

    def test_a_set_that_others_use_stays_and_the_rest_goes(self, node: Node, variant: str) -> None:
        node.run("ipset", "restore", text=ipvs_sets(Family.IPV4))
        rule = "-A INPUT -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT"
        node.run(f"iptables-{variant}", *rule.split())
        removed, failed = node.remove()
        assert [one.split(":")[0] for one in failed] == ["ipset KUBE-CLUSTER-IP stays"]
        assert sum(one.startswith("ipset ") for one in removed) == len(SETS) - 1
        assert node.run("ipset", "list", "-name").split() == ["KUBE-CLUSTER-IP"]

    def test_a_table_that_is_refused_stays_and_the_rest_goes(
        self, node: Node, variant: str, tmp_path: Path
    ) -> None:
        name = f"ip6tables-{variant}-restore"
        broken = tmp_path / name
        broken.write_text(
            "#!/bin/bash\ntext=$(cat)\n"
            '[[ $text == "*nat"* ]] && { echo "some reason" >&2; exit 1; }\n'
            f'exec {shutil.which(name)} "$@" <<< "$text"\n'
        )
        broken.chmod(0o755)
        for family in Family:
            node.restore(variant, family, iptables_mode(family))
        removed, failed = node.remove(tools=str(tmp_path))
        assert [one.split(":")[0] for one in failed] == [f"ip6tables-{variant} nat"]
        assert "some reason" in failed[0]
        assert f"ip6tables-{variant} filter chain KUBE-SERVICES" in removed
        assert f"ip6tables-{variant} nat chain KUBE-SERVICES" not in removed
        assert "KUBE" not in node.run(f"iptables-{variant}-save")
        assert "KUBE-SERVICES" in node.run(f"ip6tables-{variant}-save", "-t", "nat")


class TestOfTheRest:
    pytestmark = kernel

    def test_nftables_mode_goes_and_the_tables_of_others_stay(self, node: Node) -> None:
        put_foreign(node)
        for word in FAMILIES.values():
            chain = "chain x {\n type filter hook input priority 0\n}"
            node.run("nft", "-f", "-", text=f"table {word} kube-proxy-not {{\n {chain}\n}}\n")
        node.run("nft", "add", "table", "inet", "kube-proxy")
        before = node.state()
        for family in Family:
            node.run("nft", "-f", "-", text=nftables_mode(family))
        told = check_all_goes(node, before)
        assert told == ["nft table ip kube-proxy", "nft table ip6 kube-proxy"]

    def test_looking_loads_no_table(self, node: Node) -> None:
        read = ("cat", "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names")
        assert node.remove() == ([], [])
        assert node.run(*read) == ""
        assert node.run("nft", "list", "tables") == ""

    def test_virtual_servers_of_kube_proxy_go_and_those_of_others_stay(self, node: Node) -> None:
        subprocess.run(["/sbin/modprobe", "-qa", "ip_vs", "dummy"], check=False)
        if not has_ipvs() or not shutil.which("ipvsadm"):
            pytest.skip("no IPVS in this kernel, or no ipvsadm; tests/vm runs this with one")
        node.run("ip", "link", "add", "eth9", "type", "dummy")
        for address in ("192.0.2.1/24", "2001:db8::1/64"):
            node.run("ip", "address", "add", address, "dev", "eth9", "nodad")
        node.run("ip", "link", "set", "eth9", "up")
        put_foreign(node)
        node.run(
            "ipset",
            "restore",
            text="create VIPD-IPVS-ADDRESSES hash:ip,port\n"
            "create VIPD-IPVS-SERVED hash:ip,port\nadd VIPD-IPVS-SERVED 10.96.0.10,tcp:443\n",
        )
        others = (
            "-A -t 203.0.113.1:80 -s wlc\n-a -t 203.0.113.1:80 -r 10.9.9.9:80 -m -w 3\n"
            "-A -t 192.0.2.1:8443 -s rr\n-A -u 192.0.2.1:30080 -s rr\n-A -t 10.9.0.1:30080 -s rr\n"
            "-A -t 10.96.0.10:443 -s rr\n-A -f 7 -s rr\n-A -t [2001:db8::1]:8443 -s rr\n"
        )
        node.run("ipvsadm", "-R", text=others)
        before = node.state()
        node.run("ip", "link", "add", "kube-ipvs0", "type", "dummy")
        servers = []
        for family in Family:
            cluster, balancer, _, place, _ = addresses(family)
            node.run("ip", "address", "add", cluster, "dev", "kube-ipvs0")
            node.run("ipset", "restore", text=ipvs_sets(family))
            node.restore("nft", family, ipvs_mode(family))
            own = "192.0.2.1" if family is Family.IPV4 else "2001:db8::1"
            bracket = "{}" if family is Family.IPV4 else "[{}]"
            servers += [
                f"-{flag} {bracket.format(address)}:{port}"
                for flag, address, port in (
                    ("t", cluster, 80),
                    ("u", cluster, 53),  # on the device, in no set
                    ("t", balancer, 80),  # in a set, not on the device
                    ("t", own, 30080),  # a node port
                )
            ]
            for one in servers[-4:]:
                udp = place.replace(":8080", ":53") if one.startswith("-u") else place
                node.run("ipvsadm", "-R", text=f"-A {one} -s rr -p 10800\n-a {one} -r {udp} -m\n")
        told = check_all_goes(node, before)
        assert {one for one in told if one.startswith("virtual ")} == {
            f"virtual server {one}" for one in servers
        }
        assert "interface kube-ipvs0" in told


def test_names_of_sets_are_cut_as_kube_proxy_cuts_them() -> None:
    names = {name: set_name(Family.IPV6, name) for name in SETS}
    assert names["KUBE-CLUSTER-IP"] == "KUBE-6-CLUSTER-IP"
    assert names["KUBE-LOAD-BALANCER-SOURCE-CIDR"] == "KUBE-6-LOAD-BALANCER-SOURCE-CID"
    assert len(set(names.values())) == len(SETS)


def test_a_rule_that_only_speaks_of_a_chain_is_no_jump() -> None:
    saved = (
        "*nat\n:INPUT ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n"
        '-A INPUT -m comment --comment "say \\"go\\" -j KUBE-SERVICES now" -j ACCEPT\n'
        '-A INPUT -m comment --comment "x" -g KUBE-SERVICES\nCOMMIT\n'
    )
    goto = '-A INPUT -m comment --comment "x" -g KUBE-SERVICES'
    assert in_table("nat", saved) == InTable((goto,), ("KUBE-SERVICES",))

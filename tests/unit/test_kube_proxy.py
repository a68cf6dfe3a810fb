"""What kube-proxy leaves, on the real kernel: it goes wholly, and everybody else's stays as it is.

The rules are those that kube-proxy 1.36 writes for a service with a cluster IP, a node port, a load
balancer address with source ranges, and session affinity.
"""

import json
import os
import shutil
import subprocess
import sys
from base64 import b32encode
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

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
PROGRAM = """
import asyncio, msgspec, sys
from vipd.backends import kube_proxy
print(msgspec.json.encode(asyncio.run(kube_proxy.remove(dry_run=sys.argv[1] == "dry"))).decode())
"""
FAMILIES = {Family.IPV4: "ip", Family.IPV6: "ip6"}
VARIANTS = ("legacy", "nft")
SERVICE = "shop/web:httptcp"


def hashed(text: str) -> str:
    return b32encode(sha256(text.encode()).digest()).decode()[:16]


SVC, EXT, FW, SVL = (f"KUBE-{kind}-{hashed(SERVICE)}" for kind in ("SVC", "EXT", "FW", "SVL"))


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

    def remove(self, *, dry_run: bool = False) -> tuple[list[str], list[str]]:
        printed = self.run(sys.executable, "-c", PROGRAM, "dry" if dry_run else "really")
        outcome = json.loads(printed)
        return outcome["removed"], outcome["failed"]

    def state(self) -> dict[str, str]:
        """Return everything that there is, as the tools print it."""
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
            name: "\n".join(line for line in text.splitlines() if not line.startswith("#"))
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


def addresses(family: Family) -> tuple[str, str, str, str, str]:
    """Return cluster IP, load balancer address, endpoint, its place, and loopback."""
    if family is Family.IPV4:
        return "10.96.0.10", "192.0.2.9", "10.244.1.5", "10.244.1.5:8080", "127.0.0.0/8"
    return "fd00:96::a", "2001:db8::9", "fd00:244::5", "[fd00:244::5]:8080", "::1/128"


MANGLE = "*mangle\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n"
JUMPS = """\
-I INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" \
-j KUBE-PROXY-FIREWALL
-I OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" \
-j KUBE-PROXY-FIREWALL
-I FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" \
-j KUBE-PROXY-FIREWALL
-I FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
"""
MARKING = """\
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" \
-j MASQUERADE --random-fully
-I POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-I OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-I PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
"""
FORWARDING = """\
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 \
-j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
"""


def declared(*chains: str) -> str:
    return "".join(f":{one} - [0:0]\n" for one in chains)


def iptables_mode(family: Family) -> str:
    cluster, balancer, endpoint, place, loopback = addresses(family)
    sep = f"KUBE-SEP-{hashed(SERVICE + place)}"
    filters = ("KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-FORWARD", "KUBE-NODEPORTS")
    nats = ("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ")
    to = "-p tcp -m tcp"
    return (
        MANGLE
        + "*filter\n"
        + declared(*filters, "KUBE-PROXY-FIREWALL", "KUBE-PROXY-CANARY")
        + JUMPS
        + '-I OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals"'
        + " -j KUBE-SERVICES\n"
        + '-I FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals"'
        + " -j KUBE-SERVICES\n"
        + '-I INPUT -m comment --comment "kubernetes health check service ports"'
        + " -j KUBE-NODEPORTS\n"
        + "-I INPUT -m conntrack --ctstate NEW -m comment --comment "
        + '"kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES\n'
        + FORWARDING
        + f'-A KUBE-SERVICES -d {cluster} {to} -m comment --comment "shop/none has no endpoints"'
        + " --dport 81 -j REJECT\n"
        + f"-A KUBE-PROXY-FIREWALL -d {balancer} {to} --dport 80 -j DROP\n"
        + f"-A KUBE-NODEPORTS {to} --dport 31000 -j ACCEPT\n"
        + "COMMIT\n*nat\n"
        + declared(*nats, "KUBE-PROXY-CANARY", SVC, EXT, FW, SVL, sep)
        + MARKING
        + f'-A KUBE-SERVICES -d {cluster} {to} -m comment --comment "shop/web:http cluster IP"'
        + f" --dport 80 -j {SVC}\n"
        + f'-A KUBE-SERVICES -d {balancer} {to} -m comment --comment "shop/web:http loadbalancer '
        + f'IP" --dport 80 -j {FW}\n'
        + '-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be'
        + f' the last rule in this chain" ! -d {loopback} -m addrtype --dst-type LOCAL'
        + " -j KUBE-NODEPORTS\n"
        + f"-A KUBE-NODEPORTS {to} --dport 30080 -j {EXT}\n"
        + f"-A {EXT} -j KUBE-MARK-MASQ\n-A {EXT} -j {SVC}\n"
        + f"-A {FW} -s {endpoint} -j {EXT}\n"
        + f"-A {FW} -m comment --comment "
        + '"other traffic to shop/web:http will be dropped by KUBE-PROXY-FIREWALL"\n'
        + f"-A {SVC} ! -s {endpoint} -d {cluster} {to} --dport 80 -j KUBE-MARK-MASQ\n"
        + f"-A {SVC} -m recent --name {sep} --rcheck --seconds 10800 --reap -j {sep}\n"
        + f"-A {SVC} -m statistic --mode random --probability 0.5000000000 -j {sep}\n"
        + f"-A {SVC} -j {sep}\n-A {SVL} -j {sep}\n"
        + f"-A {sep} -s {endpoint} -j KUBE-MARK-MASQ\n"
        + f"-A {sep} {to} -m recent --name {sep} --set -j DNAT --to-destination {place}\n"
        + "COMMIT\n"
    )


def ipvs_mode(family: Family) -> str:
    filters = ("KUBE-FORWARD", "KUBE-NODE-PORT", "KUBE-PROXY-FIREWALL", "KUBE-IPVS-FILTER")
    sets = {name: set_name(family, name) for name in SETS}

    def match(name: str, flags: str) -> str:
        return f"-m set --match-set {sets[name]} {flags}"

    return (
        MANGLE
        + "*filter\n"
        + declared(*filters, "KUBE-SOURCE-RANGES-FIREWALL", "KUBE-IPVS-OUT-FILTER")
        + JUMPS
        + '-I INPUT -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-FILTER\n'
        + '-I OUTPUT -m comment --comment "kubernetes ipvs access filter"'
        + " -j KUBE-IPVS-OUT-FILTER\n"
        + '-I INPUT -m comment --comment "kubernetes health check rules" -j KUBE-NODE-PORT\n'
        + FORWARDING
        + f"-A KUBE-NODE-PORT {match('KUBE-HEALTH-CHECK-NODE-PORT', 'dst')} -j ACCEPT\n"
        + f"-A KUBE-PROXY-FIREWALL {match('KUBE-LOAD-BALANCER-FW', 'dst,dst')}"
        + " -j KUBE-SOURCE-RANGES-FIREWALL\n"
        + "-A KUBE-SOURCE-RANGES-FIREWALL "
        + f"{match('KUBE-LOAD-BALANCER-SOURCE-CIDR', 'dst,dst,src')} -j RETURN\n"
        + "-A KUBE-SOURCE-RANGES-FIREWALL "
        + f"{match('KUBE-LOAD-BALANCER-SOURCE-IP', 'dst,dst,src')} -j RETURN\n"
        + "-A KUBE-SOURCE-RANGES-FIREWALL -j DROP\n"
        + f"-A KUBE-IPVS-FILTER {match('KUBE-LOAD-BALANCER', 'dst,dst')} -j RETURN\n"
        + f"-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW {match('KUBE-IPVS-IPS', 'dst')}"
        + " -j REJECT\n"
        + "COMMIT\n*nat\n"
        + declared("KUBE-SERVICES", "KUBE-POSTROUTING", "KUBE-NODE-PORT", "KUBE-LOAD-BALANCER")
        + declared("KUBE-MARK-MASQ", "KUBE-MARK-DROP")
        + MARKING
        + f"-A KUBE-POSTROUTING {match('KUBE-LOOP-BACK', 'dst,dst,src')} -j MASQUERADE\n"
        + f"-A KUBE-SERVICES {match('KUBE-LOAD-BALANCER', 'dst,dst')} -j KUBE-LOAD-BALANCER\n"
        + f"-A KUBE-SERVICES {match('KUBE-CLUSTER-IP', 'src,dst')} -j KUBE-MARK-MASQ\n"
        + "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT\n"
        + f"-A KUBE-NODE-PORT -p tcp {match('KUBE-NODE-PORT-TCP', 'dst')} -j KUBE-MARK-MASQ\n"
        + "-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ\n"
        + "COMMIT\n"
    )


def ipvs_sets(family: Family) -> str:
    cluster, balancer, endpoint, *_ = addresses(family)
    inet = f"family inet{'6' if family is Family.IPV6 else ''} maxelem 65536"
    lines = []
    for name in SETS:
        full = set_name(family, name)
        if name.endswith(("-TCP", "-UDP", "CHECK-NODE-PORT")):
            lines.append(f"create {full} bitmap:port range 0-65535")
        elif name == "KUBE-IPVS-IPS":
            lines.append(f"create {full} hash:ip {inet}")
        elif name.endswith("CIDR"):
            lines.append(f"create {full} hash:ip,port,net {inet}")
        elif name.endswith(("SOURCE-IP", "LOOP-BACK")):
            lines.append(f"create {full} hash:ip,port,ip {inet}")
        else:
            lines.append(f"create {full} hash:ip,port {inet}")
    lines += [
        f"add {set_name(family, name)} {entry}"
        for name, entry in (
            ("KUBE-CLUSTER-IP", f"{cluster},tcp:80"),
            ("KUBE-LOAD-BALANCER", f"{balancer},tcp:80"),
            ("KUBE-LOOP-BACK", f"{endpoint},tcp:8080,{endpoint}"),
            ("KUBE-NODE-PORT-TCP", "30080"),
            ("KUBE-IPVS-IPS", cluster),
        )
    ]
    return "\n".join(lines) + "\n"


NFTABLES_MODE = """
table {word} kube-proxy {{
  comment "rules for kube-proxy"
  set cluster-ips {{ type {type}; comment "Active ClusterIPs"; elements = {{ {cluster} }} }}
  map service-ips {{
    type {type} . inet_proto . inet_service : verdict
    elements = {{ {cluster} . tcp . 80 : goto service-ULMVA6XW-shop/web/tcp/http }}
  }}
  chain service-ULMVA6XW-shop/web/tcp/http {{
    meta l4proto tcp dnat {word} to numgen random mod 1 map {{ 0 : {endpoint} . 8080 }}
  }}
  chain services {{ {word} daddr . meta l4proto . th dport vmap @service-ips }}
  chain nat-prerouting {{ type nat hook prerouting priority -100; jump services }}
  chain nat-output {{ type nat hook output priority -100; jump services }}
}}
table {word} kube-proxy-not {{ chain x {{ type filter hook input priority 0; }} }}
"""


def nftables_mode(family: Family) -> str:
    cluster, _, endpoint, *_ = addresses(family)
    return NFTABLES_MODE.format(
        word=FAMILIES[family],
        type="ipv4_addr" if family is Family.IPV4 else "ipv6_addr",
        cluster=cluster,
        endpoint=endpoint,
    )


FOREIGN = (
    """\
*mangle
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-IPTABLES-HINT - [0:0]
-A INPUT -j TTLKEEP
COMMIT
""".replace("-A INPUT -j TTLKEEP\n", "")
    + (
        """\
*filter
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-NWPLCY-DEFAULT-ABCDEFGH - [0:0]
:KUBE-POD-FW-ABCDEFGHABCDEFGH - [0:0]
:KUBE-ROUTER-FORWARD - [0:0]
:KUBE-ROUTER-SERVICES - [0:0]
:KUBE-SVC-ABCDEFGHABCDEFGH - [0:0]
:VIPD-SERVICES - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -m comment --comment "not a jump: -j KUBE-SERVICES, \\"-j KUBE-NODEPORTS\\"" -j ACCEPT
-A FORWARD -m comment --comment "kube-router netpol" -j KUBE-ROUTER-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j VIPD-SERVICES
-A FORWARD -j DOCKER-USER
-A OUTPUT -j KUBE-FIREWALL
-A DOCKER-USER -j RETURN
-A KUBE-FIREWALL ! -s {loopback} -d {loopback} -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT \
-j DROP
-A KUBE-ROUTER-FORWARD -g KUBE-POD-FW-ABCDEFGHABCDEFGH
-A VIPD-SERVICES -m comment --comment "shop/web:http has no endpoints" -j DROP
COMMIT
*nat
:DOCKER - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-SEP-abcdefghabcdefgh - [0:0]
:KUBE-SVC-ABCDEFGH - [0:0]
:KUBE-SVC-ABCDEFGHABCDEFGHA - [0:0]
:VIPD-MARK-MASQ - [0:0]
:VIPD-SERVICES - [0:0]
:VIPD-SVC-ABCDEFGHABCDEFGH - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A PREROUTING -m comment --comment "kubernetes service portals" -j VIPD-SERVICES
-A POSTROUTING -s {endpoint} ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A VIPD-SERVICES -d {cluster} -p tcp -m tcp --dport 80 -j VIPD-SVC-ABCDEFGHABCDEFGH
-A VIPD-SVC-ABCDEFGHABCDEFGH -p tcp -j DNAT --to-destination {place}
COMMIT
"""
    )
)


def put_foreign(node: Node) -> None:
    for family in Family:
        cluster, _, endpoint, place, loopback = addresses(family)
        text = FOREIGN.format(cluster=cluster, endpoint=endpoint, place=place, loopback=loopback)
        for variant in VARIANTS:
            node.restore(variant, family, text)
        word = FAMILIES[family]
        node.run(
            "nft", "-f", "-", text=f"table {word} vipd {{ chain KUBE-SERVICES {{ accept; }} }}"
        )
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
        told = check_all_goes(node, before)
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
        foreign = (
            "*nat\n:KUBE-MARK-MASQ - [0:0]\n:CNI-DN-1 - [0:0]\n-A CNI-DN-1 -j KUBE-MARK-MASQ\n"
        )
        marking = "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\nCOMMIT\n"
        node.restore(variant, Family.IPV4, MANGLE.replace(":KUBE-PROXY-CANARY - [0:0]\n", ""))
        node.restore(variant, Family.IPV4, "*filter\nCOMMIT\n" + foreign + marking)
        before = node.state()
        node.restore(variant, Family.IPV4, iptables_mode(Family.IPV4).replace(MARKING, ""))
        # the declaration has emptied it
        node.run(
            f"iptables-{variant}",
            *["-t", "nat", "-A", "KUBE-MARK-MASQ", "-j", "MARK", "--set-xmark", "0x4000/0x4000"],
        )
        check_all_goes(node, before)

    def test_a_chain_that_others_lead_to_is_emptied_and_told(
        self, node: Node, variant: str
    ) -> None:
        node.restore(
            variant,
            Family.IPV4,
            iptables_mode(Family.IPV4)
            + "*filter\n:MINE - [0:0]\n-A MINE -j KUBE-FORWARD\nCOMMIT\n",
        )
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
        node.run(
            f"iptables-{variant}",
            *[
                "-A",
                "INPUT",
                "-m",
                "set",
                "--match-set",
                "KUBE-CLUSTER-IP",
                "dst,dst",
                "-j",
                "ACCEPT",
            ],
        )
        removed, failed = node.remove()
        assert [one.split(":")[0] for one in failed] == ["ipset KUBE-CLUSTER-IP stays"]
        assert sum(one.startswith("ipset ") for one in removed) == len(SETS) - 1
        assert node.run("ipset", "list", "-name").split() == ["KUBE-CLUSTER-IP"]


class TestOfTheRest:
    pytestmark = kernel

    def test_nftables_mode_goes_and_the_tables_of_others_stay(self, node: Node) -> None:
        put_foreign(node)
        for word in FAMILIES.values():
            chain = "chain x { type filter hook input priority 0; }"
            node.run("nft", "-f", "-", text=f"table {word} kube-proxy-not {{ {chain} }}")
            node.run("nft", "-f", "-", text="table inet kube-proxy { }")
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
        '-A INPUT -m comment --comment "say \\"go\\" -j KUBE-SERVICES" -j ACCEPT\n'
        '-A INPUT -m comment --comment "x" -g KUBE-SERVICES\nCOMMIT\n'
    )
    goto = '-A INPUT -m comment --comment "x" -g KUBE-SERVICES'
    assert in_table("nat", saved) == InTable((goto,), ("KUBE-SERVICES",))

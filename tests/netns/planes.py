"""The dataplanes of a node as tests see them: which this host can do, and what is in its kernel.

Lives here: planes (modes, iptables with each variant of its tool), what the kernel's tools print of
them, and what other programs have there. Must not: start a daemon or make traffic.
"""

import functools
import itertools
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from tests.netns.cluster import NFT, until

from vipd.bench.lab import Lab

LEGACY, NFT_VARIANT = "iptables-legacy", "iptables-nft"
PLANES = ("nftables", LEGACY, NFT_VARIANT, "ipvs", "userspace")
"""Modes, iptables with each variant of its tool."""
MULTI = {LEGACY: "xtables-legacy-multi", NFT_VARIANT: "xtables-nft-multi"}
TOOL_NAMES = [
    f"{family}tables{suffix}" for family in ("ip", "ip6") for suffix in ("", "-save", "-restore")
]


def mode_of(plane: str) -> str:
    return "iptables" if plane in MULTI else plane


def lacks(plane: str) -> str:
    """Why this host cannot do it, or an empty text."""
    if plane in MULTI and shutil.which(MULTI[plane], path="/usr/sbin:/sbin") is None:
        return f"no {MULTI[plane]} here (apt install iptables)"
    if plane == "ipvs" and not _has_ipvs():
        return "this kernel has no IPVS; tests/vm runs this with one that has"
    return ""


@functools.cache
def _has_ipvs() -> bool:
    if not Path("/proc/net/ip_vs").exists() and (tool := shutil.which("modprobe", path="/sbin")):
        subprocess.run([tool, "-q", "ip_vs"], check=False, capture_output=True)
    return Path("/proc/net/ip_vs").exists()


def need(*planes: str) -> None:
    for plane in planes:
        if reason := lacks(plane):
            pytest.skip(reason)


# What the kernel has

_COUNTERS = re.compile(r"\[\d+:\d+\]|counter packets \d+ bytes \d+")


def _printed(lab: Lab, *command: str) -> list[str]:
    """What a tool on the node prints, but for counters and dates; nothing where it fails."""
    done = lab.exec("node", command)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [_COUNTERS.sub("", line).rstrip() for line in lines if not line.startswith("#")]


def _saved(lab: Lab, tool: str) -> list[str]:
    """Chains and rules of a variant of iptables, each with its table."""
    found, table = [], ""
    for line in _printed(lab, tool):
        if line.startswith("*"):
            table = line
        elif line != "COMMIT" and not re.fullmatch(r":[A-Z]+ ACCEPT", line):
            found.append(f"{table} {line}")
    return found


def rules(lab: Lab) -> dict[str, list[str]]:
    """Everything that the node's kernel has been told, by who prints it."""
    found = {"nft": _printed(lab, NFT, "--stateless", "list", "ruleset")}
    for variant, family in itertools.product(("legacy", "nft"), ("ip", "ip6")):
        tool = f"{family}tables-{variant}-save"
        found[tool] = _saved(lab, f"/usr/sbin/{tool}")
    if (ipset := shutil.which("ipset", path="/usr/sbin:/sbin")) is not None:
        found["ipset"] = sorted(_printed(lab, ipset, "save"))
    if (ipvsadm := shutil.which("ipvsadm", path="/usr/sbin:/sbin")) is not None:
        found["ipvs"] = sorted(_printed(lab, ipvsadm, "-Sn"))
    for family in ("-4", "-6"):
        command = ("ip", family, "route", "show", "table", "local")
        found[f"route {family}"] = sorted(_printed(lab, *command))
    return found


_OURS = re.compile(
    r"vipd|VIPD|\b10\.96\.|\b203\.0\.113\.|fd00:10:96::|2001:db8:113::", re.IGNORECASE
)


def ours(lab: Lab) -> list[str]:
    """Lines that only vipd can have written."""
    return [
        f"{name}: {line.strip()}"
        for name, lines in rules(lab).items()
        for line in lines
        if _OURS.search(line)
    ]


SHOWN = 40
"""Lines of each part of the evidence: more of it hides the failure itself."""


def evidence(lab: Lab) -> list[tuple[str, str]]:
    """What the node knew and did, each with its title: for reading after a failure."""
    found = {
        "/proc/net/nf_conntrack": _printed(lab, "cat", "/proc/net/nf_conntrack"),
        "ip neigh": _printed(lab, "ip", "neigh"),
        "counters that are not 0": _counted(lab),
        "ours in the kernel": ours(lab),
    }
    return [
        (f"{title} (the last {SHOWN} of {len(lines)} lines)", "\n".join(lines[-SHOWN:]))
        for title, lines in found.items()
    ]


def _counted(lab: Lab) -> list[str]:
    """Each protocol's counters, by names instead of columns (proc_net_netstat(5), snmp)."""
    lines = _printed(lab, "cat", "/proc/net/netstat", "/proc/net/snmp")
    found = []
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        protocol, *columns = names.split()
        told = zip(columns, values.split()[1:], strict=False)
        found.append(
            " ".join([protocol, *(f"{name}={value}" for name, value in told if value != "0")])
        )
    return found


_MARKS = {
    "nftables": (r"nft", r"table ip6? vipd \{"),
    "iptables": (r"ip6?tables-.*", r"VIPD-SVC-"),
    "ipvs": (r"ipvs|route.*", rf"^-[Aa] .*(?:{_OURS.pattern})|proto 118"),
    "userspace": (r"nft|route.*", r"table ip6? vipd-userspace \{|proto 119"),
}
"""Who prints what there is of a mode, and what that looks like. The skeleton is of none."""


def of_mode(lab: Lab, plane: str) -> list[str]:
    where, what = _MARKS[mode_of(plane)]
    return [
        f"{name}: {line}"
        for name, lines in rules(lab).items()
        if re.fullmatch(where, name)
        for line in lines
        if re.search(what, line)
    ]


def only(lab: Lab, plane: str, seconds: float) -> None:
    """One mode alone is in the kernel, or will be as soon as the other one is removed."""
    for other in _MARKS.keys() - {mode_of(plane)}:
        gone = partial(_is_gone, lab, other)
        until(gone, f"no {other} beside {plane}", seconds)
    assert of_mode(lab, plane) != []


def _is_gone(lab: Lab, plane: str) -> bool:
    return of_mode(lab, plane) == []


FIREWALL = """
table inet firewall {
    set friends { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 192.168.77.0/24 } }
    map ports { type inet_service : verdict; elements = { 22 : accept } }
    chain input {
        type filter hook input priority filter; policy accept;
        tcp dport vmap @ports
        ip saddr @friends counter accept comment "friends"
    }
    chain pre {
        type nat hook prerouting priority dstnat; policy accept;
        tcp dport 9999 counter redirect to :22
    }
}
"""
DOCKER = """*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d {loopback} -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s {range} ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8081 -j DNAT --to-destination {target}
COMMIT
*filter
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -j DOCKER
-A DOCKER -d {container} ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
"""


_CONTAINERS = {
    "ip": {
        "loopback": "127.0.0.0/8",
        "range": "172.17.0.0/16",
        "container": "172.17.0.2/32",
        "target": "172.17.0.2:80",
    },
    "ip6": {
        "loopback": "::1/128",
        "range": "fd00:17::/64",
        "container": "fd00:17::2/128",
        "target": "[fd00:17::2]:80",
    },
}
FOREIGN_VIP = "198.51.100.7"
IPVS = f"""-A -t {FOREIGN_VIP}:80 -s wrr
-a -t {FOREIGN_VIP}:80 -r 10.244.1.21:9000 -m -w 3
-A -u {FOREIGN_VIP}:53 -s rr -p 60
"""
IPSET = """create friends hash:net family inet
add friends 10.0.0.0/8
"""


class Others:
    """What a firewall, a container engine and another load balancer have on the node."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._variant = ""

    def _tell(self, command: str, text: str = "", *, check: bool = True) -> None:
        done = self._lab.exec("node", command.split(), input=text)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"

    def program(self, variant: str) -> None:
        self._variant = variant
        self._tell(f"{NFT} -f -", FIREWALL)
        self._tell("ipset restore", IPSET)
        for family, values in _CONTAINERS.items():
            restore = f"/usr/sbin/{family}tables{variant[8:]}-restore --noflush"
            self._tell(restore, DOCKER.format(**values))
        if not lacks("ipvs"):
            self._tell("ipvsadm -R", IPVS)
            self._tell(f"ip route add local {FOREIGN_VIP}/32 dev lo")

    def have(self) -> dict[str, list[str]]:
        found = rules(self._lab)
        kept = {
            "nft": _printed(self._lab, NFT, "--stateless", "list", "table", "inet", "firewall"),
            **{
                f"{family}tables": [
                    line
                    for line in found[f"{family}tables{self._variant[8:]}-save"]
                    if not _OURS.search(line)
                ]
                for family in ("ip", "ip6")
            },
            "ipset": [line for line in found["ipset"] if line.split()[1] == "friends"],
        }
        if not lacks("ipvs"):
            kept["ipvs"] = [line for line in found["ipvs"] if FOREIGN_VIP in line]
            kept["route"] = [line for line in found["route -4"] if FOREIGN_VIP in line]
        return kept

    def remove(self) -> None:
        self._tell(f"{NFT} flush ruleset")
        for family, table in itertools.product(("ip", "ip6"), ("nat", "filter")):
            for flag in ("-F", "-X"):
                self._tell(f"/usr/sbin/{family}tables-legacy -t {table} {flag}", check=False)
        self._tell("ipset destroy friends", check=False)
        if not lacks("ipvs"):
            self._tell("ipvsadm -C")
            self._tell(f"ip route del local {FOREIGN_VIP}/32 dev lo", check=False)

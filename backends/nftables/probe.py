"""What the nftables mode needs of a host, and how that is found out without changing anything.

Lives here: the probes and what brings what is missing. Must not: commit (`nft --check`).
"""

import re
from collections.abc import Awaitable, Callable
from ipaddress import ip_address, ip_network

from vipd.backends.nftables.plan import compile_program, plan
from vipd.backends.nftables.tool import INSTALL
from vipd.backends.protocol import Capability
from vipd.proxy.errors import DataplaneError, Unsupported
from vipd.proxy.model import Algorithm
from vipd.proxy.names import NamespacedName, Protocol, ServicePortName, family_of
from vipd.proxy.virtualserver import (
    Endpoint,
    Key,
    Kind,
    Masquerade,
    NodeNetwork,
    PodSources,
    VirtualServer,
)

_OLDEST = (1, 0, 1)
_FILTER = "filter hook output priority 0"
_NAT = "nat hook postrouting priority 100"

# What the program needs of the kernel: name, hook and rule that try it, and what brings it.
_FEATURES = (
    ("nf_conntrack", _FILTER, "ct state new", "kernel modules nft_ct, nf_conntrack"),
    ("nft_nat", _NAT, "ip daddr 192.0.2.1 snat to 192.0.2.2", "kernel modules nft_nat, nf_nat"),
    ("nft_masq", _NAT, "masquerade fully-random", "kernel module nft_masq"),
    ("nft_fib", _FILTER, "fib daddr type local", "kernel modules nft_fib, nft_fib_ipv4/ipv6"),
    ("nft_numgen", _FILTER, "meta priority set numgen random mod 2", "kernel module nft_numgen"),
    ("nft_hash", _FILTER, "meta priority set jhash ip saddr mod 2", "kernel module nft_hash"),
    ("nft_reject", _FILTER, "reject", "kernel modules nft_reject, nft_reject_ipv4"),
)

Run = Callable[[list[str], str], Awaitable[bytes]]
"""Runs nft with arguments and a script, and returns what it printed."""


async def tool(run: Run) -> Capability:
    """Return whether `nft` is there and new enough."""
    try:
        text = (await run(["--version"], "")).decode(errors="replace")
    except DataplaneError as error:
        return Capability("nft", False, str(error), INSTALL)
    found = re.search(r"v(\d+)\.(\d+)\.(\d+)", text)
    version = tuple(map(int, found.groups())) if found else (0, 0, 0)
    return Capability("nft", version >= _OLDEST, text.strip(), INSTALL)


async def kernel(run: Run) -> list[Capability]:
    """Try a program that uses everything; only if that fails, find out which part it is."""
    try:
        await run(["--check", "-f", "-"], program_with_everything())
    except Unsupported as error:
        return [Capability(error.capability, False, remedy=error.remedy)]
    except DataplaneError as error:
        found = [await _feature(run, *feature) for feature in _FEATURES]
        if all(one.present for one in found):
            found.append(Capability("the program", False, str(error)))
        return found
    return [Capability(name, True) for name, *_ in _FEATURES]


async def _feature(run: Run, name: str, hook: str, rule: str, remedy: str) -> Capability:
    text = (
        "add table ip vipd-probe\n"
        f"add chain ip vipd-probe c {{ type {hook}; }}\n"
        f"add rule ip vipd-probe c {rule}\n"
    )
    try:
        await run(["--check", "-f", "-"], text)
    except DataplaneError as error:
        return Capability(name, False, str(error), remedy)
    return Capability(name, True)


def program_with_everything() -> str:
    """Return a program that uses each kind of rule, set and map that there is, in both families."""
    ranges = (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"))
    network = NodeNetwork(
        pod_sources=PodSources(cidrs=ranges), node_port_ranges=ranges, service_cidrs=ranges
    )
    servers = []
    for text, other in (("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")):
        address = ip_address(text)
        endpoints = (Endpoint(address, 1, local=True), Endpoint(ip_address(other), 1))
        family = family_of(address)
        for port, algorithm in enumerate(Algorithm, 1):
            owner = ServicePortName(NamespacedName("probe", str(algorithm)), "", Protocol.TCP)
            servers += [
                VirtualServer(
                    key=Key(family, place, Protocol.TCP, port),
                    owner=owner,
                    kind=Kind.LOAD_BALANCER if place else Kind.NODE_PORT,
                    cluster=endpoints,
                    local=(),
                    affinity_seconds=60 if algorithm is Algorithm.ROUND_ROBIN else None,
                    allowed_sources=ranges[:1] if place and family == 4 else None,
                    masquerade=Masquerade.ALWAYS,
                    algorithm=algorithm,
                )
                for place in (address, None)
            ]
    return str(plan(None, compile_program(servers, network))[0])

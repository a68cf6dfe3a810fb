"""What the tests of the iptables backend share: virtual servers, and a namespace to try them in."""

import asyncio
import itertools
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TypeVar

import msgspec

from vipd.bench import lab_netns
from vipd.proxy.model import Algorithm
from vipd.proxy.names import Family, NamespacedName, Protocol, ServicePortName, family_of
from vipd.proxy.virtualserver import (
    Endpoint,
    Key,
    Kind,
    Masquerade,
    NodeNetwork,
    PodSources,
    VirtualServer,
)

T = TypeVar("T")
RANGES = (ip_network("0.0.0.0/0"), ip_network("::/0"))
NETWORK = NodeNetwork(
    pod_sources=PodSources((ip_network("10.244.0.0/16"), ip_network("fd00:244::/48"))),
    node_port_ranges=RANGES,
    service_cidrs=(ip_network("10.96.0.0/12"), ip_network("fd00:96::/108")),
)
OBSTACLE = (
    "needs root"
    if os.geteuid() != 0
    else ""
    if shutil.which("iptables-legacy") and shutil.which("iptables-nft")
    else "needs iptables (Debian's package iptables)"
)
_numbers = itertools.count()


def server(
    number: int,
    *endpoints: str,
    address: str | None = "",
    protocol: Protocol = Protocol.TCP,
    port: int = 80,
    **other: object,
) -> VirtualServer:
    """Return the virtual server of service ``ns/svc-NUMBER``; an address of None: a node port."""
    text = f"10.96.{number >> 8}.{number & 255}" if address == "" else address
    place = None if text is None else ip_address(text)
    made = VirtualServer(
        key=Key(family_of(place) if place else Family.IPV4, place, protocol, port),
        owner=ServicePortName(NamespacedName("ns", f"svc-{number}"), "http", protocol),
        kind=Kind.CLUSTER if place else Kind.NODE_PORT,
        cluster=tuple(
            Endpoint(ip_address(one), 8080) for one in endpoints or (f"10.244.1.{number & 255}",)
        ),
        local=(),
        masquerade=Masquerade.OFF_CLUSTER if place else Masquerade.ALWAYS,
    )
    return msgspec.structs.replace(made, **other)


def many(count: int) -> list[VirtualServer]:
    """Return so many virtual servers with three endpoints each, and one of each odd kind."""
    return [
        *(
            server(number, *(f"10.244.{number & 255}.{last}" for last in (1, 2, 3)))
            for number in range(count)
        ),
        *odd(),
    ]


def odd() -> list[VirtualServer]:
    """Return a virtual server for each kind of chain, set and rule that there is."""
    three = ("10.244.9.1", "10.244.9.2", "10.244.9.3")
    six = ("fd00:244::1", "fd00:244::2")
    return [
        server(500, *three, affinity_seconds=60),
        server(501, *three, algorithm=Algorithm.ROUND_ROBIN),
        server(502, *three, algorithm=Algorithm.SOURCE_HASH),
        server(503, *three, protocol=Protocol.SCTP, port=9),
        server(504, *three, protocol=Protocol.UDP, port=53),
        server(505, *three, address=None, port=30080),
        server(506, address="10.96.200.1", cluster=()),
        server(507, address=None, port=30081, cluster=()),
        server(
            508,
            *three,
            address="192.0.2.1",
            kind=Kind.LOAD_BALANCER,
            masquerade=Masquerade.ALWAYS,
            allowed_sources=(ip_network("10.0.0.0/8"), ip_network("192.0.2.9/32")),
        ),
        server(509, *six, address="fd00:96::1", affinity_seconds=10),
        server(
            510,
            *six,
            address="fd00:96::2",
            kind=Kind.LOAD_BALANCER,
            allowed_sources=(ip_network("::/0"),),
        ),
    ]


def in_namespace(do: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine in a network namespace of its own, with everything that it starts."""
    name = f"vipd-ipt-{os.getpid()}-{next(_numbers)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:

        async def run() -> T:
            return await do()

        return lab_netns.inside(Path("/run/netns", name), lambda: asyncio.run(run()))
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def command(*words: str, text: str = "") -> str:
    """Run a program in the namespace of this thread and return what it printed."""
    return subprocess.run(words, input=text, capture_output=True, text=True, check=True).stdout


def tell(variant: str, text: str, family: str = "ip") -> None:
    """Feed text to iptables-restore."""
    command(f"{family}tables-{variant}-restore", "--noflush", text=text)


def rules(variant: str, table: str = "nat", family: str = "ip") -> list[str]:
    """Return what iptables-save prints of a table, without its comments."""
    printed = command(f"{family}tables-{variant}-save", "-t", table)
    return [line for line in printed.splitlines() if not line.startswith("#")]

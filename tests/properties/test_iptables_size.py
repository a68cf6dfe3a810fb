"""How large the iptables program is, and how many rules a first packet meets in it."""

from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from tests.properties.statements import Packet
from tests.properties.worlds import OWN
from tests.properties.xtables import Xtables, ways

from vipd.backends.iptables.backend import IptablesCompiler
from vipd.proxy.names import Address, Family, NamespacedName, Protocol, ServicePortName
from vipd.proxy.virtualserver import (
    Endpoint,
    Key,
    Kind,
    Masquerade,
    NodeNetwork,
    PodSources,
    VirtualServer,
)

MOST_MET = 60
NETWORK = NodeNetwork(
    pod_sources=PodSources((ip_network("10.244.0.0/16"), ip_network("fd00:244::/32"))),
    node_port_ranges=(ip_network("192.168.0.10/32"), ip_network("fd00:192::10/128")),
    service_cidrs=(ip_network("10.96.0.0/12"), ip_network("fd00:96::/108")),
    own_addresses=(ip_address("192.168.0.10"), ip_address("fd00:192::10")),
    primary_addresses=(ip_address("192.168.0.10"), ip_address("fd00:192::10")),
)


def server(number: int, address: Address | None, port: int, endpoints: int) -> VirtualServer:
    family = Family.IPV6 if isinstance(address, IPv6Address) else Family.IPV4
    base = int(ip_address("10.128.0.0" if family is Family.IPV4 else "fd00:128::"))
    chosen = tuple(
        Endpoint(ip_address(base + number * 8 + at), 8080, local=not at, pod=f"pod-{number}-{at}")
        for at in range(endpoints)
    )
    return VirtualServer(
        key=Key(family, address, Protocol.TCP, port),
        owner=ServicePortName(NamespacedName("default", f"service-{number}"), "http", Protocol.TCP),
        kind=Kind.CLUSTER if address else Kind.NODE_PORT,
        cluster=chosen,
        local=(),
        masquerade=Masquerade.OFF_CLUSTER if address else Masquerade.ALWAYS,
    )


def many_ports() -> Iterator[VirtualServer]:
    """Twenty ports on each address."""
    first = int(IPv4Address("10.96.0.1"))
    return (server(at, IPv4Address(first + at // 20), 8000 + at % 20, 1) for at in range(30_000))


def six() -> Iterator[VirtualServer]:
    """IPv6 addresses anywhere in a /108."""
    first = int(IPv6Address("fd00:96::"))
    step = 0x9E3779B1 | 1
    return (server(at, IPv6Address(first + at * step % (1 << 20)), 80, 1) for at in range(30_000))


def node_ports() -> Iterator[VirtualServer]:
    """As many node ports as there can be by default, beside cluster IPs in a row."""
    first = int(IPv4Address("10.96.0.1"))
    yield from (server(at, IPv4Address(first + at), 80, 1) for at in range(30_000))
    yield from (server(40_000 + at, None, 30_000 + at, 1) for at in range(2_768))


@pytest.mark.parametrize("made", [many_ports, six, node_ports])
def test_a_first_packet_meets_few_rules(made: Callable[[], Iterator[VirtualServer]]) -> None:
    servers = list(made())
    kernel = Xtables()
    compiler = IptablesCompiler()
    kernel.run(str(compiler.plan(None, compiler.compile(servers, NETWORK))[0]), checked=False)
    met = [max(way.met for way in ways(kernel, one, OWN)) for one in packets(servers)]
    print(f"{made.__name__}: worst {max(met)}, mean {sum(met) / len(met):.1f}")
    assert max(met) <= MOST_MET


def packets(servers: Iterable[VirtualServer]) -> Iterator[Packet]:
    """Yield packets from outside to every seventh server, and to ports that none has."""
    for one in list(servers)[::7]:
        family = one.key.family
        here = "192.168.0.10" if family is Family.IPV4 else "fd00:192::10"
        source = "203.0.113.200" if family is Family.IPV4 else "2001:db8:9::ff"
        address = one.key.address or ip_address(here)
        for port in (one.key.port, one.key.port + 1):
            yield Packet(family, "eth0", ip_address(source), address, "tcp", port)


def test_ten_thousand_services_are_about_seventy_thousand_rules() -> None:
    first = int(IPv4Address("10.96.0.1"))
    servers = [server(at, IPv4Address(first + at), 80, 5) for at in range(10_000)]
    compiler = IptablesCompiler()
    text = str(compiler.plan(None, compiler.compile(servers, NETWORK))[0])
    rules = sum(line.startswith(("-A ", "-I ")) for line in text.splitlines())
    print(f"10,000 x 5: {rules} rules, {len(text)} bytes")
    assert rules <= 70_000

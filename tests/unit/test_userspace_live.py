"""`vipd explain --live` in userspace mode: what workers know of one packet, in words."""

from collections.abc import Collection
from ipaddress import ip_network
from typing import Any

from vipd.backends.live import known
from vipd.backends.protocol import Packet
from vipd.backends.usage import (
    ClientFlow,
    ClientUsage,
    EndpointUsage,
    ServerUsage,
    SetAside,
    Usage,
)
from vipd.backends.userspace.backend import UserspaceCompiler
from vipd.backends.userspace.live import MOST_ENDPOINTS, counters
from vipd.backends.userspace.program import Program
from vipd.proxy.errors import Busy
from vipd.proxy.names import Family, NamespacedName, Protocol, ServicePortName, parse_address
from vipd.proxy.virtualserver import Endpoint, Key, Kind, NodeNetwork, VirtualServer

OWN = parse_address("192.168.0.1")
ENDPOINTS = tuple(Endpoint(parse_address(f"10.244.0.{number}"), 80) for number in (1, 2))
NETWORK = NodeNetwork(own_addresses=(OWN,), node_port_ranges=())


def server(key: Key, **how: Any) -> VirtualServer:
    made: dict[str, Any] = {"cluster": ENDPOINTS, "local": (), "kind": Kind.CLUSTER}
    owner = ServicePortName(NamespacedName("shop", "web"), "http", key.protocol)
    return VirtualServer(key=key, owner=owner, **(made | how))


def key(protocol: Protocol = Protocol.TCP) -> Key:
    return Key(Family.IPV4, parse_address("10.96.0.1"), protocol, 80)


def program(*servers: VirtualServer) -> Program:
    return UserspaceCompiler().compile(servers, NETWORK)


def packet(protocol: Protocol = Protocol.TCP, port: int = 80) -> Packet:
    return Packet(
        source=parse_address("10.0.0.9"),
        destination=parse_address("10.96.0.1"),
        protocol=protocol,
        port=port,
    )


class Counts:
    """A driver whose workers know the same of everything."""

    def __init__(self, told: ServerUsage | None = None, error: Exception | None = None) -> None:
        self._told, self._error = told, error
        self.asked: list[tuple[Key, str]] = []

    async def usage(self, servers: Collection[VirtualServer], client: str = "") -> Usage:
        self.asked += [(one.key, client) for one in servers]
        if self._error is not None:
            raise self._error
        return Usage({} if self._told is None else {one.key: self._told for one in servers})


async def test_what_workers_count_and_have_set_aside() -> None:
    driver = Counts(
        ServerUsage(
            open=3,
            so_far=40,
            denied=1,
            unserved=2,
            workers=(0, 1),
            endpoints=(
                EndpointUsage(endpoint=ENDPOINTS[0], open=3, so_far=30, failures=0),
                EndpointUsage(
                    endpoint=ENDPOINTS[1],
                    open=0,
                    so_far=9,
                    failures=4,
                    set_aside=(SetAside(0, 11.7), SetAside(1, 0.0)),
                ),
                EndpointUsage(
                    endpoint=Endpoint(parse_address("10.244.0.9"), 80),
                    open=0,
                    so_far=1,
                    failures=0,
                    departed=True,
                ),
            ),
        )
    )
    told = await counters(program(server(key())), packet(), driver)
    assert told.remembered is None
    assert told.lines == (
        "workers 0, 1 listen at 10.96.0.1:80/TCP: 3 connections open, 40 so far, "
        "1 denied, for their source, 2 without an endpoint",
        "endpoint 10.244.0.1:80: 3 open, 30 so far",
        "endpoint 10.244.0.2:80: 0 open, 9 so far, 4 failed, set aside by worker 0 for "
        "12 s yet, set aside by worker 1 until the next connection",
        "endpoint 10.244.0.9:80: 0 open, 1 so far, left, and gets no new connection",
        "no connection of 10.0.0.9 is open here",
    )
    assert driver.asked == [(key(), "10.0.0.9")]
    assert told.passed_over == ()


async def test_whom_every_worker_has_set_aside_is_passed_over() -> None:
    aside = (SetAside(0, 11.7), SetAside(1, 3.0))
    failing = EndpointUsage(endpoint=ENDPOINTS[1], open=0, so_far=0, failures=4, set_aside=aside)
    driver = Counts(ServerUsage(open=0, so_far=0, workers=(0, 1), endpoints=(failing,)))
    told = await counters(program(server(key())), packet(), driver)
    assert told.passed_over == ((ENDPOINTS[1], "set aside for 12 s yet: 4 failed"),)


async def test_a_client_that_affinity_remembers_and_its_sessions() -> None:
    client = ClientUsage(
        remembered=ENDPOINTS[1], seconds=59.6, open=5, flows=(ClientFlow(4000, ENDPOINTS[1]),)
    )
    driver = Counts(ServerUsage(open=5, so_far=5, denied=0, unserved=0, of_client=client))
    served = program(server(key(Protocol.UDP), affinity_seconds=60))
    told = await counters(served, packet(Protocol.UDP), driver)
    assert told.remembered == ENDPOINTS[1]
    assert told.lines == (
        "no worker listens any more at 10.96.0.1:80/UDP: 5 sessions open, 5 so far",
        "affinity remembers the client: to 10.244.0.2:80, for 60 s yet",
        "session, source port 4000: to 10.244.0.2:80",
        "and 4 sessions more",
    )


async def test_a_stranger_to_affinity() -> None:
    driver = Counts(ServerUsage(open=0, so_far=0, workers=(1,), of_client=ClientUsage()))
    lines = (await counters(program(server(key(), affinity_seconds=60)), packet(), driver)).lines
    assert lines[0].startswith("worker 1 listens at ")
    assert lines[1] == "10.0.0.9 is not remembered by affinity"


async def test_of_a_node_port_the_place_that_the_packet_goes_to() -> None:
    port = Key(Family.IPV4, None, Protocol.TCP, 30080)
    driver = Counts(ServerUsage(open=0, so_far=0))
    network = NodeNetwork(own_addresses=(OWN,), node_port_ranges=(ip_network("0.0.0.0/0"),))
    served = UserspaceCompiler().compile([server(port, kind=Kind.NODE_PORT)], network)
    there = Packet(
        source=parse_address("10.0.0.9"), destination=OWN, protocol=Protocol.TCP, port=30080
    )
    await counters(served, there, driver)
    assert driver.asked == [(Key(Family.IPV4, OWN, Protocol.TCP, 30080), "10.0.0.9")]


async def test_where_nothing_is_known_a_line_says_so() -> None:
    served = program(server(key()))
    nobody = ("no worker listens at 10.96.0.1:81/TCP",)
    assert (await counters(served, packet(port=81), Counts())).lines == nobody
    empty = program(server(key(), cluster=()))
    assert (await counters(empty, packet(), Counts())).lines[0].startswith("no worker listens at")
    assert (await counters(served, packet(), Counts())).lines[0].startswith("no worker listens at")
    (line,) = (await counters(served, packet(), Counts(error=Busy("worker 0 has ended")))).lines
    assert line == "counters are not known: worker 0 has ended"
    line = (await known("userspace", served, packet())).lines[0]
    assert line == "what workers know is not asked: they are the daemon's, in its mode"


async def test_many_endpoints_are_counted() -> None:
    endpoints = tuple(
        EndpointUsage(endpoint=Endpoint(ENDPOINTS[0].address, port), open=0, so_far=1)
        for port in range(1, MOST_ENDPOINTS + 4)
    )
    driver = Counts(ServerUsage(open=0, so_far=0, workers=(0,), endpoints=endpoints))
    lines = (await counters(program(server(key())), packet(), driver)).lines
    assert lines[-2] == "and 3 endpoints more"


def test_the_path_tells_how_a_worker_serves() -> None:
    made = server(key(), proxy_protocol=True, keeps_failing=True, affinity_seconds=60)
    compiler = UserspaceCompiler()
    step = compiler.trace(program(made), packet())[-1]
    assert step.where == "a worker"
    assert step.what == (
        "listens at 10.96.0.1:80/TCP: random, affinity 60 s, failing endpoints stay, PROXY protocol"
    )

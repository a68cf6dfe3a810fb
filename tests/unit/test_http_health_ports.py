"""Health-check node ports: who has one, where, and what is answered, over real HTTP."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from ipaddress import ip_address, ip_network

import pytest
from tests.unit.http_asking import DEADLINE_SECONDS, Told, World, ask, free_port, running
from tests.waiting import until

from vipd.proxy.events import Applied, Deleted, Kind, OwnAddresses
from vipd.proxy.http import (
    server,  # noqa: F401 - so that no test waits for the import
    service,
)
from vipd.proxy.http.health import TIMEOUT_SECONDS
from vipd.proxy.http.health_ports import addresses, local_endpoints
from vipd.proxy.http.listeners import Listener
from vipd.proxy.model import (
    EndpointSlice,
    Node,
    Service,
    ServicePort,
    ServiceType,
    SliceEndpoint,
    SlicePort,
    TrafficPolicy,
)
from vipd.proxy.names import Family, NamespacedName, Protocol, parse_address
from vipd.proxy.resolve import health_port
from vipd.proxy.settings import HttpSettings, NodeSettings
from vipd.proxy.sources import addresses as followed
from vipd.proxy.virtualserver import NodeNetwork

V4, V6 = "127.0.0.1", "::1"
ON_LOOPBACK = NodeSettings(
    node_name="n", node_port_addresses=(ip_network("127.0.0.1/32"), ip_network("::1/128"))
)
"""Single addresses, of which loopback's are as good as any."""


def balanced(name: str, port: int, ips: Sequence[str] = ("10.96.0.1",), **more: object) -> Service:
    told = {
        "name": NamespacedName("shop", name),
        "type": ServiceType.LOAD_BALANCER,
        "external_policy": TrafficPolicy.LOCAL,
        "cluster_ips": tuple(map(parse_address, ips)),
        "ports": (ServicePort(name="", protocol=Protocol.TCP, port=80),),
        "health_check_node_port": port,
        **more,
    }
    return Service(**told)  # type: ignore[arg-type]


def endpoints(
    of: str, *told: SliceEndpoint, family: Family = Family.IPV4, name: str = ""
) -> EndpointSlice:
    return EndpointSlice(
        name=NamespacedName("shop", name or f"{of}-{family}"),
        service=NamespacedName("shop", of),
        family=family,
        endpoints=told,
        ports=(SlicePort("", Protocol.TCP, 8080),),
    )


def endpoint(
    address: str,
    node: str = "n",
    *,
    ready: bool = True,
    serving: bool = True,
    terminating: bool = False,
) -> SliceEndpoint:
    return SliceEndpoint(
        address=parse_address(address),
        node=node,
        ready=ready,
        serving=serving,
        terminating=terminating,
    )


def world(node: NodeSettings = ON_LOOPBACK) -> World:
    return World(HttpSettings(), node)


async def answered(port: int, host: str = V4) -> Told:
    """Ask, as soon as something listens."""

    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                return await ask(host, port, "/")
            await asyncio.sleep(0.002)


async def test_the_answer_byte_by_byte() -> None:
    port = free_port()
    async with running(world()) as one:
        one.take(Applied(balanced("web", port)), Applied(endpoints("web", endpoint("10.244.1.2"))))
        told = await answered(port)
        assert told.status == 200
        assert told.body == (
            b'{\n\t"service": {\n\t\t"namespace": "shop",\n\t\t"name": "web"\n\t},\n'
            b'\t"localEndpoints": 1,\n\t"serviceProxyHealthy": true\n}'
        )
        assert told.headers["content-type"] == "application/json"
        assert told.headers["x-content-type-options"] == "nosniff"
        assert told.headers["x-load-balancing-endpoint-weight"] == "1"
        other = await ask(V4, port, "/anything/else", "POST")
        assert (other.status, other.body) == (200, told.body)


async def test_it_turns_with_the_endpoints_whatever_waits() -> None:
    port = free_port()
    async with running(world()) as one:
        one.take(Applied(balanced("web", port)), Applied(endpoints("web", endpoint("10.244.1.2"))))
        assert (await answered(port)).status == 200
        one.waiting_since = one.clock  # nothing is committed from here on
        leaving = endpoint("10.244.1.2", ready=False, serving=True, terminating=True)
        one.take(Applied(endpoints("web", leaving)))
        told = await ask(V4, port, "/")
        assert (told.status, told.headers["x-load-balancing-endpoint-weight"]) == (503, "0")
        assert b'"localEndpoints": 0' in told.body
        one.take(Applied(endpoints("web", endpoint("10.244.1.2"), endpoint("10.244.1.3"))))
        told = await ask(V4, port, "/")
        assert (told.status, told.headers["x-load-balancing-endpoint-weight"]) == (200, "2")


async def test_an_unhealthy_proxy_has_no_endpoints_to_offer() -> None:
    port = free_port()
    async with running(world()) as one:
        one.take(Applied(balanced("web", port)), Applied(endpoints("web", endpoint("10.244.1.2"))))
        assert (await answered(port)).status == 200
        one.waiting_since = one.clock - TIMEOUT_SECONDS
        told = await ask(V4, port, "/")
        assert told.status == 503
        assert b'"localEndpoints": 1,\n\t"serviceProxyHealthy": false' in told.body


async def test_a_leaving_node_still_says_what_it_has() -> None:
    port = free_port()
    async with running(world()) as one:
        one.take(Applied(balanced("web", port)), Applied(endpoints("web", endpoint("10.244.1.2"))))
        one.take(Applied(Node(name="n", leaving="it is being deleted")))
        assert (await answered(port)).status == 200


async def test_nothing_listens_before_the_first_sync() -> None:
    port = free_port()
    async with running(world()) as one:
        one.sync.listed = True
        one.take(Applied(balanced("web", port)))
        await one.http.change(HttpSettings())  # the loop has come round
        assert one.http.told() == ()
        one.http.synced()
        assert (await answered(port)).status == 503


async def test_ports_come_move_and_go() -> None:
    first, second = free_port(), free_port()
    async with running(world()) as one:
        one.take()
        one.take(Applied(balanced("web", first)))
        assert (await answered(first)).status == 503
        assert one.http.told() == ("1 health-check node port",)
        # Two services swap their ports: neither finds the other's taken.
        one.take(Applied(balanced("mail", second)))
        await answered(second)
        one.take(Applied(balanced("web", second)), Applied(balanced("mail", first)))
        await until(lambda: listens(one, "web", second) and listens(one, "mail", first))
        assert b'"name": "web"' in (await ask(V4, second, "/")).body
        assert list(one.http.trouble()) == []
        one.take(Deleted(Kind.SERVICE, NamespacedName("shop", "web")))
        one.take(Applied(balanced("mail", first, external_policy=TrafficPolicy.CLUSTER)))
        await until(lambda: one.http.told() == ())
        for port in (first, second):
            with pytest.raises(ConnectionRefusedError):
                await ask(V4, port, "/")


def listens(one: World, name: str, port: int) -> bool:
    ours: list[Listener] = list(one.http._ports.listeners())
    return any(name in each.what and each.port == port and not each.failure for each in ours)


async def test_a_taken_port_is_its_service_s_trouble_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "RETRY_SECONDS", 0.01)
    port = free_port()
    with socket.create_server((V4, 0)) as taken:
        number = taken.getsockname()[1]
        async with running(world()) as one:
            one.take(Applied(balanced("web", number)), Applied(balanced("mail", port)))
            assert (await answered(port)).status == 503
            (said,) = one.http.trouble()
            assert (
                f"health-check node port of shop/web cannot be listened for at {V4}:{number}"
                in said
            )
            taken.close()
            await until(lambda: not list(one.http.trouble()))
            assert (await ask(V4, number, "/")).status == 503


async def test_both_families_count_their_own_endpoints() -> None:
    port = free_port(V6)
    dual = balanced("web", port, ("10.96.0.1", "fd00::1"))
    async with running(world()) as one:
        one.take(
            Applied(dual),
            Applied(endpoints("web", endpoint("10.244.1.2"), endpoint("10.244.1.3"))),
            Applied(endpoints("web", endpoint("fd00:1::2"), family=Family.IPV6)),
        )
        assert b'"localEndpoints": 2' in (await answered(port)).body
        assert b'"localEndpoints": 1' in (await answered(port, V6)).body
        one.take(Applied(balanced("web", port)))
        await until(lambda: len(list(one.http._ports.listeners())) == 1)
        with pytest.raises(ConnectionRefusedError):
            await ask(V6, port, "/")


async def test_it_follows_the_node_s_addresses() -> None:
    port = free_port()

    def at(address: str) -> NodeSettings:
        return NodeSettings(node_name="n", node_port_addresses=(ip_network(f"{address}/32"),))

    async with running(world(at("127.0.0.2"))) as one:
        one.take(Applied(Node(name="n")), Applied(balanced("web", port)))
        assert (await answered(port, "127.0.0.2")).status == 503
        one.sync.settings = at("127.0.0.3")
        one.take(Applied(Node(name="n", zone="so that the table is made anew")))
        assert (await answered(port, "127.0.0.3")).status == 503
        with pytest.raises(ConnectionRefusedError):
            await ask("127.0.0.2", port, "/")


class TestPure:
    def test_who_has_one(self) -> None:
        assert health_port(balanced("web", 30000)) == 30000
        for other in (
            None,
            balanced("web", 0),
            balanced("web", 1, type=ServiceType.NODE_PORT),
            balanced("web", 1, external_policy=TrafficPolicy.CLUSTER),
            balanced("web", 1, proxy_name="cilium"),
            balanced("web", 1, headless=True),
        ):
            assert health_port(other) is None

    def test_where_it_listens(self) -> None:
        own = [ip_address(one) for one in ("192.0.2.9", "198.51.100.7", "fd00::9", "fe80::1")]

        def at(*ranges: str) -> list[str]:
            network = NodeNetwork(node_port_ranges=tuple(map(ip_network, ranges)))
            return [str(one) for found in addresses(network, own).values() for one in found]

        assert at("0.0.0.0/0", "::/0") == ["0.0.0.0", "::"]
        assert at("203.0.113.1/32") == ["203.0.113.1"]
        assert at("192.0.2.0/24", "::/0") == ["192.0.2.9", "::"]
        assert at("192.0.2.0/24", "198.51.100.0/24", "fd00::/8", "fe80::/10") == [
            "192.0.2.9",
            "198.51.100.7",
            "fd00::9",
        ]
        assert at("10.0.0.0/8") == []

    def test_what_counts_as_a_local_endpoint(self) -> None:
        told = (
            endpoint("10.0.0.1"),
            endpoint("10.0.0.2", node="other"),
            endpoint("10.0.0.3", ready=False),
            endpoint("10.0.0.4", ready=False, serving=True, terminating=True),
        )
        slices = [endpoints("web", *told), endpoints("web", endpoint("10.0.0.1"), name="second")]
        assert local_endpoints(slices, "n", Family.IPV4) == 1
        assert local_endpoints(slices, "n", Family.IPV6) == 0


async def test_a_range_of_addresses_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def events() -> AsyncIterator[list[OwnAddresses]]:
        yield [OwnAddresses((parse_address("127.0.0.5"),))]

    monkeypatch.setattr(followed, "events", events)
    port = free_port()
    node = NodeSettings(node_name="n", node_port_addresses=(ip_network("127.0.0.0/29"),))
    async with running(world(node)) as one:
        one.take(Applied(balanced("web", port)))
        assert (await answered(port, "127.0.0.5")).status == 503

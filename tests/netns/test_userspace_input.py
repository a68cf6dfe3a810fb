"""Userspace mode and input that is wrong: it is named with its reason, and everything else works.

Above all endpoints that are this node's own places, over which connections could go round for ever.
"""

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from tests.netns.cluster import (
    LOCAL,
    REFUSED,
    SILENCE_SECONDS,
    TCP4,
    TCP6,
    UDP6,
    Cluster,
    Flavour,
    Manifest,
    Served,
    endpoint_slice,
    until,
)

from vipd.proxy.explain import Explanation, Verdict
from vipd.proxy.names import Address, Family, Protocol

pytestmark = [pytest.mark.netns, pytest.mark.essential, pytest.mark.modes("userspace")]

NewCluster = Callable[..., Cluster]


@pytest.fixture(params=[TCP4, UDP6], ids=str)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    assert isinstance(request.param, Flavour)
    return request.param


@pytest.fixture
def cluster(new_cluster: NewCluster) -> Cluster:
    built = new_cluster("--nodeport-addresses", "0.0.0.0/0,::/0")
    built.start()
    return built


def pointed(served: Served, *targets: Address, port: int) -> Manifest:
    """The slice of a service whose endpoints are these addresses."""
    told = {"name": "main", "protocol": str(served.flavour.protocol), "port": port}
    endpoints = [{"addresses": [str(one)], "conditions": {"ready": True}} for one in targets]
    return endpoint_slice(served.name, served.flavour.family, endpoints, [told])


def made(cluster: Cluster, flavour: Flavour, **spec: Any) -> Served:
    """A service whose slice the test writes itself; nothing of it is written yet."""
    return Served(cluster, flavour, spec)


def rejected(cluster: Cluster) -> list[str]:
    return list(cluster.status().rejected)


def told(cluster: Cluster, *words: object) -> None:
    """Wait until one report has all of these words."""
    wanted = [str(one) for one in words]
    until(
        lambda: any(all(one in each for one in wanted) for each in rejected(cluster)),
        f"a report with {wanted}",
    )


def works(served: Served) -> None:
    assert served.ask("client-1").pod == LOCAL


def test_a_service_that_forwards_to_itself(cluster: Cluster, flavour: Flavour) -> None:
    good = cluster.serve(flavour, LOCAL)
    bad = made(cluster, flavour)
    cluster.apply(bad.manifest(), pointed(bad, bad.address, port=80))
    told(cluster, bad.address, "this node serves them itself")
    for client in ("client-1", "node", "outside"):
        assert bad.outcome(client) == REFUSED
    works(good)
    good_one = bad.endpoint(LOCAL)["addresses"]
    both = pointed(bad, bad.address, port=80)
    more = endpoint_slice(
        f"{bad.name}-2",
        flavour.family,
        [{"addresses": good_one, "conditions": {"ready": True}}],
        [{"name": "main", "protocol": str(flavour.protocol), "port": flavour.target}],
        of=bad.name,
    )
    cluster.apply(both, more)  # the endpoint that is one is used
    until(lambda: bad.outcome("client-1") != REFUSED, "what is left of it is served")
    assert {one.partition(" ")[0] for one in bad.outcomes("client-1")} == {LOCAL}
    told(cluster, bad.address, "left out")
    cluster.remove(both)
    until(lambda: not rejected(cluster), "nothing is left to report")
    cluster.settled()


def test_two_services_that_forward_to_each_other(cluster: Cluster, flavour: Flavour) -> None:
    good = cluster.serve(flavour, LOCAL)
    one, other = made(cluster, flavour), made(cluster, flavour)
    cluster.apply(one.manifest(), pointed(one, other.address, port=80))
    cluster.apply(other.manifest(), pointed(other, one.address, port=80))
    told(cluster, f"{one.address}", "left out")
    told(cluster, f"{other.address}", "left out")
    for each in (one, other):
        assert {each.outcome(client) for client in ("client-1", "node")} == {REFUSED}
    works(good)


@pytest.mark.parametrize("first", ["head", "tail"])
def test_a_chain_over_a_node_port(cluster: Cluster, flavour: Flavour, first: str) -> None:
    """Whichever comes first: no worker is the endpoint of a worker, so nothing can go round."""
    good = cluster.serve(flavour, LOCAL)
    head, tail = made(cluster, flavour), made(cluster, flavour, type="NodePort")
    address, port = tail.on_node()
    steps = [
        (head.manifest(), pointed(head, address, port=port)),
        (tail.manifest(), pointed(tail, head.address, port=80)),
    ]
    for manifests in steps if first == "head" else reversed(steps):
        cluster.apply(*manifests)
        works(good)
    told(cluster, f"{head.address}", f"{port}", "left out")
    told(cluster, f"node port {port}", f"{head.address}", "left out")
    assert head.outcome("client-1") == REFUSED
    assert tail.outcome("outside", address, port) == REFUSED
    # With an endpoint of its own the node port works, and is none of the other one's still.
    cluster.apply(
        endpoint_slice(
            tail.name,
            flavour.family,
            [tail.endpoint(LOCAL)],
            [{"name": "main", "protocol": str(flavour.protocol), "port": flavour.target}],
        )
    )
    until(lambda: tail.outcome("outside", address, port) != REFUSED, "the node port is served")
    assert tail.ask("outside", address, port).pod == LOCAL
    assert head.outcome("client-1") == REFUSED
    works(good)


def test_a_chain_over_an_external_address_of_the_node(cluster: Cluster, flavour: Flavour) -> None:
    good = cluster.serve(flavour, LOCAL)
    address = cluster.lab.node("node").address(flavour.family)
    head = made(cluster, flavour)
    tail = made(cluster, flavour, externalIPs=[str(address)])
    cluster.apply(head.manifest(), pointed(head, address, port=80))
    cluster.apply(tail.manifest(), pointed(tail, head.address, port=80))
    told(cluster, f"{head.address}", f"{address}", "left out")
    assert head.outcome("client-1") == REFUSED
    assert tail.outcome("outside", address) == REFUSED
    works(good)
    # When what it points at goes, the program of the node is its endpoint, if there is one.
    cluster.remove(tail.manifest(), pointed(tail, head.address, port=80))
    cluster.settled()
    listening = (
        "import socket, sys\n"
        f"made = socket.create_server(({str(address)!r}, 80), family=socket.{_family(flavour)})\n"
        "print(flush=True)\nmade.accept()[0].sendall(b'me')"
    )
    if flavour.protocol is Protocol.TCP:
        with running(cluster, listening), cluster.lab.socket("client-1", socket.AF_INET) as client:
            client.settimeout(20)
            client.connect((str(head.address), 80))
            assert client.recv(2) == b"me"


def test_an_endpoint_at_a_port_that_nobody_serves(cluster: Cluster, flavour: Flavour) -> None:
    """It is a service address, but no service's port: the guard refuses what workers send there."""
    good, other = cluster.serve(flavour, LOCAL), cluster.serve(flavour, LOCAL)
    bad = made(cluster, flavour)
    cluster.apply(bad.manifest(), pointed(bad, other.address, port=81))
    told(cluster, f"{bad.address}", f"{other.address}", "is a service address")
    with pytest.raises((ConnectionError, TimeoutError)):
        bad.ask("client-1", timeout=SILENCE_SECONDS)
    works(good)
    works(other)


def test_port_0(cluster: Cluster, flavour: Flavour) -> None:
    good = cluster.serve(flavour, LOCAL)
    bad, pointing = made(cluster, flavour), made(cluster, flavour)
    manifest = bad.manifest()
    manifest["spec"]["ports"][0]["port"] = 0
    cluster.apply(manifest)
    until(lambda: any(bad.name in one for one in cluster.status().problems), "it is named")
    # An endpoint without a port is none.
    target = cluster.lab.node(LOCAL).address(flavour.family)
    cluster.apply(pointing.manifest(), pointed(pointing, target, port=0))
    until(lambda: _has(cluster, pointing), "it is programmed")
    assert pointing.outcome("client-1") == REFUSED
    works(good)


def test_an_address_whose_local_route_another_program_has(
    cluster: Cluster, flavour: Flavour
) -> None:
    good, bad = cluster.serve(flavour, LOCAL), made(cluster, flavour)
    route = ("local", str(bad.address), "dev", "lo", "table", "local", "proto", "77")
    cluster.lab.exec("node", ["ip", "route", "add", *route], check=True)
    try:
        cluster.apply(bad.manifest(), bad.slice())
        told(cluster, f"{bad.address}", "route")
        works(good)
        cluster.stop()
        cluster.start()
        told(cluster, f"{bad.address}", "route")
        works(good)
        shown = cluster.lab.exec("node", ["ip", "route", "show", "table", "local", "proto", "77"])
        six = ["ip", "-6", "route", "show", "table", "local", "proto", "77"]
        assert str(bad.address) in shown.stdout + cluster.lab.exec("node", six).stdout
    finally:
        cluster.lab.exec("node", ["ip", "route", "del", *route], check=True)


def test_a_port_that_another_program_has(cluster: Cluster) -> None:
    good, bad = cluster.serve(TCP4, LOCAL), cluster.serve(TCP4, LOCAL)
    address, port = bad.on_node()
    program = (
        f"import socket\nmade = socket.create_server(({str(address)!r}, {port}))\n"
        "print(flush=True)\nmade.accept()"
    )
    with running(cluster, program):
        manifest = bad.manifest()
        manifest["spec"] |= {"type": "NodePort", "ports": [{**bad.port(), "nodePort": port}]}
        cluster.apply(manifest)
        why = f"listen {address}:{port}/TCP: Address already in use: python"
        told(cluster, f"test/{bad.name}:main at node port {port}/TCP (IPv4): {why}", "(pid ")
        works(good)
        works(bad)
        shown = {one.address: one.rejected or "" for one in cluster.services()}
        assert shown[f"*:{port}"].startswith(why)
        assert shown[f"{bad.address}:80"] == ""
        client = str(cluster.lab.node("outside").ipv4)
        done = cluster.cli("explain", client, f"node:{port}", "--json", "--socket", cluster.socket)
        explained = msgspec.json.decode(done.stdout, type=Explanation)
        assert explained.verdict is Verdict.UNSERVED
        assert f"cannot serve test/{bad.name}:main at node port {port}/TCP" in explained.why
        assert "(pid " in explained.why


def test_of_what_is_rejected_nothing_makes_the_address_the_nodes(cluster: Cluster) -> None:
    good, port = cluster.serve(TCP4, LOCAL), 801
    bad = made(cluster, TCP4, ports=[{**good.port(), "port": port}])
    bad._endpoints = [bad.endpoint(LOCAL)]
    program = f"import socket\nmade = socket.create_server(('', {port}))\n"
    program += "print(flush=True)\nmade.accept()"
    with running(cluster, program):
        cluster.apply(bad.manifest(), bad.slice())
        until(lambda: cluster.status().rejected, "the conflict is told")
        routes = ["ip", "route", "show", "table", "local", "proto", "119"]
        rules = ["nft", "list", "table", "ip", "vipd-userspace"]
        for command in (routes, rules):
            listing = cluster.lab.exec("node", command).stdout
            assert str(good.address) in listing
            assert str(bad.address) not in listing


def test_a_link_local_address(cluster: Cluster) -> None:
    good = cluster.serve(TCP6, LOCAL)
    bad = made(cluster, TCP6, externalIPs=["fe80::53"])
    cluster.apply(bad.manifest(), bad.slice())
    told(cluster, "fe80::53", "link-local")
    works(good)


def _has(cluster: Cluster, served: Served) -> bool:
    return any(served.name in one.service for one in cluster.services())


def _family(flavour: Flavour) -> str:
    return "AF_INET" if flavour.family is Family.IPV4 else "AF_INET6"


@contextmanager
def running(cluster: Cluster, program: str) -> Iterator[None]:
    """Have a program of Python on the node that prints a line when it is ready."""
    process = cluster.lab.popen("node", [sys.executable, "-c", program], stdout=-1)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()

"""What a Service can ask for in userspace mode, and what is told of its connections."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.netns.cluster import (
    DEADLINE_SECONDS,
    LOCAL,
    REMOTE,
    TCP4,
    TCP6,
    UDP4,
    Cluster,
    Flavour,
    Manifest,
    Served,
    held,
    until,
)
from tests.netns.processes import workers

from vipd.backends.userspace.forwarder.health import FIRST_SECONDS
from vipd.proxy.names import parse_address
from vipd.proxy.status import Status
from vipd.proxy.views import VirtualServerView
from vipd.proxy.virtualserver import Endpoint

pytestmark = [pytest.mark.netns, pytest.mark.essential, pytest.mark.modes("userspace")]

OWN_PORT = 7000
"""Where nothing of the lab listens, and a test does."""
SILENT = "web-3"
"""A pod in which nothing listens any more, by the fixture `silent`."""
ROUND_ROBIN = {"vipd/algorithm": "round-robin"}
REQUESTS = 20
HASTY = b"hasty" * 20_000
"""Bytes that fit into the buffers of a connection on which nobody reads yet."""


class OwnServer(Served):
    """A service whose endpoints are the test's own."""

    def slice(self) -> Manifest:
        port = {"name": "main", "protocol": "TCP", "port": OWN_PORT}
        return {**super().slice(), "ports": [port]}


@contextmanager
def endpoint(cluster: Cluster, flavour: Flavour) -> Iterator[tuple[OwnServer, socket.socket]]:
    """A service that asks for the PROXY protocol, and its one endpoint, which the test is."""
    asked = {"annotations": {"vipd/proxy-protocol": "v2"}}
    served = OwnServer(cluster, flavour, asked)
    cluster.apply(served.manifest())
    served.endpoints(REMOTE)
    family = socket.AF_INET if flavour.family == 4 else socket.AF_INET6
    with cluster.lab.socket(REMOTE, family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(cluster.lab.node(REMOTE).address(flavour.family)), OWN_PORT))
        listener.listen()
        listener.settimeout(DEADLINE_SECONDS)
        yield served, listener


@contextmanager
def connection(cluster: Cluster, client: str, served: Served) -> Iterator[socket.socket]:
    family = socket.AF_INET if served.address.version == 4 else socket.AF_INET6
    with cluster.lab.socket(client, family) as made:
        made.settimeout(DEADLINE_SECONDS)
        made.connect((str(served.address), 80))
        yield made


@contextmanager
def accepted(listener: socket.socket) -> Iterator[socket.socket]:
    made, _ = listener.accept()
    with made:
        made.settimeout(DEADLINE_SECONDS)
        yield made


def exactly(size: int, incoming: socket.socket) -> bytes:
    read = b""
    while len(read) < size:
        part = incoming.recv(size - len(read))
        assert part, f"the end after {len(read)} of {size} bytes"
        read += part
    return read


def told_by_header(incoming: socket.socket) -> tuple[Endpoint, Endpoint]:
    """Read a header of version 2 and return the client and where it connected to.

    Source: "The PROXY protocol", §2.2; written without regard to the one that makes it.
    """
    head = exactly(16, incoming)
    assert head[:12] == bytes.fromhex("0d0a0d0a000d0a515549540a")
    assert head[12] == 0x21, "version 2, command PROXY"
    size = {0x11: 4, 0x21: 16}[head[13]]
    body = exactly(int.from_bytes(head[14:], "big"), incoming)
    assert len(body) == 2 * size + 4
    family = socket.AF_INET if size == 4 else socket.AF_INET6
    addresses = [socket.inet_ntop(family, part) for part in (body[:size], body[size : 2 * size])]
    ports = [int.from_bytes(body[at : at + 2], "big") for at in (2 * size, 2 * size + 2)]
    source, destination = (
        Endpoint(parse_address(address), port)
        for address, port in zip(addresses, ports, strict=True)
    )
    return source, destination


@pytest.mark.parametrize("flavour", [TCP4, TCP6], ids=str)
@pytest.mark.parametrize("client", ["client-1", "outside", "node"])
def test_an_endpoint_is_told_the_address_of_the_client(
    cluster: Cluster, flavour: Flavour, client: str
) -> None:
    with (
        endpoint(cluster, flavour) as (served, listener),
        connection(cluster, client, served) as mine,
        accepted(listener) as theirs,
    ):
        # Before the client has said a word: many protocols let the server begin.
        source, destination = told_by_header(theirs)
        host, port = mine.getsockname()[:2]
        assert source == Endpoint(parse_address(host), port)
        if client != "node":
            assert source.address == cluster.lab.node(client).address(flavour.family)
        assert destination == Endpoint(served.address, 80)
        theirs.sendall(b"welcome")
        assert exactly(7, mine) == b"welcome"
        mine.sendall(b"hello")
        mine.shutdown(socket.SHUT_WR)
        assert exactly(5, theirs) == b"hello"
        assert theirs.recv(1) == b""


def test_the_header_comes_before_what_a_hasty_client_sends(cluster: Cluster) -> None:
    with (
        endpoint(cluster, TCP4) as (served, listener),
        connection(cluster, "client-1", served) as mine,
    ):
        mine.sendall(HASTY)
        with accepted(listener) as theirs:
            told_by_header(theirs)
            assert exactly(len(HASTY), theirs) == HASTY


def test_a_service_that_asks_no_more_gets_no_header_and_connections_go_on(
    cluster: Cluster,
) -> None:
    with (
        endpoint(cluster, TCP4) as (served, listener),
        connection(cluster, "client-1", served) as old,
        accepted(listener) as older,
    ):
        told_by_header(older)
        served.change(annotations={})
        with connection(cluster, "client-1", served) as mine, accepted(listener) as theirs:
            mine.sendall(b"hello")
            assert exactly(5, theirs) == b"hello"
        old.sendall(b"still here")
        assert exactly(10, older) == b"still here"


@pytest.fixture
def silent(cluster: Cluster) -> Iterator[None]:
    cluster.lab.silence(SILENT)
    yield
    cluster.lab.serve(SILENT)


def counted(cluster: Cluster, served: Served) -> dict[str, Any]:
    """What is told of the service's cluster IP."""
    done = cluster.cli("services", f"test/{served.name}", "--json", "--socket", cluster.socket)
    assert (done.returncode, done.stderr) == (0, "")
    views = msgspec.json.decode(done.stdout, type=list[VirtualServerView])
    (one,) = [view for view in views if view.kind == "cluster"]
    assert one.counters is not None
    told: dict[str, Any] = msgspec.to_builtins(one.counters)
    return told


def of_host(cluster: Cluster, served: Served, host: str) -> dict[str, Any]:
    """What is told of one of its endpoints."""
    where = str(Endpoint(cluster.lab.node(host).address(served.flavour.family), 9000))
    found = [
        one for one in counted(cluster, served).get("endpoints", ()) if one["address"] == where
    ]
    assert len(found) == 1, f"{where} is not among the endpoints"
    return dict(found[0])


@pytest.mark.usefixtures("silent")
def test_an_endpoint_that_refuses_is_set_aside(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL, SILENT, annotations=ROUND_ROBIN)
    assert {*served.pods("client-1", REQUESTS)} == {LOCAL}
    failing = of_host(cluster, served, SILENT)
    # At first for a second, then for two, …: that many trials would take a minute.
    assert 1 <= failing["failures"] <= 6
    assert failing["set_aside"]
    assert max(one["seconds"] for one in failing["set_aside"]) <= 60 * FIRST_SECONDS
    assert "so_far" in failing
    good = of_host(cluster, served, LOCAL)
    assert (good["so_far"], good["failures"]) == (REQUESTS, 0)
    text = cluster.cli("services", f"test/{served.name}", "--socket", cluster.socket).stdout
    assert f"{cluster.lab.node(SILENT).ipv4}:9000 (set aside" in text
    assert "1 set aside" in text


@pytest.mark.usefixtures("silent")
def test_a_service_that_keeps_failing_endpoints_tries_them_again_and_again(
    cluster: Cluster,
) -> None:
    keeps = {**ROUND_ROBIN, "vipd/keep-failing-endpoints": "true"}
    served = cluster.serve(TCP4, LOCAL, SILENT, annotations=keeps)
    assert {*served.pods("client-1", REQUESTS)} == {LOCAL}
    failing = of_host(cluster, served, SILENT)
    assert failing["failures"] >= REQUESTS // 2 - 1
    assert "set_aside" not in failing
    served.change(annotations=ROUND_ROBIN)
    served.pods("client-1", 3)
    assert of_host(cluster, served, SILENT)["set_aside"]
    served.change(annotations=keeps)
    assert "set_aside" not in of_host(cluster, served, SILENT)


@pytest.mark.usefixtures("silent")
def test_explain_knows_who_is_set_aside(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL, SILENT, annotations=ROUND_ROBIN)
    served.pods("client-1", 3)
    client = str(cluster.lab.node("client-1").ipv4)
    to = f"{served.address}:80"
    failing = str(Endpoint(cluster.lab.node(SILENT).ipv4, 9000))
    done = cluster.cli("explain", client, to, "--live", "--json", "--socket", cluster.socket)
    told = json.loads(done.stdout)
    (line,) = [one for one in told["live"] if one.startswith(f"endpoint {failing}: ")]
    assert "set aside by worker " in line
    assert f" {of_host(cluster, served, SILENT)['failures']} failed," in line


def test_connections_are_counted_while_they_are_open_and_after(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL, type="NodePort")
    node, port = served.on_node()
    with ExitStack() as stack:
        there = [
            stack.enter_context(held(cluster, "client-1", served.address)),
            stack.enter_context(held(cluster, "client-1", served.address)),
            stack.enter_context(held(cluster, "outside", node, port)),
        ]
        assert {one.who() for one in there} == {LOCAL}
        done = cluster.cli("services", f"test/{served.name}", "--json", "--socket", cluster.socket)
        told = {
            one["kind"]: (one["counters"]["open"], one["counters"]["so_far"])
            for one in json.loads(done.stdout)
        }
        assert told == {"cluster": (2, 2), "node-port": (1, 1)}
        served.endpoints(REMOTE)
        assert of_host(cluster, served, LOCAL) | {"set_aside": []} == {
            "address": str(Endpoint(cluster.lab.node(LOCAL).ipv4, 9000)),
            "open": 2, "so_far": 2, "failures": 0, "departed": True, "set_aside": [],
        }  # fmt: skip
    until(lambda: counted(cluster, served)["open"] == 0, "the connections have ended")
    assert served.ask("client-1").pod == REMOTE
    assert counted(cluster, served)["so_far"] == 3


def test_sessions_are_counted(cluster: Cluster) -> None:
    served = cluster.serve(UDP4, LOCAL)
    served.pods("client-1", 5)
    told = counted(cluster, served)
    assert (told["open"], told["so_far"]) == (5, 5)
    assert sorted(told["workers"]) == list(range(len(os.sched_getaffinity(0))))


def test_a_service_that_nobody_has_asked(cluster: Cluster) -> None:
    told = counted(cluster, cluster.serve(TCP4, LOCAL))
    assert told.pop("workers")
    counts = ("open", "so_far", "denied", "unserved", "remembered", "forgotten")
    assert told == dict.fromkeys(counts, 0)


def test_the_status_tells_of_the_workers(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL)
    count = len(os.sched_getaffinity(0))

    def status() -> Status:
        done = cluster.cli("status", "--json", "--socket", cluster.socket)
        return msgspec.json.decode(done.stdout, type=Status)

    with held(cluster, "client-1", served.address) as one:
        assert one.who() == LOCAL
        before = status()
        assert [each.number for each in before.workers] == list(range(count))
        assert {each.listeners for each in before.workers} == {1}
        assert sum(each.open for each in before.workers) == 1
        assert sum(each.counters["tcp_accepted"] for each in before.workers) >= 1
        assert cluster.status().workers == (), "who does not ask for them is not told"
        text = cluster.cli("status", "--socket", cluster.socket).stdout
        assert f"workers    0: pid {before.workers[0].pid}, up " in text
        assert "counted    tcp accepted " in text
    os.kill(before.workers[0].pid, signal.SIGKILL)
    until(
        lambda: [each.restarts for each in status().workers] == [1] + [0] * (count - 1),
        "the worker is back",
    )
    assert before.workers[0].pid not in [each.pid for each in status().workers]


def test_workers_have_no_privileges(cluster: Cluster) -> None:
    there = workers(cluster)
    assert len(there) == len(os.sched_getaffinity(0))
    for one in there:
        told = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{one}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert set(told["Uid"].split()) == {"65534"}
        assert {told[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
        assert told["NoNewPrivs"] == "1"


def test_a_worker_that_is_silent_is_told_and_the_table_shown(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL)
    done = cluster.cli("status", "--json", "--socket", cluster.socket)
    first = msgspec.json.decode(done.stdout, type=Status).workers[0].pid
    os.kill(first, signal.SIGSTOP)
    try:
        text = cluster.cli("status", "--socket", cluster.socket).stdout
        assert f"failing    worker 0 (pid {first}) does not answer" in text
        assert "health     degraded" in text
    finally:
        os.kill(first, signal.SIGCONT)
    assert counted(cluster, served)["open"] == 0

"""What only userspace mode has: its workers, who outlive the daemon, and what they may do."""

import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.netns.cluster import LOCAL, REMOTE, TCP4, Cluster, Served, held, until

pytestmark = [pytest.mark.netns, pytest.mark.essential, pytest.mark.modes("userspace")]

NewCluster = Callable[..., Cluster]


@pytest.fixture
def cluster(new_cluster: NewCluster) -> Cluster:
    built = new_cluster()
    built.start()
    return built


def workers(cluster: Cluster) -> set[int]:
    """Process numbers of the workers in the node's network namespace."""
    here = os.stat(cluster.lab.path("node")).st_ino
    found = set()
    for one in Path("/proc").glob("[0-9]*"):
        try:
            words = (one / "cmdline").read_bytes().split(b"\0")
            if b"vipd.backends.userspace.forwarder" in words:
                found |= {int(one.name)} if os.stat(one / "ns/net").st_ino == here else set()
        except OSError:
            continue  # it has ended
    return found


def test_connections_and_workers_outlive_the_daemon(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL)
    there = workers(cluster)
    assert len(there) == len(os.sched_getaffinity(0))
    with held(cluster, "client-1", served.address) as connection:
        for end in (cluster.stop, cluster.kill):
            end()
            assert connection.who() == LOCAL
            assert served.ask("client-1").pod == LOCAL
            cluster.start()
            assert connection.who() == LOCAL
            assert workers(cluster) == there
        served.endpoints(REMOTE)
        assert served.ask("client-1").pod == REMOTE
        assert connection.who() == LOCAL


def test_a_worker_that_is_killed_takes_its_own_connections_only(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL)
    there = workers(cluster)
    killed = min(there)
    with ExitStack() as stack:
        connections = [
            stack.enter_context(held(cluster, "client-1", served.address)) for _ in range(24)
        ]
        assert {one.who() for one in connections} == {LOCAL}
        os.kill(killed, signal.SIGKILL)
        until(lambda: len(workers(cluster) - {killed}) == len(there), "another one has begun")
        alive = 0
        for one in connections:
            try:
                alive += one.who() == LOCAL
            except ConnectionError:
                continue
        assert 0 < alive < len(connections) or len(there) == 1
    assert set(served.pods("client-1")) == {LOCAL}
    served.endpoints(REMOTE)
    assert set(served.pods("client-1")) == {REMOTE}


def test_workers_have_no_privileges(cluster: Cluster) -> None:
    for one in workers(cluster):
        told = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{one}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert set(told["Uid"].split()) == {"65534"}
        assert {told[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
        assert told["NoNewPrivs"] == "1"


def test_a_port_that_another_program_has_is_named_and_the_others_work(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL)
    _, port = served.on_node()
    program = (
        f"import socket\nmade = socket.create_server(('', {port}))\n"
        "print(flush=True)\nmade.accept()"
    )
    other = cluster.lab.popen("node", [sys.executable, "-c", program], stdout=-1)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        port_of = {**served.port(), "nodePort": port}
        manifest = served.manifest()
        manifest["spec"] |= {"type": "NodePort", "ports": [port_of]}
        alike = Served(cluster, TCP4, {"ports": [{**served.port(), "port": port}]})
        alike._endpoints = [alike.endpoint(LOCAL)]
        cluster.apply(manifest, alike.manifest(), alike.slice())
        until(lambda: len(cluster.status().rejected) == 2, "the conflicts are told")
        for told in cluster.status().rejected:
            assert f":{port}" in told
            assert "pid " in told
        assert served.ask("client-1").pod == LOCAL
        # The address is not the node's for nothing.
        held = cluster.lab.exec("node", ["ip", "route", "show", "table", "local", "proto", "119"])
        rules = cluster.lab.exec("node", ["nft", "list", "table", "ip", "vipd-userspace"])
        for listing in (held.stdout, rules.stdout):
            assert str(served.address) in listing
            assert str(alike.address) not in listing
    finally:
        other.kill()
        other.communicate()


def test_half_close_and_a_long_reply(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, REMOTE)
    with cluster.lab.socket("client-1", socket.AF_INET) as client:
        client.settimeout(20)
        client.connect((str(served.address), 80))
        client.sendall(b"who\n" * 20_000)
        client.shutdown(socket.SHUT_WR)
        lines = b""
        while part := client.recv(65536):
            lines += part
    assert lines.count(b"\n") == 20_000
    assert {line.partition(b" ")[0] for line in lines.splitlines()} == {REMOTE.encode()}

"""The way of questions to the node's DNS server: it comes, comes back, and goes without a loss."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import dns.exception
import pytest
from tests.netns.cluster import UDP4, Cluster, Manifest, endpoint_slice, service, until
from tests.netns.test_dns_cluster_ip import local_routes
from tests.netns.test_dns_operations import Configured
from tests.netns.test_dns_server import ask

from vipd.bench.lab import Lab
from vipd.proxy.names import Family, parse_address

pytestmark = pytest.mark.netns

CLUSTER_IP = "10.96.0.2"
TABLE = ("inet", "vipd-dns")
LINK_LOCAL = "169.254.20.10"
NAME = "kube-dns.test.svc.cluster.local"
ASK_ANY = """
import json, select, socket, sys
import dns.message
question = dns.message.make_query(sys.argv[2], "A").to_wire()
counts = {"node": 0, "endpoint": 0, "lost": 0}
def open():
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(5)  # what is lost does not come later; what is slow does
    made.connect((sys.argv[1], 53))
    return made
while not select.select([sys.stdin], [], [], 0.001)[0]:
    with open() as asked:
        try:
            asked.send(question)
            reply = asked.recv(2000)
            counts["node" if reply[2] & 0x80 and reply[:2] == question[:2] else "endpoint"] += 1
        except OSError as error:
            counts["lost"] += 1
            counts.setdefault("why", []).append(repr(error))
    if sum(counts[one] for one in ("node", "endpoint", "lost")) == 1:
        print("first", flush=True)
print(json.dumps(counts))
"""
"""Asks from a new port each time, and tells who answered: the node, or an endpoint that echoes."""


@pytest.fixture
def configured(lab: Lab, tmp_path: Path) -> Iterator[Configured]:
    path = tmp_path / "vipd.yaml"
    built = Cluster(lab, tmp_path, "--config", str(path))
    made = Configured(built, path)
    made.write(f"{{listen: [{CLUSTER_IP}, {LINK_LOCAL}]}}")
    try:
        built.start()
        yield made
    finally:
        built.stop()
        done = built.cli("cleanup", "--socket", built.socket)
        assert done.returncode == 0, done.stdout + done.stderr
        assert local_routes(lab) == []
        assert built.nft("list", "ruleset") == ""


def kube_dns(lab: Lab) -> list[Manifest]:
    """The DNS service, with an endpoint that answers anything."""
    port = {"name": "dns", "port": 53, "protocol": "UDP"}
    endpoint = {"addresses": [str(lab.node("web-1").ipv4)], "conditions": {}}
    return [
        service("kube-dns", parse_address(CLUSTER_IP), ports=[port]),
        endpoint_slice(
            "kube-dns", Family.IPV4, [endpoint], [{**port, "port": UDP4.target}], of="kube-dns"
        ),
    ]


def is_answered(lab: Lab) -> bool:
    try:
        return ask(lab, NAME, "A", CLUSTER_IP) == [CLUSTER_IP]
    except (OSError, dns.exception.DNSException):
        return False


def test_it_comes_with_the_service_comes_back_and_goes_without_a_loss(
    configured: Configured,
) -> None:
    cluster, lab = configured.cluster, configured.cluster.lab
    # Nobody says that the address is a cluster IP: it is not the node's, and that is told.
    until(lambda: cluster.status().dns_elsewhere, "it is noticed")
    assert cluster.status().dns_elsewhere == (f"{CLUSTER_IP}:53",)
    done = cluster.cli("status", "--socket", cluster.socket)
    assert done.returncode == 3, done.stdout
    assert f"{CLUSTER_IP}:53 (not the node's), {LINK_LOCAL}:53; " in done.stdout
    assert f"failing    DNS at {CLUSTER_IP}:53: the address is not this node's" in done.stdout
    done = cluster.cli("dns", "status", "--socket", cluster.socket)
    assert done.returncode == 3, done.stdout
    assert f"answers on   {CLUSTER_IP}:53 (not the node's), {LINK_LOCAL}:53\n" in done.stdout
    # The Service comes while the daemon runs.
    cluster.apply(*kube_dns(lab))
    until(lambda: is_answered(lab), "the Service's address is answered")
    until(lambda: not cluster.status().degraded, "and all is well")
    assert local_routes(lab) == [CLUSTER_IP, LINK_LOCAL]
    # Somebody takes the route; then the table, and everything.
    route = ["ip", "route", "del", "local", CLUSTER_IP, "dev", "lo", "table", "local"]
    lab.exec("node", [*route, "proto", "117"], check=True)
    for number, damage in enumerate((["delete", "table", *TABLE], ["flush", "ruleset"]), 2):
        until(partial(_is_repaired, cluster, number - 1), "it is told and repaired")
        assert is_answered(lab)
        assert "notrack" in cluster.nft("list", "ruleset")
        cluster.nft(*damage)
    until(partial(_is_repaired, cluster, 3), "it is told and repaired")
    # By a signal, it is looked at what nobody tells.
    os.kill(cluster.status().pid, signal.SIGHUP)
    assert "notrack" in cluster.nft("list", "ruleset")
    _goes_without_a_loss(configured)


def _is_repaired(cluster: Cluster, times: int) -> bool:
    """Whether the way was put right so often because of what the kernel told."""
    lines = cluster.daemon.log_tail(1000).splitlines()
    return sum("repaired" in line and "of=dns" in line for line in lines) == times


def _goes_without_a_loss(configured: Configured) -> None:
    """The cluster IP is given back to its endpoints, and taken again, while it is asked."""
    cluster, lab = configured.cluster, configured.cluster.lab
    asking = [
        lab.popen(
            host,
            [sys.executable, "-c", ASK_ANY, CLUSTER_IP, NAME],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for host in ("client-1", "node")
    ]
    try:
        for one in asking:
            assert one.stdout is not None
            assert one.stdout.readline() == b"first\n"
        for _ in range(3):
            configured.write(f"{{listen: [{LINK_LOCAL}]}}")
            until(lambda: CLUSTER_IP not in cluster.nft("list", "table", *TABLE), "its rules go")
            until(lambda: configured.status()["listens"] == [f"{LINK_LOCAL}:53"], "it has gone")
            configured.write(f"{{listen: [{CLUSTER_IP}, {LINK_LOCAL}]}}")
            until(lambda: is_answered(lab), "the node answers again")
        configured.write(f"{{listen: [{LINK_LOCAL}]}}")
        until(lambda: local_routes(lab) == [LINK_LOCAL], "its route goes last")
    finally:
        told = [json.loads(one.communicate(b"", timeout=60)[0]) for one in asking]
    assert [one["lost"] for one in told] == [0, 0], told
    assert all(one["node"] > 10 and one["endpoint"] > 10 for one in told), told

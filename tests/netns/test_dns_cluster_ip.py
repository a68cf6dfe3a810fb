"""The DNS server at the DNS service's own cluster IP: the node answers, whatever the dataplane."""

import json
import subprocess
import sys
from collections.abc import Iterator

import dns.message
import dns.query
import msgspec
import pytest
from tests.netns.cluster import (
    TCP4,
    Cluster,
    Manifest,
    endpoint_slice,
    service,
    until,
)
from tests.netns.modes import NFTABLES, USERSPACE
from tests.netns.test_dns_server import ASK

from vipd.bench.lab import Lab
from vipd.proxy.explain import Explanation, Verdict
from vipd.proxy.names import Family, parse_address

pytestmark = pytest.mark.netns

DNS4, DNS6 = parse_address("10.96.0.10"), parse_address("fd00:10:96::a")
KUBERNETES = parse_address("10.96.0.1")
NAME = "kubernetes.test.svc.cluster.local"
METRICS = 9153
HOSTS = ("client-1", "node")


def manifests(lab: Lab) -> list[Manifest]:
    """The DNS service with a port that the pods behind it have to answer, as kubeadm makes it."""
    ports = [
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
        {"name": "metrics", "port": METRICS, "protocol": "TCP"},
    ]
    targets = [{**one, "port": TCP4.target} for one in ports]
    made = [
        service("kube-dns", DNS4, DNS6, ports=ports),
        service("kubernetes", KUBERNETES, ports=[{"name": "https", "port": 443}]),
    ]
    for family in Family:
        address = str(lab.node("web-1").address(family))
        endpoint = {"addresses": [address], "nodeName": "node", "conditions": {}}
        name = f"kube-dns-{family}".lower()
        made.append(endpoint_slice(name, family, [endpoint], targets, of="kube-dns"))
    return made


@pytest.fixture(scope="module")
def cluster(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    listens = (f"{DNS4}:53", f"[{DNS6}]:53")
    flags = [word for one in listens for word in ("--dns-listen", one)]
    built = Cluster(lab, tmp_path_factory.mktemp("vipd"), *flags)
    built.apply(*manifests(lab))
    try:
        built.start()
        yield built
    finally:
        built.stop()
        done = built.cli("cleanup", "--socket", built.socket)
        assert done.returncode == 0, done.stdout + done.stderr
        assert local_routes(lab) == []
        assert built.nft("list", "ruleset") == ""


def local_routes(lab: Lab) -> list[str]:
    """Routes of the DNS server to addresses."""
    found = []
    for family in ("-4", "-6"):
        shown = ["ip", family, "-json", "route", "show", "table", "local", "proto", "117"]
        done = lab.exec("node", shown, check=True)
        found += [one["dst"] for one in json.loads(done.stdout or "[]")]
    return sorted(found)


def answers(lab: Lab, host: str, at: str, *, tcp: bool) -> bool:
    question = dns.message.make_query(NAME, "A")
    ask = dns.query.tcp if tcp else dns.query.udp
    reply = lab.run(host, lambda: ask(question, at, timeout=5))
    return [str(one) for rrset in reply.answer for one in rrset] == [str(KUBERNETES)]


def check(cluster: Cluster) -> None:
    """Everybody is answered by the node, and the service's other port by its endpoint."""
    for address in (DNS4, DNS6):
        for host in HOSTS:
            for tcp in (False, True):
                assert answers(cluster.lab, host, str(address), tcp=tcp), (address, host, tcp)
            assert cluster.ask(host, "tcp", address, METRICS).pod == "web-1"
    tracked = cluster.lab.exec("node", ["cat", "/proc/net/nf_conntrack"]).stdout
    asked = [line for line in tracked.splitlines() if f"dst={DNS4} " in line]
    assert not [line for line in asked if "dport=53 " in line]
    assert local_routes(cluster.lab) == sorted(map(str, (DNS4, DNS6)))


def test_answered_by_the_node_in_each_mode_and_between_them(cluster: Cluster) -> None:
    until(lambda: len(local_routes(cluster.lab)) == 2, "the addresses are the node's")
    check(cluster)
    asking = [
        cluster.lab.popen(
            host,
            [sys.executable, "-c", ASK, str(DNS4), NAME],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for host in HOSTS
    ]
    try:
        for one in asking:
            assert one.stdout is not None
            assert one.stdout.readline() == b"first\n"
        for mode in (USERSPACE.mode, NFTABLES.mode):
            done = cluster.cli("mode", mode, "--drain", "0s", "--socket", cluster.socket)
            assert done.returncode == 0, done.stdout + done.stderr
            until(lambda: not cluster.status().drains, "nothing of the mode before is left")
            check(cluster)
    finally:
        told = [json.loads(one.communicate(b"", timeout=60)[0]) for one in asking]
    assert [one["lost"] for one in told] == [0, 0], told
    assert all(one["answered"] > 50 for one in told)


def test_answered_without_the_daemon(cluster: Cluster) -> None:
    cluster.stop()
    try:
        check(cluster)
    finally:
        cluster.start()
    until(lambda: answers(cluster.lab, "client-1", str(DNS4), tcp=False), "it is answered again")


def test_what_is_told_of_it(cluster: Cluster) -> None:
    done = cluster.cli("services", "test/kube-dns", "--socket", cluster.socket)
    assert done.returncode == 0, done.stderr
    left = [line for line in done.stdout.splitlines() if "this node's DNS server" in line]
    assert sorted(line.split()[2] for line in left) == sorted(
        f"{place}:53/{protocol}" for place in (DNS4, f"[{DNS6}]") for protocol in ("UDP", "TCP")
    )
    command = ["explain", "client-1", f"{DNS4}:53/udp", "--json", "--socket", cluster.socket]
    command[1] = str(cluster.lab.node("client-1").ipv4)
    done = cluster.cli(*command)
    told = msgspec.json.decode(done.stdout, type=Explanation)
    assert (told.verdict, told.path) == (Verdict.PASS, ())
    assert "vipd's DNS server on this node answers" in told.why
    status = cluster.status()
    assert status.dns_listen == (f"{DNS4}:53", f"[{DNS6}]:53")
    done = cluster.cli("status", "--socket", cluster.socket)
    (line,) = [one for one in done.stdout.splitlines() if one.startswith("dns ")]
    assert f"{DNS4}:53, [{DNS6}]:53; 2 services; " in line
    asked = ("dns", "query", "kubernetes", "-n", "test", "--trace", "--socket", cluster.socket)
    done = cluster.cli(*asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{NAME}. A: 1 record, authoritative ({DNS4}:53, UDP, " in done.stdout
    assert "Service test/kubernetes, spec.clusterIPs" in done.stdout
    assert cluster.cli("plan", "-f", str(cluster.folder), "--socket", cluster.socket).stdout == ""

"""The DNS server of the daemon, asked by real resolvers from pods, the node and strangers."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import dns.message
import dns.query
import dns.rcode
import pytest
from tests.netns.cluster import Cluster, Manifest, endpoint_slice, service, until

from vipd.bench import lab_resolv
from vipd.bench.lab import Lab
from vipd.proxy.control import read
from vipd.proxy.names import Family, parse_address

pytestmark = pytest.mark.netns

LINK_LOCAL = "169.254.20.10"
WEB4, WEB6 = parse_address("10.96.0.10"), parse_address("fd00:10:96::10")
WEB = "web.test.svc.cluster.local"
DIG = shutil.which("dig")
needs_dig = pytest.mark.skipif(DIG is None, reason="dig is not there: Debian's bind9-dnsutils")


@pytest.fixture(scope="module")
def module_cluster(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    own = lab.node("node")
    listens = (LINK_LOCAL, str(own.ipv4), f"[{own.ipv6}]:53", "127.0.0.1:53")
    flags = [word for one in listens for word in ("--dns-listen", one)]
    directory = tmp_path_factory.mktemp("vipd")
    built = Cluster(lab, directory, *flags)
    try:
        built.start()
        yield built
    finally:
        built.stop()
        done = built.cli("cleanup", "--socket", built.socket)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "DNS worker" in done.stdout
        assert f"local route to {LINK_LOCAL}" in done.stdout
        assert not (directory / "dns").exists()
        assert built.nft("list", "ruleset") == ""


@pytest.fixture
def web(cluster: Cluster) -> Manifest:
    """A service of both families, answered."""
    (made,) = cluster.apply(
        service("web", WEB4, WEB6, ports=[{"name": "http", "port": 80, "protocol": "TCP"}])
    )
    until(lambda: ask(cluster.lab, WEB, "A") == [str(WEB4)], "web is answered")
    return made


def query(lab: Lab, host: str, name: str, kind: str, at: str, *, tcp: bool) -> dns.message.Message:
    """Ask with dnspython, from a host of the lab."""
    question = dns.message.make_query(name, kind)
    ask = dns.query.tcp if tcp else dns.query.udp
    return lab.run(host, lambda: ask(question, at, timeout=5))


def ask(lab: Lab, name: str, kind: str, at: str = LINK_LOCAL, host: str = "client-1") -> list[str]:
    """Return what a host of the lab is told."""
    reply = query(lab, host, name, kind, at, tcp=False)
    return sorted(str(one) for rrset in reply.answer for one in rrset.to_rdataset())


@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
@pytest.mark.parametrize("at", ["link-local", "ipv4", "ipv6"])
@pytest.mark.parametrize("host", ["client-1", "node"])
def test_from_pods_and_the_node(
    cluster: Cluster, web: Manifest, host: str, at: str, tcp: bool
) -> None:
    own = cluster.lab.node("node")
    address = {"link-local": LINK_LOCAL, "ipv4": str(own.ipv4), "ipv6": str(own.ipv6)}[at]
    for kind, value in (("A", WEB4), ("AAAA", WEB6)):
        reply = query(cluster.lab, host, WEB, kind, address, tcp=tcp)
        assert [str(one) for rrset in reply.answer for one in rrset.to_rdataset()] == [str(value)]


@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_strangers_are_refused(cluster: Cluster, web: Manifest, tcp: bool) -> None:
    own = str(cluster.lab.node("node").ipv4)
    reply = query(cluster.lab, "outside", WEB, "A", own, tcp=tcp)
    assert (reply.rcode(), reply.answer) == (dns.rcode.REFUSED, [])


@needs_dig
@pytest.mark.parametrize("transport", ["+notcp", "+tcp", "+tcp +keepopen"])
def test_dig(cluster: Cluster, web: Manifest, transport: str) -> None:
    names = [(WEB, "A"), (WEB, "AAAA"), (f"_http._tcp.{WEB}", "SRV"), ("no.cluster.local", "A")]
    asked = [word for name, kind in names for word in (*transport.split(), name, kind)]
    done = cluster.lab.exec("client-1", [str(DIG), f"@{LINK_LOCAL}", "+noall", "+answer", *asked])
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.split() for line in done.stdout.splitlines() if not line.startswith(";")]
    assert [(one[0], one[3], one[-1]) for one in found if one] == [
        (f"{WEB}.", "A", str(WEB4)),
        (f"{WEB}.", "AAAA", str(WEB6)),
        (f"_http._tcp.{WEB}.", "SRV", f"{WEB}."),
    ]


RESOLVE = """
import json, socket, sys
found = []
for name in sys.argv[1:]:
    try:
        told = socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)
        found.append(sorted({one[4][0] for one in told}))
    except socket.gaierror as error:
        found.append(error.errno == socket.EAI_NONAME)
print(json.dumps(found))
"""


def test_glibc_through_resolv_conf(cluster: Cluster, web: Manifest) -> None:
    lab = cluster.lab
    netns = lab.namespace("client-1")
    lab_resolv.point_at_nameserver(netns, lab.prefix, parse_address(LINK_LOCAL), "test")
    try:
        names = ["web", "web.test", WEB, "nobody.test.svc.cluster.local"]
        done = lab.exec("client-1", [sys.executable, "-c", RESOLVE, *names])
        assert done.returncode == 0, done.stderr
        both = sorted(map(str, (WEB4, WEB6)))
        assert json.loads(done.stdout) == [both, both, both, True]
    finally:
        lab_resolv.forget_nameserver(netns, lab.prefix)


def test_changes_are_answered(cluster: Cluster) -> None:
    headless = service("db", clusterIP="None", ports=[{"name": "sql", "port": 5432}])
    pods = [cluster.lab.node(f"web-{n}").ipv4 for n in (1, 2)]
    ready = [{"addresses": [str(one)], "conditions": {"ready": True}} for one in pods]
    port = [{"name": "sql", "port": 5432, "protocol": "TCP"}]
    cluster.apply(headless, endpoint_slice("db", Family.IPV4, ready, port))
    name, lab = "db.test.svc.cluster.local", cluster.lab
    until(lambda: ask(lab, name, "A") == sorted(map(str, pods)), "both endpoints are answered")
    cluster.apply(endpoint_slice("db", Family.IPV4, ready[:1], port))
    until(lambda: ask(lab, name, "A") == [str(pods[0])], "one endpoint is answered")
    cluster.remove(headless)
    until(lambda: ask(lab, name, "A") == [], "nothing is answered")


def test_its_traffic_is_not_tracked(cluster: Cluster, web: Manifest) -> None:
    for tcp in (False, True):
        query(cluster.lab, "client-1", WEB, "A", LINK_LOCAL, tcp=tcp)
    done = cluster.lab.exec("node", ["cat", "/proc/net/nf_conntrack"])
    assert LINK_LOCAL not in done.stdout


def test_the_daemon_may_be_away(cluster: Cluster, web: Manifest) -> None:
    cluster.kill()
    assert ask(cluster.lab, WEB, "A") == [str(WEB4)]
    cluster.start()
    assert ask(cluster.lab, WEB, "A") == [str(WEB4)]


def test_no_question_is_lost_while_it_is_restarted(cluster: Cluster, web: Manifest) -> None:
    asking = cluster.lab.popen(
        "client-1",
        [sys.executable, "-c", ASK, LINK_LOCAL, WEB],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert asking.stdout is not None
    with asking:
        assert asking.stdout.readline() == b"first\n"
        for _ in range(2):
            cluster.stop()
            cluster.start()
        until(lambda: len(json.loads(read(cluster.socket, "dns"))["workers"]) == 1, "it is told")
        told, _ = asking.communicate(b"", timeout=60)
    counts = json.loads(told)
    assert counts["lost"] == 0
    assert counts["answered"] > 100


ASK = """
import json, select, socket, sys
import dns.message, dns.query
question = dns.message.make_query(sys.argv[2], "A")
counts = {"answered": 0, "lost": 0}
while not select.select([sys.stdin], [], [], 0.002)[0]:
    try:
        ask = dns.query.tcp if counts["answered"] % 4 == 0 else dns.query.udp
        assert ask(question, sys.argv[1], timeout=2).answer
        counts["answered"] += 1
    except Exception as error:
        counts["lost"] += 1
        counts.setdefault("why", []).append(repr(error))
    if counts["answered"] == 1:
        print("first", flush=True)
print(json.dumps(counts))
"""


def test_status(cluster: Cluster, web: Manifest) -> None:
    done = cluster.cli("dns", "status", "--socket", cluster.socket)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"answers on   {LINK_LOCAL}:53, " in done.stdout
    assert "1 service, told " in done.stdout


def test_alone_without_root(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("alone")
    (folder / "web.json").write_text(json.dumps(service("web", WEB4, ports=[{"port": 80}])))
    command = [
        *("setpriv", "--bounding-set=-all", "--inh-caps=-all"),  # what root may do is lost by it
        *(sys.executable, "-P", "-m", "vipd.proxy.cli", "dns", "serve"),
        *("--manifests", str(folder), "--listen", "127.0.0.1:5353"),
    ]
    alone = lab.popen("client-2", command, stdout=subprocess.PIPE)
    try:
        assert alone.stdout is not None
        assert alone.stdout.readline() == b"answers on 127.0.0.1:5353\n"
        alone.send_signal(signal.SIGHUP)  # there is no file to read again
        question = dns.message.make_query(WEB, "A")
        reply = lab.run(
            "client-2", lambda: dns.query.udp(question, "127.0.0.1", port=5353, timeout=5)
        )
        assert str(WEB4) in str(reply.answer[0])
    finally:
        alone.terminate()
        assert alone.wait(20) == 0
        if alone.stdout is not None:
            alone.stdout.close()

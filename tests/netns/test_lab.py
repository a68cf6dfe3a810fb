"""The lab: it comes up, repairs itself, is reachable everywhere, and leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from vipd.bench import lab_netns, lab_resolv
from vipd.bench.lab import Lab, obstacle, running
from vipd.bench.lab_ask import Way
from vipd.bench.lab_container import DaemonStatus, Surroundings, nameserver, serving, surroundings
from vipd.bench.lab_daemon import Daemon
from vipd.bench.lab_errors import LabError
from vipd.bench.lab_site import State
from vipd.bench.lab_topology import STANDARD, Role
from vipd.bench.pod import HTTP_PORT, TCP_PORT, UDP_PORT
from vipd.proxy.names import Family, parse_address

_OBSTACLE = obstacle()
pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(_OBSTACLE is not None, reason=_OBSTACLE or ""),
]

PREFIX = f"vt{os.getpid()}lab"
PORTS: tuple[tuple[Way, int], ...] = (("http", HTTP_PORT), ("tcp", TCP_PORT), ("udp", UDP_PORT))
PODS = tuple(host.name for host in STANDARD.of_role(Role.POD))
FAMILIES = tuple(Family)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(PREFIX) as lab:
        yield lab


@pytest.fixture
def spare() -> Iterator[Lab]:
    """A lab of its own for tests that break it; not up yet."""
    lab = Lab(f"{PREFIX}-spare")
    yield lab
    lab.down()


def names(lab: Lab) -> set[str]:
    return {path.name for path in lab_netns.DIRECTORY.glob(f"{lab.prefix}-*")}


def servers_of(lab: Lab) -> list[str]:
    """Command lines on this machine that name a namespace of the lab."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended meanwhile
            continue
        if f"/{lab.prefix}-" in line:
            found.append(line)
    return found


def served(lab: Lab) -> set[str]:
    return {host.name for host in lab.status() if host.serving}


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("way_port", PORTS, ids=lambda way_port: way_port[0])
@pytest.mark.parametrize("client", ["client-1", "client-2", "outside", "node", "node-2", "web-4"])
def test_every_pod_answers_with_the_source_it_saw(
    lab: Lab, client: str, way_port: tuple[Way, int], family: Family
) -> None:
    way, port = way_port
    for pod in PODS:
        if pod != client:
            answer = lab.ask(client, way, lab.node(pod).address(family), port)
            assert (answer.pod, answer.source) == (pod, lab.node(client).address(family))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_nodes_and_outside_reach_each_other(lab: Lab, family: Family) -> None:
    lab.serve("node", "node-2", "outside")
    for client in ("node", "node-2", "outside", "client-1", "web-4"):
        for target in {"node", "node-2", "outside"} - {client}:
            answer = lab.ask(client, "http", lab.node(target).address(family), HTTP_PORT)
            assert (answer.pod, answer.source) == (target, lab.node(client).address(family))
    lab.silence("node", "node-2", "outside")


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_http_says_which_address_was_asked(lab: Lab, family: Family) -> None:
    web = lab.node("web-5").address(family)
    answer = lab.ask("client-1", "http", web, HTTP_PORT)
    assert (answer.local, answer.local_port) == (web, HTTP_PORT)


@pytest.mark.parametrize("way_port", PORTS, ids=lambda way_port: way_port[0])
def test_the_source_port_can_be_chosen(lab: Lab, way_port: tuple[Way, int]) -> None:
    way, port = way_port
    answer = lab.ask("client-1", way, lab.node("web-1").ipv4, port, source_port=23456)
    assert answer.source_port == 23456


@pytest.mark.parametrize("way", ["tcp", "udp"])
def test_large_replies(lab: Lab, way: Way) -> None:
    port = dict(PORTS)[way]
    answer = lab.ask("client-1", way, lab.node("web-4").ipv4, port, payload=b"bytes 4096")
    assert answer.pod == "web-4"
    assert answer.size_bytes >= 4096


@pytest.mark.parametrize("way_port", PORTS, ids=lambda way_port: way_port[0])
def test_large_requests(lab: Lab, way_port: tuple[Way, int]) -> None:
    way, port = way_port
    answer = lab.ask("client-1", way, lab.node("web-4").ipv6, port, payload=b"x" * 4096)
    assert answer.pod == "web-4"


def test_a_connection_is_held_until_the_client_closes_it(lab: Lab) -> None:
    with lab.socket("client-1") as held, held.makefile("rwb", buffering=0) as lines:
        held.settimeout(5)
        held.connect((str(lab.node("web-2").ipv4), TCP_PORT))
        for _ in range(3):
            lines.write(b"who\n")
            assert lines.readline().startswith(b"web-2 10.244.1.11:")


@pytest.mark.parametrize("way_port", PORTS[1:], ids=lambda way_port: way_port[0])
def test_a_slow_reply_comes_after_the_clients_patience(lab: Lab, way_port: tuple[Way, int]) -> None:
    way, port = way_port
    web = lab.node("web-1").ipv4
    with pytest.raises(TimeoutError):
        lab.ask("client-1", way, web, port, timeout=0.2, payload=b"delay 30")


def test_tcp_nonsense_and_resets_harm_nobody_else(lab: Lab) -> None:
    web = lab.node("web-1").ipv4
    for payload in (b"reset", b"bytes many"):
        with pytest.raises(ConnectionResetError):
            lab.ask("client-1", "tcp", web, TCP_PORT, payload=payload)
    assert lab.ask("client-1", "udp", web, UDP_PORT, payload=b"who").pod == "web-1"


@pytest.mark.parametrize("way", ["tcp", "udp"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_closed_port_refuses(lab: Lab, way: Way, family: Family) -> None:
    with pytest.raises(ConnectionRefusedError):
        lab.ask("client-1", way, lab.node("web-1").address(family), 9)


@pytest.mark.parametrize("text", ["10.96.255.1", "fd00:10:96::ffff"])
def test_an_unknown_service_address_ends_in_silence(lab: Lab, text: str) -> None:
    with pytest.raises(TimeoutError):
        lab.ask("client-1", "tcp", parse_address(text), 80, timeout=0.3)


def test_exec_and_popen_run_inside(lab: Lab) -> None:
    shown = lab.exec("client-1", ["ip", "-brief", "address", "show", "eth0"], check=True)
    assert "10.244.1.11" in shown.stdout
    assert lab.exec("web-1", ["sh", "-c", "exit 7"]).returncode == 7
    assert lab.exec("web-1", ["cat"], input="hello").stdout == "hello"
    with lab.popen("node", ["sleep", "1000"]) as process:
        node = next(host for host in lab.status() if host.name == "node")
        assert process.pid in node.processes
        process.kill()


def test_an_unknown_host_is_named_with_those_there_are(lab: Lab) -> None:
    with pytest.raises(LabError, match=r"no host 'web-9'.*client-1"):
        lab.exec("web-9", ["true"])


def test_up_twice_changes_nothing(spare: Lab) -> None:
    assert spare.up() is True
    before = spare.status()
    assert spare.up() is False
    assert spare.status() == before
    assert {host.state for host in before} == {State.READY.value}
    assert served(spare) == set(PODS)


def test_down_leaves_nothing_behind(spare: Lab) -> None:
    spare.up()
    # Ignores SIGTERM, forks and starts its own session: none of it helps.
    stubborn = spare.popen(
        "node", ["sh", "-c", "trap '' TERM HUP; setsid sleep 1000 & wait"], start_new_session=True
    )
    assert spare.down() == ()
    assert stubborn.wait() == -signal.SIGKILL
    assert names(spare) == set()
    assert servers_of(spare) == []
    assert spare.down() == ()


def test_down_keeps_the_lab_whose_prefix_begins_alike(lab: Lab, spare: Lab) -> None:
    assert spare.prefix.startswith(f"{lab.prefix}-")
    with running(PREFIX + "-spare-2") as longer:
        spare.up()
        spare.down()
        assert names(longer) == {f"{longer.prefix}-{host.name}" for host in STANDARD.hosts}
    assert {host.state for host in lab.status()} == {State.READY.value}


def test_up_starts_only_the_pods_that_died(spare: Lab) -> None:
    spare.up()
    before = {host.name: host.processes for host in spare.status()}
    spare.silence("web-3")
    assert served(spare) == set(PODS) - {"web-3"}
    assert spare.up() is True
    after = {host.name: host.processes for host in spare.status()}
    assert {name for name in after if after[name] != before[name]} == {"web-3"}
    assert served(spare) == set(PODS)


@pytest.mark.parametrize(
    "damage",
    [
        ["ip", "link", "delete", "web-1"],
        ["ip", "address", "flush", "dev", "eth0"],
        ["ip", "link", "set", "eth0", "down"],
    ],
    ids=lambda damage: " ".join(damage[1:3]),
)
def test_up_repairs_what_someone_broke(spare: Lab, damage: list[str]) -> None:
    spare.up()
    spare.exec("node", damage, check=True)
    assert spare.up() is True
    for host in ("client-1", "outside"):
        assert spare.ask(host, "http", spare.node("web-1").ipv4, HTTP_PORT).pod == "web-1"


# Ends the process with SIGKILL at the n-th call into lab_hosts or lab_netns that changes something.
KILLED_UP = """
import os, sys, signal
from vipd.bench import lab_hosts, lab_netns
from vipd.bench.lab import Lab
left = [int(sys.argv[2])]
def deadly(call):
    def instead(*arguments):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return instead
lab_netns._mount = deadly(lab_netns._mount)
lab_hosts.apply = deadly(lab_hosts.apply)
Lab(sys.argv[1]).up()
"""


def killed_up(lab: Lab, calls: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_UP, lab.prefix, str(calls)], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("calls", [1, 4, 12, 14, 20])
def test_up_after_a_killed_up(spare: Lab, calls: int) -> None:
    killed_up(spare, calls)
    assert spare.up() is True
    assert {host.state for host in spare.status()} == {State.READY.value}
    assert spare.ask("outside", "udp", spare.node("web-6").ipv6, UDP_PORT).pod == "web-6"


@pytest.mark.parametrize("calls", [1, 4, 12, 14, 20])
def test_down_after_a_killed_up(spare: Lab, calls: int) -> None:
    killed_up(spare, calls)
    assert spare.down() == ()
    assert names(spare) == set()
    assert servers_of(spare) == []


def test_a_foreign_namespace_is_refused_and_left(spare: Lab) -> None:
    foreign = f"{spare.prefix}-node"
    subprocess.run(["ip", "netns", "add", foreign], check=True)
    try:
        with subprocess.Popen(["ip", "netns", "exec", foreign, "sleep", "1000"]) as process:
            before = lab_netns.identity(spare.path("node"))
            with pytest.raises(LabError, match=f"{foreign} exists and was not made by this lab"):
                spare.up()
            assert names(spare) == {foreign}
            assert spare.down() == (foreign,)
            assert lab_netns.identity(spare.path("node")) == before
            assert process.poll() is None
            process.kill()
    finally:
        subprocess.run(["ip", "netns", "delete", foreign], check=True)


@pytest.mark.parametrize("prefix", ["", "-x", "a b", "../x", "X", "x" * 60])
def test_a_prefix_that_is_no_name_is_refused(prefix: str) -> None:
    with pytest.raises(LabError, match="prefix"):
        Lab(prefix)


def test_a_failed_up_takes_everything_away_again(
    spare: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(LabError, match="did not start"):
        spare.up()
    assert names(spare) == set()


def test_sockets_stay_where_they_were_made(lab: Lab) -> None:
    with lab.socket("client-2", socket.AF_INET6, socket.SOCK_DGRAM) as opened:
        opened.connect((str(lab.node("web-1").ipv6), UDP_PORT))
        assert opened.getsockname()[0] == str(lab.node("client-2").ipv6)


# What a container finds

SHOP = """
apiVersion: v1
kind: Service
metadata: {name: kubernetes, namespace: default}
spec: {clusterIP: 10.96.0.1, ports: [{name: https, port: 443}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: shop}
status: {podIP: 10.244.1.21}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: shop}
spec: {enableServiceLinks: false}
status: {podIPs: [{ip: "fd00:10:244:1::22"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: ended, namespace: elsewhere}
status: {podIP: 10.244.1.23, phase: Succeeded}
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop.yaml"
    path.write_text(SHOP)
    return path


def told(found: Surroundings) -> tuple[str, set[str]]:
    return found.namespace, {name.partition("_")[0] for name in found.variables}


def test_what_a_container_finds_is_that_of_its_pod(lab: Lab, shop: Path) -> None:
    manifests = [str(shop)]
    for name, namespace, services in (
        ("web-1", "shop", {"KUBERNETES", "WEB"}),
        ("web-2", "shop", {"KUBERNETES"}),  # its Pod wants no service links
        ("web-3", "default", {"KUBERNETES"}),  # its Pod has ended
        ("client-1", "default", {"KUBERNETES"}),  # no Pod has its address
    ):
        assert told(surroundings(lab, name, manifests=manifests)) == (namespace, services)
    assert told(surroundings(lab, "client-1", manifests=manifests, namespace="shop")) == (
        "shop",
        {"KUBERNETES", "WEB"},
    )
    for name in ("node", "node-2", "outside"):
        assert surroundings(lab, name, manifests=manifests) == Surroundings()


def test_manifests_that_cannot_be_read_are_told(lab: Lab, shop: Path) -> None:
    shop.write_text(SHOP.replace("10.96.0.10,", "nowhere,"))
    (problem,) = surroundings(lab, "web-1", manifests=[str(shop)]).problems
    assert "Service shop/web: spec.clusterIP: 'nowhere' is not an IP address" in problem


def test_without_a_daemon_nothing_is_found(lab: Lab, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:  # not in the lab's namespace
        stranger.bind(str(tmp_path / "stranger"))
        stranger.listen()
        assert serving(lab) is None
        assert surroundings(lab, "web-1") == Surroundings()


def test_the_daemon_of_the_lab_says_which_manifests(
    lab: Lab, spare: Lab, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serving(spare) is None  # not up yet
    spare.up()
    monkeypatch.chdir(tmp_path)
    daemon = Daemon(spare, Path("shop.yaml"), tmp_path)  # relative: to where the daemon works
    daemon.start()
    try:
        monkeypatch.chdir("/")
        running_daemon = serving(spare)
        assert running_daemon is not None
        assert running_daemon.manifests == ("shop.yaml",)
        assert told(surroundings(spare, "web-1")) == ("shop", {"KUBERNETES", "WEB"})
        # Another lab's pods know nothing of it.
        assert serving(lab) is None
    finally:
        daemon.stop()
    assert serving(spare) is None


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ((), None),
        (("10.96.0.53:53",), "10.96.0.53"),
        (("127.0.0.1:53", "[::1]:53", "169.254.20.10:53"), "169.254.20.10"),
        (("192.168.77.1:5353", "[fd00:77::1]:53"), "fd00:77::1"),
        (("0.0.0.0:53",), "192.168.77.1"),
        (("[::]:53",), "fd00:77::1"),
        (("somewhere:53", "53", ""), None),
    ],
    ids=str,
)
def test_whom_the_daemon_lets_pods_ask(places: tuple[str, ...], expected: str | None) -> None:
    found = nameserver(DaemonStatus(pid=1, dns_listen=places), STANDARD)
    assert (None if found is None else str(found)) == expected


ZONE = {
    "web.shop.svc.cluster.local.": "10.96.0.10",
    "web.default.svc.cluster.local.": "10.96.0.20",
}


@contextmanager
def names_answered(lab: Lab, zone: Mapping[str, str]) -> Iterator[list[str]]:
    """A name server for A records on the node's address, port 53; yields the names it was asked."""
    asked: list[str] = []
    address = str(lab.node("node").ipv4)

    def serve() -> None:
        while True:
            raw, client = opened.recvfrom(4096)
            if not raw:
                return
            question = dns.message.from_wire(raw)
            reply = dns.message.make_response(question)
            reply.flags |= dns.flags.AA
            name = question.question[0].name.to_text()
            asked.append(name)
            if name not in zone:
                reply.set_rcode(dns.rcode.NXDOMAIN)
            elif question.question[0].rdtype == dns.rdatatype.A:
                reply.answer.append(dns.rrset.from_text(name, 5, "IN", "A", zone[name]))
            opened.sendto(reply.to_wire(), client)

    with (
        lab.socket("node", type=socket.SOCK_DGRAM) as opened,
        lab.socket("node", type=socket.SOCK_DGRAM) as ending,
    ):
        opened.bind((address, 53))
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield asked
        finally:
            ending.sendto(b"", (address, 53))
            thread.join()


def looked_up(lab: Lab, name: str, host: str) -> tuple[int, list[str]]:
    """What glibc's resolver finds on a host."""
    done = lab.exec(host, ["getent", "ahostsv4", name], timeout=30)
    return done.returncode, sorted({line.split()[0] for line in done.stdout.splitlines()})


def test_hosts_ask_the_name_server_that_they_are_pointed_at(lab: Lab) -> None:
    machine = Path("/etc/resolv.conf").read_text()
    node = lab.node("node").ipv4
    with names_answered(lab, ZONE) as asked:
        lab.point_at_nameserver("web-1", node, "shop")
        lab.point_at_nameserver("web-4", node)  # on the other node
        assert looked_up(lab, "web", "web-1") == (0, ["10.96.0.10"])
        assert asked == ["web.shop.svc.cluster.local."]
        assert looked_up(lab, "web", "web-4") == (0, ["10.96.0.20"])
        assert looked_up(lab, "web.shop", "web-4") == (0, ["10.96.0.10"])
        assert looked_up(lab, "nobody", "web-1") == (2, [])
        # Nobody else is concerned, and it can be changed and undone.
        assert lab.exec("web-2", ["cat", "/etc/resolv.conf"]).stdout == machine
        lab.point_at_nameserver("web-1", node, "default")
        assert looked_up(lab, "web", "web-1") == (0, ["10.96.0.20"])
    for name in ("web-1", "web-4", "web-4"):
        lab.point_at_nameserver(name, None)
    assert lab.exec("web-1", ["cat", "/etc/resolv.conf"]).stdout == machine
    assert list(lab_resolv.named(lab.prefix)) == []


def test_down_takes_resolv_conf_away_but_not_of_others(lab: Lab, spare: Lab) -> None:
    assert spare.prefix.startswith(f"{lab.prefix}-")
    spare.up()
    node = lab.node("node").ipv4
    lab.point_at_nameserver("web-1", node)
    spare.point_at_nameserver("web-1", node)
    subprocess.run(["ip", "netns", "delete", spare.namespace("web-1")], check=True)
    assert list(lab_resolv.named(lab.prefix)) == [lab.namespace("web-1")]
    spare.down()
    assert not (lab_resolv.DIRECTORY / spare.namespace("web-1")).exists()
    assert (lab_resolv.DIRECTORY / lab.namespace("web-1") / "resolv.conf").exists()
    lab.point_at_nameserver("web-1", None)
    assert not (lab_resolv.DIRECTORY / lab.namespace("web-1")).exists()


def test_a_resolv_conf_of_somebody_else_is_refused_and_left(spare: Lab) -> None:
    spare.up()
    folder = lab_resolv.DIRECTORY / spare.namespace("web-1")
    folder.mkdir(parents=True)
    path = folder / "resolv.conf"
    path.write_text("nameserver 192.0.2.1\n")
    try:
        with pytest.raises(LabError, match="was not made by this lab; it is left alone"):
            spare.point_at_nameserver("web-1", spare.node("node").ipv4)
        spare.point_at_nameserver("web-1", None)
        spare.down()
        assert path.read_text() == "nameserver 192.0.2.1\n"
    finally:
        path.unlink()
        folder.rmdir()
        if not list(lab_resolv.DIRECTORY.iterdir()):
            lab_resolv.DIRECTORY.rmdir()


def test_a_resolv_conf_that_cannot_be_written_is_said(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(lab_resolv, "DIRECTORY", tmp_path / "file" / "netns")
    with pytest.raises(LabError, match=r"web-1/resolv\.conf cannot be written: Not a directory"):
        lab.point_at_nameserver("web-1", lab.node("node").ipv4)
    lab.point_at_nameserver("web-1", None)


def vipd_lab(lab: Lab, command: str, *rest: str) -> subprocess.CompletedProcess[str]:
    program = "from vipd.proxy.cli.lab import lab; lab()"
    return subprocess.run(
        [sys.executable, "-c", program, command, "--prefix", lab.prefix, *rest],
        input="typed\n",
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_exec_passes_input_options_and_exit_status(lab: Lab) -> None:
    assert vipd_lab(lab, "exec", "web-1", "cat").stdout == "typed\n"
    assert vipd_lab(lab, "exec", "web-1", "sh", "-c", "exit 7").returncode == 7
    assert "10.244.1.21" in vipd_lab(lab, "exec", "web-1", "ip", "-4", "address").stdout


def test_the_command_exec_tells_wrong_usage_from_a_lab_that_is_down(lab: Lab, spare: Lab) -> None:
    wrong = vipd_lab(lab, "exec", "web-9", "true")
    assert (wrong.returncode, "client-1" in wrong.stderr) == (2, True)
    absent = vipd_lab(spare, "exec", "web-1", "true")
    assert (absent.returncode, "vipd lab up" in absent.stderr) == (1, True)


def test_the_command_exec_sets_the_variables_of_a_pod(lab: Lab, shop: Path) -> None:
    at = ("exec", "-f", str(shop))
    asked = 'echo "$WEB_SERVICE_HOST $KUBERNETES_PORT"'
    assert (
        vipd_lab(lab, *at, "web-1", "sh", "-c", asked).stdout == "10.96.0.10 tcp://10.96.0.1:443\n"
    )
    assert vipd_lab(lab, *at, "web-2", "sh", "-c", asked).stdout == " tcp://10.96.0.1:443\n"
    assert vipd_lab(lab, *at, "node", "sh", "-c", asked).stdout == " \n"
    assert vipd_lab(lab, *at, "--bare", "web-1", "sh", "-c", asked).stdout == " \n"
    assert vipd_lab(lab, "exec", "web-1", "sh", "-c", asked).stdout == " \n"  # no daemon


def test_the_command_exec_points_resolv_conf_at_a_name_server(lab: Lab, shop: Path) -> None:
    address = str(lab.node("node").ipv4)
    with names_answered(lab, ZONE):
        done = vipd_lab(
            lab, "exec", "-f", str(shop), "--dns", address, "web-1", "getent", "ahostsv4", "web"
        )
    assert (done.returncode, done.stdout.split()[0]) == (0, "10.96.0.10")
    shown = vipd_lab(lab, "exec", "web-1", "cat", "/etc/resolv.conf").stdout
    assert shown == Path("/etc/resolv.conf").read_text()
    assert list(lab_resolv.named(lab.prefix)) == []
    wrong = vipd_lab(lab, "exec", "--dns", "web", "web-1", "true")
    assert (wrong.returncode, "'web' is not an IP address" in wrong.stderr) == (2, True)


def test_the_command_exec_says_when_there_are_too_many_variables(lab: Lab, tmp_path: Path) -> None:
    # Together more than the kernel takes whatever the stack limit is: 6 MiB, fs/exec.c.
    many = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": f"service-{i}"},
            "spec": {
                "clusterIP": f"10.96.{i}.1",
                "ports": [{"name": f"port-{port}", "port": port} for port in range(1, 4001)],
            },
        }
        for i in range(10)
    ]
    manifests = tmp_path / "many.json"
    manifests.write_text("\n".join(map(json.dumps, many)))
    failed = vipd_lab(lab, "exec", "-f", str(manifests), "client-1", "true")
    assert failed.returncode == 1
    assert "Argument list too long: the variables of services take" in failed.stderr
    assert vipd_lab(lab, "exec", "-f", str(manifests), "--bare", "client-1", "true").returncode == 0


def test_the_command_status_says_whether_the_lab_is_whole(lab: Lab, spare: Lab) -> None:
    whole = vipd_lab(lab, "status", "--json")
    said = json.loads(whole.stdout)
    assert (whole.returncode, said["up"]) == (0, True)
    assert [host["name"] for host in said["hosts"]] == [host.name for host in STANDARD.hosts]
    assert vipd_lab(spare, "status").returncode == 1


ROOTLESS = """
import sys
from vipd.bench.lab import running
from vipd.bench.pod import HTTP_PORT
with running(sys.argv[1]) as lab:
    for client in ("client-1", "outside"):
        for address in lab.node("web-4").addresses:
            answer = lab.ask(client, "http", address, HTTP_PORT)
            assert (answer.pod, answer.source in lab.node(client).addresses) == ("web-4", True)
    assert lab.exec("client-1", ["true"]).returncode == 0
print("reached")
"""


def test_without_root_in_a_user_namespace() -> None:
    # The uid outside is the caller's: as root this still drops every privilege over the machine.
    way_in = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
    probe = subprocess.run([*way_in, "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"the kernel forbids user namespaces: {probe.stderr.strip()}")
    prefix = f"{PREFIX}-rootless"
    done = subprocess.run(
        [*way_in, sys.executable, "-c", ROOTLESS, prefix],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "reached\n"), done.stderr
    # Nothing in the machine's own /run/netns, where others work at the same time.
    assert list(lab_netns.DIRECTORY.glob(f"{prefix}-*")) == []

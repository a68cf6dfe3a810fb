"""The IPVS backend against a kernel that has it: what stands on the node, and what packets meet.

Compiler and driver without the daemon, on the lab's node. Where the host's kernel has no IPVS these
tests are skipped and run in the machine of tests/vm.
"""

import asyncio
import itertools
import os
import socket
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.netns.cluster import DEADLINE_SECONDS, until

from vipd.backends.ipvs.backend import IpvsCompiler
from vipd.backends.ipvs.compile import Program
from vipd.backends.ipvs.driver import IpvsDriver
from vipd.backends.ipvs.observed import Observed
from vipd.backends.protocol import Committed, Departed
from vipd.bench import lab_netns
from vipd.bench.lab import Lab, obstacle, running
from vipd.bench.pod import TCP_PORT, UDP_PORT
from vipd.proxy.model import Algorithm
from vipd.proxy.names import (
    Address,
    Family,
    NamespacedName,
    Protocol,
    ServicePortName,
    family_of,
    parse_address,
)
from vipd.proxy.settings import DataplaneSettings, IpvsSettings
from vipd.proxy.virtualserver import (
    Changes,
    Endpoint,
    Key,
    Kind,
    Masquerade,
    NodeNetwork,
    PodSources,
    Refusal,
    Use,
    VirtualServer,
)

pytestmark = pytest.mark.netns
T = TypeVar("T")
EMULATION_SECONDS = 1.5
"""How long nothing has to come for silence on an emulated machine."""
_numbers = itertools.count(1)


def has_ipvs() -> bool:
    subprocess.run(["/sbin/modprobe", "-q", "ip_vs"], check=False)
    return Path("/proc/net/ip_vs").exists()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if (reason := obstacle()) is not None:
        pytest.skip(f"no network namespaces here: {reason}")
    if not has_ipvs():
        pytest.skip("this kernel has no IPVS; tests/vm runs this with one that has")
    with running(f"vi{os.getpid()}") as built:
        yield built


class Plane:
    """Compiler and driver on the node, with the program that they have committed."""

    def __init__(self, lab: Lab, state: Path, settings: IpvsSettings | None = None) -> None:
        self.lab = lab
        self.state = state
        self.settings = DataplaneSettings(ipvs=settings or IpvsSettings())
        node = lab.node("node")
        self.network = NodeNetwork(
            pod_sources=PodSources(
                cidrs=(ip_network("10.244.0.0/16"), ip_network("fd00:10:244::/48"))
            ),
            node_port_ranges=tuple(ip_network(one) for one in node.addresses),
            service_cidrs=(ip_network("10.96.0.0/16"), ip_network("fd00:10:96::/112")),
            own_addresses=node.addresses,
            primary_addresses=node.addresses,
        )
        self.servers: dict[Key, VirtualServer] = {}
        self.compiler = IpvsCompiler(self.settings)
        self.start()

    def start(self) -> None:
        """Begin as a new process does, knowing nothing."""
        self.driver = IpvsDriver(self.settings, state=self.state)
        self.program: Program | None = None
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()

        def run() -> None:
            lab_netns.enter(self.lab.path("node"))
            asyncio.set_event_loop(self._loop)
            self._loop.call_soon(ready.set)
            self._loop.run_forever()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

        self._thread = threading.Thread(target=run, name="driver")
        self._thread.start()
        ready.wait(DEADLINE_SECONDS)

    def kill(self) -> None:
        """End as a process does that is killed: nothing is taken back, nothing goes on."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_SECONDS)

    def do(self, work: Callable[[], Awaitable[T]]) -> T:
        async def call() -> T:
            return await work()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(DEADLINE_SECONDS * 3)

    def serve(self, *servers: VirtualServer) -> Committed:
        """Add these to what is served, or replace them."""
        return self.change({one.key: one for one in servers})

    def change(self, changes: dict[Key, VirtualServer | None]) -> Committed:
        if self.program is None:
            self.settle()
        assert self.program is not None
        plan, after = self.compiler.plan_changes(self.program, Changes(changes))
        done = self.do(lambda: self.driver.commit(plan))
        self.program = (
            self.compiler.without(self.program, after, done.rejected) if done.rejected else after
        )
        for key, server in changes.items():
            if server is None:
                del self.servers[key]
            else:
                self.servers[key] = server
        return done

    def settle(self) -> str:
        """Observe, plan and commit everything; return the plan's text."""
        plan = self.plan()
        self.do(lambda: self.driver.commit(plan))
        return str(plan)

    def plan(self) -> Any:
        wanted = self.compiler.compile(self.servers.values(), self.network)
        plan, self.program = self.compiler.plan(self.observe(), wanted)
        return plan

    def observe(self) -> Observed | None:
        return self.do(self.driver.observe)

    # What an operator sees

    def tool(self, *command: str, input: str | None = None) -> str:
        done = self.lab.exec("node", list(command), input=input)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ipvsadm(self) -> str:
        return self.tool("ipvsadm", "-Sn")

    def listed(self, server: VirtualServer) -> list[str]:
        """The lines of ipvsadm about a virtual server."""
        key = server.key
        host = f"[{key.address}]" if key.family is Family.IPV6 else str(key.address)
        return [one for one in self.ipvsadm().splitlines() if f" {host}:{key.port} " in one]

    def gone(self, text: str) -> None:
        until(lambda: text not in self.ipvsadm(), f"{text} is gone from:\n{self.ipvsadm()}")


@pytest.fixture
def plane(lab: Lab, tmp_path: Path) -> Iterator[Plane]:
    built = Plane(lab, tmp_path)
    yield built
    built.do(built.driver.teardown)
    built.kill()
    built.tool("ipvsadm", "-C")


# Virtual servers


def vip(family: Family = Family.IPV4) -> Address:
    number = next(_numbers)
    text = f"10.96.0.{number}" if family is Family.IPV4 else f"fd00:10:96::{number:x}"
    return parse_address(text)


def pod(
    lab: Lab, name: str, family: Family = Family.IPV4, port: int = TCP_PORT, **more: Any
) -> Endpoint:
    host = lab.node(name)
    return Endpoint(host.address(family), port, local=host.node == "node", pod=name, **more)


def server(
    address: Address | None, *endpoints: Endpoint, port: int = 80, **more: Any
) -> VirtualServer:
    family = family_of(address) if address is not None else more.pop("family", Family.IPV4)
    protocol = more.pop("protocol", Protocol.TCP)
    told: dict[str, Any] = {
        "key": Key(family, address, protocol, port),
        "owner": ServicePortName(NamespacedName("test", "web"), "", protocol),
        "kind": Kind.CLUSTER,
        "cluster": endpoints,
        "local": (),
        "masquerade": Masquerade.OFF_CLUSTER,
    }
    return VirtualServer(**{**told, **more})


def outcome(
    lab: Lab, client: str, to: Address, port: int = 80, way: str = "tcp", **how: Any
) -> str:
    try:
        answer = lab.ask(client, way, to, port, timeout=EMULATION_SECONDS, **how)  # type: ignore[arg-type]
    except ConnectionRefusedError:
        return "refused"
    except (TimeoutError, PermissionError):
        return "silence"
    saw = next((one.name for one in lab.topology.hosts if answer.source in one.addresses), "?")
    return f"{answer.pod} saw {saw}"


# What the textbooks show


def test_a_virtual_server_looks_as_every_textbook_shows_it(lab: Lab, plane: Plane) -> None:
    address = vip()
    web = server(address, pod(lab, "web-1"), pod(lab, "web-4"), affinity_seconds=600)
    assert not plane.serve(web).rejected
    route = plane.tool("ip", "route", "show", "table", "local", str(address))
    assert route.split()[:4] == ["local", str(address), "dev", "lo"]
    assert f"src {lab.node('node').ipv4}" in route
    shown = plane.tool("ip", "-N", "route", "show", "table", "local", "proto", "118")
    assert str(address) in shown
    listing = plane.tool("ipvsadm", "-Ln")
    assert f"TCP  {address}:80 rr persistent 600" in listing
    for one in web.cluster:
        (line,) = [each for each in listing.splitlines() if f"-> {one.address}:{one.port} " in each]
        assert line.split()[2:4] == ["Masq", "1"]


@pytest.mark.parametrize("family", Family, ids=str)
def test_every_client_reaches_every_endpoint(lab: Lab, plane: Plane, family: Family) -> None:
    address = vip(family)
    for protocol, port in ((Protocol.TCP, TCP_PORT), (Protocol.UDP, UDP_PORT)):
        ends = [pod(lab, name, family, port) for name in ("web-1", "web-4")]
        plane.serve(server(address, *ends, protocol=protocol))
    for way in ("tcp", "udp"):
        for client in ("client-1", "node", "outside"):
            saw = "client-1" if client == "client-1" else "node"
            met = {outcome(lab, client, address, way=way) for _ in range(4)}
            assert met == {f"web-1 saw {saw}", f"web-4 saw {saw}"}, (way, client)
        # An endpoint reaches itself under the node's address, another one under its own.
        met = {outcome(lab, "web-1", address, way=way) for _ in range(4)}
        assert met == {"web-1 saw node", "web-4 saw web-1"}, way


def test_schedulers_and_weights(lab: Lab, plane: Plane) -> None:
    ends = (pod(lab, "web-1"), pod(lab, "web-4"))
    heavy = (pod(lab, "web-1", weight=3), pod(lab, "web-4"))
    plane.serve(
        weighted := server(vip(), *heavy),
        hashed := server(vip(), *ends, algorithm=Algorithm.SOURCE_HASH),
        maglev := server(vip(), *ends, algorithm=Algorithm.MAGLEV),
        asked := server(vip(), *ends, scheduler="lc"),
    )
    assert plane.listed(weighted)[0].endswith(" -s wrr")
    assert sorted(one[-4:] for one in plane.listed(weighted)[1:]) == ["-w 1", "-w 3"]
    assert "-s sh -b sh-fallback" in plane.listed(hashed)[0]
    assert "-s mh -b mh-fallback,mh-port" in plane.listed(maglev)[0]
    assert "-s lc" in plane.listed(asked)[0]


def test_an_unknown_port_of_a_virtual_address_is_refused_though_the_node_listens_there(
    lab: Lab, plane: Plane
) -> None:
    address = vip()
    plane.serve(server(address, pod(lab, "web-1")))
    listening = lab.socket("node")
    listening.bind(("", 8099))
    listening.listen()
    with listening:
        for client in ("client-1", "node", "outside"):
            assert outcome(lab, client, address, 8099) == "refused"
        opened = lab.socket("client-1")
        opened.settimeout(DEADLINE_SECONDS)
        with opened:
            opened.connect((str(lab.node("node").ipv4), 8099))


@pytest.mark.parametrize("family", Family, ids=str)
def test_without_endpoints_it_is_refused_at_once_or_dropped(
    lab: Lab, plane: Plane, family: Family
) -> None:
    rejecting, dropping = vip(family), vip(family)
    plane.serve(
        server(rejecting),
        server(dropping, use=Use.LOCAL, when_empty=Refusal.DROP),
    )
    for client in ("client-1", "node", "outside"):
        assert outcome(lab, client, rejecting) == "refused"
        assert outcome(lab, client, dropping) == "silence"


def test_policy_local_drops_outsiders_and_lets_pods_and_the_node_use_the_whole_list(
    lab: Lab, plane: Plane
) -> None:
    address = parse_address("203.0.113.7")
    more: dict[str, Any] = {
        "kind": Kind.LOAD_BALANCER,
        "use": Use.LOCAL_FROM_OUTSIDE,
        "masquerade": Masquerade.NEVER,
        "when_empty": Refusal.DROP,
    }
    plane.serve(server(address, pod(lab, "web-4"), **more))
    assert outcome(lab, "outside", address) == "silence"
    assert outcome(lab, "client-1", address) == "web-4 saw client-1"
    assert outcome(lab, "node", address) == "web-4 saw node"
    here = pod(lab, "web-1")
    plane.serve(server(address, pod(lab, "web-4"), here, local=(here,), **more))
    assert {outcome(lab, "outside", address) for _ in range(4)} == {"web-1 saw outside"}


def test_source_ranges_hold_for_others_and_for_the_node_itself(lab: Lab, plane: Plane) -> None:
    address = parse_address("203.0.113.8")
    plane.serve(
        server(
            address,
            pod(lab, "web-1"),
            kind=Kind.LOAD_BALANCER,
            masquerade=Masquerade.ALWAYS,
            allowed_sources=(ip_network("192.168.77.100/32"), ip_network("10.244.1.11/32")),
        )
    )
    assert outcome(lab, "outside", address) == "web-1 saw node"
    assert outcome(lab, "client-1", address) == "web-1 saw node"
    assert outcome(lab, "client-2", address) == "silence"
    assert outcome(lab, "node", address) == "silence"


def test_a_node_port_is_served_on_the_nodes_addresses_only(lab: Lab, plane: Plane) -> None:
    more: dict[str, Any] = {"kind": Kind.NODE_PORT, "masquerade": Masquerade.ALWAYS}
    plane.serve(server(None, pod(lab, "web-4"), port=30080, **more))
    node = lab.node("node").ipv4
    for client in ("client-1", "outside", "node"):
        assert outcome(lab, client, node, 30080) == "web-4 saw node"
    assert str(node) not in plane.tool(
        "ip", "-N", "route", "show", "table", "local", "proto", "118"
    )
    assert outcome(lab, "node", parse_address("127.0.0.1"), 30080) == "refused"


def test_an_address_that_no_service_has_is_dropped(lab: Lab, plane: Plane) -> None:
    plane.serve(server(vip(), pod(lab, "web-1")))
    for client in ("client-1", "node", "outside"):
        assert outcome(lab, client, parse_address("10.96.200.1")) == "silence"


# Changes


def test_a_change_of_one_endpoint_is_one_message(lab: Lab, plane: Plane) -> None:
    address = vip()
    first, second = pod(lab, "web-1"), pod(lab, "web-4")
    plane.serve(server(address, first))
    assert plane.program is not None
    plan, _ = plane.compiler.plan_changes(
        plane.program, Changes({server(address).key: server(address, first, second)})
    )
    assert [str(one) for one in plan.units[0].now] == [
        f"-a -t {address}:80 -r {second.address}:{second.port} -m -w 1"
    ]


def test_an_endpoint_that_leaves_keeps_its_connections_and_gets_no_new_ones(
    lab: Lab, plane: Plane
) -> None:
    address = vip()
    stays, leaves = pod(lab, "web-1"), pod(lab, "web-4")
    plane.serve(server(address, leaves, affinity_seconds=600))
    with _held(lab, "client-1", address) as held:
        assert _who(held) == "web-4"
        plane.serve(server(address, stays, affinity_seconds=600))
        assert "-w 0" in next(
            one for one in plane.listed(plane_server(plane)) if str(leaves) in one
        )
        assert {outcome(lab, "client-1", address) for _ in range(4)} == {"web-1 saw client-1"}
        assert _who(held) == "web-4"
        assert sum(plane.do(plane.driver.flows).by_server.values()) >= 1
    departed = Departed(server(address).key, leaves.address, leaves.port)
    plane.do(lambda: plane.driver.cut([departed]))
    plane.gone(str(leaves))


def test_an_endpoint_without_connections_leaves_by_itself(lab: Lab, plane: Plane) -> None:
    address = vip()
    stays, leaves = pod(lab, "web-1"), pod(lab, "web-4")
    plane.serve(server(address, stays, leaves))
    plane.serve(server(address, stays))
    plane.gone(str(leaves))
    assert outcome(lab, "client-1", address) == "web-1 saw client-1"


def test_an_endpoint_that_comes_back_is_used_again(lab: Lab, plane: Plane) -> None:
    address = vip()
    stays, returns = pod(lab, "web-1"), pod(lab, "web-4")
    plane.serve(server(address, stays, returns))
    with _held(lab, "client-1", address), _held(lab, "client-1", address):
        plane.serve(server(address, stays))
        plane.serve(server(address, stays, returns))
        assert all(one.endswith("-w 1") for one in plane.listed(plane_server(plane))[1:])
        met = {outcome(lab, "client-1", address) for _ in range(4)}
    assert met == {"web-1 saw client-1", "web-4 saw client-1"}


def test_a_udp_flow_moves_when_its_endpoint_leaves(lab: Lab, plane: Plane) -> None:
    address = vip()
    stays, leaves = (pod(lab, name, port=UDP_PORT) for name in ("web-1", "web-4"))
    plane.serve(server(address, leaves, protocol=Protocol.UDP))
    assert outcome(lab, "client-1", address, way="udp", source_port=33333) == "web-4 saw client-1"
    plane.serve(server(address, stays, protocol=Protocol.UDP))
    until(
        lambda: (
            outcome(lab, "client-1", address, way="udp", source_port=33333) == "web-1 saw client-1"
        ),
        "the flow has another endpoint",
    )


def test_a_service_that_goes_is_refused_and_leaves_nothing(lab: Lab, plane: Plane) -> None:
    address = vip()
    web = server(address, pod(lab, "web-1"))
    plane.serve(web)
    with _held(lab, "client-1", address) as held:
        plane.change({web.key: None})
        assert outcome(lab, "client-1", address) == "refused"
        assert _who(held) == "web-1"
        # It comes back meanwhile, and is as it was.
        plane.serve(web)
        assert outcome(lab, "client-1", address) == "web-1 saw client-1"
        assert not plane.plan()
    other = server(address, pod(lab, "web-1"), protocol=Protocol.UDP, port=53)
    plane.serve(other)
    plane.change({other.key: None})
    plane.gone(f"-u {address}:53")
    assert plane.tool("ip", "route", "show", "table", "local", str(address))


# Others, and a crash


def test_what_others_have_is_left_alone_and_reported(lab: Lab, plane: Plane) -> None:
    taken, routed, free = vip(), vip(), vip()
    plane.tool("ipvsadm", "-A", "-t", f"{taken}:80", "-s", "wlc")
    plane.tool("ipvsadm", "-a", "-t", f"{taken}:80", "-r", "192.0.2.7:80", "-g")
    plane.tool("ip", "route", "add", "local", str(routed), "dev", "lo", "table", "local")
    before = plane.ipvsadm()
    servers = [server(one, pod(lab, "web-1")) for one in (taken, routed, free)]
    rejected = plane.serve(*servers).rejected
    assert {key.address for key in rejected} == {taken, routed}
    assert "another program has this" in str(rejected[servers[0].key])
    assert "somebody else has a local route" in str(rejected[servers[1].key])
    assert outcome(lab, "client-1", free) == "web-1 saw client-1"
    assert set(before.splitlines()) < set(plane.ipvsadm().splitlines())
    # The same is found by a process that starts anew.
    plane.kill()
    plane.start()
    plan = plane.plan()
    assert {unit.key for unit in plan.units} == {one.key for one in servers[:2]}
    assert all(unit.conflict for unit in plan.units)
    assert {key.address for key in plane.do(lambda: plane.driver.commit(plan)).rejected} == {
        taken,
        routed,
    }
    plane.do(plane.driver.teardown)
    assert plane.ipvsadm() == before
    assert plane.tool("ip", "route", "show", "table", "local", str(routed))
    plane.tool("ip", "route", "del", "local", str(routed), "dev", "lo", "table", "local")


def test_a_missing_scheduler_degrades_its_service_only(lab: Lab, plane: Plane) -> None:
    odd, fine = (
        server(vip(), pod(lab, "web-1"), scheduler="nonesuch"),
        server(vip(), pod(lab, "web-1")),
    )
    rejected = plane.serve(odd, fine).rejected
    assert set(rejected) == {odd.key}
    assert "modprobe ip_vs_nonesuch" in str(rejected[odd.key])
    assert fine.key.address is not None
    assert outcome(lab, "client-1", fine.key.address) == "web-1 saw client-1"
    assert not plane.listed(odd)
    assert str(odd.key.address) not in plane.tool("ip", "route", "show", "table", "local")


def test_a_new_process_adopts_what_is_there_and_removes_what_departs(
    lab: Lab, plane: Plane
) -> None:
    address = vip()
    stays, leaves = pod(lab, "web-1"), pod(lab, "web-4")
    other = server(vip(Family.IPV6), pod(lab, "web-1", Family.IPV6))
    plane.serve(server(address, stays, leaves), other)
    plane.kill()
    plane.start()
    assert str(plane.plan()) == ""
    with _held(lab, "client-1", address), _held(lab, "client-1", address):
        plane.serve(server(address, stays))
        plane.kill()
        plane.start()
        plan = plane.plan()
        assert not [one for unit in plan.units for one in unit.now]
        plane.do(lambda: plane.driver.commit(plan))
        assert any(one.endswith("-w 0") for one in plane.listed(plane_server(plane)))
    plane.do(lambda: plane.driver.cut([Departed(server(address).key, leaves.address, leaves.port)]))
    plane.gone(str(leaves))
    assert str(plane.plan()) == ""


def test_quiesce_takes_nothing_new_and_a_commit_undoes_it(lab: Lab, plane: Plane) -> None:
    address = vip()
    plane.serve(server(address, pod(lab, "web-1")))
    with _held(lab, "client-1", address) as held:
        assert _who(held) == "web-1"
        plane.do(plane.driver.quiesce)
        plane.do(plane.driver.quiesce)
        assert outcome(lab, "client-1", address) == "refused"
        assert _who(held) == "web-1"
    plane.settle()
    assert outcome(lab, "client-1", address) == "web-1 saw client-1"
    assert str(plane.plan()) == ""


def test_teardown_leaves_nothing_and_sysctls_as_they_were(lab: Lab, plane: Plane) -> None:
    names = ["net.ipv4.vs.conntrack", "net.ipv4.tcp_early_demux", "net.ipv4.vs.expire_nodest_conn"]
    values = plane.tool("/sbin/sysctl", *names)
    plane.serve(server(vip(), pod(lab, "web-1")), server(vip(Family.IPV6)))
    assert plane.tool("/sbin/sysctl", *names) != values
    said = plane.do(plane.driver.leftovers)
    assert plane.do(plane.driver.teardown) == said
    assert plane.tool("/sbin/sysctl", *names) == values
    assert plane.do(plane.driver.leftovers) == []
    assert plane.do(plane.driver.teardown) == []
    assert plane.ipvsadm() == ""
    assert "VIPD" not in plane.tool("ipset", "list", "-name")
    for tool in ("iptables-save", "ip6tables-save"):
        assert "VIPD" not in plane.tool(tool)


def test_the_probe_finds_everything_and_leaves_nothing(lab: Lab, plane: Plane) -> None:
    before = plane.ipvsadm()
    found = plane.do(plane.driver.probe)
    assert found.supported, found
    assert plane.ipvsadm() == before


def plane_server(plane: Plane) -> VirtualServer:
    return next(iter(plane.servers.values()))


def _held(lab: Lab, client: str, address: Address) -> socket.socket:
    opened = lab.socket(client, socket.AF_INET if address.version == 4 else socket.AF_INET6)
    opened.settimeout(DEADLINE_SECONDS)
    opened.connect((str(address), 80))
    return opened


def _who(held: socket.socket) -> str:
    held.sendall(b"who\n")
    return held.recv(4096).decode().partition(" ")[0]

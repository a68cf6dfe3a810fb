"""What a test with real packets says: services and their endpoints, and what a client meets.

Lives here: manifests, the daemon over a folder of them, waiting for it without sleeping, and the
outcome of a request as a short text: "web-1 saw client-1" (the endpoint that answered and the host
whose address it saw), "refused" or "silence". Must not: know what vipd should do.
"""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from tests.netns.modes import EMULATED, PATIENCE

from vipd.backends.registry import backend
from vipd.bench.lab import Lab
from vipd.bench.lab_ask import Answer, Way
from vipd.bench.lab_daemon import Daemon
from vipd.bench.pod import HTTP_PORT, TCP_PORT, UDP_PORT
from vipd.proxy import views
from vipd.proxy.control import read
from vipd.proxy.errors import ControlError
from vipd.proxy.explain import Explanation
from vipd.proxy.names import Address, Family, Protocol, parse_address
from vipd.proxy.question import Question
from vipd.proxy.resolve import resolve
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.sources.manifests import load
from vipd.proxy.status import Status
from vipd.proxy.views import SettingsView, VirtualServerView
from vipd.proxy.virtualserver import Endpoint, Table

NFT = shutil.which("nft") or "/usr/sbin/nft"
"""Found before any test puts another one first."""
CLI = (sys.executable, "-P", "-m", "vipd.proxy.cli")
DEADLINE_SECONDS = 20.0 * PATIENCE
POLL_SECONDS = 0.004
SILENCE_SECONDS = 0.5 if EMULATED else 0.2
"""How long nothing has to come for silence, on a machine that answers without a proxy in a fifth
of it; where it does not, the request is made again."""
LOCAL, REMOTE = "web-1", "web-4"
MANY = 30
"""Requests after which each of two endpoints chosen at random was met (but for 1 in 10^8)."""
REFUSED, SILENCE = "refused", "silence"
TABLES = ("ip vipd", "ip6 vipd", "ip vipd-skeleton", "ip6 vipd-skeleton")
Manifest = dict[str, Any]


class Flavour(NamedTuple):
    """IP family and protocol, with what the pods of the lab have for it."""

    family: Family
    protocol: Protocol

    def __str__(self) -> str:
        return f"{self.family}-{self.protocol}"

    @property
    def way(self) -> Way:
        return "udp" if self.protocol is Protocol.UDP else "tcp"

    @property
    def target(self) -> int:
        return UDP_PORT if self.protocol is Protocol.UDP else TCP_PORT


FLAVOURS = [Flavour(family, p) for family in Family for p in (Protocol.TCP, Protocol.UDP)]
TCP4, UDP4, TCP6, UDP6 = FLAVOURS
TARGETS = {"http": HTTP_PORT, "tcp": TCP_PORT, "udp": UDP_PORT}

_numbers = itertools.count(1)
_source_ports = itertools.cycle(range(10000, 32000))


def service(
    name: str, *addresses: Address, labels: dict[str, str] | None = None, **spec: Any
) -> Manifest:
    """A Service with cluster IPs."""
    texts = [str(one) for one in addresses]
    annotations = spec.pop("annotations", {})
    status = spec.pop("status", {})
    ips = {"clusterIP": texts[0], "clusterIPs": texts} if texts else {}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": "test",
            "labels": labels or {},
            "annotations": annotations,
        },
        "spec": {**ips, **spec},
        "status": status,
    }


def endpoint_slice(
    name: str,
    family: Family,
    endpoints: Sequence[Manifest],
    ports: Sequence[Manifest],
    *,
    of: str | None = None,
    labels: dict[str, str] | None = None,
) -> Manifest:
    """An EndpointSlice of the service `of`, which is called like the slice where not said."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "test",
            "labels": {"kubernetes.io/service-name": of or name, **(labels or {})},
        },
        "addressType": str(family),
        "ports": list(ports),
        "endpoints": list(endpoints),
    }


def node(name: str, lab: Lab, **labels: str) -> Manifest:
    host = lab.node(name)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {"podCIDRs": [str(one) for one in host.pods]},
        "status": {
            "addresses": [{"type": "InternalIP", "address": str(one)} for one in host.addresses]
        },
    }


def service_cidr(*cidrs: str) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": list(cidrs)},
    }


def until(holds: Callable[[], object], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Ask again and again until it holds; fail with `what` at the deadline."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(POLL_SECONDS)


class Served:
    """A service of one port (80) that a test changes and asks."""

    def __init__(self, cluster: "Cluster", flavour: Flavour, spec: Manifest) -> None:
        number = next(_numbers)
        self.cluster = cluster
        self.flavour = flavour
        self.name = f"service-{number}"
        self.address = cluster_ip(number, flavour.family)
        self.node_port = 30000 + number
        self.outside_address = outside_ip(number, flavour.family)
        """For an external or load-balancer IP."""
        self.labels: dict[str, str] = {}
        self._spec = spec
        self._endpoints: list[Manifest] = []

    # What is in the folder

    def port(self, **more: Any) -> Manifest:
        return {
            "name": "main",
            "protocol": str(self.flavour.protocol),
            "port": 80,
            "targetPort": self.flavour.target,
            **more,
        }

    def manifest(self) -> Manifest:
        spec = {"type": "ClusterIP", "ports": [self.port()], **self._spec}
        if spec["type"] in ("NodePort", "LoadBalancer"):
            spec["ports"] = [{"nodePort": self.node_port, **one} for one in spec["ports"]]
        addresses = () if spec["type"] == "ExternalName" else (self.address,)
        if spec.get("clusterIP") == "None":
            addresses = ()
        return service(self.name, *addresses, labels=self.labels, **spec)

    def slice(self) -> Manifest:
        port = {"name": "main", "protocol": str(self.flavour.protocol), "port": self.flavour.target}
        return endpoint_slice(self.name, self.flavour.family, self._endpoints, [port])

    def endpoint(self, pod: str, **conditions: bool) -> Manifest:
        """One endpoint; ready, serving and terminating may be given."""
        host = self.cluster.lab.node(pod)
        return {
            "addresses": [str(host.address(self.flavour.family))],
            "nodeName": host.node or host.name,
            "conditions": conditions,
            "targetRef": {"kind": "Pod", "name": pod, "namespace": "test"},
        }

    def endpoints_are(self, *pods: str | Manifest) -> "Served":
        """Let its slice be of these endpoints, wherever that is written."""
        self._endpoints = [self.endpoint(p) if isinstance(p, str) else p for p in pods]
        return self

    def endpoints(self, *pods: str | Manifest) -> "Served":
        """Let it have these endpoints, and wait until it is so."""
        self.cluster.apply(self.endpoints_are(*pods).slice())
        self.cluster.settled()
        return self

    def change(self, **spec: Any) -> "Served":
        """Change fields of the spec, and wait until it is so; None takes a field away."""
        self._spec = {k: v for k, v in {**self._spec, **spec}.items() if v is not None}
        self.cluster.apply(self.manifest())
        self.cluster.settled()
        return self

    def labelled(self, **labels: str) -> "Served":
        """Let the Service have these labels (`__` stands for `/`), and wait until it is so."""
        self.labels = {name.replace("__", "/"): v for name, v in labels.items()}
        return self.change()

    def remove(self) -> None:
        """Delete the Service and its slice, and wait until it is so."""
        self.cluster.remove(self.manifest(), self.slice())
        self.cluster.settled()

    # What a client meets

    def ask(self, client: str, to: Address | None = None, port: int = 80, **how: Any) -> Answer:
        where = self.address if to is None else to
        return self.cluster.ask(client, self.flavour.way, where, port, **how)

    def outcome(self, client: str, to: Address | None = None, port: int = 80) -> str:
        where = self.address if to is None else to
        return self.cluster.outcome(client, self.flavour.way, where, port)

    def outcomes(self, client: str, to: Address | None = None, port: int = 80) -> set[str]:
        """What a client meets in so many requests that it meets everything there is."""
        return {self.outcome(client, to, port) for _ in range(MANY)}

    def pods(
        self, client: str, count: int = MANY, to: Address | None = None, port: int = 80
    ) -> list[str]:
        """Who answers in turn."""
        return [self.ask(client, to, port).pod for _ in range(count)]

    def on_node(self, host: str = "node") -> tuple[Address, int]:
        """Address and number of the node port."""
        return self.cluster.lab.node(host).address(self.flavour.family), self.node_port


def cluster_ip(number: int, family: Family) -> Address:
    if family is Family.IPV4:
        return parse_address(f"10.96.{number // 250}.{number % 250 + 1}")
    return parse_address(f"fd00:10:96::{number:x}")


def outside_ip(number: int, family: Family) -> Address:
    if family is Family.IPV4:
        return parse_address(f"203.0.113.{number % 250 + 1}")
    return parse_address(f"2001:db8:113::{number:x}")


SECOND_ADDRESS = {
    Family.IPV4: parse_address("203.0.113.254"),
    Family.IPV6: parse_address("2001:db8:113::fffe"),
}
"""For a host that is to have another address, to which `outside` knows the way; no service's."""


class QuickDaemon(Daemon):
    """Asks the control socket itself, which takes less time than `vipd status`."""

    def _is_synced(self) -> bool:
        with contextlib.suppress(ControlError):
            return msgspec.json.decode(read(str(self.socket), "status"), type=Status).synced
        return False


class Cluster:
    """vipd on the lab's node, and its folder of manifests."""

    def __init__(self, lab: Lab, directory: Path, *flags: str, mode: str = "nftables") -> None:
        self.lab = lab
        self.mode = mode
        self.as_promised = True
        """Whether `outcome` tells whom an endpoint is to see by the table, not whom it saw."""
        self.folder = directory / "manifests"
        self.folder.mkdir()
        self.daemon = QuickDaemon(lab, self.folder, directory, mode)
        self.daemon.arguments += flags
        self.socket = str(self.daemon.socket)
        self._base = {
            self._path(one) for one in self.apply(*(node(n, lab) for n in ("node", "node-2")))
        }

    # The folder

    def _path(self, manifest: Manifest) -> Path:
        head = manifest["metadata"]
        return self.folder / f"{manifest['kind'].lower()}-{head['name']}.json"

    def apply(self, *manifests: Manifest) -> tuple[Manifest, ...]:
        """Write them, each at once and whole."""
        for one in manifests:
            path = self._path(one)
            draft = path.with_name(f".{path.name}")
            draft.write_text(json.dumps(one))
            draft.rename(path)
        return manifests

    def remove(self, *manifests: Manifest) -> None:
        for one in manifests:
            self._path(one).unlink(missing_ok=True)

    def clear(self) -> None:
        """Take away what tests left, and see that all of it goes."""
        for path in set(self.folder.iterdir()) - self._base:
            path.unlink()
        self.settled()

    def serve(self, flavour: Flavour, *pods: str | Manifest, **spec: Any) -> Served:
        """A service with these endpoints, programmed."""
        served = Served(self, flavour, spec)
        self.apply(served.manifest())
        return served.endpoints(*pods)

    # The daemon

    def start(self) -> None:
        self.daemon.start(DEADLINE_SECONDS)

    def stop(self) -> None:
        self.daemon.stop()

    def kill(self) -> None:
        """End the daemon as a crash does."""
        os.kill(self.status().pid, signal.SIGKILL)
        self.daemon.stop()

    def status(self) -> Status:
        return msgspec.json.decode(read(self.socket, "status"), type=Status)

    def services(self) -> list[VirtualServerView]:
        return msgspec.json.decode(read(self.socket, "services"), type=list[VirtualServerView])

    def settled(self) -> None:
        """Wait until everything in the folder is committed: `vipd plan` would print nothing."""
        events = load([str(self.folder)])
        asks_table = self.differs("source-is-the-node")  # `outcome` does then
        settings = b""
        left: dict[bytes, str] = {}
        now = b"null"
        compiler: Any = None
        wanted: Any = None
        table: Table
        snapshot: Snapshot

        def wants() -> None:
            """Conclude what should be there, anew where the node's own addresses have changed."""
            nonlocal settings, compiler, wanted, table, snapshot
            if (said := read(self.socket, "settings")) == settings:
                return
            settings = said
            told = msgspec.json.decode(said, type=SettingsView)
            snapshot, _ = fold(Snapshot(), [*events, told.facts()])
            table = resolve(snapshot, told.node())
            compiler = backend(told.mode, told.dataplane).compiler
            wanted = compiler.compile(table.virtual_servers(), table.network)
            left.clear()
            left[b"null"] = "everything"

        def nothing_left() -> bool:
            nonlocal now
            status = self.status()
            now = read(self.socket, "program")
            wants()
            if now not in left:
                left[now] = str(compiler.plan(compiler.load(now), wanted)[0])
            # What changes nothing in the kernel is seen here.
            conflicts = {str(one) for one in table.contested.values()}
            known = (status.services, set(status.conflicts))
            if left[now] or known != (len(snapshot.services), conflicts):
                return False
            if not asks_table:
                return True
            told = [
                msgspec.structs.replace(one, rejected=None)
                for one in self.services()
                if not one.by_dns
            ]
            return told == views.services(table.virtual_servers())

        try:
            until(nothing_left, "the folder is committed")
        except AssertionError as failure:
            raise AssertionError(
                f"{failure}; left:\n{left[now]}\n{self.daemon.log_tail()}"
            ) from None

    def cli(self, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run a command of vipd on the node."""
        return self.lab.exec("node", [*CLI, *arguments], **how)

    # The kernel

    def nft(self, *arguments: str, input: str | None = None) -> str:
        done = self.lab.exec("node", [NFT, *arguments], input=input)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def tables(self) -> set[str]:
        return {line.removeprefix("table ") for line in self.nft("list", "tables").splitlines()}

    def rules(self) -> list[Any]:
        """Everything in our tables with handles, but for counters and clients remembered."""
        return [
            _without_counters(json.loads(self.nft("-j", "list", "table", *table.split())))
            for table in TABLES
        ]

    def matches_the_kernel(self) -> bool:
        """Whether the kernel has exactly what the daemon says it programmed."""
        dataplane = backend(self.status().mode)
        programmed = dataplane.compiler.load(read(self.socket, "program"))
        seen = self.lab.run("node", lambda: asyncio.run(dataplane.driver.observe()))
        return seen is not None and _comparable(seen) == _comparable(programmed)

    def differs(self, name: str) -> bool:
        """Whether the mode is known to do otherwise than the table says, by a difference's name."""
        return any(one.name == name for one in backend(self.mode).compiler.differences)

    def wipe(self) -> None:
        """Take everything out of the node's kernel; other modes than nftables clean up themselves,
        since their objects are of many kinds."""
        if self.mode != "nftables":
            done = self.cli("cleanup", "--mode", self.mode, "--socket", self.socket)
            assert done.returncode == 0, done.stdout + done.stderr
        self.nft("flush", "ruleset")

    # Packets

    @contextlib.contextmanager
    def having(self, host: str, address: Address, device: str = "lo") -> Iterator[Address]:
        """Let a host have an address, for a while only: tests that come later use the same ones."""
        where = [str(address), "dev", device]
        nodad = ["nodad"] if address.version == 6 else []
        self.lab.exec(host, ["ip", "address", "add", *where, *nodad], check=True)
        try:
            yield address
        finally:
            self.lab.exec(host, ["ip", "address", "delete", *where], check=True)

    def outcome(self, client: str, way: Way, to: Address, port: int) -> str:
        """What one request meets. Silence is met twice, so that a busy machine makes none."""
        silent = 0
        for _ in range(20):
            try:
                answer = self.ask(client, way, to, port, timeout=SILENCE_SECONDS)
            except ConnectionRefusedError:
                return REFUSED
            except TimeoutError:
                silent += self._is_awake(client)
                if silent == 2:
                    return SILENCE
            except PermissionError:
                return self._told_later(client, to, port)
            else:
                seen = self.host_of(answer.source)
                differs = self.as_promised and self.differs("source-is-the-node")
                if seen == "node" and differs:
                    seen = self._promised_source(client, way, to, port, answer.pod)
                return f"{answer.pod} saw {seen}"
        raise AssertionError("this machine is too busy to tell silence from slowness")

    def _promised_source(self, client: str, way: Way, to: Address, port: int, pod: str) -> str:
        """Whom an endpoint is to see by the table, in a mode that has to do otherwise: whom it
        would see where a kernel forwards."""
        family = Family.IPV6 if to.version == 6 else Family.IPV4
        protocol = "udp" if way == "udp" else "tcp"
        destination = f"[{to}]:{port}/{protocol}" if to.version == 6 else f"{to}:{port}/{protocol}"
        source = str(self.lab.node(client).address(family))
        question = Question(source=source, destination=destination, mode="nftables")
        asking = msgspec.json.encode(question).decode()
        told = msgspec.json.decode(read(self.socket, "explain", asking), type=Explanation)
        place = str(Endpoint(self.lab.node(pod).address(family), 1)).removesuffix("1")
        (seen,) = {one.source for one in told.endpoints if one.endpoint.startswith(place)}
        return client if seen else "node"

    def ask(
        self,
        client: str,
        way: Way,
        to: Address,
        port: int,
        timeout: float = DEADLINE_SECONDS,
        source_port: int | None = None,
        **how: Any,
    ) -> Answer:
        """Ask over a new connection; with UDP from a source port that none had before."""
        if way == "udp" and source_port is None:
            source_port = next(_source_ports)
        return self.lab.ask(client, way, to, port, timeout, source_port, **how)

    def _is_awake(self, client: str) -> bool:
        direct = self.lab.node(LOCAL).ipv4
        answer = self.lab.ask(client, "tcp", direct, TCP_PORT, timeout=DEADLINE_SECONDS)
        return answer.seconds < SILENCE_SECONDS / 5

    def _told_later(self, client: str, to: Address, port: int) -> str:
        """What UDP from the node itself meets: send fails either way, a refusal comes after it."""
        family = socket.AF_INET if to.version == 4 else socket.AF_INET6
        with self.lab.socket(client, family, socket.SOCK_DGRAM) as asking:
            asking.settimeout(SILENCE_SECONDS)
            asking.connect((str(to), port))
            with contextlib.suppress(PermissionError):
                asking.send(b"who")
            try:
                asking.recv(1)
            except ConnectionRefusedError:
                return REFUSED
            except TimeoutError:
                return SILENCE
        raise AssertionError("an answer to what could not be sent")

    def host_of(self, address: Address) -> str:
        for host in self.lab.topology.hosts:
            if address in host.addresses:
                return host.name
        return str(address)


def _comparable(seen: Any) -> object:
    return msgspec.structs.asdict(seen)


_VOLATILE = ("counter", "packets", "bytes", "expires")


def _without_counters(value: Any) -> Any:
    if isinstance(value, dict):
        memory = "dynamic" in value.get("flags", ())
        return {
            key: _without_counters(one)
            for key, one in value.items()
            if key not in _VOLATILE and not (memory and key == "elem")
        }
    if isinstance(value, list):
        return [_without_counters(one) for one in value]
    return value


class Held:
    """A TCP connection to an echo server that stays open."""

    def __init__(self, cluster: Cluster, client: str, to: Address, port: int) -> None:
        family = socket.AF_INET if to.version == 4 else socket.AF_INET6
        self._socket = cluster.lab.socket(client, family)
        self._socket.settimeout(DEADLINE_SECONDS)
        self._socket.connect((str(to), port))
        self._lines = self._socket.makefile("rwb", buffering=0)
        self.port = self._socket.getsockname()[1]

    def who(self) -> str:
        """Ask over it; return the pod's name."""
        self._lines.write(b"who\n")
        return self._lines.readline().decode().partition(" ")[0]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@contextlib.contextmanager
def held(cluster: Cluster, client: str, to: Address, port: int = 80) -> Iterator[Held]:
    one = Held(cluster, client, to, port)
    try:
        yield one
    finally:
        one.close()


def every(pods: Iterable[str], saw: str) -> set[str]:
    """The outcomes in which each of the pods saw one host."""
    return {f"{pod} saw {saw}" for pod in pods}

"""The lab: network namespaces with pods that say their name, for newcomers, tests and benches.

Lives here: what can be done with a lab. Must not: know how it is built (lab_site.py), addressed
and routed (lab_topology.py, lab_script.py) or asked (lab_ask.py).

    with running("vt123") as lab:
        lab.ask("client-1", "http", lab.node("web-1").ipv4, pod.HTTP_PORT).source

`up` builds everything anew unless every host is complete; it is quick enough that repairing parts
is not worth a second way to get there. Only echo servers that died are started alone.
"""

import re
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from msgspec import Struct

from vipd.bench import lab_ask, lab_hosts, lab_netns, lab_resolv
from vipd.bench.lab_ask import Answer, Way
from vipd.bench.lab_errors import LabError, LabUnavailable
from vipd.bench.lab_site import Site, State, require
from vipd.bench.lab_topology import STANDARD, Host, Role, Topology
from vipd.proxy.names import Address

DEFAULT_PREFIX = "vipd-lab"

R = TypeVar("R")

_OURS = frozenset((State.BUILDING, State.OUTDATED, State.READY))


class HostStatus(Struct, frozen=True, kw_only=True):
    """How one host is. `state` is a value of lab_site.State."""

    name: str
    namespace: str
    state: str
    addresses: tuple[str, ...]
    processes: tuple[int, ...] = ()
    serving: bool = False
    """Whether an echo server listens there."""


class Lab:
    """A lab whose namespaces are called `PREFIX-HOST`. Making the object touches nothing."""

    def __init__(self, prefix: str = DEFAULT_PREFIX, topology: Topology = STANDARD) -> None:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", prefix):
            raise LabError(f"prefix {prefix!r}: lower-case letters, digits and inner hyphens only")
        self.prefix = prefix
        self.topology = topology
        self._site = Site(prefix, topology)

    # What it is made of

    def node(self, name: str) -> Host:
        """Return the host called `name`; raise LabError naming those there are."""
        try:
            return self.topology.host(name)
        except KeyError:
            known = ", ".join(host.name for host in self.topology.hosts)
            raise LabError(f"the lab has no host {name!r}; it has {known}") from None

    def namespace(self, name: str) -> str:
        """Name of a host's namespace, as `ip netns exec` takes it."""
        return f"{self.prefix}-{self.node(name).name}"

    def path(self, name: str) -> Path:
        """The file that stands for a host's namespace."""
        return self._site.path(self.node(name))

    # Building and taking away

    def up(self) -> bool:
        """Build the lab, or what is missing of it; return False where it was complete already.

        Raise LabUnavailable, or LabError where a namespace of one of its names is someone else's;
        then nothing was changed. After another failure what was built is taken away again.
        """
        require()
        with lab_netns.locked():
            states = self._site.states()
            self._site.refuse_foreign(states)
            if self._site.is_complete(states):
                silent = [host for host in self._pods() if not self._site.serves(host)]
                self._site.serve(silent)
                return bool(silent)
            self._site.remove()
            try:
                self._site.build()
                self._site.serve(self._pods())
            except BaseException:
                self._site.remove()
                raise
            return True

    def down(self) -> tuple[str, ...]:
        """Kill what runs in the lab and take it away, half-built or whole; nothing there is fine.

        Return names of namespaces that are called like the lab's and were left, being someone
        else's. Raise LabError where the caller itself runs inside.
        """
        require()
        with lab_netns.locked():
            self._site.remove()
            left = self._site.states()
        return tuple(f"{self.prefix}-{name}" for name in left if left[name] is State.FOREIGN)

    def serve(self, *names: str) -> None:
        """Start the echo server on hosts that have none by default (node, node-2, outside).

        It takes ports 8080, 9000 and 5300 of every address there, so a proxy that itself listens
        on them cannot run beside it.
        """
        hosts = [self.node(name) for name in names]
        self._site.serve([host for host in hosts if not self._site.serves(host)])

    def silence(self, *names: str) -> None:
        """Kill everything that runs on the hosts, as when a pod dies; `up` starts pods again."""
        paths = [self.path(name) for name in names]
        lab_hosts.kill_processes(frozenset(self._site.identities(paths)))

    def stands(self, name: str) -> bool:
        """Whether the namespace of a host is there and this lab's own."""
        require()
        return self._site.state(self.node(name)) in _OURS

    def status(self) -> tuple[HostStatus, ...]:
        """How each host is, in the order of the topology."""
        require()
        states = self._site.states()
        identities = self._site.identities(
            self.path(name) for name, state in states.items() if state in _OURS
        )
        running: dict[Path, list[int]] = {path: [] for path in identities.values()}
        for process, identity in lab_hosts.processes(frozenset(identities)).items():
            running[identities[identity]].append(process)
        return tuple(
            HostStatus(
                name=host.name,
                namespace=self.namespace(host.name),
                state=states[host.name].value,
                addresses=tuple(map(str, host.addresses)),
                processes=tuple(sorted(running.get(self.path(host.name), ()))),
                serving=states[host.name] in _OURS and self._site.serves(host),
            )
            for host in self.topology.hosts
        )

    def _pods(self) -> tuple[Host, ...]:
        return self.topology.of_role(Role.POD)

    def point_at_nameserver(
        self, name: str, nameserver: Address | None, namespace: str = "default"
    ) -> None:
        """Have what is started on a host from now on ask `nameserver`, port 53, for names.

        Short names are looked up in Kubernetes namespace `namespace`. None: ask whom the machine
        asks, as in a new lab. Raise LabError: see lab_resolv.py.
        """
        netns = self.namespace(name)
        if nameserver is None and netns not in lab_resolv.named(self.prefix):
            return
        require()
        with lab_netns.locked():
            if nameserver is None:
                lab_resolv.forget_nameserver(netns, self.prefix)
            else:
                lab_resolv.point_at_nameserver(netns, self.prefix, nameserver, namespace)

    # Acting inside

    def command(self, name: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` on a host; also what a person would type."""
        return [lab_hosts.ip_tool(), "netns", "exec", self.namespace(name), *argv]

    def exec(
        self,
        name: str,
        argv: Sequence[str],
        *,
        input: str | None = None,
        timeout: float | None = None,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host and return what it printed; as subprocess.run otherwise."""
        return subprocess.run(
            self.command(name, argv),
            input=input,
            timeout=timeout,
            check=check,
            capture_output=True,
            text=True,
        )

    def popen(
        self,
        name: str,
        argv: Sequence[str],
        *,
        stdin: int | IO[bytes] | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host. Its process id is that of the command itself."""
        return subprocess.Popen(
            self.command(name, argv),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            start_new_session=start_new_session,
        )

    def run(self, name: str, call: Callable[[], R]) -> R:
        """Run a function of this process in a thread on a host; its sockets stay on that host."""
        return lab_netns.inside(self.path(name), call)

    def socket(
        self,
        name: str,
        family: socket.AddressFamily = socket.AF_INET,
        type: socket.SocketKind = socket.SOCK_STREAM,
    ) -> socket.socket:
        """A socket that belongs to a host, for use from any thread."""
        return self.run(name, lambda: socket.socket(family, type))

    def ask(
        self,
        name: str,
        way: Way,
        address: Address,
        port: int,
        timeout: float = 5.0,
        source_port: int | None = None,
        source: Address | None = None,
        payload: bytes = b"",
    ) -> Answer:
        """Ask an echo server from a host, over a new connection. `timeout` in seconds.

        Raise ConnectionRefusedError, TimeoutError or another OSError: see lab_ask.py.
        """
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        opened = self.socket(name, family, lab_ask.kind_of(way))
        if source_port is not None or source is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                opened.bind(("" if source is None else str(source), source_port or 0))
            except OSError:
                opened.close()
                raise
        return lab_ask.ask(opened, way, address, port, timeout, payload)


@contextmanager
def running(prefix: str = DEFAULT_PREFIX) -> Iterator[Lab]:
    """A lab that is up inside the block and gone after it, whatever happens in it.

    As a fixture for a whole test session:

        @pytest.fixture(scope="session")
        def lab() -> Iterator[Lab]:
            with running(f"vt{os.getpid()}") as lab:
                yield lab
    """
    lab = Lab(prefix)
    try:
        lab.up()
        yield lab
    finally:
        lab.down()


def obstacle() -> str | None:
    """Why no lab can be had here, for the reason of a skipped test, or None where it can."""
    try:
        require()
    except LabUnavailable as failure:
        return str(failure)
    return None

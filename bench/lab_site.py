"""Where a lab stands: which of its namespaces there are, building them, taking them away.

Lives here: the order of those steps, and what makes a lab complete. Must not: know addresses or
routes (lab_script.py), or how one namespace is marked and cleared (lab_hosts.py).
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import TypeVar

from vipd.bench import lab_hosts, lab_netns, lab_resolv, lab_script, pod
from vipd.bench.lab_errors import LabError, LabUnavailable
from vipd.bench.lab_topology import Host, Topology

A = TypeVar("A")
R = TypeVar("R")


class State(Enum):
    """How the namespace of one host is."""

    ABSENT = "absent"
    DEAD = "dead name"
    """A name without a namespace: its maker was killed in between."""
    BUILDING = "building"
    OUTDATED = "outdated"
    """Built by another version of the topology."""
    READY = "ready"
    FOREIGN = "foreign"
    """Not made by this lab; never touched."""


def require() -> None:
    """Make ready what a lab needs; raise LabUnavailable saying why none can be had here."""
    lab_hosts.ip_tool()
    way_in = "run it as root (sudo), or inside a namespace of your own: unshare -Urnm"
    if os.geteuid() != 0:
        raise LabUnavailable(f"the lab needs root: {way_in}")
    try:
        lab_netns.probe()
        lab_netns.prepare_directory()
    except OSError as failure:
        raise LabUnavailable(f"the kernel refuses network namespaces ({failure}): {way_in}") from (
            failure
        )


def _each(call: Callable[[A], R], things: Iterable[A]) -> list[R]:
    """Call it for all things side by side; raise the first failure after all have ended."""
    with ThreadPoolExecutor(max_workers=16) as threads:
        return list(threads.map(call, things))


class Site:
    """The namespaces `PREFIX-HOST` of a topology. Holds no state: the kernel has it."""

    def __init__(self, prefix: str, topology: Topology) -> None:
        self.prefix = prefix
        self.topology = topology
        servers = Path(pod.__file__).read_bytes()
        self._digest = lab_script.digest(topology, servers)

    def path(self, host: Host) -> Path:
        """The file that stands for the host's namespace."""
        return lab_netns.DIRECTORY / f"{self.prefix}-{host.name}"

    def states(self) -> dict[str, State]:
        """The state of each host, by name."""
        found = _each(self.state, self.topology.hosts)
        return dict(zip((host.name for host in self.topology.hosts), found, strict=True))

    def state(self, host: Host) -> State:
        """The state of one host."""
        return self._state(self.path(host))

    def _state(self, path: Path) -> State:
        if not path.exists():
            return State.ABSENT
        if lab_netns.identity(path) is None:
            return State.DEAD
        match lab_hosts.state(path, self.prefix):
            case None:
                return State.FOREIGN
            case lab_hosts.BUILDING:
                return State.BUILDING
            case built:
                return State.READY if built == self._digest else State.OUTDATED

    def refuse_foreign(self, states: dict[str, State]) -> None:
        """Raise LabError where a name that the lab needs is taken by someone else."""
        foreign = [name for name, state in states.items() if state is State.FOREIGN]
        if foreign:
            names = ", ".join(f"{self.prefix}-{name}" for name in foreign)
            raise LabError(
                f"network namespace {names} exists and was not made by this lab; it is left alone: "
                f"choose another --prefix, or remove it yourself (ip netns delete {names})"
            )

    def is_complete(self, states: dict[str, State]) -> bool:
        """Whether every host is ready and still has its devices and addresses."""
        return all(state is State.READY for state in states.values()) and all(
            _each(self._is_connected, self.topology.hosts)
        )

    def _is_connected(self, host: Host) -> bool:
        found = lab_hosts.addresses(self.path(host))
        wanted = {str(address) for address in host.addresses}
        has_devices = set(lab_script.devices(self.topology, host)) <= set(found)
        return has_devices and wanted <= set().union(*found.values())

    def build(self) -> None:
        """Make all namespaces, then links, then addresses and routes. All names must be free."""
        hosts = self.topology.hosts
        _each(
            lambda host: lab_hosts.create(self.path(host), self.prefix, lab_script.sysctls(host)),
            hosts,
        )
        for host in hosts:
            if links := lab_script.links_script(self.topology, host, self.prefix):
                lab_hosts.apply(self.path(host), links)
        complete = f"link set dev lo alias '{lab_hosts.mark(self.prefix, self._digest)}'\n"
        _each(
            lambda host: lab_hosts.apply(
                self.path(host), lab_script.host_script(self.topology, host) + complete
            ),
            hosts,
        )

    def serves(self, host: Host) -> bool:
        """Whether an echo server listens on the host."""
        return lab_hosts.listens(self.path(host), pod.HTTP_PORT)

    def serve(self, hosts: Iterable[Host]) -> None:
        """Start echo servers; return when all are open. Raise LabError with what they said."""
        pods = [f"{host.name}={self.path(host)}" for host in hosts]
        if not pods:
            return
        # -P: the working directory may hold a folder called dns or bench.
        done = subprocess.run(
            [sys.executable, "-P", "-m", "vipd.bench.pod", "--detach", *pods],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise LabError(f"the echo servers did not start: {done.stderr.strip()}")

    def identities(self, paths: Iterable[Path]) -> dict[tuple[int, int], Path]:
        """The namespaces that there are at the paths."""
        found = ((lab_netns.identity(path), path) for path in paths)
        return {identity: path for identity, path in found if identity is not None}

    def own_paths(self) -> list[Path]:
        """Every name of this lab, also those of hosts that only an older topology had."""
        named = sorted(lab_netns.DIRECTORY.glob(f"{self.prefix}-*"))
        topology = {self.path(host) for host in self.topology.hosts}
        states = zip(named, _each(self._state, named), strict=True)
        return [
            path
            for path, state in states
            if state is not State.FOREIGN and (state is not State.DEAD or path in topology)
        ]

    def remove(self) -> None:
        """Kill what runs in this lab's namespaces; take away their names and resolv.conf files."""
        paths = self.own_paths()
        lab_hosts.kill_processes(frozenset(self.identities(paths)))
        for path in paths:
            lab_netns.delete(path)
        for netns in list(lab_resolv.named(self.prefix)):
            lab_resolv.forget_nameserver(netns, self.prefix)

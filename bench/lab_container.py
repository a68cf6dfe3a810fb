"""What a container finds when it starts in a pod of the lab: variables of services, a nameserver.

Lives here: which manifests the lab's services come from, which Pod a host stands for, and what
follows from both. Must not: know how variables are called (proxy/environment.py), or write
resolv.conf (lab_resolv.py).
The manifests are those that are named, else those of the daemon on the lab's proxy node.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from vipd.bench import lab_netns
from vipd.bench.lab import Lab
from vipd.bench.lab_topology import Host, Role, Topology
from vipd.proxy import control
from vipd.proxy.environment import Wanted, checked, environment
from vipd.proxy.errors import ControlError, ManifestError
from vipd.proxy.events import Applied, Problem
from vipd.proxy.model import Pod
from vipd.proxy.names import Address, NamespacedName, parse_address
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.sources.manifests import load

DNS_PORT = 53
_LISTENS = 1 << 16
"""The flag __SO_ACCEPTCON in /proc/net/unix: somebody listens (net/unix/af_unix.c)."""


class Surroundings(Struct, frozen=True, kw_only=True):
    """What a container of a host finds; empty for a host that is no pod."""

    variables: dict[str, str] = {}
    namespace: str = "default"
    """The Kubernetes namespace that the host's pod is in."""
    nameserver: Address | None = None
    """Who answers names on port 53; None where nobody is known to."""
    problems: tuple[str, ...] = ()
    """What of the manifests could not be read."""


class DaemonStatus(Struct, frozen=True):
    """What is read of `vipd status --json`."""

    pid: int
    manifests: tuple[str, ...] = ()
    dns_listen: tuple[str, ...] = ()
    """``ADDRESS:PORT``, IPv6 in brackets, of each socket that answers DNS."""


def surroundings(
    lab: Lab, name: str, *, manifests: Sequence[str] = (), namespace: str | None = None
) -> Surroundings:
    """Return what a container finds that starts on the host called `name`.

    With `manifests`, those; else those of the daemon that serves the lab's proxy node, and nothing
    where none does. `namespace` stands for that of the Pod which has the host's address, or default
    where none has. Raise ConfigError for a namespace that is no name, SourceError for a path that
    does not exist.
    """
    host = lab.node(name)
    if host.role is not Role.POD:
        return Surroundings()
    daemon = serving(lab)
    paths = list(manifests) or (manifests_of(daemon) if daemon else [])
    found = _from_manifests(host, paths, namespace)
    address = nameserver(daemon, lab.topology) if daemon else None
    return msgspec.structs.replace(found, nameserver=address)


def serving(lab: Lab) -> DaemonStatus | None:
    """Return the status of the daemon on the lab's proxy node, or None where there is none.

    It is found by its control socket, wherever that is: Unix sockets are listed by the network
    namespace they were made in.
    """
    try:
        listed = lab_netns.inside(
            lab.path(lab.topology.proxy_node),
            lambda: Path("/proc/thread-self/net/unix").read_text(errors="replace"),
        )
    except OSError:
        return None  # the node itself is gone
    for line in listed.splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) < 8 or not fields[7].startswith("/") or not int(fields[3], 16) & _LISTENS:
            continue
        try:
            return msgspec.json.decode(control.read(fields[7], "status"), type=DaemonStatus)
        except (ControlError, msgspec.DecodeError):
            continue  # a socket of something else
    return None


def manifests_of(daemon: DaemonStatus) -> list[str]:
    """Return the paths that a daemon reads, absolute; standard input is its own."""
    try:
        working = os.readlink(f"/proc/{daemon.pid}/cwd")
    except OSError:
        return []  # it ended
    paths = (os.path.join(working, path) for path in daemon.manifests if path != "-")
    return [path for path in paths if os.path.exists(path)]


def nameserver(daemon: DaemonStatus, topology: Topology) -> Address | None:
    """Return the address at which a daemon answers DNS for the lab's pods, or None.

    Every address means the proxy node's own; loopback is for the node itself. resolv.conf(5) has no
    place for a port other than 53.
    """
    for place in daemon.dns_listen:
        host, _, port = place.rpartition(":")
        try:
            address = parse_address(host.strip("[]"))
        except ValueError:
            continue
        if port != str(DNS_PORT) or address.is_loopback:
            continue
        return _own(address, topology) if address.is_unspecified else address
    return None


def _own(unspecified: Address, topology: Topology) -> Address:
    node = topology.host(topology.proxy_node)
    return node.ipv4 if unspecified.version == 4 else node.ipv6


def _from_manifests(host: Host, paths: Sequence[str], namespace: str | None) -> Surroundings:
    pods: dict[NamespacedName, Pod] = {}
    problems: list[ManifestError] = []
    events = load(paths) if paths else []
    for event in events:
        if isinstance(event, Problem) and event.error:
            problems.append(event.error)
        elif isinstance(event, Applied) and isinstance(event.object, Pod):
            pods[event.object.name] = event.object
    snapshot, _ = fold(Snapshot(), events)
    pod = _standing_for(host, pods, namespace)
    asked = checked(
        Wanted(
            namespace=namespace or (pod.name.namespace if pod else "default"),
            pod=pod.name.name if pod else "",
        )
    )
    return Surroundings(
        variables=environment(asked, snapshot.services, pods).variables,
        namespace=asked.namespace,
        problems=tuple(map(str, problems)),
    )


def _standing_for(host: Host, pods: dict[NamespacedName, Pod], namespace: str | None) -> Pod | None:
    """Return the Pod that has an address of the host, the first by name where several have."""
    having = (
        pod
        for pod in pods.values()
        if not pod.finished
        and not set(host.addresses).isdisjoint(pod.ips)
        and namespace in (None, pod.name.namespace)
    )
    return min(having, key=lambda pod: pod.name, default=None)

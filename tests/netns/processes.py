"""The worker processes of userspace mode as a test sees them from outside.

Lives here: which there are, what they hold, and what that costs. Must not: ask the daemon, or the
workers themselves.
"""

import os
import select
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.netns.cluster import DEADLINE_SECONDS, Cluster, until

Name = tuple[str, int]
"""Address and port of a socket."""


def workers(cluster: Cluster) -> set[int]:
    """Process ids of the workers in the node's network namespace."""
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


def clients(cluster: Cluster, port: int) -> dict[int, set[Name]]:
    """Return the clients that each process has at a port of the node, also those that have ended
    their own direction."""
    return _peers(cluster, "-tn", "state", "connected", f"sport = :{port}")


def listening(cluster: Cluster, port: int) -> dict[int, set[Name]]:
    """Return which processes listen at a TCP port of the node; the names say nothing."""
    return _peers(cluster, "-tnl", f"sport = :{port}")


def _peers(cluster: Cluster, *arguments: str) -> dict[int, set[Name]]:
    done = cluster.lab.exec("node", ["ss", "-Hp", *arguments], check=True)
    found: dict[int, set[Name]] = {}
    for line in done.stdout.splitlines():
        peer = next(word for word in reversed(line.split()) if not word.startswith("users:"))
        host, _, port = peer.rpartition(":")
        name = (host.strip("[]"), int(port) if port.isdigit() else 0)
        for part in line.split("pid=")[1:]:
            found.setdefault(int(part.partition(",")[0]), set()).add(name)
    return found


def sockets(process: int) -> Counter[str]:
    """Return how many descriptors of each kind a process has: socket, pipe, anon_inode, …"""
    found: Counter[str] = Counter()
    for one in Path(f"/proc/{process}/fd").iterdir():
        found[os.readlink(one).partition(":")[0]] += 1
    return found


def descriptors_at_most(process: int) -> int:
    """Return the soft limit of a process's open files."""
    lines = Path(f"/proc/{process}/limits").read_text().splitlines()
    return next(int(line.split()[3]) for line in lines if line.startswith("Max open files"))


def bound_descriptors(process: int, most: int) -> None:
    """Change the soft limit of a process's open files while it runs, as its own user.

    Root is not enough where it has no CAP_SYS_RESOURCE (prlimit(2)).
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    ids = {line.split()[0]: int(line.split()[1]) for line in lines if line[:4] in ("Uid:", "Gid:")}
    subprocess.run(
        ["prlimit", "--pid", str(process), f"--nofile={most}:"],
        user=ids["Uid:"],
        group=ids["Gid:"],
        extra_groups=[],
        check=True,
    )


def resident_bytes(process: int) -> int:
    """Return what a process has in memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def is_stopped(process: int) -> bool:
    """Whether a process has obeyed SIGSTOP."""
    text = Path(f"/proc/{process}/stat").read_text()
    return text.rpartition(") ")[2].startswith("T")


@contextmanager
def frozen(process: int) -> Iterator[None]:
    """Let a process stand still for a while."""
    os.kill(process, signal.SIGSTOP)
    try:
        until(lambda: is_stopped(process), "it stands still")
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def end(process: int) -> None:
    """Kill a process, and wait until it has let go of all that it held.

    It has no command line any more before its sockets are closed: who connects in between may
    still meet its listener.
    """
    watched = os.pidfd_open(process)
    try:
        os.kill(process, signal.SIGKILL)
        ended, _, _ = select.select([watched], [], [], DEADLINE_SECONDS)
        assert ended, f"process {process} has not ended"
    finally:
        os.close(watched)

"""What answers in `vipd bench dns`: vipd or another name server, on the lab's node.

Lives here: how one is started and known to answer, and what its processes take. Must not: put load
on it.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vipd.bench import dns_tools, sync_cluster
from vipd.bench.datapath_printed import process_ticks
from vipd.bench.dns_cluster import Cluster
from vipd.bench.dns_configurations import Setup, setup
from vipd.bench.dns_plan import CLIENT, NODE, UPSTREAM, VIPD
from vipd.bench.dns_questions import wire_questions
from vipd.bench.lab import Lab
from vipd.bench.lab_daemon import CLI
from vipd.bench.lab_errors import LabError

WORKER_PROGRAM = "vipd.dns.server"
_START_SECONDS = 60.0
_ANSWER_SECONDS = 0.05
_POLL_SECONDS = 0.001
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A name server that answers at port 53 of the node."""

    def __init__(self, lab: Lab, variant: str, process: "subprocess.Popen[bytes]", log: Path):
        self.variant = variant
        self.address = str(lab.node(NODE).ipv4)
        self.start_seconds = 0.0
        """From the start of its process until it has answered the last name."""
        self._lab, self._process, self._log = lab, process, log

    def check(self) -> None:
        """Raise LabError where it has ended."""
        if self._process.poll() is not None:
            said = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise LabError(f"{self.variant} ended with {self._process.returncode}:\n{said}")

    def processes(self) -> tuple[int, ...]:
        """Everything that runs on the node: nothing but the server does."""
        (node,) = (one for one in self._lab.status() if one.name == NODE)
        return node.processes

    def cpu_seconds(self) -> float:
        """Return the processor time that its processes have taken."""
        return sum(process_ticks(_read(pid, "stat")) for pid in self.processes()) / _CLOCK_TICKS

    def memory(self) -> int:
        """Return the resident bytes of the processes that answer: of vipd, those of the worker."""
        answering = [
            pid
            for pid in self.processes()
            if self.variant != VIPD or WORKER_PROGRAM in _read(pid, "cmdline").split("\0")
        ]
        pages = sum(int(_read(pid, "statm").split()[1]) for pid in answering)
        return pages * os.sysconf("SC_PAGE_SIZE")

    def wait_for(self, name: str, began: float) -> None:
        """Wait until a name has an address; raise LabError."""
        deadline = time.monotonic() + _START_SECONDS
        while not self._lab.run(CLIENT, lambda: bool(ask(self.address, name))):
            self.check()
            if time.monotonic() > deadline:
                raise LabError(f"{self.variant} does not answer {name}")
            time.sleep(_POLL_SECONDS)
        self.start_seconds = time.monotonic() - began


@contextmanager
def serving(lab: Lab, variant: str, cluster: Cluster, folder: Path, last: str) -> Iterator[Server]:
    """A server on the lab's node that knows a cluster, inside the block.

    `last` is a name that it answers once it knows all. Raise LabError where it does not.
    """
    address, upstream = (str(lab.node(one).ipv4) for one in (NODE, UPSTREAM))
    made = (
        _vipd(cluster, address, upstream, folder)
        if variant == VIPD
        else setup(variant, cluster.records, address, upstream, folder)
    )
    (folder / "knot").mkdir(exist_ok=True)
    for name, text in made.files.items():
        (folder / name).write_text(text)
    program = made.command[0] if variant == VIPD else dns_tools.path(made.command[0])
    log = folder / "log"
    # `ip netns exec` stays in this process's directory, and the files are named in the folder's.
    script = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", str(folder)]
    began = time.monotonic()
    with log.open("wb") as written:
        process = lab.popen(
            NODE,
            [*script, program, *made.command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            env={**os.environ, **made.environment},
            start_new_session=True,
        )
    server = Server(lab, variant, process, log)
    try:
        server.wait_for(last, began)
        yield server
    finally:
        process.terminate()
        process.wait()


def _vipd(cluster: Cluster, address: str, upstream: str, folder: Path) -> Setup:
    (folder / "cluster.json").write_bytes(cluster.manifests)
    return Setup(
        {"vipd.json": configuration(upstream)},
        (
            *CLI,
            *("dns", "serve", "--config", "vipd.json", "--manifests", "cluster.json"),
            *("--listen", address, "--allow", "10.244.0.0/16"),
        ),
    )


def configuration(upstream: str) -> str:
    """Return vipd's configuration: whom to ask for names of others."""
    return json.dumps(
        {
            "apiVersion": "vipd/v1alpha1",
            "kind": "VipdConfiguration",
            "serviceCIDRs": [str(sync_cluster.SERVICE_RANGE)],
            "dns": {"forward": {"upstreams": [upstream]}},
        }
    )


@contextmanager
def upstream(lab: Lab) -> Iterator[None]:
    """Somebody who knows every name, to forward to."""
    command = [sys.executable, "-P", "-m", "vipd.bench.dns_upstream", str(lab.node(UPSTREAM).ipv4)]
    process = lab.popen(UPSTREAM, command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def ask(address: str, name: str, timeout: float = _ANSWER_SECONDS) -> frozenset[str] | None:
    """Return the addresses of a name, none where it has none; None where there is no answer."""
    message = b"\x00\x07" + wire_questions([name])[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.settimeout(timeout)
        try:
            opened.connect((address, 53))
            opened.send(message)
            data = opened.recv(4096)
        except OSError:
            return None
    if data[3] & 15 not in (0, 3):
        return None
    count, at = int.from_bytes(data[6:8]), len(message)
    # All servers write the owner as a pointer to the question.
    return frozenset(
        socket.inet_ntoa(data[end - 4 : end]) for end in range(at + 16, at + 16 * count + 1, 16)
    )


def until(address: str, name: str, seen: Callable[[frozenset[str]], bool], timeout: float) -> float:
    """Return the moment when an answer was as it should be; raise LabError."""
    deadline = time.monotonic() + timeout
    while True:
        found = ask(address, name, 1.0)
        now = time.monotonic()
        if found is not None and seen(found):
            return now
        if now > deadline:
            raise LabError(f"{name}: {found} after {timeout:.0f} s")


def _read(pid: int, name: str) -> str:
    """Return a file of a process in /proc; of one that has ended, what makes it count nothing."""
    try:
        return Path(f"/proc/{pid}", name).read_text()
    except OSError:
        return "0 " * 52

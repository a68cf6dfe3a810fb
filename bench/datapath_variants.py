"""What stands between client and endpoint in `vipd bench datapath`: nothing, vipd, or HAProxy.

Lives here: which variants this host can do, how one is started on the lab's node and known to
serve, and what its processes take. Must not: put load on it.
"""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vipd.backends.registry import MODES
from vipd.backends.userspace.worker import PROGRAM as WORKER_PROGRAM
from vipd.bench import datapath_plan as planned
from vipd.bench import datapath_tools, sync_cluster
from vipd.bench.datapath_datagrams import SIZE
from vipd.bench.datapath_plan import CLIENT, DIRECT, HAPROXY, NODE, SERVER, Asked, Measure, Plan
from vipd.bench.datapath_printed import process_ticks, proportional_bytes
from vipd.bench.datapath_report import Memory
from vipd.bench.datapath_requests import REQUEST, read_answer
from vipd.bench.lab import Lab
from vipd.bench.lab_daemon import CLI, Daemon
from vipd.bench.lab_errors import LabError
from vipd.bench.switch import lacking

_START_SECONDS = 60.0
_SERVES_SECONDS = 10.0
_ANSWER_SECONDS = 0.5
_POLL_SECONDS = 0.02
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def unavailable(variants: Sequence[str]) -> dict[str, str]:
    """Return, for each variant that this host cannot do, why."""
    modes = [one for one in variants if one not in (DIRECT, HAPROXY)]
    why = {one: f"this vipd has no mode {one}" for one in modes if one not in MODES}
    why |= lacking([one for one in modes if one in MODES])
    if HAPROXY in variants and datapath_tools.found("haproxy") is None:
        why[HAPROXY] = f"apt-get install {datapath_tools.PACKAGES['haproxy']}"
    return {one: why[one] for one in variants if one in why}


class Proxy:
    """A variant that serves: where the client asks, and the processes that are the proxy."""

    def __init__(self, lab: Lab, variant: str, alive: Callable[[], None]) -> None:
        self.variant = variant
        self.asked: Asked = planned.asked(variant, str(lab.node(SERVER).ipv4))
        self.check = alive
        """Raises LabError where the proxy has ended."""
        self._lab = lab

    @property
    def forwards(self) -> bool:
        """Whether bytes pass through its processes."""
        return self.variant in planned.FORWARDERS

    @property
    def has_udp(self) -> bool:
        """Whether it serves UDP: HAProxy does not."""
        return self.variant != HAPROXY

    def processes(self) -> tuple[int, ...]:
        """Everything that runs on the node: nothing but the proxy does, whoever its parent is."""
        (node,) = (one for one in self._lab.status() if one.name == NODE)
        return node.processes

    def cpu_seconds(self) -> float:
        """Return the processor time that its processes have taken."""
        return sum(map(process_ticks, self._read("stat"))) / _CLOCK_TICKS

    def memory(self) -> tuple[Memory, ...]:
        """Return what each of its processes has resident now."""
        found = []
        for pid in self.processes():
            try:
                folder = Path(f"/proc/{pid}")
                name = (folder / "comm").read_text().strip()
                command = (folder / "cmdline").read_text().split("\0")
                pages = int((folder / "statm").read_text().split()[1])
                share = proportional_bytes((folder / "smaps_rollup").read_text())
            except OSError:  # it has ended
                continue
            forwards = self.variant == HAPROXY or WORKER_PROGRAM in command
            found.append(Memory(name, forwards, pages * os.sysconf("SC_PAGE_SIZE"), share))
        return tuple(found)

    def _read(self, name: str) -> Iterator[str]:
        for pid in self.processes():
            try:
                yield Path(f"/proc/{pid}", name).read_text()
            except OSError:  # it has ended
                continue


@contextmanager
def serving(lab: Lab, variant: str, plan: Plan, folder: Path) -> Iterator[Proxy]:
    """A variant on the lab's node, inside the block; raise LabError where it does not serve."""
    match variant:
        case planned.DIRECT:
            proxy = Proxy(lab, variant, lambda: None)
            _wait_until_served(lab, proxy, plan)
            yield proxy
        case planned.HAPROXY:
            with _haproxy(lab, plan, folder) as proxy:
                _wait_until_served(lab, proxy, plan)
                yield proxy
        case _:
            with _vipd(lab, variant, plan, folder) as proxy:
                _wait_until_served(lab, proxy, plan)
                yield proxy


@contextmanager
def _vipd(lab: Lab, mode: str, plan: Plan, folder: Path) -> Iterator[Proxy]:
    manifests = folder / "manifests"
    manifests.mkdir()
    document = planned.manifests(str(lab.node(SERVER).ipv4), plan.services)
    (manifests / "services.json").write_bytes(document)
    daemon = Daemon(lab, manifests, folder, mode)
    daemon.arguments = (*daemon.arguments, "--service-cidr", str(sync_cluster.SERVICE_RANGE))
    try:
        daemon.start(_START_SECONDS)
        yield Proxy(lab, mode, lambda: None)
    finally:
        daemon.stop()
        # Workers outlive their daemon on purpose, and some modes keep a record outside the node.
        lab.exec(NODE, [*CLI, "cleanup"])


@contextmanager
def _haproxy(lab: Lab, plan: Plan, folder: Path) -> Iterator[Proxy]:
    # The measured address and those of all other services.
    own = ("ip", "route", "add", "local", str(sync_cluster.SERVICE_RANGE), "dev", "lo")
    lab.exec(NODE, own, check=True)
    configuration = folder / "haproxy.cfg"
    configuration.write_text(planned.haproxy_configuration(str(lab.node(SERVER).ipv4), plan))
    log = folder / "haproxy.log"
    with log.open("wb") as written:
        process = lab.popen(
            NODE,
            [datapath_tools.path("haproxy"), "-db", "-f", str(configuration)],
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def check() -> None:
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip()
            raise LabError(f"haproxy ended with status {process.returncode}:\n{said}")

    try:
        yield Proxy(lab, HAPROXY, check)
    finally:
        process.terminate()
        process.wait()


def _wait_until_served(lab: Lab, proxy: Proxy, plan: Plan) -> None:
    """Wait until the client has an answer over TCP and, where it is measured, UDP."""
    asks: list[Callable[[Asked], bool]] = [_answers_http]
    if Measure.UDP in plan.measures and proxy.has_udp:
        asks.append(_answers_udp)
    deadline = time.monotonic() + _SERVES_SECONDS
    for ask in asks:
        while not lab.run(CLIENT, lambda ask=ask: ask(proxy.asked)):  # type: ignore[misc]
            proxy.check()
            if time.monotonic() > deadline:
                raise LabError(f"{proxy.variant}: nothing answers at {proxy.asked.address}")
            time.sleep(_POLL_SECONDS)


def _answers_http(asked: Asked) -> bool:
    try:
        with socket.create_connection((asked.address, asked.http), _ANSWER_SECONDS) as opened:
            opened.sendall(REQUEST)
            return b" 200 " in read_answer(opened)
    except OSError:
        return False


def _answers_udp(asked: Asked) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.settimeout(_ANSWER_SECONDS)
        try:
            opened.connect((asked.address, asked.udp))
            opened.send(bytes(SIZE))
            return len(opened.recv(SIZE)) == SIZE
        except OSError:
            return False
